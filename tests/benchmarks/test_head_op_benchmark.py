"""The head op's benchmark: its fp64 check, who is left out, and what a record holds."""

import argparse
from dataclasses import replace

import bench_linear_logps as bench
import pytest
import torch

from fastdpo.evidence.bench.heads import measured, methods, problem
from fastdpo.evidence.bench.heads.methods import PASSES, Method
from fastdpo.evidence.bench.heads.problem import Shape

SHAPE = Shape(128, 64, 48, 1021, "float32")
OPERANDS = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}  # which argument is the left matrix


@pytest.fixture(scope="module")
def small_problem():
    return problem.with_reference(problem.make_problem(SHAPE))


@pytest.fixture(scope="module")
def fp64_problem():
    return problem.with_reference(problem.make_problem(replace(SHAPE, dtype="float64")))


def plain_fp64(hidden_states, weight, labels):
    return (hidden_states @ weight.T).log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def test_shapes_are_written_as_they_are_read():
    for shape in (*problem.CPU_SHAPES, *problem.GPU_SHAPES):
        assert Shape.parse(str(shape)) == shape
    for wrong in ("2048x1024", "T0-R0-H8-V8-float32", "T256-R512-H8-V8-float32"):
        with pytest.raises(argparse.ArgumentTypeError, match="a shape"):
            Shape.parse(wrong)


def test_a_batch_has_whole_pairs_and_the_promised_rows():
    for shape in (*problem.CPU_SHAPES, *problem.GPU_SHAPES, SHAPE):
        assert shape.num_rows % (2 * shape.num_pairs) == shape.num_tokens % (2 * shape.num_pairs) == 0
    batch = problem.make_problem(SHAPE)
    assert batch.hidden_states.shape == (16, 8, 48)
    assert batch.response_hidden.shape == (16, 4, 48)
    assert torch.equal(batch.response_labels, batch.labels[:, 4:])


def test_no_pair_of_the_dpo_loss_is_settled(small_problem):
    hidden_states, labels = small_problem.response_hidden.flatten(0, 1), small_problem.response_labels.flatten()
    logps = methods.plain(hidden_states, small_problem.weight, labels)
    chosen, rejected = logps.view(16, 4).sum(-1).chunk(2)
    margins = chosen - rejected - small_problem.ref_chosen_logps + small_problem.ref_rejected_logps
    weights = torch.sigmoid(-problem.BETA * margins)
    assert weights.min() > 0.2
    assert weights.max() < 0.8


@pytest.mark.parametrize("all_rows", [False, True])
@pytest.mark.parametrize("pass_name", PASSES)
def test_the_check_agrees_with_autograd_in_fp64(fp64_problem, pass_name, all_rows):
    method = Method("fp64", {}, plain_fp64, all_rows=all_rows)
    found = problem.errors(fp64_problem, pass_name, methods.job(method, pass_name, fp64_problem)())
    assert list(found) == ["values", "dH", "dW"][: {"forward": 1, "frozen head": 2}.get(pass_name, 3)]
    assert max(found.values()) < 1e-6 if pass_name == "dpo loss" else max(found.values()) < 1e-12


def wrong_label(hidden_states, weight, labels):
    return methods.plain(hidden_states, weight, labels.roll(1))


def low_precision(hidden_states, weight, labels):
    return methods.plain(hidden_states.bfloat16(), weight.bfloat16(), labels)


def wrong_gradient(hidden_states, weight, labels):
    logps = methods.plain(hidden_states, weight, labels)
    return logps.detach() + 1.001 * (logps - logps.detach())


@pytest.mark.parametrize("logps", [wrong_label, low_precision, wrong_gradient])
def test_a_wrong_method_gets_its_error_and_no_number(small_problem, logps):
    wrong = Method("wrong", methods.KEEPS, logps)
    plain = Method("plain, response rows", methods.KEEPS, methods.plain)
    bad, good = bench.run_pass(SHAPE, small_problem, [wrong, plain], "forward+backward", 1)
    assert "ms" not in bad
    assert "is off by" in bad["error"]
    assert "error" not in good
    assert good["ms_min"] <= good["ms"] <= good["ms_max"]


def test_a_method_that_does_not_fit_is_left_out_with_its_reason(small_problem, monkeypatch):
    monkeypatch.setattr(measured, "free_bytes", lambda: 2**20)
    (record,) = bench.run_pass(SHAPE, small_problem, [methods.MAKERS["plain, all rows"]()], "forward", 1)
    assert "ms" not in record
    assert "GiB" in record["error"]


def test_a_peer_that_is_missing_is_named_with_its_reason(monkeypatch):
    def absent():
        raise ImportError("No module named 'peer'")

    monkeypatch.setitem(methods.MAKERS, "peer", absent)
    found, missing = methods.available(["plain, response rows", "peer"])
    assert [method.name for method in found] == ["plain, response rows"]
    assert missing == {"peer": "ImportError: No module named 'peer'"}


@pytest.mark.parametrize("pass_name", PASSES)
def test_fastdpo_passes_its_own_check_and_has_every_figure(small_problem, pass_name):
    names = ["plain, response rows", "fastdpo"]
    records = bench.run_pass(SHAPE, small_problem, methods.available(names)[0], pass_name, 1)
    for record in records:
        assert "error" not in record, record["error"]
        assert {"ms", "ms_min", "ms_max", "flops", "flops_needed", "matmul_tflops"} <= set(record)
        assert record["peak_mib"] >= record["results_mib"] > 0
        assert record["plain_ms"] == records[0]["ms"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the matmuls that CPU methods do in PyTorch")
@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize(
    "name", ["plain, all rows", "plain, response rows", "F.linear_cross_entropy", "TRL", "fastdpo"]
)
def test_declared_products_are_those_that_are_done(small_problem, name, pass_name):
    found, missing = methods.available([name])
    if missing:
        pytest.skip(missing[name])
    method = found[0]
    work = methods.job(method, pass_name, small_problem)
    work()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        work()
    done = 0
    for event in profiler.key_averages(group_by_input_shape=True):
        if event.key in OPERANDS:
            (M, K), (_, N) = event.input_shapes[OPERANDS[event.key] :][:2]
            done += 2 * M * K * N * event.count
    declared = methods.facts_of(method, pass_name, SHAPE)["flops"]
    assert done == pytest.approx(declared, rel=0.1)


def test_the_command_writes_one_line_per_method_and_pass(tmp_path, capsys):
    out = tmp_path / "lines.jsonl"
    names = ["plain, response rows", "fastdpo"]
    bench.main(["--runs", "1", "--out", str(out), "--shapes", str(SHAPE), "--methods", *names, "--passes", "forward"])
    assert len(out.read_text().splitlines()) == 2
    assert str(SHAPE) in capsys.readouterr().out


def test_no_pass_is_started_after_the_time_is_up(capsys):
    bench.main(["--shapes", str(SHAPE), "--methods", "plain, response rows", "--max-seconds", "-1"])
    assert capsys.readouterr().out.count("out of time") == len(PASSES)
