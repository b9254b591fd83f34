"""The self-check on the attention and the precision of the run. What it finds in architectures is in
test_packed_logps.py.
"""

import functools

import pytest
import torch
from hybrids import build_any, build_hybrid, tiny_config
from test_attention_backends import emulated  # noqa: F401  the fixture
from test_packed_logps import GROUPS, SMALL, UNPACKABLE, assert_same, build
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from varlen_emulation import EmulatedVarlen, varlen_attn_2_13

from fastdpo import pack_pairs, prepare_model
from fastdpo.modeling import check_packing, prepared
from fastdpo.modeling.backbone import text_ids
from fastdpo.modeling.prepared import attention_backend


def test_it_says_what_attention_the_run_will_have_why_and_how_long_it_took():
    check = check_packing(prepare_model(build("llama")))
    assert check.ok
    assert check.backends == {"sdpa": "flash3, flash4, flash2, varlen: runs on cuda only"}
    assert check.seconds > 0
    assert str(check).startswith("sdpa, one SDPA call per branch (flash3, flash4, flash2, varlen: runs on cuda only);")
    assert f"checked in {check.seconds:.2g} s" in str(check)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_it_costs_a_dozen_forwards_of_a_few_tokens(num_layers):
    model, tokens = prepare_model(build("llama", num_hidden_layers=num_layers)), []
    model.get_input_embeddings().register_forward_hook(lambda _, args, output: tokens.append(args[0].numel()))
    assert check_packing(model).ok
    assert 8 <= len(tokens) <= 12  # the stock model's, padded rows, packed rows by either attention
    assert 200 <= sum(tokens) <= 250


def test_it_leaves_the_setting_of_the_model_as_it_was():
    model = prepare_model(build("llama"), attention_backend="mask")
    assert check_packing(model).backends == {"mask": "asked for"}
    assert attention_backend(model) == "mask"


def test_a_kernel_that_is_wrong_on_this_machine_is_noticed(emulated):  # noqa: F811
    @functools.wraps(varlen_attn_2_13)
    def sees_one_token_ahead(*args, window_size, **kwargs):
        return varlen_attn_2_13(*args, window_size=(window_size[0], 1), **kwargs)

    assert check_packing(build("llama")).ok
    emulated("varlen", EmulatedVarlen(sees_one_token_ahead))
    check = check_packing(prepare_model(build("llama"), attention_backend="varlen"))
    assert not check.ok
    assert check.reason.startswith("with attention by varlen in float32, packed log-probs differ from separate ones by")
    assert "attention_backend='sdpa'" in check.reason


def test_a_kernel_that_raises_leaves_padded_batches_where_it_was_asked_for_by_name(emulated):  # noqa: F811
    def broken(*args, window_size, scale, enable_gqa=False):
        raise RuntimeError("no kernel image is available")

    emulated("varlen", EmulatedVarlen(broken))
    check = check_packing(prepare_model(build("llama"), attention_backend="varlen"))
    assert not check.ok
    assert "no kernel image is available" in check.reason


def test_a_backend_asked_for_by_name_that_cannot_run_raises():
    model = prepare_model(build("llama"), attention_backend="varlen")
    with pytest.raises(ValueError, match=r"attention_backend 'varlen' .*varlen: runs on cuda"):
        check_packing(model)
    assert attention_backend(model) == "varlen"


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_the_runs_backend_is_checked_in_the_runs_precision(weights, emulated):  # noqa: F811
    dtypes = set()

    def recording(query, *args, scale=None, window_size=(-1, -1), enable_gqa=False):
        dtypes.add(query.dtype)
        return varlen_attn_2_13(query, *args, scale=scale, window_size=window_size, enable_gqa=enable_gqa)

    emulated("varlen", EmulatedVarlen(recording))
    check = check_packing(build("llama").to(weights), autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert check.ok, check.reason
    assert set(check.backends) == {"varlen"}
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize("model_type", ["stablelm", "falcon"])
def test_a_mask_over_the_row_reaches_layers_that_drop_other_arguments_but_no_biases_of_positions(model_type):
    torch.manual_seed(0)
    settings = {**UNPACKABLE, "stablelm": SMALL}[model_type]
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings)).eval()
    assert check_packing(model).ok == (model_type == "stablelm")
    assert check_packing(prepare_model(model, attention_backend="mask")).ok == (model_type == "stablelm")


class RoundedProducts(torch.overrides.TorchFunctionMode):
    """fp32 products whose factors keep so many bits, as TF32 (10) and bf16 (7) do on GPUs."""

    PRODUCTS = frozenset(
        {
            *(torch.nn.functional.linear, torch.nn.functional.scaled_dot_product_attention),
            *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.Tensor.matmul, torch.Tensor.__matmul__),
        }
    )

    def __init__(self, bits):
        super().__init__()
        self.bits = bits

    def rounded(self, value):
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        mantissa, exponent = torch.frexp(value)
        return torch.ldexp((mantissa * 2 ** (self.bits + 1)).round() / 2 ** (self.bits + 1), exponent)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.PRODUCTS:
            args = tuple(map(self.rounded, args))
        return func(*args, **(kwargs or {}))


