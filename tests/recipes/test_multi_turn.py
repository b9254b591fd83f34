"""Pairs inside conversations, and the recipe end to end on small files in the forms of the public sets."""

import gzip
import json

import pytest
import torch
from tiny import make_llama

from fastdpo.alignment.sweep import pair_logps
from fastdpo.data.prepare import prepare_preference_dataset
from fastdpo.data.tokens.tokenization import TokenizationSettings
from recipes.multi_turn.dialogues import Dialogue, files_of, read_dialogues
from recipes.multi_turn.run import facts, main, mean_of, share, train_tokenizer

WORDS = "red blue green small big old new warm cold quick slow calm loud soft hard kind".split()  # noqa: SIM905


def said(role, text, *replies, rank=None):
    return {"role": role, "text": text, "rank": rank, "replies": list(replies)}


def tree(number):
    """Three ranked answers: the first two go on, and the continuation of the first has two ranked answers."""
    word = WORDS[number % len(WORDS)]
    on = said("prompter", f"and {word} more?", said("assistant", "more", rank=1), said("assistant", "most", rank=0))
    answers = [
        said("assistant", f"{word} best", said("prompter", "no answer to this"), on, rank=0),
        said("assistant", f"{word} second", said("prompter", "go on", said("assistant", "on", rank=0)), rank=1),
        said("assistant", f"{word} last", rank=2),
    ]
    return {
        "message_tree_id": number,
        "tree_state": "ready",
        "prompt": said("prompter", f"what is {number}?", *answers),
    }


