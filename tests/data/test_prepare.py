import json

import pytest
from datasets import Dataset
from tiny_tokenizers import byte_level_tokenizer

from fastdpo.data.prepare import group_from_columns, prepare_preference_dataset, prepare_sft_dataset
from fastdpo.data.rows.report import DataReport, TokenStats
from fastdpo.data.sources.loading import load_preference_dataset
from fastdpo.data.tokens.tokenization import TokenizationSettings, tokenize_row
from fastdpo.types import PreferenceRow

SETTINGS = TokenizationSettings(max_length=64)
ROWS = [
    {"prompt": "the cat", "chosen": " sat", "rejected": " ran"},
    {"prompt": "the cat", "chosen": " sat", "rejected": " sat"},
    {"prompt": "the dog" * 40, "chosen": " sat", "rejected": " ran"},
    {"prompt": "the dog", "chosen": " sat" * 80, "rejected": ""},
    {"prompt": "the mat", "chosen": " sat" * 80, "rejected": " on the log"},
    {"prompt": "the c", "chosen": "at", "rejected": "ow"},
    {"prompt": "the mat", "chosen": " is good", "rejected": " is good"},
]


def test_kept_rows_are_the_tokenized_rows_in_order(plain_tokenizer):
    prepared, report = prepare_preference_dataset(Dataset.from_list(ROWS), plain_tokenizer, SETTINGS)
    assert len(prepared) == 3
    for row, index in zip(prepared, (0, 4, 5), strict=True):
        example = ROWS[index]
        expected = PreferenceRow(example["prompt"], (example["chosen"], example["rejected"]))
        assert group_from_columns(row) == as_lists(tokenize_row(expected, plain_tokenizer, SETTINGS))
    assert (report.num_rows, report.num_kept, report.num_truncated, report.num_merged_boundary) == (7, 3, 1, 1)
    assert report.dropped == {
        "chosen equals rejected": (1, 6),
        "prompt fills max_length": (2,),
        "empty response": (3,),
    }


def as_lists(group):
    """With lists, as a dataset gives them back, and pairs of indices as tuples."""
    columns = {
        "prompt_ids": list(group.prompt_ids),
        "responses": [list(r) for r in group.responses],
        "loss_masks": group.loss_masks,
        "preferences": group.preferences,
    }
    return group_from_columns(columns)


def test_the_report_reads_like_a_summary(plain_tokenizer):
    _, report = prepare_preference_dataset(ROWS, plain_tokenizer, SETTINGS)
    lines = report.lines()
    assert lines[0] == (
        "kept 3 of 7 pairs; dropped 4: chosen equals rejected (2: rows 1, 6), "
        "prompt fills max_length (1: row 2), empty response (1: row 3)"
    )
    assert lines[1] == "truncated 1 pairs"
    assert lines[2].startswith("in 1 of these, only one side lost its end and its end-of-text token")
    assert lines[3].startswith("moved the prompt's last tokens to the response in 1 pairs")
    assert [line.split()[0] for line in lines[4:]] == ["tokens", "prompt", "chosen", "rejected"]


def test_token_statistics_are_those_of_the_kept_rows(plain_tokenizer):
    prepared, report = prepare_preference_dataset(ROWS, plain_tokenizer, SETTINGS)
    lengths = [len(row["responses"][0]) for row in prepared]
    assert report.tokens["chosen"].total == sum(lengths)
    assert report.tokens["chosen"].max == max(lengths)
    assert report.tokens["prompt"].total == sum(len(row["prompt_ids"]) for row in prepared)
    assert TokenStats.of(range(1, 101)) == TokenStats(mean=50.5, median=50.5, p95=95, max=100, total=5050)
    assert TokenStats.of([7]) == TokenStats(mean=7.0, median=7, p95=7, max=7, total=7)


def test_long_lists_of_rows_are_cut_in_the_text_and_whole_in_the_report():
    report = DataReport("pairs", 20, 0, {"empty response": tuple(range(20))})
    assert report.lines() == ["kept 0 of 20 pairs; dropped 20: empty response (20: rows 0, 1, 2, 3, 4, 5, 6, 7, ...)"]


