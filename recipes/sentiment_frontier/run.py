"""True reward against KL to the reference: DPO and its rivals on the controlled-sentiment task (DPO paper, figure 2).

In: a size. Out: a line of results.jsonl for each method, setting and seed; a table, the frontier, and which of the
paper's orderings hold.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fastdpo.alignment.generate import Samples, sample_responses
from fastdpo.alignment.results import Estimate, Ordering, best_frontier
from fastdpo.alignment.sweep import measure_policy
from fastdpo.alignment.task import MAX_NEW_TOKENS, Task
from fastdpo.data.synthetic import true_reward
from fastdpo.report import Figure, Spot, Table, Text, lines
from fastdpo.report.sections import Section
from fastdpo.rewards.implicit import implicit_reward
from recipes import shared
from recipes.frontiers import reward_at
from recipes.sentiment import FIGURES, SEEDS, bench_of, figures_of, measured, preferred_ft, task_of, trained

NAME = "sentiment_frontier"
DPO, SIMPO, PREFERRED_FT, REFERENCE = "DPO", "SimPO", "Preferred-FT", "Reference"
BEST_OF_N, BEST_BY_DPO = "Best of n, true reward", "Best of n, DPO reward"
# method -> what varies, its values, and the other settings of DPOConfig. SimPO has no reference, so its learning rate
# controls the KL, and not its beta.
METHODS: dict[str, tuple[str, tuple[float, ...], dict[str, Any]]] = {
    REFERENCE: ("", (0.0,), {}),
    DPO: ("beta", (0.03, 0.1, 0.3, 1.0, 3.0, 10.0), {}),
    "cDPO": ("beta", (0.1, 0.3, 1.0), {"label_smoothing": 0.1}),
    "IPO": ("beta", (1.0, 3.0, 10.0), {"loss_type": "ipo"}),
    SIMPO: ("learning rate", (6e-5, 1.5e-4, 4e-4), {"loss_type": "simpo", "beta": 2.0}),
    PREFERRED_FT: ("learning rate", (3e-4, 1e-3, 3e-3), {}),
    BEST_OF_N: ("n", (2, 4, 8, 16), {}),
    BEST_BY_DPO: ("n", (2, 4, 8, 16), {}),
}
MOST = 16  # responses that best-of-n draws for a prompt
JUDGE_BETA = 0.3  # of the policy whose implicit reward picks the best of n


def main(argv: Sequence[str] | None = None) -> None:
    options = shared.read_options(NAME, __doc__ or "", argv)
    runs = [
        {"method": method, "value": f"{value:g}", "seed": str(seed)}
        for seed in SEEDS[options.size]
        for method in METHODS
        for value in values_of(method, options.size)
    ]

    def run_one(params: dict[str, str], folder: Path) -> dict[str, Any]:
        task = task_of(options.size, int(params["seed"]), options.output_dir)
        return _figures(params["method"], float(params["value"]), task)

    results = shared.run_all(runs, options, run_one)
    claims = orderings(results)
    sections: list[Section] = [
        _summary(claims),
        table(results),
        _frontier(results),
        _claims(claims),
        _method(results, options.size),
    ]
    shared.finish(
        options,
        "The reward-KL frontier",
        sections,
        subtitle="The controlled-sentiment experiment of the DPO paper, in small.",
    )


def values_of(method: str, size: str) -> tuple[float, ...]:
    """The values at which a method runs. The tiny size shows only that every method does."""
    _, values, _ = METHODS[method]
    return values if size != "tiny" else values[:2] if method in (DPO, BEST_OF_N) else values[:1]


def _figures(method: str, value: float, task: Task) -> dict[str, Any]:
    """The figures of one run. Those of the reference hold the best possible frontier too."""
    bench = bench_of(task)
    varied, _, settings = METHODS[method]
    if method == REFERENCE:
        best = [[round(kl, 4), round(reward, 4)] for kl, reward in best_frontier(task.reference_rewards, num_points=60)]
        return {**figures_of(measure_policy(bench, task.reference, None)), "best": best}
    if method in (BEST_OF_N, BEST_BY_DPO):
        return _best_of(int(value), task, by_true_reward=method == BEST_OF_N)
    if method == PREFERRED_FT:
        return measured(bench, preferred_ft(task, value))
    return measured(bench, trained(task, bench, **{varied.replace(" ", "_"): value, **settings}))


def _best_of(n: int, task: Task, *, by_true_reward: bool) -> dict[str, Any]:
    """Of the first n candidates of every prompt the best by a reward. The KL is the bound log n - (n - 1) / n."""
    samples, rewards, judged = _candidates(task)
    picked = (rewards if by_true_reward else judged)[:, :n].argmax(1)
    rows = np.arange(len(picked))
    lengths = np.array([len(ids) for ids in samples.response_ids]).reshape(rewards.shape)
    return {
        "reward": rewards[rows, picked].mean(),
        "kl": math.log(n) - (n - 1) / n,
        "accuracy": None,
        "tokens": lengths[rows, picked].mean(),
    }


@lru_cache(maxsize=1)
def _candidates(task: Task) -> tuple[Samples, np.ndarray, np.ndarray]:
    """Samples of the reference for held-out prompts; their true and their implicit rewards, (prompts, MOST) each."""
    bench = bench_of(task)
    prompts = task.heldout_prompts[: max(2, len(task.heldout_prompts) // 2)]
    samples = sample_responses(
        task.reference, task.tokenizer, prompts, num_samples=MOST, max_new_tokens=MAX_NEW_TOKENS, batch_size=512,
        seed=10 * task.seed + 3,
    )  # fmt: skip
    judge = implicit_reward(trained(task, bench, beta=JUDGE_BETA), task.reference, task.tokenizer, JUDGE_BETA)
    scores = judge(list(samples.prompts), list(samples.responses))
    judged = [-math.inf if score is None else score for score in scores]  # None: an empty response
    true = [true_reward(response) for response in samples.responses]
    return samples, np.reshape(true, (-1, MOST)), np.reshape(judged, (-1, MOST))


def table(results: Sequence[shared.Line]) -> Table:
    rows = []
    for group in shared.over_seeds(results, FIGURES):
        of = group.figures
        kl = of["kl"].text() if of["kl"].stderr > 0 else f"{of['kl'].mean:.2f}"  # a bound, or the reference's 0
        accuracy = of["accuracy"].text(3) if "accuracy" in of else ""
        rows.append([_name(group.params["method"], group.params["value"]), of["reward"].text(), kl, accuracy])
    num_seeds = len({line["params"]["seed"] for line in results})
    return Table(
        "Results on held-out prompts",
        ("method", "true reward", "KL", "accuracy"),
        rows,
        note=f"Mean ± one standard error over {num_seeds} seeds, each with its own texts, reference and labels. Reward"
        " and KL to the reference are in nats. Accuracy is the share of held-out pairs that the implicit reward ranks"
        " as labelled. The KL of best of n is the bound log n - (n - 1) / n.",
    )


def _name(method: str, value: str) -> str:
    varied, _, _ = METHODS[method]
    return f"{method}, {varied.removeprefix('learning ')} = {value}" if varied else method


def _spots(results: Sequence[shared.Line]) -> dict[str, list[Spot]]:
    """By method, in the order of rising KL; all but best of n start at the reference."""
    found: dict[str, list[Spot]] = {method: [] for method in METHODS}
    for group in shared.over_seeds(results, FIGURES):
        reward, kl = group.figures["reward"], group.figures["kl"]
        found[group.params["method"]].append(Spot(kl.mean, reward.mean, kl.stderr, reward.stderr))
    return {method: sorted(spots, key=lambda spot: spot.x) for method, spots in found.items()}


def _best(results: Sequence[shared.Line]) -> list[tuple[float, float]]:
    """The best possible frontier, averaged over seeds at equal tilts."""
    curves = [line["best"] for line in results if "best" in line]
    length = min(map(len, curves))
    return [(float(kl), float(reward)) for kl, reward in np.mean([curve[:length] for curve in curves], axis=0)]


def _frontier(results: Sequence[shared.Line]) -> Figure:
    spots = _spots(results)
    reach = 1.1 * max(spot.x for of in spots.values() for spot in of)
    best = [point for point in _best(results) if point[0] <= reach]
    return Figure(
        "True reward against KL",
        lines(spots, "KL(policy ‖ reference), nats per response", "true reward (nats)", best=best),
        alt="; ".join(
            f"{method}: " + ", ".join(f"KL {s.x:.2f} reward {s.y:.2f}" for s in of) for method, of in spots.items()
        ),
        note="Bars are one standard error. The dashed line is the reference tilted by exp(reward / beta), estimated"
        " from its samples: no policy can be above it.",
    )


def orderings(results: Sequence[shared.Line]) -> list[Ordering]:
    """The paper's orderings: every method above Preferred-FT at equal KL, and KL falling as beta rises."""
    ran = {(line["params"]["method"], float(line["params"]["value"])) for line in results}
    values = {method: [value for value in of if (method, value) in ran] for method, (_, of, _) in METHODS.items()}
    by_beta = [method for method, (varied, _, _) in METHODS.items() if varied == "beta"]
    claims = []
    for method, value in itertools.product([*by_beta, SIMPO], values[PREFERRED_FT]):
        differences = above_preferred_ft(results, method, f"{value:g}")
        if len(differences) > 1:
            claim = f"{method} above {_name(PREFERRED_FT, f'{value:g}')} in reward at equal KL"
            claims.append(Ordering(claim, Estimate.of(differences)))
    for method in by_beta:
        for smaller, larger in itertools.pairwise(values[method]):
            kls = [_of(results, method, f"{value:g}", "kl") for value in (smaller, larger)]
            claim = f"{method}: KL at beta = {smaller:g} above that at {larger:g}"
            claims.append(Ordering(claim, Estimate.of([kls[0][seed] - kls[1][seed] for seed in kls[0]])))
    return claims


