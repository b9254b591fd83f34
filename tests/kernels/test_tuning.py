"""Tuning of block shapes: what it keeps, what it refuses, and that nothing happens unless it is asked for."""

import itertools
import json

import pytest
import torch
from head_cases import BF16, FP32, Case, assert_at_most_twice_plain

from fastdpo import linear_logps
from fastdpo.kernels import launch, tuned, tuning
from fastdpo.kernels.launch import INTERPRETED, Blocks, device_blocks
from fastdpo.kernels.products import product_blocks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="measures in Triton's interpreter")
SIZES = (24, 70)  # H and V
BETTER = Blocks(16, 32, 32, 1, 1)


@pytest.fixture(autouse=True)
def table_afterwards():
    yield
    tuned.use_default_blocks()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "folder" / "blocks.json"


def descending():
    """A timer for which every call takes half as long as the one before."""
    exponents = itertools.count()
    return lambda call: 2.0 ** -next(exponents)


def constant(call):
    return 1.0


def operands(dtype=FP32, hidden_size=SIZES[0]):
    return torch.empty(3, hidden_size, dtype=dtype)


def test_the_fastest_candidate_is_stored_and_used_once_asked_for(cache):
    found = tuning.tune(*SIZES, FP32, num_rows=40, cache=cache, measure=descending())
    assert found.path == cache
    assert set(found.best) == set(tuned.FAMILIES)
    for family, best in found.best.items():
        trials = [trial for trial in found.trials if trial.family == family]
        assert [trial.refusal for trial in trials] == [None] * len(trials)
        assert best == trials[-1].blocks != trials[0].blocks

    assert device_blocks(operands()) == INTERPRETED  # nothing is read unless asked for
    assert tuned.use_tuned_blocks(cache) == 1
    assert device_blocks(operands()) == found.best["forward"]
    assert device_blocks(operands(), "logit_grads") == found.best["logit_grads"]
    assert product_blocks(torch.empty(2, 32, 64), operands()) == found.best["products"]
    tuned.use_default_blocks()
    assert device_blocks(operands()) == INTERPRETED


def test_tuned_blocks_hold_for_their_dtype_hidden_size_gpu_and_triton_alone(cache, monkeypatch):
    tuning.tune(*SIZES, FP32, num_rows=40, cache=cache, measure=descending())
    tuned.use_tuned_blocks(cache)
    assert device_blocks(operands(BF16)) == INTERPRETED
    assert device_blocks(operands(hidden_size=25)) == INTERPRETED
    assert device_blocks(operands(), "skipping") == INTERPRETED
    assert device_blocks(operands()) != INTERPRETED
    monkeypatch.setattr(tuned, "_device_facts", lambda device: ("another GPU", "9.0"))
    assert device_blocks(operands()) == INTERPRETED
    monkeypatch.undo()
    monkeypatch.setattr(tuned.triton, "__version__", "9.9.9")
    assert device_blocks(operands()) == INTERPRETED


def test_the_head_op_is_as_exact_with_tuned_blocks(cache):
    case = Case(67, 40, 257, FP32, ignored="none")
    tuning.tune(case.H, case.V, case.dtype, num_rows=40, cache=cache, measure=descending())
    tuned.use_tuned_blocks(cache)
    assert device_blocks(operands(hidden_size=case.H)) != INTERPRETED

    def ours(*args, **settings):
        return linear_logps(*args, **settings, impl="triton").logps

    assert_at_most_twice_plain(ours, case)


def test_without_a_gain_the_table_stays(cache):
    found = tuning.tune(*SIZES, FP32, num_rows=40, cache=cache, measure=constant)
    assert found.best["forward"] == INTERPRETED
    assert all(trial.ms == 1.0 for trial in found.trials)


def test_entries_of_other_sizes_stay_in_the_file(cache):
    tuning.tune(*SIZES, FP32, num_rows=3, cache=cache, measure=constant)
    tuning.tune(*SIZES, BF16, num_rows=3, cache=cache, measure=constant)
    tuning.tune(*SIZES, BF16, num_rows=3, cache=cache, measure=descending())
    assert tuned.use_tuned_blocks(cache) == 2
    assert device_blocks(operands(FP32)) == INTERPRETED
    assert device_blocks(operands(BF16)) != INTERPRETED


def test_a_candidate_with_wrong_numbers_or_that_fails_is_left_out(cache, monkeypatch):
    forward = tuning.fused_forward

    def faulty(*args):
        if args[-1] == BETTER:
            values = forward(*args)
            values["logps"][-1] += 0.01
            return values
        if isinstance(args[-1], Blocks) and args[-1] != INTERPRETED:
            raise RuntimeError("out of resource: shared memory")
        return forward(*args)

    monkeypatch.setattr(tuning, "fused_forward", faulty)
    found = tuning.tune(*SIZES, FP32, num_rows=40, cache=cache, measure=descending())
    refusals = [trial.refusal for trial in found.trials if trial.family == "forward"]
    assert refusals[0] is None
    assert refusals[1].startswith("numbers differ from the default's by")
    assert refusals[2] == "RuntimeError: out of resource: shared memory"
    assert found.best["forward"] == INTERPRETED


