"""The ledger of rows as a property: whatever a row holds is read, on the side it belongs to, named as not read, or the
row or its dataset is refused. Every string of a random row is a mark of its own, so that none can pass for another.
"""

import itertools
import json
import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdpo.data.forms.columns import texts_in
from fastdpo.data.forms.formats import read_row, template_kwargs
from fastdpo.data.forms.names import KINDS
from fastdpo.data.forms.roles import ROLE_NAMES
from fastdpo.data.values import BadRow

ABOUT = ("id", "source", "chosen_model", "score_chosen", "lang", "metadata", "model_a", "rejected-rationale")
UNKNOWN = ("foo", "draft", "notes", "title")
LEADING = ("system", "history", "context", "prompt", "instruction", "question")
ANSWER_NAMES = {side: KINDS[side][:6] for side in ("chosen", "rejected")}


class Marks:
    """Strings of which none is part of another or begins like one, and to which side of the row each belongs."""

    def __init__(self):
        self._numbers = itertools.count(10)
        self.sides = {}  # mark -> "prompt", "chosen", "rejected", "tools" or "column NAME"

    def new(self, side):
        number = next(self._numbers)
        mark = f"{string.printable[number]}{number + 100}x"
        self.sides[mark] = side
        return mark


def role_names(role):
    return st.sampled_from([f(name) for name in ROLE_NAMES[role][:4] for f in (str, str.upper, lambda n: f" {n} ")])


@st.composite
def message(draw, marks, role, side):
    content = marks.new(side)
    keys = draw(st.sampled_from([("role", "content"), ("from", "value")]))
    said = draw(st.sampled_from([content, [{"type": "text", "text": content}], {"temp": content}]))
    more = {}
    if draw(st.integers(0, 5)) == 0:
        more["id"] = marks.new("column *.id")
    if role == "assistant" and draw(st.integers(0, 5)) == 0:
        more["tool_calls"] = [{"name": marks.new(side), "arguments": {"x": marks.new(side), "y": None}}]
    return {keys[0]: draw(role_names(role)), keys[1]: said, **more}


@st.composite
def turns(draw, marks, side, last):
    """A conversation that ends in what `last` says."""
    roles = [*draw(st.sampled_from([(), ("system",), ("user", "assistant")])), *last]
    return [draw(message(marks, role, side)) for role in roles]


@st.composite
def leading_value(draw, marks, kind):
    if kind == "system":
        return marks.new("prompt")
    if kind == "history" and draw(st.booleans()):
        pairs = [[marks.new("prompt"), marks.new("prompt")] for _ in range(draw(st.integers(1, 2)))]
        return draw(st.sampled_from([pairs, json.dumps(pairs), [{"question": q, "answer": a} for q, a in pairs]]))
    last = ("user", "assistant") if kind == "history" else ("user",)
    value = draw(st.one_of(st.builds(lambda: marks.new("prompt")), turns(marks, "prompt", last)))
    if isinstance(value, list):
        value = draw(st.sampled_from([value, json.dumps(value), {"messages": value}]))
    return value


@st.composite
def answer(draw, marks, side, start):
    shape = draw(st.sampled_from(["text", "one", "list", "whole", "texts", "json"]))
    if shape == "text":
        return marks.new(side)
    if shape == "texts":
        return [marks.new(side) for _ in range(draw(st.integers(1, 3)))]
    said = draw(message(marks, "assistant", side))
    if shape == "one":
        return said
    whole = [*start, said] if shape == "whole" else [said]
    return json.dumps(whole) if shape == "json" else whole


@st.composite
def rows(draw):
    marks = Marks()
    row = {}
    for kind in draw(st.lists(st.sampled_from(LEADING), max_size=3, unique=True)):
        row[draw(st.sampled_from(KINDS[kind][:5]))] = draw(leading_value(marks, kind))
    start = draw(turns(marks, "prompt", ("user",)))
    if draw(st.booleans()):
        start = row["prompt"] = draw(turns(marks, "prompt", ("user",)))
    shape = draw(st.sampled_from(["pair", "pair", "pair", "winner", "ranked", "rejected"]))
    if shape == "winner":
        row |= {"response_a": draw(answer(marks, "rejected", start)), "winner": "b"}
        row["response_b"] = draw(answer(marks, "chosen", start))
    elif shape == "ranked":
        row["completions"] = [
            {"rank": rank, "completion": draw(answer(marks, side, start))}
            for rank, side in enumerate(("chosen", "rejected"))
        ]
    elif shape == "rejected":
        row["messages"] = [*start, draw(message(marks, "assistant", "chosen"))]
        row["rejected_response"] = draw(answer(marks, "rejected", start))
    else:
        for side, names in ANSWER_NAMES.items():
            row[draw(st.sampled_from(names))] = draw(answer(marks, side, start))
    for name in draw(st.lists(st.sampled_from(ABOUT), max_size=2, unique=True)):
        row[name] = draw(st.sampled_from([marks.new(f"column {name}"), 5, None]))
    if draw(st.integers(0, 4)) == 0:
        name = draw(st.sampled_from(UNKNOWN))
        row[name] = marks.new(f"column {name}")
    if draw(st.integers(0, 3)) == 0:
        tools = [{"name": marks.new("tools"), "parameters": {"x": {"default": None}}}]
        row["tools"] = draw(st.sampled_from([tools, json.dumps(tools), [json.dumps(tool) for tool in tools]]))
    used = json.dumps(row)
    return row, {mark: side for mark, side in marks.sides.items() if mark in used}


def unaccounted(row, marks):
    """The marks of a row that are on no list: neither read where they belong, nor named as not read."""
    read, _ = read_row(row, "auto", is_sft=False)
    chosen = {better for better, _ in read.preferences}
    prompt = " ".join(texts_in(read.prompt))
    sides = {
        "prompt": prompt,
        "chosen": " ".join(" ".join(texts_in(r)) for i, r in enumerate(read.responses) if i in chosen),
        "rejected": " ".join(" ".join(texts_in(r)) for i, r in enumerate(read.responses) if i not in chosen),
        "tools": json.dumps(template_kwargs(row).get("tools")),
    }
    unread = {name for name, how in read.columns.items() if how == "unread"}
    missing = []
    for mark, side in marks.items():
        if side.startswith("column *"):
            found = any(name.endswith(side.removeprefix("column *")) for name in unread) or mark in json.dumps(
                [row[name] for name in unread if name in row]
            )
        elif side.startswith("column "):
            found = side.removeprefix("column ") in unread
        else:
            found = mark in sides[side] or mark in json.dumps([row[name] for name in unread if name in row])
        if not found:
            missing.append((mark, side))
    return missing


def test_whatever_a_row_holds_is_read_or_named_or_the_row_is_refused():
    outcomes = {"read": 0, "bad row": 0, "refused": 0}

    @settings(max_examples=600, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    @given(rows())
    def check(drawn):
        row, marks = drawn
        try:
            missing = unaccounted(row, marks)
        except BadRow:
            outcomes["bad row"] += 1
        except ValueError:
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
            assert missing == []

    check()
    assert outcomes["read"] > 150, outcomes  # or nothing was shown


def test_the_property_sees_a_column_that_is_dropped_in_silence(monkeypatch):
    row, marks = {"prompt": "m1x", "chosen": "m2x", "rejected": "m3x", "foo": "m4x"}, {"m4x": "column foo"}
    with pytest.raises(ValueError, match="'foo'"):
        unaccounted(row, marks)
    monkeypatch.setattr("fastdpo.data.forms.formats.ledger", lambda *_: {})
    assert unaccounted(row, marks) == [("m4x", "column foo")]
