"""Command lines and YAML files written for TRL's scripts and for the alignment-handbook run as they are."""

import json
import os
import re
from dataclasses import fields
from pathlib import Path

import pytest
from cli_runs import SHORT, options_of, run, save_model, save_rows, short
from peers import peer
from tiny import make_byte_tokenizer, make_tokenizer

from fastdpo.cli.arguments import TYPES, parse
from fastdpo.cli.options import mixtures, names
from fastdpo.cli.options.adapters import lora_config, quantization_config
from fastdpo.cli.options.table import read_table
from fastdpo.training.settings.trl_names import SETTINGS

NEEDED = ["--model_name_or_path", "m", "--dataset_name", "d/d", "--output_dir", "o", "--use_cpu", "true"]


def parsed(*words, command="train"):
    """The three parts as one mapping."""
    parts = parse(command, TYPES[command], [*NEEDED, *map(str, words)])
    return {name: value for part in parts for name, value in vars(part).items()}


def in_yaml(tmp_path, text, *words, command="train"):
    (tmp_path / "run.yaml").write_text(text)
    return parsed("--config", tmp_path / "run.yaml", *words, command=command)


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model")
    save_rows(tmp_path / "data" / "train.jsonl")
    save_rows(tmp_path / "data" / "test.jsonl", 6, seed=1)
    return tmp_path


def test_every_field_of_trls_scripts_is_taken_or_answered():
    trl = peer("trl")
    known = {name for types in TYPES.values() for cls in types for name in (f.name for f in fields(cls))}
    known |= set(names.RENAMED) | set(names.COMPUTED) | set(names.ANSWERED)
    theirs = (trl.ScriptArguments, trl.ModelConfig, trl.DatasetMixtureConfig, trl.DPOConfig, trl.SFTConfig)
    assert {f.name for cls in theirs for f in fields(cls)} - known == set()


def test_the_page_has_every_name_that_is_taken():
    page = (Path(__file__).parents[2] / "docs" / "command_line.md").read_text()
    taken = {*names.RENAMED, *names.COMPUTED, *names.ENVIRONMENT, *mixtures.NAMES, *mixtures.PART_KEYS}
    assert taken - set(re.findall(r"`(\w+)`", page)) == set()


