"""DPO at several betas from one initial model, measured on held-out prompts: the reward-KL frontier.

In: an initial model (the reference), preference rows for training, held-out rows and prompts, and a reward function.
Out: a SweepResult, every figure with its standard error. Refuses betas that are not positive or repeat. Reference
log-probs are computed once for all betas. Follows the DPO paper's frontier (arXiv 2305.18290, section 6.1).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback

from fastdpo.alignment.generate import kl_to_reference, sample_responses
from fastdpo.alignment.results import Estimate, PolicyResult, SweepResult
from fastdpo.data.batches.packing import pack_pairs, pad_pairs
from fastdpo.data.prepare import group_from_columns, prepare_preference_dataset
from fastdpo.modeling import check_packing, packed_logps
from fastdpo.training import DPOConfig, DPOTrainer

RewardFn = Callable[[str, str], float]  # prompt, response -> reward


@dataclass(frozen=True)
class Measurement:
    """Settings of the measurements."""

    prompts: Sequence[str]  # one sample each; never trained on
    reward_fn: RewardFn
    max_new_tokens: int = 256
    batch_size: int = 64  # sequences or pairs at a time
    seed: int = 0  # of sampling


@dataclass(frozen=True)
class Bench:
    """What all policies of a sweep share: the reference, pairs as token columns with its log-probs, the measurement."""

    reference: Any
    tokenizer: Any
    train: Any
    heldout: Any
    ref_heldout: tuple[Tensor, Tensor]  # log-probs of chosen and rejected, (N,) fp64
    measurement: Measurement


def prepare_bench(
    reference: Any,
    tokenizer: Any,
    *,
    args: DPOConfig,
    train_rows: Any,
    heldout_rows: Any,
    measurement: Measurement,
) -> Bench:
    """Tokenizes the rows as `args` says, and computes the reference's log-probs once."""
    settings, batch_size = args.tokenization_settings(), measurement.batch_size
    train, heldout = (prepare_preference_dataset(rows, tokenizer, settings)[0] for rows in (train_rows, heldout_rows))
    ref_heldout = pair_logps(reference, heldout, batch_size=batch_size)
    return Bench(
        reference=reference,
        tokenizer=tokenizer,
        train=_with_reference(train, pair_logps(reference, train, batch_size=batch_size)),
        heldout=_with_reference(heldout, ref_heldout),
        ref_heldout=ref_heldout,
        measurement=measurement,
    )


