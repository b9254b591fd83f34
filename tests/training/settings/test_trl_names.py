"""DPOConfig and DPOTrainer take what TRL's take: every field, names that TRL has removed, and TRL's own config."""

import dataclasses
import inspect
import re
import warnings
from pathlib import Path

import pytest
from datasets import Dataset
from peers import peer
from tiny import make_llama, make_rows, make_tokenizer
from transformers import TrainingArguments

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.training.settings import trl_names

# Every field of TRL 1.16's DPOConfig that TrainingArguments does not have, or of which it has another default.
TRLS = {
    "learning_rate": 1e-6,
    "logging_steps": 10,
    "gradient_checkpointing": True,
    "bf16": None,
    "model_init_kwargs": None,
    "trust_remote_code": False,
    "router_aux_loss_coef": None,
    "disable_dropout": True,
    "dataset_num_proc": None,
    "max_length": 1024,
    "truncation_mode": "keep_start",
    "padding_free": False,
    "pad_to_multiple_of": "auto",
    "precompute_ref_log_probs": False,
    "precompute_ref_batch_size": None,
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "ld_alpha": None,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "label_smoothing": 0.0,
    "beta": 0.1,
    "use_weighting": False,
    "discopop_tau": 0.05,
    "activation_offloading": False,
    "sync_ref_model": False,
    "ref_model_mixup_alpha": 0.6,
    "ref_model_sync_steps": 512,
    "pad_token": None,
}
PAGE = (Path(__file__).parents[3] / "docs" / "settings_from_trl.md").read_text()


def default_of(config, name):
    f = next(f for f in dataclasses.fields(config) if f.name == name)
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def config(tmp_path, **settings):
    defaults = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_steps": 1, "logging_steps": 1}
    return DPOConfig(str(tmp_path), **{**defaults, **settings})


def parts(rows=6):
    return {"train_dataset": Dataset.from_list(make_rows(rows)), "processing_class": make_tokenizer()}


def test_every_field_of_trls_config_is_one_of_ours():
    ours = {f.name for f in dataclasses.fields(DPOConfig)}
    assert set(TRLS) <= ours


def test_a_default_that_is_not_trls_stands_in_the_table():
    defaults = {f.name: default_of(TrainingArguments, f.name) for f in dataclasses.fields(TrainingArguments)} | TRLS
    differing = {name for name, default in defaults.items() if default_of(DPOConfig, name) != default}
    table = PAGE.split("## ")[1]
    assert table.startswith("Defaults that differ")
    where_a_gpu_is_asked = {"bf16"}  # None in both, and resolved in another way
    assert differing | where_a_gpu_is_asked == set(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE))


def test_the_written_out_fields_are_those_of_the_installed_trl():
    trl = peer("trl")
    known = {f.name for f in dataclasses.fields(TrainingArguments)}
    fields = {f.name for f in dataclasses.fields(trl.DPOConfig)}
    assert fields - known <= set(TRLS)
    assert {name: default_of(trl.DPOConfig, name) for name in TRLS} == TRLS
    for name in fields & known - set(TRLS):
        assert default_of(trl.DPOConfig, name) == default_of(TrainingArguments, name), name


def test_the_trainers_arguments_come_in_trls_order():
    trl = peer("trl")
    parameters = inspect.signature(DPOTrainer.__init__).parameters.values()
    ours = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    assert ours == list(inspect.signature(trl.DPOTrainer.__init__).parameters)
    assert tuple(ours[1:]) == trl_names.TRAINER_ARGUMENTS


