"""`fastdpo migrate`: recipes in the schemas of five projects, each migrated and its run started."""

import json
import re

import pytest
import yaml
from cli_runs import options_of, run, save_model, save_rows, short

from fastdpo.cli.recipes.kinds import KINDS, migrated, recognised
from fastdpo.cli.recipes.release import read_overrides

RECIPES = {
    "trl": """
model_name_or_path: {folder}/model
model_revision: main
dtype: float32
attn_implementation: sdpa
dataset_name: {folder}/data
dataset_train_split: train
dataset_test_split: test
output_dir: {folder}/out
learning_rate: 5.0e-6
beta: 0.2
loss_type: [sigmoid, sft]
loss_weights: [1.0, 0.1]
max_length: 512
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
eval_strategy: steps
eval_steps: 1
logging_steps: 1
use_peft: true
lora_r: 4
lora_alpha: 8
lora_target_modules: [q_proj, v_proj]
warmup_ratio: 0.1
report_to: none
env:
  FASTDPO_TEST_A: migrated
""",
    "handbook": """
model_name_or_path: {folder}/model
torch_dtype: float32
dataset_mixer:
  {folder}/data: 0.5
dataset_splits: [train, test]
preprocessing_num_workers: 1
bf16: false
beta: 0.01
do_eval: true
evaluation_strategy: steps
eval_steps: 1
gradient_accumulation_steps: 2
gradient_checkpointing: false
hub_model_id: mine
learning_rate: 5.0e-7
log_level: passive
logging_steps: 10
lr_scheduler_type: cosine
max_length: 1024
max_prompt_length: 512
num_train_epochs: 1
optim: adamw_torch
output_dir: {folder}/out
per_device_train_batch_size: 4
per_device_eval_batch_size: 8
push_to_hub: false
report_to: [none]
save_strategy: steps
save_steps: 100
save_total_limit: 1
seed: 42
warmup_ratio: 0.1
""",
    "axolotl": """
base_model: {folder}/model
model_type: LlamaForCausalLM
tokenizer_type: AutoTokenizer
load_in_8bit: false
load_in_4bit: false
strict: false
chat_template: chatml
rl: dpo
rl_beta: 0.3
datasets:
  - path: {folder}/data/train.jsonl
    ds_type: json
    split: train
    type: chatml.intel
dataset_prepared_path: last_run_prepared
val_set_size: 0.25
output_dir: {folder}/out
adapter: lora
lora_r: 4
lora_alpha: 8
lora_dropout: 0.05
lora_target_linear: true
lora_fan_in_fan_out:
sequence_len: 256
sample_packing: false
pad_to_sequence_len: false
gradient_accumulation_steps: 1
micro_batch_size: 2
num_epochs: 2
optimizer: adamw_torch
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: false
logging_steps: 1
flash_attention: true
warmup_steps: 1
evals_per_epoch: 2
saves_per_epoch: 1
weight_decay: 0.0
deepspeed:
special_tokens:
  pad_token: <pad>
loraplus_lr_ratio: 16
""",
    "llama_factory": """
### model
model_name_or_path: {folder}/model
trust_remote_code: false

### method
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 4
lora_target: all
pref_beta: 0.2
pref_loss: sigmoid
pref_ftx: 0.5

### dataset
dataset: mine
dataset_dir: {folder}/data
template: llama3
cutoff_len: 512
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 1

### output
output_dir: {folder}/out
logging_steps: 1
save_steps: 500
plot_loss: true
overwrite_output_dir: true

### train
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: false
ddp_timeout: 180000000

### eval
val_size: 0.25
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
""",
}
OVERRIDES = [
    *("model=blank_model", "model.name_or_path={folder}/model", "datasets=[{folder}/data]", "loss=dpo"),
    *("loss.beta=0.3", "exp_name=mine", "gradient_accumulation_steps=2", "batch_size=8", "eval_batch_size=4"),
    *("trainer=FSDPTrainer", "sample_during_eval=false", "model.fsdp_policy_mp=bfloat16", "wandb.enabled=false"),
    *("n_examples=64", "lr=1e-6", "optimizer=AdamW", "model.policy_dtype=float32", "eval_every=16"),
]
RELEASE_FILE = """
seed: 0
exp_name: mine
batch_size: 4
debug: false
fsdp_port:
datasets: [{folder}/data]
wandb: {{enabled: false, entity: null, project: p}}
local_dirs: [.cache]
do_first_eval: false
lr: 5e-7
gradient_accumulation_steps: 1
max_grad_norm: 10.0
max_length: 512
max_prompt_length: 256
n_epochs: 1
n_examples: null
trainer: BasicTrainer
optimizer: RMSprop
warmup_steps: 150
activation_checkpointing: false
eval_every: 8
minimum_log_interval_secs: 1.0
model: {{name_or_path: {folder}/model, tokenizer_name_or_path: null, archive: null, policy_dtype: float32}}
loss: {{name: ipo, beta: 0.1}}
local_run_dir: ${{get_local_run_dir:x}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model, data in two splits, a dataset_info.json, and every recipe as a file; the environment comes back."""
    monkeypatch.setenv("FASTDPO_TEST_A", "before")
    monkeypatch.setenv("WANDB_PROJECT", "before")
    save_model(tmp_path / "model")
    save_rows(tmp_path / "data" / "train.jsonl", 12)
    save_rows(tmp_path / "data" / "test.jsonl", 4, seed=1)
    info = {"mine": {"file_name": "train.jsonl", "ranking": True}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    for kind, text in {**RECIPES, "release": RELEASE_FILE}.items():
        (tmp_path / f"{kind}.yaml").write_text(text.format(folder=tmp_path))
    return tmp_path


def overrides(folder):
    return [word.format(folder=folder) for word in OVERRIDES]


def migrate(capsys, folder, *words):
    """What the migrated recipe holds, its text, and what was printed."""
    code, out, err = run(capsys, "migrate", *words, "--out", folder / "run.yaml")
    assert code == 0, out + err
    text = (folder / "run.yaml").read_text()
    return yaml.safe_load(text), text, out


CASES = {kind: [f"{kind}.yaml"] for kind in (*RECIPES, "release")} | {"overrides": None}


@pytest.mark.parametrize("case", CASES)
def test_a_recipe_is_recognised_migrated_and_its_run_started(capsys, folder, case):
    words = overrides(folder) if CASES[case] is None else [folder / CASES[case][0]]
    kind = "release" if case == "overrides" else case
    _, _, out = migrate(capsys, folder, *words)
    assert f"recognised as a recipe of {KINDS[kind][0]}; wrote" in out
    more = ("--bf16", "false", "--output_dir", folder / "out", "--per_device_train_batch_size", 2)
    code, out, err = run(capsys, "train", "--config", folder / "run.yaml", *short(*more))
    assert code == 0, err
    assert "saved in" in out
    assert options_of(folder / "out")["max_steps"] == 1


def test_every_line_that_changed_says_what_it_was(capsys, folder):
    for case, words in CASES.items():
        words = overrides(folder) if words is None else [folder / words[0]]
        lines, text, _ = migrate(capsys, folder, *words, "--overwrite")
        is_file = case != "overrides"
        before = yaml.safe_load((folder / f"{case}.yaml").read_text()) if is_file else read_overrides(words)
        for name, value in lines.items():
            comment = re.search(rf"^{name}:.*?  # (.+)$", text, flags=re.MULTILINE)
            is_same = name in before and before[name] == value
            assert (comment is None) == (is_same or name == "env"), (case, name)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (
            "trl",
            {"beta": 0.2, "loss_type": ["sigmoid", "sft"], "eval_split": "test", "warmup_steps": 0.1, "lora_r": 4},
        ),
        ("handbook", {"dtype": "float32", "warmup_steps": 0.1, "eval_strategy": "steps", "dataset_num_proc": 1}),
        (
            "axolotl",
            {
                "loss_type": "sigmoid",
                "beta": 0.3,
                "use_peft": True,
                "lora_target_modules": ["all-linear"],
                "eval_fraction": 0.25,
                "max_length": 256,
                "per_device_train_batch_size": 2,
                "num_train_epochs": 2,
                "eval_strategy": "steps",
                "eval_steps": 0.25,  # two evaluations in each of two epochs
                "save_strategy": "epoch",
                "pad_token": "<pad>",
            },
        ),
        (
            "llama_factory",
            {
                "loss_type": ["sigmoid", "sft"],
                "loss_weights": [1.0, 0.5],
                "beta": 0.2,
                "lora_r": 4,
                "lora_alpha": 8,  # twice the rank, its default
                "max_length": 512,
                "eval_fraction": 0.25,
                "warmup_steps": 0.1,
            },
        ),
        (
            "release",
            {
                "loss_type": "ipo",
                "beta": 0.1,
                "optim": "rmsprop",
                "warmup_steps": 150,
                "lr_scheduler_type": "constant_with_warmup",
                "max_prompt_length": 256,
                "per_device_train_batch_size": 4,
                "eval_steps": 2,  # 8 examples
                "num_eval_samples": 16,
            },
        ),
        (
            "overrides",
            {
                "loss_type": "sigmoid",
                "beta": 0.3,
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 2,
                "max_steps": 8,  # 64 examples
                "learning_rate": 1e-6,
                "optim": "adamw_torch",
                "bf16": True,
                "run_name": "mine",
                "max_length": 512,
            },
        ),
    ],
)
def test_values_are_those_that_the_recipe_means(capsys, folder, case, expected):
    words = overrides(folder) if case == "overrides" else [folder / f"{case}.yaml"]
    lines, _, _ = migrate(capsys, folder, *words)
    got = {name: lines.get(name) for name in expected}
    assert {n: float(v) if n == "learning_rate" else v for n, v in got.items()} == expected


