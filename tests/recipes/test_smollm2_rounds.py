"""The rounds recipe end to end on a tiny chat model, and its judge."""

import json

import pytest
from tiny_chat import save_chat_model, save_tasks

from recipes.smollm2_rounds import judge, run


@pytest.fixture
def words(tmp_path):
    save_tasks(tmp_path / "pairs.json", 20)
    save_chat_model(tmp_path / "model")
    out = ("--size", "tiny", "--output_dir", str(tmp_path / "out"))
    return ["--data", str(tmp_path / "pairs.json"), "--model", str(tmp_path / "model"), *out]


@pytest.mark.slow
def test_pairs_rounds_and_ranking_follow_each_other(words, tmp_path, monkeypatch, capsys):
    # a random model shares no word with an answer: every pair of answers would be a tie
    monkeypatch.setattr(judge, "f1", lambda answer, right: len(answer.encode()) / 100)
    run.main(words)
    generated, iterated, ranked = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").open()]
    assert 1 <= generated["pairs"] <= 4
    assert [manifest["metrics"]["kl"] > 0 for manifest in iterated["history"]] == [False, True, True]
    assert set(ranked["ratings"]) == {"start", "round_1", "round_2"}
    page = (tmp_path / "out" / "page.html").read_text()
    for name in ("start", "round 1", "round 2"):
        assert f'<th scope="row">{name}</th>' in page
    assert "Ranked on judged pairs" in page
    written = (tmp_path / "out" / "ratings.jsonl").stat().st_mtime_ns
    run.main(words)  # nothing is left to do
    assert (tmp_path / "out" / "ratings.jsonl").stat().st_mtime_ns == written
    assert "After each round" in capsys.readouterr().out


def test_the_judge_counts_shared_words():
    assert judge.f1("The answer is 4.", "4") == pytest.approx(2 * 1 / 5)
    assert judge.f1("45 kilometers", "45 Kilometers.") == 1.0
    assert judge.f1("a a a", "a b") == pytest.approx(2 * 1 / 5)  # each word as often as both have it
    assert judge.f1("", "") == 0.0
    judge.learn({"2+2?": "4"})
    chat = [[{"role": "user", "content": "2+2?"}], [{"role": "user", "content": "Unknown?"}]]
    assert judge.agreement(chat, [[{"role": "assistant", "content": "4"}]] * 2) == [1.0, None]
    assert judge.agreement(["2+2?"], ["5"]) == [0.0]


def test_a_rating_without_any_win_is_named():
    def of(wins, rating):
        shares = {"accuracy_sum": 0.5, "accuracy_sum_lower": 0.25, "accuracy_sum_upper": 0.75}
        span = {"rating": rating, "rating_lower": rating, "rating_upper": rating}
        return {**shares, **span, "wins": wins, "losses": wins}

    def rows(*ratings):
        return run.ranking_table([{}, {}, {"ratings": dict(zip(("start", "round_1"), ratings, strict=True))}]).rows

    assert rows(of(0, 1000.0), of(0, 1000.0))[0] == ["start", "50% (25% to 75%)", "ties only"]
    assert rows(of(1, 990.0), of(1, 1010.0))[1] == ["round 1", "50% (25% to 75%)", "1010 (1010 to 1010)"]
    assert rows(of(1, None), of(1, None))[0][2] == "none"  # one model wins every comparison
