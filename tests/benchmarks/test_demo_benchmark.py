"""The README shows what `fastdpo demo` has printed, by its record."""

import json
from types import SimpleNamespace

import bench_demo as bench
import pytest
from shared.pages import part

from fastdpo.evidence.bench.records import read


def test_the_readme_says_what_the_record_says():
    assert part(bench.README.read_text(), bench.RESULTS.name) == bench.part(read(bench.RESULTS))


def estimate(mean, stderr=0.01):
    return {"mean": mean, "stderr": stderr}


def written(seed):
    """What the demo writes, as far as the benchmark reads it."""
    log = [{"step": 12}, {"step": 48}]
    figures = [{"accuracy": estimate(0.5), "margin": estimate(0.0), "reward": estimate(1.0), "kl": estimate(0.0)}]
    figures.append(
        {"accuracy": estimate(0.75), "margin": estimate(1.5), "reward": estimate(2.0), "kl": estimate(3.25 + seed)}
    )
    models = [
        {"model": "x", "beta": beta, "log_history": history, **of}
        for (beta, history), of in zip([(None, []), (0.1, log)], figures, strict=True)
    ]
    facts = {"num_train_pairs": 96, "num_heldout_pairs": 1024, "label_ceiling": 0.8, "orderings": {}, "seconds": 61.7}
    return {"options": {}, **facts, "models": models}


@pytest.fixture
def no_demo(monkeypatch, tmp_path):
    """Writes at once what a demo would, and keeps the project's files."""

    def run(command, **kwargs):
        output_dir = bench.Path(command[command.index("--output_dir") + 1])
        output_dir.mkdir(parents=True)
        seed = int(command[command.index("--seed") + 1])
        (output_dir / bench.DEMO_FILE).write_text(json.dumps(written(seed)))

    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "demo.jsonl")
    monkeypatch.setattr(bench, "README", tmp_path / "README.md")
    bench.README.write_text("# x\n\n<!-- table: demo.jsonl -->\nold\n<!-- end -->\n")


def test_what_the_demo_wrote_becomes_the_part_and_the_record(no_demo, capsys):
    assert bench.main(["--write"]) == 0
    lines = part(bench.README.read_text(), "demo.jsonl").splitlines()
    assert "This took 62 s on " in " ".join(lines)
    assert ": 48 steps for each beta, 1,024 held-out prompts, ± one standard error." in " ".join(lines)
    assert "| reference | 0.500 ± 0.010 | 0 | 1.00 ± 0.01 | 0 |" in lines
    assert "| DPO, beta = 0.1 | 0.750 ± 0.010 | 1.50 ± 0.01 | 2.00 ± 0.01 | 3.25 ± 0.01 |" in lines
    assert "with `--seed 1`, KL 4.25, reward 2.00." in " ".join(lines)
    assert [record["models"][1]["steps"] for record in read(bench.RESULTS)] == [48, 48]
    before = bench.README.read_text()
    assert bench.main(["--docs"]) == 0
    assert bench.README.read_text() == before


def test_only_a_full_demo_is_written(no_demo, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--write", "--size", "small"])
    assert "--write must go with --size full" in capsys.readouterr().err
