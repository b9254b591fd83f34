"""The verdict on bf16 weights is a difference against the noise of the runs with fp32 weights."""

import bench_full_weights as bench
import pytest


def record(way, seed, heldout):
    return {"way": way, "rate": 1e-5, "seed": seed, "heldout": heldout, "losses": [0.7, heldout], "cpu_seconds": 1.0}


def test_a_way_is_the_same_as_fp32_within_two_standard_errors():
    exact = [record(bench.FP32, seed, heldout) for seed, heldout in enumerate([0.60, 0.62, 0.64])]
    near, far = record("kahan", 0, 0.63), record("nearest", 0, 0.69)
    lines = {line["way"]: line for line in bench.compared([*exact, near, far])}
    assert lines["kahan"]["difference"] == pytest.approx(0.03)  # from 0.60, of the same seed
    assert lines["kahan"]["standard_error"] == pytest.approx(0.02 * 2**0.5)
    assert lines["kahan"]["is_same"]
    assert not lines["nearest"]["is_same"]
    assert lines[bench.FP32]["difference"] == 0


def test_the_plot_has_a_curve_of_each_way(tmp_path):
    pytest.importorskip("matplotlib")
    runs = [
        dict(record(way, seed, 0.6), losses=[0.7 - i / 100 for i in range(12)]) for way in bench.WAYS for seed in (0, 1)
    ]
    bench.plot(runs, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size > 10_000
