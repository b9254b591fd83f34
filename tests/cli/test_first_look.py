"""What `fastdpo train` answers before anything heavy is imported, and the table that it answers from."""

import json
import subprocess
import sys

import pytest
import transformers
from cli_runs import run, save_model, save_rows, short

from fastdpo.cli.arguments import GROUPS, TYPES
from fastdpo.cli.main import main
from fastdpo.cli.options import installed, table
from fastdpo.cli.options.early import look
from fastdpo.cli.options.from_fields import fields_parser
from fastdpo.cli.options.generate import make_table
from fastdpo.cli.options.table import read_table, table_parser

HEAVY = ("torch", "transformers", "datasets", "peft", "accelerate", "numpy", "rich", "pandas", "pyarrow")
IS_THE_RELEASE_OF_THE_TABLE = transformers.__version__ == read_table()["transformers"]


def answer(*arguments):
    """Exit code, output, errors, and which of HEAVY a process of its own has imported by the end."""
    code = (
        "import sys\nfrom fastdpo.cli.main import main\ntry:\n    code = main(sys.argv[1:])\n"
        f"except SystemExit as ended:\n    code = ended.code\nprint([m for m in {HEAVY} if m in sys.modules])\n"
        "print(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    *out, heavy, code = done.stdout.splitlines()
    return int(code), "\n".join(out), done.stderr, heavy


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "--help"], "preference optimization:"),
        (["sft", "--help"], "everything else of transformers.TrainingArguments:"),
        (["precompute", "-h"], "--ref_tokens_per_batch"),
        (["--help"], "commands:"),
        (["train", "--betta", "0.1"], "unknown option '--betta'; did you mean '--beta'?"),
        (["train", "--model_name_or_pat", "x"], "did you mean '--model_name_or_path'?"),
        (["train", "--model", "x", "--output_dir", "o"], "the following arguments are required: --dataset"),
        (["train", "--model", "x", "--dataset", "no.jsonl", "--output_dir", "o"], "does not exist: no.jsonl"),
        (["sft", "--model", "x", "--dataset", "no.jsonl", "--output_dir", "o"], "does not exist: no.jsonl"),
        (["train", "--config", "no.yaml"], "config must be an existing file, got 'no.yaml'"),
        (["train", "--model", "x", "--dataset", "y", "--output_dir", "o", "--beta", "much"], "invalid float value"),
        (["train", "--model", "./no", "--dataset", "y", "--output_dir", "o"], "got ./no, which does not exist"),
        (["train", "--model", "x", "--dataset", "y", "--output_dir", "o", "z"], "every value must follow an option"),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, list) else "",
)
def test_help_and_slips_are_answered_without_a_heavy_import(tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    code, out, err, heavy = answer(*arguments)
    assert heavy == "[]"
    assert expected in " ".join((out + err).split())
    assert code == (0 if "elp" in arguments[-1] or "-h" in arguments else 2)


def test_a_wrong_yaml_file_is_answered_without_a_heavy_import(tmp_path):
    path = tmp_path / "run.yaml"
    for text, expected in (
        ("model: x\nbta: 1\n", "unknown key 'bta'; did you mean 'beta'?"),
        ("[1]", "one option per"),
    ):
        path.write_text(text)
        code, _, err, heavy = answer("train", "--config", path)
        assert (code, heavy) == (2, "[]")
        assert expected in err


def test_a_recipe_of_another_project_is_sent_to_the_command_that_reads_it(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    for text, whose in (("base_model: m\nrl: dpo\n", "Axolotl"), ("stage: dpo\ntemplate: x\n", "LLaMA-Factory")):
        path.write_text(text)
        code, _, err = run(capsys, "train", "--config", path)
        assert code == 2
        assert f"(a recipe of {whose}? fastdpo migrate {path} --out run.yaml)" in err


def test_the_table_is_that_of_the_dataclasses():
    """Own options in every release of transformers; its options in the release that the table was made with."""
    made, there = make_table(), read_table()
    assert made["former"] == there["former"]

    def own(found):
        return {key: option for key, option in found["options"].items() if option["of"] == "fastdpo"}

    assert own(made) == own(there), "python -m fastdpo.cli.options.generate writes the table anew"
    if IS_THE_RELEASE_OF_THE_TABLE:
        assert made == there


@pytest.mark.skipif(not IS_THE_RELEASE_OF_THE_TABLE, reason="another transformers than the table's")
@pytest.mark.parametrize("command", ["train", "sft"])
def test_the_table_gives_the_help_that_the_dataclasses_give(command):
    assert (
        table_parser(command, for_help=True).format_help()
        == fields_parser(command, TYPES[command], GROUPS).format_help()
    )


def test_the_names_of_training_arguments_are_read_from_the_source():
    from dataclasses import fields

    assert installed.training_arguments() == {f.name for f in fields(transformers.TrainingArguments) if f.init}


def of_release(monkeypatch, *, more=(), fewer=()):
    names = (installed.training_arguments() | set(more)) - set(fewer)
    monkeypatch.setattr(table, "training_arguments", lambda: names)


NEEDED = ["--model", "a/model", "--dataset", "a/set", "--output_dir", "out"]


def test_options_of_a_newer_transformers_are_taken(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="unknown option '--sharpness'"):
        look("train", [*NEEDED, "--sharpness", "3"])
    of_release(monkeypatch, more=["sharpness"])
    for words in (["--sharpness", "3"], ["--sharpness"], ["--sharpness", "a", "b"], ["--no_sharpness"]):
        assert look("train", [*NEEDED, *words]).beta == 0.1
    (tmp_path / "run.yaml").write_text("sharpness: 3\n")
    assert look("train", [*NEEDED, "--config", "run.yaml"]).sharpness == ["3"]
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "--sharpness" in capsys.readouterr().out


def test_options_that_the_installed_transformers_lacks_are_not_shown(monkeypatch, capsys):
    of_release(monkeypatch, fewer=["torch_compile_backend"])
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out
    assert "--torch_compile_backend" not in out
    assert "--torch_compile_mode" in out
    with pytest.raises(ValueError, match="unknown option '--torch_compile_backend'"):
        look("train", [*NEEDED, "--torch_compile_backend", "x"])


def test_values_that_another_transformers_may_take_are_left_to_the_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("lr_scheduler_type: zigzag\nlr_scheduler_kwargs: {a: 1}\nwarmup_steps: many\n")
    words = (
        ["--optim", "sgd_of_tomorrow"],
        ["--config", "run.yaml"],
        ["--optim=a"],
        ["--no_average_tokens_across_devices"],
    )
    monkeypatch.setattr(table, "release", lambda: "99.0.0")
    for more in words:
        assert look("train", [*NEEDED, *more]).output_dir == "out"
    with pytest.raises(ValueError, match="invalid float value"):  # our own options are what they are
        look("train", [*NEEDED, "--beta", "much"])
    monkeypatch.setattr(table, "release", lambda: read_table()["transformers"])
    for more, message in zip(
        words[:2], ("invalid choice: 'sgd_of_tomorrow'", "lr_scheduler_type must be"), strict=True
    ):
        with pytest.raises(ValueError, match=message):
            look("train", [*NEEDED, *more])


def test_without_a_source_of_transformers_the_table_is_what_there_is(monkeypatch):
    monkeypatch.setattr(table, "training_arguments", lambda: None)
    monkeypatch.setattr(table, "release", lambda: read_table()["transformers"])
    assert look("train", [*NEEDED, "--adam_beta1", "0.8"]).adam_beta1 == 0.8
    assert installed.fields_of("class Other:\n    x: int\n", "TrainingArguments") is None


def test_the_first_look_and_the_run_read_the_same_values(tmp_path, monkeypatch):
    from fastdpo.cli.arguments import parse

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table, "release", lambda: read_table()["transformers"])
    (tmp_path / "run.yaml").write_text(
        "beta: 0.3\nloss_type: [ipo, sft]\nmax_length: null\nuse_peft: true\nlora_target_modules: q_proj,v_proj\n"
        "eval_strategy: no\nmax_grad_norm: 0.5\ngradient_checkpointing_kwargs: {use_reentrant: false}\n"
    )
    words = [*NEEDED, "--config", "run.yaml", "--beta", "0.7", "--use-cpu", "true", "--no_disable_dropout"]
    first = vars(look("train", words))
    both = {key: value for part in parse("train", TYPES["train"], words) for key, value in vars(part).items()}
    for name in ("beta", "loss_type", "max_length", "use_peft", "lora_target_modules", "max_grad_norm", "use_cpu"):
        assert first[name] == both[name], name
    assert first["gradient_checkpointing_kwargs"] == json.dumps(both["gradient_checkpointing_kwargs"])
    assert (both["beta"], both["disable_dropout"], both["max_length"]) == (0.7, False, None)


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model")
    save_rows(tmp_path / "pairs.jsonl")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dataset", "pears.jsonl", "did you mean '{}/pairs.jsonl'?"),
        ("eval_dataset", "pears.jsonl", "does not exist: {}/pears.jsonl (--eval_dataset); did you mean"),
        ("model", "modl", "got {}/modl, which does not exist; did you mean '{}/model'?"),
        ("model", ".", "must be a folder with a config.json (a model) or an adapter_config.json (an adapter)"),
        ("ref_model", "modl", "ref_model must be a local directory or a model name on the Hub"),
        ("tokenizer", "modl", "tokenizer must be a local directory or a model name on the Hub"),
        ("output_dir", "pairs.jsonl", "output_dir must be a directory"),
        ("output_dir", "pairs.jsonl/out", "output_dir must be a new directory in {}/pairs.jsonl"),
    ],
)
def test_a_file_or_folder_that_is_not_there_is_found_first(folder, name, value, message):
    options = {"model": "model", "dataset": "pairs.jsonl", "output_dir": "out", name: value}
    words = [word for key, path in options.items() for word in (f"--{key}", str(folder / path))]
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        look("train", words)
    assert message.replace("{}", str(folder)) in str(refused.value)
    assert not (folder / "out").exists()


