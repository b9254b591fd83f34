"""The recipe end to end at its tiny size, and what makes its comparison fair."""

import json

import pytest

from recipes.commands import train_prompts
from recipes.frontiers import differences
from recipes.iterated_rounds import run as recipe
from recipes.iterated_rounds.run import METHODS, by_round, main, pair_facts, pairs_table, table
from recipes.sentiment import task_of

LINES = [
    {"params": {"method": "reference", "seed": seed}, "reward": 1.0, "kl": 0.0, "accuracy": 0.5} for seed in "01"
] + [
    {
        "params": {"method": method, "beta": "0.3", "seed": seed},
        "reward": reward + int(seed),
        "kl": 1.0,
        "accuracy": 0.7,
        "pairs": [{"number": 45, "distance": 1.0 + int(seed), "agreeing": 0.75}] * (2 if method == "rounds" else 1),
        "path": [{"kl": 0.5, "reward": 1.5}, {"kl": 1.0, "reward": reward + int(seed)}],
    }
    for method, reward in (("offline", 2.0), ("parts", 1.8), ("rounds", 2.5))
    for seed in "01"
]


def test_the_table_compares_rounds_with_offline_at_equal_kl():
    found = table(LINES)
    assert found.columns == ("KL", "offline", "offline, in parts", "in rounds")
    assert found.rows[-1] == ["1", "2.50 ± 0.50", "2.30 ± 0.50", "3.00 ± 0.50"]
    assert differences(LINES, METHODS, "offline").rows[-1] == ["1", "-0.20 ± 0.00", "+0.50 ± 0.00"]


def test_the_pairs_of_every_round_are_described(tmp_path):
    assert pairs_table(LINES).rows == [
        ["offline", "45", "1.50 ± 0.50", "0.750 ± 0.000"],
        ["in rounds, round 1", "45", "1.50 ± 0.50", "0.750 ± 0.000"],
        ["in rounds, round 2", "45", "1.50 ± 0.50", "0.750 ± 0.000"],
    ]
    rows = [(" was good.", " was bland."), (" was bland.", " was usual."), (" was good.", " was nice.")]
    lines = [json.dumps({"prompt": "p", "chosen": chosen, "rejected": rejected}) for chosen, rejected in rows]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    facts = pair_facts(tmp_path / "pairs.jsonl")  # differences of true rewards: 3.2, -1.6 and 0
    assert facts == {"number": 3, "distance": pytest.approx(1.6), "agreeing": 0.5}


def test_the_rounds_are_listed_in_order():
    assert by_round(LINES).rows == [
        ["beta 0.3, round 1", "1.50 ± 0.00", "0.50 ± 0.00"],
        ["beta 0.3, round 2", "3.00 ± 0.50", "1.00 ± 0.00"],
    ]


@pytest.mark.slow
def test_the_recipe_runs_end_to_end_with_as_many_pairs_and_steps_on_both_sides(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(recipe.SEEDS, "tiny", (0, 1))
    words = ["--size", "tiny", "--output_dir", str(tmp_path)]
    main(words)
    assert "in rounds" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["params"]["method"] for line in lines] == ["reference", "offline", "parts", "rounds"] * 2
    prompts = train_prompts(task_of("tiny", 1, tmp_path))[:24]
    for offline, parts, rounds in (lines[1:4], lines[5:8]):
        assert 40 <= offline["pairs"][0]["number"] <= 48  # two draws for 24 prompts; equal answers make no pair
        assert all(20 <= facts["number"] <= 24 for facts in rounds["pairs"])
        assert [len(line["path"]) for line in (offline, parts, rounds)] == [1, 2, 2]
        assert sum(facts["number"] for facts in parts["pairs"]) == offline["pairs"][0]["number"]
    folder = tmp_path / "method=rounds,beta=0.3,seed=1" / "rounds"
    pairs = [json.loads(line) for line in (folder / "round_2" / "pairs.jsonl").read_text().splitlines()]
    assert {pair["prompt"] for pair in pairs} <= set(prompts)
    assert pairs[0]["model"] == str(folder / "round_1" / "model")
    trained = json.loads((folder / "round_2" / "manifest.json").read_text())["trained"]
    assert trained["reference"] == str(tmp_path / "task_seed_1" / "reference")
    assert trained["start"] == str(folder / "round_1" / "model")
    written = (folder / "round_2" / "model" / "model.safetensors").stat().st_mtime_ns
    main(words)
    assert (folder / "round_2" / "model" / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.slow
def test_a_run_that_was_stopped_in_a_round_goes_on_with_it(tmp_path, monkeypatch):
    """The whole run and the stopped one give the same figures."""
    monkeypatch.setitem(recipe.SEEDS, "tiny", (0,))
    monkeypatch.setattr(recipe, "finish", lambda *args: None)
    monkeypatch.setattr(recipe, "sections", lambda lines: [])
    main(["--size", "tiny", "--output_dir", str(tmp_path / "whole")])

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(recipe, "measured_model", stop)
        with pytest.raises(KeyboardInterrupt):
            main(["--size", "tiny", "--output_dir", str(tmp_path / "stopped")])
    main(["--size", "tiny", "--output_dir", str(tmp_path / "stopped")])
    whole, stopped = (
        [json.loads(line) for line in (tmp_path / name / "results.jsonl").read_text().splitlines()]
        for name in ("whole", "stopped")
    )
    assert [line["reward"] for line in whole] == [line["reward"] for line in stopped]
    assert [line["kl"] for line in whole] == pytest.approx([line["kl"] for line in stopped], abs=1e-6)
