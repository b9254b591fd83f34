"""Bradley-Terry strengths by maximum likelihood, with intervals that stay valid if comparisons share a prompt.

In: `Comparisons`. Out: `Strengths`, in nats: the first model beats the second one with the probability
sigmoid(strength_1 - strength_2), or with a length covariate sigmoid(strength_1 - strength_2 + slope * x), where
x = (length_1 - length_2) / (length_1 + length_2). A tie is half a win of each.
Refused with ValueError: fewer than two models; comparisons that do not connect all models; two groups of models such
that one won every comparison with the other (the maximum is at infinity); lengths that depend on the model only.

Source: R. A. Bradley and M. E. Terry, Biometrika 39 (1952); existence of the maximum: L. R. Ford, American Mathematical
Monthly 64 (1957); sandwich covariance with clusters: K.-Y. Liang and S. L. Zeger, Biometrika 73 (1986).
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from fastdpo.ranking.comparisons import Comparisons

_MAX_STEPS = 100  # Newton's method needs about five
_STEP_TOLERANCE = 1e-10  # nats; the error after such a step is about its square
_MAX_LOG_ODDS = 40.0  # from length alone; beyond, the likelihood has no finite maximum
_LEAST_SHARE = 1e-8  # least share of the lengths' variation that the models must not explain
_NUMBERS_AT_A_TIME = 1 << 22  # entries of the matrix (clusters, parameters) that are built at once
FEW_CLUSTERS = 30  # with fewer clusters, sandwich intervals are too narrow


@dataclass(frozen=True)
class Strengths:
    """The fitted model. Strengths are in nats, with mean 0."""

    models: tuple[str, ...]
    values: NDArray[np.float64]  # (K,)
    covariance: NDArray[np.float64]  # (K, K)
    num_comparisons: int
    num_clusters: int
    length_slope: float | None = None  # log-odds from x = 0 to x = 1
    length_stderr: float | None = None

    def stderrs(self) -> NDArray[np.float64]:
        """(K,) standard errors of the strengths relative to their mean."""
        return np.sqrt(np.diag(self.covariance).clip(0))

    def intervals(self, confidence: float = 0.95) -> NDArray[np.float64]:
        """(K, 2) lower and upper ends."""
        reach = normal_quantile(confidence) * self.stderrs()
        return np.stack([self.values - reach, self.values + reach], axis=1)

    def relative_to(self, model: str) -> Strengths:
        """The strengths relative to one model, whose strength is 0. Intervals are then of the difference from it.

        Raises:
            ValueError: there is no such model.
        """
        if model not in self.models:
            raise ValueError(f"anchor must be one of {list(self.models)}, got {model!r}")
        index, num_models = self.models.index(model), len(self.models)
        contrast = np.eye(num_models)
        contrast[:, index] -= 1
        return Strengths(
            self.models,
            contrast @ self.values,
            contrast @ self.covariance @ contrast.T,
            self.num_comparisons,
            self.num_clusters,
            self.length_slope,
            self.length_stderr,
        )

    def ranks(self, confidence: float = 0.95) -> list[tuple[int, int]]:
        """The best and the worst possible rank of each model.

        A model ranks before another one only if the interval of their difference does not contain 0.
        """
        variances = np.diag(self.covariance)
        of_differences = (variances[:, None] + variances[None, :] - 2 * self.covariance).clip(0)
        is_better = self.values[:, None] - self.values[None, :] > normal_quantile(confidence) * np.sqrt(of_differences)
        np.fill_diagonal(is_better, False)
        num_models = len(self.models)
        best, worst = 1 + is_better.sum(0), num_models - is_better.sum(1)
        return list(zip(best.tolist(), worst.tolist(), strict=True))


def normal_quantile(confidence: float) -> float:
    """Half the width of an interval in standard errors: 1.96 for a confidence of 0.95.

    Raises:
        ValueError: confidence is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def fit_bradley_terry(comparisons: Comparisons, *, length: bool = False) -> Strengths:
    """The strengths that make the outcomes most probable, and their sandwich covariance.

    Args:
        length: also fit the effect of length, so that strengths apply to responses of equal length.
    Raises:
        ValueError: see the module's docstring.
    """
    check_comparable(comparisons)
    covariate = _length_covariate(comparisons) if length else None
    first, second, outcomes = comparisons.first, comparisons.second, comparisons.outcomes
    num_models = len(comparisons.models)
    values, slope = np.zeros(num_models), 0.0
    log_odds = np.zeros(len(outcomes))
    likelihood = _log_likelihood(outcomes, log_odds)
    for _ in range(_MAX_STEPS):
        probabilities = _sigmoid(log_odds)
        gradient = _to_parameters(comparisons, outcomes - probabilities, covariate)
        hessian = _information(comparisons, probabilities * (1 - probabilities), covariate)
        try:
            step = np.linalg.solve(hessian, gradient)
        except np.linalg.LinAlgError:
            break
        # a Newton step may go too far: halve it until the likelihood, which is concave, does not fall
        for _ in range(60):
            tried, tried_slope = values + step[:num_models], slope + (step[num_models] if length else 0.0)
            log_odds = tried[first] - tried[second]
            if covariate is not None:
                log_odds += tried_slope * covariate
            reached = _log_likelihood(outcomes, log_odds)
            if reached >= likelihood - 1e-12 * (1 + abs(likelihood)):
                break
            step /= 2
        values, slope, likelihood = tried - tried.mean(), tried_slope, reached
        if covariate is not None and np.abs(slope * covariate).max() > _MAX_LOG_ODDS:
            break
        if np.abs(step).max() <= _STEP_TOLERANCE * (1 + np.abs(values).max()):
            return _strengths(comparisons, values, slope, log_odds, covariate)
    raise ValueError(
        "length must not be fitted on these comparisons: together with the models it decides every comparison, so its"
        " slope is infinite. Rank without --length, or add comparisons"
    )