def test_data_of_a_recipe_is_found(capsys, folder):
    lines, _, _ = migrate(capsys, folder, folder / "llama_factory.yaml")
    assert lines["datasets"] == [{"path": f"{folder}/data/train.jsonl", "split": "train[:1000]"}]
    lines, _, _ = migrate(capsys, folder, folder / "axolotl.yaml", "--overwrite")
    assert lines["dataset"] == f"{folder}/data/train.jsonl"
    lines, _, _ = migrate(capsys, folder, folder / "handbook.yaml", "--overwrite")
    assert lines["datasets"] == [{"path": f"{folder}/data", "split": "train", "weight": 0.5}]
    assert (lines["eval_dataset"], lines["eval_split"]) == (f"{folder}/data", "test")


@pytest.mark.parametrize(
    ("case", "line", "why"),
    [
        ("axolotl", "datasets.type: chatml.intel", "reads rows by their columns"),
        ("axolotl", "loraplus_lr_ratio: 16", "both factors of LoRA have one learning rate"),
        ("llama_factory", "template: llama3", "the tokenizer's own chat template is used"),
        ("release", "loss: ipo", "the release sums them"),
        ("overrides", "trainer: FSDPTrainer", "accelerate_config: fsdp2"),
    ],
)
def test_what_has_no_counterpart_is_listed_with_the_reason(capsys, folder, case, line, why):
    words = overrides(folder) if case == "overrides" else [folder / f"{case}.yaml"]
    _, text, out = migrate(capsys, folder, *words)
    assert f"no counterpart: {line}\n    " in out
    assert why in out
    assert f"#   {line}\n" in text
    assert why in text


