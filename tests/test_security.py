"""What docs/security.md promises: models, data, templates and recipes of strangers run no code, leave no folder, end,
and show their text as text.
"""

import contextlib
import json
import pickle
import sys
import time
from functools import partial

import pytest
import torch
import yaml
from tiny import make_llama, make_rows, make_tokenizer, save_model
from tiny_tokenizers import CHATML, byte_level_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification

from fastdpo import DPOConfig
from fastdpo.alignment.chat import templated_ids
from fastdpo.cli.main import main
from fastdpo.cli.options import yaml_file
from fastdpo.cli.recipes.book import as_yaml
from fastdpo.cli.recipes.kinds import migrated
from fastdpo.data.prepare import prepare_preference_dataset
from fastdpo.data.sources.loading import dataset_from_rows, load_preference_dataset
from fastdpo.data.terminal import PlainConsole
from fastdpo.data.tokens.chat import rendering
from fastdpo.data.tokens.settings import TokenizationSettings
from fastdpo.data.visible import visible
from fastdpo.report.html import write_report
from fastdpo.report.sections import Response, Sample, SampleList, Table, Text
from fastdpo.rewards.credits import Credits
from fastdpo.rewards.page import ColouredRow, ColouredText
from fastdpo.rounds.judges import Classifier
from fastdpo.training.saving.progress import load_random_states
from fastdpo.training.setup import model_files, models
from fastdpo.training.setup.reference import weight_bytes

MESSAGES = {
    "prompt": [{"role": "user", "content": "a"}],
    "chosen": [{"role": "assistant", "content": "b"}],
    "rejected": [{"role": "assistant", "content": "c"}],
}


@pytest.fixture
def evil(tmp_path):
    """An object that, if it is unpickled, creates a file; and that file."""
    trace = tmp_path / "was run"

    class Evil:
        def __reduce__(self):
            return (open, (str(trace), "w"))

    return Evil(), trace


# Models


def saved_classifier(folder, **options):
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForSequenceClassification(LlamaConfig(vocab_size=32, num_labels=1, **small)).save_pretrained(folder)
    make_tokenizer(**options).save_pretrained(folder)
    return folder


def test_weights_that_would_run_code_are_refused_and_not_run(tmp_path, evil):
    save_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": evil[0]}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model must have its weights as safetensors, .* never unpickled"):
        models.load_model(str(tmp_path / "model"))
    assert not evil[1].exists()


def test_weights_of_a_classifier_that_would_run_code_are_refused_and_not_run(tmp_path, evil):
    folder = saved_classifier(tmp_path / "judge")
    (folder / "model.safetensors").unlink()
    torch.save({"score.weight": evil[0]}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"judge classifier must have its weights as safetensors, .* never unpickled"):
        Classifier(str(folder))
    assert not evil[1].exists()


def test_a_classifier_whose_files_are_cut_off_or_nest_without_end_is_refused(tmp_path):
    folder = saved_classifier(tmp_path / "judge")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"judge classifier must have complete weights in .*/judge'"):
        Classifier(str(folder))
    (folder / "config.json").write_text(DEEP)
    with pytest.raises(ValueError, match=r"judge/config.json must not nest its values so deeply"):
        Classifier(str(folder))


def test_a_config_cannot_ask_for_unpickled_weights(tmp_path, evil):
    folder = save_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": evil[0]}, folder / "pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text())  # without a dtype, "auto" looks into the weights
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    kwargs = {"weights_only": False, "dtype": "auto"}
    judged = DPOConfig(str(tmp_path), use_cpu=True, model_init_kwargs=kwargs)
    for load in (lambda: models.load_model(str(folder), kwargs), lambda: Classifier(str(folder), judged)):
        with pytest.raises(ValueError, match="model_init_kwargs must not turn weights_only off"):
            load()
    assert not evil[1].exists()


def saved_adapter(folder, base):
    from peft import LoraConfig, get_peft_model

    get_peft_model(make_llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))
    return folder


def test_an_adapter_that_would_run_code_is_refused_and_not_run(tmp_path, evil):
    adapter = saved_adapter(tmp_path / "adapter", str(save_model(tmp_path / "base")))
    models.load_model(str(adapter))  # as it is, it loads
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"x": evil[0]}, adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match="never unpickled"):
        models.load_model(str(adapter))
    assert not evil[1].exists()


