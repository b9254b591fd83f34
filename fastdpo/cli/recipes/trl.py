"""Recipes of TRL's scripts and of the alignment-handbook, with our option names. `fastdpo train --config` also accepts
the unchanged recipes.

In: the mapping in the YAML file. Out: lines in a Book.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdpo.cli.options import mixtures, names
from fastdpo.cli.options.table import read_table
from fastdpo.cli.recipes.book import Book, Rule, follow
from fastdpo.cli.recipes.common import put_data
from fastdpo.data.sources.loading import SUFFIXES

MARKS_OF_TRL = ("dataset_name", "datasets", "dataset_train_split", "dataset_test_split", "test_split_size", "dtype")
MARKS_OF_HANDBOOK = (
    *("dataset_mixer", "dataset_mixture", "dataset_splits", "dataset_configs", "preprocessing_num_workers"),
    *("hub_model_revision", "auto_insert_empty_system_msg", "text_column", "truncation_side"),
)


def options_of_train() -> set[str]:
    table = read_table()
    return {table["options"][key]["name"] for key in table["train"]} - {"config"}


def migrate_trl(recipe: Mapping[str, Any], book: Book) -> None:
    """Migrates recipes of both projects; no rows are held out unless the recipe evaluates on some."""
    recipe = dict(recipe)
    of_mixture = {name: recipe.pop(name) for name in mixtures.NAMES if name in recipe}
    former = {name: recipe.pop(name) for name in read_table()["former"] if name in recipe and name not in _RULES}
    if recipe.get("datasets"):
        recipe.pop("dataset_name", None)
    follow(recipe, _RULES, options_of_train(), book)
    for name, value in mixtures.as_options(of_mixture).items():
        comment = f"was {', '.join(of_mixture)}"
        if name in ("datasets", "eval_datasets"):
            put_data(book, value, comment, evaluated=name == "eval_datasets")
        else:
            book.put(name, value, comment)
    if former:
        _follow_former(former, book)
    if "lora_target_modules" not in book.lines and book.value("use_peft"):
        book.lose(
            "lora_target_modules", None, "PEFT chooses the layers in TRL; fastdpo puts the adapter on all linear layers"
        )
    _evaluate_as_trl(book)


def _evaluate_as_trl(book: Book) -> None:
    is_asked = str(book.value("eval_strategy", "no")).lower() not in ("no", "false")
    if any(name in book.lines for name in ("eval_dataset", "eval_datasets", "eval_fraction", "eval_split")):
        return
    if not is_asked:
        book.put("eval_fraction", 0, "not in the recipe: TRL trains on all rows")
    elif not str(book.value("dataset", "")).endswith(SUFFIXES) and "datasets" not in book.lines:
        book.put("eval_split", "test", "not in the recipe: TRL's default")


def _follow_former(former: dict[str, Any], book: Book) -> None:
    """Handles settings that TRL has removed."""
    from fastdpo.training.settings.trl_names import SETTINGS  # in a package that imports transformers

    for name, value in former.items():
        entry = SETTINGS[name]
        if any(value is off for off in entry.off):
            continue
        if entry.becomes is None:
            book.lose(name, value, f"instead, in Python: {entry.instead.format(value=value)}")
            continue
        settings = {key: line.value for key, line in book.lines.items()}
        new = entry.becomes(value, settings)
        if not new:
            book.lose(name, value, entry.instead.format(value=value))
        for key, setting in new.items():
            book.put(key, setting, f"was {name}: {value}")


def _renamed(name: str, ours: str) -> Rule:
    def rule(value: Any, book: Book, recipe: Mapping[str, Any]) -> None:
        if ours in recipe and recipe[ours] != value:
            raise ValueError(f"the recipe must set {ours} only once, got {recipe[ours]!r} and {name}: {value!r}")
        if value is not None:
            book.put(ours, value, f"was {name}")

    return rule


def _computed(name: str) -> Rule:
    def rule(value: Any, book: Book, recipe: Mapping[str, Any]) -> None:
        for key, new in names.COMPUTED[name](value).items():
            book.put(key, new, f"was {name}: {value}")

    return rule


def _answered(name: str) -> Rule:
    def rule(value: Any, book: Book, recipe: Mapping[str, Any]) -> None:
        refusal = names.refusal(name, value)
        if refusal is not None:
            book.lose(name, value, f"instead: {refusal.partition('instead: ')[2]}")

    return rule


def _variable(name: str) -> Rule:
    def rule(value: Any, book: Book, recipe: Mapping[str, Any]) -> None:
        if value is not None:
            book.environment[names.ENVIRONMENT[name]] = str(value)

    return rule


def _sets(value: Any, book: Book, recipe: Mapping[str, Any]) -> None:
    parts = mixtures.checked_parts(value)
    if parts == value:
        book.put("datasets", parts)
    else:
        put_data(book, parts, "was datasets")


def _environment(value: Any, book: Book, recipe: Mapping[str, Any]) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"env must hold one variable per line as `NAME: value`, got {value!r}")
    book.environment.update({str(name): str(setting) for name, setting in value.items()})


_RULES: dict[str, Rule] = {
    **{name: _renamed(name, ours) for name, ours in names.RENAMED.items()},
    **{name: _computed(name) for name in names.COMPUTED},
    **{name: _answered(name) for name in names.ANSWERED if name not in ("loss_type",)},
    **{name: _variable(name) for name in names.ENVIRONMENT},
    "datasets": _sets,
    "env": _environment,
}