def book_of(kind, **recipe):
    return migrated(kind, recipe, folder=None)


def values(book):
    return {name: line.value for name, line in book.lines.items()}


def test_a_key_that_nobody_knows_is_listed():
    book = book_of("axolotl", base_model="m", rl="dpo", datasets=[{"path": "a/b"}], micro_batch_siz=3)
    assert book.lost[0] == ("micro_batch_siz: 3", "unknown key; did you mean 'micro_batch_size'?")


AXOLOTL = {"base_model": "m", "rl": "dpo", "datasets": [{"path": "a/b"}]}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"rl": "ipo"}, {"loss_type": "ipo", "eval_fraction": 0}),
        ({"rl": "simpo", "rl_beta": 2.0, "simpo_gamma": 1.0}, {"loss_type": "simpo", "gamma_beta_ratio": 0.5}),
        ({"rpo_alpha": 0.5}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
        ({"adapter": "qlora"}, {"use_peft": True, "load_in_4bit": True}),
        ({"gradient_checkpointing": "offload"}, {"gradient_checkpointing": True, "activation_offloading": True}),
        ({"deepspeed": "deepspeed_configs/zero3_bf16.json"}, {"accelerate_config": "zero3"}),
        ({"fsdp": ["full_shard", "auto_wrap"]}, {"accelerate_config": "fsdp2"}),
        ({"bf16": "full"}, {"dtype": "bfloat16"}),
        ({"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
        ({"cosine_min_lr_ratio": 0.1}, {"lr_scheduler_type": "cosine_with_min_lr"}),
        ({"val_set_size": 0.1, "evals_per_epoch": 1}, {"eval_strategy": "epoch", "eval_fraction": 0.1}),
        ({"evals_per_epoch": 4}, {"eval_strategy": None}),  # on nothing
        ({"wandb_project": "p", "wandb_name": "n"}, {"report_to": "wandb", "run_name": "n"}),
        ({"test_datasets": [{"path": "c/d", "split": "val"}]}, {"eval_dataset": "c/d", "eval_split": "val"}),
        ({"datasets": [{"path": "a/b", "name": "en"}]}, {"dataset": "a/b", "dataset_config": "en"}),
        ({"datasets": [{"path": "a"}, {"path": "b"}]}, {"datasets": [{"path": "a"}, {"path": "b"}]}),
    ],
    ids=str,
)
def test_keys_of_axolotl(more, expected):
    found = values(book_of("axolotl", **{**AXOLOTL, **more}))
    assert {name: found.get(name) for name in expected} == expected


FACTORY = {"model_name_or_path": "m", "stage": "dpo", "dataset": "d"}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"pref_loss": "simpo", "pref_beta": 2.5, "simpo_gamma": 0.5}, {"loss_type": "simpo", "gamma_beta_ratio": 0.2}),
        ({"pref_loss": "hinge"}, {"loss_type": "hinge", "learning_rate": 5e-5, "max_length": 2048}),
        ({"finetuning_type": "lora"}, {"use_peft": True, "lora_r": 8, "lora_alpha": 16}),
        ({"finetuning_type": "lora", "lora_target": "q_proj,v_proj"}, {"lora_target_modules": ["q_proj", "v_proj"]}),
        ({"quantization_bit": 4}, {"load_in_4bit": True, "use_bnb_nested_quant": True}),
        ({"quantization_bit": 4, "double_quantization": False}, {"use_bnb_nested_quant": None}),
        ({"quantization_bit": 8}, {"load_in_8bit": True}),
        ({"flash_attn": "fa2"}, {"attention_backend": "flash2"}),
        ({"deepspeed": "examples/deepspeed/ds_z2_config.json"}, {"accelerate_config": "zero2"}),
        ({"adapter_name_or_path": "a"}, {"model": "a"}),
        ({"val_size": 0.1, "eval_strategy": "steps"}, {"eval_fraction": 0.1, "eval_strategy": "steps"}),
        ({"eval_strategy": "steps"}, {"eval_fraction": 0, "eval_strategy": None}),
        ({"dataset": "d,e", "max_samples": 5}, {"datasets": [{"path": p, "split": "train[:5]"} for p in "de"]}),
        (
            {"pure_bf16": True, "disable_gradient_checkpointing": True},
            {"dtype": "bfloat16", "gradient_checkpointing": False},
        ),
    ],
    ids=str,
)
def test_keys_of_llama_factory(tmp_path, more, expected):
    found = values(migrated("llama_factory", {**FACTORY, **more}, tmp_path))
    assert {name: found.get(name) for name in expected} == expected


