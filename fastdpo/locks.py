"""Locks between processes that write to one folder or file: the second is refused, or waits.

In: a folder, or a file. Out: LOCK_FILE in the folder, or a file of its own beside the file, which says who holds the
lock: host and process. The system frees the lock when its process ends, however it ends, so none is stale. Where a file
system has no locks, the process that the lock's file names is looked up: on this host it may have ended; on another
host the file must be removed by hand.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

LOCK_FILE = "_fastdpo.lock"  # Trainer does not push files to the Hub whose names begin so
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems without them
_SECONDS_BETWEEN_TRIES = 0.5

_held: dict[tuple[str, int], int] = {}  # (real path of a lock's file, process) -> how often it holds the lock


class Locked(ValueError):
    """Another process holds the lock."""


@contextmanager
def locked(
    place: Path | str, name: str, *, wait: Callable[[str], None] | None = None, is_file: bool = False
) -> Iterator[None]:
    """Holds the lock of a place inside the block. A process may hold it several times; a forked child does not.

    Args:
        place: a folder, or a file, which need not exist yet.
        name: the setting that names the place, for the error.
        wait: called once with who holds the lock, before this process waits for it. None: refuse.
    Raises:
        Locked: another process holds the lock, and there is no `wait`.
        ValueError: the folder is a file, or cannot be written to.
    """
    place = Path(place)
    path = place.with_name(f".{place.name}.lock") if is_file else place / LOCK_FILE
    if path.parent.exists() and not path.parent.is_dir():
        raise ValueError(f"{name} must be a directory, got the file {path.parent}")
    key = os.path.realpath(path), os.getpid()
    if _held.get(key, 0) > 0:
        _held[key] += 1
        try:
            yield
        finally:
            _held[key] -= 1
        return
    made = [each for each in (path.parent, *path.parent.parents) if not each.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _acquire(path, place, name, wait)
    except OSError as error:
        raise ValueError(
            f"{name} must be a folder that can be written to, got {path.parent}: {error.strerror}"
        ) from error
    _held[key] = 1
    try:
        yield
    finally:
        del _held[key]
        path.unlink(missing_ok=True)
        os.close(handle)
        with suppress(OSError):  # a run that was refused leaves no folder; others are not empty
            for each in made:
                each.rmdir()


def _acquire(path: Path, place: Path, name: str, wait: Callable[[str], None] | None) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if _is_free(handle):
            if not _is_at(handle, path):  # its holder has removed it since it was opened
                os.close(handle)
                continue
            os.ftruncate(handle, 0)
            with suppress(OSError):  # a full disk: the lock holds without its holder's name
                os.pwrite(handle, json.dumps(_myself()).encode(), 0)
            return handle
        holder = _in_words(_read(handle))
        os.close(handle)
        if wait is None:
            raise Locked(
                f"{name} must not be in use by another run, got {place}, which {holder} uses; wait for its end, or"
                f" choose another one (if that process is gone, remove {path})"
            )
        wait(holder)
        wait = _silent
        time.sleep(_SECONDS_BETWEEN_TRIES)


def _is_free(handle: int) -> bool:
    """Takes the lock of the system; without one, looks at who wrote the file."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            return False
    holder = _read(handle)
    return not holder or (holder.get("host") == _myself()["host"] and not _is_running(holder))


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _read(handle: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(handle, 4096, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _myself() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _is_running(holder: dict[str, Any]) -> bool:
    try:
        os.kill(int(holder.get("pid", 0)), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:  # it runs as another user
        pass
    return True


def _in_words(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')},"


def _silent(holder: str) -> None:
    pass
