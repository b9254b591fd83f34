"""Checks recipes with several datasets, in the forms of TRL (`datasets:`) and the alignment-handbook
(`dataset_mixture:`, `dataset_mixer:`), and converts them to one form.

In: YAML. Out: lists of parts, each a dict with some of PART_KEYS, for `fastdpo.data.mixture`. `fraction` (TRL) is a
share of the mixture; `weight` (handbook) is a share of the set itself. Refuses unknown keys and suggests the nearest.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

NAMES = ("dataset_mixture", "dataset_mixer", "dataset_splits", "dataset_configs")
PART_KEYS = ("path", "name", "data_dir", "data_files", "split", "columns", "fraction", "weight", "seed")
_RENAMED = {"id": "path", "config": "name"}  # the handbook's
_MIXTURE_KEYS = ("datasets", "seed", "test_split_size", "streaming")


def checked_parts(value: Any, option: str = "datasets") -> list[dict[str, Any]]:
    """The parts of a mixture under TRL's names.

    Raises:
        ValueError: the value is not a list of mappings, a key is unknown, a path is missing, or a share is invalid.
    """
    if not isinstance(value, list) or not value or not all(isinstance(part, Mapping) for part in value):
        raise ValueError(f"{option} must be a list of sets, each with a path, got {value!r}")
    parts = [_checked_part(part, option) for part in value]
    for share in ("fraction", "weight"):
        given = [part[share] for part in parts if share in part]
        if any(isinstance(x, bool) or not isinstance(x, int | float) or x < 0 for x in given):
            raise ValueError(f"{option} must have a {share} >= 0 for each set, got {given}")
        if share == "fraction" and given and (len(given) < len(parts) or sum(given) == 0):
            raise ValueError(
                f"{option} must have a fraction for every set or for none, at least one of them above 0, got {given}"
            )
        if share == "weight" and any(x > 1 for x in given):
            raise ValueError(f"{option} must have weights of at most 1 (shares of each set's rows), got {given}")
    if any("fraction" in part for part in parts) and any("weight" in part for part in parts):
        raise ValueError(
            f"{option} must not mix fraction (the share of the mixture) and weight (the share of the set's own rows)"
        )
    return parts


def _checked_part(part: Mapping[str, Any], option: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in part.items():
        name = _RENAMED.get(str(key), str(key))
        if name not in PART_KEYS:
            nearest = difflib.get_close_matches(name, [*PART_KEYS, *_RENAMED], n=1)
            raise ValueError(
                f"{option} must have sets with keys among {', '.join(PART_KEYS)}, got {key!r}"
                + (f"; did you mean {nearest[0]!r}?" if nearest else "")
            )
        if name in result and result[name] != value:
            raise ValueError(f"{option} must set {name!r} only once, got {result[name]!r} and {value!r}")
        if value is not None:
            result[name] = value
    if not isinstance(result.get("path"), str):
        raise ValueError(f"{option} must have a path for every set, got {dict(part)!r}")
    if isinstance(result.get("columns"), str):
        result["columns"] = [column.strip() for column in result["columns"].split(",")]
    return result


def as_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Our options for the handbook's names (NAMES).

    Raises:
        ValueError: the values are invalid or contradict each other.
    """
    if "dataset_mixture" in given and "dataset_mixer" in given:
        raise ValueError("dataset_mixture and dataset_mixer must not both be given: both set the training data")
    if given.get("dataset_mixture") is not None:
        return _of_mixture(given["dataset_mixture"])
    if given.get("dataset_mixer") is not None:
        return _of_mixer(given["dataset_mixer"], given.get("dataset_splits"), given.get("dataset_configs"))
    alone = [name for name, value in given.items() if value is not None]
    if alone:
        raise ValueError(f"{alone[0]} must be used together with dataset_mixer, got {given[alone[0]]!r}")
    return {}


def _of_mixture(mixture: Any) -> dict[str, Any]:
    unknown = [key for key in mixture if key not in _MIXTURE_KEYS] if isinstance(mixture, Mapping) else []
    if not isinstance(mixture, Mapping) or "datasets" not in mixture or unknown:
        raise ValueError(
            f"dataset_mixture must be a mapping with keys among {', '.join(_MIXTURE_KEYS)}, got {mixture!r}"
        )
    parts = checked_parts(mixture["datasets"], "dataset_mixture.datasets")
    if mixture.get("seed") is not None:
        parts = [{**part, "seed": mixture["seed"]} if "weight" in part else part for part in parts]
    options: dict[str, Any] = {"datasets": parts}
    if mixture.get("test_split_size") is not None:
        options["eval_fraction"] = mixture["test_split_size"]
    if mixture.get("streaming"):
        options["dataset_streaming"] = True
    return options


def _of_mixer(mixer: Any, splits: Any, configs: Any) -> dict[str, Any]:
    """Shares count the training splits' own rows, from their start; test splits are used whole."""
    if not isinstance(mixer, Mapping) or not mixer:
        raise ValueError(f"dataset_mixer must map each set to its share, such as `name: 1.0`, got {mixer!r}")
    splits = ["train", "test"] if splits is None else [splits] if isinstance(splits, str) else list(splits)
    configs = [None] * len(mixer) if configs is None else [configs] if isinstance(configs, str) else list(configs)
    if len(configs) != len(mixer):
        raise ValueError(f"dataset_configs must have one entry for each of {len(mixer)} sets, got {configs!r}")
    unclear = [split for split in splits if "train" not in split and "test" not in split]
    if unclear:
        raise ValueError(f"dataset_splits must contain 'train' or 'test' in every name, got {unclear[0]!r}")
    train, test = [], []
    for (path, share), config in zip(mixer.items(), configs, strict=True):
        part = {"path": str(path), **({} if config is None else {"name": config})}
        train += [{**part, "split": split, "weight": share} for split in splits if "train" in split]
        test += [{**part, "split": split} for split in splits if "train" not in split]
    if not train:
        raise ValueError(f"dataset_splits must have at least one training split, got {splits!r}")
    options: dict[str, Any] = {"datasets": checked_parts(train, "dataset_mixer")}
    return {**options, "eval_datasets": test} if test else options