def test_a_name_on_the_hub_is_read_from_dataset_info(tmp_path):
    entry = {"hf_hub_url": "a/b", "ranking": True, "subset": "en", "split": "prefs", "columns": {"prompt": "question"}}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"d": entry}))
    book = migrated("llama_factory", FACTORY, tmp_path)
    found = values(book)
    assert (found["dataset"], found["dataset_config"], found["dataset_split"]) == ("a/b", "en", "prefs")
    assert any(line.startswith("dataset_info.json: d.columns") for line, _ in book.lost)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model=pythia69", "datasets=[hh]", "loss=dpo", "loss.beta=0.1"], {"model": "EleutherAI/pythia-6.9b"}),
        (["model=pythia28", "datasets=[hh]", "loss=dpo"], {"dataset": "Anthropic/hh-rlhf", "eval_split": "test"}),
        (["loss=dpo", "datasets=[hh,shp]"], {"datasets": [{"path": "Anthropic/hh-rlhf"}, {"path": "stanfordnlp/SHP"}]}),
        (["loss=dpo"], {"learning_rate": 5e-7, "eval_steps": 5000, "report_to": "wandb", "max_grad_norm": 10.0}),
        (["loss=dpo", "datasets=[hh]"], {"truncation_mode": "keep_end"}),
        (["loss=dpo", "datasets=[se]"], {"truncation_mode": None}),
        (["loss=sft", "model=gpt2-xl"], {"loss_type": None, "model": "gpt2-xl", "num_eval_samples": None}),
        (["loss=dpo", "loss.reference_free=true", "loss.label_smoothing=0.1"], {"reference_free": True}),
        (["loss=dpo", "+model.archive=/x/policy.pt"], {"model": "/x/policy.pt"}),
    ],
    ids=str,
)
def test_overrides_of_the_release(words, expected):
    book = migrated("release", read_overrides(words), folder=None)
    assert {name: values(book).get(name) for name in expected} == expected
    assert book.command == ("sft" if "loss=sft" in words else "train")


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        ({"model_name_or_path": "m", "dataset_name": "d", "beta": 0.1}, "trl"),
        ({"model_name_or_path": "m", "datasets": [{"path": "d"}], "dtype": "bfloat16"}, "trl"),
        ({"model_name_or_path": "m", "dataset_mixer": {"d": 1.0}, "torch_dtype": "bfloat16"}, "handbook"),
        ({"model_name_or_path": "m", "dataset_mixture": {"datasets": []}}, "handbook"),
        ({"base_model": "m", "datasets": [], "rl": "dpo"}, "axolotl"),
        ({"model_name_or_path": "m", "stage": "dpo", "dataset": "d"}, "llama_factory"),
        ({"loss": {"name": "dpo", "beta": 0.1}, "model": {"name_or_path": "m"}, "datasets": ["hh"]}, "release"),
        ({"model_name_or_path": "m", "output_dir": "o"}, "trl"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_recipe_is_told_by_its_keys(recipe, kind):
    assert recognised(recipe, has_overrides=False) == kind


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\n", "must have keys that identify its project"),
        ("[1]", "must hold one key per line"),
        ("a: [", "is not valid YAML"),
        ("base_model: m\nrl: kto\n", "rl must be one of dpo, ipo, simpo, orpo"),
        ("base_model: m\nmicro_batch_size: 1\n", "rl must be one of dpo, ipo, simpo, orpo"),
        ("stage: sft\nfinetuning_type: lora\n", "stage must be 'dpo'"),
        ("loss: {name: rlhf, beta: 1}\nlr: 1\n", "loss must be dpo, ipo or sft"),
    ],
)
def test_what_is_no_dpo_recipe_is_refused(capsys, tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    code, _, err = run(capsys, "migrate", tmp_path / "recipe.yaml")
    assert code == 2
    assert message in err


def test_a_missing_recipe_and_an_existing_out_are_refused(capsys, folder):
    code, _, err = run(capsys, "migrate", folder / "axolotl.yml")
    assert code == 2
    assert f"did you mean '{folder}/axolotl.yaml'?" in err
    code, _, err = run(capsys, "migrate", folder / "trl.yaml", "--out", folder / "axolotl.yaml")
    assert code == 2
    assert "out must not exist yet" in err
    code, _, err = run(capsys, "migrate", folder / "trl.yaml", folder / "axolotl.yaml")
    assert code == 2
    assert "recipe must be one file and overrides" in err


def test_without_out_the_recipe_is_printed(capsys, folder):
    code, out, err = run(capsys, "migrate", folder / "axolotl.yaml")
    assert code == 0
    assert yaml.safe_load(out)["beta"] == 0.3
    assert "recognised as a recipe of Axolotl" in err


def test_a_file_and_overrides_go_together(capsys, folder):
    lines, _, _ = migrate(capsys, folder, folder / "release.yaml", "loss=dpo", "loss.name=dpo", "lr=2e-6")
    assert (lines["loss_type"], float(lines["learning_rate"])) == ("sigmoid", 2e-6)


def test_what_is_left_to_mend_is_said_with_exit_code_1(capsys, folder):
    (folder / "recipe.yaml").write_text("base_model: m\nrl: dpo\nrl_beta: much\ndatasets: [{path: d}]\n")
    code, _, err = run(capsys, "migrate", folder / "recipe.yaml", "--out", folder / "run.yaml")
    assert code == 1
    assert "fix this before you run it: argument --beta: invalid float value: 'much'" in err
    code, _, err = run(capsys, "migrate", "loss=dpo", "datasets=[hh]", "--out", folder / "other.yaml")
    assert code == 1
    assert "fix this before you run it: the following arguments are required: --model" in err
