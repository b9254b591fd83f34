"""SIGTERM, SIGINT and SIGUSR1 end the step, save a checkpoint, and a resumed run ends as if there were none."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from killing import differences, end_of, output, train_until
from processes import on_processes
from tiny import make_rows, save_model
from tiny_runs import tiny_trainer
from transformers import TrainerCallback

from fastdpo import StopOnSignal
from fastdpo.cli.run import resume_command
from fastdpo.training.saving import signals
from fastdpo.training.saving.signals import SIGNALS, Stopped

EVERY_2 = {"eval_strategy": "steps", "eval_steps": 2}
NEVER = {"save_strategy": "no", "signals": True}  # only the signal saves
SAMPLES = {"num_eval_samples": 2, "eval_sample_tokens": 5}
BEST = {
    **dict.fromkeys(("eval_strategy", "save_strategy"), "steps"),
    **dict.fromkeys(("eval_steps", "save_steps"), 2),
    "load_best_model_at_end": True,
    "signals": True,
}
CASES = {
    "in an accumulation": ({**NEVER, "gradient_accumulation_steps": 3}, ("substep", 8), signal.SIGUSR1),
    "in an evaluation": ({**NEVER, **EVERY_2}, ("evaluation", 6), signal.SIGINT),
}
SLOW = {
    "at the end of a step": (NEVER, ("step", 4), signal.SIGTERM),
    "in the step before an evaluation": ({**NEVER, **EVERY_2}, ("step", 4), signal.SIGTERM),
    "in an evaluation that a save follows": (BEST, ("evaluation", 6), signal.SIGTERM),
    "after an evaluation": (BEST, ("evaluated", 2), signal.SIGTERM),
    "in a save": ({"signals": True}, ("saved", 2), signal.SIGTERM),
    "in the evaluation at an epoch's end": (
        {**NEVER, "eval_strategy": "epoch", "logging_strategy": "epoch", "max_steps": 14},
        ("evaluation", 2),
        signal.SIGTERM,
    ),
    "in the last step": (NEVER, ("step", 9), signal.SIGTERM),
    "in the last evaluation": ({**NEVER, "eval_strategy": "epoch"}, ("evaluation", 2), signal.SIGTERM),
    "in samples": ({**NEVER, **EVERY_2, **SAMPLES}, ("generate", 3), signal.SIGUSR1),
    "in a stream": ({**NEVER, "stream": "shuffled", "max_steps": 20}, ("step", 15), signal.SIGTERM),
    "with workers": ({**NEVER, "dataloader_num_workers": 2}, ("step", 5), signal.SIGTERM),
}


def check(folder, settings, moment, number):
    assert train_until(folder / "whole", settings) == 0, output(folder / "whole")
    cut = folder / "cut"
    assert train_until(cut, settings, moment, number=number) == 128 + number, output(cut)
    if moment[0] == "evaluation" and settings.get("eval_strategy") == "steps":  # left, not finished
        last = max(cut.glob("out/checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))
        assert json.loads((last / "fastdpo_progress.json").read_text())["evaluates"]
    printed = output(cut)
    assert f"{number.name}: stopped after a save in" in printed
    assert "To continue: trainer.train(resume_from_checkpoint=" in printed
    assert train_until(cut, settings, resume=True) == 0, output(cut)
    assert differences(end_of(folder / "whole"), end_of(cut)) == []


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_a_signal_stops_ends_like_one_that_is_not(tmp_path, case):
    check(tmp_path, *CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_a_run_that_a_signal_stops_elsewhere_ends_like_one_that_is_not(tmp_path, case):
    check(tmp_path, *SLOW[case])


class Signals(TrainerCallback):
    """Sends this process signals at the end of a step."""

    def __init__(self, *numbers, step=2):
        self.numbers, self.step = numbers, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)


def test_the_exit_code_is_128_and_the_signals_number_and_handlers_are_restored(tmp_path, capfd):
    before = {number: signal.getsignal(number) for number in SIGNALS}
    trainer = tiny_trainer(tmp_path, max_steps=5, callbacks=[Signals(signal.SIGUSR1), StopOnSignal("go on")])
    with pytest.raises(Stopped) as stopped:
        trainer.train()
    assert stopped.value.code == 128 + signal.SIGUSR1
    assert trainer.state.global_step == 2
    assert (tmp_path / "checkpoint-2" / "fastdpo_manifest.json").is_file()
    assert "SIGUSR1: stopped after a save in" in (printed := capfd.readouterr().err)
    assert printed.rstrip().endswith("To continue: go on")
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


def test_a_signal_in_a_save_asks_for_no_second_one(tmp_path):
    saved = []

    class Saves(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if not saved:
                os.kill(os.getpid(), signal.SIGUSR1)
            saved.append(state.global_step)

    often = {"save_strategy": "steps", "save_steps": 2}
    with pytest.raises(Stopped):
        tiny_trainer(tmp_path, max_steps=5, callbacks=[Saves(), StopOnSignal()], **often).train()
    assert saved == [2]


@pytest.mark.parametrize("saves", ["no", "steps"])
def test_a_signal_after_the_last_step_saves_it_once_and_stops(tmp_path, saves):
    saved = []

    class AtTheEnd(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            saved.append(state.global_step)

        def on_train_end(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)

    settings = {"save_strategy": saves, "save_steps": 2, "max_steps": 4}
    with pytest.raises(Stopped) as stopped:
        tiny_trainer(tmp_path, callbacks=[AtTheEnd(), StopOnSignal()], **settings).train()
    assert stopped.value.code == 128 + signal.SIGTERM
    assert saved == ([2, 4] if saves == "steps" else [])
    assert (tmp_path / "checkpoint-4" / "fastdpo_manifest.json").is_file()


def test_without_the_callback_nothing_is_installed(tmp_path):
    seen, before = [], [signal.getsignal(number) for number in SIGNALS]

    class Looks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append([signal.getsignal(number) for number in SIGNALS])

    tiny_trainer(tmp_path, max_steps=1, callbacks=[Looks()]).train()
    assert seen == [before]


def test_a_callback_in_another_thread_is_refused(tmp_path):
    trainer, found = tiny_trainer(tmp_path, max_steps=1, callbacks=[StopOnSignal()]), []

    def train():
        try:
            trainer.train()
        except ValueError as error:
            found.append(str(error))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert found == ["StopOnSignal must be used in the main thread, which alone receives signals"]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_that_data_loader_workers_get_too_ends_the_run_after_a_save(tmp_path, number):
    case = {**NEVER, "dataloader_num_workers": 2, "signal_to_group": True}
    assert train_until(tmp_path, case, number=number) == 128 + number, output(tmp_path)
    assert [path.name for path in tmp_path.glob("out/checkpoint-*")] == ["checkpoint-4"]
    assert output(tmp_path).count(f"{number.name}: the run stops after this step") == 1


def test_a_worker_ends_at_a_later_signal(monkeypatch):
    now, ended = [0.0], []
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signals.os, "_exit", ended.append)
    spared = signals.Spared(None)
    for now[0] in (0.0, 1.0, 3.0):
        spared._terminate(signal.SIGTERM, None)
    assert ended == [128 + signal.SIGTERM]


@pytest.mark.parametrize("number", [SIGNALS[0], *(pytest.param(each, marks=pytest.mark.slow) for each in SIGNALS[1:])])
def test_a_second_signal_ends_the_run_at_once(tmp_path, number):
    status = train_until(tmp_path, {**NEVER, "second_signal": int(number)})
    assert status in (-number, 128 + number)
    assert not any(tmp_path.glob("out/checkpoint-*"))


@pytest.mark.parametrize("has_launcher", [False, True])
def test_a_second_signal_ends_the_process_by_its_default_or_through_a_launchers_handler(monkeypatch, has_launcher):
    """Under a launcher the handler stays: a signal that comes twice within two seconds is one request there."""
    if has_launcher:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    else:
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    now, ended, stop = [0.0], [], StopOnSignal()
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signals.os, "_exit", ended.append)
    with stop.training():
        stop._handle(signal.SIGTERM, None)
        assert [signal.getsignal(number) == signal.SIG_DFL for number in SIGNALS] == [not has_launcher] * 3
        for now[0] in (1.0, 3.0):
            if has_launcher:
                stop._handle(signal.SIGTERM, None)
    assert ended == ([128 + signal.SIGTERM] if has_launcher else [])
    assert stop.received == signal.SIGTERM


def test_the_command_that_continues_holds_no_secret_and_one_checkpoint():
    argv = ["--model", "a model", "--hub_token", "secret", "--resume_from_checkpoint", "x", "--max_steps", "3"]
    assert resume_command("train", argv) == (
        "fastdpo train --model 'a model' --hub_token '<HUB_TOKEN>' --max_steps 3 --resume_from_checkpoint last"
    )
    assert resume_command("sft", ["--resume-from-checkpoint=x"]) == "fastdpo sft --resume_from_checkpoint last"


# Several processes


def stop_one(folder, number):
    """Only one process gets the signal: both save the same step, once, and stop when the first one has said so."""
    rank = int(os.environ["RANK"])
    saved, is_said = [], False

    def say_late(*words, **options):
        time.sleep(0.5)
        (folder / "said").touch()

    signals.print = say_late

    class Saves(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            saved.append(state.global_step)

    sends = [Signals(number, step=3)] if rank == 1 else []
    trainer = tiny_trainer(folder, max_steps=6, callbacks=[*sends, Saves(), StopOnSignal()])
    try:
        trainer.train()
        code = 0
    except Stopped as stopped:
        code, is_said = stopped.code, (folder / "said").exists()
    again = tiny_trainer(folder, max_steps=6)
    again.train(resume_from_checkpoint="last")
    whole = tiny_trainer(folder / "whole", max_steps=6)
    whole.train()
    pairs = zip(again.model.parameters(), whole.model.parameters(), strict=True)
    return {"code": code, "saved": saved, "is_said": is_said, "is_same": all(one.equal(other) for one, other in pairs)}


def test_two_processes_save_once_and_stop_together(tmp_path):
    (of_two,) = on_processes(stop_one, [{"number": int(signal.SIGUSR1)}], tmp_path)
    assert of_two == [{"code": 128 + signal.SIGUSR1, "saved": [3], "is_said": True, "is_same": True}] * 2


# The command


# Started by the launcher's stand-in: saves for a while when it gets SIGTERM
SAVES = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1.0), open(sys.argv[1], "w").write("saved"), sys.exit(143)))
print("ready", flush=True)
time.sleep(60)
"""
# A launcher without patience: it kills its process when it gets SIGTERM, as torchrun does after 30 seconds
LAUNCHES = """
import signal, subprocess, sys
started = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], start_new_session=True)
signal.signal(signal.SIGTERM, lambda *_: (started.kill(), sys.exit(1)))
sys.exit(started.wait())
"""


