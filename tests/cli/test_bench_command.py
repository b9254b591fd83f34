"""fastdpo bench as a user meets it: tables, JSON lines, a report, exit codes."""

import json

import pytest

from fastdpo.cli.main import main
from fastdpo.evidence.bench import cases
from fastdpo.evidence.bench.heads import measured
from fastdpo.evidence.bench.steps import growth
from fastdpo.evidence.bench.steps.workloads import dataset_rows

TINY = ("--vocab", "211", "--runs", "1", "--max_length", "64", "--pairs", "1")


@pytest.fixture(autouse=True)
def _a_small_model(monkeypatch):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    monkeypatch.setitem(cases.PRESETS, "tiny", {**sizes, "vocab_size": 300})
    monkeypatch.setitem(cases.PROFILES, "hh", cases.Profile(12, 5, 64))


def records_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_head_is_measured_and_each_line_says_on_what(tmp_path, capsys):
    out = tmp_path / "head.jsonl"
    assert main(["bench", "--only", "head", "--quick", "--rows", "64", *TINY, "--out", str(out)]) == 0
    found = records_of(out)
    assert [record["method"] for record in found] == ["plain, response rows", "fastdpo"]
    for record in found:
        assert record["vocab_size"] == 211
        assert record["num_rows"] == 64
        assert record["torch"]
        assert record["device"]
        assert record["ms_min"] <= record["ms"] <= record["ms_max"]
    assert "forward+backward" in capsys.readouterr().out


def test_a_wrong_head_has_its_error_in_the_place_of_a_speed_and_the_exit_code_is_1(monkeypatch, capsys):
    job = measured.job

    def wrong(method, pass_name, problem):
        function = job(method, pass_name, problem)
        if method.name != "fastdpo":
            return function
        return lambda: (1.01 * function()[0], *function()[1:])

    monkeypatch.setattr(measured, "job", wrong)
    assert main(["bench", "--only", "head", "--quick", "--rows", "64", *TINY]) == 1
    assert "values is off by" in capsys.readouterr().out.replace("\n", " ")


def test_a_sweep_prints_slopes_and_predicts_from_shared_tokens(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, report = tmp_path / "sweep.jsonl", tmp_path / "sweep.html"
    assert main(["bench", "--sweep", "responses", *TINY, "--out", str(out), "--report", str(report)]) == 0
    found = records_of(out)
    assert sorted({record["x"] for record in found}) == [2, 4, 8, 16]
    assert {record["method"] for record in found} == {"plain, response rows", "fastdpo", "fastdpo, unshared"}
    assert all(0 < record["results_mib"] < record["peak_mib"] for record in found)
    assert all(record["cpu_ms"] > 0 for record in found)
    printed = " ".join(capsys.readouterr().out.split())
    assert "slopes on a log-log scale" in printed
    assert "x raw/unique tokens, through 4 points" in printed
    assert "Growth of the step" in report.read_text()


@pytest.mark.slow
def test_a_sweep_of_the_vocabulary_has_head_and_step(tmp_path, monkeypatch):
    monkeypatch.setitem(growth.VOCABULARIES, "llama3", 512)
    out = tmp_path / "sweep.jsonl"
    assert main(["bench", "--sweep", "vocab", "--rows", "32", *TINY, "--out", str(out)]) == 0
    found = records_of(out)
    assert sorted({record["x"] for record in found if "workload" not in record}) == [64, 128, 256, 512]
    assert sorted({record["x"] for record in found if "workload" in record}) == [64, 128, 256, 512]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--profile", "short"], "profile must be one of hh, ultrafeedback, long, got 'short'"),
        (["--vocab", "x"], "vocab must be one of llama3, qwen3, gemma3 or a number of at least 8, got 'x'"),
        (["--runs", "0"], "runs must be at least 1, got 0"),
        (["--rows", "3"], "rows must be at least 16, got 3"),
        (["--steps", "1"], "steps must be at least 2"),
        (["--model", "./no_such_folder"], "no_such_folder"),
        (["--dataset", "no_such_file.jsonl"], "no_such_file.jsonl"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(options, message, capsys):
    assert main(["bench", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_data_of_any_form_become_texts(tmp_path):
    said = [{"role": "user", "content": "Hi"}]
    ends = [[{"role": "assistant", "content": text}] for text in ("Hello.", "No.", "Yes.")]
    files = {
        "messages": [{"chosen": said + ends[0], "rejected": said + ends[1]}],
        "ranked": [{"prompt": said, "responses": ends, "ranks": [1, 3, 2]}],
        "texts": [{"prompt": "Hi", "chosen": "a", "rejected": "b"}, {"prompt": "Hi", "chosen": "a", "rejected": "a"}],
    }
    found = {}
    for name, rows in files.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found[name] = [tuple(row.values()) for row in dataset_rows(str(path))]
    hello, no, yes = ("assistant: Hello.\n", "assistant: No.\n", "assistant: Yes.\n")
    assert found["messages"] == [("user: Hi\n", hello, no)]
    assert sorted(found["ranked"]) == sorted(("user: Hi\n", *pair) for pair in ((hello, yes), (hello, no), (yes, no)))
    assert found["texts"] == [("Hi", "a", "b")]


def test_data_without_a_usable_pair_are_refused(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"}) + "\n")
    assert main(["bench", "--dataset", str(path)]) == 2
    assert "dataset must hold a usable pair with a prompt, got none" in capsys.readouterr().err


@pytest.mark.slow
def test_steps_of_a_dataset_agree_with_a_plain_loop(tmp_path):
    path, out = tmp_path / "rows.jsonl", tmp_path / "steps.jsonl"
    rows = [{"prompt": f"number {i} ", "chosen": f"it is {i}", "rejected": f"it was {i + 1}"} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["bench", "--only", "steps", "--quick", "--dataset", str(path), "--pairs", "2", "--vocab", "300"]
    assert main([*command, "--out", str(out)]) == 0
    found = {record["method"]: record for record in records_of(out)}
    assert {"plain, response rows", "fastdpo"} <= set(found)
    assert found["fastdpo"]["pairs_per_s"] > 0
    assert found["fastdpo"]["loss_off"] < 1e-4