def test_a_model_one_folder_deeper_is_named(folder):
    (folder / "all").mkdir()
    (folder / "model").rename(folder / "all" / "model")
    words = ["--model", folder / "all", "--dataset", folder / "pairs.jsonl", "--output_dir", folder / "out"]
    with pytest.raises(ValueError, match=rf"did you mean --model {folder}/all/model\?"):
        look("train", list(map(str, words)))


def test_a_folder_that_cannot_be_written_is_found_first(folder, monkeypatch):
    def refuse(**where):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)  # root, as whom tests may run, may write anywhere
    words = ["--model", folder / "model", "--dataset", folder / "pairs.jsonl", "--output_dir", folder / "a" / "b"]
    with pytest.raises(ValueError, match=r"got .*/a/b: Permission denied; choose another one: --output_dir DIR"):
        look("train", list(map(str, words)))
    assert look("precompute", list(map(str, words)), shown=["model"]).beta == 0.1  # which writes none


def test_looking_leaves_nothing_behind(folder):
    before = sorted(folder.iterdir())
    words = ["--model", folder / "model", "--dataset", folder / "pairs.jsonl", "--output_dir", folder / "a" / "b"]
    look("train", list(map(str, words)))
    assert sorted(folder.iterdir()) == before


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test where a weight is loaded."""

    def loaded(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("fastdpo.training.setup.models.load_model", loaded)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", loaded)


def refusal(capsys, folder, *more):
    words = ("--model", folder / "model", "--dataset", folder / "pairs.jsonl", "--output_dir", folder / "out")
    code, _, err = run(capsys, "train", *words, *short(*more))
    assert code == 2
    assert not (folder / "out").exists()
    return " ".join(err.split())


def test_wrong_columns_are_found_before_a_weight_is_loaded(capsys, folder, no_weights):
    wrong = folder / "wrong.jsonl"
    wrong.write_text('{"question": "a", "good": "b", "bad": "c"}\n' * 30)
    err = refusal(capsys, folder, "--dataset", wrong)
    assert f"the training data ({wrong}) cannot be read" in err
    assert "--dataset_format NAME" in err
    err = refusal(capsys, folder, "--eval_dataset", wrong)
    assert f"the evaluation data ({wrong}) cannot be read" in err


def test_a_model_that_is_nowhere_is_found_before_a_weight_is_loaded(capsys, folder, no_weights, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    err = refusal(capsys, folder, "--model", "nobody/no-such-model")
    assert "model must be a local directory or a model name on the Hub, got 'nobody/no-such-model'" in err
    err = refusal(capsys, folder, "--ref_model", "nobody/no-such-model")
    assert "ref_model must be a local directory or a model name on the Hub" in err


def test_a_model_without_a_tokenizer_is_told_how_to_name_one(capsys, folder, no_weights):
    for file in (folder / "model").glob("token*"):
        file.unlink()
    err = refusal(capsys, folder)
    assert f"got '{folder}/model' without one" in err
    assert "name another one: --tokenizer FOLDER_OR_NAME" in err


def test_an_encoder_is_found_before_a_weight_is_loaded(capsys, folder, no_weights):
    from transformers import BertConfig

    BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(
        folder / "model"
    )
    assert "is an encoder" in refusal(capsys, folder)
