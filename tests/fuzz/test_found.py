"""The shrunk cases that the strategies of this folder have found, each as it failed, with what happens now."""

import pytest
import torch
import yaml
from tiny import make_byte_tokenizer
from tiny_tokenizers import CHATML, byte_level_tokenizer

import fastdpo
from fastdpo.cli.arguments import TYPES, parse
from fastdpo.cli.main import main
from fastdpo.data.batches.packing import pack_pairs
from fastdpo.data.prepare import prepare_preference_dataset
from fastdpo.data.rows.columns import RowPreparer
from fastdpo.data.tokens.settings import TokenizationSettings
from fastdpo.training import DPOConfig
from fastdpo.types import IGNORE_INDEX, TokenizedGroup

PAIR = {"prompt": "a ", "chosen": "b", "rejected": "c"}
IDS = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
GROUP = {"prompt_ids": [1], "responses": [[2], [3]]}
TURNS = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}


def reason_of(row, tokenizer=None):
    """Why a row is dropped; None if it is kept."""
    prepare = RowPreparer(tokenizer or make_byte_tokenizer(), TokenizationSettings(max_length=None), is_sft=False)
    return prepare({name: [value] for name, value in row.items()}, [0])["bad_row"][0]


def nested(levels):
    value = "a"
    for _ in range(levels):
        value = [value]
    return value


def test_text_that_begins_like_endless_json_is_text():
    assert reason_of({**PAIR, "prompt": "[" * 3000}) is None
    assert reason_of({**PAIR, "prompt": "[" * 150 + "]" * 150}) is None


def test_a_cell_of_too_many_levels_is_dropped_with_the_column():
    assert reason_of({**PAIR, "prompt": nested(300)}) == "prompt is nested more than 100 levels deep"
    assert reason_of({**PAIR, "metadata": nested(300)}) == "metadata is nested more than 100 levels deep"
    dataset, report = prepare_preference_dataset(
        [PAIR, {**PAIR, "prompt": nested(300)}], make_byte_tokenizer(), TokenizationSettings()
    )
    assert len(dataset) == 1
    assert report.dropped == {"prompt is nested more than 100 levels deep": (1,)}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**IDS, "prompt_ids": None}, "prompt_ids is not a list of token ids"),
        ({**IDS, "chosen_ids": "ab"}, "chosen_ids is not a list of token ids"),
        ({**IDS, "chosen_ids": [1.5]}, "chosen_ids is not a list of token ids"),
        ({**IDS, "rejected_ids": [2**31]}, "rejected_ids is not a list of token ids"),
        ({**IDS, "rejected_ids": [True]}, "rejected_ids is not a list of token ids"),
        ({**IDS, "ref_chosen_logps": "x", "ref_rejected_logps": -1.0}, "ref_chosen_logps is not a finite number"),
        (
            {**IDS, "ref_chosen_logps": -1.0, "ref_rejected_logps": float("nan")},
            "ref_rejected_logps is not a finite number",
        ),
        ({**PAIR, "ref_chosen_logps": [], "ref_rejected_logps": -1.0}, "ref_chosen_logps is not a finite number"),
        ({**GROUP, "responses": None}, "responses is not a list of lists"),
        ({**GROUP, "responses": [None]}, "response is not a list of token ids"),
        ({**GROUP, "responses": []}, "empty response"),
        ({**GROUP, "responses": [[2]]}, "no response is better than another"),
        ({**GROUP, "loss_masks": [[True]]}, "loss_masks have other lengths than the responses"),
        ({**GROUP, "loss_masks": [["x"], [True]]}, "loss_masks do not hold true and false only"),
        ({**GROUP, "preferences": 3}, "preferences is not a list of pairs"),
        ({**GROUP, "preferences": [[0]]}, "preferences are not pairs of indices of responses"),
        ({**GROUP, "preferences": [[0, 2]]}, "preferences are not pairs of indices of responses"),
        ({**GROUP, "preferences": [[1, 1]]}, "preferences compare a response with itself"),
        ({**GROUP, "ref_logps": [1.0]}, "ref_logps has another length than responses"),
    ],
    ids=str,
)
def test_a_tokenized_row_that_is_none_is_dropped_with_its_reason(row, reason):
    assert reason_of(row) == reason


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, [[1]]), "prompt_ids must hold lists of one entry per token"),
        (([1], None), "responses must hold lists of one entry per token, got None"),
        (([1], [[2], [3]], [None, [True]]), "loss_masks must hold lists of one entry per token"),
        (([1], [[2], [3]], None, 5), "ref_logps must hold lists"),
        (([1], [[2], [3]], None, None, [0]), "preferences must hold pairs of indices of responses"),
        (([1], [[2.5], [3]]), r"responses must hold lists of token ids, got \[2.5\]"),
        ((["a"], [[2], [3]]), r"prompt_ids must hold lists of token ids, got \['a'\]"),
    ],
    ids=str,
)
def test_a_group_of_something_else_than_token_ids_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        pack_pairs([TokenizedGroup(*arguments)])


