"""Known ways in which preference training goes wrong, as functions of what it logs: a message with the number, or None.

The thresholds are judgements, not theorems; the reason of each stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastdpo.losses import LOSSES, is_listwise

CHOSEN_FALL = 10.0  # nats of a whole response: e^10, so 22,000 times less likely than it was
SATURATED_ACCURACY = 0.99  # 2 or 3 of 256 pairs are still wrong: what is left to learn is noise of the labels
WORTHY_MARGIN = 0.5  # a pair is then preferred with probability 0.62; below it, margins move by chance
COLLAPSED_SHARE = 0.5  # of the best margin that training has had
LOGRATIO_PER_TOKEN = 1.0  # nats: the average token is e times as likely as under the reference, or as unlikely
LOGRATIO_NATS = 20.0  # and whole responses by e^20: a few tokens may move that much without harm
LENGTH_RATIO = 1.5  # of one side's mean length to the other's: beyond what an annotator's taste for detail explains
SAMPLED_PROMPTS = 8  # of fewer, the mean length is one of chance
START_SHARE = 1e-3  # of a log-prob: above what bf16 rounds off a sum over some hundred tokens
START_NATS = 1e-2
SFT_WEIGHT = 0.2  # of the supervised term that is suggested: felt where chosen log-probs fall, else below the main loss


@dataclass(frozen=True)
class Progress:
    """Where a run is: means of logged metrics, by key."""

    now: Mapping[str, float]  # over the last pairs
    first: Mapping[str, float]  # over the first as many pairs
    best_margin: float  # of all such means so far; -inf where the reference moves, which makes margins small again
    has_reference: bool
    args: Any  # the run's DPOConfig: what its loss is

    def logratio(self, side: str) -> float:
        """Policy against reference, nats per response; against the run's beginning where there is no reference."""
        if self.has_reference:
            return self.now[f"rewards/{side}"] / self.args.beta
        return self.now[f"logps/{side}"] - self.first[f"logps/{side}"]


def chosen_falls(run: Progress) -> str | None:
    fall, margin = -run.logratio("chosen"), run.now["rewards/margins"]
    if fall <= CHOSEN_FALL or margin <= max(run.first["rewards/margins"], 0.0):
        return None
    than = "under the reference" if run.has_reference else "when training began"
    return (
        f"chosen responses have become less likely, by {fall:.1f} nats on average than {than}, while reward margins"
        f" have risen to {margin:.3f}. Training pushes both responses down and moves probability to texts that nobody"
        f" chose. {_held_by(run.args)}; a larger beta or a lower learning rate help too"
    )


def _held_by(args: Any) -> str:
    """What keeps chosen responses likely, as settings of this run."""
    names = args.loss_type
    if any(LOSSES[name].likelihood for name in names):
        return "Give the term of the chosen responses' likelihood more weight (loss_weights, cpo_alpha)"
    if is_listwise(args):
        return "A loss of pairs can be held by a term of supervised loss; this one stands alone"
    losses, weights = [*names, "sft"], [*(args.loss_weights or [1.0] * len(names)), SFT_WEIGHT]
    as_written = ", ".join(f'"{name}"' for name in losses)
    return f"A term of supervised loss on the chosen ones holds them: loss_type=[{as_written}], loss_weights={weights}"


def accuracy_saturated(run: Progress) -> str | None:
    accuracy = run.now["rewards/accuracies"]
    if accuracy < SATURATED_ACCURACY:
        return None
    return (
        f"{accuracy:.1%} of the training pairs are ranked as labelled, and the mean gradient weight of a pair is"
        f" {run.now['rewards/weight']:.3f}, after 0.5 at the start. Further steps fit noise: compare with"
        " eval_rewards/accuracies, stop earlier, or raise beta"
    )


def margin_collapse(run: Progress) -> str | None:
    margin = run.now["rewards/margins"]
    if run.best_margin < WORTHY_MARGIN or margin >= COLLAPSED_SHARE * run.best_margin:
        return None
    return (
        f"reward margins have collapsed to {margin:.3f}, after {run.best_margin:.3f} at their best. The usual cause is"
        " a learning rate that is too high: lower it, warm up longer, or clip gradients at a smaller norm"
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
        f"the policy has left the reference: {side} responses differ by {logratio / lengths[side]:+.2f} nats a token,"
        f" {logratio:+.0f} a response. Its own samples are likely to be broken: look at some (num_eval_samples), raise"
        " beta, or lower the learning rate"
    )


def length_drift(run: Progress) -> str | None:
    chosen, rejected = run.now["lengths/chosen"], run.now["lengths/rejected"]
    ratio = chosen / max(rejected, 1.0)
    if 1 / LENGTH_RATIO <= ratio <= LENGTH_RATIO or _takes_length_out(run.args):
        return None
    return (
        f"chosen responses have {chosen:.0f} tokens on average and rejected ones {rejected:.0f}, {ratio:.2f} times as"
        f" many: summed log-probs teach that length itself is {'good' if ratio > 1 else 'bad'}. ld_alpha < 1, or the"
        " losses sigmoid_norm and simpo, which average over tokens, take length out"
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
    """From the lengths of what policy and reference answer to the same prompts."""
    policy, reference = (sum(lengths) / max(len(lengths), 1) for lengths in (policy_tokens, reference_tokens))
    if len(policy_tokens) < SAMPLED_PROMPTS or policy <= LENGTH_RATIO * reference:
        return None
    return (
        f"the policy's samples have grown to {policy:.0f} tokens on average, where the reference's have {reference:.0f}"
        f" ({len(policy_tokens)} prompts): it may have learned that longer is better. ld_alpha < 1, or the losses"
        " sigmoid_norm and simpo, take length out; a larger beta holds it closer to the reference"
    )


def reference_is_not_the_start(means: Mapping[str, float], beta: float, *, has_dropout: bool) -> str | None:
    """From the metrics of the first optimizer step, which are those of the untouched policy."""
    off = {side: means[f"rewards/{side}"] / beta for side in ("chosen", "rejected")}
    side = max(off, key=lambda side: abs(off[side]))
    if abs(off[side]) <= START_SHARE * abs(means[f"logps/{side}"]) + START_NATS:
        return None
    dropout = ", or dropout, which is on," if has_dropout else ""
    return (
        f"the reference is not what training starts from: before the first update log-probs of {side} responses differ"
        f" by {off[side]:+.3f} nats on average, so the first loss is not ln 2. A ref_model of other weights{dropout}"
        " does that, as do reference log-probs of other data or another template; DPO expects a reference that is the"
        " trained model as it starts"
    )
