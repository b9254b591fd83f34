"""Parts of a page that a script writes: each stands between `<!-- table: NAME -->` and `<!-- end -->`, in lines of
their own, where NAME is the file of its records, or the script's."""

import re
from collections.abc import Mapping
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
DOCS = Path(__file__).parents[2] / "docs"
MARKED = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def names_in(page: str) -> list[str]:
    return [match[2] for match in MARKED.finditer(page)]


def part(page: str, name: str) -> str:
    """What stands there now.

    Raises:
        KeyError: A name that the page does not have.
    """
    return {match[2]: match[3] for match in MARKED.finditer(page)}[name]


def filled(page: str, parts: Mapping[str, str]) -> str:
    """The page's text with the parts of these names in place of what stands there.

    Raises:
        ValueError: A name that the page does not have.
    """
    if missing := parts.keys() - names_in(page):
        raise ValueError(f"the page has no place for {', '.join(sorted(missing))}; it has {names_in(page)}")
    return MARKED.sub(lambda match: match[1] + parts[match[2]] + match[4] if match[2] in parts else match[0], page)