def check_comparable(comparisons: Comparisons) -> None:
    """Raises ValueError if the maximum of the likelihood does not exist or is not unique (Ford's condition)."""
    models, num_models = comparisons.models, len(comparisons.models)
    if len(comparisons.outcomes) == 0:
        raise ValueError("comparisons must hold at least one comparison, got none")
    if num_models < 2:
        raise ValueError(f"comparisons must have at least two models, got {list(models)}")
    took = np.zeros((num_models, num_models), bool)  # [i, j]: i won or tied against j
    took[comparisons.first[comparisons.outcomes > 0], comparisons.second[comparisons.outcomes > 0]] = True
    took[comparisons.second[comparisons.outcomes < 1], comparisons.first[comparisons.outcomes < 1]] = True
    left, parts = np.ones(num_models, bool), []
    while left.any():
        part = _reached(took | took.T, int(left.argmax()))
        parts.append([models[index] for index in np.flatnonzero(part)])
        left &= ~part
    if len(parts) > 1:
        groups = "; ".join(_shown(part) for part in parts)
        raise ValueError(
            f"comparisons must connect all models, got {len(parts)} groups without a comparison between them: {groups}."
            " Add comparisons between the groups, or rank each group by itself"
        )
    for graph, are_losers in ((took, True), (took.T, False)):
        part = _reached(graph, 0)
        if part.all():
            continue
        inside = [models[index] for index in np.flatnonzero(part)]
        outside = [models[index] for index in np.flatnonzero(~part)]
        winners, losers = (outside, inside) if are_losers else (inside, outside)
        raise ValueError(
            f"comparisons must not all have the same winner between two groups of models, got {_shown(winners)} winning"
            f" every comparison with {_shown(losers)}: the difference in strength is infinite. Add comparisons or leave"
            " out the models of one group"
        )


def _reached(graph: NDArray[np.bool_], start: int) -> NDArray[np.bool_]:
    """(K,) which models can be reached from `start` along the edges of the graph (K, K)."""
    reached = np.zeros(len(graph), bool)
    reached[start] = True
    new = reached
    while new.any():
        new = graph[new].any(0) & ~reached
        reached |= new
    return reached


def _length_covariate(comparisons: Comparisons) -> NDArray[np.float64]:
    """(N,) in [-1, 1]: the difference of both lengths divided by their sum, as in Arena's style control."""
    if comparisons.lengths is None:
        raise ValueError("length must not be fitted on these comparisons: they have no lengths of responses")
    lengths = comparisons.lengths
    total = lengths.sum(1)
    covariate = np.divide(lengths[:, 0] - lengths[:, 1], total, out=np.zeros(len(total)), where=total > 0)
    information = _information(comparisons, np.ones(len(total)), covariate)
    if information[-1, -1] == 0 or _own_share(information) < _LEAST_SHARE:
        raise ValueError(
            "length must not be fitted on these comparisons: lengths depend on the model only (or are all equal), so"
            " their effect cannot be separated from the models' strengths. Rank without --length"
        )
    return covariate


def _own_share(information: NDArray[np.float64]) -> float:
    """The share of the covariate's variation that the models do not explain."""
    of_models, crossed, own = information[:-1, :-1], information[:-1, -1], information[-1, -1]
    return float(1 - crossed @ np.linalg.solve(of_models, crossed) / own)


