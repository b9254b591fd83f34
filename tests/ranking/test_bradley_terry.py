"""Strengths agree with other implementations, intervals hold as often as they say, what has no maximum is named."""

import math

import numpy as np
import pytest
from peers import peer

from fastdpo.ranking.bradley_terry import fit_bradley_terry, normal_quantile
from fastdpo.ranking.comparisons import Comparisons

TRUE = np.array([0.9, 0.4, 0.0, -0.3, -1.0])  # mean 0
NAMES = tuple("ABCDE")


def comparisons(text, **columns):
    """A>B: A won; A=B: a tie. Models are numbered as they come."""
    names, rows = {}, []
    for word in text.split():
        first, second = (names.setdefault(name, len(names)) for name in (word[0], word[2]))
        rows.append((first, second, {">": 1.0, "=": 0.5, "<": 0.0}[word[1]]))
    first, second, outcomes = (np.array(column) for column in zip(*rows, strict=True))
    return Comparisons(tuple(names), first, second, outcomes, **columns)


def drawn(rng, num_rows, *, cluster_size=1, shared=0.0, slope=0.0, ties=0.0):
    """Comparisons by the model itself. In a cluster the outcomes of one pair of models share, with the probability
    `shared`, the number that decides them: each is still drawn with its own probability."""
    num_clusters = num_rows // cluster_size
    first = rng.integers(len(TRUE), size=num_clusters)
    second = (first + rng.integers(1, len(TRUE), size=num_clusters)) % len(TRUE)
    first, second = np.repeat(first, cluster_size), np.repeat(second, cluster_size)
    clusters = np.repeat(np.arange(num_clusters), cluster_size)
    lengths = rng.integers(20, 400, size=(len(first), 2)).astype(float)
    covariate = (lengths[:, 0] - lengths[:, 1]) / lengths.sum(1)
    odds = TRUE[first] - TRUE[second] + slope * covariate
    of_cluster = np.repeat(rng.random(num_clusters), cluster_size)
    decides = np.where(rng.random(len(first)) < shared, of_cluster, rng.random(len(first)))
    outcomes = (decides < 1 / (1 + np.exp(-odds))).astype(float)
    # a tie takes the place of two outcomes of which one was won: the expected outcome stays what it was
    is_tie = rng.random(len(first)) < ties
    other = (rng.random(len(first)) < 1 / (1 + np.exp(-odds))).astype(float)
    outcomes = np.where(is_tie, (outcomes + other) / 2, outcomes)
    return Comparisons(NAMES, first, second, outcomes, clusters if cluster_size > 1 else None, lengths)


def test_two_models_are_as_far_apart_as_the_log_odds_of_their_wins():
    strengths = fit_bradley_terry(comparisons("A>B A>B A>B B>A"))
    assert strengths.values == pytest.approx([math.log(3) / 2, -math.log(3) / 2], abs=1e-12)
    # of a mean with p = 3/4: the log-odds have the variance 1 / (n p (1 - p)) = 4/3, each strength half of them; 4 / 3
    # more for the estimate of the variance from four comparisons
    assert strengths.stderrs() == pytest.approx([math.sqrt(4 / 3 / 4 * 4 / 3)] * 2, abs=1e-12)


def test_a_tie_is_half_a_win_of_each():
    with_ties = fit_bradley_terry(comparisons("A=B A=B A>B A>B"))
    without = fit_bradley_terry(comparisons("A>B B>A A>B A>B"))
    assert with_ties.values == pytest.approx(without.values, abs=1e-12)
    assert (with_ties.stderrs() < without.stderrs()).all()  # half points vary less than whole ones


def test_ties_only_make_all_models_equal():
    strengths = fit_bradley_terry(comparisons("A=B B=C C=A A=B"))
    assert strengths.values == pytest.approx([0, 0, 0], abs=1e-12)
    assert strengths.ranks() == [(1, 3)] * 3


def test_which_model_stands_first_does_not_matter():
    one, other = (fit_bradley_terry(comparisons(text)) for text in ("A>B B>C C>A A>C B=A", "A>B B>C C>A C<A A=B"))
    assert other.values == pytest.approx(one.values, abs=1e-12)
    assert other.covariance == pytest.approx(one.covariance, abs=1e-12)


def test_the_strengths_of_choix():
    choix = peer("choix")
    given = drawn(np.random.default_rng(0), 3000, ties=0.2)
    twice = []  # choix has no ties: every win counts twice, every tie once each way
    for first, second, outcome in zip(given.first, given.second, given.outcomes, strict=True):
        twice += [(first, second)] * int(2 * outcome) + [(second, first)] * int(2 - 2 * outcome)
    theirs = choix.ilsr_pairwise(len(NAMES), twice, tol=1e-12)
    assert fit_bradley_terry(given).values == pytest.approx(theirs - theirs.mean(), abs=1e-6)


