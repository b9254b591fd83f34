"""Recognises the project of a recipe by its keys, and migrates it.

In: the mapping of a YAML or JSON file, overrides from the command line of the original release, or both. Out: the kind,
and a Book. Refuses recipes without keys of a known project.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdpo.cli.recipes import axolotl, llama_factory, release, trl
from fastdpo.cli.recipes.book import Book

# kind -> (title, keys that identify it)
KINDS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "trl": ("TRL", trl.MARKS_OF_TRL),
    "handbook": ("the alignment-handbook", trl.MARKS_OF_HANDBOOK),
    "axolotl": ("Axolotl", axolotl.MARKS),
    "llama_factory": ("LLaMA-Factory", llama_factory.MARKS),
    "release": ("the original DPO release", release.MARKS),
}


def recognised(recipe: Mapping[str, Any], has_overrides: bool) -> str:
    """The kind with the most matching keys. TRL and the handbook share most keys; it is the handbook if one of its own
    keys is present.

    Raises:
        ValueError: no kind matches, or several match equally.
    """
    names = {str(key).partition(".")[0] for key in recipe} | {str(key) for key in recipe}
    counts = {kind: len(names & set(marks)) for kind, (_, marks) in KINDS.items()}
    if "base_model" not in names and "rl" not in names:
        counts["axolotl"] = 0  # whose other keys others have too
    if "stage" not in names and "finetuning_type" not in names:
        counts["llama_factory"] = 0
    if has_overrides or isinstance(recipe.get("loss"), Mapping) or "loss.beta" in names:
        counts["release"] += 3
    if counts["handbook"]:
        counts["handbook"] += counts.pop("trl")
    elif "model_name_or_path" in names and not any(counts.values()):
        counts["trl"] = 1
    best = max(counts, key=lambda kind: counts[kind])
    if counts[best] == 0 or list(counts.values()).count(counts[best]) > 1:
        tell = "; ".join(f"{title}: {', '.join(marks[:3])}" for title, marks in KINDS.values())
        raise ValueError(
            f"the recipe must have keys that identify its project ({tell}), got {sorted(map(str, recipe))[:8]}; name"
            f" the project with --kind: {', '.join(KINDS)}"
        )
    return best


def migrated(kind: str, recipe: Mapping[str, Any], folder: Path) -> Book:
    """The recipe as ours.

    Args:
        folder: folder of the recipe; files that the recipe names are searched there.
    """
    book = Book()
    if kind in ("trl", "handbook"):
        trl.migrate_trl(recipe, book)
    elif kind == "axolotl":
        axolotl.migrate_axolotl(recipe, book)
    elif kind == "llama_factory":
        llama_factory.migrate_llama_factory(recipe, book, folder)
    else:
        release.migrate_release(recipe, book)
    if "output_dir" not in book.lines:
        book.put("output_dir", "dpo-out", "not in the recipe: the folder for all results")
    return book
