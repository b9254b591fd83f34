"""The sections of the demo's report: first the results, then the method."""

from __future__ import annotations

import platform
from datetime import datetime
from typing import TYPE_CHECKING

from fastdpo.alignment.results import best_frontier
from fastdpo.data.synthetic import REWARD_SCALE, true_reward
from fastdpo.report import (
    Figure,
    FigureGrid,
    Point,
    Response,
    Sample,
    SampleList,
    Table,
    Text,
    frontier,
    training_curves,
)
from fastdpo.report.sections import Section

if TYPE_CHECKING:
    from fastdpo.alignment.experiment import Experiment

NUM_SHOWN_PROMPTS = 4


def demo_sections(experiment: Experiment, *, seed: int, seconds: float) -> list[Section]:
    """All sections, in the order of the page.

    Args:
        seconds: wall time of the whole run so far.
    """
    return [
        _summary(experiment),
        _results(experiment),
        _frontier(experiment),
        _curves(experiment),
        _samples(experiment),
        _orderings(experiment),
        _method(experiment),
        _facts(experiment, seed, seconds),
    ]


def _summary(experiment: Experiment) -> Text:
    sweep = experiment.sweep
    orderings = sweep.orderings()
    num_held = sum(ordering.holds for ordering in orderings)
    first, last = sweep.policies[0], sweep.policies[-1]
    return Text(
        "In short",
        [
            "A small language model was trained from scratch on generated reviews, then tuned by DPO on pairs of its"
            f" own samples at {len(sweep.policies)} values of beta. The true reward of any text is known here, so this"
            " report measures directly what DPO only learns from noisy preferences.",
            f"Samples of the reference have a mean true reward of {sweep.reference.reward.mean:.2f} nats. DPO raises it"
            f" to {last.reward.mean:.2f} at beta = {last.beta:g}, at a KL of {last.kl.mean:.2f} nats to the reference,"
            f" and to {first.reward.mean:.2f} at beta = {first.beta:g}, at a KL of {first.kl.mean:.2f}: beta"
            " controls how far the policy moves from the reference.",
            f"{num_held} of the {len(orderings)} orderings that theory predicts hold by more than two standard errors;"
            " they are listed below.",
        ],
    )


def _results(experiment: Experiment) -> Table:
    sweep = experiment.sweep
    rows = []
    for model in sweep.models:
        is_reference = model.beta is None
        rows.append(
            [
                model.name,
                f"{100 * model.accuracy.mean:.1f} ± {100 * model.accuracy.stderr:.1f} %",
                "0" if is_reference else model.margin.text(3),
                model.reward.text(),
                "0" if is_reference else model.kl.text(),
                model.num_tokens.text(1),
            ]
        )
    return Table(
        "Results on held-out prompts",
        ["Model", "Held-out accuracy", "Margin", "True reward", "KL to reference", "Tokens per sample"],
        rows,
        note=f"Mean ± one standard error, in nats, over {sweep.num_heldout_pairs:,} held-out pairs (accuracy, margin)"
        f" and {len(sweep.reference.samples):,} samples, one per held-out prompt (true reward, KL, tokens). Accuracy is"
        " the share of pairs that the implicit reward, beta * (log pi - log pi_ref), ranks as labelled. The implicit"
        " reward of the reference is zero for every text, so its row shows the accuracy of ranking by its own"
        " log-probability. Labels are drawn at random with the Bradley-Terry probabilities: the"
        f" true reward itself ranks {100 * experiment.label_ceiling:.1f} % of these pairs as labelled, and no model can"
        " be expected to do better.",
    )


def _frontier(experiment: Experiment) -> Figure:
    models = experiment.sweep.models
    points = [Point(m.name, m.kl.mean, m.reward.mean, m.kl.stderr, m.reward.stderr) for m in models]
    reach = 1.25 * max(point.kl for point in points)
    best = [point for point in best_frontier(experiment.reference_rewards, num_points=400) if point[0] <= reach]
    return Figure(
        "True reward against KL",
        frontier(points, best=best, reward_name="true reward (nats)"),
        alt="True reward against KL to the reference, one point per model: "
        + "; ".join(f"{p.name}: KL {p.kl:.2f}, reward {p.reward:.2f}" for p in points),
        note="Bars are one standard error. The dashed line bounds what any policy can reach at a given KL: the"
        f" reference tilted by exp(reward / beta), estimated from {len(experiment.reference_rewards):,} samples of the"
        " reference. It ends where too few samples carry the estimate. DPO stays below it, because it learns from a"
        " limited number of noisy labels and not from the reward.",
    )


