"""Checks for known failures of preference training. Each takes logged metrics and returns a message or None.

The thresholds are judgements, not theorems. A comment gives the reason for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastdpo.losses import LOSSES, is_listwise

CHOSEN_FALL = 10.0  # nats per response: it has become e^10 = 22,000 times less likely
SATURATED_ACCURACY = 0.99  # only 2 or 3 of 256 pairs are still wrong, and their labels are probably noise
WORTHY_MARGIN = 0.5  # the preferred response then wins with probability 0.62; smaller margins move by chance
COLLAPSED_SHARE = 0.5  # share of the best margin in this run
LOGRATIO_PER_TOKEN = 1.0  # nats: on average, a token's probability changes by a factor of e
LOGRATIO_NATS = 20.0  # nats per response, a factor of e^20: a few tokens may move that much without harm
LENGTH_RATIO = 1.5  # between the mean lengths of both sides: more than an annotator's taste for detail explains
SAMPLED_PROMPTS = 8  # the mean length of fewer samples is too noisy
START_SHARE = 1e-3  # share of a log-prob: more than bf16 rounding in a sum over some hundred tokens
START_NATS = 1e-2
SFT_WEIGHT = 0.2  # of the suggested supervised term: it matters if chosen log-probs fall, and else stays small


@dataclass(frozen=True)
class Progress:
    """The state of a run: means of logged metrics, by key."""

    now: Mapping[str, float]  # over the last pairs
    first: Mapping[str, float]  # over equally many pairs at the beginning
    best_margin: float  # largest mean margin so far; -inf if the reference moves, because margins then shrink again
    has_reference: bool
    args: Any  # the run's DPOConfig

    def logratio(self, side: str) -> float:
        """Log-ratio of policy and reference, nats per response; without a reference, the change since the beginning."""
        if self.has_reference:
            return self.now[f"rewards/{side}"] / self.args.beta
        return self.now[f"logps/{side}"] - self.first[f"logps/{side}"]


def chosen_falls(run: Progress) -> str | None:
    fall, margin = -run.logratio("chosen"), run.now["rewards/margins"]
    if fall <= CHOSEN_FALL or margin <= max(run.first["rewards/margins"], 0.0):
        return None
    than = "under the reference" if run.has_reference else "when training began"
    return (
        f"chosen responses are {fall:.1f} nats less likely on average than {than}, while reward margins have risen to"
        f" {margin:.3f}. Training makes both responses less likely and moves probability to texts that nobody chose."
        f" {_held_by(run.args)}; a larger beta or a lower learning rate also helps"
    )


def _held_by(args: Any) -> str:
    """Advice that keeps chosen responses likely, with settings for this run."""
    names = args.loss_type
    if any(LOSSES[name].likelihood for name in names):
        return "Increase the weight of the chosen responses' likelihood (loss_weights, cpo_alpha)"
    if is_listwise(args):
        return "Consider a loss of pairs: it can be combined with a supervised loss, a listwise loss cannot"
    losses, weights = [*names, "sft"], [*(args.loss_weights or [1.0] * len(names)), SFT_WEIGHT]
    as_written = ", ".join(f'"{name}"' for name in losses)
    return f"Add a supervised loss on the chosen responses: loss_type=[{as_written}], loss_weights={weights}"


def accuracy_saturated(run: Progress) -> str | None:
    accuracy = run.now["rewards/accuracies"]
    if accuracy < SATURATED_ACCURACY:
        return None
    return (
        f"{accuracy:.1%} of the training pairs are ranked as labelled, and the mean gradient weight of a pair has"
        f" fallen from 0.5 to {run.now['rewards/weight']:.3f}. Further steps fit noise: compare with"
        " eval_rewards/accuracies, stop earlier, or raise beta"
    )


def margin_collapse(run: Progress) -> str | None:
    margin = run.now["rewards/margins"]
    if run.best_margin < WORTHY_MARGIN or margin >= COLLAPSED_SHARE * run.best_margin:
        return None
    return (
        f"reward margins have collapsed from {run.best_margin:.3f} to {margin:.3f}. The usual cause is a learning rate"
        " that is too high: lower it, warm up longer, or clip gradients at a smaller norm"
    )


def logratio_blowup(run: Progress) -> str | None:
    if not run.has_reference:
        return None
    lengths = {side: max(run.now[f"lengths/{side}"], 1.0) for side in ("chosen", "rejected")}
    side = max(lengths, key=lambda side: abs(run.logratio(side)) / lengths[side])
    logratio = run.logratio(side)
    if abs(logratio) <= max(LOGRATIO_PER_TOKEN * lengths[side], LOGRATIO_NATS):
        return None
    return (
        f"the policy has moved far from the reference: {side} responses differ by {logratio / lengths[side]:+.2f} nats"
        f" per token, {logratio:+.0f} per response. The policy's own samples may be broken: look at some"
        " (num_eval_samples), raise beta, or lower the learning rate"
    )


def length_drift(run: Progress) -> str | None:
    chosen, rejected = run.now["lengths/chosen"], run.now["lengths/rejected"]
    ratio = chosen / max(rejected, 1.0)
    if 1 / LENGTH_RATIO <= ratio <= LENGTH_RATIO or _takes_length_out(run.args):
        return None
    return (
        f"chosen responses have {chosen:.0f} tokens on average and rejected ones {rejected:.0f}, {ratio:.2f} times as"
        f" many. Summed log-probs teach that length itself is {'good' if ratio > 1 else 'bad'}. To remove the effect of"
        " length, set ld_alpha < 1, or use sigmoid_norm or simpo, which average over tokens"
    )


def _takes_length_out(args: Any) -> bool:
    compares = [LOSSES[name] for name in args.loss_type if LOSSES[name].unit != "token"]
    return all(loss.per_token for loss in compares) or (args.ld_alpha is not None and args.ld_alpha < 1)


CHECKS: dict[str, Callable[[Progress], str | None]] = {
    "chosen_falls": chosen_falls,
    "accuracy_saturated": accuracy_saturated,
    "margin_collapse": margin_collapse,
    "logratio_blowup": logratio_blowup,
    "length_drift": length_drift,
}


def samples_grow(policy_tokens: Sequence[int], reference_tokens: Sequence[int]) -> str | None:
    """Compares the lengths of the policy's and the reference's answers to the same prompts."""
    policy, reference = (sum(lengths) / max(len(lengths), 1) for lengths in (policy_tokens, reference_tokens))
    if len(policy_tokens) < SAMPLED_PROMPTS or policy <= LENGTH_RATIO * reference:
        return None
    return (
        f"the policy's samples have {policy:.0f} tokens on average, the reference's {reference:.0f}"
        f" ({len(policy_tokens)} prompts): the policy may have learned that longer is better. To remove the effect of"
        " length, set ld_alpha < 1, or use sigmoid_norm or simpo; a larger beta keeps it closer to the reference"
    )


def reference_is_not_the_start(means: Mapping[str, float], beta: float, *, has_dropout: bool) -> str | None:
    """Checks the metrics of the first optimizer step, which come from the policy before any update."""
    off = {side: means[f"rewards/{side}"] / beta for side in ("chosen", "rejected")}
    side = max(off, key=lambda side: abs(off[side]))
    if abs(off[side]) <= START_SHARE * abs(means[f"logps/{side}"]) + START_NATS:
        return None
    dropout = ", dropout (it is on)" if has_dropout else ""
    return (
        "the reference differs from the policy at the start of training: before the first update, log-probs of"
        f" {side} responses differ by {off[side]:+.3f} nats on average, so the first loss is not ln 2. Possible causes"
        f" are a ref_model with other weights{dropout}, and reference log-probs from other data or another template."
        " DPO expects the initial policy as reference"
    )