def _to_parameters(
    comparisons: Comparisons, weights: NDArray[np.float64], covariate: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """(P,) the transposed design matrix times `weights` (N,). Row n has 1 for its first model and -1 for its second."""
    num_models = len(comparisons.models)
    won = np.bincount(comparisons.first, weights, num_models)
    sums = np.asarray(won - np.bincount(comparisons.second, weights, num_models), np.float64)
    return sums if covariate is None else np.append(sums, weights @ covariate)


def _products(
    comparisons: Comparisons, weights: NDArray[np.float64], covariate: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """(P, P) the transposed design matrix times the design matrix, with rows weighted by `weights` (N,)."""
    num_models = len(comparisons.models)
    cells = comparisons.first * num_models + comparisons.second
    between = np.bincount(cells, weights, num_models**2).reshape(num_models, num_models)
    between = between + between.T
    of_models: NDArray[np.float64] = np.diag(between.sum(1)) - between
    if covariate is None:
        return of_models
    crossed = _to_parameters(comparisons, weights * covariate, None)
    own = weights @ covariate**2
    return np.block([[of_models, crossed[:, None]], [crossed[None, :], np.array([[own]])]])


def _information(
    comparisons: Comparisons, weights: NDArray[np.float64], covariate: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """`_products` plus a constant for the strengths. The likelihood does not change if all strengths shift equally; the
    constant makes the matrix invertible, and steps and covariances those of strengths with mean 0."""
    num_models = len(comparisons.models)
    information = _products(comparisons, weights, covariate)
    information[:num_models, :num_models] += np.trace(information[:num_models, :num_models]) / num_models**2
    return information


def _strengths(
    comparisons: Comparisons,
    values: NDArray[np.float64],
    slope: float,
    log_odds: NDArray[np.float64],
    covariate: NDArray[np.float64] | None,
) -> Strengths:
    """Computes the covariance inverse(H) M inverse(H). H is the information, M the sum over clusters of the outer
    products of their scores. The factor G / (G - 1) corrects M's bias for a small number G of clusters."""
    probabilities = _sigmoid(log_odds)
    inverse = np.linalg.inv(_information(comparisons, probabilities * (1 - probabilities), covariate))
    num_clusters, middle = _middle(comparisons, comparisons.outcomes - probabilities, covariate)
    covariance = inverse @ middle @ inverse * (num_clusters / max(num_clusters - 1, 1))
    num_models = len(comparisons.models)
    return Strengths(
        comparisons.models,
        values,
        covariance[:num_models, :num_models],
        len(log_odds),
        num_clusters,
        None if covariate is None else float(slope),
        None if covariate is None else float(np.sqrt(max(covariance[-1, -1], 0.0))),
    )


def _middle(
    comparisons: Comparisons, residuals: NDArray[np.float64], covariate: NDArray[np.float64] | None
) -> tuple[int, NDArray[np.float64]]:
    """The number of clusters, and (P, P) the sum of the outer products of their scores."""
    if comparisons.clusters is None:
        return len(residuals), _products(comparisons, residuals**2, covariate)
    num_models = len(comparisons.models)
    width = num_models + (covariate is not None)
    _, clusters = np.unique(comparisons.clusters, return_inverse=True)
    order = np.argsort(clusters, kind="stable")
    clusters, residuals = clusters[order], residuals[order]
    first, second = comparisons.first[order], comparisons.second[order]
    num_clusters = int(clusters[-1]) + 1
    middle = np.zeros((width, width))
    at_a_time = min(num_clusters, max(_NUMBERS_AT_A_TIME // width, 1))
    for start in range(0, num_clusters, at_a_time):
        rows = slice(*np.searchsorted(clusters, [start, start + at_a_time]).tolist())
        own, size = (clusters[rows] - start) * width, at_a_time * width
        scores = np.bincount(own + first[rows], residuals[rows], size)
        scores -= np.bincount(own + second[rows], residuals[rows], size)
        if covariate is not None:
            scores += np.bincount(own + num_models, residuals[rows] * covariate[order][rows], size)
        scores = scores.reshape(at_a_time, width)
        middle += scores.T @ scores
    return num_clusters, middle


def _log_likelihood(outcomes: NDArray[np.float64], log_odds: NDArray[np.float64]) -> float:
    return float(outcomes @ log_odds - np.logaddexp(0, log_odds).sum())


def _sigmoid(log_odds: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.logaddexp(0, -log_odds))


def _shown(models: list[str]) -> str:
    shown = ", ".join(models[:8])
    return shown if len(models) <= 8 else f"{shown} and {len(models) - 8} more"