@pytest.mark.parametrize("base", ["..", "/etc", "ITSELF", ["x"], 5, ""])
def test_an_adapter_names_a_model_as_its_base_and_no_other_folder(tmp_path, base):
    adapter = saved_adapter(tmp_path / "adapter", str(tmp_path / "adapter") if base == "ITSELF" else base)
    for load in (models.load_model, models.load_config):
        with pytest.raises(ValueError, match=r"adapter_config.json must name .* base_model_name_or_path"):
            load(str(adapter))


@pytest.mark.parametrize(
    "extra", [{"peft_type": "OWN"}, {"r": "4"}, {"r": 4}, {"megatron_config": {"a": 1}, "megatron_core": "antigravity"}]
)
def test_an_adapter_whose_config_is_of_no_adapter_is_refused(tmp_path, extra):
    adapter = saved_adapter(tmp_path / "adapter", str(save_model(tmp_path / "base")))
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **extra}))
    with pytest.raises(ValueError, match=r"adapter_config.json must describe the adapter beside it|potential security"):
        models.load_model(str(adapter))
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("content", [b"", (2**40).to_bytes(8, "little"), None])
def test_an_adapter_without_whole_weights_is_refused(tmp_path, content):
    adapter = saved_adapter(tmp_path / "adapter", str(save_model(tmp_path / "base")))
    path = adapter / "adapter_model.safetensors"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model must have (complete weights|its adapter's weights)"):
        models.load_model(str(adapter))


def sharded(folder):
    """A model in several files, and its index."""
    make_llama().save_pretrained(folder, max_shard_size="20KB")
    path = folder / "model.safetensors.index.json"
    return path, json.loads(path.read_text())


def test_weights_stay_in_the_folder_of_their_model(tmp_path):
    path, index = sharded(tmp_path / "model")
    files = index["weight_map"]
    moved = files["model.norm.weight"]
    (path.parent / moved).rename(tmp_path / moved)
    for place in (f"../{moved}", str(tmp_path / moved), 5):
        changed = {key: place if file == moved else file for key, file in files.items()}
        path.write_text(json.dumps({**index, "weight_map": changed}))
        with pytest.raises(ValueError, match=r"index.json must name files in its own folder, got"):
            models.load_model(str(path.parent))
    (tmp_path / moved).rename(path.parent / moved)
    path.write_text(json.dumps(index))
    models.load_model(str(path.parent))


@pytest.mark.parametrize(
    "index", [[], {"weight_map": None}, {"weight_map": {"model.norm.weight": "model.safetensors"}}]
)
def test_an_index_that_is_none_is_refused_by_its_name(tmp_path, index):
    path, _ = sharded(tmp_path / "model")
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index.json must be the index of a model's weights, got"):
        models.load_model(str(path.parent))


@pytest.mark.parametrize("extra", [{"hidden_size": "32"}, {"hidden_size": -1}])
def test_a_config_with_values_of_another_kind_is_refused_in_words(tmp_path, capsys, extra):
    folder = save_model(tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **extra}))
    with pytest.raises(ValueError, match="model must have a config of its kind of model in"):
        models.load_config(str(folder))
    assert main(["plan", "--gpu_memory", "24GB", "--model", str(folder)]) == 2
    assert "model must have a config of its kind of model in" in capsys.readouterr().err


def test_code_of_a_model_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    folder, trace = save_model(tmp_path / "model"), tmp_path / "was run"
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}, "model_type": "own"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(trace)!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # as a user in a hurry answers
    for load in (models.load_model, models.load_config):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load(str(folder))
    assert not trace.exists()


def test_random_states_of_a_checkpoint_are_never_unpickled(tmp_path, evil):
    torch.save({"python": evil[0]}, tmp_path / "rng_state.pth")
    with pytest.raises(pickle.UnpicklingError):
        load_random_states(tmp_path)
    assert not evil[1].exists()


def test_code_of_a_judge_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    folder, trace = saved_classifier(tmp_path / "judge"), tmp_path / "was run"
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "own.C", "AutoModelForSequenceClassification": "own.M"}, "model_type": "own"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(trace)!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match="trust_remote_code"):
        Classifier(str(folder))
    assert not trace.exists()


