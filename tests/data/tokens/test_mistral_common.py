"""Tokenizers of mistral-common, which AutoTokenizer takes for Mistral's models where it is installed: no chat template,
and two modes of which each takes one kind of conversation."""

import pickle
from pathlib import Path

import pytest

mistral_common = pytest.importorskip("mistral_common")

from fastdpo import DPOConfig, DPOTrainer  # noqa: E402
from fastdpo.data.prepare import group_from_columns, prepare_preference_dataset, prepare_sft_dataset  # noqa: E402
from fastdpo.data.tokens.chat.rendering import ChatTemplate  # noqa: E402
from fastdpo.data.tokens.tokenization import TokenizationSettings  # noqa: E402

WHOLE = TokenizationSettings(max_length=None)
USER = {"role": "user", "content": "the cat?"}
FILES = {
    "tekken": "tekken_240911.json",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}
LOADED = {}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


def mistral(name="tekken", mode="test"):
    from transformers.tokenization_mistral_common import MistralCommonBackend

    if name != "tekken":
        pytest.importorskip("sentencepiece")
    if (name, mode) not in LOADED:
        folder = Path(mistral_common.__file__).parent / "data"
        LOADED[name, mode] = MistralCommonBackend(folder / FILES[name], mode=mode)
    return LOADED[name, mode]


def groups_of(rows, tokenizer, prepare=prepare_preference_dataset):
    dataset, report = prepare(rows, tokenizer, WHOLE)
    return [group_from_columns(example) for example in dataset], report


def text(tokenizer, ids):
    return tokenizer.decode(ids).replace("▁", " ").replace("<0x0A>", "\n")


@pytest.mark.parametrize("mode", ["test", "finetuning"])
@pytest.mark.parametrize("name", FILES)
def test_messages_are_tokenized_in_both_modes(name, mode):
    tokenizer = mistral(name, mode)
    rows = [{"prompt": [{"role": "system", "content": "be brief"}, USER], "chosen": [said("sat")], "rejected": "ran"}]
    (group,), report = groups_of(rows, tokenizer)
    prompt = text(tokenizer, group.prompt_ids)
    assert prompt.startswith("<s>")
    assert prompt.endswith("the cat?[/INST]")
    assert "be brief" in prompt
    assert [text(tokenizer, response).strip() for response in group.responses] == ["sat</s>", "ran</s>"]
    assert not report.notes.whats("lost")
    assert not report.notes.whats("unknown")


def test_the_tokens_are_those_of_mistral_common():
    rows = [{"prompt": [USER], "chosen": [said("sat")], "rejected": [said("ran")]}]
    (group,), _ = groups_of(rows, mistral(mode="test"))
    whole = mistral(mode="finetuning").apply_chat_template([USER, said("sat")])["input_ids"]
    assert [*group.prompt_ids, *group.responses[0]] == whole
    assert list(group.prompt_ids) == mistral(mode="test").apply_chat_template([USER])["input_ids"]


@pytest.mark.parametrize("mode", ["test", "finetuning"])
def test_only_the_assistants_turns_of_a_response_count(mode):
    tokenizer = mistral(mode=mode)
    turns = [said("sat"), {"role": "user", "content": "and a dog?"}, said("ran")]
    (group,), _ = groups_of([{"prompt": [USER], "chosen": turns, "rejected": [said("no")]}], tokenizer)
    pairs = zip(group.responses[0], group.loss_masks[0], strict=True)
    assert tokenizer.decode([token for token, counts in pairs if counts]) == "sat</s>ran</s>"


@pytest.mark.parametrize("mode", ["test", "finetuning"])
def test_calls_tools_prefills_and_special_tokens_in_text_are_read(mode):
    tokenizer = mistral(mode=mode)
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}
    parameters = {"type": "object", "properties": {"x": {"type": "integer"}}}
    tools = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": parameters}}]
    rows = [
        {"prompt": [USER], "chosen": [said("", tool_calls=[call])], "rejected": [said("no")], "tools": tools},
        {"prompt": [USER, said("The answer")], "chosen": [said(" is A")], "rejected": [said(" is B")]},
        {"prompt": [USER], "chosen": [said("write </s> there")], "rejected": [said("no")]},
    ]
    groups, report = groups_of(rows, tokenizer)
    assert tokenizer.decode(groups[0].responses[0]).startswith('[TOOL_CALLS][{"name": "add", "arguments": {"x": 1}')
    assert tokenizer.decode(groups[0].prompt_ids).startswith("<s>[AVAILABLE_TOOLS]")
    assert tokenizer.decode(groups[1].prompt_ids) == "<s>[INST]the cat?[/INST]The answer"
    assert tokenizer.decode(groups[1].responses[0]) == " is A</s>"
    assert tokenizer.decode(groups[2].responses[0]) == "write </s> there</s>"
    assert list(groups[2].responses[0]).count(tokenizer.eos_token_id) == 1
    assert not report.notes.whats("lost")


def test_messages_that_it_refuses_make_only_their_row_bad():
    rows = [
        {"prompt": [USER], "chosen": [said("sat")], "rejected": [said("ran")]},
        {"prompt": [{"role": "tool", "content": "4"}], "chosen": [said("sat")], "rejected": [said("ran")]},
    ]
    groups, report = groups_of(rows, mistral())
    assert len(groups) == 1
    (reason,) = report.dropped
    assert reason.startswith("the tokenizer refuses the messages (")


def test_text_fine_tuning_and_pickling_work():
    tokenizer = mistral(mode="finetuning")
    (group,), report = groups_of([{"prompt": "the cat", "chosen": " sat", "rejected": " ran"}], tokenizer)
    assert tokenizer.decode([*group.prompt_ids, *group.responses[0]]) == "<s>the cat sat</s>"
    assert any("plain text" in line for line in report.lines())
    (group,), _ = groups_of([{"messages": [USER, said("sat")]}], tokenizer, prepare_sft_dataset)
    assert tokenizer.decode(group.responses[0]) == "sat</s>"
    assert len(pickle.loads(pickle.dumps(tokenizer))) == len(tokenizer)


def test_a_template_of_the_run_is_refused():
    with pytest.raises(ValueError, match=r"chat_template must be None .*mistral-common"):
        ChatTemplate(mistral(), "{{ messages }}")


def test_a_model_trains_and_saves_with_it(tmp_path):
    from tiny import make_llama

    tokenizer = mistral("v3")
    rows = [{"prompt": [USER], "chosen": [said("sat")], "rejected": [said("ran on")]}] * 2
    args = DPOConfig(str(tmp_path), max_steps=1, per_device_train_batch_size=2, use_cpu=True, report_to=[])
    model = make_llama(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16)
    trainer = DPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    assert trainer.train().training_loss == pytest.approx(0.6931, abs=1e-3)
    trainer.save_model()
    assert list(tmp_path.glob("*.model*"))
