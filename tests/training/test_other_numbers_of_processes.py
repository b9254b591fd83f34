"""A run goes on exactly on another number of processes, and under another engine of torch, or is refused beforehand."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import PartialState
from parallel_record import works
from processes import on_processes
from sharded_runs import FSDP2, settings_of, shards_on_cpus
from tiny_runs import tiny_trainer

ROWS_PER_STEP = 8
ELSEWHERE = "resuming on another number of processes"  # in the table of what works
MODES = ("cached reference", "LoRA")
ENGINES = ("DDP", "FULL_STATE_DICT", "SHARDED_STATE_DICT")
AS_IT_IS = PartialState.__init__
QUICK = [("cached reference", "SHARDED_STATE_DICT"), ("LoRA", "FULL_STATE_DICT")]
REST = [(mode, engine) for mode in MODES for engine in ENGINES if (mode, engine) not in QUICK]
LOGGED = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "num_tokens", "learning_rate")


def run(folder, mode, engine="DDP", checkpoint=None):
    """The log of six steps of adam, in two epochs, with an entry for every third; saved after the second."""
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    settings = settings_of(mode, num_processes)
    PartialState.__init__ = AS_IT_IS
    if engine != "DDP":
        shards_on_cpus()
        settings |= {"fsdp": FSDP2["fsdp"], "fsdp_config": FSDP2["fsdp_config"] | {"state_dict_type": engine}}
    trainer = tiny_trainer(
        folder,
        num_rows=4 * ROWS_PER_STEP,
        per_device_train_batch_size=ROWS_PER_STEP // num_processes,
        **{**settings, "learning_rate": 1e-2},
        max_steps=6,
        logging_steps=3,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=None,
    )
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def kind_of(engine):
    return "DDP" if engine == "DDP" else "FSDP2"


def assert_same_run(logs, expected):
    assert [entry["step"] for entry in logs] == [entry["step"] for entry in expected] == [3, 6]
    for entry, other in zip(logs, expected, strict=True):
        for key in LOGGED:
            assert entry[key] == pytest.approx(other[key], rel=1e-5, abs=1e-5), (entry["step"], key)


@pytest.fixture(scope="module")
def of_one(tmp_path_factory):
    """By mode, the folder and the log of the run of one process."""
    folders = {mode: tmp_path_factory.mktemp("one") for mode in MODES}
    return {mode: (folder, run(folder, mode)) for mode, folder in folders.items()}


def run_on_two(folder, of_one, keys):
    """By mode and engine, the folder of a run of two processes; then the logs of those that go on from one process."""
    cases = [{"mode": mode, "engine": engine} for mode, engine in keys]
    goes_on = [{**case, "checkpoint": str(of_one[case["mode"]][0] / "checkpoint-2")} for case in cases]
    found = [results[0] for results in on_processes(run, cases + goes_on, folder)]
    return {key: (folder / str(n), found[n], found[n + len(keys)]) for n, key in enumerate(keys)}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory, of_one):
    return run_on_two(tmp_path_factory.mktemp("two"), of_one, QUICK)


@pytest.fixture(scope="module")
def rest_of_two(tmp_path_factory, of_one):
    return run_on_two(tmp_path_factory.mktemp("rest"), of_one, REST)


@pytest.mark.parametrize(("mode", "engine"), QUICK)
def test_a_run_of_two_processes_goes_on_in_one(mode, engine, of_one, of_two, tmp_path):
    folder, logs, _ = of_two[mode, engine]
    assert_same_run(logs, of_one[mode][1])
    with works(kind_of(engine), ELSEWHERE, processes=2, steps=6):
        assert_same_run(run(tmp_path, mode, checkpoint=folder / "checkpoint-2"), logs)


@pytest.mark.parametrize(("mode", "engine"), QUICK)
def test_a_run_of_one_process_goes_on_in_two(mode, engine, of_one, of_two):
    assert_same_run(of_two[mode, engine][2], of_one[mode][1])


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "engine"), REST)
def test_under_the_other_engines_too(mode, engine, of_one, rest_of_two, tmp_path):
    test_a_run_of_two_processes_goes_on_in_one(mode, engine, of_one, rest_of_two, tmp_path)
    test_a_run_of_one_process_goes_on_in_two(mode, engine, of_one, rest_of_two)


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_four(of_one, of_two, rest_of_two, tmp_path):
    saved = {**of_two, **rest_of_two}
    # (saved by, resumed under): each as it was, and three others
    pairs = [*((engine, engine) for engine in ENGINES), ENGINES[1:], ENGINES[:0:-1], ENGINES[:2]]
    cases = [
        {"mode": mode, "engine": engine, "checkpoint": str(saved[mode, by][0] / "checkpoint-2")}
        for mode in MODES
        for by, engine in pairs
    ]
    for case, results in zip(cases, on_processes(run, cases, tmp_path, 4), strict=True):
        with works(kind_of(case["engine"]), ELSEWHERE, processes=4, steps=6):
            assert_same_run(results[0], of_one[case["mode"]][1])


def test_steps_of_other_rows_are_refused_before_anything_is_loaded(of_two, tmp_path, monkeypatch):
    checkpoint = of_two["LoRA", "FULL_STATE_DICT"][0] / "checkpoint-2"
    trainer = tiny_trainer(tmp_path, per_device_train_batch_size=4, num_rows=32, **settings_of("LoRA", 1))
    monkeypatch.setattr(trainer, "_load_from_checkpoint", None)
    with pytest.raises(ValueError, match=r"processes must stay 8 to resume .* on 1 processes instead of 2, got 4"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_deepspeeds_files_are_refused_under_another_engine(tmp_path, of_one):
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(of_one["LoRA"][0] / "checkpoint-2", checkpoint)
    (checkpoint / "fastdpo_manifest.json").unlink()
    (checkpoint / "global_step2").mkdir()
    trainer = tiny_trainer(tmp_path, per_device_train_batch_size=8, num_rows=32, **settings_of("LoRA", 1))
    with pytest.raises(ValueError, match=r"must come from a run with the same engine, got .* of DeepSpeed for one"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


# Files that would run code


class Evil:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (self.trace, "w"))


def in_an_index(checkpoint, evil):
    (checkpoint / "pytorch_model_fsdp_0" / ".metadata").write_bytes(pickle.dumps(evil))


def in_a_value(checkpoint, evil):
    """In place of the learning rate, with as many bytes as the file needs."""
    import torch.distributed.checkpoint.metadata as parts

    folder = checkpoint / "optimizer_0"
    index = pickle.loads((folder / ".metadata").read_bytes())
    (folder / "evil.distcp").unlink(missing_ok=True)
    torch.save(evil, folder / "evil.distcp")
    size = (folder / "evil.distcp").stat().st_size
    kinds = index.state_dict_metadata
    key = next(key for key in index.storage_data if isinstance(kinds[key.fqn], parts.BytesStorageMetadata))
    place = index.storage_data[key]
    place.relative_path, place.offset, place.length = "evil.distcp", 0, size
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def in_deepspeeds_files(checkpoint, evil):
    (checkpoint / "global_step2").mkdir()
    torch.save({"optimizer": evil}, checkpoint / "global_step2" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")


def outside_of_the_folder(checkpoint, evil):
    (checkpoint / "latest").write_text("../elsewhere")


@pytest.mark.parametrize(
    ("put", "message"),
    [
        (in_an_index, "holds _io.open|holds io.open|holds builtins.open"),
        (in_a_value, "optimizer_0 holds .*open, which no optimizer saves"),
        (in_deepspeeds_files, r"optim_states.pt holds .*open, which DeepSpeed does not save"),
        (outside_of_the_folder, "latest names '../elsewhere'"),
    ],
)
def test_objects_that_a_checkpoint_never_holds_are_refused_and_not_made(put, message, of_two, tmp_path):
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(of_two["cached reference", "SHARDED_STATE_DICT"][0] / "checkpoint-2", checkpoint)
    (checkpoint / "fastdpo_manifest.json").unlink()
    put(checkpoint, Evil(str(tmp_path / "was run")))
    trainer = tiny_trainer(tmp_path, per_device_train_batch_size=8, num_rows=32)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "was run").exists()


def test_the_manifest_covers_the_files_of_all_processes(of_two):
    folder = of_two["cached reference", "SHARDED_STATE_DICT"][0] / "checkpoint-2"
    covered = json.loads((folder / "fastdpo_manifest.json").read_text())["files"]
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - covered.keys() == {
        "fastdpo_manifest.json"
    } | {name for name in ("README.md",) if Path(folder, name).exists()}
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
        assert f"pytorch_model_fsdp_0/{name}" in covered
        assert f"optimizer_0/{name}" in covered
