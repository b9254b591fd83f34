"""The politeness recipe end to end on a tiny chat model, its measure, and what it refuses."""

import json

import pytest
from tiny_chat import BLUNT, POLITE, save_chat_model, save_tasks

from recipes.smollm2 import read_tasks
from recipes.smollm2_politeness import run


@pytest.fixture
def words(tmp_path):
    save_tasks(tmp_path / "pairs.json", 20)
    save_chat_model(tmp_path / "model")
    out = ("--size", "tiny", "--output_dir", str(tmp_path / "out"))
    return ["--data", str(tmp_path / "pairs.json"), "--model", str(tmp_path / "model"), *out]


def test_tables_and_answers_of_all_models(words, tmp_path, capsys):
    run.main(words)
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["params"]["method"] for line in lines] == ["start", "dpo", "preferred_ft"]
    first, dpo, _ = lines
    assert (first["kl"], first["win_rate"]) == (0.0, 0.5)
    assert dpo["kl"] > 0
    assert dpo["answers"] == 4
    assert dpo["pairs"] == 6
    assert "right_by_reward" not in first  # its implicit rewards are all 0
    page = (tmp_path / "out" / "page.html").read_text()
    assert "Of the 6 held-out pairs it ranks 6 as labelled, 0 the other way round, and cannot tell 0." in page
    for name in ("start", "Preferred-FT", "DPO, beta = 0.1"):
        assert f'<th scope="row">{name}</th>' in page
    written = (tmp_path / "out" / "method=dpo" / "model" / "adapter_model.safetensors").stat().st_mtime_ns
    run.main(words)  # nothing is left to do
    assert (tmp_path / "out" / "method=dpo" / "model" / "adapter_model.safetensors").stat().st_mtime_ns == written
    assert "Answers to held-out instructions" in capsys.readouterr().out


def test_politeness_counts_courteous_minus_blunt_phrases():
    said = [POLITE.format(3), BLUNT.format(3), "Three.", "Please look it up yourself."]
    assert run.politeness([], said) == [3.0, -2.0, 0.0, -1.0]
    assert run.politeness([], [[{"role": "assistant", "content": said[1]}]]) == [-2.0]  # as judges get messages


def test_rows_whose_answers_are_equal_are_left_out_and_the_order_is_not_the_files(tmp_path):
    tasks = read_tasks(save_tasks(tmp_path / "pairs.json", 20))
    assert len(tasks) == 20
    assert "Same." not in {task.prompt for task in tasks}
    rows = json.loads((tmp_path / "pairs.json").read_text())
    (tmp_path / "pairs.json").write_text(json.dumps(rows[::-1]))
    assert read_tasks(tmp_path / "pairs.json") == tasks
    assert "Add 0 and 1.\n\nNow." in {task.prompt for task in tasks}


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "github.com/rasbt/LLMs-from-scratch, got .*, which does not exist"),
        ('{"a": 1}', "data must be a JSON list of rows"),
        ('[{"prompt": "a", "chosen": "b"}]', "without instruction, input, output, rejected"),
    ],
)
def test_another_file_is_refused(tmp_path, content, word):
    if content is not None:
        (tmp_path / "pairs.json").write_text(content)
    with pytest.raises(ValueError, match=word):
        read_tasks(tmp_path / "pairs.json")


def test_too_few_pairs_are_refused_before_any_work(words, tmp_path):
    save_tasks(tmp_path / "pairs.json", 9)
    with pytest.raises(ValueError, match="data must hold at least 18 pairs for this size, got 9"):
        run.main(words)