@pytest.mark.parametrize(
    ("old", "settings"),
    [
        ({"rpo_alpha": 0.5}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
        ({"rpo_alpha": 2.0, "loss_type": "ipo"}, {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 2.0]}),
        ({"evaluation_strategy": "steps"}, {"eval_strategy": "steps"}),
        ({"no_cuda": True}, {"use_cpu": True}),
        ({"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
        ({"group_by_length": True}, {"length_bucketing": True}),
        ({"generate_during_eval": True}, {"num_eval_samples": 8}),
        ({"simpo_gamma": 1.0, "beta": 2.0}, {"gamma_beta_ratio": 0.5}),
    ],
    ids=str,
)
def test_a_removed_name_is_translated_with_one_warning(old, settings):
    known = {f.name for f in dataclasses.fields(DPOConfig)}
    with pytest.warns(FutureWarning, match=rf"{next(iter(old))}.*instead: {next(iter(settings))}") as caught:
        found = trl_names.translated("DPOConfig", old, known, trl_names.SETTINGS, stacklevel=2)
    assert found == {name: value for name, value in old.items() if name in known} | settings
    assert len(caught) == 1
    for name, value in settings.items():
        assert f"{name}={value!r}" in str(caught[0].message)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "name", ["use_liger_loss", "use_logits_to_keep", "force_use_ref_model", "label_pad_token_id", "padding_value"]
)
def test_a_name_with_nothing_to_do_here_says_why(tmp_path, name):
    with pytest.warns(FutureWarning, match=f"{name}.*instead: nothing, because") as caught:
        assert not hasattr(DPOConfig(str(tmp_path), use_cpu=True, **{name: True}), name)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("old", "line"),
    [
        ({"max_completion_length": 128}, "max_length=128"),
        ({"model_adapter_name": "train"}, "model.set_adapter('train')"),
        ({"ref_adapter_name": "start"}, "ref_model="),
        ({"ref_model_init_kwargs": {"dtype": "bfloat16"}}, "from_pretrained(..., **{'dtype': 'bfloat16'})"),
        ({"is_encoder_decoder": True}, "causal LM"),
        ({"tools": [str]}, "'tools': tools"),
        ({"logging_dir": "logs"}, "TENSORBOARD_LOGGING_DIR='logs'"),
        ({"simpo_gamma": 1.0, "beta": 0}, "simpo_gamma must be a number and beta a number > 0, got 1.0 and 0"),
    ],
    ids=str,
)
def test_a_removed_name_without_translation_is_refused_with_the_line_to_write(tmp_path, old, line):
    with pytest.raises(ValueError, match=re.escape(line)):
        config(tmp_path, **old)