def deep_model(num_layers, seed):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=199, num_hidden_layers=num_layers, initializer_range=0.1, **sizes))


@pytest.mark.parametrize("bits", [10, 7])
@pytest.mark.parametrize("num_layers", [2, 12, pytest.param(24, marks=pytest.mark.slow)])
def test_a_model_whose_products_are_rounded_is_packed_all_the_same(num_layers, bits):
    for seed in range(4):
        with RoundedProducts(bits):
            check = check_packing(deep_model(num_layers, seed))
        assert check.ok, (seed, check.reason)


@pytest.mark.parametrize("bits", [10, 7])
def test_rounding_does_not_hide_what_a_model_does_wrong(bits, monkeypatch):
    monkeypatch.setattr(prepared, "find_mixers", lambda *_: None)  # so that its convolutions leak
    leaking = build_hybrid("lfm2", spread=0.0, initializer_range=0.2)
    scaled = deep_model(12, 0)
    forward = scaled.lm_head.forward
    scaled.lm_head.forward = lambda hidden_states: 1.5 * forward(hidden_states)
    with RoundedProducts(bits):
        assert not check_packing(leaking).ok
        with pytest.raises(ValueError, match="does something else: log-probs differ by"):
            check_packing(scaled)


def test_the_precision_of_products_is_the_users_again_after_the_check():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        kinds = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
        asked = [kind.fp32_precision for kind in kinds]
        assert check_packing(build("llama")).ok
        assert [kind.fp32_precision for kind in kinds] == asked
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


REFUSED = {
    "cpmant": r"configured as an encoder: .*, from cpmant\.encoder\.layers\.0\.self_att\.self_attention on",
    "xlnet": r"configured as an encoder: .* later tokens, from transformer\.layer\.0\.rel_attn on",
    "modernbert-decoder": r"times its last hidden state; ModernBertDecoderForCausalLM has lm_head between the two",
    "prophetnet": r"applies the head to \(1, 2, 3\) vectors, where the last hidden state has \(1, 3\)",
    "reformer": r"rows of any length in training, got ReformerModelWithLMHead, which raises ValueError: If training",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_refused_model_is_told_the_layer_or_what_its_code_says(model_type):
    with pytest.raises(ValueError, match=REFUSED[model_type]):
        check_packing(build_any(model_type))


@pytest.mark.parametrize("has_adapter", [False, True], ids=["whole", "lora"])
def test_a_head_whose_last_rows_are_cut_off_gives_logits_for_the_others(has_adapter):
    """Inkling's logits are divided, and those of the ids that pad its vocabulary do not exist."""
    config = tiny_config("inkling_text")
    config.unpadded_vocab_size, config.logits_mup_width_multiplier = 60, 2.0
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    assert model(input_ids=torch.tensor([[5, 6]])).logits.shape == (1, 2, 60)
    if has_adapter:
        import peft

        config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        model = peft.get_peft_model(model, config).eval()
    check = check_packing(model)
    assert check.ok, check.reason
    assert_same(model, pack_pairs(GROUPS))


class ScaledHead(torch.nn.Linear):
    """As Dory's: a learned factor on the logit of every id."""

    def __init__(self, hidden_size, vocab_size):
        super().__init__(hidden_size, vocab_size, bias=False)
        self.logit_scale = torch.nn.Parameter(torch.linspace(0.1, 0.4, vocab_size))
        self.logit_scale_factor = 4.0

    def forward(self, hidden_states):
        return super().forward(hidden_states) * (self.logit_scale * self.logit_scale_factor)


def test_a_head_that_scales_each_logit_trains_its_scales_too():
    model = build("llama")
    model.lm_head = ScaledHead(*reversed(model.lm_head.weight.shape))
    check = check_packing(model)
    assert check.ok, check.reason
    assert_same(model, pack_pairs(GROUPS))
    assert model.lm_head.logit_scale.grad.abs().max() > 0
    model.lm_head.logit_scale = torch.nn.Parameter(torch.ones(()))  # one that the layer's own forward alone knows
    with pytest.raises(ValueError, match="does something else"):
        check_packing(model)


def test_probes_hold_ids_that_both_embedding_and_head_know():
    model = build("llama")
    hidden_size = model.config.hidden_size
    model.lm_head = torch.nn.Linear(hidden_size, 300, bias=False)  # longer than the table of the embedding
    assert check_packing(model).ok
    assert text_ids(model).max() < model.config.vocab_size


def test_a_model_whose_weights_are_not_finite_is_told_so():
    from tiny import make_llama

    model = make_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="model must give finite log-probs, got nan for a few short rows"):
        check_packing(prepare_model(model))
