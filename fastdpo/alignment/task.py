"""The task of the controlled-sentiment experiment (DPO paper, arXiv 2305.18290, section 6.1), in small.

In: a size and a seed. Out: a Task: a reference model, preference pairs of its own samples, and held-out prompts and
pairs. Everything is generated: texts and true reward (data/synthetic), a tokenizer, and a Llama with under a million
weights, trained from scratch.

    texts -> tokenizer -> SFT on preferred responses (Preferred-FT: the reference) -> sampled pairs, labelled by
    Bradley-Terry from the true reward
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastdpo.alignment.generate import sample_responses
from fastdpo.alignment.sweep import Measurement
from fastdpo.data.synthetic import bradley_terry_rows, review_pairs, review_prompts, true_reward

MAX_NEW_TOKENS = 64  # the grammar's longest response has 34
TASK_FILE = "task.json"


@dataclass(frozen=True)
class Size:
    """Sizes of the experiment: texts, models, steps and samples."""

    num_train_prompts: int  # of SFT and of the pairs
    num_heldout_prompts: int  # of the measurements; held-out pairs and samples, one each per prompt
    num_pairs: int  # sampled for DPO
    hidden_size: int
    num_layers: int
    sft_epochs: float
    sft_batch_size: int
    sft_learning_rate: float
    dpo_epochs: float
    dpo_batch_size: int
    dpo_learning_rate: float


SIZES = {
    "full": Size(
        num_train_prompts=2048,
        num_heldout_prompts=1024,
        num_pairs=4096,
        hidden_size=128,
        num_layers=2,
        sft_epochs=3,
        sft_batch_size=16,
        sft_learning_rate=4e-3,
        dpo_epochs=1,
        dpo_batch_size=32,
        dpo_learning_rate=2.5e-4,
    ),
    "small": Size(
        num_train_prompts=1024,
        num_heldout_prompts=1024,
        num_pairs=2048,
        hidden_size=64,
        num_layers=2,
        sft_epochs=4,
        sft_batch_size=16,
        sft_learning_rate=6e-3,
        dpo_epochs=1,
        dpo_batch_size=32,
        dpo_learning_rate=6e-4,
    ),
}


Row = dict[str, str]


@dataclass(frozen=True, eq=False)
class Task:
    """Everything that the policies of one seed share."""

    size: Size
    seed: int
    tokenizer: Any
    reference: Any  # the SFT model
    sft_history: tuple[dict[str, Any], ...]  # log_history of the SFT trainer
    heldout_prompts: list[str]
    train_rows: list[Row]
    heldout_rows: list[Row]
    reference_rewards: list[float]  # of all samples in the pairs

    def measurement(self) -> Measurement:
        """One sample for each held-out prompt, scored by the true reward."""
        return Measurement(
            self.heldout_prompts, lambda _, response: true_reward(response), MAX_NEW_TOKENS, 256, 10 * self.seed + 2
        )

    def dpo_settings(self) -> dict[str, Any]:
        """Arguments of DPOConfig, without output_dir."""
        return {
            **_common_settings(self.seed),
            "per_device_train_batch_size": self.size.dpo_batch_size,
            "per_device_eval_batch_size": 128,
            "learning_rate": self.size.dpo_learning_rate,
            "num_train_epochs": self.size.dpo_epochs,
            "token_metrics": False,
        }


def _common_settings(seed: int) -> dict[str, Any]:
    return {
        "seed": seed, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "bf16": False,
        "gradient_checkpointing": False, "dataloader_pin_memory": False, "max_length": None, "adam_beta2": 0.99,
        "warmup_steps": 20,
    }  # fmt: skip


def prepare_task(
    size: Size,
    seed: int,
    *,
    on_stage: Callable[[str], None] = lambda stage: None,
    make_callbacks: Callable[[], list[Any]] = list,
) -> Task:
    """Generates texts, trains the reference in fp32 (on the GPU if there is one), and samples its pairs.

    Args:
        on_stage: called with the name of each stage when it starts.
        make_callbacks: returns the callbacks for the trainer.
    """
    from transformers import PrinterCallback

    from fastdpo.training import SFTConfig, SFTTrainer

    on_stage("Writing reviews and labelling pairs")
    train_prompts, heldout_prompts = review_prompts(size.num_train_prompts, size.num_heldout_prompts, seed)
    texts = review_pairs(train_prompts, seed)

    on_stage("Training a tokenizer")
    tokenizer = train_tokenizer([row["prompt"] + row["chosen"] for row in texts])
    model = tiny_llama(tokenizer, size, seed)

    on_stage("Fine-tuning on preferred responses (the reference)")
    with tempfile.TemporaryDirectory() as scratch:
        args = SFTConfig(
            scratch,
            **_common_settings(seed),
            per_device_train_batch_size=size.sft_batch_size,
            learning_rate=size.sft_learning_rate,
            num_train_epochs=size.sft_epochs,
            logging_steps=10,
        )
        sft = SFTTrainer(model, args=args, train_dataset=texts, processing_class=tokenizer, callbacks=make_callbacks())
        sft.remove_callback(PrinterCallback)
        sft.train()
    model = sft.model

    on_stage("Sampling pairs from the reference")
    num_repeats = -(-size.num_pairs // len(train_prompts))
    pair_prompts = (train_prompts * num_repeats)[: size.num_pairs]
    train_rows, train_rewards = _sampled_pairs(model, tokenizer, pair_prompts, 10 * seed)
    heldout_rows, heldout_rewards = _sampled_pairs(model, tokenizer, heldout_prompts, 10 * seed + 1)
    return Task(
        size=size,
        seed=seed,
        tokenizer=tokenizer,
        reference=model,
        sft_history=tuple(sft.state.log_history),
        heldout_prompts=heldout_prompts,
        train_rows=train_rows,
        heldout_rows=heldout_rows,
        reference_rewards=[*train_rewards, *heldout_rewards],
    )


def cached_task(size: Size, seed: int, folder: Path) -> Task:
    """The task that `folder` holds; otherwise prepares it and saves it there, all of it or nothing.

    The folder then holds the reference with its tokenizer, pairs.jsonl and heldout.jsonl, which the commands read.

    Raises:
        ValueError: the folder holds a task of another size or seed.
    """
    described = {"size": asdict(size), "seed": seed}
    path = folder / TASK_FILE
    if path.is_file():
        return _load_task(size, seed, folder, described)
    task = prepare_task(size, seed)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    task.reference.save_pretrained(partial / "reference")
    task.tokenizer.save_pretrained(partial / "reference")
    for name, rows in (("pairs", task.train_rows), ("heldout", task.heldout_rows)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (partial / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    kept = {name: getattr(task, name) for name in ("sft_history", "heldout_prompts", "reference_rewards")}
    (partial / TASK_FILE).write_text(json.dumps({**described, **kept}), encoding="utf-8")
    partial.rename(folder)
    return task


def _load_task(size: Size, seed: int, folder: Path, described: dict[str, Any]) -> Task:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kept = json.loads((folder / TASK_FILE).read_text(encoding="utf-8"))
    if {name: kept[name] for name in described} != described:
        raise ValueError(f"folder must hold a task of size {size} and seed {seed}, got another one in {folder}")
    pairs, heldout = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("pairs", "heldout")
    )
    return Task(
        size=size,
        seed=seed,
        tokenizer=AutoTokenizer.from_pretrained(folder / "reference"),
        reference=AutoModelForCausalLM.from_pretrained(folder / "reference"),
        sft_history=tuple(kept["sft_history"]),
        heldout_prompts=kept["heldout_prompts"],
        train_rows=pairs,
        heldout_rows=heldout,
        reference_rewards=kept["reference_rewards"],
    )


def train_tokenizer(texts: Sequence[str]) -> Any:
    """A tokenizer with one token per word or punctuation mark, including its leading space; it adds a BOS, and has EOS,
    pad and unknown tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.WordLevelTrainer(special_tokens=["<pad>", "<s>", "</s>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=128,
    )


def tiny_llama(tokenizer: Any, size: Any, seed: int, max_length: int = 128) -> Any:
    """A Llama with random weights for the tokenizer. The global random state does not change.

    Args:
        size: has hidden_size and num_layers.
        max_length: most tokens of a sequence.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=2 * size.hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=4,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _sampled_pairs(
    model: Any, tokenizer: Any, prompts: Sequence[str], seed: int
) -> tuple[list[dict[str, str]], list[float]]:
    """Two samples per prompt, labelled by Bradley-Terry; and the true rewards of all samples."""
    samples = sample_responses(
        model, tokenizer, prompts, num_samples=2, max_new_tokens=MAX_NEW_TOKENS, batch_size=256, seed=seed
    )
    rows = bradley_terry_rows(prompts, samples.responses[0::2], samples.responses[1::2], seed)
    return rows, [true_reward(response) for response in samples.responses]
