"""Commands on a tiny model and a handful of rows."""

import json

import tiny
from tiny import make_rows

from fastdpo.cli.main import main


def save_model(path):
    return tiny.save_model(path, vocab_size=64)


def save_rows(path, num_rows=16, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(num_rows, seed)))
    return path


def run(capsys, *arguments):
    """Exit code, and everything printed."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


SHORT = {
    "use_cpu": True,
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "disable_tqdm": True,
    "save_strategy": "no",
    "report_to": "none",
}


def short(*more):
    """Options of a run of one step."""
    return [word for name, value in SHORT.items() for word in (f"--{name}", str(value))] + [str(word) for word in more]


def options_of(output_dir):
    """What a run has written down of itself."""
    return json.loads((output_dir / "fastdpo_run.json").read_text())
