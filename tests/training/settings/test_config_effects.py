"""What the settings that TRL has too do here: each changes what it says, and no number that it should not."""

import json
from dataclasses import replace

import pytest
import torch
from releases import needs_activation_checkpointing
from tiny import make_llama, make_rows, make_tokenizer, save_model
from tiny_runs import tiny_trainer

from fastdpo import DPOConfig, PackedBatch, TokenizedPair, pack_pairs
from fastdpo.training.inputs.collator import PackingCollator
from fastdpo.training.precompute import precompute_ref_logps
from fastdpo.training.setup.models import disable_dropout, resolve_model


def trained(tmp_path, **settings):
    fast = tiny_trainer(tmp_path, **settings)
    fast.train()
    return [entry for entry in fast.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    "settings",
    [
        {"pad_to_multiple_of": 64},
        {"pad_to_multiple_of": 64, "packing": "padded"},
        {"pad_to_multiple_of": 64, "max_tokens_per_microbatch": 40},
        {"workspace_bytes": 4096},
        {"tile_rows": 16, "gradient_checkpointing": True},
        {"tile_rows": "auto", "packing": "padded", "reference": "cached"},
        {"padding_free": True},
        {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 1},
        {"remove_unused_columns": True},
        {"trust_remote_code": True},
        {"skip_tolerance": 1e-12},
    ],
    ids=str,
)
def test_how_it_is_computed_changes_no_loss_and_no_metric(tmp_path, plain, settings):
    logs = trained(tmp_path, **settings)
    assert len(logs) == 3
    for found, expected in zip(logs, plain, strict=True):
        for key in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "logps/rejected", "entropy", "num_tokens"):
            assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key


def test_rows_are_padded_to_a_multiple_packed_or_not():
    rows = [
        {"prompt_ids": [1, 2, 3], "responses": [[4, 5], [6]], "loss_masks": None, "ref_logps": None},
        {"prompt_ids": [7], "responses": [[8], [9, 10, 11]], "loss_masks": None, "ref_logps": None},
    ]
    for is_packed, shape in ((True, (1, 16)), (False, (4, 8))):
        inputs = PackingCollator(is_packed=is_packed, pad_to_multiple_of=8, pad_token_id=31)(rows)
        assert inputs["input_ids"].shape == shape
        batch = PackedBatch(**inputs)
        assert batch.num_tokens == PackedBatch(**PackingCollator(is_packed=is_packed)(rows)).num_tokens
        assert int((batch.input_ids == 31).sum()) == (5 if is_packed else 17)


def test_padding_at_the_end_of_a_packed_row_is_no_part_of_any_branch():
    pairs = [TokenizedPair([1, 2, 3], [4, 5], [6]), TokenizedPair([7], [8], [9, 10, 11])]
    assert pack_pairs(pairs).segments[-1][1] == 11
    inputs = PackingCollator(pad_to_multiple_of=8)(
        [{"prompt_ids": p.prompt_ids, "responses": p.responses, "loss_masks": None, "ref_logps": None} for p in pairs]
    )
    assert PackedBatch(**inputs).segments == (*pack_pairs(pairs).segments, (11, 16, 0, 0))


def test_the_head_op_gets_the_settings_that_are_its_own(tmp_path, monkeypatch):
    from fastdpo.modeling import packed_forward

    seen = []
    for name in ("sequence_logps", "sequence_loss"):
        real = getattr(packed_forward, name)

        def spy(*args, _real=real, _name=name, **settings):
            seen.append((_name, settings.get("skip_tolerance", 0.0), settings["workspace_bytes"]))
            return _real(*args, **settings)

        monkeypatch.setattr(packed_forward, name, spy)
    tiny_trainer(tmp_path, max_steps=1, workspace_bytes=12345).train()
    assert {workspace for *_, workspace in seen[-2:]} == {12345}  # the reference, and then the policy
    assert seen[-1][0] == "sequence_loss"
    tiny_trainer(tmp_path, max_steps=1, skip_tolerance=0.25).train()
    assert seen[-1] == ("sequence_logps", 0.25, None)
    args = DPOConfig(str(tmp_path), use_cpu=True, ref_cache_dir=str(tmp_path / "cache"), workspace_bytes=54321)
    rows = {"train": make_rows(4)}
    precompute_ref_logps(make_llama(), args, rows, processing_class=make_tokenizer())
    assert seen[-1] == ("sequence_logps", 0.0, 54321)


