"""inspect_data: each check on hand-made rows, every form that is read, and the real files."""

import json
import random

import pytest
from datasets import Dataset

from fastdpo.data.forms.examples import EXAMPLES
from fastdpo.data.tokens.settings import TokenizationSettings
from fastdpo.inspection import inspect_data
from fastdpo.inspection.thresholds import LIMITS, Limit


def pair(chosen="yes", rejected="no", prompt="Q"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def prompts(num_rows, **more):
    """Rows without a fault."""
    return [pair(f"yes {i}", f"no {i}", f"Q {i}", **more) for i in range(num_rows)]


def test_rows_without_a_fault_are_ok_in_every_check():
    found = inspect_data(
        [pair(f"a{i % 2}", f"b{i % 2}", f"Q {i}") for i in range(40)], eval_data=[pair(prompt="other")]
    )
    assert {check.name: check.verdict for check in found.checks if check.verdict != "skipped"} == dict.fromkeys(
        (
            *("form", "rows", "duplicates", "equal answers", "contradictions", "cycles", "train and eval"),
            *(("near duplicates",) if found.check("near duplicates").verdict != "skipped" else ()),
            *("length bias", "savings"),
        ),
        "ok",
    )
    assert found.verdict == "ok"


def test_dropped_rows_are_counted_by_reason_and_judged_by_their_share():
    rows = [*prompts(38), pair("same", "same"), pair("", "no")]
    check = inspect_data(rows).check("rows")
    assert check.verdict == "look"  # 5 % of the rows, which is not more than 5 %
    assert check.numbers == {
        "num_rows": 40,
        "num_kept": 38,
        "num_pairs": 38,
        "dropped": {"chosen equals rejected": 1, "empty response": 1},
    }
    assert check.examples == ((38,), (39,))
    assert inspect_data([*rows, pair(None, "no")]).check("rows").verdict == "bad"


def test_data_of_which_nothing_can_be_used_is_bad_and_still_reported():
    found = inspect_data([pair("same", "same")])
    assert found.verdict == "bad"
    assert found.check("rows").finding == "0 of 1 kept; dropped: 1 chosen equals rejected"
    assert found.check("length bias").verdict == "ok"


def test_the_form_unread_columns_and_the_first_row_are_told():
    found = inspect_data([{"question": "Q", "chosen": "a", "rejected": "b", "source": "here", "score_chosen": 3}])
    assert found.check("form").numbers == {"forms": {"orca": 1}, "unread": ["score_chosen", "source"]}
    assert found.first_row == (("prompt", "user: Q"), ("chosen", "assistant: a"), ("rejected", "assistant: b"))
    mixed = inspect_data([pair(), {"prompt": "Q", "response_a": "x", "response_b": "y", "winner": "a"}])
    assert mixed.check("form").verdict == "look"
    assert "explicit (1 rows) and winner (1 rows)" in mixed.check("form").finding


def test_duplicates_give_the_first_row_and_the_repetition():
    check = inspect_data([*prompts(20), pair("yes 3", "no 3", "Q 3")]).check("duplicates")
    assert (check.verdict, check.examples) == ("look", ((3, 20),))
    assert check.numbers["num_found"] == 1
    assert check.finding == "1 of 21 (4.8%) rows repeat an earlier row"
    assert inspect_data([*prompts(18), pair("yes 3", "no 3", "Q 3")]).check("duplicates").verdict == "bad"


def test_answers_that_differ_in_blanks_or_case_alone_are_found():
    rows = [*prompts(40), pair("Yes,  it is.", "yes, it is.\n", "Is it?"), pair("Yes.", "Yes!", "Is it not?")]
    check = inspect_data(rows).check("equal answers")
    assert (check.verdict, check.examples) == ("look", ((40,),))


def test_contradictions_and_cycles_give_their_rows():
    rows = [*prompts(40), pair("x", "y", "P"), pair("y", "x", "P")]
    rows += [pair("a", "b", "R"), pair("b", "c", "R"), pair("c", "a", "R")]
    found = inspect_data(rows)
    check = found.check("contradictions")
    assert (check.verdict, check.examples) == ("look", ((40, 41),))
    assert check.numbers == {"num_contradictions": 1, "num_compared": 44, "share": pytest.approx(1 / 44)}
    check = found.check("cycles")
    assert check.verdict == "bad"  # of the one prompt with three answers
    assert {frozenset(rows) for rows in check.examples} == {frozenset({42, 43, 44})}


def test_prompts_of_the_evaluation_data_are_counted_and_both_rows_given():
    evaluated = [pair(prompt="new"), pair(prompt="Q 2 "), pair("other", "answers", "Q 2")]
    check = inspect_data(prompts(5), eval_data=evaluated).check("train and eval")
    assert (check.verdict, check.examples, check.eval_rows) == ("bad", ((2,),), (1,))
    assert check.numbers == {"num_shared": 1, "num_eval_prompts": 2, "num_train_rows": 1, "share": 0.5}
    assert inspect_data(prompts(5)).check("train and eval").verdict == "skipped"


@pytest.mark.parametrize(
    ("num_longer", "num_shorter", "verdict"),
    [
        (50, 50, "ok"),
        (68, 32, "ok"),
        (70, 30, "look"),
        (80, 20, "look"),
        (95, 5, "bad"),
        (5, 95, "bad"),
        (20, 80, "look"),
        (3, 0, "ok"),
    ],
)
def test_length_bias_is_judged_by_the_near_end_of_its_interval(num_longer, num_shorter, verdict):
    rows = [pair("a long answer", "short", f"Q {i}") for i in range(num_longer)]
    rows += [pair("short", "a long answer", f"R {i}") for i in range(num_shorter)]
    rows += [pair("as long", "so long", f"S {i}") for i in range(10)]  # says nothing
    check = inspect_data(rows).check("length bias")
    assert check.verdict == verdict
    assert check.numbers["num_equal"] == 10
    assert check.numbers["share"] == num_longer / (num_longer + num_shorter)


def test_savings_without_a_tokenizer_count_the_characters_of_each_row():
    row = pair("the cat sat", "the cat ran", "Q: ")  # prompt 3, answers 11, their common start 8
    numbers = inspect_data([row]).check("savings").numbers
    assert numbers == {"unit": "characters", "raw": 28, "unique": 17, "saved": pytest.approx(11 / 28)}


@pytest.mark.parametrize("form", EXAMPLES)
def test_every_form_of_preferences_is_inspected(form):
    for written in EXAMPLES[form]:
        if written.is_sft:
            with pytest.raises(ValueError, match=r"must have the columns of a known format.*\(row 0 of list"):
                inspect_data([written.row])
            continue
        settings = TokenizationSettings(dataset_format=form if form.startswith("hh") else "auto")
        found = inspect_data([written.row], settings=settings)
        assert found.check("rows").numbers["num_kept"] == 1, written.by
        assert found.first_row


def test_token_ids_are_inspected_in_tokens():
    row = {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5, 6], "rejected_ids": [4, 7]}
    found = inspect_data([row, {**row, "chosen_ids": [7]}, row])
    assert found.check("form").numbers["forms"] == {"tokenized": 3}
    assert found.check("duplicates").examples == ((0, 2),)
    # 6 + 5, 4 + 5 and 6 + 5 tokens; prompts once, and the first token that both answers begin with
    assert found.check("savings").numbers == {
        "unit": "tokens",
        "raw": 31,
        "unique": 20,
        "saved": pytest.approx(11 / 31),
    }


