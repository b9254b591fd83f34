"""Resolves the chat template of a run: the tokenizer's own, one from a file, or a training template of this package.

In: the setting `chat_template`: a file, the name of a training template in the folder `templates`, the name of one
of the tokenizer's templates, another tokenizer, or Jinja. Out: Jinja, or the name of a tokenizer's template.
Refused with ValueError: any other value.

Templates of thinking models drop the thoughts of earlier turns. This is right for generation, but wrong for the answer
that the model learns, so the training templates keep thoughts from the message `first_trained_message` on. They are
for training only: a tokenizer with its own template keeps it and is saved with it. A template from a file or in Jinja
is also meant for inference, so the tokenizer is saved with that template.
"""

from __future__ import annotations

import difflib
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

# Not a name that Python could import: setuptools would warn at every installation that the folder is no package.
FOLDER = Path(__file__).parent / "jinja-files"
SUFFIXES = (".jinja", ".j2", ".jinja2", ".txt", ".json")
FIRST_TRAINED = "first_trained_message"  # variable of templates: the number of the first message of the response
# rows and runs must not set these: the rendering code does
RESERVED_KWARGS = ("add_generation_prompt", "continue_final_message", "messages", "tokenize", "return_dict")
_MARK = re.compile(r"\{%([-+]?)\s*(generation|endgeneration)\s*([-+]?)%\}")


@cache
def training_templates() -> tuple[str, ...]:
    """The names of this package's training templates."""
    return tuple(sorted(file.stem for file in FOLDER.glob("*.jinja")))


def resolve_template(value: str) -> str:
    """The setting as Jinja; any other name, which may be one of the tokenizer's templates, is returned unchanged.

    Raises:
        ValueError: the file does not exist or holds no template, or the value is empty.
    """
    if "{{" in value or "{%" in value:
        return value
    if value in training_templates():
        return (FOLDER / f"{value}.jinja").read_text(encoding="utf-8")
    path = Path(value).expanduser()
    if os.path.isfile(path):  # False, not an error, for a text that is too long for a name
        text = path.read_text(encoding="utf-8")
        if "{{" not in text and "{%" not in text:
            raise ValueError(f"chat_template must be a file with a Jinja template, got {value}, which has none")
        return text
    if not value.strip() or value.endswith(SUFFIXES):
        raise ValueError(f"chat_template must be an existing file or the name of a template, got {value!r}")
    return _template_of(value) if os.path.isdir(path) or "/" in value else value


@cache
def _template_of(name: str) -> str:
    """The template of another tokenizer, in a folder or on the Hub.

    Raises:
        ValueError: there is no such tokenizer, or it has no template.
    """
    from transformers import AutoTokenizer

    try:
        template = AutoTokenizer.from_pretrained(name, trust_remote_code=False).chat_template
    except (OSError, ValueError) as error:
        raise ValueError(f"chat_template must be an existing file or the name of a template, got {name!r}") from error
    if not isinstance(template, str):
        raise ValueError(f"chat_template must name a tokenizer with a chat template, got {name!r}, which has none")
    return template


def check_template_name(template: str, tokenizer: Any) -> None:
    """Refuses a name that is not a template of this package or of the tokenizer.

    Raises:
        ValueError: the name is unknown; the message lists the known names and suggests the nearest.
    """
    if "{{" in template or "{%" in template:
        return
    own = getattr(tokenizer, "chat_template", None)
    known = [*training_templates(), *(own if isinstance(own, dict) else ())]
    if not isinstance(own, dict) or template not in own:
        nearest = difflib.get_close_matches(template, known, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"chat_template must be a file, or one of {sorted(known)}, got {template!r}{hint}")


def give_template(tokenizer: Any, value: str) -> None:
    """Sets the tokenizer's template to the run's if that is from a file or in Jinja. A training template is set only if
    the tokenizer has none, without the marks that other programs do not know."""
    template = resolve_template(value)
    if value not in training_templates():
        if template != value or "{" in value:
            tokenizer.chat_template = template
    elif getattr(tokenizer, "chat_template", None) is None:
        tokenizer.chat_template = without_generation_marks(template)


def without_generation_marks(template: str) -> str:
    """The template without `{% generation %}`, which plain Jinja does not know."""
    plain = {"generation": "if true", "endgeneration": "endif"}
    return _MARK.sub(lambda match: f"{{%{match[1]} {plain[match[2]]} {match[3]}%}}", template)
