"""Tokens against TRL's own preparation and collator, on rows where TRL's result is right."""

import json
from types import SimpleNamespace

import pytest
from covering import every_pair
from datasets import Dataset
from peers import peer
from tiny_tokenizers import CHATML, byte_level_tokenizer

from fastdpo.data.prepare import group_from_columns, prepare_preference_dataset
from fastdpo.data.tokens.tokenization import TokenizationSettings

dpo_trainer = peer("trl.trainer.dpo_trainer")

TEXT = [
    {"prompt": "the cat", "chosen": " sat on the mat", "rejected": " ran"},
    {"prompt": "the c", "chosen": "at sat", "rejected": "ow sat"},  # merges over the boundary
    {"prompt": "what is 問 the capital?\n", "chosen": "Paris 🎉", "rejected": "a dog sat on the log and a cat"},
    {"prompt": "the dog sat on the log and the cat", "chosen": " sat", "rejected": " is short and is bad"},
]
IMPLICIT = [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in TEXT]
CHAT = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }
    for row in TEXT
]
IMPLICIT_CHAT = [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in CHAT]


TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"x": "int"}}}
SYSTEM = {"role": "system", "content": "a good answer is short"}
WITH_TOOLS = [{**row, "tools": [TOOL]} for row in CHAT]
WITH_TOOLS_AS_JSON = [{**row, "tools": json.dumps([TOOL])} for row in CHAT]
WITH_KWARGS = [{**row, "chat_template_kwargs": {"mood": "kind"}} for row in CHAT]
SEVERAL_TURNS_BEFORE = [
    {**row, "prompt": [SYSTEM, *row["prompt"], {"role": "assistant", "content": "Paris"}, *row["prompt"]]}
    for row in CHAT
]
SYSTEM_ONLY = [{**row, "prompt": [SYSTEM]} for row in CHAT]
READS_COLUMNS = "{% if tools %}{{ tools | tojson }}{% endif %}{{ mood | default('') }}" + CHATML


def trl_batch(rows, tokenizer, settings):
    """Sequences and completion masks, chosen half first, as TRL's trainer would feed its model."""
    args = SimpleNamespace(
        dataset_num_proc=None, max_length=settings.max_length, truncation_mode=settings.truncation_mode
    )
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    dataset = Dataset.from_list(rows)
    dataset = dpo_trainer.DPOTrainer._prepare_dataset(trainer, dataset, tokenizer, args, "train")
    collator = dpo_trainer.DataCollatorForPreference(
        tokenizer.pad_token_id, max_length=settings.max_length, truncation_mode=settings.truncation_mode
    )
    batch = collator(list(dataset))
    pieces = zip(batch["input_ids"], batch["attention_mask"].bool(), batch["completion_mask"], strict=True)
    return [(ids[keep].tolist(), mask[keep].bool().tolist()) for ids, keep, mask in pieces]


def our_batch(rows, tokenizer, settings):
    prepared, _ = prepare_preference_dataset(Dataset.from_list(rows), tokenizer, settings)
    groups = [group_from_columns(row) for row in prepared]
    batch = []
    for side in (0, 1):
        for group in groups:
            prompt, response = list(group.prompt_ids), list(group.responses[side])
            mask = [True] * len(response) if group.loss_masks is None else group.loss_masks[side]
            batch.append((prompt + response, [False] * len(prompt) + list(mask)))
    return batch


@pytest.mark.parametrize(
    "rows",
    [WITH_TOOLS, WITH_TOOLS_AS_JSON, WITH_KWARGS, SEVERAL_TURNS_BEFORE, SYSTEM_ONLY],
    ids=["tools", "tools_as_json", "chat_template_kwargs", "several_turns_before", "system_only"],
)
def test_columns_and_prompts_of_conversations_give_the_tokens_of_trl(rows):
    tokenizer = byte_level_tokenizer(special=["<|im_start|>", "<|im_end|>"], chat_template=READS_COLUMNS)
    settings = TokenizationSettings(max_length=None)
    ours = our_batch(rows, tokenizer, settings)
    assert ours == trl_batch(rows, tokenizer, settings)
    plain = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in CHAT]
    assert ours != our_batch(plain, tokenizer, settings)  # or the column would not have been read


def test_only_masks_differ_from_trl_in_a_response_of_several_turns():
    more = [{"role": "user", "content": "and a dog?"}, {"role": "assistant", "content": "ran"}]
    rows = [{**row, "chosen": [*row["chosen"], *more]} for row in CHAT]
    tokenizer = byte_level_tokenizer(special=["<|im_start|>", "<|im_end|>"], chat_template=CHATML)
    settings = TokenizationSettings(max_length=None)
    ours, theirs = our_batch(rows, tokenizer, settings), trl_batch(rows, tokenizer, settings)
    assert [ids for ids, _ in ours] == [ids for ids, _ in theirs]
    for (ids, counts), (_, is_response) in zip(ours[: len(rows)], theirs, strict=False):
        left_out = tokenizer.decode([i for i, a, b in zip(ids, counts, is_response, strict=True) if b and not a])
        assert left_out == "<|im_start|>user\nand a dog?<|im_end|>\n<|im_start|>assistant\n"


FORMS = {"text": TEXT, "implicit": IMPLICIT, "chat": CHAT, "implicit_chat": IMPLICIT_CHAT}


@pytest.mark.parametrize(
    *every_pair(
        form=list(FORMS), manner=["bos", "plain"], cut=[(None, "keep_start"), (3, "keep_start"), (3, "keep_end")]
    ),
    ids=str,
)
def test_sequences_and_masks_equal_those_of_trl(form, manner, cut):
    rows, (num_cut, truncation_mode) = FORMS[form], cut
    around = {"bos": "<s>", "prefix": ["<s>"]} if manner == "bos" else {}
    tokenizer = byte_level_tokenizer(**around, special=["<|im_start|>", "<|im_end|>"], chat_template=CHATML)
    max_length = None
    if num_cut is not None:  # the longest sequence loses this many tokens
        whole = trl_batch(rows, tokenizer, TokenizationSettings(max_length=None))
        max_length = max(len(ids) for ids, _ in whole) - num_cut
    settings = TokenizationSettings(max_length=max_length, truncation_mode=truncation_mode)
    assert our_batch(rows, tokenizer, settings) == trl_batch(rows, tokenizer, settings)