def test_a_removed_name_that_was_off_is_taken_without_a_word(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config(tmp_path, model_adapter_name=None, generate_during_eval=False, is_encoder_decoder=False, rpo_alpha=None)
        config(tmp_path, per_gpu_train_batch_size=None, no_cuda=False, push_to_hub_token=None, use_liger_loss=False)


def test_the_page_names_every_removed_name():
    of_fine_tuning = (*trl_names.SFT_SETTINGS, *trl_names.SFT_ARGUMENTS)
    for name in (*trl_names.SETTINGS, *trl_names.RENAMED_LOSSES, *trl_names.ARGUMENTS, *of_fine_tuning):
        assert name in PAGE, name


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(TypeError, match=r"DPOConfig has no argument 'betta'; did you mean 'beta'"):
        config(tmp_path, betta=0.1)
    with pytest.raises(TypeError, match=r"did you mean 'precompute_ref_log_probs'"):
        config(tmp_path, precompute_ref_logprobs=True)


def test_two_names_for_one_setting_are_refused(tmp_path):
    with pytest.raises(ValueError, match="evaluation_strategy must not be given together with eval_strategy"):
        config(tmp_path, evaluation_strategy="no", eval_strategy="no")


def test_the_config_can_still_be_copied_and_subclassed(tmp_path):
    args = config(tmp_path, beta=0.3)
    assert dataclasses.replace(args, beta=0.7).beta == 0.7

    @dataclasses.dataclass
    class Own(DPOConfig):
        extra: int = 3

    assert Own(str(tmp_path), use_cpu=True, beta=0.4, extra=5).extra == 5
    with pytest.raises(TypeError, match="rpo_alpha"):
        Own(str(tmp_path), use_cpu=True, rpo_alpha=0.5)
    with pytest.warns(FutureWarning, match=r"Own has no argument 'rpo_alpha'"):
        args = trl_names.takes_trl_names(Own)(str(tmp_path), use_cpu=True, rpo_alpha=0.5, extra=5)
    assert (args.loss_weights, args.extra) == ([1.0, 0.5], 5)


def test_the_trainer_takes_its_tokenizer_under_the_old_name(tmp_path):
    given = parts()
    tokenizer = given.pop("processing_class")
    with pytest.warns(FutureWarning, match="tokenizer.*processing_class") as caught:
        trainer = DPOTrainer(make_llama(), args=config(tmp_path), tokenizer=tokenizer, **given)
    assert trainer.processing_class is tokenizer
    assert caught[0].filename == __file__


def test_settings_given_to_the_trainer_are_refused_with_the_line_to_write(tmp_path):
    with pytest.raises(ValueError, match=r"args=DPOConfig\(beta=...\)\), got 0.1"):
        DPOTrainer(make_llama(), args=config(tmp_path), beta=0.1, **parts())
    with pytest.raises(ValueError, match=r"args=DPOConfig\(max_target_length"):
        DPOTrainer(make_llama(), args=config(tmp_path), max_target_length=7, **parts())
    with pytest.raises(ValueError, match=r"optimizers=\(optimizer, scheduler\)"):
        DPOTrainer(make_llama(), args=config(tmp_path), optimizer_cls_and_kwargs=(None, {}), **parts())
    with pytest.raises(TypeError, match="did you mean 'train_dataset'"):
        DPOTrainer(make_llama(), args=config(tmp_path), train_datasets=[], **parts())


def test_trls_parser_of_command_lines_takes_our_config(tmp_path):
    trl = peer("trl")
    line = f"--model_name_or_path tiny --dataset_name pairs --output_dir {tmp_path} --use_cpu true --lora_r 4"
    line += " --loss_type sigmoid sft --loss_weights 1 0.5 --max_length 64 --bf16 true --pad_to_multiple_of 8"
    line += ' --model_init_kwargs {"dtype":"bfloat16"}'
    parser = trl.TrlParser((trl.ScriptArguments, DPOConfig, trl.ModelConfig))
    _, args, model = parser.parse_args_and_config(line.split())
    assert (args.loss_type, args.loss_weights, args.pad_to_multiple_of) == (["sigmoid", "sft"], [1.0, 0.5], 8)
    assert args.model_init_kwargs == {"dtype": "bfloat16"}
    assert model.lora_r == 4


def test_trls_own_config_is_taken_over(tmp_path):
    trl = peer("trl")
    settings = {
        "beta": 0.3,
        "max_length": 64,
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "gradient_checkpointing": False,
        "bf16": False,
        "report_to": "none",
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    theirs = trl.DPOConfig(str(tmp_path), use_cpu=True, disable_tqdm=True, save_strategy="no", max_steps=1, **settings)
    trainer = DPOTrainer(make_llama(), args=theirs, eval_dataset=Dataset.from_list(make_rows(4)), **parts())
    assert isinstance(trainer.args, DPOConfig)
    for name in (*settings, "max_steps", "output_dir", "save_strategy"):
        if name != "report_to":
            assert getattr(trainer.args, name) == getattr(theirs, name), name
    trainer.train()
    assert "eval_rewards/margins" in trainer.state.log_history[-2]


def test_without_args_the_output_goes_where_trls_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_llama()
    model.config._name_or_path = "someone/tiny-model"
    assert Path(DPOTrainer(model, **parts()).args.output_dir).name == "tiny-model-DPO"


def test_a_subclass_that_overrides_what_only_trl_calls_is_refused_instead_of_training_without_it():
    with pytest.raises(
        ValueError, match=r"Mine must not override .* got \['_compute_loss', 'dpo_loss'\]: .*accelerate"
    ):
        type("Mine", (DPOTrainer,), {"_compute_loss": None, "dpo_loss": None})
    with pytest.raises(ValueError, match="tokenize_row"):
        type("Mine", (type("Mixin", (), {"tokenize_row": None}), DPOTrainer), {})
    type("Mine", (DPOTrainer,), {"compute_loss": None})


def test_the_methods_that_subclasses_of_trls_trainer_override_are_those_that_it_has():
    own = vars(peer("trl").DPOTrainer)
    assert [name for name in trl_names.METHODS[:3] if name not in own] == []


def test_a_collator_of_trls_is_refused():
    collator = type("DataCollatorForPreference", (), {"__module__": "trl.trainer.dpo_trainer"})()
    with pytest.raises(ValueError, match=r"PackedBatch.asdict\(\), got TRL's DataCollatorForPreference; remove it"):
        DPOTrainer(make_llama(), args=DPOConfig("out", use_cpu=True), data_collator=collator, **parts())