def test_the_launcher_does_not_hurry_processes_that_save(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    launcher = [sys.executable, "-c", LAUNCHES, SAVES, str(tmp_path / "saved")]
    start = f"import sys; from fastdpo.cli.launch.start import run_signalled; sys.exit(run_signalled({launcher}, None))"
    run = subprocess.Popen([sys.executable, "-c", start], env=environment, stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "ready\n"
    run.send_signal(signal.SIGUSR1)
    assert run.wait(timeout=60) == 128 + signal.SIGUSR1
    assert (tmp_path / "saved").read_text() == "saved"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_stops_says_how_to_go_on_and_goes_on(tmp_path, processes):
    save_model(tmp_path / "model")
    lines = "".join(f"{row}\n".replace("'", '"') for row in make_rows(64))
    (tmp_path / "pairs.jsonl").write_text(lines)
    words = [sys.executable, "-m", "fastdpo", "train", "--model", tmp_path / "model"]
    words += ["--dataset", tmp_path / "pairs.jsonl", "--output_dir", tmp_path / "out", "--use_cpu", "true"]
    words += ["--max_steps", 10**6, "--save_strategy", "no", "--report_to", "none", "--logging_steps", 1]
    words += ["--eval_fraction", 0, *(("--num_processes", 2) if processes == 2 else ())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "0"  # torchrun kills at once what it stops
    printed = (tmp_path / "out.txt").open("w+")
    run = subprocess.Popen(list(map(str, words)), env=environment, stdout=printed, stderr=subprocess.STDOUT)
    end = time.monotonic() + 400
    while "'loss'" not in (tmp_path / "out.txt").read_text() and run.poll() is None and time.monotonic() < end:
        time.sleep(0.2)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=200) == 128 + signal.SIGTERM
    text = (tmp_path / "out.txt").read_text()
    assert "SIGTERM: stopped after a save in" in text
    assert "--resume_from_checkpoint last" in text
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    steps = int(checkpoint.name.removeprefix("checkpoint-")) + 1
    words[words.index(10**6)] = steps
    done = subprocess.run(
        [*map(str, words), "--resume_from_checkpoint", "last"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resumed from {checkpoint}" in done.stdout