def _of(results: Sequence[shared.Line], method: str, value: str, figure: str) -> dict[str, float]:
    """A figure by seed."""
    return {
        line["params"]["seed"]: line[figure]
        for line in results
        if (line["params"]["method"], line["params"]["value"]) == (method, value)
    }


def above_preferred_ft(results: Sequence[shared.Line], method: str, value: str) -> list[float]:
    """By how much a method's frontier lies above Preferred-FT's reward at the same KL, for each seed in which the
    method reaches it.
    """
    found = []
    kls = {seed: max(kl, 0.0) for seed, kl in _of(results, PREFERRED_FT, value, "kl").items()}  # 0 up to rounding
    reward = _of(results, PREFERRED_FT, value, "reward")
    for seed, kl in kls.items():
        frontier = sorted(
            (max(line["kl"], 0.0), line["reward"])
            for line in results
            if line["params"]["seed"] == seed and line["params"]["method"] in (method, REFERENCE)
        )
        if kl <= frontier[-1][0]:
            found.append(reward_at(frontier, kl) - reward[seed])
    return found


def _summary(claims: Sequence[Ordering]) -> Text:
    held = sum(claim.holds for claim in claims)
    return Text(
        "In short",
        [
            "A small model learns to write reviews, then is tuned on labelled pairs of its own samples in different"
            " ways. The true reward of any text is known here. A good method gets much of it without moving far from"
            " the reference.",
            f"{held} of {len(claims)} orderings of the DPO paper hold by more than two standard errors.",
        ],
    )


