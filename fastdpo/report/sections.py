"""The sections of a report: small value objects that render themselves as HTML.

All text is escaped here, so text of users and models never becomes markup. A figure becomes an SVG inside an `img`, so
that ids of several figures cannot collide.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Protocol

MANY_COLUMNS = 10  # of a table that may be wider than the text where there is space


class Section(Protocol):
    """A part of a report with its own heading."""

    @property
    def title(self) -> str: ...

    def body(self) -> str:
        """The HTML below the heading."""
        ...


@dataclass(frozen=True)
class Text:
    """Paragraphs."""

    title: str
    paragraphs: Sequence[str]

    def body(self) -> str:
        return "\n".join(f"<p>{escape(paragraph)}</p>" for paragraph in self.paragraphs)


@dataclass(frozen=True)
class Commands:
    """Commands to copy, an option on each line."""

    title: str
    commands: Sequence[str]

    def body(self) -> str:
        lines = (escape(command.replace(" --", " \\\n  --")) for command in self.commands)
        return "\n".join(f'<pre class="command">{command}</pre>' for command in lines)


@dataclass(frozen=True)
class Table:
    """Rows of cells. The first column names the row; the other columns are figures unless `is_prose`."""

    title: str
    columns: Sequence[str]  # empty: no heading row
    rows: Sequence[Sequence[str]]
    note: str = ""
    is_prose: bool = False  # cells are words: aligned to the left, and they may wrap

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != self.num_columns:
                raise ValueError(f"rows must have {self.num_columns} cells each, got {list(row)!r}")

    @property
    def num_columns(self) -> int:
        return len(self.columns) or (len(self.rows[0]) if self.rows else 0)

    def body(self) -> str:
        head = "".join(f'<th scope="col">{escape(column)}</th>' for column in self.columns)
        width = " wide" if self.num_columns >= MANY_COLUMNS else ""
        lines = [f'<div class="scroll{width}"><table class="{"prose" if self.is_prose else "figures"}">']
        if head:
            lines.append(f"<thead><tr>{head}</tr></thead>")
        lines.append("<tbody>")
        for name, *cells in self.rows:
            figures = "".join(_cell(cell) for cell in cells)
            lines.append(f'<tr><th scope="row">{escape(name)}</th>{figures}</tr>')
        return "\n".join([*lines, "</tbody></table></div>", _note(self.note)])


@dataclass(frozen=True)
class Figure:
    """A matplotlib figure."""

    title: str
    figure: Any  # matplotlib.figure.Figure
    alt: str  # description for readers who cannot see it
    note: str = ""

    def body(self) -> str:
        return f"<figure>{_image(self.figure, self.alt)}</figure>\n{_note(self.note)}"


@dataclass(frozen=True)
class FigureGrid:
    """Small matplotlib figures, as many beside each other as the page is wide for."""

    title: str
    figures: Sequence[tuple[str, Any]]  # (what it shows, for those who cannot see it; Figure)
    note: str = ""

    def body(self) -> str:
        images = "\n".join(f"<figure>{_image(figure, alt)}</figure>" for alt, figure in self.figures)
        return f'<div class="grid">{images}</div>\n{_note(self.note)}'


@dataclass(frozen=True)
class Response:
    """The answer of one model."""

    name: str
    text: str
    score: str


@dataclass(frozen=True)
class Sample:
    """One prompt and the responses to it."""

    prompt: str
    responses: Sequence[Response]


@dataclass(frozen=True)
class SampleList:
    """Prompts, each with the answers of several models."""

    title: str
    samples: Sequence[Sample]
    score_name: str
    note: str = ""
    name_column: str = "Model"  # heading of the responses' names

    def body(self) -> str:
        names = (self.name_column, "Response", self.score_name)
        columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
        parts = [_note(self.note)]
        for sample in self.samples:
            parts.append(f'<article><p class="prompt">{escape(sample.prompt)}</p>')
            parts.append(f'<div class="scroll"><table class="samples"><thead><tr>{columns}</tr></thead><tbody>')
            for response in sample.responses:
                cells = f"<td>{escape(response.text)}</td><td>{escape(response.score)}</td>"
                parts.append(f'<tr><th scope="row">{escape(response.name)}</th>{cells}</tr>')
            parts.append("</tbody></table></div></article>")
        return "\n".join(parts)


def svg(figure: Any, *, outlined: bool = True) -> bytes:
    """A matplotlib figure as SVG. Without a date, and with ids from a fixed salt, equal figures give equal files.

    Args:
        outlined: draws letters as paths, which look the same everywhere. As text, the file is half as large.
    """
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "fastdpo", "svg.fonttype": "path" if outlined else "none"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return buffer.getvalue()


def _image(figure: Any, alt: str) -> str:
    """An SVG inside the page."""
    data = base64.b64encode(svg(figure)).decode()
    return f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(alt)}">'


def _cell(text: str) -> str:
    """A cell of a table; a number such as 4e-07 does not wrap at its minus on narrow screens."""
    return f"<td>{escape(text)}</td>" if " " in text else f'<td class="word">{escape(text)}</td>'


def _note(note: str) -> str:
    return f'<p class="note">{escape(note)}</p>' if note else ""
