"""The table of all causal LMs: its lines are those of the results, and no type gets worse."""

import json

import pytest
from model_coverage import (
    DOCS,
    EXACT,
    MARKED,
    STATUSES,
    all_types,
    docs_table,
    main,
    read_results,
    run_types,
    write_docs,
)

FEW = ["llama", "stablelm", "gptj", "bert"]


def test_the_page_says_what_the_results_say():
    records = read_results()
    assert len({record["type"] for record in records}) == len(records) > 150
    assert MARKED.search(DOCS.read_text())[0].count(docs_table(records)) == 1


def test_most_decoders_are_packed_with_shared_prompts_and_none_is_wrong():
    records = read_results()
    counts = {status: sum(record["status"] == status for record in records) for status in STATUSES}
    decoders = counts["packed and shared"] + counts["packed"] + counts["padded"] + counts["wrong"]
    assert counts["wrong"] == 0
    assert counts["packed and shared"] >= 0.95 * decoders
    for record in records:
        if record["status"] == "packed and shared":
            assert record["logps_error"] <= EXACT, record["type"]
            assert record["grad_error"] <= max(EXACT, 10 * record.get("rounding", 0)), record["type"]
        else:
            assert record["reason"], record["type"]


def test_the_page_is_made_of_lines(tmp_path):
    records = [
        {"type": "a", "status": "packed and shared", "reason": "", "logps_error": 1e-7, "grad_error": 2e-6},
        {"type": "b", "status": "refused", "reason": "ValueError: x | y", "transformers": "9.9"},
    ]
    page = tmp_path / "models.md"
    page.write_text("above\n<!-- table: model_coverage.jsonl -->\nold\n<!-- end -->\nbelow\n")
    write_docs(records, page)
    text = page.read_text()
    assert text.startswith("above\n<!-- table: model_coverage.jsonl -->\ntransformers 9.9, 2 types:")
    assert "| packed and shared | 1 |\n| packed | 0 |" in text
    assert "largest error of log-probs 1e-07, of a weight's gradient 2e-06): a." in text
    assert "| b | refused | x \\| y |\n<!-- end -->\nbelow\n" in text
    assert "old" not in text


def test_a_few_types_by_the_command(tmp_path, capsys):
    assert main(["--types", *FEW, "--out", str(tmp_path / "few.jsonl")]) == 0
    records = [json.loads(line) for line in (tmp_path / "few.jsonl").read_text().splitlines()]
    assert [record["type"] for record in records] == FEW
    assert [record["status"] for record in records] == [*["packed and shared"] * 3, "refused"]
    assert "packed and shared: 3" in capsys.readouterr().out


@pytest.mark.slow
def test_no_type_gets_worse():
    """A type that is new, or of another release than the results, is compared with nothing."""
    known = {record["type"]: STATUSES.index(record["status"]) for record in read_results()}
    types = [name for name in all_types() if STATUSES[known.get(name, -1)] != "cannot be built"]
    worse = {
        record["type"]: (record["status"], record.get("reason"))
        for record in run_types(types)
        if record["type"] in known and STATUSES.index(record["status"]) > known[record["type"]]
    }
    assert not worse