def test_what_a_name_becomes_is_an_option():
    known = {option["name"] for option in read_table()["options"].values()}
    assert set(names.RENAMED.values()) <= known
    for name, value in (("use_flash_attention_2", True), ("gradient_checkpointing_use_reentrant", False)):
        assert set(names.COMPUTED[name](value)) <= known
    assert not set(names.RENAMED) & known
    assert not set(names.COMPUTED) & known


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        (["--model_revision", "v2"], "model_revision", "v2"),
        (["--dtype", "bfloat16"], "dtype", "bfloat16"),
        (["--torch_dtype", "float16"], "dtype", "float16"),
        (["--torch-dtype=torch.float16"], "dtype", "float16"),
        (["--attn_implementation", "sdpa"], "attn_implementation", "sdpa"),
        (["--use_flash_attention_2", "true"], "attn_implementation", "flash_attention_2"),
        (["--use_flash_attention_2"], "attn_implementation", "flash_attention_2"),
        (["--dataset_config", "en"], "dataset_config", "en"),
        (["--dataset_train_split", "train_prefs"], "dataset_split", "train_prefs"),
        (["--dataset_test_split", "test_prefs"], "eval_split", "test_prefs"),
        (["--dataset_streaming", "--max_steps", "3"], "dataset_streaming", True),
        (["--streaming", "true", "--max_steps", "3"], "dataset_streaming", True),
        (["--test_split_size", "0.2"], "eval_fraction", 0.2),
        (["--preprocessing_num_workers", "2"], "dataset_num_proc", 2),
        (["--tokenizer_name_or_path", "t"], "tokenizer", "t"),
        (
            ["--gradient_checkpointing_use_reentrant", "false"],
            "gradient_checkpointing_kwargs",
            {"use_reentrant": False},
        ),
        (["--truncation_side", "left"], "truncation_mode", "keep_end"),
        (["--ignore_bias_buffers"], "ignore_bias_buffers", True),
        (["--warmup_ratio", "0.1"], "warmup_steps", 0.1),
        (["--evaluation_strategy", "epoch"], "eval_strategy", "epoch"),
        (["--rpo_alpha", "0.5"], "loss_weights", [1.0, 0.5]),
        (["--use_peft", "--use_rslora"], "use_rslora", True),
        (["--use_peft", "--use_dora", "true"], "use_dora", True),
        (["--use_peft", "--lora_target_parameters", "a.w", "b.w"], "lora_target_parameters", ["a.w", "b.w"]),
        (["--use_peft", "--lora_modules_to_save", "lm_head"], "lora_modules_to_save", ["lm_head"]),
        (["--use_peft", "--load_in_8bit"], "load_in_8bit", True),
        (["--use_peft", "--load_in_4bit", "--bnb_4bit_quant_type", "fp4"], "bnb_4bit_quant_type", "fp4"),
        (
            ["--use_peft", "--load_in_4bit", "--bnb_4bit_quant_storage", "bfloat16"],
            "bnb_4bit_quant_storage",
            "bfloat16",
        ),
        (["--use_peft", "--load_in_4bit", "--use_bnb_nested_quant"], "use_bnb_nested_quant", True),
        (["--no_gradient_checkpointing"], "gradient_checkpointing", False),
        (["--no_bf16"], "bf16", False),
        (["--hub_model_revision", "b"], "hub_revision", "b"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_an_option_of_others_is_taken_with_its_meaning(given, name, value):
    assert parsed(*given)[name] == value


def test_flags_and_yaml_say_the_same(tmp_path):
    for text, name, value in (
        ("torch_dtype: bfloat16", "dtype", "bfloat16"),
        ("torch_dtype: null", "dtype", None),
        ("report_to: [none]", "report_to", []),
        ("report_to:\n- tensorboard\n", "report_to", ["tensorboard"]),
        ("optim_target_modules: [attn, mlp]", "optim_target_modules", ["attn", "mlp"]),
        ("warmup_ratio: 0.1", "warmup_steps", 0.1),
        ("evaluation_strategy: steps\neval_steps: 5", "eval_strategy", "steps"),
        ("gradient_checkpointing_use_reentrant: true", "gradient_checkpointing_kwargs", {"use_reentrant": True}),
        ("rpo_alpha: 1.0\nloss_type: ipo", "loss_type", ["ipo", "sft"]),
        ("use_peft: true\nlora_target_parameters: [a.w]", "lora_target_parameters", ["a.w"]),
        ("text_column: text\nsanity_check: false\ncallbacks: []", "beta", 0.1),
    ):
        assert in_yaml(tmp_path, text)[name] == value, text


def test_a_flag_overrides_the_file_whatever_name_either_uses(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "model: a\ndataset_name: b\noutput_dir: c\ntorch_dtype: float16\nuse_cpu: true\n"
    )
    words = ["--config", str(tmp_path / "run.yaml"), "--model_name_or_path", "x", "--dataset", "y", "--dtype", "auto"]
    run_arguments, *_ = parse("train", TYPES["train"], words)
    assert (run_arguments.model, run_arguments.dataset, run_arguments.dtype) == ("x", "y", "auto")


def test_one_option_by_two_names_must_say_one_thing(tmp_path):
    assert parsed("--model", "m")["model"] == "m"  # as NEEDED says by the other name
    with pytest.raises(ValueError, match=r"model must .*two names, got .*'m' and .*'n'"):
        parsed("--model", "n")
    with pytest.raises(ValueError, match=r"dtype must .*two names"):
        in_yaml(tmp_path, "dtype: float32\ntorch_dtype: float16\n")
    with pytest.raises(ValueError, match=r"attn_implementation must .*two names"):
        in_yaml(tmp_path, "use_flash_attention_2: true\nattn_implementation: sdpa\n")
    with pytest.raises(ValueError, match="warmup_ratio must not be given together with warmup_steps"):
        in_yaml(tmp_path, "warmup_ratio: 0.1\nwarmup_steps: 7\n")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("text_column", "content", "rename_column('content', 'text')"),
        ("system_prompt", "be kind", "a message of the role system"),
        ("benchmarks", "[lighteval]", "after training"),
        ("model_code_revision", "v1", '--model_init_kwargs \'{"code_revision": "v1"}\''),
        ("sanity_check", "true", "--max_steps 10"),
        ("max_completion_length", "7", "max_length=..., which limits prompt and response together"),
        ("lora_targt_modules", "x", "did you mean 'lora_target_modules'?"),
        ("model_name_or_pth", "x", "did you mean 'model_name_or_path'?"),
    ],
)
def test_what_has_no_counterpart_is_answered_with_the_line_to_write(tmp_path, name, value, message):
    for ask in (lambda: parsed(f"--{name}", value), lambda: in_yaml(tmp_path, f"{name}: {value}\n")):
        with pytest.raises(ValueError) as refused:  # noqa: PT011
            ask()
        assert message in str(refused.value).replace("'--", "'")


