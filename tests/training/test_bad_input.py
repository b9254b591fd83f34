"""What a user can get wrong is refused before a weight is changed, by name, rule and value."""

import copy

import pytest
import torch
from datasets import Dataset
from tiny import make_llama, make_rows, make_tokenizer
from transformers import AutoModelForCausalLM, FalconConfig

from fastdpo import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer


def config(tmp_path, **settings):
    return DPOConfig(str(tmp_path), use_cpu=True, disable_tqdm=True, save_strategy="no", max_steps=1, **settings)


def build(tmp_path, model=None, rows=None, tokenizer=None, **settings):
    keywords = {k: settings.pop(k) for k in ("ref_model", "peft_config") if k in settings}
    return DPOTrainer(
        make_llama() if model is None else model,
        args=config(tmp_path, **settings),
        train_dataset=Dataset.from_list(make_rows(6) if rows is None else rows),
        processing_class=make_tokenizer() if tokenizer is None else tokenizer,
        **keywords,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "beta must be > 0 and finite, got 0.0"),
        ({"beta": float("nan")}, "beta must be > 0 and finite, got nan"),
        ({"beta": float("inf")}, "beta must be > 0 and finite, got inf"),
        ({"beta": "0.1"}, "beta must be > 0 and finite, got '0.1'"),
        ({"learning_rate": -1.0}, "learning_rate must be a finite number >= 0.0, got -1.0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be an integer >= 1, got 0"),
        ({"gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps must be an integer >= 1, got 1.5"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0"),
        ({"loss_type": "sigmoyd"}, "did you mean 'sigmoid'"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing must be 0 for loss_type 'hinge'"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        ({"reference": "frozn"}, "did you mean 'frozen'"),
        ({"reference": "frozen", "reference_free": True}, "reference must be 'none' or 'auto'"),
        ({"packing": "yes"}, "packing must be one of"),
        ({"impl": "cuda"}, "impl must be one of"),
        ({"attention_backend": "flash_attn"}, "attention_backend must be one of"),
        ({"truncation_mode": "middle"}, "truncation_mode must be one of"),
        ({"max_length": 1}, "max_length must be an integer >= 2 or None, got 1"),
        ({"on_bad_row": "ignore"}, "on_bad_row must be one of"),
        ({"logging_nan_inf_filter": True}, "logging_nan_inf_filter must be False"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


def test_a_row_with_a_token_that_the_model_does_not_embed_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"token ids must be in \[0, 20\), the train dataset has \d+ in"):
        build(tmp_path, make_llama(vocab_size=20))


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="EOS"):
        build(tmp_path, tokenizer=tokenizer)


def test_a_model_that_is_not_there_is_refused_by_its_name(tmp_path):
    with pytest.raises(ValueError, match=r"no_such_model"):
        build(tmp_path, str(tmp_path / "no_such_model"))
    with pytest.raises(ValueError, match=r"no_such_model"):
        build(tmp_path, ref_model=str(tmp_path / "no_such_model"))


def test_a_model_that_gives_no_text_is_refused(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    model = CLIPVisionModel(
        CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match="a backbone and an LM head, got CLIPVisionModel"):
        build(tmp_path / "out", model)
    model.save_pretrained(tmp_path / "vision")
    with pytest.raises(
        ValueError, match=r"model must be a causal LM or have one inside, .*vision \(clip_vision_model\)"
    ):
        build(tmp_path / "out", str(tmp_path / "vision"))


DRAFT = {
    "num_hidden_layers": 4,
    "hidden_size": 16,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
}


@pytest.mark.parametrize("model_type", ["bert", "electra"])
def test_an_encoder_is_refused_with_that_word(tmp_path, model_type):
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](vocab_size=32, **sizes))
    with pytest.raises(ValueError, match=f"got {type(model).__name__}, an encoder"):
        build(tmp_path / "out", model)
    model.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match=rf"got .*\({model_type}\), which is an encoder"):
        build(tmp_path / "out", str(tmp_path / "encoder"))


def test_an_encoder_decoder_is_refused_with_that_word(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match=r"got .*t5 \(t5\), which is an encoder-decoder"):
        build(tmp_path / "out", str(tmp_path / "t5"))


SOUND_PARTS = {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"}, "decoder": {}}


@pytest.mark.parametrize(
    ("model_type", "settings", "why"),
    [
        (
            "musicgen",
            SOUND_PARTS,
            r"must have one text decoder, got musicgen with several: .*'text_encoder', 'decoder'",
        ),
        (
            "gemma4_assistant",
            {"text_config": {**DRAFT, "num_kv_shared_layers": 4}},
            r"got .* \(gemma4_assistant\), a draft model for speculative decoding",
        ),
    ],
    ids=["writes sound", "draft model"],
)
def test_a_model_that_reads_or_writes_no_text_by_itself_is_refused_by_its_config(tmp_path, model_type, settings, why):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    CONFIG_MAPPING[model_type](**settings).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=why):
        build(tmp_path / "out", str(tmp_path / "model"))


def test_image_columns_are_refused(tmp_path):
    rows = [{**row, "images": ["a.png"]} for row in make_rows(3)]
    with pytest.raises(ValueError, match="image"):
        build(tmp_path, rows=rows)


def test_token_ids_outside_the_embedding_are_refused(tmp_path):
    rows = [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}] * 3
    with pytest.raises(ValueError, match=r"token ids must be in \[0, 32\), the train dataset has 32 in responses"):
        build(tmp_path, rows=[*rows, {"prompt_ids": [1], "chosen_ids": [32], "rejected_ids": [4]}])
    with pytest.raises(ValueError, match=r"has -1 in prompt_ids"):
        build(tmp_path, rows=[*rows, {"prompt_ids": [-1], "chosen_ids": [3], "rejected_ids": [4]}])


