"""Runs that are killed: each in a process of its own, at a chosen moment, resumed until it ends.

A case is a dict of settings for `trainer_of`. A moment is (where, count): the run is killed at the count-th event of
that kind; at none if the count is 0, and what it leaves at its end holds the number of such events. Moments are hooks
of this file; the product knows nothing of them.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

RESULT = "result.pt"
_TIMES = ("runtime", "per_second", "_time")  # parts of the names of metrics that two equal runs differ in


def train_until(folder, case, moment=None, *, number=signal.SIGKILL, resume=False):
    """The exit status of one run: -9 for a run that SIGKILL ended."""
    from processes import status_of  # not above: random_moments.py, a script, sets the path first

    order = {"folder": str(folder), "case": case, "moment": moment, "number": int(number), "resume": resume}
    return status_of(_train, folder, order)


def output(folder):
    """What a run has printed."""
    return Path(folder, "printed0.txt").read_text()


def end_of(folder):
    """Weights, logs, samples and warnings of a run that came to its end."""
    import torch

    return torch.load(Path(folder, RESULT), weights_only=False)


def differences(one, other):
    """The names of what two ends do not share bit by bit."""
    import torch

    found = [f"weight {name}" for name, w in one["weights"].items() if not torch.equal(w, other["weights"][name])]
    found += [name for name in ("log", "samples", "warnings", "metrics", "best") if one[name] != other[name]]
    return found


# In the child


def trainer_of(folder, case):
    """A trainer of a tiny model with dropout, so that every random number of a run matters."""
    import torch
    from datasets import Dataset, IterableDataset
    from tiny import make_llama, make_rows, make_tokenizer
    from tiny_runs import SILENT, make_lora
    from transformers import EarlyStoppingCallback

    from fastdpo import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    case = dict(case)
    is_sft, adapter, stream = case.pop("sft", False), case.pop("adapter", None), case.pop("stream", None)
    num_rows, dtype = case.pop("num_rows", 22), case.pop("dtype", "float32")
    model = make_llama(attention_dropout=case.pop("dropout", 0.1)).to(getattr(torch, dtype))
    rows = make_rows(num_rows)
    train = Dataset.from_list(rows)
    if stream == "shuffled":
        train = train.to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=8)
    elif stream == "generator":
        train = IterableDataset.from_generator(make_rows, gen_kwargs={"num_rows": num_rows})
    elif stream:
        train = train.to_iterable_dataset()
    settings = {
        **SILENT,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-2,
        "max_steps": 9,
        "disable_dropout": False,
        "logging_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        **case,
    }
    if not is_sft:
        settings.setdefault("beta", 0.5)
        settings["ref_cache_dir"] = str(Path(folder, "cache"))
    config, trainer = (SFTConfig, SFTTrainer) if is_sft else (DPOConfig, DPOTrainer)
    evaluated = {}
    patience = settings.pop("early_stopping", None)
    if settings.get("eval_strategy", "no") != "no" or settings.get("num_eval_samples"):
        evaluated = {"eval_dataset": Dataset.from_list(make_rows(7, seed=1))}
    built = trainer(
        model,
        args=config(str(Path(folder, "out")), **settings),
        train_dataset=train,
        processing_class=make_tokenizer(),
        peft_config=None if adapter is None else make_lora(lora_dropout=0.1, **adapter),
        **evaluated,
    )
    if patience is not None:
        built.add_callback(EarlyStoppingCallback(patience))
    return built


def _train(folder, case, moment, number, resume):
    import torch

    where, count = moment or ("", 0)
    at = _Count(count, number)
    _arm(where, at)
    settings = dict(case)
    to_group = settings.pop("signal_to_group", False)
    if to_group:
        os.setpgrp()
    is_signalled, second = settings.pop("signals", False), settings.pop("second_signal", None)
    trainer = trainer_of(folder, settings)
    trainer.add_callback(_callback(where, at))
    if is_signalled:
        from fastdpo import StopOnSignal

        if to_group:
            trainer.add_callback(_signal_to_group(number))
        if second is not None:
            trainer.add_callback(_two_signals(second))
        trainer.add_callback(StopOnSignal())
    trainer.train(resume_from_checkpoint="last" if resume else None)
    out = Path(trainer.args.output_dir)
    log = [
        {key: value for key, value in entry.items() if not any(part in key for part in _TIMES)}
        for entry in trainer.state.log_history
    ]
    lines = {name: _text(out / f"fastdpo_{name}.jsonl") for name in ("samples", "warnings")}
    best = trainer.state.best_model_checkpoint
    ended = {
        "weights": {name: weight.detach().clone() for name, weight in trainer.model.state_dict().items()},
        "log": [entry for entry in log if "total_flos" not in entry],
        "metrics": {name: value for entry in log if "total_flos" in entry for name, value in entry.items()},
        "best": None if best is None else Path(best).name,
        "num_events": at.seen,
        **lines,
    }
    torch.save(ended, Path(folder, RESULT))


def _text(path):
    return path.read_text() if path.is_file() else ""


class _Count:
    """Counts its calls, and kills at the count-th."""

    def __init__(self, count, number):
        self.count, self.number, self.seen = count, number, 0

    @property
    def is_next(self):
        return self.seen + 1 == self.count

    def __call__(self):
        self.seen += 1
        if self.seen == self.count:
            os.kill(os.getpid(), self.number)


def _callback(where, at):
    from transformers import TrainerCallback

    methods = {
        "step": "on_step_end",
        "substep": "on_substep_end",
        "evaluation": "on_prediction_step",
        "evaluated": "on_evaluate",
        "saved": "on_save",
    }
    if where not in methods:
        return TrainerCallback()

    def method(self, args, state, control, **kwargs):
        at()

    return type("KilledHere", (TrainerCallback,), {methods[where]: method})()


def _two_signals(number):
    from transformers import TrainerCallback

    class Signals(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)

    return Signals()


def _signal_to_group(number):
    from transformers import TrainerCallback

    class Signals(TrainerCallback):
        """Another process signals this one and its data loader workers, as launchers and batch systems do."""

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                words = ["kill", f"-{number}", "--", f"-{os.getpgrp()}"]
                subprocess.run(words, check=True, start_new_session=True)
                time.sleep(0.3)  # the death of a worker would be noticed here

    return Signals()


def _arm(where, at):
    if where == "precompute":
        from fastdpo.references import cache, precompute

        precompute._SECONDS_PER_SHARD = precompute._SHARE_PER_SHARD = 0.0  # a shard per batch
        _after(cache.LogpsCache, "write", at)
    elif where == "generate":
        from fastdpo.training.callbacks import samples

        _after(samples, "generate_ids", at)
    elif where == "commit":  # the count-th checkpoint has its place
        from fastdpo.training import resuming

        _after(resuming, "commit", at)
    elif where == "save":
        _arm_save(at)
    elif where == "torn":  # the count-th file of a save is cut in the middle
        _arm_save(at, is_cut=True)


def _after(owner, name, at):
    inner = getattr(owner, name)

    def wrapped(*args, **kwargs):
        result = inner(*args, **kwargs)
        at()
        return result

    setattr(owner, name, wrapped)


def _arm_save(at, is_cut=False):
    """Counts files that a save writes, renames and removals of files and folders."""
    import torch
    from transformers import PreTrainedModel

    from fastdpo.training.resuming import ResumableTrainer
    from fastdpo.training.saving.run_state import StateWriter

    inside = []
    save_checkpoint = ResumableTrainer._save_checkpoint

    def counted(owner, name, path_of):
        inner = getattr(owner, name)

        def wrapped(*args, **kwargs):
            result = inner(*args, **kwargs)
            if inside:
                if is_cut and at.is_next:
                    _cut(path_of(args))
                at()
            return result

        setattr(owner, name, wrapped)

    def marked(self, *args, **kwargs):
        inside.append(True)
        try:
            return save_checkpoint(self, *args, **kwargs)
        finally:
            inside.pop()

    ResumableTrainer._save_checkpoint = marked
    counted(torch, "save", lambda args: args[1])
    counted(PreTrainedModel, "save_pretrained", lambda args: Path(args[1], "model.safetensors"))
    counted(StateWriter, "write", lambda args: args[2])
    if not is_cut:
        for name in ("rename", "replace", "rmdir", "unlink"):
            counted(os, name, None)


def _cut(path):
    size = os.path.getsize(path)
    os.truncate(path, size // 2)
