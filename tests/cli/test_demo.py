"""The demo at reduced size: what it finds, what it writes, what it refuses."""

import dataclasses
import io
import json
import re

import pytest
from rich.console import Console

from fastdpo.alignment.task import SIZES
from fastdpo.cli import demo
from fastdpo.cli.demo import DEMO_FILE, DemoOptions, run_demo
from fastdpo.report import plots


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run too short to show what theory predicts: its result, its directory and what it printed."""
    tiny = {"num_train_prompts": 96, "num_heldout_prompts": 48, "num_pairs": 128, "hidden_size": 32, "num_layers": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "small", dataclasses.replace(SIZES["small"], **tiny, sft_epochs=2))
        return small_run(tmp_path_factory)


def small_run(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("demo") / "run"
    printed = io.StringIO()
    sweep = run_demo(DemoOptions(str(output_dir), size="small"), Console(file=printed, width=80))
    return sweep, output_dir, printed.getvalue()


@pytest.mark.slow
def test_every_ordering_that_theory_predicts_holds_by_more_than_two_standard_errors(tmp_path_factory):
    sweep, _, printed = small_run(tmp_path_factory)
    failing = [(ordering.claim, ordering.num_stderrs) for ordering in sweep.orderings() if not ordering.holds]
    assert failing == []
    assert len(sweep.orderings()) == 8
    assert len(sweep.reference.samples) == sweep.num_heldout_pairs == 1024
    assert printed.count("holds ") == 8
    assert sweep.num_train_pairs == 2048


def test_heldout_prompts_were_in_no_training_pair(finished):
    sweep, output_dir, _ = finished
    pairs, heldout = (
        [json.loads(line) for line in (output_dir / name).read_text().splitlines()]
        for name in ("pairs.jsonl", "heldout_pairs.jsonl")
    )
    assert len(pairs) == 128
    assert sweep.num_train_pairs == sum(bool(row["chosen"] and row["rejected"]) for row in pairs)
    seen = {row["prompt"] for row in pairs}
    assert seen.isdisjoint(row["prompt"] for row in heldout)
    assert seen.isdisjoint(sweep.reference.samples.prompts)


def test_the_printed_table_and_the_report_show_the_same_figures(finished):
    sweep, output_dir, printed = finished
    page = (output_dir / "report.html").read_text(encoding="utf-8")
    for model in sweep.models:
        assert model.name in printed
        assert model.reward.text() in printed
        assert model.reward.text() in page
        assert model.beta is None or model.kl.text() in page
    assert str(output_dir / "report.html") in printed.replace("\n", "")
    for ordering in sweep.orderings():
        assert f"{ordering.num_stderrs:.1f}" in printed


def test_the_report_has_every_part_and_stands_alone(finished):
    page = (finished[1] / "report.html").read_text(encoding="utf-8")
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == [
        "In short",
        "Results on held-out prompts",
        "True reward against KL",
        "Training",
        "What the models write",
        "Does theory hold?",
        "How it was done",
        "This run",
    ]
    assert page.count("data:image/svg+xml") == 4  # the frontier, and a curve for each of three metrics
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_the_saved_models_load_and_differ(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output_dir = finished[1]
    tokenizer = AutoTokenizer.from_pretrained(output_dir / "reference")
    text = "We booked the city hostel in March. The bed was great."
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    heads = [
        AutoModelForCausalLM.from_pretrained(output_dir / name).get_output_embeddings().weight
        for name in ("reference", "policy-beta-0.1", "policy-beta-0.3", "policy-beta-1")
    ]
    assert len({head.detach().numpy().tobytes() for head in heads}) == 4


def test_a_second_demo_may_replace_the_first(finished):
    options = DemoOptions(str(finished[1]))
    assert demo._checked_output_dir(options) == finished[1]


@pytest.mark.parametrize("exists", [True, False])
def test_a_new_or_empty_directory_is_accepted(tmp_path, exists):
    output_dir = tmp_path / "run"
    if exists:
        output_dir.mkdir()
    assert demo._checked_output_dir(DemoOptions(str(output_dir))) == output_dir


def test_a_directory_with_other_files_is_refused_unless_told_to(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"output_dir must .*got .*--overwrite"):
        run_demo(DemoOptions(str(tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    assert demo._checked_output_dir(DemoOptions(str(tmp_path), overwrite=True)) == tmp_path


def test_a_file_in_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match=r"output_dir must .*got the file"):
        run_demo(DemoOptions(str(tmp_path / "run"), overwrite=True))


def test_a_missing_matplotlib_is_reported_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "fastdpo\[plots\]"'):
        run_demo(DemoOptions(str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_options_are_parsed_with_hyphens_and_underscores():
    assert demo._parse(["--output-dir", "x", "--size=small", "--seed", "3"]) == DemoOptions("x", "small", 3)
    assert demo._parse(["--output_dir", "x", "--overwrite"]) == DemoOptions("x", overwrite=True)
    assert demo._parse([]) == DemoOptions("demo_run")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--size", "huge"], "size.*invalid choice: 'huge'"),
        (["--seed", "x"], "seed.*invalid int value: 'x'"),
        (["--seed", "-1"], "seed must be at least 0, got -1"),
        (["--sizes", "small"], "unknown option '--sizes'"),
        (["extra"], "unknown option 'extra'"),
    ],
)
def test_options_that_cannot_work_are_refused(argv, message):
    with pytest.raises(ValueError, match=message):
        demo._parse(argv)


def test_the_record_holds_the_figures_and_the_training_curves(finished):
    sweep, output_dir, _ = finished
    record = json.loads((output_dir / DEMO_FILE).read_text())
    assert [model["beta"] for model in record["models"]] == [None, 0.1, 0.3, 1.0]
    assert record["models"][1]["kl"]["mean"] == sweep.policies[0].kl.mean
    assert any("rewards/margins" in entry for entry in record["models"][1]["log_history"])
    assert 0.5 < record["label_ceiling"] < 1
    assert record["num_train_pairs"] == sweep.num_train_pairs
    assert record["orderings"] == {ordering.claim: ordering.num_stderrs for ordering in sweep.orderings()}
    assert record["seconds"] > 0