def test_code_of_a_model_whose_config_needs_none_does_not_run(tmp_path, monkeypatch):
    folder, trace = save_model(tmp_path / "model"), tmp_path / "was run"
    config = {"model_type": "vit", "auto_map": {"AutoModelForCausalLM": "own.M"}}  # transformers knows the config alone
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(trace)!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match="trust_remote_code"):
        models.load_model(str(folder))
    assert not trace.exists()


DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
LOADERS = {
    "load_model": models.load_model,
    "load_tokenizer": models.load_tokenizer,
    "load_config": models.load_config,
    "weight_bytes": weight_bytes,
}


@pytest.mark.parametrize(
    ("name", "loader"),
    [
        *(("config.json", loader) for loader in ("load_model", "load_config", "weight_bytes")),
        *((name, "load_model") for name in ("generation_config.json", "model.safetensors.index.json")),
        *((name, "load_tokenizer") for name in ("config.json", "tokenizer.json", "special_tokens_map.json")),
    ],
)
def test_json_that_nests_without_end_is_refused_by_its_name(tmp_path, name, loader):
    folder = save_model(tmp_path / "model")
    if name == "model.safetensors.index.json":
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(DEEP)
    with pytest.raises(ValueError, match=f"model/{name} must not nest its values so deeply"):
        LOADERS[loader](str(folder))


def test_commands_refuse_a_config_that_nests_without_end_or_is_too_large(tmp_path, monkeypatch, capsys):
    folder = save_model(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(json.dumps(make_rows(1)[0]) + "\n")
    train = ["train", "--model", str(folder), "--dataset", str(tmp_path / "rows.jsonl"), "--output_dir"]
    others = (["plan", "--gpu_memory", "24GB"], ["bench"])
    commands = [[*train, str(tmp_path / "out")], *([*words, "--model", str(folder)] for words in others)]
    (folder / "config.json").write_text(DEEP)
    for words in commands:
        assert main(words) == 2
        assert "model/config.json must not nest its values so deeply" in capsys.readouterr().err
    monkeypatch.setattr(model_files, "MOST_JSON_BYTES", 100)
    for words in commands:
        assert main(words) == 2
        assert "model/config.json must have at most 100 bytes" in capsys.readouterr().err


def test_nesting_that_the_tokenizers_library_refuses_is_refused_in_words(tmp_path):
    folder = save_model(tmp_path / "model")
    whole = json.loads((folder / "tokenizer.json").read_text())
    inner = whole["normalizer"] = {"type": "Sequence", "normalizers": []}
    for _ in range(200):
        inner["normalizers"].append({"type": "Sequence", "normalizers": []})
        inner = inner["normalizers"][0]
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=r"cannot be read: .*recursion limit exceeded"):
        models.load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("tokenizer_config.json", {"eos_token": 3}),
        ("tokenizer_config.json", {"tokenizer_class": 5}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
        ("tokenizer.json", {"added_tokens": 5}),
    ],
)
def test_a_tokenizer_with_values_of_another_type_is_refused_in_words(tmp_path, name, extra):
    path = save_model(tmp_path / "model") / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **extra}))
    with pytest.raises(ValueError, match=r"the tokenizer of .*/model' cannot be read"):
        models.load_tokenizer(str(path.parent))


def test_a_file_too_large_to_be_read_whole_is_refused(tmp_path, monkeypatch):
    folder = save_model(tmp_path / "model")
    monkeypatch.setattr(model_files, "MOST_JSON_BYTES", 100)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer.json must have at most 100 bytes, got"):
        models.load_tokenizer(str(folder))
    adapter = saved_adapter(tmp_path / "adapter", str(folder))
    with pytest.raises(ValueError, match=r"adapter_config.json must have at most 100 bytes, got"):
        models.load_model(str(adapter))


# Data


@pytest.mark.parametrize("name", ["../other/data-00000-of-00001.arrow", "/etc/passwd", "..", 5])
def test_a_saved_dataset_stays_in_its_folder(tmp_path, name):
    for folder in ("own", "other"):
        dataset_from_rows(make_rows(3)).save_to_disk(tmp_path / folder)
    path = tmp_path / "own" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_data_files": [{"filename": name}]}))
    with pytest.raises(ValueError, match=r"state.json must name files in its own folder, got"):
        load_preference_dataset(tmp_path / "own")
    assert len(load_preference_dataset(tmp_path / "other")) == 3


