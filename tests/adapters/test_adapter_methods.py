"""Every method of PEFT either gives packed rows the model's own log-probs and gradients, or is refused."""

import inspect

import peft
import pytest
import torch
from peft import LoraConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft_cases import GROUPS, adapted, assert_like_plain, learned, lora, plain_sums
from tiny import make_llama

from fastdpo import pack_pairs, packed_logps, pad_pairs
from fastdpo.references.adapters import (
    REFERENCE_ADAPTER,
    as_reference,
    copy_adapter_as_reference,
    starts_from_adapter,
    trained_outside_adapter,
)
from fastdpo.training.setup.adapters import PEFT_TYPES, with_adapter
from fastdpo.training.setup.models import disable_dropout

LAYERS = ["q_proj", "v_proj", "down_proj"]
SETTINGS = {  # beyond target_modules, where a method needs more or its default is too large for a tiny model
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [3, 7, 11]},
    "FOURIERFT": {"n_frequency": 20},
    "VBLORA": {"vector_length": 8, "num_vectors": 16, "topk": 2, "r": 2},
    "OFT": {"oft_block_size": 8, "r": 0},
    "BOFT": {"boft_block_size": 8},
    "C3A": {"block_size": 16},
    "VERA": {"target_modules": ["q_proj", "o_proj"], "r": 8},
    "RANDLORA": {"target_modules": ["q_proj", "o_proj"], "r": 4},
    "HRA": {"r": 4},
    "MISS": {"r": 4},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 4},
}
LORA = {
    "rslora": {"use_rslora": True, "lora_alpha": 4},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal", "r": 4},
    "random": {"init_lora_weights": False},
    "mica": {"init_lora_weights": "mica"},
    "patterns": {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 3}},
    "all-linear": {"target_modules": "all-linear"},
    "bias": {"bias": "lora_only", "target_modules": ["c_attn"]},
}


def config_of(method):
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)]
    targets = {"target_modules": LAYERS} if "target_modules" in inspect.signature(cls).parameters else {}
    return cls(**{**targets, "task_type": "CAUSAL_LM", **SETTINGS.get(method, {})})


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=64))


class Arguments:
    seed, gradient_checkpointing = 0, False


@pytest.mark.parametrize("method", sorted(PEFT_TYPES))
def test_a_method_gives_the_models_own_log_probs_and_gradients(method):
    assert_like_plain(learned(with_adapter(make_llama(), config_of(method), Arguments).double()))


@pytest.mark.parametrize("case", LORA)
def test_a_kind_of_lora_gives_the_models_own_log_probs_and_gradients(case):
    model = gpt2() if case == "bias" else make_llama()
    config = LoraConfig(**{"r": 3, "target_modules": LAYERS, "task_type": "CAUSAL_LM", **LORA[case]})
    model = learned(with_adapter(model, config, Arguments).eval().double())
    assert_like_plain(model, layout=pad_pairs if case == "bias" else pack_pairs)


def test_lora_on_experts_gives_the_models_own_log_probs_and_gradients():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    settings = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "hidden_size": 32}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=32, intermediate_size=48, **settings))
    config = lora("q_proj", target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    assert_like_plain(learned(with_adapter(model, config, Arguments)), tolerance=1e-5)


@pytest.mark.parametrize("method", sorted({str(t.value) for t in PEFT_TYPE_TO_CONFIG_MAPPING} - PEFT_TYPES))
def test_every_other_method_is_refused_by_name(method):
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)]
    config = cls.__new__(cls)  # what else the method needs does not matter
    config.peft_type = PeftType(method)
    with pytest.raises(ValueError, match=rf"peft_config must .*{method}"):
        with_adapter(make_llama(), config, Arguments)


@pytest.mark.parametrize("method", ["LOHA", "LOKR", "LORA", "VERA"])
def test_dropout_inside_a_method_is_switched_off_with_all_other(method):
    config = config_of(method)
    fields = {"rank_dropout", "module_dropout", "lora_dropout", "vera_dropout"} & set(vars(config))
    for name in fields:
        setattr(config, name, 0.5)
    model = learned(with_adapter(make_llama(), config, Arguments)).train()
    assert fields
    assert len({plain_sums(model).sum().item() for _ in range(5)}) > 1
    disable_dropout(model)
    assert len({plain_sums(model).sum().item() for _ in range(5)}) == 1


