"""The manifest of a checkpoint: sizes and checksums of its files. A checkpoint with a manifest was written to its end.

In: a folder. Out: MANIFEST in it, or the first damage found. Weights are hashed by xxh3, which reads a file faster than
anything writes it. torch's archives (.pt, .pth) contain a CRC-32 of every tensor already: for them everything but
the tensors is hashed, so that a save does not read the optimizer again; a check reads it.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from fastdpo.files import write_whole

MANIFEST = "fastdpo_manifest.json"
_FORMAT = 1
_ARCHIVES = (".pt", ".pth")  # of torch
_NOT_READ = "README.md"  # training does not read it, and people edit it


class EarlyChecksums:
    """Reads weights in a thread while the rest of a checkpoint is written: the manifest then does not wait for it."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(1, "fastdpo_checksums")
        self._coming: dict[Path, tuple[os.stat_result, Future[str]]] = {}

    def start(self, folder: Path) -> None:
        """Call this when the weights in the folder are complete."""
        for path in folder.glob("*.safetensors"):
            self._coming[path] = (path.stat(), self._threads.submit(_checksum, path))

    def of(self, path: Path) -> str:
        """The checksum of a file, also of one that was not read early or has changed since."""
        before, coming = self._coming.pop(path, (None, None))
        now = path.stat()
        if before is None or coming is None or (before.st_mtime_ns, before.st_size) != (now.st_mtime_ns, now.st_size):
            return _checksum(path)
        return coming.result()

    def forget(self) -> None:
        """Call this if the save failed."""
        for _, coming in self._coming.values():
            coming.cancel()
        self._coming = {}


def write_manifest(folder: Path, early: EarlyChecksums | None = None) -> None:
    """Call this once all files of the checkpoint are written.

    Raises:
        OSError: a file is cut off, although no write has failed.
    """
    if (found := cut_off(folder)) is not None:
        raise OSError(errno.EIO, f"{folder} must hold whole files after a save, but {found}")
    checksum = _checksum if early is None else early.of
    files = {name: {"bytes": path.stat().st_size, "checksum": checksum(path)} for name, path in _files(folder)}
    write_whole(folder / MANIFEST, json.dumps({"format": _FORMAT, "files": files}, indent=1) + "\n")


def has_manifest(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def damage(folder: Path, *, quick: bool = False) -> str | None:
    """The first difference between a folder and its manifest, in words; None if there is none.

    Args:
        quick: compare sizes only.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"].items()
        expected = {name: (int(facts["bytes"]), str(facts["checksum"])) for name, facts in files}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    for name, facts in expected.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"{MANIFEST} names {name}, which is outside of the folder"
        found = _difference(folder / name, *facts, quick=quick)
        if found is not None:
            return f"{name} {found}"
    return None


def cut_off(folder: Path) -> str | None:
    """A file that is too short for what its beginning announces; None if there is none."""
    for path in folder.rglob("*"):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
        except SafetensorError as error:
            return f"{path.name} cannot be read ({error})"
        if path.suffix in _ARCHIVES and not zipfile.is_zipfile(path):
            return f"{path.name} is cut off"
    return None


def size_of(folder: Path) -> int:
    """The bytes of all files in a folder."""
    return sum(path.stat().st_size for _, path in _files(folder))


def _difference(path: Path, size: int, checksum: str, *, quick: bool) -> str | None:
    if not path.is_file():
        return "is missing"
    found = path.stat().st_size
    if found != size:
        return f"has {found:,} bytes instead of {size:,}"
    try:
        is_same = quick or _checksum(path, kind=checksum.partition(":")[0], reads_all=True) == checksum
    except (OSError, ValueError, struct.error, zipfile.BadZipFile) as error:
        return f"cannot be read ({error})"
    return None if is_same else "has another checksum"


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name, path) of all files, also in subfolders."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in (MANIFEST, _NOT_READ):
            yield name, path


def _checksum(path: Path, *, kind: str | None = None, reads_all: bool = False) -> str:
    """The checksum of a file, by the kind in the manifest.

    Args:
        reads_all: compare the tensors of an archive with their CRC-32.
    """
    if kind is None:
        has_crcs = path.suffix in _ARCHIVES and torch.serialization.get_crc32_options()
        kind = "crc32" if has_crcs and zipfile.is_zipfile(path) else "xxh3"
    if kind == "xxh3":
        return f"xxh3:{_xxh3(path)}"
    with zipfile.ZipFile(path) as archive:
        if reads_all and (bad := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"{bad} has another CRC-32")
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    return f"crc32:{_between(path, entries)}"


def _between(path: Path, entries: Sequence[zipfile.ZipInfo]) -> str:
    """The hash of an archive without the contents of its entries: headers, padding, and the directory with CRC-32s."""
    whole, start = xxhash.xxh3_64(), 0
    with path.open("rb") as file:
        for entry in entries:
            file.seek(entry.header_offset + 26)
            content = entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))  # name and extra field
            file.seek(start)
            whole.update(file.read(content - start))
            start = content + entry.compress_size
        file.seek(start)
        whole.update(file.read())
    return whole.hexdigest()


def _xxh3(path: Path) -> str:
    whole, buffer = xxhash.xxh3_64(), memoryview(bytearray(2**20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            whole.update(buffer[:count])
    return whole.hexdigest()
