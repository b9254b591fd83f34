"""Slips of a practitioner, in Python: each is found before it costs a run, and answered with what to write."""

import json
import logging
import shutil

import pytest
from datasets import Dataset
from tiny import make_llama, make_rows, make_tokenizer, save_model
from tiny_runs import logged, make_lora, tiny_config, tiny_trainer

from fastdpo import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from fastdpo.training.memory.estimate import estimate_peak_memory

# Adapters


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_porj", "v_proj"]}, "target_modules .* got 'q_porj'; did you mean 'q_proj'"),
        ({"target_modules": ["layers.0.self_attn.k_prj", "v_proj"]}, "did you mean 'layers.0.self_attn.k_proj'"),
        ({"target_modules": ["nothing_like_it", "v_proj"]}, "target_modules .* got 'nothing_like_it'$"),
        ({"modules_to_save": ["lm_haed"]}, "modules_to_save .* got 'lm_haed'; did you mean 'lm_head'"),
        ({"target_parameters": ["down_proj.weigt"]}, "target_parameters .* did you mean 'down_proj.weight'"),
    ],
)
def test_a_layer_that_an_adapter_names_and_the_model_lacks_is_refused_with_the_nearest(tmp_path, settings, message):
    model = make_llama()
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, model=model, peft_config=make_lora(**settings))
    assert not hasattr(model, "peft_config")  # it is as it came


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "layers.1.mlp.up_proj"], r".*\.v_proj", None])
def test_layers_that_are_there_are_taken_as_peft_takes_them(tmp_path, targets):
    trainer = tiny_trainer(tmp_path, peft_config=make_lora(target_modules=targets))
    assert trainer.model.base_model.targeted_module_names