def test_sft_takes_trls_names_too(tmp_path):
    text = (
        "packing: true\nmax_seq_length: 77\neval_packing: false\nassistant_only_loss: true\ndataset_text_field: text\n"
    )
    options = in_yaml(tmp_path, text, command="sft")
    assert (options["packing"], options["max_length"]) == ("auto", 77)
    with pytest.raises(ValueError, match=r"loss_type .*got 'dft'; instead: loss_type: nll"):
        in_yaml(tmp_path, "loss_type: dft\n", command="sft")
    with pytest.raises(ValueError, match=r"instead: .*text"):
        parsed("--dataset_text_field", "body", command="sft")


def test_variables_of_the_environment_are_set_first(tmp_path, monkeypatch):
    for name in ("FASTDPO_TEST_A", "FASTDPO_TEST_B", "WANDB_PROJECT"):
        monkeypatch.setenv(name, "before")
    in_yaml(tmp_path, "env:\n  FASTDPO_TEST_A: 7\n  FASTDPO_TEST_B: text\nwandb_project: mine\n")
    assert [os.environ[name] for name in ("FASTDPO_TEST_A", "FASTDPO_TEST_B", "WANDB_PROJECT")] == ["7", "text", "mine"]
    with pytest.raises(ValueError, match="env must hold one variable per line as `NAME: value`"):
        in_yaml(tmp_path, "env: [A]\n")


@pytest.mark.parametrize(
    ("text", "eval_fraction", "eval_split"),
    [
        ("beta: 0.1\n", 0.0, None),  # all rows are trained on, as TRL does
        ("eval_strategy: steps\neval_steps: 5\n", 0.05, "test"),  # TRL's default
        ("eval_strategy: steps\neval_steps: 5\ndataset_test_split: val\n", 0.05, "val"),
        ("eval_fraction: 0.1\n", 0.1, None),
    ],
)
def test_trls_name_of_the_data_takes_trls_splits(tmp_path, text, eval_fraction, eval_split):
    options = in_yaml(tmp_path, text)
    assert (options["eval_fraction"], options["eval_split"]) == (eval_fraction, eval_split)


def test_our_name_of_the_data_and_a_file_hold_rows_out_as_before():
    for words in (["--dataset", "d/d"], ["--dataset_name", "d.jsonl"]):
        run_arguments, *_ = parse("train", TYPES["train"], ["--model", "m", *words, "--output_dir", "o"])
        assert (run_arguments.eval_fraction, run_arguments.eval_split) == (0.05, None)


