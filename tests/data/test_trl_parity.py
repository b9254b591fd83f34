"""Tokens against TRL's own preparation and collator, on rows where TRL's result is right."""

from types import SimpleNamespace

import pytest
from datasets import Dataset
from peers import peer
from tiny_tokenizers import CHATML, byte_level_tokenizer

from fastdpo.data.prepare import group_from_columns, prepare_preference_dataset
from fastdpo.data.tokenization import TokenizationSettings

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
    "rows", [TEXT, IMPLICIT, CHAT, IMPLICIT_CHAT], ids=["text", "implicit", "chat", "implicit_chat"]
)
@pytest.mark.parametrize("manner", ["bos", "plain"])
@pytest.mark.parametrize(("num_cut", "truncation_mode"), [(None, "keep_start"), (3, "keep_start"), (3, "keep_end")])
def test_sequences_and_masks_equal_those_of_trl(rows, manner, num_cut, truncation_mode):
    around = {"bos": "<s>", "prefix": ["<s>"]} if manner == "bos" else {}
    tokenizer = byte_level_tokenizer(**around, special=["<|im_start|>", "<|im_end|>"], chat_template=CHATML)
    max_length = None
    if num_cut is not None:  # the longest sequence loses this many tokens
        whole = trl_batch(rows, tokenizer, TokenizationSettings(max_length=None))
        max_length = max(len(ids) for ids, _ in whole) - num_cut
    settings = TokenizationSettings(max_length=max_length, truncation_mode=truncation_mode)
    assert our_batch(rows, tokenizer, settings) == trl_batch(rows, tokenizer, settings)