def _curves(experiment: Experiment) -> FigureGrid:
    histories = {model.name: model.log_history for model in experiment.sweep.policies}
    return FigureGrid(
        "Training",
        [
            (f"{key} by optimizer step for every beta, in training and held out", f)
            for key, f in training_curves(histories)
        ],
        note="Solid: training pairs. Dashed with markers: held-out pairs, on prompts that no training saw. The loss"
        " starts at ln 2 = 0.693, where policy and reference are the same; equal rewards"
        " count as ranked wrongly, so accuracy starts at 0.",
    )


def _samples(experiment: Experiment) -> SampleList:
    models = experiment.sweep.models
    samples = []
    for index in range(NUM_SHOWN_PROMPTS):
        responses = [Response(m.name, m.samples.responses[index].strip(), f"{m.rewards[index]:+.2f}") for m in models]
        samples.append(Sample(models[0].samples.prompts[index] + " ...", responses))
    return SampleList(
        "What the models write",
        samples,
        "True reward",
        note=f"The first {NUM_SHOWN_PROMPTS} held-out prompts, not chosen by hand.",
    )


def _orderings(experiment: Experiment) -> Table:
    rows = [
        [o.claim, o.difference.text(3), f"{o.num_stderrs:.1f}", "holds" if o.holds else "does not hold"]
        for o in experiment.sweep.orderings()
    ]
    return Table(
        "Does theory hold?",
        ["Claim", "Difference", "In standard errors", "By more than two"],
        rows,
        note="DPO optimizes reward minus beta times KL, so every beta should give more reward than the reference, and a"
        " larger beta a smaller KL. The standard error of a difference is that of independent estimates.",
    )


def _method(experiment: Experiment) -> Table:
    size, sweep, train_rows = experiment.size, experiment.sweep, experiment.train_rows
    num_parameters = sum(p.numel() for p in experiment.reference.parameters())
    chosen, rejected = (
        sum(true_reward(row[k]) for row in train_rows) / len(train_rows) for k in ("chosen", "rejected")
    )
    sft_loss = next(entry["loss"] for entry in reversed(experiment.sft_history) if "loss" in entry)
    betas = ", ".join(f"{policy.beta:g}" for policy in sweep.policies)
    steps = {
        "World": "Reviews of hotels, restaurants and films from a grammar. The true reward of a text is"
        f' {REWARD_SCALE:g} times the mean valence of its opinion words, with modifiers such as "not" and "utterly"'
        " taken into account. It does not depend on length, and lies between -6 and 6 nats.",
        "Prompts": f"{size.num_train_prompts:,} review openings for training, and {size.num_heldout_prompts:,} others"
        " that tokenizer, fine-tuning and DPO never see.",
        "Model": f"A Llama with {num_parameters:,} weights ({size.num_layers} layers of width {size.hidden_size},"
        f" {len(experiment.tokenizer):,} tokens), from a random start, in fp32.",
        "Reference": "Preferred-FT: supervised fine-tuning on the preferred one of two grammar texts per prompt,"
        f" {size.sft_epochs:g} epochs; the loss ends at {sft_loss:.2f} nats per token.",
        "Pairs": f"{sweep.num_train_pairs:,} pairs of samples of the reference, labelled by Bradley-Terry: the first is"
        " preferred with the probability sigmoid(difference of true rewards). The mean true reward of the chosen ones"
        f" is {chosen:.2f}, of the rejected ones {rejected:.2f}.",
        "DPO": f"Sigmoid loss at beta = {betas}, each from the same reference and on the same pairs:"
        f" {size.dpo_epochs:g} epoch(s) in batches of {size.dpo_batch_size}, peak learning rate"
        f" {size.dpo_learning_rate:g}.",
        "KL": "For each sample of the policy, the sum over its tokens of the exact KL between the next-token"
        " distributions of policy and reference. Its mean is an unbiased estimate of the KL over whole responses.",
    }
    return Table("How it was done", [], list(steps.items()), is_prose=True)


def _facts(experiment: Experiment, seed: int, seconds: float) -> Table:
    import torch
    import transformers

    import fastdpo

    device = experiment.reference.device
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {threads} thread(s)"
    versions = f"fastdpo {fastdpo.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    facts = {
        "Date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "Device": name,
        "System": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "Packages": versions,
        "Seed": str(seed),
        "Time": f"{seconds:.0f} s from the start of the command to this report",
    }
    return Table("This run", [], list(facts.items()), is_prose=True)