MIXER = {"a/a": 1.0, "b/b": 0.25}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"dataset_mixer": MIXER},
            {
                "datasets": [
                    {"path": "a/a", "split": "train", "weight": 1.0},
                    {"path": "b/b", "split": "train", "weight": 0.25},
                ],
                "eval_datasets": [{"path": "a/a", "split": "test"}, {"path": "b/b", "split": "test"}],
            },
        ),
        (
            {"dataset_mixer": MIXER, "dataset_splits": ["train_prefs"], "dataset_configs": ["en", None]},
            {
                "datasets": [
                    {"path": "a/a", "name": "en", "split": "train_prefs", "weight": 1.0},
                    {"path": "b/b", "split": "train_prefs", "weight": 0.25},
                ]
            },
        ),
        (
            {
                "dataset_mixture": {
                    "datasets": [{"id": "a/a", "config": "en", "split": "train", "columns": ["x"], "weight": 0.5}],
                    "seed": 3,
                    "test_split_size": 0.1,
                }
            },
            {
                "datasets": [
                    {"path": "a/a", "name": "en", "split": "train", "columns": ["x"], "weight": 0.5, "seed": 3}
                ],
                "eval_fraction": 0.1,
            },
        ),
    ],
)
def test_the_handbooks_mixtures_become_datasets(tmp_path, given, expected):
    assert mixtures.as_options(given) == expected
    (tmp_path / "run.yaml").write_text(json.dumps({"model": "m", "output_dir": "o", "use_cpu": True, **given}))
    run_arguments, *_ = parse("train", TYPES["train"], ["--config", str(tmp_path / "run.yaml")])
    for name, value in expected.items():
        assert getattr(run_arguments, name) == value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"datasets": [{"paht": "a"}]}, "got 'paht'; did you mean 'path'?"),
        ({"datasets": [{"name": "a"}]}, "must have a path for every set"),
        ({"datasets": "a"}, "--datasets: invalid json list value: 'a'"),
        ({"datasets": [{"path": "a", "fraction": 0.5}, {"path": "b"}]}, "a fraction for every set or for none"),
        ({"datasets": [{"path": "a", "fraction": 1, "weight": 1}]}, "must not mix fraction"),
        ({"datasets": [{"path": "a", "weight": 2}]}, "weights of at most 1"),
        ({"dataset_mixer": {"a": 1}, "dataset_mixture": {}}, "must not both be given"),
        ({"dataset_splits": ["train"], "dataset": "d"}, "dataset_splits must be used together with dataset_mixer"),
        ({"dataset_mixer": {"a": 1}, "dataset_splits": ["valid"]}, "'train' or 'test' in every name, got"),
        ({"dataset_mixture": {"sets": []}}, "keys among datasets"),
        ({"datasets": [{"path": "a"}], "dataset": "d"}, "dataset must not be given together with datasets"),
        (
            {"datasets": [{"path": "a"}], "eval_dataset": "x", "eval_datasets": [{"path": "y"}]},
            "together with eval_datasets",
        ),
    ],
)
def test_a_mixture_that_says_two_things_or_none_is_refused(tmp_path, given, message):
    (tmp_path / "run.yaml").write_text(json.dumps({"model": "m", "output_dir": "o", "use_cpu": True, **given}))
    with pytest.raises(ValueError, match=r"must|invalid") as refused:
        parse("train", TYPES["train"], ["--config", str(tmp_path / "run.yaml")])
    assert message in str(refused.value)


def test_trls_dataset_name_is_not_read_beside_datasets(tmp_path):
    (tmp_path / "run.yaml").write_text("model: m\noutput_dir: o\ndataset_name: d/d\ndatasets: [{path: a/a}]\n")
    with pytest.warns(FutureWarning, match="dataset_name is ignored"):
        run_arguments, *_ = parse("train", TYPES["train"], ["--config", str(tmp_path / "run.yaml")])
    assert (run_arguments.dataset, run_arguments.datasets) == (None, [{"path": "a/a"}])


def adapter_of(*words):
    return parse("train", TYPES["train"], [*NEEDED, *words])[1]


def test_options_of_adapters_reach_the_adapter():
    config = lora_config(
        adapter_of(
            *("--use_peft", "--use_rslora", "--use_dora", "--lora_r", "4", "--lora_alpha", "8"),
            *("--lora_target_modules", "q_proj", "--lora_modules_to_save", "lm_head", "--lora_dropout", "0.1"),
        )
    )
    assert (config.use_rslora, config.use_dora, config.r, config.lora_alpha) == (True, True, 4, 8)
    assert (config.target_modules, config.modules_to_save, config.lora_dropout) == ({"q_proj"}, ["lm_head"], 0.1)
    config = lora_config(adapter_of("--use_peft", "--lora_target_parameters", "experts.gate_up_proj"))
    assert (list(config.target_modules), config.target_parameters) == ([], ["experts.gate_up_proj"])
    assert lora_config(adapter_of("--use_peft")).target_modules == "all-linear"


