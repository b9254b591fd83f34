"""The table of all causal LMs: its lines are those of the results, and no type gets worse."""

import json

import pytest
from model_coverage import (
    DOCS,
    EXACT,
    EXACT_IN_FP64,
    STATUSES,
    all_types,
    docs_table,
    is_exact,
    kind_of,
    main,
    read_results,
    run_types,
    write_docs,
)
from shared.pages import part

FEW = ["llama", "stablelm", "gptj", "bert"]


def test_the_page_says_what_the_results_say():
    records = read_results()
    assert len({record["type"] for record in records}) == len(records) > 150
    assert part(DOCS.read_text(), "model_coverage.jsonl") == docs_table(records)


def test_the_readme_counts_what_the_results_hold():
    decoders = [record for record in read_results() if not kind_of(record)]
    shared = sum(record["status"] == "packed and shared" for record in decoders)
    text = " ".join((DOCS.parents[1] / "README.md").read_text().split())
    assert (
        f"Of the {len(decoders)} such decoders in transformers 5.23, {shared} train packed with shared prompts" in text
    )
    assert [record["type"] for record in decoders if record["status"] == "padded"] == ["blt"]


def test_nearly_all_decoders_with_a_linear_head_are_packed_with_shared_prompts_and_none_is_wrong():
    records = read_results()
    decoders = [record for record in records if not kind_of(record)]
    by = {status: [record for record in decoders if record["status"] == status] for status in STATUSES}
    assert len(decoders) > 160
    assert [record["type"] for record in by["refused"]] == ["reformer"]  # whose code takes one length in training
    assert not by["wrong"]
    assert len(by["packed and shared"]) >= 0.95 * len(decoders)
    for record in records:
        assert record["status"] == "packed and shared" or record["reason"], record["type"]


def test_every_packed_type_is_exact_in_fp64_and_in_fp32_but_for_rounding():
    shared = [record for record in read_results() if record["status"] == "packed and shared"]
    for record in shared:
        assert record["logps_error"] <= max(EXACT, 10 * record.get("rounding", 0)), record["type"]
        assert max(record["fp64_logps_error"], record["fp64_grad_error"]) <= EXACT_IN_FP64, record["type"]
    assert sum(record["grad_error"] <= EXACT for record in shared) >= 0.9 * len(shared)


def test_rounding_is_told_from_a_mistake_by_fp64():
    rounded = {"logps_error": 1e-7, "grad_error": 7e-5, "fp64_logps_error": 1e-15, "fp64_grad_error": 2e-13}
    assert is_exact(rounded)
    assert not is_exact({**rounded, "fp64_grad_error": 7e-5})
    assert not is_exact({**rounded, "logps_error": 7e-5})
    assert is_exact({**rounded, "logps_error": 7e-5}, rounding=1e-5)
    assert not is_exact({**rounded, "logps_error": 7e-5}, rounding=1e-6)
    assert not is_exact({"logps_error": 1e-7, "grad_error": 7e-5, "fp64_reason": "no fp64"})
    assert is_exact({"logps_error": 1e-7, "grad_error": 7e-6, "fp64_reason": "no fp64"})


SHARED = {"status": "packed and shared", "reason": "", "logps_error": 1e-7, "worst": "a.weight"}


def test_the_page_is_made_of_lines(tmp_path):
    records = [
        {**SHARED, "type": "a", "grad_error": 2e-6, "fp64_logps_error": 3e-16, "fp64_grad_error": 1e-14},
        {**SHARED, "type": "b", "grad_error": 3e-5, "fp64_logps_error": 2e-16, "fp64_grad_error": 4e-13},
        {"type": "c", "status": "refused", "reason": "ValueError: x | y, which is an encoder", "transformers": "9.9"},
        {"type": "d", "status": "refused", "reason": "ValueError: rows of any length"},
        {"type": "e", "status": "padded", "reason": "why"},
        {"type": "f", "status": "cannot be built", "reason": "ImportError: timm"},
    ]
    page = tmp_path / "models.md"
    page.write_text("above\n<!-- table: model_coverage.jsonl -->\nold\n<!-- end -->\nbelow\n")
    write_docs(records, page)
    text = page.read_text()
    assert text.startswith("above\n<!-- table: model_coverage.jsonl -->\ntransformers 9.9, 6 types:")
    assert "| packed and shared | 2 |\n| packed | 0 |" in text
    assert "4 of 6 types are decoders whose logits are a linear layer of the last hidden state" in text
    assert "The others are 1 encoders, 1 types that cannot be built." in text
    assert "| train | 3 of 4 | 75.0% |\n| are packed | 2 of 4 | 50.0% |" in text
    assert "in fp64 3e-16 and 4e-13 (2 of these 2 types), in fp32 1e-07 and 3e-05." in text
    assert "In fp32, 1 types are exact to 1e-05." in text
    assert "| b | a.weight | 3e-05 | 4e-13 |" in text
    assert "| c | refused | x \\| y, which is an encoder |" in text
    assert text.endswith("| f | cannot be built | timm |\n<!-- end -->\nbelow\n")
    assert "old" not in text


def test_a_few_types_by_the_command(tmp_path, capsys):
    assert main(["--types", *FEW, "--out", str(tmp_path / "few.jsonl")]) == 0
    records = [json.loads(line) for line in (tmp_path / "few.jsonl").read_text().splitlines()]
    assert [record["type"] for record in records] == FEW
    assert [record["status"] for record in records] == [*["packed and shared"] * 3, "refused"]
    assert "packed and shared: 3" in capsys.readouterr().out


@pytest.mark.slow
def test_no_type_gets_worse():
    """A type that is new, or of another release than the results, is compared with nothing, as is one whose tower needs
    a package that is not there."""
    known = {record["type"]: STATUSES.index(record["status"]) for record in read_results()}
    types = [name for name in all_types() if STATUSES[known.get(name, -1)] != "cannot be built"]
    worse = {
        record["type"]: (record["status"], record.get("reason"))
        for record in run_types(types)
        if record["type"] in known
        and not record.get("reason", "").startswith("ImportError")
        and STATUSES.index(record["status"]) > known[record["type"]]
    }
    assert not worse
