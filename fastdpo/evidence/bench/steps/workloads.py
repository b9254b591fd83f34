"""What a training step is measured on: models by shape, preference rows as text, a tokenizer, and FLOPs of a step.

CPU: "short" is an instruction file of 1,100 rows as it is, "long" has prompts of 1 to 16 and responses of 1 to 8 of its
texts (an instruction with its answer) put together; "SmolLM2 short" and "SmolLM2 long" are such rows on the real
SmolLM2-135M-Instruct with its own tokenizer (`fastdpo/evidence/smollm2.py`);
"hybrid short" and "hybrid long" are the same rows on a model in which three of four layers are gated delta nets
(Qwen3.5's). The file is instruction-data-with-preference.json of the public repository rasbt/LLMs-from-scratch
(ch07/04_preference-tuning-with-dpo); the environment variable FASTDPO_BENCH_DATA says where it lies. Where it is
absent, the project's synthetic reviews take its place, and the record says so. GPU: random words of given lengths on a
Llama of about a billion parameters. Rows are in one order for every method, and none of them is one that a trainer
would drop.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdpo.evidence.smollm2 import smollm2_file
from fastdpo.types import Message

DATA_VARIABLE = "FASTDPO_BENCH_DATA"  # which the processes that measure inherit
BESIDE_THE_CLONE = Path(__file__).resolve().parents[5] / "shared" / "data" / "llms-from-scratch-preference.json"
SEPARATOR = "\n"  # after an instruction and between texts; one character, which merges with nothing

Row = dict[str, str]


@dataclass(frozen=True)
class Workload:
    """A model's shape, its data, and the step that everybody takes."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    pairs_per_step: int
    max_length: int  # tokens of a prompt and one response
    dtype: str = "float32"
    is_tied: bool = False
    learning_rate: float = 1e-4
    mean_lengths: tuple[int, int] | None = None  # tokens of prompt and response, where words are drawn at random
    is_hybrid: bool = False  # every fourth layer has attention, the others a gated delta net
    is_pretrained: bool = False  # SmolLM2-135M-Instruct, whose shape the numbers above repeat
    model: str | None = None  # folder or name of a model whose config replaces the shape; weights stay random
    dataset: str | None = None  # file or name of preference data, tokenized with the model's tokenizer if it has one

    @property
    def num_attention_layers(self) -> int:
        return self.num_layers // 4 if self.is_hybrid else self.num_layers

    def tolerance(self, expected: float) -> float:
        """By how much a loss of an exact method may differ from `expected`, nats.

        In bf16 summed log-probs are off by tenths, and AdamW's first steps move every weight by the learning rate in
        the direction of its gradient's sign, which rounding turns where the gradient is small: what the weights have
        moved, which is how far the loss is from ln 2, is off by a share.
        """
        return 1e-4 if self.dtype == "float32" else 1e-2 + 0.2 * abs(expected - math.log(2))

    def make_model(self, device: str, attention: str = "sdpa") -> nn.Module:
        """The model with random weights, the same in every call on one kind of device."""
        from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3_5TextConfig

        if self.is_pretrained and device != "meta":
            settings = {"dtype": getattr(torch, self.dtype), "attn_implementation": attention}
            return AutoModelForCausalLM.from_pretrained(pretrained_folder(), **settings).to(device)
        torch.manual_seed(0)
        if self.model is not None:
            own = AutoConfig.from_pretrained(self.model)
            own.get_text_config().vocab_size = self.vocab_size
            with torch.device(device):
                return AutoModelForCausalLM.from_config(
                    own, dtype=getattr(torch, self.dtype), attn_implementation=attention
                )
        head_dim = self.hidden_size // self.num_heads
        delta_net = {"head_dim": head_dim, "linear_key_head_dim": head_dim, "linear_value_head_dim": head_dim}
        delta_net |= {"linear_num_key_heads": self.num_heads, "linear_num_value_heads": self.num_heads}
        config = (Qwen3_5TextConfig if self.is_hybrid else LlamaConfig)(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_length,
            tie_word_embeddings=self.is_tied,
            **(delta_net if self.is_hybrid else {}),
        )
        with torch.device(device):  # not made in fp32 and cast, which would cast the rotary frequencies too
            return AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, self.dtype), attn_implementation=attention
            )