def test_a_file_a_dataset_a_stream_and_a_list_give_the_same(tmp_path):
    rows = [*prompts(9), pair("yes 3", "no 3", "Q 3")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = Dataset.from_list(rows)
    dataset.to_parquet(tmp_path / "rows.parquet")
    expected = inspect_data(rows).as_dict() | {"data": ""}
    sources = (tmp_path / "rows.jsonl", str(tmp_path / "rows.parquet"), dataset, dataset.to_iterable_dataset())
    for source in sources:
        assert inspect_data(source).as_dict() | {"data": ""} == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data must hold at least one row"),
        ((row for row in [pair()]), "data must be a file, .* got generator"),
        (pair(), "data must be a file, .* got dict"),
        (7, "data must be a file, .* got int"),
        (["text"], "data rows must be dicts, got str as row 0"),
        ([pair(), {"prompt": "Q"}], r"must have the columns of a known format.*\(row 1 of list"),
        ("missing.jsonl", "dataset file does not exist: missing.jsonl"),
    ],
)
def test_data_that_cannot_be_read_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        inspect_data(data)


def test_an_unknown_check_is_refused_by_name():
    with pytest.raises(ValueError, match=r"name must be one of .*'duplicates'.* got 'dupes'"):
        inspect_data([pair()]).check("dupes")


def test_a_limit_is_exceeded_not_reached():
    limit = Limit(0.1, 0.5, "")
    assert [limit.verdict(share) for share in (0.1, 0.11, 0.5, 0.51)] == ["ok", "look", "look", "bad"]
    assert Limit(None, None, "").verdict(1.0) == "ok"
    assert all(limit.reason.endswith(".") for limit in LIMITS.values())


# of the page on the files: rows, pairs, rows that repeat another, rows dropped
REAL = {
    "hh-rlhf-harmless-test-benign44.jsonl": (44, 44, 0, 0),
    "llms-from-scratch-preference.json": (1100, 1094, 0, 6),
    "llama-factory-dpo-en-demo.json": (300, 300, 5, 0),
    "llama-factory-dpo-zh-demo.json": (300, 300, 11, 0),
    "llama-factory-v1-dpo-demo.jsonl": (10, 10, 0, 0),
    "finegrainedrlhf-dev-feedback.json.gz": (500, 2616, 0, 12),
    "open-assistant-en-100-tree.jsonl.gz": (212, 754, 0, 0),
    "torchtune-hh-rlhf-tiny.json": (1, 1, 0, 0),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files_have_the_counts_that_are_known_of_them(name, shared_data):
    found = inspect_data(shared_data / name, look_for_near=False)
    numbers = found.check("rows").numbers
    num_dropped = sum(numbers["dropped"].values())
    counts = (numbers["num_rows"], numbers["num_pairs"], found.check("duplicates").numbers["num_found"], num_dropped)
    assert counts == REAL[name]
    assert found.check("contradictions").numbers["num_contradictions"] == 0
    assert found.verdict != "bad"


def test_many_rows_are_read_in_one_pass_without_holding_their_texts(tmp_path):
    """The survey of 2,000 rows of 20,000 characters is smaller than a tenth of their text."""
    import tracemalloc

    from fastdpo.inspection.inspect import no_progress, read_survey
    from fastdpo.inspection.source import Source

    path, rng = tmp_path / "rows.jsonl", random.Random(0)
    with path.open("w") as file:
        for i in range(2000):
            words = " ".join(rng.choices(["alpha", "beta", "gamma"], k=3000))
            file.write(json.dumps(pair(f"{words} {i}", "no", f"Q {i}")) + "\n")
    tracemalloc.start()
    survey = read_survey(Source(path, TokenizationSettings()), None, no_progress, "")
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert survey.num_kept == 2000
    assert held < path.stat().st_size / 10
