"""The page of `fastdpo score --per_token`: responses with tokens coloured by their credits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from fastdpo.rewards.credits import Credits

UP, DOWN = "27 120 55", "190 50 40"  # RGB: green for positive credits, red for negative ones


@dataclass(frozen=True)
class ColouredRow:
    """One row of the data."""

    prompt: str
    responses: Sequence[tuple[str, Credits]]  # (name, tokens)


@dataclass(frozen=True)
class ColouredText:
    """A section of a report: responses with coloured tokens. Hover over a token to see its credit."""

    title: str
    rows: Sequence[ColouredRow]
    note: str = ""

    def body(self) -> str:
        values = [abs(value) for row in self.rows for _, credits in row.responses for value in credits.values]
        most = sorted(values)[int(0.98 * (len(values) - 1))] if values else 1.0  # a few outliers do not fade the rest
        parts = [f'<p class="note">{escape(self.note)}</p>'] if self.note else []
        for row in self.rows:
            parts.append(f'<article><p class="prompt">{escape(row.prompt)}</p>')
            for name, credits in row.responses:
                tokens = "".join(
                    _token(text, value, most) for text, value in zip(credits.tokens, credits.values, strict=True)
                )
                parts.append(f'<p class="coloured"><b>{escape(name)}</b> ({credits.reward:+.3f}) {tokens}</p>')
            parts.append("</article>")
        return "\n".join(parts)


def _token(text: str, value: float, most: float) -> str:
    alpha = min(abs(value) / most, 1.0) * 0.55 if most > 0 else 0.0
    colour = f"rgb({UP if value >= 0 else DOWN} / {alpha:.2f})"
    return f'<span style="background:{colour}" title="{value:+.4f}">{escape(text)}</span>'
