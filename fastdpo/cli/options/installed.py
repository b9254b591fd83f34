"""The training arguments of the installed transformers, read from its source, because importing it takes seconds.

Out: names of fields. None if the source cannot be read; the caller then leaves the check to the import.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from importlib import metadata
from pathlib import Path


@functools.cache
def training_arguments() -> frozenset[str] | None:
    """Names of the fields of transformers.TrainingArguments."""
    found = importlib.util.find_spec("transformers")  # looks for the package and runs nothing of it
    for folder in (found.submodule_search_locations or []) if found is not None else []:
        source = Path(folder, "training_args.py")
        if source.is_file():
            return fields_of(source.read_text(encoding="utf-8"), "TrainingArguments")
    return None


def release() -> str | None:
    """The version of transformers."""
    try:
        return metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return None


def fields_of(source: str, name: str) -> frozenset[str] | None:
    """The annotated names in the body of a class; None if the source has no such class."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            lines = [line for line in node.body if isinstance(line, ast.AnnAssign)]
            names = {line.target.id for line in lines if isinstance(line.target, ast.Name)}
            return frozenset(n for n in names if not n.startswith("_"))
    return None
