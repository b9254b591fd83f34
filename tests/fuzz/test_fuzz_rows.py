"""Any row: what cannot be read is refused by our own error or counted as dropped, and nothing else happens."""

import json

import pytest
from fuzzing import assert_ours, fuzz
from hypothesis import strategies as st
from tiny import make_byte_tokenizer
from values import anything, json_values, nested, texts

from fastdpo.data.forms.formats import FORMAT_NAMES, KNOWN_COLUMNS
from fastdpo.data.prepare import prepare_preference_dataset, prepare_sft_dataset
from fastdpo.data.rows.columns import GROUP_COLUMNS, RowPreparer, group_from_columns
from fastdpo.data.tokens.settings import TokenizationSettings

PAIR = ("prompt", "chosen", "rejected")
column_names = st.one_of(st.sampled_from(PAIR), st.sampled_from(KNOWN_COLUMNS), texts)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.one_of(st.sampled_from(("user", "assistant", "system", "tool")), json_values)},
        optional={"content": st.one_of(texts, json_values), "tool_calls": json_values, "name": texts},
    ),
    max_size=4,
)
said = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(("user", "assistant")), "content": st.text(max_size=9)}), min_size=1
)
plausible = st.one_of(st.text("abc ", min_size=1), st.text("abc ", min_size=1), said)
cells = st.one_of(texts, messages, messages.map(lambda value: json.dumps(value)), anything, nested())


@st.composite
def rows(draw):
    """A row of any columns; most have those of a pair, so that they come further than the first check."""
    cell = draw(st.sampled_from([plausible, plausible, cells]))
    row = {name: draw(cell) for name in PAIR} if draw(st.integers(0, 3)) else {}
    for name in draw(st.lists(column_names, max_size=2)):
        row[name] = draw(cells)
    return row


good_ids = st.lists(st.integers(0, 9), min_size=1, max_size=5)
any_ids = st.one_of(good_ids, st.lists(st.integers(-2, 2**40), max_size=3), anything)


@st.composite
def tokenized_rows(draw):
    """Token ids of pairs or of several responses; one in three has columns that do not fit."""
    is_good = draw(st.integers(0, 2)) > 0
    ids = good_ids if is_good else any_ids
    row = {"prompt_ids": draw(ids)}
    if draw(st.booleans()):
        return row | {"chosen_ids": draw(ids), "rejected_ids": draw(ids)} | draw(own_ref_logps)
    responses = draw(st.one_of(st.lists(ids, min_size=2, max_size=3), st.lists(any_ids, max_size=2)))
    row["responses"] = responses if is_good else draw(st.one_of(st.just(responses), anything))
    if is_good and draw(st.booleans()):
        row["loss_masks"] = [[draw(st.booleans()) for _ in ids] for ids in responses if isinstance(ids, list)]
    return row | (draw(of_groups) if not is_good else {})


own_ref_logps = st.fixed_dictionaries(
    {}, optional={f"ref_{side}_logps": st.one_of(st.floats(-90, 0), anything) for side in ("chosen", "rejected")}
)
of_groups = st.fixed_dictionaries(
    {},
    optional={
        "loss_masks": st.one_of(st.lists(st.lists(st.booleans(), max_size=5), max_size=3), anything),
        "preferences": st.one_of(st.lists(st.lists(st.integers(-1, 3), max_size=3), max_size=3), anything),
        "ref_logps": st.one_of(st.lists(st.floats(), max_size=3), anything),
    },
)
row_settings = st.builds(
    TokenizationSettings,
    max_length=st.sampled_from([None, 2, 5, 64]),
    max_prompt_length=st.sampled_from([None, 1, 7]),
    truncation_mode=st.sampled_from(["keep_start", "keep_end"]),
    on_bad_row=st.sampled_from(["drop", "drop", "raise"]),
    on_long_row=st.sampled_from(["truncate", "truncate", "drop", "raise"]),
    on_lost_content=st.sampled_from(["warn", "warn", "drop", "raise"]),
    dataset_format=st.one_of(st.just("auto"), st.just("auto"), st.just("auto"), st.sampled_from(FORMAT_NAMES)),
    rankings=st.booleans(),
    shared_parts=st.booleans(),
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_byte_tokenizer()


def accounted(columns, num_rows):
    """Every row has become a group that can be trained on, or has a reason."""
    assert [len(values) for values in columns.values()] == [num_rows] * len(columns)
    outcome = "dropped"
    for index in range(num_rows):
        reason, group = columns["bad_row"][index], {name: columns[name][index] for name in GROUP_COLUMNS}
        if reason is None:
            outcome = "kept"
            assert all(len(response) for response in group_from_columns(group).responses)
        else:
            assert isinstance(reason, str)
            assert reason
    return outcome


def prepare_one(tokenizer, case):
    row, settings, is_sft = case
    try:
        columns = RowPreparer(tokenizer, settings, is_sft)({name: [value] for name, value in row.items()}, [0])
    except ValueError as error:
        assert_ours(error)
        return "refused"
    return accounted(columns, 1)


def test_any_row_is_kept_dropped_with_a_reason_or_refused(tokenizer):
    cases = st.tuples(rows().filter(bool), row_settings, st.booleans())
    outcomes = fuzz("rows", cases, lambda case: prepare_one(tokenizer, case))
    assert outcomes.get("kept", 0) > 5, outcomes


def test_any_tokenized_row_is_kept_dropped_with_a_reason_or_refused(tokenizer):
    cases = st.tuples(tokenized_rows(), row_settings, st.booleans())
    outcomes = fuzz("tokenized rows", cases, lambda case: prepare_one(tokenizer, case))
    assert outcomes.get("kept", 0) > 5, outcomes


@st.composite
def datasets_of_rows(draw):
    """A row that can be used among others of its columns, whatever those hold; now and then any rows."""
    kind = draw(st.sampled_from(["pairs", "pairs", "tokens", "any"]))
    if kind == "any":
        return [draw(rows()) for _ in range(draw(st.integers(1, 3)))]
    good = {"prompt": "a ", "chosen": "b", "rejected": "cd"}
    if kind == "tokens":
        good = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3, 4]}
    cell = st.one_of(plausible, cells) if kind == "pairs" else st.one_of(good_ids, any_ids)
    others = draw(st.lists(st.fixed_dictionaries(dict.fromkeys(good, cell)), max_size=4))
    return draw(st.permutations([good, *others]))


lenient = st.builds(TokenizationSettings, max_length=st.sampled_from([None, 5, 64]), rankings=st.booleans())


def test_no_row_of_any_dataset_is_lost_without_being_counted(tokenizer):
    def check(case):
        examples, settings, is_sft = case
        prepare = prepare_sft_dataset if is_sft else prepare_preference_dataset
        try:
            dataset, report = prepare(examples, tokenizer, settings)
        except ValueError as error:
            assert_ours(error)
            return "refused"
        assert len(dataset) == report.num_kept
        num_dropped = sum(len(numbers) for numbers in report.dropped.values())
        assert report.num_kept + num_dropped == report.num_rows <= len(examples)
        return "prepared"

    outcomes = fuzz(
        "datasets", st.tuples(datasets_of_rows(), st.one_of(lenient, row_settings), st.booleans()), check, share=0.1
    )
    assert outcomes.get("prepared", 0) > 3, outcomes