def test_a_candidate_that_writes_nothing_is_left_out(cache, monkeypatch):
    fill = tuning.fill_logit_grads
    monkeypatch.setattr(tuning, "fill_logit_grads", lambda *args: fill(*args) if args[-1] == INTERPRETED else None)
    found = tuning.tune(*SIZES, FP32, num_rows=40, cache=cache, measure=descending())
    refusals = [trial.refusal for trial in found.trials if trial.family == "logit_grads"]
    assert refusals[1] == "numbers differ from the default's by nan"
    assert found.best["logit_grads"] == INTERPRETED


def test_when_the_time_is_over_the_rest_is_left_out(cache):
    found = tuning.tune(*SIZES, FP32, num_rows=3, cache=cache, measure=descending(), seconds=0.0)
    assert {trial.refusal for trial in found.trials} == {None, "no time left"}
    assert found.best["forward"] == INTERPRETED


GOOD = {
    "key": {"gpu": "x", "capability": "9.0", "triton": "3.7.1", "dtype": "bfloat16", "hidden_size": 8},
    "blocks": {},
}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"format": 2, "entries": []}',
        '{"format": 1}',
        json.dumps({"format": 1, "entries": [{}]}),
        json.dumps({"format": 1, "entries": [GOOD | {"key": {"gpu": "x"}}]}),
        json.dumps({"format": 1, "entries": [GOOD | {"blocks": {"backward": {}}}]}),
        json.dumps({"format": 1, "entries": [GOOD | {"blocks": {"forward": {"block_t": 128}}}]}),
        json.dumps({"format": 1, "entries": [GOOD | {"blocks": {"forward": BETTER._asdict() | {"block_t": "a"}}}]}),
        json.dumps({"format": 1, "entries": [GOOD | {"blocks": [1]}]}),
    ],
)
def test_a_file_of_something_else_is_refused_by_name(content, tmp_path):
    path = tmp_path / "blocks.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"blocks\.json"):
        tuned.use_tuned_blocks(path)
    with pytest.raises(ValueError, match=r"blocks\.json"):
        tuning.tune(*SIZES, FP32, num_rows=3, cache=path, measure=constant)
    assert path.read_text() == content


def test_the_file_of_the_test_above_is_accepted_when_it_is_right(tmp_path):
    path = tmp_path / "blocks.json"
    entry = GOOD | {"blocks": {"forward": BETTER._asdict()}}
    path.write_text(json.dumps({"format": 1, "entries": [entry]}))
    assert tuned.use_tuned_blocks(path) == 1


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.json"):
        tuned.use_tuned_blocks(tmp_path / "nowhere.json")


def test_the_default_file_lies_in_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned.default_path() == tmp_path / "fastdpo" / "blocks.json"


def test_the_environment_names_a_file_that_is_read_at_the_first_launch(cache, monkeypatch):
    found = tuning.tune(*SIZES, FP32, num_rows=40, cache=cache, measure=descending())
    monkeypatch.setattr(tuned, "_asked_environment", [])
    monkeypatch.setenv("FASTDPO_TUNED_BLOCKS", str(cache))
    assert device_blocks(operands()) == found.best["forward"] != INTERPRETED
    tuned.use_default_blocks()  # what the program asks for counts more
    assert device_blocks(operands()) == INTERPRETED
    monkeypatch.setattr(tuned, "_asked_environment", [])
    monkeypatch.setenv("FASTDPO_TUNED_BLOCKS", str(cache.parent / "nowhere.json"))
    with pytest.raises(ValueError, match=r"nowhere\.json"):
        device_blocks(operands())


def test_blocks_can_be_used_for_a_while(cache):
    found = tuning.tune(*SIZES, FP32, num_rows=40, cache=cache, measure=descending())
    with tuned.blocks_of(tuned.load(cache)):
        assert device_blocks(operands()) == found.best["forward"]
        with tuned.blocks_of({}):
            assert device_blocks(operands()) == INTERPRETED
        assert device_blocks(operands()) == found.best["forward"]
    assert device_blocks(operands()) == INTERPRETED


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5, FP32), "at least 1"),
        ((5, 5, torch.float64), "dtype must be"),
        ((5, 5, FP32, "meta"), "needs a CUDA device"),
    ],
)
def test_what_cannot_be_tuned_is_refused(arguments, message, cache):
    with pytest.raises(ValueError, match=message):
        tuning.tune(*arguments, cache=cache)


def test_the_command_prints_every_trial_and_writes_the_file(cache, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "_median_ms", descending())
    sizes = ["--hidden-size", "24", "--vocab-size", "70", "--num-rows", "3", "--dtype", "float32"]
    assert tuning.main([*sizes, "--cache", str(cache)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n*") + printed.startswith("*") == len(tuned.FAMILIES)
    assert f"wrote {cache}" in printed
    assert cache.exists()
    assert launch.device_blocks(operands()) == INTERPRETED