def test_the_strengths_of_evalica():
    evalica = peer("evalica")
    given = drawn(np.random.default_rng(1), 3000, ties=0.2)
    words = {1.0: evalica.Winner.X, 0.0: evalica.Winner.Y, 0.5: evalica.Winner.Draw}
    first, second = ([NAMES[index] for index in side] for side in (given.first, given.second))
    done = evalica.bradley_terry(first, second, [words[o] for o in given.outcomes], tolerance=1e-13, limit=10_000)
    theirs = np.log(done.scores.loc[list(NAMES)].to_numpy())
    assert fit_bradley_terry(given).values == pytest.approx(theirs - theirs.mean(), abs=1e-6)


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("independent", {"num_rows": 400}),
        ("with ties", {"num_rows": 400, "ties": 0.5}),
        ("clustered", {"num_rows": 1200, "cluster_size": 4, "shared": 0.7}),
        ("clustered, with ties", {"num_rows": 1200, "cluster_size": 4, "shared": 0.7, "ties": 0.3}),
    ],
)
def test_95_percent_intervals_hold_the_truth_in_93_to_97_percent_of_500_simulations(case, settings):
    rng = np.random.default_rng(0)
    held = []
    for _ in range(500):
        intervals = fit_bradley_terry(drawn(rng, **settings)).intervals()
        held.append((intervals[:, 0] <= TRUE) & (intervals[:, 1] >= TRUE))
    for share in [np.mean(held), *np.mean(held, axis=0)]:
        assert 0.93 <= share <= 0.97, (case, np.mean(held, axis=0))


def test_intervals_that_do_not_know_of_clusters_are_too_narrow():
    rng, held = np.random.default_rng(0), []
    for _ in range(200):
        given = drawn(rng, 1200, cluster_size=4, shared=0.7)
        intervals = fit_bradley_terry(Comparisons(NAMES, given.first, given.second, given.outcomes)).intervals()
        held.append((intervals[:, 0] <= TRUE) & (intervals[:, 1] >= TRUE))
    assert np.mean(held) < 0.88


def test_clusters_of_one_comparison_are_no_clusters():
    given = drawn(np.random.default_rng(2), 300)
    alone = Comparisons(NAMES, given.first, given.second, given.outcomes, np.arange(300)[::-1].copy())
    one, other = fit_bradley_terry(given), fit_bradley_terry(alone)
    assert other.covariance == pytest.approx(one.covariance, rel=1e-9)
    assert one.num_clusters == other.num_clusters == 300


def test_a_comparison_given_twice_says_no_more_than_once_where_both_are_of_one_prompt():
    given = drawn(np.random.default_rng(3), 300)
    twice = [np.repeat(column, 2) for column in (given.first, given.second, given.outcomes, np.arange(300))]
    one, other = fit_bradley_terry(given), fit_bradley_terry(Comparisons(NAMES, *twice))
    assert other.values == pytest.approx(one.values, abs=1e-9)
    assert other.covariance == pytest.approx(one.covariance, rel=1e-9)


def test_clusters_that_do_not_fit_into_one_matrix_are_summed_in_parts(monkeypatch):
    given = drawn(np.random.default_rng(4), 400, cluster_size=4, shared=0.5, slope=1.0)
    whole = fit_bradley_terry(given, length=True)
    monkeypatch.setattr("fastdpo.ranking.bradley_terry._NUMBERS_AT_A_TIME", 42)  # 7 clusters of 6 parameters
    parts = fit_bradley_terry(given, length=True)
    assert parts.covariance == pytest.approx(whole.covariance, rel=1e-12)
    assert parts.length_stderr == pytest.approx(whole.length_stderr, rel=1e-12)


def test_the_slope_of_length_is_recovered_with_its_interval():
    rng, held, slopes = np.random.default_rng(0), [], []
    for _ in range(300):
        strengths = fit_bradley_terry(drawn(rng, 600, slope=1.5), length=True)
        slopes.append(strengths.length_slope)
        held.append(abs(strengths.length_slope - 1.5) <= normal_quantile(0.95) * strengths.length_stderr)
    assert np.mean(slopes) == pytest.approx(1.5, abs=0.05)
    assert 0.93 <= np.mean(held) <= 0.97


