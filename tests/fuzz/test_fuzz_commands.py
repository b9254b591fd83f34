"""Any command line, any config file: a subcommand says what is wrong and returns 2 before it loads anything.

The commands run with a model folder that does not exist, so that whatever passes the options stops there.
"""

import contextlib
import io
import os

import yaml
from fuzzing import fuzz
from hypothesis import strategies as st
from values import json_values, texts

from fastdpo.cli.main import COMMANDS, main
from fastdpo.cli.options.names import RENAMED
from fastdpo.cli.options.table import read_table

OPTIONS = sorted({flag for option in read_table()["options"].values() for flag in option["flags"]})
OWN = (  # options of other commands
    *("--out", "--kind", "--overwrite", "--rows", "--top", "--json", "--n", "--judge", "--models", "--temperature"),
    *(
        "--gpu",
        "--device",
        "--impl",
        "--port",
        "--report",
        "--split",
        "--help",
        "-h",
        "--",
        "-",
        "--=",
        "--no_",
        "--no_x",
    ),
)
VALUES = (
    "0",
    "-1",
    "1e999",
    "nan",
    "none",
    "true",
    "{}",
    '{"a": 1}',
    "[1, 2]",
    "a,b",
    "=",
    "/nowhere/x",
    "~",
    "\0",
    "é",
)
words = st.one_of(st.sampled_from(VALUES), texts.filter(lambda text: len(text) < 30), st.integers().map(str))
option = st.one_of(
    st.sampled_from(OPTIONS),
    st.sampled_from(OPTIONS),
    st.sampled_from(OWN),
    st.sampled_from(sorted(RENAMED)).map("--{}".format),
)
command_lines = st.tuples(
    st.sampled_from(sorted(set(COMMANDS) - {"demo", "verify", "bench", "env", "chat"})),  # these would start to work
    st.lists(
        st.one_of(
            option.map(lambda name: [name]),
            st.tuples(option, words).map(list),
            st.tuples(option, words).map(lambda pair: [f"{pair[0]}={pair[1]}"]),
            words.map(lambda word: [word]),
        ),
        max_size=4,
    ).map(lambda parts: [word for part in parts for word in part]),
)


def outcome_of(argv):
    """The exit code of a command, which must have said something if it is 2."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as stop:  # of the help
            code = stop.code
    if code == 2:
        assert "error: " in err.getvalue(), (argv, err.getvalue())
    return f"exit {code}"


def test_any_command_line_is_answered_or_refused_in_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcomes = fuzz("command lines", command_lines, lambda case: outcome_of([case[0], *case[1]]))
    assert set(outcomes) <= {"exit 0", "exit 1", "exit 2"}, outcomes


keys = st.one_of(st.sampled_from([option.lstrip("-") for option in OPTIONS]), st.sampled_from(sorted(RENAMED)), texts)
recipes = st.one_of(
    st.dictionaries(keys, st.one_of(json_values, words), max_size=4).map(
        lambda values: {"model": "/nowhere/m", "dataset": "/nowhere/d.jsonl", "output_dir": "out", **values}
    ),
    json_values,
)


def test_any_config_file_is_refused_in_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment = dict(os.environ)

    def check(recipe):
        try:
            text = yaml.safe_dump(recipe, allow_unicode=True)
            (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        except (UnicodeError, yaml.YAMLError, RecursionError):
            return "not text"
        try:
            for command in ("train", "sft", "migrate"):
                words = [command, "run.yaml"] if command == "migrate" else [command, "--config", "run.yaml"]
                found = outcome_of(words)
                assert found != "exit 0" or command == "migrate", (found, recipe)
        finally:
            os.environ.clear()
            os.environ.update(environment)
        return found

    fuzz("config files", recipes, check)