# Checkpoints


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Of a run of all weights and of one of an adapter, after two of four steps."""
    folders = {}
    for name, adapter in {"full": None, "adapter": make_lora}.items():
        folder = tmp_path_factory.mktemp(name)
        run(folder, adapter, save_strategy="steps", save_steps=2, max_steps=2).train()
        folders[name] = folder / "checkpoint-2"
    return folders


def run(folder, adapter=None, **settings):
    keywords = {"peft_config": adapter()} if adapter else {}
    return tiny_trainer(folder, **{"save_strategy": "no", "max_steps": 4, **settings}, **keywords)


def copied(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def test_a_checkpoint_is_resumed_from(checkpoints, tmp_path):
    for name, adapter in {"full": None, "adapter": make_lora}.items():
        trainer = run(tmp_path / name, adapter)
        trainer.train(resume_from_checkpoint=str(checkpoints[name]))
        assert trainer.state.global_step == 4


def test_what_is_no_checkpoint_is_refused_before_anything_is_loaded(checkpoints, tmp_path, monkeypatch):
    trainer = run(tmp_path / "out")
    monkeypatch.setattr(trainer, "_inner_training_loop", lambda *args, **kwargs: pytest.fail("training began"))

    def resume(folder, message):
        with pytest.raises(ValueError, match=message):
            trainer.train(resume_from_checkpoint=folder)

    resume(str(tmp_path / "nowhere"), "must name a checkpoint directory, found none for .*nowhere")
    resume(True, "must name a checkpoint directory, found none for True")
    run_folder = checkpoints["full"].parent
    resume(str(run_folder), "got the folder of a run: .* It contains checkpoint-2")
    resume(str(tmp_path), "must be a checkpoint, got .* without trainer_state.json")
    resume(str(checkpoints["adapter"]), "trains all weights like this one, got .* that trained an adapter")
    copy = copied(checkpoints["full"], tmp_path)
    (copy / "trainer_state.json").write_text('{"global_')
    resume(str(copy), "must be a complete checkpoint, got .*trainer_state.json has 9 bytes instead of")
    (copy / "fastdpo_manifest.json").unlink()  # as in the checkpoints of other trainers
    resume(str(copy), "must be a complete checkpoint, got unreadable .*trainer_state.json")
    (copy / "trainer_state.json").write_text(json.dumps({"global_step": 2}))
    (copy / "model.safetensors").unlink()
    resume(str(copy), "must contain weights, got .* without any")


def test_a_run_of_an_adapter_does_not_go_on_from_one_of_all_weights(checkpoints, tmp_path):
    with pytest.raises(ValueError, match=r"trains an adapter like this one, got .* that trained all weights"):
        run(tmp_path, make_lora).train(resume_from_checkpoint=str(checkpoints["full"]))


def test_a_checkpoint_of_weights_alone_is_resumed_with_a_warning(checkpoints, tmp_path, caplog):
    copy = copied(checkpoints["full"], tmp_path)
    (copy / "optimizer.pt").unlink()
    (copy / "fastdpo_manifest.json").unlink()
    trainer = run(tmp_path / "out")
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=str(copy))
    assert "was saved without optimizer (save_only_model?): training resumes from step 2" in caplog.text


# Steps


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_train_epochs": 0}, "num_train_epochs must be > 0, got 0"),
        ({"num_train_epochs": -1}, "num_train_epochs must be a finite number >= 0.0, got -1"),
        ({"max_steps": 0}, "max_steps must be an integer >= 1, or -1 for num_train_epochs, got 0"),
        ({"max_steps": -5}, "max_steps must be an integer >= 1, or -1 for num_train_epochs, got -5"),
    ],
)
@pytest.mark.parametrize("config", [DPOConfig, SFTConfig])
def test_no_steps_are_refused_and_not_taken_for_a_success(tmp_path, config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(str(tmp_path), use_cpu=True, **settings)


def test_epochs_do_not_matter_where_steps_are_given(tmp_path):
    assert DPOConfig(str(tmp_path), use_cpu=True, num_train_epochs=0, max_steps=3).max_steps == 3


# Before the weights


@pytest.fixture
def weights_are_not_loaded(monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights loaded"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


CLASSES = [(DPOTrainer, DPOConfig), (SFTTrainer, SFTConfig)]


@pytest.mark.usefixtures("weights_are_not_loaded")
@pytest.mark.parametrize(("trainer", "config"), CLASSES)
def test_columns_of_no_form_are_said_before_weights_are_loaded(tmp_path, folder, trainer, config):
    good = Dataset.from_list(make_rows(2))
    bad = Dataset.from_list([{"frage": "x", "gut": "y", "schlecht": "z"}])
    for datasets in ({"train_dataset": bad}, {"train_dataset": good, "eval_dataset": {"mine": bad}}):
        with pytest.raises(ValueError, match=r"columns .* got \['frage', 'gut', 'schlecht'\].*dataset\)"):
            trainer(str(folder), args=config(str(tmp_path), use_cpu=True), **datasets)


@pytest.mark.usefixtures("weights_are_not_loaded")
@pytest.mark.parametrize(("trainer", "config"), CLASSES)
def test_a_folder_that_cannot_be_written_to_is_said_before_weights_are_loaded(tmp_path, folder, trainer, config):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(ValueError, match=r"output_dir must be a folder that can be written to, got .*file"):
            trainer(str(folder), args=config(str(path), use_cpu=True), train_dataset=Dataset.from_list(make_rows(2)))


@pytest.mark.usefixtures("weights_are_not_loaded")
@pytest.mark.parametrize(("trainer", "config"), CLASSES)
def test_a_model_that_is_not_there_is_said_as_such(tmp_path, monkeypatch, trainer, config):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = Dataset.from_list(make_rows(2))
    for name in ("./no/such/folder", "no-such-model"):
        with pytest.raises(ValueError, match=r"model must be a local directory or a model name on the Hub"):
            trainer(name, args=config(str(tmp_path / "out"), use_cpu=True), train_dataset=rows)


# Rows


def test_a_notice_stands_out_where_most_rows_are_lost(tmp_path, caplog):
    rows = [{"prompt": "the cat sees a dog ", "chosen": "it likes", "rejected": "it eats"}] * 7
    rows.append({"prompt": "the ", "chosen": "cat", "rejected": "dog"})
    with caplog.at_level(logging.WARNING):
        trainer = tiny_trainer(tmp_path, train_dataset=rows, max_length=4)
    assert len(trainer.train_dataset) == 1
    notice = [record.message for record in caplog.records if "MOST ROWS ARE LOST" in record.message]
    assert len(notice) == 1
    lines = notice[0].strip().split("\n")
    assert lines[0] == lines[-1] == "!" * 100
    assert lines[1] == "!! MOST ROWS ARE LOST: 7 of 8 of the train dataset"
    assert "dropped 7: prompt fills max_length (7: rows 0, 1, 2" in lines[2]
    assert "raise max_length, now 4" in lines[3]


def test_few_lost_rows_take_one_line(tmp_path, caplog):
    rows = [*make_rows(7), {"prompt": "the ", "chosen": "cat", "rejected": "cat"}]
    with caplog.at_level(logging.WARNING):
        tiny_trainer(tmp_path, train_dataset=rows)
    assert "train dataset: kept 7 of 8 pairs; dropped 1: chosen equals rejected" in caplog.text
    assert "MOST ROWS" not in caplog.text


def test_half_precision_on_a_cpu_is_warned_of(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        tiny_config(tmp_path, fp16=True)
    assert "fp16 on a CPU is slow and overflows" in caplog.text


# Names, as on DPOConfig and DPOTrainer


def test_an_unknown_setting_of_fine_tuning_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(TypeError, match=r"SFTConfig has no argument 'lerning_rate'; did you mean 'learning_rate'"):
        SFTConfig(str(tmp_path), lerning_rate=1e-5)


def test_trls_names_of_fine_tuning_are_translated_or_answered(tmp_path):
    with pytest.warns(FutureWarning, match="max_length=64"):
        args = SFTConfig(str(tmp_path), use_cpu=True, max_seq_length=64, packing=True, completion_only_loss=None)
    assert (args.max_length, args.packing) == (64, "packed")
    assert SFTConfig(str(tmp_path), use_cpu=True, packing=False, dataset_text_field="text").packing == "auto"
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    with pytest.warns(FutureWarning, match=r"chat_template='.*chat\.jinja'"):
        args = SFTConfig(str(tmp_path), use_cpu=True, chat_template_path=str(tmp_path / "chat.jinja"))
    assert args.tokenization_settings().chat_template == "{{ messages }}"
    with pytest.raises(ValueError, match=r"dataset.rename_column\('body', 'text'\)"):
        SFTConfig(str(tmp_path), dataset_text_field="body")


def test_every_field_of_trls_sft_config_is_known(tmp_path):
    import dataclasses

    from peers import peer

    from fastdpo.training.settings.trl_names import SFT_SETTINGS

    known = {f.name for f in dataclasses.fields(SFTConfig)} | set(SFT_SETTINGS)
    assert {f.name for f in dataclasses.fields(peer("trl").SFTConfig)} <= known


def test_the_trainer_of_fine_tuning_takes_its_tokenizer_under_the_old_name_and_answers_the_rest(tmp_path):
    args = SFTConfig(str(tmp_path), use_cpu=True, report_to="none")
    rows = Dataset.from_list([{"prompt": "the cat ", "completion": "sees a dog"}])
    tokenizer = make_tokenizer()
    with pytest.warns(FutureWarning, match=r"tokenizer.*processing_class"):
        trainer = SFTTrainer(make_llama(), args=args, train_dataset=rows, tokenizer=tokenizer)
    assert trainer.processing_class is tokenizer
    given = {"args": args, "train_dataset": rows, "processing_class": tokenizer}
    with pytest.raises(ValueError, match=r"compute_metrics.*no logits exist"):
        SFTTrainer(make_llama(), **given, compute_metrics=lambda prediction: {})
    with pytest.raises(ValueError, match=r"args=SFTConfig\(max_length=...\)\), got 7"):
        SFTTrainer(make_llama(), **given, max_length=7)
    with pytest.raises(TypeError, match="did you mean 'eval_dataset'"):
        SFTTrainer(make_llama(), **given, eval_datasets=[])


def test_a_trainer_works_on_after_another_config_is_made(tmp_path):
    """transformers then clears the state that accelerate shares between all trainers."""
    alone = tiny_trainer(tmp_path / "alone")
    alone.train()
    trainer = tiny_trainer(tmp_path / "one")
    tiny_config(tmp_path / "another").device  # noqa: B018
    assert estimate_peak_memory(trainer).total > 0
    tiny_config(tmp_path / "third").device  # noqa: B018
    trainer.train()
    assert logged(trainer) == logged(alone)