def test_a_model_that_wins_by_length_alone_is_not_stronger_at_equal_length():
    rng = np.random.default_rng(5)
    lengths = np.stack([rng.integers(200, 400, 4000), rng.integers(50, 400, 4000)], 1).astype(float)
    covariate = (lengths[:, 0] - lengths[:, 1]) / lengths.sum(1)
    outcomes = (rng.random(4000) < 1 / (1 + np.exp(-2 * covariate))).astype(float)
    zeros = np.zeros(4000, np.int64)
    given = Comparisons(("long", "short"), zeros, zeros + 1, outcomes, lengths=lengths)
    plain, at_equal_length = fit_bradley_terry(given), fit_bradley_terry(given, length=True)
    assert plain.ranks() == [(1, 1), (2, 2)]
    assert at_equal_length.ranks() == [(1, 2), (1, 2)]
    assert at_equal_length.length_slope == pytest.approx(2, abs=0.3)


def test_relative_to_a_model_intervals_are_those_of_differences():
    strengths = fit_bradley_terry(drawn(np.random.default_rng(6), 500))
    anchored = strengths.relative_to("C")
    assert anchored.values[2] == 0
    assert anchored.stderrs()[2] == 0
    assert anchored.values[0] == pytest.approx(strengths.values[0] - strengths.values[2])
    variance = strengths.covariance[0, 0] + strengths.covariance[2, 2] - 2 * strengths.covariance[0, 2]
    assert anchored.stderrs()[0] == pytest.approx(math.sqrt(variance))
    assert anchored.ranks() == strengths.ranks()
    with pytest.raises(ValueError, match=r"anchor must be one of .*got 'Z'"):
        strengths.relative_to("Z")


def test_ranks_name_the_models_that_cannot_be_told_apart():
    text = " ".join(["A>B"] * 60 + ["B>A"] * 5 + ["A>C"] * 60 + ["C>A"] * 5 + ["B>C"] * 10 + ["C>B"] * 9)
    assert fit_bradley_terry(comparisons(text)).ranks() == [(1, 1), (2, 3), (2, 3)]


def test_groups_without_a_comparison_between_them_are_named():
    with pytest.raises(ValueError, match=r"connect all models, got 2 groups .*: A, C; B, D"):
        fit_bradley_terry(comparisons("A=C B>D D>B C>A"))


def test_a_group_that_wins_every_comparison_with_another_is_named():
    for text in ("C>D D>C A>B B>A A>C B>D", "A>C C>D D>C B>A A=B B>D"):
        with pytest.raises(ValueError, match=r"got A, B winning every comparison with C, D: .* infinite"):
            fit_bradley_terry(comparisons(text))


def test_a_model_between_two_others_that_are_separated_is_named_too():
    with pytest.raises(ValueError, match="winning every comparison with"):
        fit_bradley_terry(comparisons("A>B B>C A>C"))
    assert fit_bradley_terry(comparisons("A>B B>C C>A")).values == pytest.approx([0, 0, 0], abs=1e-12)


def test_one_model_and_no_comparison_are_refused():
    nothing = np.array([], np.int64)
    with pytest.raises(ValueError, match="at least one comparison, got none"):
        fit_bradley_terry(Comparisons(("A", "B"), nothing, nothing, np.array([])))
    with pytest.raises(ValueError, match="got a model compared with itself"):
        Comparisons(("A",), np.array([0]), np.array([0]), np.array([1.0]))


def test_lengths_that_cannot_be_told_from_the_models_are_refused():
    text = "A>B B>A A>B B>A"
    for lengths in ([[9, 4], [4, 9], [9, 4], [4, 9]], [[5, 5]] * 4, [[0, 0]] * 4):
        with pytest.raises(ValueError, match="lengths depend on the model only"):
            fit_bradley_terry(comparisons(text, lengths=np.array(lengths, float)), length=True)
    with pytest.raises(ValueError, match="they have no lengths of responses"):
        fit_bradley_terry(comparisons(text), length=True)


def test_a_length_that_decides_every_comparison_is_refused():
    lengths = np.array([[9, 4], [9, 3], [7, 2], [8, 5], [9, 8], [6, 5]], float)  # the longer one wins, whoever it is
    with pytest.raises(ValueError, match="slope is infinite"):
        fit_bradley_terry(comparisons("A>B B>A A>B B>A A>B B>A", lengths=lengths), length=True)


def test_strong_models_far_apart_are_fitted_all_the_same():
    text = " ".join(f"{a}>{b} " * 500 + f"{b}>{a}" for a, b in zip("ABCDEFG", "BCDEFGH", strict=True))
    values = fit_bradley_terry(comparisons(text)).values
    assert np.diff(values) == pytest.approx([-math.log(500)] * 7, abs=1e-9)


@pytest.mark.parametrize("confidence", [0, 1, 95, -0.5])
def test_a_confidence_that_is_no_share_is_refused(confidence):
    with pytest.raises(ValueError, match=f"confidence must be between 0 and 1, got {confidence}"):
        normal_quantile(confidence)