def test_options_of_quantization_reach_the_base():
    pytest.importorskip("bitsandbytes")
    assert quantization_config(adapter_of()) is None
    four = quantization_config(adapter_of("--use_peft", "--load_in_4bit"))
    assert (four.bnb_4bit_quant_type, str(four.bnb_4bit_compute_dtype)) == ("nf4", "torch.bfloat16")
    words = ("--bnb_4bit_quant_type", "fp4", "--use_bnb_nested_quant", "--bnb_4bit_quant_storage", "bfloat16")
    four = quantization_config(adapter_of("--use_peft", "--load_in_4bit", *words), "float16")
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == ("fp4", True)
    assert (str(four.bnb_4bit_quant_storage), str(four.bnb_4bit_compute_dtype)) == ("torch.bfloat16", "torch.float16")
    eight = quantization_config(adapter_of("--use_peft", "--load_in_8bit"))
    assert (eight.load_in_8bit, eight.load_in_4bit) == (True, False)
    with pytest.raises(ValueError, match="bnb_4bit_quant_storage must be a dtype such as uint8"):
        quantization_config(adapter_of("--use_peft", "--load_in_4bit", "--bnb_4bit_quant_storage", "int3"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--load_in_8bit"], "load_in_8bit must be used together with use_peft"),
        (["--use_peft", "--load_in_8bit", "--load_in_4bit"], "must not both be set"),
        (["--use_dora"], "use_dora must be used together with use_peft"),
        (["--lora_modules_to_save", "x"], "lora_modules_to_save must be used together with use_peft"),
        (["--use_peft", "--use_bnb_nested_quant"], "use_bnb_nested_quant must be used together with load_in_4bit"),
        (["--use_peft", "--lora_task_type", "SEQ_CLS"], "lora_task_type must be 'CAUSAL_LM'"),
        (["--use_peft", "--load_in_4bit", "--bnb_4bit_quant_type", "nf5"], "did you mean 'nf4'?"),
        (["--dtype", "bfloat61"], "dtype must be one of"),
    ],
)
def test_options_that_cannot_go_together_are_refused(words, message):
    with pytest.raises(ValueError, match="must") as refused:
        parsed(*words)
    assert message in str(refused.value)


def test_settings_of_loading_are_those_of_model_init_kwargs():
    from fastdpo.cli.looks import merge_load_settings

    words = ["--dtype", "bfloat16", "--model_revision", "v2", "--attn_implementation", "eager"]
    run_arguments, _, args = parse("train", TYPES["train"], [*NEEDED, *words, "--model_init_kwargs", '{"a": 1}'])
    merge_load_settings(args, run_arguments.load_settings())
    assert {**args.init_kwargs(), "dtype": str(args.init_kwargs()["dtype"])} == {
        "dtype": "torch.bfloat16",
        "revision": "v2",
        "attn_implementation": "eager",
        "a": 1,
    }
    for given, refused in (('{"dtype": "float16"}', "dtype"), ('{"revision": "v1"}', "model_revision")):
        run_arguments, _, args = parse("train", TYPES["train"], [*NEEDED, *words, "--model_init_kwargs", given])
        with pytest.raises(ValueError, match=f"{refused} must .*model_init_kwargs"):
            merge_load_settings(args, run_arguments.load_settings())


def test_a_command_line_of_trls_runs_as_it_is(capsys, caplog, folder):
    code, out, err = run(
        capsys,
        *("train", "--model_name_or_path", folder / "model", "--dataset_name", folder / "data"),
        *("--dataset_train_split", "train", "--dataset_test_split", "test", "--model_revision", "main"),
        *("--dtype", "float32", "--attn_implementation", "eager", "--learning_rate", "5.0e-4", "--use_peft"),
        *("--lora_r", 4, "--lora_alpha", 8, "--lora_dropout", 0.05, "--use_rslora", "--no_remove_unused_columns"),
        *("--eval_strategy", "steps", "--eval_steps", 1, "--output_dir", folder / "out"),
        *short("--ignore_bias_buffers"),
    )
    assert code == 0, err
    assert "lora_dropout=0.05 has no effect" in caplog.text
    assert "of 16 pairs" in out
    assert "6 evaluation rows" in out
    adapter = json.loads((folder / "out" / "adapter_config.json").read_text())
    assert (adapter["use_rslora"], adapter["r"]) == (True, 4)
    assert options_of(folder / "out")["model_init_kwargs"]["attn_implementation"] == "eager"


def yaml_of(folder, text):
    (folder / "run.yaml").write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in SHORT.items()) + text)
    return folder / "run.yaml"