def test_raise_stops_at_the_first_bad_row(plain_tokenizer):
    settings = TokenizationSettings(max_length=64, on_bad_row="raise")
    with pytest.raises(ValueError, match=r"dataset row 1 \(counted from 0\) cannot be used: chosen equals rejected"):
        prepare_preference_dataset(ROWS, plain_tokenizer, settings)


def test_a_dataset_of_which_nothing_is_left_is_an_error_with_the_counts(plain_tokenizer):
    with pytest.raises(ValueError, match=r"kept 0 of 2 pairs; dropped 2: chosen equals rejected \(1: row 0\), prompt"):
        prepare_preference_dataset(ROWS[1:3], plain_tokenizer, SETTINGS)
    with pytest.raises(ValueError, match="at least one row, got none"):
        prepare_preference_dataset([], plain_tokenizer, SETTINGS)


def test_rows_of_different_kinds_stand_in_one_list(bos_tokenizer):
    rows = [
        ROWS[0],
        {"prompt": "the cat", "chosen": 5, "rejected": " ran"},
        {"chosen": "A: yes", "rejected": "A: no"},
        {
            "conversations": [{"from": "human", "value": "Hi?"}],
            "chosen": {"from": "gpt", "value": "Hello!"},
            "rejected": {"from": "gpt", "value": "Go."},
        },
    ]
    prepared, report = prepare_preference_dataset(rows, bos_tokenizer, SETTINGS)
    assert report.dropped == {"response is not text": (1,)}
    assert [bos_tokenizer.decode(row["prompt_ids"]) for row in prepared] == [
        "<s>the cat",
        "<s>A:",
        "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n",
    ]


def test_sft_rows_have_one_response_and_no_preferences(plain_tokenizer):
    prepared, report = prepare_sft_dataset(ROWS, plain_tokenizer, SETTINGS)
    assert report.num_kept == 6  # an equal or empty rejected response is no matter
    groups = [group_from_columns(row) for row in prepared]
    assert all(len(group.responses) == 1 and tuple(group.preferences) == () for group in groups)
    assert plain_tokenizer.decode(groups[0].responses[0]) == " sat</s>"
    assert set(report.tokens) == {"prompt", "response"}
    assert report.lines()[0].startswith("kept 6 of 7 examples")


def test_tokenized_columns_pass_through_with_their_reference_log_probs(plain_tokenizer):
    rows = [
        {
            "prompt_ids": [1, 2],
            "chosen_ids": [3, 4],
            "rejected_ids": [5],
            "ref_chosen_logps": -1.5,
            "ref_rejected_logps": -2,
        },
        {
            "prompt_ids": [1, 2],
            "chosen_ids": [],
            "rejected_ids": [5],
            "ref_chosen_logps": -1.5,
            "ref_rejected_logps": -2,
        },
        {"prompt_ids": [1, 2], "chosen_ids": [5], "rejected_ids": [5], "ref_chosen_logps": 0, "ref_rejected_logps": 0},
    ]
    prepared, report = prepare_preference_dataset(rows, plain_tokenizer, SETTINGS)
    group = group_from_columns(prepared[0])
    assert (group.prompt_ids, list(group.responses), list(group.ref_logps)) == ([1, 2], [[3, 4], [5]], [-1.5, -2.0])
    assert report.dropped == {"empty response": (1,), "chosen equals rejected": (2,)}
    assert group_from_columns({k: rows[0][k] for k in ("prompt_ids", "chosen_ids", "rejected_ids")}).ref_logps is None


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_reference_log_probs_of_a_row_that_is_cut_are_those_of_another_text(plain_tokenizer, mode):
    brought = {"ref_chosen_logps": -1.5, "ref_rejected_logps": -2.0}
    rows = [
        {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5], **brought},
        {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 6], "rejected_ids": [5], **brought},
        {"prompt_ids": [1, 2, 3, 4], "chosen_ids": [3], "rejected_ids": [5]},
    ]
    settings = TokenizationSettings(max_length=4, max_prompt_length=2, truncation_mode=mode)
    prepared, report = prepare_preference_dataset(rows, plain_tokenizer, settings)
    assert [row["ref_logps"] for row in prepared] == [[-1.5, -2.0], None, None]
    assert (report.num_truncated, report.num_stale_ref_logps) == (2, 1)
    said = "ignored the dataset's reference log-probs of 1 pairs: they belong to the whole text, which was truncated"
    assert said in report.lines()
    again, report = prepare_preference_dataset(prepared, plain_tokenizer, settings)
    assert (list(again), report.num_stale_ref_logps) == (list(prepared), 0)