@pytest.mark.parametrize("name", ["../secret.jsonl", "/etc/passwd"])
def test_a_set_of_llama_factory_stays_in_its_folder(tmp_path, name):
    (tmp_path / "data").mkdir()
    info = {"mine": {"file_name": name, "ranking": True}, "good": {"file_name": "sub/x.jsonl", "ranking": True}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    recipe = {"stage": "dpo", "model_name_or_path": "m", "dataset": "mine", "output_dir": "o"}
    with pytest.raises(ValueError, match=r"dataset_info.json must name files in its own folder"):
        migrated("llama_factory", recipe, tmp_path)
    book = migrated("llama_factory", {**recipe, "dataset": "good"}, tmp_path)
    assert book.value("dataset") == str(tmp_path / "data" / "sub" / "x.jsonl")


# Templates


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("where", ["tokenizer", "row"])
def test_a_template_that_loops_for_ever_is_stopped(monkeypatch, where):
    monkeypatch.setattr(rendering, "RENDER_SECONDS", 0.5)
    row = {**MESSAGES, **({"chat_template_kwargs": {"chat_template": ENDLESS}} if where == "row" else {})}
    tokenizer = byte_level_tokenizer(chat_template=ENDLESS if where == "tokenizer" else CHATML)
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"chat_template must render .* conversations in less than 0.5 s"):
        prepare_preference_dataset([row], tokenizer, TokenizationSettings())
    assert time.monotonic() - started < 60
    prepared, _ = prepare_preference_dataset(
        [MESSAGES], byte_level_tokenizer(chat_template=CHATML), TokenizationSettings()
    )
    assert len(prepared) == 1  # the watch stops nothing that ends


@pytest.mark.parametrize("who", ["writer", "judge"])
def test_the_template_of_a_model_that_answers_or_judges_is_stopped_too(tmp_path, monkeypatch, who):
    monkeypatch.setattr(rendering, "RENDER_SECONDS", 0.5)
    if who == "writer":
        tokenizer = byte_level_tokenizer(chat_template=ENDLESS)
        run = partial(templated_ids, tokenizer, MESSAGES["prompt"])
    else:
        judge = Classifier(str(saved_classifier(tmp_path, chat_template=ENDLESS)))
        run = partial(judge, [MESSAGES["prompt"]], [MESSAGES["chosen"]])
    with pytest.raises(ValueError, match=r"chat_template must render .* less than 0.5 s, got one that does not end"):
        run()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_template_that_reaches_for_python_gets_nothing(template):
    plain, _ = prepare_preference_dataset(
        [MESSAGES], byte_level_tokenizer(chat_template=CHATML), TokenizationSettings()
    )
    try:
        found, _ = prepare_preference_dataset(
            [MESSAGES], byte_level_tokenizer(chat_template=CHATML + template), TokenizationSettings()
        )
    except ValueError as refusal:
        said = str(refusal)
    else:
        said = "the chat template refuses the messages" if found[0] == plain[0] else f"it got {found[0]}"
    assert "the chat template refuses the messages" in said


# Text that is shown

SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'>"


def test_html_in_texts_is_text_in_every_section_of_a_report(tmp_path):
    sections = [
        Text(SCRIPT, [SCRIPT]),
        Table(SCRIPT, [SCRIPT, SCRIPT], [(SCRIPT, SCRIPT)], note=SCRIPT),
        SampleList(SCRIPT, [Sample(SCRIPT, [Response(SCRIPT, SCRIPT, SCRIPT)])], SCRIPT, SCRIPT, SCRIPT),
        ColouredText(SCRIPT, [ColouredRow(SCRIPT, [(SCRIPT, Credits((SCRIPT,), (0.5,)))])], SCRIPT),
    ]
    page = write_report(tmp_path / "page.html", SCRIPT, sections, subtitle=SCRIPT).read_text()
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("&lt;script&gt;") >= 16


ESCAPES = "\x1b[31mred\x1b]0;title\x07 \x9b2J \u202egnp.exe [bold]b[/bold] \r\x08 :smile: é 👩‍👧"
SHOWN = r"\x1b[31mred\x1b]0;title\x07 \x9b2J \u202egnp.exe [bold]b[/bold] \r\x08 :smile: é 👩‍👧"