def train_policy(bench: Bench, args: DPOConfig, callbacks: list[Any] | None = None) -> tuple[Any, list[dict[str, Any]]]:
    """Trains a copy of the reference with these settings: (policy, log_history). The held-out pairs are the trainer's
    eval_dataset."""
    trainer = DPOTrainer(
        copy.deepcopy(bench.reference),
        args=args,
        train_dataset=bench.train,
        eval_dataset=bench.heldout,
        processing_class=bench.tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # log_history has the same values
    trainer.train()
    return trainer.model, trainer.state.log_history


def measure_policy(
    bench: Bench, policy: Any, beta: float | None, log_history: Sequence[dict[str, Any]] = ()
) -> PolicyResult:
    """Measures a policy on the held-out pairs and prompts.

    Args:
        beta: of the implicit reward; None measures the reference itself.
    """
    measurement, (ref_chosen, ref_rejected) = bench.measurement, bench.ref_heldout
    if beta is None:  # its implicit reward is 0 everywhere and ranks nothing, so its log-probs do
        ranked, margins = ref_chosen - ref_rejected, torch.zeros_like(ref_chosen)
    else:
        chosen, rejected = pair_logps(policy, bench.heldout, batch_size=measurement.batch_size)
        ranked = margins = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    samples = sample_responses(
        policy,
        bench.tokenizer,
        measurement.prompts,
        max_new_tokens=measurement.max_new_tokens,
        batch_size=measurement.batch_size,
        seed=measurement.seed,
    )
    rewards = [measurement.reward_fn(p, r) for p, r in zip(samples.prompts, samples.responses, strict=True)]
    kl = torch.zeros(len(samples))
    if beta is not None:
        kl = kl_to_reference(policy, bench.reference, samples, batch_size=measurement.batch_size)
    return PolicyResult(
        beta=beta,
        accuracy=Estimate.of(ranked > 0),
        margin=Estimate.of(margins),
        reward=Estimate.of(rewards),
        kl=Estimate.of(kl),
        num_tokens=Estimate.of([len(ids) for ids in samples.response_ids]),
        samples=samples,
        rewards=tuple(rewards),
        log_history=tuple(log_history),
    )


def sweep_beta(
    model: Any,
    tokenizer: Any,
    betas: Sequence[float],
    *,
    args: DPOConfig,
    train_rows: Any,
    heldout_rows: Any,
    measurement: Measurement,
    make_callbacks: Callable[[float], list[Any]] | None = None,
    on_policy: Callable[[Any, PolicyResult], None] | None = None,
) -> SweepResult:
    """Trains one policy per beta from a copy of `model`, and measures each and `model` itself.

    Args:
        model: the initial model of every policy and the reference; its weights do not change.
        betas: > 0, all different; trained in rising order.
        args: all other settings of training; its beta is replaced.
        train_rows, heldout_rows: preference rows in any form that DPOTrainer takes. The held-out rows are the trainers'
            eval_dataset; accuracy and margin are measured on them.
        measurement: settings for drawing and scoring samples.
        make_callbacks: returns the callbacks of the trainer for a beta.
        on_policy: called with every trained model and its result.
    Raises:
        ValueError: betas are missing, not positive or repeat, or data preparation refuses the rows.
    """
    betas = sorted(betas)
    if not betas or not betas[0] > 0 or len(set(betas)) < len(betas):
        raise ValueError(f"betas must hold at least one number, all > 0 and different, got {betas}")
    bench = prepare_bench(
        model, tokenizer, args=args, train_rows=train_rows, heldout_rows=heldout_rows, measurement=measurement
    )

    def of_its_own(index: int) -> Bench:  # each model draws from a seed of its own, so that samples are independent
        return replace(bench, measurement=replace(measurement, seed=measurement.seed + index))

    reference = measure_policy(of_its_own(0), model, None)
    policies: list[PolicyResult] = []
    for index, beta in enumerate(betas, start=1):
        beta_args = copy.copy(args)
        beta_args.beta = beta
        callbacks = make_callbacks(beta) if make_callbacks is not None else None
        policy, log_history = train_policy(bench, beta_args, callbacks)
        policies.append(measure_policy(of_its_own(index), policy, beta, log_history))
        if on_policy is not None:
            on_policy(policy, policies[-1])
    return SweepResult(reference, tuple(policies), len(bench.train), len(bench.heldout))


@torch.no_grad()
def pair_logps(model: Any, dataset: Any, *, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Summed log-probs of chosen and rejected over a dataset of token columns: (N,), (N,) fp64 on the CPU, nats."""
    lay_out = pack_pairs if check_packing(model).ok else pad_pairs
    was_training = model.training
    model.eval()
    chosen, rejected = [], []
    for start in range(0, len(dataset), batch_size):
        rows = range(start, min(start + batch_size, len(dataset)))
        batch = lay_out([group_from_columns(dataset[row]) for row in rows])
        logps = packed_logps(model, batch.to(model.device))
        chosen.append(logps.chosen.double().cpu())
        rejected.append(logps.rejected.double().cpu())
    model.train(was_training)
    return torch.cat(chosen), torch.cat(rejected)


def _with_reference(dataset: Any, ref_logps: tuple[Tensor, Tensor]) -> Any:
    """The dataset as token columns with the reference's log-probs, which DPOTrainer uses instead of a second model."""
    from datasets import Dataset

    rows = list(dataset)
    return Dataset.from_dict(
        {
            "prompt_ids": [row["prompt_ids"] for row in rows],
            "chosen_ids": [row["responses"][0] for row in rows],
            "rejected_ids": [row["responses"][1] for row in rows],
            "ref_chosen_logps": ref_logps[0].tolist(),
            "ref_rejected_logps": ref_logps[1].tolist(),
        }
    )
