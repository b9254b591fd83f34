"""Mistakes that commands around the loss may be given: one line that names them, exit code 2, nothing left behind."""

import json
import os
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cli_runs import run, save_rows, short
from tiny import WORDS, make_llama, make_tokenizer, save_model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Models and files, good and bad, by their names below."""
    place = tmp_path_factory.mktemp("bad_input")
    save_model(place / "model", vocab_size=64)
    make_llama(vocab_size=64, seed=3).save_pretrained(place / "other")
    make_tokenizer().save_pretrained(place / "other")
    shutil.copytree(place / "model", place / "plain")
    make_tokenizer(chat_template=None).save_pretrained(place / "plain")
    (place / "plain" / "chat_template.jinja").unlink(missing_ok=True)
    shutil.copytree(place / "model", place / "torn")
    weights = place / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    save_rows(place / "pairs.jsonl", 12)
    conversation = {
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
    }
    files = {
        "prompts.jsonl": [{"prompt": f"{word} "} for word in WORDS[:8]],
        "one.jsonl": [{"prompt": "the "}],
        "chat.jsonl": [{"prompt": [{"role": "user", "content": word}], **conversation} for word in WORDS[:8]],
        "same.jsonl": [{"prompt": f"{word} ", "chosen": "a", "rejected": "a"} for word in WORDS[:4]],
        "apart.jsonl": [
            {"model_a": a, "model_b": b, "winner": winner} for a, b in ("AB", "CD") for winner in ("model_a", "model_b")
        ],
        "alone.jsonl": [{"model_a": "A", "model_b": "A", "winner": "tie"}],
        "empty.jsonl": [],
    }
    for name, rows in files.items():
        (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "list.json").write_text("[]")
    (place / "number.json").write_text("7")
    (place / "binary.jsonl").write_bytes(bytes(range(128, 256)))
    for name, text in (("cut", "{"), ("other_json", "[]"), ("no_log", "{}")):
        (place / name).mkdir()
        (place / name / "trainer_state.json").write_text(text)
    (place / "folder").mkdir()
    return place


@pytest.fixture
def place(made, monkeypatch):
    monkeypatch.chdir(made)
    before = {entry.name for entry in made.iterdir()}
    yield made
    for entry in list(made.iterdir()):
        if entry.name not in before:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


@pytest.fixture
def endpoint():
    """The URL of a server that answers nonsense at once under /nonsense, and late under /hangs."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            if self.path.startswith("/hangs"):
                time.sleep(1.5)
            try:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps({"choices": [{"message": {"content": "I do not know"}}]}).encode())
            except OSError:  # the client has gone
                pass

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


GENERATE = ("generate", "-o", "out.jsonl", "--use_cpu", "-n", "3", "--max_new_tokens", "4")
ITERATE = ("iterate", "--output_dir", "out", "--rounds", "1", "-n", "3", "--max_new_tokens", "4", "--eval_prompts", "3")
ITERATE = (*ITERATE, *short("--ref_cache_dir", "cache"))
SWEEP = ("sweep", "--output_dir", "out", "--param", "beta=0.1", "--max_new_tokens", "4")
SWEEP = (*SWEEP, *short("--ref_cache_dir", "cache"))
SCORE = ("score", "--use_cpu", "-o", "out.jsonl", "--html", "out.html")
RANK = ("rank", "-o", "out.jsonl", "--html", "out.html")
MODELS = (*RANK, "--use_cpu", "true", "--models", "model", "other")


def refused(capsys, place, words, message, left=()):
    before = set(os.listdir(place))
    code, _, err = run(capsys, *words)
    assert code == 2
    assert message in err
    assert err.strip().splitlines()[-1].startswith("error: ")
    assert set(os.listdir(place)) - before == set(left)


