"""A small version of the controlled-sentiment experiment of the DPO paper (arXiv 2305.18290, section 6.1).

In: a size and a seed. Out: an Experiment: the models, the preference rows, and the result of the beta sweep. The
experiment generates everything itself: texts and true reward (data/synthetic), a tokenizer, and a Llama with under a
million weights, trained from scratch.

    texts -> tokenizer -> SFT on preferred responses (Preferred-FT: the reference) -> sampled pairs, labelled by
    Bradley-Terry from the true reward -> DPO at every beta -> measurements on held-out prompts
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastdpo.alignment.generate import sample_responses
from fastdpo.alignment.results import SweepResult
from fastdpo.alignment.sweep import Measurement, sweep_beta
from fastdpo.data.synthetic import bradley_terry_rows, review_pairs, review_prompts, true_reward

BETAS = (0.1, 0.3, 1.0)
MAX_NEW_TOKENS = 64  # the grammar's longest response has 34


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


@dataclass(frozen=True)
class Experiment:
    """The models, rows and measurements of a run."""

    size: Size
    tokenizer: Any
    reference: Any  # the SFT model
    policies: dict[float | None, Any]  # by beta
    sft_history: tuple[dict[str, Any], ...]  # log_history of the SFT trainer
    train_rows: list[dict[str, str]]
    heldout_rows: list[dict[str, str]]
    label_ceiling: float  # share of held-out pairs that the true reward itself ranks as labelled
    reference_rewards: list[float]  # of all samples drawn from the reference
    sweep: SweepResult


def run_experiment(
    size: Size,
    *,
    seed: int = 0,
    betas: Sequence[float] = BETAS,
    on_stage: Callable[[str], None] = lambda stage: None,
    make_callbacks: Callable[[], list[Any]] = list,
) -> Experiment:
    """Runs all stages in fp32, on the GPU if there is one.

    Args:
        on_stage: called with the name of each stage when it starts.
        make_callbacks: returns the callbacks for each trainer.
    """
    from transformers import PrinterCallback

    from fastdpo.training import DPOConfig, SFTConfig, SFTTrainer

    on_stage("Writing reviews and labelling pairs")
    train_prompts, heldout_prompts = review_prompts(size.num_train_prompts, size.num_heldout_prompts, seed)
    texts = review_pairs(train_prompts, seed)

    on_stage("Training a tokenizer")
    tokenizer = train_tokenizer([row["prompt"] + row["chosen"] for row in texts])
    model = tiny_llama(tokenizer, size, seed)

    with tempfile.TemporaryDirectory() as scratch:
        common: dict[str, Any] = {
            "output_dir": scratch, "seed": seed, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
            "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False, "max_length": None,
            "adam_beta2": 0.99, "warmup_steps": 20,
        }  # fmt: skip
        on_stage("Fine-tuning on preferred responses (the reference)")
        sft_args = SFTConfig(
            per_device_train_batch_size=size.sft_batch_size,
            learning_rate=size.sft_learning_rate,
            num_train_epochs=size.sft_epochs,
            logging_steps=10,
            **common,
        )
        sft = SFTTrainer(
            model, args=sft_args, train_dataset=texts, processing_class=tokenizer, callbacks=make_callbacks()
        )
        sft.remove_callback(PrinterCallback)
        sft.train()
        model = sft.model

        on_stage("Sampling pairs from the reference")
        num_repeats = -(-size.num_pairs // len(train_prompts))
        pair_prompts = (train_prompts * num_repeats)[: size.num_pairs]
        train_rows, train_rewards = _sampled_pairs(model, tokenizer, pair_prompts, 10 * seed)
        heldout_rows, heldout_rewards = _sampled_pairs(model, tokenizer, heldout_prompts, 10 * seed + 1)

        dpo_args = DPOConfig(
            per_device_train_batch_size=size.dpo_batch_size,
            per_device_eval_batch_size=128,
            learning_rate=size.dpo_learning_rate,
            num_train_epochs=size.dpo_epochs,
            logging_steps=0.04,  # of all steps
            eval_strategy="steps",
            eval_steps=0.25,
            token_metrics=False,
            **common,
        )
        policies: dict[float | None, Any] = {}

        def callbacks_of(beta: float) -> list[Any]:
            on_stage(f"DPO with beta = {beta:g}")
            return make_callbacks()

        sweep = sweep_beta(
            model,
            tokenizer,
            betas,
            args=dpo_args,
            train_rows=train_rows,
            heldout_rows=heldout_rows,
            measurement=Measurement(
                heldout_prompts, lambda _, response: true_reward(response), MAX_NEW_TOKENS, 256, 10 * seed + 2
            ),
            make_callbacks=callbacks_of,
            on_policy=lambda policy, result: policies.update({result.beta: policy}),
        )
    ranked = [true_reward(row["chosen"]) > true_reward(row["rejected"]) for row in heldout_rows]
    return Experiment(
        size=size,
        tokenizer=tokenizer,
        reference=model,
        policies=policies,
        sft_history=tuple(sft.state.log_history),
        train_rows=train_rows,
        heldout_rows=heldout_rows,
        label_ceiling=sum(ranked) / len(ranked),
        reference_rewards=[*train_rewards, *heldout_rewards, *sweep.reference.rewards],
        sweep=sweep,
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


def tiny_llama(tokenizer: Any, size: Size, seed: int) -> Any:
    """A Llama with random weights for the tokenizer. The global random state does not change."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=2 * size.hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=4,
        max_position_embeddings=128,
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
