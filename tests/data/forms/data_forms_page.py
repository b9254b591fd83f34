"""docs/data_forms.md out of the registry of forms: `python tests/data/forms/data_forms_page.py > PAGE`."""

import json

from fastdpo.data.forms.examples import EXAMPLES
from fastdpo.data.forms.formats import FORMATS, SFT_FORMS
from fastdpo.data.forms.names import KINDS
from fastdpo.data.forms.roles import ROLE_NAMES

START = """# Forms of data

This page shows rows of every form that fastdpo reads (`dataset_format`), and who writes them. [Data](data.md)
explains how columns become prompts and answers. `tests/data/forms/data_forms_page.py` generates this page from the
registry of forms, and a test reads every row on it.
"""
KINDS_SAY = {
    "system": "the system prompt",
    "history": "earlier turns",
    "context": "context, or the conversation so far",
    "prompt": "the prompt",
    "instruction": "a task",
    "question": "the question, or a task's input",
    "chosen": "the better answer",
    "rejected": "the worse answer",
    "response": "an answer; the better one if there is a rejected one",
    "tools": "tools",
}


def page():
    """The text of docs/data_forms.md."""
    preferences = dict.fromkeys(row_format.name for row_format in FORMATS)
    lines = [START, "## Preferences\n", *_table(preferences)]
    lines += ["\n## One response (`fastdpo sft`)\n", *_table(dict.fromkeys(f.name for f in SFT_FORMS))]
    lines += ["\n## Names of columns\n", "Case does not matter. Words may be joined by `_`, a blank or a capital.\n"]
    lines += ["| what | names |", "|---|---|"]
    lines += [f"| {KINDS_SAY[kind]} | {_code(names)} |" for kind, names in KINDS.items()]
    lines += ["\n## Names of roles\n", "Case and surrounding blanks do not matter.\n", "| role | names |", "|---|---|"]
    lines += [f"| `{role}` | {_code(names)} |" for role, names in ROLE_NAMES.items()]
    return "\n".join(lines) + "\n"


def _table(names):
    lines = ["| form | columns | a row | who writes it |", "|---|---|---|---|"]
    for name in names:
        for written in EXAMPLES[name]:
            row = json.dumps(written.row, ensure_ascii=False).replace("|", "\\|")
            lines.append(f"| `{name}` | {_code(written.row)} | `{row}` | {written.by} |")
    return lines


def _code(names):
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    print(page(), end="")
