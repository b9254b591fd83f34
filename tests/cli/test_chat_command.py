"""`fastdpo chat`: answers come as they are written, and preferred ones become rows that `fastdpo train` reads."""

import io
import json

import pytest
import torch
from cli_runs import run
from tiny import make_byte_tokenizer, make_llama, make_tokenizer, save_model

from fastdpo.alignment.chat import Talker
from fastdpo.data.prepare import prepare_preference_dataset
from fastdpo.data.tokens.tokenization import TokenizationSettings


@pytest.fixture
def models(tmp_path):
    for name, seed in (("one", 1), ("two", 2)):
        save_model(tmp_path / name, seed=seed)
    return tmp_path


@pytest.fixture
def typed(monkeypatch):
    """What the user types, line by line; then the input ends."""

    def type_(*lines):
        rest = iter(lines)

        def read(question):
            print(question, end="")
            try:
                return next(rest)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", read)

    return type_


def chat(capsys, models, *more):
    short = ("--use_cpu", "--max_new_tokens", "6")
    return run(capsys, "chat", "--model", models / "one", *short, *more)


def test_a_conversation_goes_on_and_starts_over(capsys, models, typed):
    typed("the cat", "", "/new", "a dog", "/quit", "never read")
    code, out, err = chat(capsys, models)
    assert code == 0, err
    assert out.count("model: ") == 2


def test_two_models_answer_and_the_better_one_is_kept(capsys, models, typed):
    typed("the cat", "2", "a dog", "", "a bird", "1")
    pairs = models / "pairs.jsonl"
    code, out, err = chat(capsys, models, "--against", models / "two", "--save", pairs, "--temperature", "0")
    assert code == 0, err
    assert out.count("answer 1: ") == 3
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    assert len(rows) == 2  # the second time the user liked neither
    assert rows[0]["prompt"] == [{"role": "user", "content": "the cat"}]
    assert rows[1]["prompt"][1] == {"role": "assistant", "content": rows[0]["chosen"][0]["content"]}
    assert {rows[0]["chosen_model"], rows[0]["rejected_model"]} == {str(models / "one"), str(models / "two")}
    _, report = prepare_preference_dataset(rows, make_tokenizer(), TokenizationSettings())
    assert report.num_rows == 2


def test_a_model_against_itself_gives_two_different_samples_and_equal_answers_are_said_not_to_be_saved(
    capsys, models, typed
):
    pairs = models / "pairs.jsonl"
    against = ("--against", models / "one", "--save", pairs)
    typed("the cat", "1")
    code, out, err = chat(capsys, models, *against)
    assert code == 0, err
    assert len(pairs.read_text().splitlines()) == 1
    assert f"saved 1 pair: {pairs}" in " ".join(out.split())
    typed("the cat", "1")
    code, out, err = chat(capsys, models, *against, "--temperature", "0")
    assert code == 0, err
    assert "not saved: both answers are the same" in out
    assert len(pairs.read_text().splitlines()) == 1


def test_lines_from_a_pipe_are_shown(capsys, models, monkeypatch):
    """A terminal shows what is typed; a pipe's lines were missing from the conversation."""
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n/quit\n"))
    code, out, err = chat(capsys, models)
    assert code == 0, err
    assert "you: the cat\nmodel: " in out


def test_pieces_make_up_the_answer_and_the_model_is_left_as_it_was():
    model, tokenizer = make_llama(vocab_size=260).train(), make_byte_tokenizer()
    before = torch.get_rng_state()
    pieces = []
    answer = Talker(model, tokenizer, max_new_tokens=8).reply([{"role": "user", "content": "hi"}], pieces.append)
    assert "".join(pieces).strip() == answer
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_a_template_that_refuses_the_conversation_is_an_error_that_names_it():
    tokenizer = make_tokenizer(chat_template="{{ raise_exception('no system messages') }}")
    with pytest.raises(
        ValueError, match=r"messages must fit the chat template, got 'user: the cat': no system messages"
    ):
        Talker(make_llama(), tokenizer).reply([{"role": "user", "content": "the cat"}])


def test_a_tokenizer_without_template_reads_a_transcript():
    talker = Talker(make_llama(vocab_size=260), make_byte_tokenizer(chat_template=None))
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    text = talker.tokenizer.decode(talker.prompt_ids(messages))
    assert text.endswith("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:")


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (("--save", "x.jsonl"), "save must not be given without --against"),
        (("--temperature", "-1"), "temperature must be >= 0, got -1.0"),
        (("--max_new_tokens", "0"), "max_new_tokens must be at least 1, got 0"),
        (("--against", "no/such"), "no/such"),
        (("--against", "one", "--save", "."), "save must be a file, got the folder ."),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line(capsys, models, more, word):
    code, _, err = chat(capsys, models, *more)
    assert code == 2
    assert word in err