def test_a_variant_of_lora_that_looks_at_the_whole_row_is_refused():
    with pytest.raises(ValueError, match="must not use alora_invocation_tokens"):
        with_adapter(make_llama(), lora(alora_invocation_tokens=[3, 4]), Arguments)


def sums_of(model):
    with torch.no_grad():
        return packed_logps(model.eval(), pack_pairs(GROUPS)).sequences.sums


@pytest.mark.parametrize("method", sorted(PEFT_TYPES))
def test_a_copy_is_the_reference_whatever_the_method(method):
    """It stays what it is, to the bit, while the adapter learns; what is trained stays trained."""
    model = learned(with_adapter(make_llama(), config_of(method), Arguments))
    assert starts_from_adapter(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    start, state = sums_of(model), torch.random.get_rng_state()
    copy_adapter_as_reference(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert torch.equal(sums_of(model), start)
    with as_reference(model):
        reference = sums_of(model)
    torch.testing.assert_close(reference, start)
    learned(model, seed=9)
    now = sums_of(model)
    assert not torch.allclose(now, start)
    with as_reference(model):
        assert torch.equal(sums_of(model), reference)
    assert torch.equal(sums_of(model), now)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("case", [name for name in LORA if name != "bias"])
def test_a_copy_is_the_reference_whatever_the_kind_of_lora(case):
    config = LoraConfig(**{"r": 3, "target_modules": LAYERS, "task_type": "CAUSAL_LM", **LORA[case]})
    model = with_adapter(make_llama(), config, Arguments)
    start = sums_of(model)
    if starts_from_adapter(model):
        base = [p.clone() for n, p in model.named_parameters() if not p.requires_grad]
        copy_adapter_as_reference(model)
        ours = (p for n, p in model.named_parameters() if not p.requires_grad and ".ref" not in n)
        for p, q in zip(base, ours, strict=True):  # PiSSA and OLoRA change the base, and must not do so twice
            assert torch.equal(p, q)
    learned(model)
    with as_reference(model):
        torch.testing.assert_close(sums_of(model), start)


NEW = {
    "lora": (lora(), False),
    "lora on the embedding": (lora("embed_tokens"), False),
    "lora bias": (lora(lora_bias=True), False),
    "modules": (lora(modules_to_save=["lm_head"]), False),
    "tokens": (lora(trainable_token_indices=[3]), False),
    "pissa": (lora(init_lora_weights="pissa"), True),
    "random": (lora(init_lora_weights=False), True),
}


@pytest.mark.parametrize("case", NEW)
def test_a_new_adapter_starts_as_its_base_unless_its_start_does_something(case):
    config, expected = NEW[case]
    model = with_adapter(make_llama(), config, Arguments)
    assert starts_from_adapter(model) == expected
    assert trained_outside_adapter(model) is None
    assert starts_from_adapter(learned(model))


@pytest.mark.parametrize("name", ["model", "layers", "self_attn", "default"])
def test_names_of_adapters_are_not_taken_for_parts_of_the_model(name):
    model = get_peft_model(make_llama(), lora(), adapter_name=name)
    learned(model)
    assert trained_outside_adapter(model) is None
    start = sums_of(model)
    copy_adapter_as_reference(model)
    learned(model, seed=8)
    with as_reference(model):
        torch.testing.assert_close(sums_of(model), start)
    bias = next(p for n, p in model.named_parameters() if n.endswith("norm.weight"))
    bias.requires_grad_(True)
    assert trained_outside_adapter(model).endswith("norm.weight")


def test_a_copy_keeps_dtype_and_scale_of_its_original():
    model = learned(adapted(lora("q_proj", lora_alpha=4), dtype=torch.bfloat16, is_learned=False))
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(3.0)
    start = sums_of(model)
    copy_adapter_as_reference(model)
    dtypes = {p.dtype for n, p in model.named_parameters() if f".{REFERENCE_ADAPTER}." in n}
    assert dtypes == {torch.bfloat16}
    with as_reference(model):
        torch.testing.assert_close(sums_of(model), start)


def test_the_list_of_methods_names_methods_of_peft():
    assert {str(t.value) for t in peft.PeftType} >= PEFT_TYPES
