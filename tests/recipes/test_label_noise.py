"""The recipe of flipped labels end to end at its tiny size, and which labels it flips."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastdpo.training.callbacks.json_lines import read_lines
from recipes.label_noise.run import differences, flipped, main, table

ROWS = [{"prompt": str(i), "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(1000)]


def is_flipped(row):
    return row["chosen"].startswith("bad")


def test_the_share_of_labels_is_flipped_and_larger_shares_flip_the_same_and_more():
    some, more = (flipped(ROWS, share, seed=0) for share in (0.1, 0.4))
    assert 70 < sum(map(is_flipped, some)) < 130
    assert 350 < sum(map(is_flipped, more)) < 450
    assert all(is_flipped(b) for a, b in zip(some, more, strict=True) if is_flipped(a))
    assert flipped(ROWS, 0.0, seed=0) == ROWS
    assert flipped(ROWS, 0.1, seed=1) != some
    assert [row["prompt"] for row in more] == [row["prompt"] for row in ROWS]


def test_losses_are_compared_within_a_seed():
    results = [
        {"params": {"flipped": "0.4", "loss": loss, "seed": seed}, "reward": reward}
        for loss, of in {"sigmoid": (1.0, 2.0), "cDPO": (1.5, 2.7), "robust": (0.0, 1.0)}.items()
        for seed, reward in zip("01", of, strict=True)
    ]
    found = differences(results, "0.4", "reward")
    assert list(found) == ["cDPO", "robust"]
    assert (found["cDPO"].mean, found["cDPO"].stderr) == (pytest.approx(0.6), pytest.approx(0.1))
    assert (found["robust"].mean, found["robust"].stderr) == (-1.0, 0.0)


@pytest.mark.slow
def test_the_recipe_trains_every_loss_at_every_share_and_writes_its_page(tmp_path):
    main(["--size", "tiny", "--output_dir", str(tmp_path)])
    results = read_lines(tmp_path / "results.jsonl")
    found = [(line["params"]["flipped"], line["params"]["loss"]) for line in results]
    assert found == 2 * [("0", "sigmoid"), ("0.4", "sigmoid"), ("0.4", "cDPO"), ("0.4", "robust")]
    assert len({line["kl"] for line in results}) == 8  # labels and loss both change what is trained
    assert [row[0] for row in table(results).rows] == ["0%, all three", "40%, sigmoid", "40%, cDPO", "40%, robust"]
    assert "with 40% of the labels flipped" in (tmp_path / "page.html").read_text()
    assert (tmp_path / "plot_3.svg").is_file()


@pytest.mark.slow
def test_a_recipe_that_was_killed_continues_and_ends_in_the_same_results(tmp_path):
    script = Path(__file__).parents[2] / "recipes" / "label_noise" / "run.sh"

    def command(folder):
        return ["bash", str(script), "--size", "tiny", "--output_dir", str(tmp_path / folder)]

    environment = {**os.environ, "PYTHON": sys.executable}
    killed = subprocess.Popen(command("killed"), env=environment, cwd=tmp_path, start_new_session=True)
    while len(read_lines(tmp_path / "killed" / "results.jsonl")) < 3:
        assert killed.poll() is None
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    before = (tmp_path / "killed" / "results.jsonl").read_bytes()
    for folder in ("killed", "whole"):
        subprocess.run(command(folder), env=environment, cwd=tmp_path, check=True)
    assert (tmp_path / "killed" / "results.jsonl").read_bytes().startswith(before)
    first, second = (read_lines(tmp_path / folder / "results.jsonl") for folder in ("killed", "whole"))
    assert len(first) == 8
    assert [{**line, "cpu_seconds": 0} for line in first] == [{**line, "cpu_seconds": 0} for line in second]