_SMALL: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_layers": 6,
    "num_heads": 6,
    "num_kv_heads": 2,
}
_HYBRID: dict[str, Any] = {**_SMALL, "num_layers": 8, "is_hybrid": True}
_SMOLLM2: dict[str, Any] = {"hidden_size": 576, "intermediate_size": 1536, "num_layers": 30, "num_heads": 9}
_SMOLLM2 |= {"num_kv_heads": 3, "vocab_size": 49152, "is_tied": True, "learning_rate": 1e-5, "is_pretrained": True}
_BILLION = {"hidden_size": 2048, "intermediate_size": 8192, "num_layers": 16, "num_heads": 32, "num_kv_heads": 8}
_GPU: dict[str, Any] = {**_BILLION, "vocab_size": 128256, "dtype": "bfloat16", "is_tied": True, "learning_rate": 1e-5}
WORKLOADS = {
    w.name: w
    for w in (
        Workload("tiny", 64, 128, 2, 4, 2, 2000, pairs_per_step=4, max_length=1024),
        Workload("short", **_SMALL, vocab_size=32000, pairs_per_step=8, max_length=1024),
        Workload("long", **_SMALL, vocab_size=32000, pairs_per_step=8, max_length=1024),
        Workload("hybrid short", **_HYBRID, vocab_size=32000, pairs_per_step=8, max_length=1024),
        Workload("hybrid long", **_HYBRID, vocab_size=32000, pairs_per_step=8, max_length=1024),
        Workload("SmolLM2 short", **_SMOLLM2, pairs_per_step=4, max_length=1024),
        Workload("SmolLM2 long", **_SMOLLM2, pairs_per_step=2, max_length=1024),
        Workload("1B hh-like", **_GPU, pairs_per_step=64, max_length=1024, mean_lengths=(120, 50)),
        Workload("1B long", **_GPU, pairs_per_step=16, max_length=4096, mean_lengths=(1000, 500)),
    )
}
CPU_WORKLOADS, GPU_WORKLOADS = ("short", "long"), ("1B hh-like", "1B long")


def data_file() -> Path:
    """Where the instruction file is looked for."""
    return Path(os.environ.get(DATA_VARIABLE) or BESIDE_THE_CLONE).expanduser()


def pretrained_folder() -> str:
    """SmolLM2-135M-Instruct as a folder, converted by the first call on a machine.

    Raises:
        ValueError: its package is not installed.
    """
    from fastdpo.training.setup.gguf_files import as_folder

    return as_folder(str(smollm2_file()))


def source_of(workload: Workload) -> str:
    if workload.dataset is not None:
        return workload.dataset
    if workload.mean_lengths is not None:
        return "random words"
    return "instruction file" if data_file().exists() and workload.name != "tiny" else "synthetic reviews"


def make_rows(workload: Workload, num_rows: int) -> list[Row]:
    """Rows of text in the order in which they are trained on; repeated where there are fewer."""
    rng = random.Random(0)
    if workload.dataset is not None:
        rows = dataset_rows(workload.dataset)
        rng.shuffle(rows)
        return [rows[index % len(rows)] for index in range(num_rows)]
    if workload.mean_lengths is not None:
        return [_random_row(workload, rng) for _ in range(num_rows)]
    rows, texts = _file_rows() if source_of(workload) == "instruction file" else _review_rows()
    if workload.name.endswith("long"):
        rows = [_long_row(texts, rng) for _ in range(num_rows)]
    rng.shuffle(rows)
    return [rows[index % len(rows)] for index in range(num_rows)]


