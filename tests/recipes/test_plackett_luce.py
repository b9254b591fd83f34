"""The recipe end to end at its tiny size, and the forms of one ranking."""

import json

import pytest

from recipes.frontiers import differences
from recipes.plackett_luce.run import METHODS, best_worst, compute_table, main, num_epochs, table
from recipes.sentiment import TASK_SIZES


def test_the_best_and_the_worst_answer_of_a_ranking_are_its_pair(tmp_path):
    rankings = tmp_path / "rankings.jsonl"
    rows = [
        {"prompt": "p", "responses": [" a", " b", " c"], "scores": [0.1, -2.0, 3.0]},
        {"prompt": "q", "responses": [" d", " e"], "scores": [5.0, 4.0]},
    ]
    rankings.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [json.loads(line) for line in best_worst(rankings).read_text().splitlines()]
    assert pairs == [
        {"prompt": "p", "chosen": " c", "rejected": " b"},
        {"prompt": "q", "chosen": " d", "rejected": " e"},
    ]


def test_the_same_compute_is_as_many_epochs_as_two_of_k_answers_leave_out():
    class Task:
        size = TASK_SIZES["small"]

    assert num_epochs(Task, "best_worst", 4) == 1
    assert num_epochs(Task, "best_worst_more", 4) == 2
    assert num_epochs(Task, "plackett_luce", 4) == 1


def line(method, seed, kl=0.0, reward=0.0, **more):
    params = {"method": method, **({} if method == "reference" else {"beta": "1"}), "seed": seed}
    return {"params": params, "kl": kl, "reward": reward, "accuracy": 0.5, **more}


def test_the_tables_compare_every_form_with_plackett_luce_and_state_the_compute():
    rewards = {"plackett_luce": 3.0, "all_pairs": 2.5, "best_worst": 2.0, "best_worst_more": 3.5}
    lines = [line("reference", seed, reward=1.0) for seed in "01"]
    for method, reward in rewards.items():
        cost = {"steps": 8, "trained_tokens": 4000, "cpu_seconds": 2.0}
        lines += [line(method, seed, kl=1.0, reward=reward + int(seed), **cost) for seed in "01"]
    assert table(lines).rows[-1] == ["1", "3.50 ± 0.50", "3.00 ± 0.50", "2.50 ± 0.50", "4.00 ± 0.50"]
    less = differences(lines, METHODS, base="plackett_luce").rows[-1]
    assert less == ["1", "-0.50 ± 0.00", "-1.00 ± 0.00", "+0.50 ± 0.00"]
    assert compute_table(lines).rows[0] == ["Plackett-Luce", "8", "4", "2.0"]


@pytest.mark.slow
def test_the_recipe_runs_end_to_end_on_the_same_answers(tmp_path, capsys):
    words = ["--size", "tiny", "--output_dir", str(tmp_path)]
    main(words)
    assert "Plackett-Luce" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    methods = ["reference", "plackett_luce", "all_pairs", "best_worst", "best_worst_more"]
    assert [line["params"]["method"] for line in lines] == methods * 2
    of = {line["params"]["method"]: line for line in lines[5:]}
    assert of["plackett_luce"]["trained_tokens"] == of["all_pairs"]["trained_tokens"]
    assert of["best_worst_more"]["trained_tokens"] == pytest.approx(1.5 * of["best_worst"]["trained_tokens"], abs=1)
    assert of["plackett_luce"]["kl"] != of["all_pairs"]["kl"]  # another loss on the same rows
    rows = [json.loads(line) for line in (tmp_path / "task_seed_0" / "rankings_of_3.jsonl").read_text().splitlines()]
    assert len(rows) == 48
    assert all(2 <= len(row["responses"]) <= 3 for row in rows)
    assert rows[0]["judge"] == "recipes.judges:bradley_terry"
    pairs = (tmp_path / "task_seed_0" / "best_worst_rankings_of_3.jsonl").read_text().splitlines()
    assert len(pairs) == 48