def test_the_policy_itself_is_no_reference(tmp_path):
    model = make_llama()
    with pytest.raises(ValueError, match="ref_model must not be the same object as model"):
        build(tmp_path, model, ref_model=model)


def test_a_reference_that_cannot_be_had_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no adapter"):
        build(tmp_path, reference="adapter")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="ref_cache_dir must be a folder that can be written to"):
        build(tmp_path, reference="cached", ref_cache_dir=str(tmp_path / "file"))


def test_an_implementation_that_cannot_run_here_is_refused(tmp_path, monkeypatch):
    from fastdpo.kernels import logits

    monkeypatch.setattr(logits, "is_interpreted", lambda: False)
    with pytest.raises(ValueError, match='impl="triton"'):
        build(tmp_path, impl="triton")


def test_something_that_is_no_model_or_config_is_refused(tmp_path):
    from transformers import TrainingArguments

    with pytest.raises(ValueError, match="model must be a model or the name of one, got None"):
        DPOTrainer(None, args=config(tmp_path), train_dataset=make_rows(2), processing_class=make_tokenizer())
    with pytest.raises(ValueError, match="args must be a DPOConfig, got TrainingArguments"):
        DPOTrainer(make_llama(), args=TrainingArguments(str(tmp_path)), train_dataset=make_rows(2))


def test_a_reference_over_another_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocabulary of 32 logits, got 40"):
        build(tmp_path, ref_model=make_llama(vocab_size=40))


def test_a_reference_that_shares_the_policys_weights_is_refused(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="share weights"):
        build(tmp_path, model, ref_model=model.get_base_model())


def test_sequences_longer_than_the_learned_positions_are_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=8))
    with pytest.raises(ValueError, match="max_length must be at most 8"):
        build(tmp_path, model)


def test_virtual_prompt_tokens_are_refused(tmp_path):
    from peft import PromptTuningConfig

    with pytest.raises(ValueError, match="PROMPT_TUNING"):
        build(tmp_path, peft_config=PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))


def test_rows_that_cannot_be_used_are_counted_and_the_rest_is_trained(tmp_path, caplog):
    rows = make_rows(6)
    rows[1]["chosen"] = ""
    rows[2]["rejected"] = rows[2]["chosen"]
    rows[4]["chosen"] = None
    fast = build(tmp_path, rows=rows)
    report = fast.data_reports["train"]
    assert (report.num_kept, report.num_rows) == (3, 6)
    assert report.dropped == {"empty response": (1,), "chosen equals rejected": (2,), "response is not text": (4,)}
    assert "kept 3 of 6 pairs" in caplog.text
    fast.train()


def test_a_bad_row_stops_the_run_where_that_was_asked_for(tmp_path):
    rows = make_rows(6)
    rows[3]["chosen"] = ""
    with pytest.raises(ValueError, match="row 3"):
        build(tmp_path, rows=rows, on_bad_row="raise")


def falcon():
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(FalconConfig(**sizes, alibi=True))


def test_a_model_that_cannot_be_packed_falls_back_with_a_warning_and_trains_right(tmp_path, caplog):
    fast = build(tmp_path, falcon(), logging_steps=1)
    assert not fast.is_packed
    assert "Falling back to padded batches" in caplog.text
    fast.train()
    assert fast.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_a_reference_that_cannot_be_packed_makes_all_batches_padded(tmp_path, caplog):
    fast = build(tmp_path, ref_model=falcon(), logging_steps=1)
    assert not fast.is_packed
    assert not fast.data_collator.is_packed
    assert "Falling back to padded batches" in caplog.text
    with pytest.raises(ValueError, match="got 'packed'"):
        build(tmp_path, ref_model=falcon(), packing="packed")


def test_a_model_that_cannot_be_packed_is_refused_where_packing_was_asked_for(tmp_path):
    with pytest.raises(ValueError, match="got 'packed'"):
        build(tmp_path, falcon(), packing="packed")


def test_nothing_is_changed_or_written_by_a_refused_run(tmp_path):
    model = make_llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="usable row"):
        build(tmp_path / "out", model, rows=[{"prompt": "a", "chosen": "", "rejected": "b"}])
    assert not (tmp_path / "out").exists()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


def test_sft_trains_on_completions_and_on_chosen_responses(tmp_path):
    rows = make_rows(8)
    forms = {
        "completions": [{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows],
        "preferences": rows,
    }
    losses = {}
    for name, dataset in forms.items():
        args = SFTConfig(
            str(tmp_path / name),
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            max_steps=5,
            logging_steps=1,
            learning_rate=1e-2,
            per_device_train_batch_size=4,
        )
        trainer = SFTTrainer(
            make_llama(), args, train_dataset=Dataset.from_list(dataset), processing_class=make_tokenizer()
        )
        trainer.train()
        losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses["completions"] == losses["preferences"]
    assert losses["completions"][-1] < losses["completions"][0] - 0.1


def test_the_sft_loss_is_the_mean_over_the_response_tokens_of_the_step(tmp_path):
    rows = make_rows(5)
    args = SFTConfig(
        str(tmp_path),
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        max_steps=1,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
    )
    trainer = SFTTrainer(make_llama(), args, train_dataset=rows, processing_class=make_tokenizer())
    trainer.train()
    model, total, count = make_llama().eval(), 0.0, 0
    for row in trainer.train_dataset:
        ids = torch.tensor([[*row["prompt_ids"], *row["responses"][0]]])
        logps = model(ids).logits[0].log_softmax(-1)
        for position in range(len(row["prompt_ids"]), ids.shape[1]):
            total -= logps[position - 1, ids[0, position]].item()
            count += 1
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total / count, abs=1e-5)
