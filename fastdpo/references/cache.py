"""Log-probs of sequences on disk: one folder per reference, with shards that are written once and only merged when
there are many.

    <root>/<key of the reference>/about.json                      the facts behind the key, for people
                                  <digest of the file>.safetensors  keys (N, 16) uint8, logps (N,) in nats

A sequence is identified by a digest of its tokens and its loss mask. The same sequence finds its log-prob whatever the
dataset, order, split, tokenizer or truncation; any other sequence does not. A shard's name is the digest of its bytes:
a truncated or edited shard does not match its name and is ignored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers.utils import logging

from fastdpo.files import write_whole
from fastdpo.references.fingerprint import digest, reference_key

logger = logging.get_logger(__name__)

_KEY_BYTES = 16
_MOST_SHARDS = 32  # that are read one by one; a long precompute leaves some hundreds


def default_cache_dir() -> Path:
    """`fastdpo/ref_logps` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdpo" / "ref_logps"


def sequence_key(tokens: NDArray[np.integer], is_counted: NDArray[np.bool_]) -> bytes:
    """The key of a sequence: its token ids (L,) and the mask (L,) of the tokens in the sum."""
    whole = hashlib.blake2b(len(tokens).to_bytes(8, "little"), digest_size=_KEY_BYTES)
    whole.update(np.ascontiguousarray(tokens, dtype="<i4").data)
    whole.update(np.ascontiguousarray(is_counted, dtype=np.uint8).data)
    return whole.digest()


class LogpsCache:
    """The folder of one reference.

    Args:
        root: folder of all references.
        facts: from `reference_facts`.
    Raises:
        ValueError: the folder cannot be made.
    """

    def __init__(self, root: Path | str | None, facts: Mapping[str, str]) -> None:
        self.key = reference_key(facts)
        self.folder = (default_cache_dir() if root is None else Path(root).expanduser()) / self.key
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "about.json").exists():
                write_whole(self.folder / "about.json", (json.dumps(dict(facts), indent=2) + "\n").encode())
        except OSError as error:
            raise ValueError(f"ref_cache_dir must be a folder that can be written to, got {root}: {error}") from error

    def read(self, *, mend: bool = True) -> dict[bytes, float]:
        """Log-prob by sequence key, from all undamaged shards.

        Args:
            mend: warn of damaged shards, remove them, and merge the others if there are many. Only one process of a
                run should set it.
        """
        found: dict[bytes, float] = {}
        good: list[Path] = []
        damaged: list[Path] = []
        seen: set[Path] = set()
        while new := sorted(set(self.folder.glob("*.safetensors")) - seen):  # again: others may put shards together
            seen.update(new)
            for path in new:
                try:
                    found.update(self._read_shard(path))
                    good.append(path)
                except FileNotFoundError:  # another process merged it, or removed it as damaged
                    continue
                except Exception as error:  # any exception of numpy, safetensors or the file system on a damaged file
                    logger.debug(f"{path}: {error}")
                    damaged.append(path)
        if damaged and mend:
            logger.warning(
                f"{len(damaged)} cache files of reference log-probs are truncated or edited; their log-probs will be"
                f" computed again: {', '.join(map(str, damaged))}"
            )
            _remove(damaged)
        if len(good) > _MOST_SHARDS and mend:
            self._put_together(found, good)
        return found

    def _put_together(self, found: Mapping[bytes, float], shards: Sequence[Path]) -> None:
        """Merges the shards into one and removes them; a read-only folder stays unchanged."""
        try:
            whole = self.write(list(found), list(found.values()))
        except OSError as error:
            logger.debug(f"{self.folder}: {error}")
            return
        _remove(path for path in shards if path != whole)

    def _read_shard(self, path: Path) -> dict[bytes, float]:
        from safetensors.numpy import load

        content = path.read_bytes()
        if digest(content, self.key.encode()) != path.stem:
            raise ValueError("the file was changed after it was written, or belongs to another reference")
        tensors = load(content)
        keys = np.ascontiguousarray(tensors["keys"]).tobytes()
        starts = range(0, len(keys), _KEY_BYTES)
        return {keys[i : i + _KEY_BYTES]: x for i, x in zip(starts, tensors["logps"].tolist(), strict=True)}

    def write(self, keys: Sequence[bytes], logps: Sequence[float]) -> Path:
        """Writes a new shard. The write is atomic: a killed process never leaves part of a shard."""
        from safetensors.numpy import save

        content = save(
            {
                "keys": np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, _KEY_BYTES),
                "logps": _narrow(logps),
            }
        )
        path = self.folder / f"{digest(content, self.key.encode())}.safetensors"
        write_whole(path, content, is_durable=True)
        return path


def _narrow(logps: Sequence[float]) -> NDArray[np.floating]:
    """As fp32 if that rounds none of them, as the log-probs of all models but those in fp64."""
    wide = np.asarray(logps, dtype=np.float64)
    narrow = wide.astype(np.float32)
    return narrow if np.array_equal(wide, narrow.astype(np.float64)) else wide


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # another process was faster, or the folder is read-only
            path.unlink()