@pytest.fixture
def data(tmp_path):
    """A folder with all three sets."""
    folder = tmp_path / "data"
    folder.mkdir()
    trees = "".join(json.dumps(tree(number)) + "\n" for number in range(6))
    (folder / "en_100_tree.jsonl.gz").write_bytes(gzip.compress(trees.encode()))
    rows = [
        {
            "conversations": [
                {"from": "system", "value": "be kind"},
                {"from": "human", "value": f"question {number}"},
                {"from": "gpt", "value": f"answer {word}"},
                {"from": "human", "value": "and then?"},
            ],
            "chosen": {"from": "gpt", "value": f"then {word} {word}"},
            "rejected": {"from": "gpt", "value": f"then {word}"},
        }
        for number, word in enumerate(WORDS)
    ]
    (folder / "dpo_en_demo.json").write_text(json.dumps(rows))
    start = "\n\nHuman: hello {}\n\nAssistant: hi\n\nHuman: how are you?\n\nAssistant:"
    lines = [{"chosen": f"{start} fine".format(w), "rejected": f"{start} {w}".format(w)} for w in WORDS]
    (folder / "harmless.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder


def contents(messages):
    return [message["content"] for message in messages]


def test_every_two_ranked_answers_of_a_tree_are_a_pair_at_any_depth(data):
    pairs = [d for d in read_dialogues(data) if d.data_set == "OpenAssistant trees"][:4]
    assert [(d.chosen[0]["content"], d.rejected[0]["content"]) for d in pairs] == [
        ("red best", "red second"), ("red best", "red last"), ("red second", "red last"), ("most", "more"),
    ]  # fmt: skip
    assert contents(pairs[3].history) == ["what is 0?", "red best", "and red more?"]
    assert {d.conversation for d in pairs} == {("OpenAssistant trees", "what is 0?")}


def test_a_branch_goes_on_only_beside_another_that_does(data):
    first, second, *_ = (d for d in read_dialogues(data) if d.data_set == "OpenAssistant trees")
    assert contents(first.chosen) == ["red best", "and red more?", "most"]  # the reply without an answer is skipped
    assert contents(first.rejected) == ["red second", "go on", "on"]
    assert (len(second.chosen), len(second.rejected)) == (1, 1)
    assert contents(first.last_turn()["chosen"]) == ["red best"]
    assert contents(first.all_turns()["chosen"]) == ["red best", "and red more?", "most"]


def test_all_turns_begin_with_the_first_of_the_assistant_and_the_last_turn_is_one_answer(data):
    dialogue = next(d for d in read_dialogues(data) if d.data_set == "LLaMA-Factory, English")
    last, whole = dialogue.last_turn(), dialogue.all_turns()
    assert contents(last["prompt"]) == ["be kind", "question 0", "answer red", "and then?"]
    assert contents(last["chosen"]) == ["then red red"]
    assert contents(whole["prompt"]) == ["be kind", "question 0"]
    assert contents(whole["rejected"]) == ["answer red", "and then?", "then red"]


def test_turns_that_both_sides_share_cancel_in_the_margin(data):
    """So training on all turns differs from the last turn only where branches go on."""
    dialogues = [d for d in read_dialogues(data) if len(d.history) > 1]
    tokenizer = train_tokenizer(dialogues, 300)
    model = make_llama(len(tokenizer)).double()
    margins = []
    for rows in ([d.last_turn() for d in dialogues], [d.all_turns() for d in dialogues]):
        dataset, report = prepare_preference_dataset(rows, tokenizer, TokenizationSettings(max_length=None))
        assert report.num_kept == len(dialogues)
        chosen, rejected = pair_logps(model, dataset)
        margins.append(chosen - rejected)
    assert margins[0].abs().min() > 1e-3
    torch.testing.assert_close(margins[0], margins[1], rtol=1e-6, atol=1e-6)


def test_the_facts_count_what_sharing_saves(data):
    dialogues = [d for d in read_dialogues(data) if d.data_set == "LLaMA-Factory, English"]
    found = facts(dialogues, train_tokenizer(dialogues, 300))
    assert (found["conversations"], found["pairs"], found["branches"]) == (16, 16, 0)
    assert (found["messages_median"], found["messages_max"]) == (5, 5)
    assert found["computed_last"] == found["computed_all"] < 0.8 * found["tokens"]  # either way the history runs once
    assert found["counted_all"] > found["counted_last"]


def test_intervals_take_pairs_of_a_conversation_as_dependent():
    apart = [{"conversation": n, "margin": 1.0 if n % 2 else -1.0} for n in range(40)]
    together = [{**pair, "conversation": n // 2 % 2} for n, pair in enumerate(sorted(apart, key=lambda p: p["margin"]))]
    assert share(apart).rate == share(together).rate == 0.5
    values = [pair["margin"] for pair in apart]
    assert mean_of(values, apart).stderr == pytest.approx(1 / 40**0.5)
    alike = [{"conversation": n // 4} for n in range(40)]
    repeated = [values[n // 4] for n in range(40)]
    assert mean_of(repeated, alike).stderr == pytest.approx(1 / 10**0.5)  # ten conversations of four equal pairs


def test_a_folder_without_the_files_is_told_where_they_come_from(tmp_path):
    with pytest.raises(ValueError, match="data must be a folder with at least one of these files") as raised:
        files_of(tmp_path)
    assert "https://github.com/hiyouga/LLaMA-Factory, data/dpo_en_demo.json" in str(raised.value)


def test_a_pair_knows_its_conversation_by_the_first_message_of_the_user():
    history = ({"role": "system", "content": "s"}, {"role": "user", "content": "u"})
    assert Dialogue("set", history, (), ()).conversation == ("set", "u")


def test_the_recipe_runs_end_to_end_and_does_nothing_twice(data, tmp_path, capsys):
    words = ["--data", str(data), "--size", "tiny", "--output_dir", str(tmp_path / "out")]
    main(words)
    printed = capsys.readouterr().out
    assert "after: DPO, last turn" in printed
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["params"]["run"] for line in lines] == ["data", "sft", "last", "all", "sft", "last", "all"]
    held_out = [len(line["pairs"]) for line in lines if line["params"]["run"] == "last"]
    assert sum(held_out) == 16 + 16 + 6 * 4  # every pair is held out once
    page = (tmp_path / "out" / "page.html").read_text()
    assert "LLaMA-Factory, English" in page
    written = (tmp_path / "out" / "run=all,fold=1" / "model.safetensors").stat().st_mtime_ns
    main(words)
    assert (tmp_path / "out" / "run=all,fold=1" / "model.safetensors").stat().st_mtime_ns == written