def test_a_yaml_file_of_trls_with_several_sets_runs_as_it_is(capsys, folder, monkeypatch):
    monkeypatch.setenv("FASTDPO_TEST_A", "before")
    save_rows(folder / "more.jsonl", 8, seed=2)
    config = yaml_of(
        folder,
        f"model_name_or_path: {folder / 'model'}\noutput_dir: {folder / 'out'}\nlearning_rate: 1.0e-4\nbeta: 0.05\n"
        f"env:\n  FASTDPO_TEST_A: set\n"
        f"datasets:\n  - path: {folder / 'data'}\n    split: train\n    columns: [prompt, chosen, rejected]\n"
        f"  - path: json\n    data_files: {folder / 'more.jsonl'}\n    split: train\ntest_split_size: 0.25\n",
    )
    code, out, err = run(capsys, "train", "--config", config)
    assert code == 0, err
    assert "of 18 pairs" in out  # of 16 and 8, a quarter is held out
    assert "6 evaluation rows" in out
    assert os.environ["FASTDPO_TEST_A"] == "set"
    assert f"{folder / 'data'}, json" in (folder / "out" / "README.md").read_text()


def test_a_stream_of_several_sets_runs(capsys, folder):
    config = yaml_of(
        folder,
        f"model_name_or_path: {folder / 'model'}\noutput_dir: {folder / 'out'}\nstreaming: true\n"
        f"datasets:\n  - path: {folder / 'data' / 'test.jsonl'}\n  - path: json\n"
        f"    data_files: {folder / 'data' / 'train.jsonl'}\n",
    )
    code, out, err = run(capsys, "train", "--config", config, "--max_steps", 3)
    assert code == 0, err
    assert "kept 12 of the first 12 pairs" in out or "a stream" in out


def test_a_recipe_of_the_handbook_runs_as_it_is(capsys, folder):
    config = yaml_of(
        folder,
        f"""
model_name_or_path: {folder / "model"}
torch_dtype: null
use_flash_attention_2: false
dataset_mixer:
  {folder / "data"}: 0.5
dataset_splits:
- train
- test
preprocessing_num_workers: 1
bf16: false
beta: 0.01
do_eval: true
evaluation_strategy: steps
eval_steps: 1
gradient_accumulation_steps: 1
gradient_checkpointing: false
gradient_checkpointing_kwargs:
  use_reentrant: false
hub_model_id: zephyr
learning_rate: 5.0e-7
log_level: passive
lr_scheduler_type: cosine
max_length: 1024
max_prompt_length: 512
num_train_epochs: 1
optim: adamw_torch
output_dir: {folder / "out"}
push_to_hub: false
save_total_limit: 1
seed: 42
warmup_ratio: 0.1
""",
    )
    code, out, err = run(capsys, "train", "--config", config)
    assert code == 0, err
    assert "of 8 pairs" in out
    assert "6 evaluation rows" in out
    options = options_of(folder / "out")
    assert (options["warmup_steps"], options["eval_strategy"]) == (0.1, "steps")


def test_another_tokenizer_and_chat_template_are_used_and_saved(capsys, folder):
    make_tokenizer(chat_template=None).save_pretrained(folder / "model")
    make_byte_tokenizer().save_pretrained(folder / "bytes")
    (folder / "chat.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    words = ("--model", folder / "model", "--dataset", folder / "data" / "train.jsonl")
    code, _, err = run(
        capsys, "train", *words, *short("--output_dir", folder / "out", "--chat_template", folder / "chat.jinja")
    )
    assert code == 0, err
    assert (folder / "out" / "chat_template.jinja").read_text() == (folder / "chat.jinja").read_text()
    code, _, err = run(
        capsys, "train", *words, *short("--output_dir", folder / "new", "--tokenizer_name_or_path", folder / "bytes")
    )
    assert code == 2
    assert "token ids must be in [0, 64), the train dataset has" in err
    code, _, err = run(
        capsys, "train", *words, *short("--output_dir", folder / "new", "--chat_template", folder / "no.jinja")
    )
    assert code == 2
    assert "chat_template must be an existing file or the name of a template, got" in err


def test_an_8_bit_base_trains_under_an_adapter(capsys, folder):
    pytest.importorskip("bitsandbytes")
    words = ("--model", folder / "model", "--dataset", folder / "data", "--output_dir", folder / "out")
    code, _, err = run(capsys, "train", *words, *short("--use_peft", "--load_in_8bit", "--eval_fraction", 0))
    assert code == 0, err
    assert (folder / "out" / "adapter_model.safetensors").exists()


def test_former_names_that_are_translated_are_known_to_the_first_look():
    former = read_table()["former"]
    assert set(former) == set(SETTINGS)
    assert former["warmup_ratio"]["is_translated"] is True
    assert former["max_completion_length"]["is_translated"] is False