def test_preparing_a_prepared_dataset_changes_nothing(plain_tokenizer):
    settings = TokenizationSettings(max_length=16, truncation_mode="keep_end")
    once, first = prepare_preference_dataset(ROWS, plain_tokenizer, settings)
    assert any(row["loss_masks"] for row in once)  # some prompts differ after truncation
    twice, second = prepare_preference_dataset(once, plain_tokenizer, settings)
    assert list(once) == list(twice)
    assert second.num_kept == first.num_kept
    assert second.tokens == first.tokens


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow"])
def test_a_format_that_the_dataset_shows_its_rows_in_makes_no_difference(plain_tokenizer, kind):
    expected, report = prepare_preference_dataset(ROWS, plain_tokenizer, SETTINGS)
    shown = Dataset.from_list(ROWS).with_format(kind)
    prepared, other = prepare_preference_dataset(shown, plain_tokenizer, SETTINGS)
    assert (list(prepared), other) == (list(expected), report)
    stream, _ = prepare_preference_dataset(shown.to_iterable_dataset(), plain_tokenizer, SETTINGS)
    assert list(map(group_from_columns, stream)) == list(map(group_from_columns, expected))


def test_a_transform_of_raw_rows_is_applied_to_them_alone(plain_tokenizer):
    def answered(rows):
        return {"prompt": rows["question"], "chosen": [" sat"] * len(rows["question"]), "rejected": rows["answer"]}

    raw = Dataset.from_dict({"question": ["the cat"], "answer": [" ran"]}).with_transform(answered)
    prepared, _ = prepare_preference_dataset(raw, plain_tokenizer, SETTINGS)
    assert list(prepared) == list(prepare_preference_dataset(ROWS[:1], plain_tokenizer, SETTINGS)[0])


def test_the_same_input_has_the_same_fingerprint_and_other_settings_another(plain_tokenizer):
    def fingerprint(settings):
        return prepare_preference_dataset(Dataset.from_list(ROWS), plain_tokenizer, settings)[0]._fingerprint

    assert fingerprint(SETTINGS) == fingerprint(TokenizationSettings(max_length=64))
    assert fingerprint(SETTINGS) != fingerprint(TokenizationSettings(max_length=63))


def test_a_column_that_is_empty_for_a_thousand_rows_may_still_fill(plain_tokenizer):
    rows = [{"prompt": "the cat", "chosen": f" sat {i}", "rejected": " ran"} for i in range(1100)]
    rows.append({"prompt": "", "chosen": "the cat", "rejected": "the dog"})  # the only row with loss_masks
    prepared, _ = prepare_preference_dataset(Dataset.from_list(rows), plain_tokenizer, SETTINGS)
    assert prepared[0]["loss_masks"] is None
    assert prepared[1100]["loss_masks"][0][0] is False


def test_several_processes_give_the_same_rows(plain_tokenizer):
    dataset = Dataset.from_list(ROWS)
    alone, report = prepare_preference_dataset(dataset, plain_tokenizer, SETTINGS)
    shared, other = prepare_preference_dataset(dataset, plain_tokenizer, SETTINGS, num_proc=2)
    assert list(alone) == list(shared)
    assert report == other


def test_what_concerns_the_whole_dataset_is_raised_with_its_row(plain_tokenizer):
    with pytest.raises(ValueError, match=r"got \['question'\] \(dataset row 0"):
        prepare_preference_dataset([{"question": "a"}], plain_tokenizer, SETTINGS)
    message = {"role": "assistant", "content": "a"}
    with pytest.raises(ValueError, match=r"chat template.*\(dataset row 1"):
        prepare_preference_dataset(
            [ROWS[0], {"prompt": "q", "chosen": [message], "rejected": "b"}], plain_tokenizer, SETTINGS
        )


