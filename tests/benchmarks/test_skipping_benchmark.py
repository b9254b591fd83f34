"""The distribution that skipping is measured on is like a trained model's, and the records say what was measured."""

from dataclasses import asdict, replace

import bench_skipping as bench
import pytest
import torch
from heads import trained

from fastdpo.evidence.bench.heads.problem import Shape

SHAPE = Shape(512, 512, 192, 4000, "float32")


@pytest.fixture(scope="module")
def head():
    return trained.trained_head(SHAPE)


def test_the_exponent_leaves_a_tenth_of_the_mass_outside_the_most_frequent_thousand():
    for num_vocab in (4000, 32000, 128256):
        tail = trained.zipf(num_vocab, trained.zipf_exponent(num_vocab))[1000:].exp().sum().item()
        assert tail == pytest.approx(0.1, abs=1e-3)
    with pytest.raises(ValueError, match="at least 2000"):
        trained.trained_head(replace(SHAPE, vocab_size=1999))


def test_the_distribution_is_like_a_trained_models(head):
    measured = trained.statistics(head)
    assert 1.0 <= measured.mean_entropy <= 3.0
    assert 0.06 <= measured.labels_outside_top <= 0.14  # 0.1 within 3 deviations of 512 draws
    assert 1.0 <= measured.zipf_exponent <= 2.0
    assert 0.5 <= measured.mean_largest <= 0.9


def test_statistics_are_those_of_the_plain_formulas(head):
    probs = (head.hidden_states.double() @ head.weight.double().T).softmax(-1)
    measured = trained.statistics(head)
    assert measured.mean_entropy == pytest.approx(-(probs * probs.log()).sum(-1).mean().item(), rel=1e-4)
    assert measured.labels_outside_top == pytest.approx((head.labels >= 1000).double().mean().item())
    assert measured.mean_largest == pytest.approx(probs.amax(-1).mean().item(), rel=1e-4)


def test_labels_are_drawn_from_the_softmax_itself(head):
    logps = (head.hidden_states @ head.weight.T).log_softmax(-1)
    surprise = -logps.gather(-1, head.labels[:, None]).mean().item()
    assert surprise == pytest.approx(
        trained.statistics(head).mean_entropy, abs=0.3
    )  # cross-entropy of a calibrated model


def test_permuting_ids_changes_no_probability(head):
    mixed = trained.permuted(head)
    assert not torch.equal(mixed.labels, head.labels)
    assert torch.equal(mixed.weight[mixed.labels], head.weight[head.labels])
    assert torch.equal(mixed.rank[mixed.labels], head.labels)
    assert asdict(trained.statistics(mixed)) == pytest.approx(asdict(trained.statistics(head)), rel=1e-3)


def test_records_hold_what_was_measured(head, monkeypatch):
    def timed(jobs, num_runs):
        return {job: {"ms": 10.0 if job == bench.FORWARD else 30.0} for job in jobs if num_runs == 1}

    monkeypatch.setattr(bench, "interleaved_ms", timed)
    records = bench.run_order(head, "by frequency", [0.0, 2.0**-9, 2.0**-4], 1)
    exact, small, large = records
    assert exact["kept_share"] == 1.0
    assert exact["dH_error"] == exact["dW_error"] == 0.0
    assert exact["ms"] == exact["exact_ms"] == 30.0
    assert small["kept_share"] >= large["kept_share"]
    assert large["kept_share"] < large["kept_share_unordered"] <= 1.0
    assert 0.0 < large["dH_error"] < 0.1
    for record in records:
        assert max(record["dH_of_bound"], record["dW_of_bound"]) <= 1.0
        assert record["promised_ms"] == pytest.approx(10 + 20 * record["kept_share"])


def test_an_error_beyond_the_bound_is_seen(head, monkeypatch):
    exact = bench.step(head, 0.0)
    monkeypatch.setattr(bench, "step", lambda head, tolerance: (exact[0] * 1.5, exact[1]))
    found = bench.gradient_errors(head, 2.0**-9, exact)
    assert found["dH_error"] == pytest.approx(0.5, rel=1e-4)
    assert found["dH_of_bound"] > 1.0
    assert found["dW_error"] == found["dW_of_bound"] == 0.0


def test_the_command_writes_one_line_per_tolerance_and_order(tmp_path, capsys):
    out = tmp_path / "lines.jsonl"
    arguments = [
        "--runs",
        "1",
        "--out",
        str(out),
        "--shapes",
        "T128-R128-H64-V2500-float32",
        "--tolerances",
        "0",
        "0.01",
    ]
    bench.main(arguments)
    assert len(out.read_text().splitlines()) == 4
    assert "mean_entropy" in capsys.readouterr().out
