"""Methods compared at equal KL: what a recipe measured at several betas in, rewards at common KLs out.

A method's frontier is the curve through the reference (KL 0) and its policies in the order of their KL. Between two
points it is interpolated linearly in the square root of KL: the best possible reward rises like that at first (Gao et
al., arXiv 2210.10760).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from fastdpo.alignment.results import Estimate
from fastdpo.report import Figure, Spot, Table
from fastdpo.report import lines as plot_of_lines
from recipes.shared import Line, over_seeds

REFERENCE = "reference"  # the method of the lines that measure the reference
KLS = (0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 3.0, 5.0)  # nats per response
Frontier = Sequence[tuple[float, float]]  # (KL, reward), the reference first


def frontiers_of(lines: Sequence[Line]) -> dict[str, dict[str, Frontier]]:
    """The frontier of every method and seed: method -> seed -> points."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    starts = {line["params"]["seed"]: line["reward"] for line in lines if line["params"]["method"] == REFERENCE}
    for line in lines:
        method, seed = line["params"]["method"], line["params"]["seed"]
        if method != REFERENCE:
            points = found.setdefault(method, {}).setdefault(seed, [(0.0, starts[seed])])
            points.append((max(line["kl"], 0.0), line["reward"]))  # an estimate near 0 may be negative by rounding
    return {method: {seed: sorted(points) for seed, points in seeds.items()} for method, seeds in found.items()}


def reward_at(frontier: Frontier, kl: float) -> float:
    """The reward of a frontier at a KL up to its last point's.

    Raises:
        ValueError: the frontier ends before.
    """
    roots, rewards = [math.sqrt(point[0]) for point in frontier], [point[1] for point in frontier]
    if not 0 <= kl <= frontier[-1][0]:
        raise ValueError(f"kl must lie in [0, {frontier[-1][0]:.3g}], the reach of the frontier, got {kl}")
    return float(np.interp(math.sqrt(kl), roots, rewards))


def common_kls(frontiers: Mapping[str, Mapping[str, Frontier]]) -> list[float]:
    """The KLs of KLS that all frontiers reach."""
    reach = min(frontier[-1][0] for seeds in frontiers.values() for frontier in seeds.values())
    return [kl for kl in KLS if kl <= reach]


def at_equal_kl(lines: Sequence[Line], names: Mapping[str, str]) -> Table:
    """The reward of every method at common KLs.

    Args:
        names: how the table calls each method.
    """
    frontiers = frontiers_of(lines)
    rows = []
    for kl in common_kls(frontiers):
        rewards = [Estimate.of([reward_at(of, kl) for of in frontiers[method].values()]) for method in names]
        rows.append([f"{kl:g}", *(reward.text() for reward in rewards)])
    return Table(
        "True reward at equal KL",
        ("KL", *names.values()),
        rows,
        note=f"Mean and standard error over {len({line['params']['seed'] for line in lines})} seeds, in nats. Frontiers"
        " are interpolated between betas, linearly in the square root of KL.",
    )


def differences(lines: Sequence[Line], names: Mapping[str, str], base: str) -> Table:
    """How far the reward of every other method lies above the base method's at common KLs.

    Args:
        base: the method that the others are compared with.
    """
    frontiers = frontiers_of(lines)
    others = [method for method in names if method != base]
    rows = []
    for kl in common_kls(frontiers):
        cells = []
        for method in others:
            seeds = frontiers[base]
            found = [reward_at(frontiers[method][seed], kl) - reward_at(seeds[seed], kl) for seed in seeds]
            difference = Estimate.of(found)
            cells.append(f"{round(difference.mean, 2) + 0.0:+.2f} ± {difference.stderr:.2f}")  # no -0.00
        rows.append([f"{kl:g}", *cells])
    return Table(
        f"Difference from {names[base]} at equal KL",
        ("KL", *(names[method] for method in others)),
        rows,
        note="Differences of true rewards are taken within a seed, so that what its reference is like does not matter.",
    )


def policies_table(lines: Sequence[Line], names: Mapping[str, str]) -> Table:
    """Every method at every beta: means over seeds."""
    rows = []
    for group in over_seeds(lines, ("reward", "kl", "accuracy")):
        figures, method = group.figures, group.params["method"]
        shown = [figures["reward"].text(), figures["kl"].text(), figures["accuracy"].text(3)]
        is_reference = method == REFERENCE
        name = "the reference" if is_reference else f"{names[method]}, beta {group.params['beta']}"
        rows.append([name, *([shown[0], "0", ""] if is_reference else shown)])
    return Table(
        "Every policy",
        ("training", "true reward", "KL to the reference", "accuracy"),
        rows,
        note="Mean and standard error over seeds. Reward and KL in nats, on samples for held-out prompts. Accuracy on"
        " held-out pairs of the reference's own answers.",
    )


def frontier_plot(lines: Sequence[Line], names: Mapping[str, str]) -> Figure:
    """A curve for each method: a point for each beta, with standard errors over seeds."""
    series: dict[str, list[Spot]] = {REFERENCE: [], **{name: [] for name in names.values()}}
    for group in over_seeds(lines, ("reward", "kl")):
        kl, reward = group.figures["kl"], group.figures["reward"]
        name = names.get(group.params["method"], REFERENCE)
        series[name].append(Spot(kl.mean, reward.mean, kl.stderr, reward.stderr))
    series = {name: sorted(spots, key=lambda spot: spot.x) for name, spots in series.items()}
    alt = "; ".join(f"{name}: KL {s.x:.2f}, reward {s.y:.2f}" for name, spots in series.items() for s in spots)
    figure = plot_of_lines(series, "KL(policy ‖ reference), nats per response", "true reward (nats)")
    return Figure("True reward against KL", figure, alt=alt, note="Bars are one standard error over seeds.")