def test_escapes_are_written_out():
    assert visible(ESCAPES) == SHOWN
    assert visible("a\nb\tc", keeps="\n") == "a\nb\\tc"


def test_no_escape_and_no_markup_of_a_text_reaches_the_terminal(capsys):
    from rich.table import Table as RichTable
    from rich.text import Text as RichText

    console = PlainConsole(width=200, force_terminal=True, color_system=None)
    table = RichTable(title=ESCAPES)
    table.add_column(ESCAPES)
    table.add_row(ESCAPES)
    console.print(table)
    console.print(ESCAPES)
    console.print(RichText(ESCAPES))  # which no `render_str` has seen
    out = capsys.readouterr().out
    assert not any(character in out for character in "\x1b\x07\x9b\u202e\r\x08")
    for part in (r"\x1b[31mred", "[bold]b[/bold]", ":smile:"):
        assert out.count(part) == 5, part


def test_samples_of_a_run_show_prompts_as_text(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    show_samples(["\x1b[2J[red]x[/red]", "b"])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"\x1b[2J[red]x[/red]" in out


def show_samples(texts):
    """Shows these prompts and answers as an evaluation does."""
    from fastdpo.training.callbacks.samples import Answered, EvalSamples

    shown = EvalSamples.__new__(EvalSamples)
    shown.callbacks = []
    shown._show([Answered(0, texts[0], texts[1], 1, texts[1], 1, "reference")])


def test_an_error_that_quotes_a_row_moves_no_cursor(tmp_path, capsys):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "foo": "\x1b[2J"}
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
    save_model(tmp_path / "m")
    words = [
        "--model",
        str(tmp_path / "m"),
        "--dataset",
        str(tmp_path / "d.jsonl"),
        "--output_dir",
        str(tmp_path / "o"),
    ]
    assert main(["train", *words, "--use_cpu"]) == 2
    err = capsys.readouterr().err
    assert "'foo' (\\x1b[2J)" in err
    assert "\x1b" not in err


# Recipes and configs


def test_tags_of_python_objects_in_yaml_are_refused_and_not_made(tmp_path, capsys):
    trace = tmp_path / "was run"
    path = tmp_path / "run.yaml"
    path.write_text(f"model: m\nbeta: !!python/object/apply:builtins.open ['{trace}', 'w']\n")
    for words in (["train", "--config", str(path)], ["migrate", str(path)], ["sft", "--config", str(path)]):
        assert main(words) == 2
        assert "could not determine a constructor for the tag" in capsys.readouterr().err
    assert not trace.exists()


def test_aliases_of_aliases_are_counted_before_they_are_written_out(tmp_path, capsys):
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 6)]  # a million values
    path = tmp_path / "run.yaml"
    path.write_text("\n".join(lines))
    for words in (["train", "--config", str(path)], ["migrate", str(path)]):
        assert main(words) == 2
        assert "must hold at most 100,000 values" in capsys.readouterr().err


def test_a_recipe_that_is_too_large_or_too_deep_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "run.yaml"
    path.write_text("[" * 5000)
    with pytest.raises(ValueError, match="must not nest its values so deeply"):
        yaml_file.read_yaml(path, "recipe")
    path.write_text(yaml.safe_dump({"a": "b" * 200}))
    monkeypatch.setattr(yaml_file, "MOST_BYTES", 100)
    with pytest.raises(ValueError, match="recipe must have at most 100 bytes, got"):
        yaml_file.read_yaml(path, "recipe")


def test_a_line_break_in_a_recipe_begins_no_line_of_what_it_becomes(tmp_path):
    evil = "mine\nenv: {PATH: evil}"
    recipe = {"stage": "dpo", "model_name_or_path": "m", "dataset": evil, "output_dir": "o", evil: evil}
    text = as_yaml(migrated("llama_factory", recipe, tmp_path), "recipe")
    assert text.count("evil") >= 3
    assert yaml.safe_load(text)["dataset"] == evil
    assert "env" not in yaml.safe_load(text)


def test_a_tokenizer_is_loaded_without_the_code_beside_it(tmp_path, monkeypatch):
    folder, trace = save_model(tmp_path / "model"), tmp_path / "was run"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["own.T", None]}, "tokenizer_class": "OwnTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(trace)!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with contextlib.suppress(ValueError):  # it may do without the code
        models.load_tokenizer(str(folder))
    assert not trace.exists()