def test_references_are_cached_in_batches_of_as_many_prompts(tmp_path, monkeypatch):
    from fastdpo.references import precompute

    sizes = []
    real = precompute.next_batch

    def spy(*args):
        batch = real(*args)
        sizes.append(len(batch))
        return batch

    monkeypatch.setattr(precompute, "next_batch", spy)
    tiny_trainer(tmp_path, num_rows=12, reference="cached", precompute_ref_batch_size=5)
    assert sizes == [5, 5, 2]


def test_the_pad_token_is_set_and_saved(tmp_path):
    fast = tiny_trainer(tmp_path, pad_token="<unk>")
    assert fast.processing_class.pad_token == "<unk>"
    assert fast.collator.pad_token_id == fast.processing_class.unk_token_id
    fast.save_model()
    assert '"pad_token": "<unk>"' in (tmp_path / "tokenizer_config.json").read_text()
    with pytest.raises(ValueError, match="pad_token must be in the tokenizer's vocabulary, got '<nowhere>'"):
        tiny_trainer(tmp_path, pad_token="<nowhere>")


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig

class MineTokenizer(PreTrainedTokenizerFast):
    pass
"""


def test_code_that_a_model_brings_along_is_run_where_that_is_allowed(tmp_path):
    folder = save_model(tmp_path / "model")
    (folder / "mine.py").write_text(CODE)
    changes = {
        "config.json": {
            "model_type": "mine",
            "auto_map": {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "MineTokenizer",
            "auto_map": {"AutoTokenizer": [None, "mine.MineTokenizer"]},
        },
    }
    for name, change in changes.items():
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    both = {"model": str(folder), "ref_model": str(folder), "processing_class": None}
    trainer = tiny_trainer(tmp_path, **both, trust_remote_code=True)
    found = (trainer.model, trainer.ref_model, trainer.processing_class)
    assert [type(x).__name__ for x in found] == ["MineForCausalLM", "MineForCausalLM", "MineTokenizer"]
    with pytest.raises(ValueError, match="trust_remote_code"):
        tiny_trainer(tmp_path, **both)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["bfloat16", "torch.bfloat16", torch.bfloat16], ids=str)
def test_policy_and_reference_are_loaded_in_the_dtype_asked_for_by_either_name(tmp_path, name, value):
    make_llama().save_pretrained(tmp_path / "model")
    folder = str(tmp_path / "model")
    fast = tiny_trainer(tmp_path, model=folder, ref_model=folder, model_init_kwargs={name: value})
    dtypes = {p.dtype for model in (fast.model, fast.reference.model) for p in model.parameters()}
    assert dtypes == {torch.bfloat16}


def test_no_dropout_is_left_wherever_a_model_keeps_its_probability():
    from transformers import BloomConfig, BloomForCausalLM, XGLMConfig, XGLMForCausalLM

    sizes = {"vocab_size": 32, "d_model": 16, "ffn_dim": 32, "num_layers": 1, "attention_heads": 2}
    everywhere = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.5)
    bloom = BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2, hidden_dropout=0.5, attention_dropout=0.5)
    for model in (XGLMForCausalLM(XGLMConfig(**sizes, **everywhere)), BloomForCausalLM(bloom)):
        ids = torch.arange(5)[None]
        expected = model.eval()(ids).logits
        assert not torch.allclose(model.train()(ids).logits, expected)
        disable_dropout(model)
        torch.testing.assert_close(model(ids).logits, expected)


def test_a_model_and_its_tokenizer_may_be_in_a_subfolder(tmp_path):
    make_llama().save_pretrained(tmp_path / "repository" / "last")
    make_tokenizer().save_pretrained(tmp_path / "repository" / "last")
    args = DPOConfig(str(tmp_path), use_cpu=True, model_init_kwargs={"subfolder": "last"})
    model, tokenizer = resolve_model(str(tmp_path / "repository"), None, args)
    assert torch.equal(model.lm_head.weight, make_llama().lm_head.weight)
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()


def test_model_init_kwargs_beside_a_loaded_model_are_said_to_do_nothing(tmp_path, caplog):
    tiny_trainer(tmp_path, model_init_kwargs={"dtype": "bfloat16"})
    assert "model_init_kwargs has no effect" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"padding_free": True, "packing": "padded"}, "padding_free must be False if packing is 'padded'"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of must be an integer >= 1, 'auto' or None, got 0"),
        ({"pad_to_multiple_of": "many"}, "pad_to_multiple_of must be .* got 'many'"),
        ({"precompute_ref_batch_size": 0}, "precompute_ref_batch_size must be an integer >= 1 or None, got 0"),
        ({"skip_tolerance": 1.0}, r"skip_tolerance must be a probability mass in \[0, 1\), got 1.0"),
        ({"skip_tolerance": 0.1, "impl": "reference"}, "skip_tolerance must be 0.0"),
        ({"workspace_bytes": 0}, "workspace_bytes must be a positive int"),
        ({"tile_rows": 0}, "tile_rows must be an integer >= 1, 'auto' or None, got 0"),
        ({"tile_rows": 64, "torch_compile": True}, "tile_rows must be None with torch_compile, got 64"),
        (
            {"activation_offloading": True},
            "activation_offloading must be False (on a CPU|with transformers before 5.23)",
        ),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha must be None unless packing is 'padded', got 5.0"),
        (
            {"model_init_kwargs": {"dtype": "bfloat17"}},
            "model_init_kwargs must hold a torch dtype or 'auto' as dtype, got",
        ),
        ({"model_init_kwargs": {"dtype": "auto", "torch_dtype": "auto"}}, "got both"),
        ({"max_length": "512"}, "max_length must be an integer >= 2 or None, got '512'"),
        ({"max_prompt_length": True}, "max_prompt_length must be an integer >= 1 or None, got True"),
        ({"dataset_num_proc": 0}, "dataset_num_proc must be an integer >= 1 or None, got 0"),
        pytest.param(
            {"gradient_checkpointing": True, "activation_checkpointing": False},
            "must not differ.*got True and False",
            marks=needs_activation_checkpointing,
        ),
        ({"loss_type": "aot_pair"}, "instead: 'aot_unpaired'"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_do_what_it_says_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        DPOConfig(str(tmp_path), use_cpu=True, **settings)


@needs_activation_checkpointing
def test_checkpointing_has_one_value_under_both_names(tmp_path):
    for settings, value in (({}, False), *(({name: True}, True) for name in ("gradient_", "activation_"))):
        named = {f"{name}checkpointing": asked for name, asked in settings.items()}
        args = DPOConfig(str(tmp_path), use_cpu=True, **named)
        assert (args.gradient_checkpointing, args.activation_checkpointing) == (value, value)
    with pytest.raises(ValueError, match="must not differ"):  # a copy has a value under the other name already
        replace(args, gradient_checkpointing=False)


@needs_activation_checkpointing
def test_offloaded_activations_are_checkpoints_kept_in_host_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(DPOConfig, "device", torch.device("cpu"))
    args = DPOConfig(str(tmp_path), activation_offloading=True, activation_checkpointing_kwargs={"every_n_layers": 2})
    assert args.activation_checkpointing_kwargs == {"every_n_layers": 2, "offload": True}
    with pytest.raises(ValueError, match="activation_offloading must be False without gradient_checkpointing"):
        DPOConfig(str(tmp_path), activation_offloading=True, gradient_checkpointing=False)
