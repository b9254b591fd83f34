"""Samples at evaluation, a reference that moves, and our head op in TRL's trainer: on two processes they work as on
one, or are refused by name, under each engine.
"""

import json
from importlib import util
from pathlib import Path

import pytest
from parallel_record import refuses, works
from peers import peer
from processes import on_processes
from sharded_runs import FSDP2, shards_on_cpus
from tiny import make_llama, make_rows
from tiny_runs import tiny_trainer, trl_trainer
from zero_runs import zero

from fastdpo.training.callbacks.samples import SAMPLES_FILE

pytestmark = pytest.mark.slow

SAMPLING = {"num_eval_samples": 3, "eval_sample_tokens": 6, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
FEATURES = {
    "num_eval_samples": {**SAMPLING, "learning_rate": 3e-2},
    "sync_ref_model": {"sync_ref_model": True, "ref_model_sync_steps": 2, "max_steps": 4, "learning_rate": 1e-2},
    "TRL's trainer (`accelerate`)": None,
}
REFUSED = {
    "num_eval_samples": "num_eval_samples must be 0 under FSDP, DeepSpeed",
    "sync_ref_model": "sync_ref_model must be off under FSDP, DeepSpeed",
    "TRL's trainer (`accelerate`)": "trainer must hold whole weights, got weights sharded by FSDP or DeepSpeed ZeRO-3",
}
SINGLE = "one process"
WORKING = [("DDP", "num_eval_samples"), ("DDP", "sync_ref_model"), ("DDP", "TRL's trainer (`accelerate`)")]
REFUSING = [("FSDP2", feature) for feature in FEATURES]
if util.find_spec("deepspeed") is not None:
    WORKING += [(f"ZeRO {stage}", "TRL's trainer (`accelerate`)") for stage in (1, 2)]
    REFUSING += [("ZeRO 3", "TRL's trainer (`accelerate`)")]


def engine_of(kind):
    if kind == "FSDP2":
        shards_on_cpus()
        return FSDP2
    return {"deepspeed": zero(int(kind[-1]))} if kind.startswith("ZeRO") else {}


def train(folder, kind, feature):
    """The log of a run and its samples, or the message with which it is refused."""
    batch_size = 4 if kind == SINGLE else 2
    settings = {"per_device_train_batch_size": batch_size, "num_rows": 16, **engine_of(kind)}
    try:
        if FEATURES[feature] is None:
            from fastdpo.integrations.trl import accelerate

            trainer = trl_trainer(folder, make_llama(), make_llama(), seed=0, **settings)
            if kind != SINGLE:  # what it must agree with is TRL's own
                trainer = accelerate(trainer)
        else:
            rows = make_rows(6, seed=1)
            trainer = tiny_trainer(folder, eval_dataset=rows, **{**settings, **FEATURES[feature]})
        trainer.train()
    except ValueError as error:
        return str(error)
    samples = Path(folder, SAMPLES_FILE)
    lines = samples.read_text().splitlines() if samples.exists() else []
    return [entry for entry in trainer.state.log_history if "loss" in entry], [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    peer("trl")
    found = {}
    for engine in ("DDP", "FSDP2", "ZeRO"):  # each leaves marks on its processes that the others do not run with
        cases = [case for case in (*WORKING, *REFUSING) if case[0].startswith(engine)]
        folder = tmp_path_factory.mktemp(engine)
        results = on_processes(train, [{"kind": kind, "feature": feature} for kind, feature in cases], folder)
        found |= dict(zip(cases, results, strict=True))
    return found


@pytest.mark.parametrize(("kind", "feature"), WORKING)
def test_two_processes_agree_with_one(kind, feature, of_two, tmp_path):
    logs, samples = train(tmp_path, SINGLE, feature)
    assert bool(samples) == (feature == "num_eval_samples")
    with works(kind, feature, processes=2, steps=len(logs)):
        found, found_samples = of_two[kind, feature][0]
        assert len(found) == len(logs) > 2
        for entry, other in zip(found, logs, strict=True):
            for key in ("loss", "rewards/margins", "logps/chosen"):
                assert entry[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5), key
        assert found_samples == samples


@pytest.mark.parametrize(("kind", "feature"), REFUSING)
def test_what_cannot_work_is_refused_by_name(kind, feature, of_two):
    for message in of_two[kind, feature]:
        assert message.startswith(REFUSED[feature])
    refuses(kind, feature, REFUSED[feature])
