"""The benchmark of long pairs compares losses and gradients before it reports a peak."""

import bench_long_pairs as bench
import pytest


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_tiles_and_host_checkpoints_take_less_memory_for_the_same_gradients(kind):
    if kind == "lora":
        pytest.importorskip("peft")
    before, after = bench.measure(kind, 256, 32, quick=True)
    assert after["gradient_error"] < 1e-5
    assert after["gradient_error"] > 0  # of other sums: something was compared
    assert after["peak_bytes"] < 0.75 * before["peak_bytes"]
    for record in (before, after):
        assert record["estimated_bytes"] == pytest.approx(record["peak_bytes"], rel=0.05)


def test_gradients_that_differ_are_no_result(monkeypatch):
    monkeypatch.setattr(bench, "MOST_ERROR", 0.0)
    with pytest.raises(AssertionError, match="gradients differ"):
        bench.measure("full", 256, 32, quick=True)
