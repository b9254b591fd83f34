"""Files that are either whole or not there: written beside their place, then renamed.

In: bytes or text and a path. A process that is killed leaves the old file, or none, and never part of a new one.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path | str, content: bytes | str, *, is_durable: bool = False) -> None:
    """Replaces the file at once.

    Args:
        content: text is written as UTF-8.
        is_durable: wait until the disk has the content, so that it also survives a power failure.
    Raises:
        OSError: it cannot be written, for example on a full disk. It names the file.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with naming(path), os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            if is_durable:
                os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside, the error of a write names the file, as the error of opening one does."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _umask() -> int:
    """The process's mask of permissions; the system has no call that only reads it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