def make_tokenizer(workload: Workload) -> Any:
    """A tokenizer that adds nothing to a text but the EOS that trainers add: BPE of the data, or a word per id."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if workload.is_pretrained:
        return AutoTokenizer.from_pretrained(pretrained_folder())
    names = ["<pad>", "</s>", "<unk>"]
    if workload.dataset is not None and workload.model is not None:
        return AutoTokenizer.from_pretrained(workload.model)
    if workload.mean_lengths is not None:
        words = [*names, *(f"w{index}" for index in range(len(names), workload.vocab_size))]
        backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        if workload.dataset is not None:
            rows = dataset_rows(workload.dataset)
            texts = [row["prompt"] for row in rows]
        else:
            rows, texts = _file_rows() if source_of(workload) == "instruction file" else _review_rows()
        texts = texts + [row[side] for row in rows for side in ("chosen", "rejected")]
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        settings: dict[str, Any] = {"special_tokens": names, "initial_alphabet": alphabet, "show_progress": False}
        backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=workload.vocab_size, **settings))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def dataset_rows(path: str) -> list[Row]:
    """The pairs of preference data in any form, as texts that all methods tokenize alike. Messages become lines that
    begin with their role.

    Raises:
        ValueError: the data cannot be read, or holds no usable pair.
    """
    from fastdpo.data.forms.formats import AUTO, read_row, regrouped
    from fastdpo.data.sources.loading import iterate_examples
    from fastdpo.data.tokens.tokenization import usable_preferences
    from fastdpo.data.values import BadRow

    examples = [*iterate_examples(path)]
    rows = []
    for example in regrouped(examples, examples[0], AUTO, is_sft=False) or examples:
        try:
            row, _ = read_row(example, AUTO, is_sft=False)
            preferences = usable_preferences(row)
        except BadRow:
            continue
        prompt, answers = _as_text(row.prompt), [_as_text(response) for response in row.responses]
        if prompt:
            rows += [{"prompt": prompt, "chosen": answers[i], "rejected": answers[j]} for i, j in preferences]
    if not rows:
        raise ValueError(f"dataset must hold a usable pair with a prompt, got none in {path!r}: fastdpo data inspect")
    return rows


def _as_text(said: str | Sequence[Message]) -> str:
    if isinstance(said, str):
        return said
    return "".join(f"{message['role']}: {message.get('content') or ''}\n" for message in said)


def _file_rows() -> tuple[list[Row], list[str]]:
    rows, texts = [], []
    for example in json.loads(data_file().read_text()):
        instruction = "\n".join(filter(None, (example["instruction"], example["input"]))) + SEPARATOR
        texts.append(instruction + example["output"])
        if example["chosen"] != example["rejected"]:
            rows.append({"prompt": instruction, "chosen": example["chosen"], "rejected": example["rejected"]})
    return rows, texts


def _review_rows() -> tuple[list[Row], list[str]]:
    from fastdpo.data.synthetic import review_pairs, review_prompts

    rows = review_pairs(review_prompts(1100, 0, seed=0)[0], seed=0)
    return rows, [row["prompt"] + row["chosen"] for row in rows]


def _long_row(texts: list[str], rng: random.Random) -> Row:
    def put_together(most: int) -> str:
        return SEPARATOR.join(rng.choices(texts, k=rng.randint(1, most)))

    return {"prompt": put_together(16) + SEPARATOR, "chosen": put_together(8), "rejected": put_together(8)}


def _random_row(workload: Workload, rng: random.Random) -> Row:
    """Lengths are log-normal around their means, as those of human preference data are, and fit `max_length`."""
    assert workload.mean_lengths is not None
    sigma = 0.5

    def words(mean: int) -> str:
        length = round(mean * rng.lognormvariate(-(sigma**2) / 2, sigma))
        length = min(max(length, 2), workload.max_length // 2 - 1)
        return " ".join(f"w{rng.randrange(3, workload.vocab_size)}" for _ in range(length))

    prompt, response = workload.mean_lengths
    return {"prompt": words(prompt) + " ", "chosen": words(response) + " ", "rejected": words(response) + " "}


@dataclass
class Work:
    """What was run in the timed steps; backward counts twice a forward, a layer run again for backward not at all."""

    tokens: float = 0.0  # positions that passed the backbone, padding included; with backward three times
    visible: float = 0.0  # (query, key) pairs that causal attention looks at, likewise
    head_rows: float = 0.0  # rows of the LM head, likewise

    def flops(self, workload: Workload, num_backbone_weights: int) -> float:
        """2 per weight and token; 4 per pair and channel in every layer (scores and values)."""
        attention = 4 * workload.hidden_size * workload.num_attention_layers * self.visible
        head = 2 * workload.hidden_size * workload.vocab_size * self.head_rows
        return 2 * num_backbone_weights * self.tokens + attention + head


def num_linear_weights(backbone: nn.Module) -> int:
    return sum(m.weight.numel() for m in backbone.modules() if isinstance(m, nn.Linear))