def test_unknown_judges(capsys, place):
    word = "judge must be one of length, shortest"
    for words in (
        (*GENERATE, "--model", "model", "--prompts", "prompts.jsonl"),
        (*ITERATE, "--model", "model", "--prompts", "prompts.jsonl"),
        (*SWEEP, "--model", "model", "--dataset", "pairs.jsonl", "--eval_prompts", "prompts.jsonl"),
    ):
        refused(capsys, place, (*words, "--judge", "lenght"), word)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            (*GENERATE, "--model", "plain", "--prompts", "chat.jsonl", "--judge", "length"),
            "set one with --chat_template",
        ),
        (
            (*ITERATE, "--model", "plain", "--prompts", "chat.jsonl", "--judge", "length"),
            "set one with --chat_template",
        ),
        (
            (
                *SWEEP,
                "--model",
                "plain",
                "--dataset",
                "pairs.jsonl",
                "--judge",
                "length",
                "--eval_prompts",
                "chat.jsonl",
            ),
            "set one with --chat_template",
        ),
        ((*SCORE, "--model", "plain", "--data", "chat.jsonl"), "tokenizer must have a chat template"),
        ((*RANK, "--models", "plain", "model", "--data", "chat.jsonl"), "tokenizer must have a chat template"),
        (("data", "inspect", "chat.jsonl", "--model", "plain"), "tokenizer must have a chat template"),
        (("data", "clean", "chat.jsonl", "--model", "plain", "-o", "out.jsonl"), "tokenizer must have a chat template"),
        (("train", "--model", "plain", "--dataset", "chat.jsonl", "--output_dir", "out"), "write --chat_template FILE"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_messages_without_a_chat_template(capsys, place, words, message):
    refused(capsys, place, words, message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*RANK, "--models", "model", "--data", "pairs.jsonl"), "models must be two or more"),
        ((*RANK, "--models", "model", "model", "--data", "pairs.jsonl"), "models must be different"),
        ((*RANK, "--data", "alone.jsonl"), "must hold at least one usable comparison, got 1 unusable"),
        ((*RANK, "--data", "apart.jsonl"), "comparisons must connect all models, got 2 groups"),
        (("compare", "cut", "--html", "out.html"), "runs must be at least two different folders"),
        (("compare", "cut", "cut", "--html", "out.html"), "runs must be at least two different folders"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_one_model_and_models_that_never_met(capsys, place, words, message):
    refused(capsys, place, words, message)


@pytest.mark.parametrize(
    "words",
    [
        (*SCORE, "--model", "model", "--data"),
        (*MODELS, "--data"),
        (*RANK, "--data"),
        (*GENERATE, "--model", "model", "--judge", "length", "--prompts"),
        (*ITERATE, "--model", "model", "--judge", "length", "--prompts"),
        (*SWEEP, "--model", "model", "--dataset"),
        (*SWEEP, "--dry_run", "--model", "model", "--dataset"),
        (*SWEEP, "--model", "model", "--dataset", "pairs.jsonl", "--judge", "length", "--eval_prompts"),
        ("data", "inspect", "--html", "out.html"),
        ("data", "clean", "-o", "out.jsonl"),
        ("data", "convert", "-o", "out.jsonl"),
    ],
    ids=lambda words: " ".join((words[0], words[-1])),
)
def test_files_without_rows(capsys, place, words):
    for name, message in (
        ("empty.jsonl", "empty.jsonl"),
        ("list.json", "list.json"),
        ("number.json", "must hold one object per line, got 7"),
        ("binary.jsonl", "binary.jsonl"),
        ("folder", "folder must hold files of the split"),
    ):
        refused(capsys, place, (*words, name), message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("report", "folder"), "output_dir must hold a run"),
        (("report", "cut"), "cut/trainer_state.json, which is not JSON"),
        (("report", "other_json"), "other_json/trainer_state.json, which holds no object with log_history"),
        (
            ("compare", "no_log", "folder", "--html", "out.html"),
            "no_log/trainer_state.json, which holds no object with",
        ),
        (("compare", "model", "other", "--html", "out.html"), "output_dir must hold a run"),
        (("merge", "folder", "-o", "out"), "adapter must be a folder with"),
        (("merge", "model", "-o", "out"), "adapter must be a folder with an adapter_config.json"),
        (("chat", "--model", "folder"), "model must be a folder with a config.json"),
        (("chat", "--model", "model", "--against", "folder", "--save", "out.jsonl"), "against must be a folder with"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else "",
)
def test_folders_without_a_run_or_a_model(capsys, place, words, message):
    refused(capsys, place, words, message)


@pytest.mark.parametrize(
    "words",
    [
        ("chat", "--use_cpu", "--model", "torn"),
        (*SCORE, "--model", "torn", "--data", "pairs.jsonl"),
        (*GENERATE, "--model", "torn", "--prompts", "prompts.jsonl", "--judge", "length"),
        ("train", "--model", "torn", "--dataset", "pairs.jsonl", "--output_dir", "out", *short()),
    ],
    ids=lambda words: words[0],
)
def test_weights_that_are_cut_off(capsys, place, words):
    refused(capsys, place, words, "model must have complete weights in 'torn'")


@pytest.mark.parametrize(("kind", "reason"), [("hangs", "no answer within 0.2 seconds"), ("nonsense", "I do not know")])
@pytest.mark.parametrize("words", [GENERATE, ITERATE, SWEEP], ids=lambda words: words[0])
def test_an_endpoint_that_hangs_or_answers_nonsense(capsys, place, endpoint, words, kind, reason):
    judge = ("--judge", f"{endpoint}/{kind}", "--judge_model", "m", "--judge_timeout", "0.2")
    of_sweep = ("--dataset", "pairs.jsonl", "--eval_prompts", "prompts.jsonl")
    read = of_sweep if words is SWEEP else ("--prompts", "prompts.jsonl")
    left = {"generate": (), "iterate": ("out",), "sweep": ()}[words[0]]
    refused(capsys, place, (*words, "--model", "model", *read, *judge), reason, left)
    if words is ITERATE:
        assert [entry.name for entry in Path("out").iterdir()] == ["iterate.json"]  # the settings; no round was begun


def test_ties_only(capsys, place):
    told = "must give at least one pair, got"
    words = ("--model", "model", "--prompts", "prompts.jsonl", "--judge", "regex:nowhere")
    refused(capsys, place, (*GENERATE, *words), told, ["out.jsonl.samples.jsonl"])
    refused(capsys, place, (*ITERATE, *words), "must give at least one pair in round 1, got", ["out"])
    assert not Path("out", "round_1", "pairs.jsonl").exists()
    for command in ((*SCORE, "--model", "model", "--data"), ("data", "convert", "-o", "out2.jsonl")):
        refused(capsys, place, (*command, "same.jsonl"), "at least one usable row")