def _claims(claims: Sequence[Ordering]) -> Table:
    return Table(
        "Do the paper's orderings hold?",
        ("claim", "difference", "holds"),
        [[claim.claim, claim.difference.text(), "yes" if claim.holds else "no"] for claim in claims],
        note="Differences are taken within each seed. A claim holds if its mean is more than two standard errors above"
        " 0. Preferred-FT is compared where the method reaches its KL; the method's reward is interpolated in the root"
        " of the KL.",
    )


def _method(results: Sequence[shared.Line], size: str) -> Text:
    seconds = sum(line["cpu_seconds"] for line in results)
    return Text(
        "How it was done",
        [
            f"Size {size}: {len(results)} runs, {seconds:.0f} s of CPU time. Each seed has its own texts, tokenizer,"
            " reference, pairs and labels; all methods of a seed share them. Labels are drawn from the Bradley-Terry"
            " model of the true reward.",
            "KL: the sum over a sample's tokens of the exact KL between the next-token distributions, on samples of the"
            " policy at temperature 1. Its mean is an unbiased estimate of the KL of whole responses.",
            "Best of n draws n responses from the reference and keeps the one with the highest true reward, or the"
            f" highest implicit reward of the DPO policy at beta = {JUDGE_BETA:g}.",
        ],
    )


if __name__ == "__main__":
    shared.start(main)