@pytest.mark.parametrize(
    ("expression", "why"),
    [("{{ 1 / 0 }}", "division by zero"), ("{% if 1e999 %}y{% endif %}", "name 'inf' is not defined")],
)
def test_a_template_whose_expression_fails_refuses_the_row(expression, why):
    tokenizer = byte_level_tokenizer(chat_template=CHATML + expression)
    row = {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}
    assert reason_of(row, tokenizer) == f"the chat template refuses the messages ({why})"


def test_an_ignored_row_has_statistics_of_zero_whatever_it_holds():
    h, w = torch.tensor([[float("inf")], [1.0]]), torch.tensor([[1.0], [2.0]])
    for impl in ("reference", "tiled"):
        found = fastdpo.linear_logps(h, w, torch.tensor([IGNORE_INDEX, 1]), outputs=("lse", "entropy"), impl=impl)
        assert found.lse[0] == found.entropy[0] == found.logps[0] == 0.0, impl
        assert found.lse[1] == pytest.approx(torch.tensor([1.0, 2.0]).logsumexp(0)), impl


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outputs": None}, "outputs must be a sequence of names out of .*, got None"),
        ({"outputs": [3]}, r"outputs must be a sequence of names out of .*, got \[3\]"),
        ({"logit_scale": 3.4e38}, r"logit_scale must be at most 1e\+30 in size, got 3.4e\+38"),
    ],
)
def test_settings_of_the_head_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        fastdpo.linear_logps(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([1, 3]), **options)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"logging_steps": float("inf")}, "logging_steps must be a finite number of steps, .*, got inf"),
        ({"log_level": "loud"}, r"log_level must be one of \['critical', .*, got 'loud'"),
        ({"include_num_input_tokens_seen": "some"}, "include_num_input_tokens_seen must be one of .*, got 'some'"),
    ],
)
def test_a_value_that_transformers_would_fail_on_later_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        DPOConfig("unused", use_cpu=True, report_to="none", **setting)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dataloader_multiprocessing_context", None),
        ("include_num_input_tokens_seen", "non_padding"),
        ("label_names", [" "]),
    ],
)
def test_a_config_file_may_say_what_python_may(tmp_path, name, value):
    path = tmp_path / "run.yaml"
    whole = {"model": "m", "dataset": "d", "output_dir": "o", "use_cpu": True, "report_to": "none", name: value}
    path.write_text(yaml.safe_dump(whole))
    assert getattr(parse("train", TYPES["train"], ["--config", str(path)])[2], name) == value


def test_a_name_that_only_another_command_has_is_unknown(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndataset: d\noutput_dir: o\nref_model_name_or_path: x\n")
    assert main(["sft", "--config", str(path)]) == 2
    assert "unknown key 'ref_model_name_or_path'" in capsys.readouterr().err


def test_a_key_of_a_recipe_begins_no_line_of_the_result(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    recipe = {
        "model_name_or_path": "m",
        "dataset_name": "d",
        "output_dir": "o",
        "x\ntrust_remote_code": True,
        "\x1f": 0,
    }
    path.write_text(yaml.safe_dump(recipe))
    main(["migrate", str(path), "--kind", "trl"])
    text = capsys.readouterr().out
    assert "trust_remote_code" not in yaml.safe_load(text)
    assert r"#   x\ntrust_remote_code: true" in text


@pytest.mark.parametrize(
    ("template", "more"),
    [("{% for m in messages %}{% endfor %}\ud800", {}), ("{{ x }}", {"chat_template_kwargs": {"x": "\udfff"}})],
)
def test_half_a_surrogate_pair_from_a_template_or_its_arguments_drops_the_row(template, more):
    tokenizer = byte_level_tokenizer(bos="<s>", special=("<|im_start|>", "<|im_end|>"))
    tokenizer.chat_template = template
    row = {name: [{"role": role, "content": name}] for name, role in TURNS.items()}
    assert reason_of({**row, **more}, tokenizer) == "what the chat template renders is not valid Unicode"


def test_a_chat_template_that_is_too_long_for_a_file_name_is_a_name_or_refused(tmp_path):
    config = DPOConfig(output_dir=str(tmp_path), use_cpu=True, chat_template="a" * 5000)
    assert config.chat_template == "a" * 5000  # which may be one of the tokenizer's
    with pytest.raises(ValueError, match="chat_template must be an existing file or the name of a template"):
        DPOConfig(output_dir=str(tmp_path), use_cpu=True, chat_template="a" * 5000 + ".jinja")
