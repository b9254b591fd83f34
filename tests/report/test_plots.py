"""Figures draw the numbers that they are given."""

import importlib.util

import pytest

from fastdpo.report import Interval, Point, Spot, frontier, intervals, lines, require_matplotlib, training_curves

HISTORY = [
    {"step": 1, "loss": 0.69, "rewards/margins": 0.0},
    {"step": 2, "loss": 0.5, "rewards/margins": 0.4},
    {"step": 2, "eval_loss": 0.55, "eval_rewards/margins": 0.3},
    {"step": 2, "train_loss": 0.6},
]


def test_training_curves_draw_a_line_per_run_and_a_dashed_one_for_evaluation():
    figures = dict(training_curves({"a": HISTORY, "b": HISTORY[:2]}, keys=("loss", "rewards/margins")))
    (loss,), (margins,) = (figures[key].axes for key in ("loss", "rewards/margins"))
    assert [line.get_ydata().tolist() for line in loss.lines] == [[0.69, 0.5], [0.55], [0.69, 0.5]]
    assert [line.get_linestyle() for line in margins.lines] == ["-", "--", "-"]
    assert [text.get_text() for text in figures["loss"].legends[0].get_texts()] == ["a", "b", "held-out"]


def test_a_metric_that_was_not_logged_has_no_figure():
    assert [key for key, _ in training_curves({"a": HISTORY}, keys=("entropy", "loss"))] == ["loss"]


def test_one_run_without_evaluation_needs_no_legend():
    ((_, figure),) = training_curves({"a": HISTORY[:2]}, keys=("loss",))
    assert figure.legends == []


def test_many_points_of_a_frontier_can_be_told_apart_and_their_names_hide_none():
    figure = frontier([Point(f"run {n}", float(n), 1.0) for n in range(20)])
    panel = figure.axes[0]
    looks = {(bar.lines[0].get_color(), bar.lines[0].get_marker()) for bar in panel.containers}
    assert len(looks) == 20
    assert panel.get_legend() is None  # it stands below the panel
    assert len(figure.legends[0].get_texts()) == 20


def test_the_frontier_joins_its_points_by_rising_kl():
    points = [Point("Reference", 0.0, 1.0), Point("far", 2.0, 3.0, 0.1, 0.1), Point("near", 0.5, 2.0)]
    figure = frontier(points, best=[(0.0, 1.0), (2.0, 4.0)])
    panel = figure.axes[0]
    paths = [line.get_xdata().tolist() for line in panel.lines if len(line.get_xdata()) == 3]
    assert paths == [[0.0, 0.5, 2.0]]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["best possible", "Reference", "far", "near"]


def test_intervals_have_a_row_for_each_name_and_a_point_for_each_series():
    one = [Interval("first", 0.6, 0.5, 0.8), Interval("a-name-that-is-far-too-long-for-a-phone", 0.4, 0.3, 0.5)]
    figure = intervals({"summed": one, "per token": one[::-1]}, "share", mark=0.5)
    panel = figure.axes[0]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["first", "a-name-tha…g-for-a-phone"]
    assert panel.yaxis_inverted()
    points = [container.lines[0].get_xdata().tolist() for container in panel.containers]
    assert points == [[0.6, 0.4], [0.4, 0.6]]
    ends = [segment[:, 0].tolist() for segment in panel.containers[0].lines[2][0].get_segments()]
    assert ends == [pytest.approx([0.5, 0.8]), pytest.approx([0.3, 0.5])]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["summed", "per token"]
    assert len(intervals({"rating": one}, "rating").legends) == 0


def test_lines_go_through_their_spots_in_order_with_bars_in_both_directions():
    series = {"DPO": [Spot(0.0, 1.0), Spot(2.0, 3.0, 0.5, 0.25)], "reference": [Spot(0.0, 1.0)]}
    figure = lines(series, "KL", "reward", best=[(0.0, 1.0), (2.0, 4.0)])
    panel = figure.axes[0]
    dpo, reference = panel.containers
    assert dpo.lines[0].get_xydata().tolist() == [[0, 1], [2, 3]]
    across, up = (bars.get_segments()[1].tolist() for bars in dpo.lines[2])
    assert (across, up) == ([[1.5, 3.0], [2.5, 3.0]], [[2.0, 2.75], [2.0, 3.25]])
    assert (dpo.lines[0].get_linestyle(), reference.lines[0].get_linestyle()) == ("-", "None")
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("KL", "reward")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["best possible", "DPO", "reference"]


def test_a_missing_matplotlib_is_named_with_the_way_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "fastdpo\[plots\]"'):
        require_matplotlib()


def test_steps_are_whole_numbers():
    """A run of two steps, or two rounds, has no ticks between them."""
    history = [{"step": step, "loss": 1.0 / (1 + step)} for step in (0, 1, 2)]
    ((_, figure),) = training_curves({"run": history}, ["loss"])
    figure.canvas.draw()
    ticks = figure.axes[0].get_xticks()
    assert len(ticks) >= 3
    assert all(float(tick).is_integer() for tick in ticks)
