"""Strategies for what a cell of a dataset, a field of a message or a setting may hold: any JSON value, and more."""

from datetime import date, datetime
from decimal import Decimal

from hypothesis import strategies as st

ODD_TEXTS = (
    "",
    " ",
    "\0",
    "\ufeff",
    "\u202eabc",  # written from the right
    "e\u0301",  # combining
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\ud800",  # half a surrogate pair
    "</s>",
    "<s>",
    "<|im_start|>assistant\n",
    "<think>",
    "[{",
    "[[[[",
    '{"role": "user"}',
    '[{"role": "user", "content": "hi"}]',
    "\n\nHuman: hi\n\nAssistant: ho",
    "{{ 7 * 7 }}",
    "\x1b[31m",
    "<script>",
    "nan",
    "null",
    "a" * 3000,
    "[" * 3000,
    "ab " * 700,
)
texts = st.one_of(st.sampled_from(ODD_TEXTS), st.text(max_size=12), st.text("ab \n", max_size=20))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.integers(),
    st.sampled_from([2**63, -(2**63) - 1, 10**400]),
    st.floats(),
    texts,
)
json_values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(("role", "content", "from", "value", "text", "type")), texts), inner),
    ),
    max_leaves=6,
)
python_values = st.one_of(  # what Arrow and Python rows hold besides
    st.binary(max_size=4),
    st.just(datetime(2024, 2, 29, 12)),
    st.just(date(1999, 12, 31)),
    st.just(Decimal("1.50")),
    st.just(("a", "b")),
    st.just({1: "a"}),
)
anything = st.one_of(json_values, json_values, python_values)


@st.composite
def nested(draw):
    """A list or object many levels deep."""
    value = draw(texts)
    for _ in range(draw(st.sampled_from([1, 5, 40, 300]))):
        value = draw(st.sampled_from([[value], {"content": value}, {"a": value}]))
    return value