def test_image_columns_are_refused_before_any_row_is_read(plain_tokenizer):
    from datasets import Features, Image, List, Value

    features = Features(prompt=Value("string"), chosen=Value("string"), rejected=Value("string"), images=List(Image()))
    dataset = Dataset.from_list([{**ROWS[0], "images": []}], features=features)
    with pytest.raises(ValueError, match=r"dataset must .*\['images'\]"):
        prepare_preference_dataset(dataset, plain_tokenizer, SETTINGS)


@pytest.mark.parametrize("dataset", ["rows.jsonl", {"train": ROWS}, iter(ROWS)])
def test_what_is_no_dataset_is_refused(plain_tokenizer, dataset):
    with pytest.raises(ValueError, match=r"dataset must .*Dataset.*got (str|dict|list_iterator)"):
        prepare_preference_dataset(dataset, plain_tokenizer, SETTINGS)


def test_a_processor_of_images_is_no_tokenizer(plain_tokenizer):
    class Processor:
        image_processor = None

    with pytest.raises(ValueError, match="tokenizer must be a text tokenizer, got Processor"):
        prepare_preference_dataset(ROWS, Processor(), SETTINGS)


@pytest.mark.parametrize(
    ("name", "num_kept", "dropped"),
    [
        ("llms-from-scratch-preference.json", 1094, {"chosen equals rejected": (122, 226, 400, 566, 628, 676)}),
        ("llama-factory-dpo-en-demo.json", 300, {}),
        ("llama-factory-v1-dpo-demo.jsonl", 10, {}),
        ("hh-rlhf-harmless-test-benign44.jsonl", 44, {}),
        ("torchtune-hh-rlhf-tiny.json", 1, {}),
    ],
)
def test_real_files_become_tokens_that_decode_to_their_text(shared_data, bos_tokenizer, name, num_kept, dropped):
    dataset = load_preference_dataset(shared_data / name)
    prepared, report = prepare_preference_dataset(dataset, bos_tokenizer, TokenizationSettings(max_length=None))
    assert (report.num_kept, report.dropped, report.num_truncated) == (num_kept, dropped, 0)
    example, group = dataset[0], group_from_columns(prepared[0])
    chosen = example.get("chosen", example.get("chosen_messages"))
    while not isinstance(chosen, str):  # message lists, messages, parts of content
        chosen = chosen[-1] if isinstance(chosen, list) else chosen.get("value") or chosen["content"]
    text = bos_tokenizer.decode(group.responses[0])
    assert text in (f"{chosen}</s>", f"{chosen}<|im_end|>\n") or (
        chosen == bos_tokenizer.decode(group.prompt_ids).removeprefix("<s>") + text.removesuffix("</s>")
    )


def test_every_row_of_a_chinese_file_decodes_to_its_text(shared_data, bos_tokenizer):
    dataset = load_preference_dataset(shared_data / "llama-factory-dpo-zh-demo.json")
    prepared, report = prepare_preference_dataset(dataset, bos_tokenizer, TokenizationSettings(max_length=None))
    assert report.num_kept == len(dataset)
    for example, row in zip(dataset, prepared, strict=True):
        group = group_from_columns(row)
        prompt = bos_tokenizer.decode(group.prompt_ids)
        assert all(message["value"] in prompt for message in example["conversations"])
        for side, response in zip(("chosen", "rejected"), group.responses, strict=True):
            assert bos_tokenizer.decode(response) == f"{example[side]['value']}<|im_end|>\n"


def test_tools_of_different_keys_reach_the_template_without_what_arrow_fills_in():
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + turns
    tokenizer = byte_level_tokenizer(chat_template=template)
    tools = [[{"name": "add", "parameters": {"x": "int"}}], [{"name": "find", "parameters": {"text": "str"}}]]
    row = {
        "prompt": [{"role": "user", "content": "the cat"}],
        "chosen": [{"role": "assistant", "content": "sat"}],
        "rejected": [{"role": "assistant", "content": "ran"}],
    }
    columns = Dataset.from_list([{**row, "tools": some} for some in tools])
    assert None in columns[0]["tools"][0]["parameters"].values()  # or there is nothing to leave out
    whole = TokenizationSettings(max_length=None)
    prepared, _ = prepare_preference_dataset(columns, tokenizer, whole)
    as_text = Dataset.from_list([{**row, "tools": json.dumps(some)} for some in tools])
    assert list(prepared) == list(prepare_preference_dataset(as_text, tokenizer, whole)[0])
