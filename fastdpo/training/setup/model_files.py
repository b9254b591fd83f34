"""Checks the files in a model's folder, which a stranger may have written: libraries would read some of them without
bounds, and fail on others in words of their own.

In: the name of a model, an adapter or a tokenizer. Out: nothing, or a ValueError that names the folder or the file.
Only local folders are looked into before a library loads them.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME

from fastdpo.data.depth import is_too_deep

MOST_JSON_BYTES = 512 * 2**20  # the largest tokenizer.json in use has about 35 MB
_READ_WHOLE = ("config.json", "tokenizer.json", "tokenizer_config.json", "adapter_config.json", "chat_template.json")


def check_json_files(folder: str) -> None:
    """Refuses a folder with a JSON file of a model or tokenizer so large that reading it would take all memory."""
    for name in _READ_WHOLE:
        path = Path(folder, name)
        if path.is_file() and path.stat().st_size > MOST_JSON_BYTES:
            size = path.stat().st_size
            raise ValueError(f"{path} must have at most {MOST_JSON_BYTES:,} bytes, got {size:,}: it is read as a whole")


@contextmanager
def readable_files(argument: str, name: str) -> Iterator[None]:
    """Around from_pretrained of what `argument` names.

    Raises:
        ValueError: a JSON file is too large, nests too deeply, or has values that are not of its kind; or weights are
            cut off, pickled objects, or in another folder.
    """
    check_json_files(name)
    try:
        _check_weight_map(name)
        yield
    except SafetensorError as error:
        raise ValueError(
            f"{argument} must have complete weights in {str(name)!r}, got a file that cannot be read: {error}; copy or"
            " download it again"
        ) from error
    except pickle.UnpicklingError:
        raise ValueError(
            f"{argument} must have its weights as safetensors, or as plain tensors in a .bin file, got {str(name)!r},"
            " whose file holds other Python objects; they are never unpickled, because that runs code"
        ) from None
    except StrictDataclassError as error:
        raise ValueError(f"{argument} must have a config of its kind of model in {str(name)!r}: {error}") from error
    except RecursionError:
        raise too_deep(name) from None


def too_deep(folder: str) -> ValueError:
    """The error of a JSON file in this folder that nests values too deeply for its parser."""
    for path in sorted(Path(folder).glob("*.json")):
        try:
            is_deep = is_too_deep(json.loads(path.read_text(encoding="utf-8")))
        except RecursionError:
            is_deep = True
        except (OSError, ValueError):  # no JSON
            is_deep = False
        if is_deep:
            return ValueError(f"{path} must not nest its values so deeply")
    return ValueError(f"the JSON files of {folder!r} must not nest their values so deeply")


def _check_weight_map(folder: str) -> None:
    """Refuses an index that does not say which of the files beside it holds which weight."""
    for name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        path = Path(folder, name)
        if not path.is_file():
            continue
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            files = set(index["weight_map"].values())
            index["metadata"].items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} must be the index of a model's weights, got {error!r}") from None
        for file in files:
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"{path} must name files in its own folder, got {file!r}")
