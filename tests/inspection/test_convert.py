"""convert_data: any form as explicit conversational pairs, which read back as what was written."""

import json

import pytest

from fastdpo.data.forms.examples import EXAMPLES
from fastdpo.data.forms.formats import preference_row
from fastdpo.data.tokens.settings import TokenizationSettings
from fastdpo.inspection import convert_data

NUM_PAIRS = {"lists of answers": 3, "your own rankings": 3, "FineGrainedRLHF": 3}
ASKED = {"role": "user", "content": "2+2?"}


def said(text):
    return [{"role": "assistant", "content": text}]


def converted(rows, tmp_path, **settings):
    done = convert_data(rows, tmp_path / "pairs.jsonl", settings=TokenizationSettings(**settings))
    return done, [json.loads(line) for line in done.out.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("form", [form for form in EXAMPLES if not all(w.is_sft for w in EXAMPLES[form])])
def test_every_form_becomes_pairs_that_read_back_as_they_are(form, tmp_path):
    for written in EXAMPLES[form]:
        done, pairs = converted([written.row], tmp_path, dataset_format=form if form.startswith("hh") else "auto")
        assert done.num_pairs == len(pairs) == NUM_PAIRS.get(written.by, 1)
        for pair in pairs:
            row = preference_row(pair)
            assert row.prompt == pair["prompt"]
            assert list(row.responses) == [pair["chosen"], pair["rejected"]]
            assert pair["prompt"][-1]["role"] == "user"
            assert "2" in pair["prompt"][-1]["content"]
            assert [message["role"] for message in pair["chosen"]] == ["assistant"]
        assert (pairs[0]["chosen"], pairs[0]["rejected"]) == (said("4"), said("5"))


def test_a_system_prompt_beside_a_text_becomes_its_message(tmp_path):
    row = {"system": "Be brief.", "prompt": "2+2?", "chosen": "4", "rejected": "5"}
    _, (pair,) = converted([row], tmp_path)
    assert pair["prompt"] == [{"role": "system", "content": "Be brief."}, ASKED]


def test_alpacas_headings_and_earlier_turns_become_turns(tmp_path):
    row = {"instruction": "Add.", "input": "2, 2", "system": "Be brief.", "history": [["1+1?", "2"]]}
    _, (pair,) = converted([{**row, "chosen": "4", "rejected": "5"}], tmp_path)
    assert pair["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Add.\n\n2, 2"},
    ]
    text = "Below is an instruction.\n\n### Instruction:\nAdd 2, 2.\n\n### Response:\n"
    _, (pair,) = converted([{"prompt": text, "chosen": "4", "rejected": "5"}], tmp_path)
    assert pair["prompt"] == [
        {"role": "system", "content": "Below is an instruction."},
        {"role": "user", "content": "Add 2, 2."},
    ]


def test_a_heading_inside_a_text_is_left_alone(tmp_path):
    text = "What does\n\n### Response:\nmean?"
    _, (pair,) = converted([{"prompt": text, "chosen": "4", "rejected": "5"}], tmp_path)
    assert pair["prompt"] == [{"role": "user", "content": text}]


def test_transcripts_become_turns(tmp_path):
    before = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: 2+2?\n\nAssistant:"
    _, (pair,) = converted([{"chosen": f"{before} 4", "rejected": f"{before} 5"}], tmp_path)
    assert pair["prompt"] == [{"role": "user", "content": "Hi"}, *said("Hello"), ASKED]
    assert (pair["chosen"], pair["rejected"]) == (said("4"), said("5"))


def test_a_ranking_gives_a_pair_for_each_preference_and_ties_none(tmp_path):
    row = {"prompt": "2+2=", "responses": ["4", "5", "6"], "scores": [2, 1, 1]}
    done, pairs = converted([row], tmp_path)
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [(said("4"), said("5")), (said("4"), said("6"))]
    assert (done.num_rows, done.num_pairs, done.forms) == (1, 2, {"ranked": 1})


def test_tools_and_template_arguments_stay(tmp_path):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    row = {"prompt": [ASKED], "chosen": said("4"), "rejected": said("5"), "tools": tools}
    _, (pair,) = converted([{**row, "chat_template_kwargs": {"enable_thinking": False}}], tmp_path)
    assert (pair["tools"], pair["chat_template_kwargs"]) == (tools, {"enable_thinking": False})


def test_rows_that_cannot_be_used_are_counted_and_blanks_make_no_pair(tmp_path):
    rows = [
        {"prompt": "2+2=", "chosen": "4", "rejected": "4"},
        {"prompt": "2+2=", "chosen": " 4", "rejected": "5 "},
        {"prompt": "2+2=", "chosen": " 4", "rejected": "4"},
    ]
    done, pairs = converted(rows, tmp_path)
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [(said("4"), said("5"))]
    assert done.dropped == {"chosen equals rejected": 1, "chosen equals rejected but for blanks": 1}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": "Q", "chosen": "a", "rejected": "a"}],
            r"usable row, got 1 in list: chosen equals rejected \(1\)",
        ),
        (
            [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}],
            "text or messages to be converted, got token ids in row 0",
        ),
        ([], "at least one row"),
    ],
)
def test_what_cannot_be_converted_leaves_no_file(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        convert_data(rows, tmp_path / "pairs.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_real_files_convert_to_as_many_pairs_as_they_hold(tmp_path, shared_data):
    counts = {
        "finegrainedrlhf-dev-feedback.json.gz": 2616,
        "open-assistant-en-100-tree.jsonl.gz": 754,
        "hh-rlhf-harmless-test-benign44.jsonl": 44,
        "llms-from-scratch-preference.json": 1094,
    }
    for name, count in counts.items():
        done, pairs = converted(shared_data / name, tmp_path)
        assert done.num_pairs == len(pairs) == count
        assert all("### " not in pair["prompt"][0]["content"][:4] for pair in pairs)
        assert all(list(pair) == ["prompt", "chosen", "rejected"] for pair in pairs)
