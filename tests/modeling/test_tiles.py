"""Layers over tiles of rows: the numbers of whole rows, less memory, and refusals by name."""

import pytest
import torch
from tiny import make_llama
from torch import nn
from torch.nn.functional import silu
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from fastdpo import TokenizedPair, pack_pairs
from fastdpo.data.batches.packing import pad_pairs
from fastdpo.evidence.memory import peak_live_bytes
from fastdpo.modeling import packed_logps, packed_loss, prepare_model
from fastdpo.modeling.backbone import bare_model
from fastdpo.modeling.tiles import auto_tile_rows, remove_tiles, tiles_of, use_tiles
from fastdpo.modeling.tiles.run import RowLeaves, run_in_tiles

SHAPE = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS = {
    "llama": SHAPE,
    "gemma2": SHAPE,
    "qwen3_moe": {**SHAPE, **EXPERTS},
    "lfm2": SHAPE,  # convolutions between neighbouring tokens
    "gpt2": {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "resid_pdrop": 0, "attn_pdrop": 0},
}
TILED = {  # kinds of modules that run in tiles
    "llama": {"LlamaRMSNorm", "LlamaMLP"},
    "gemma2": {"Gemma2RMSNorm", "Gemma2MLP"},
    "qwen3_moe": {"Qwen3MoeRMSNorm", "Qwen3MoeSparseMoeBlock"},
    "lfm2": {"Lfm2RMSNorm", "Lfm2MLP"},
    "gpt2": {"GPT2MLP"},
}


def with_lora(model, r):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM"))


def make_model(kind, **overrides):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**MODELS[kind], **overrides}))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return prepare_model(model).train()


def make_pairs(vocab_size=256, lengths=((50, 30, 41), (7, 64, 3))):
    draw = torch.Generator().manual_seed(1)

    def ids(length):
        return torch.randint(vocab_size, (length,), generator=draw).tolist()

    return [TokenizedPair(ids(p), ids(c), ids(r)) for p, c, r in lengths]


def loss_and_gradients(model, batch):
    """The loss of log-probs with weights of their own, and the gradient of every trained weight."""
    model.zero_grad(set_to_none=True)
    loss, _ = packed_loss(model, batch, lambda sums, *_: (sums * torch.arange(1.0, len(sums) + 1)).sum())
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found, expected, tolerance):
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert (found[1][name] - grad).abs().max() <= tolerance * grad.abs().max() + 1e-12, name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_tiles_give_loss_and_gradients_of_whole_rows(kind, checkpointing):
    model = make_model(kind)
    batch = pack_pairs(make_pairs())
    expected = loss_and_gradients(model, batch)
    assert {type(model.get_submodule(name)).__name__ for name in use_tiles(model, 64).rows} == TILED[kind]
    if checkpointing:
        model.gradient_checkpointing_enable()
    assert_close(loss_and_gradients(model, batch), expected, 1e-5)
    assert_close(loss_and_gradients(model, pad_pairs(make_pairs())), expected, 1e-5)  # rows of several sequences


def test_tiles_without_rounding_are_whole_rows():
    model = make_model("llama").double()
    batch = pack_pairs(make_pairs())
    expected = loss_and_gradients(model, batch)
    use_tiles(model, 5)
    assert_close(loss_and_gradients(model, batch), expected, 1e-13)


def test_a_forward_without_graph_runs_in_tiles_too():
    model = make_model("llama")
    batch = pack_pairs(make_pairs())
    seen = []
    use_tiles(model, 64)
    model.model.layers[0].mlp.gate_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    with torch.no_grad():
        packed_logps(model, batch)
    assert seen == [64, 64, 64, 3]  # of 195 rows


def test_removed_tiles_leave_the_model_as_it_was():
    model = make_model("llama")
    packed_logps(model, pack_pairs(make_pairs()))  # which looks for mixers
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    use_tiles(model, 64)
    remove_tiles(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert tiles_of(model) is None


def test_adapters_and_a_base_in_bf16_run_in_tiles():
    """The adapter's copies of its input in fp32 exist for one tile only."""
    model = with_lora(make_model("llama"), r=4)
    model.enable_input_require_grads()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
        elif not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    batch = pack_pairs(make_pairs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = loss_and_gradients(model, batch)
        tiles = use_tiles(model, 64, autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
        found = loss_and_gradients(model, batch)
    assert {name.split(".")[-1] for name in tiles.rows} >= {"q_proj", "o_proj", "mlp", "input_layernorm"}
    assert_close(found, expected, 2e-2)


@pytest.mark.slow
def test_adapters_on_a_base_in_4_bits_run_in_tiles(tmp_path):
    pytest.importorskip("bitsandbytes")
    make_llama(vocab_size=256, hidden_size=128, intermediate_size=512).save_pretrained(tmp_path)
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=four_bit, device_map={"": "cpu"}
    )
    model = with_lora(model, r=8)
    model.enable_input_require_grads()
    bare_model(model).gradient_checkpointing_enable()
    prepare_model(model).train()
    batch = pack_pairs(make_pairs(lengths=[(300, 100, 111)]))

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_and_gradients(model, batch)

    expected, plain = step(), peak_live_bytes(step)
    tiles = use_tiles(model, 128, autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert "Linear4bit" in {type(bare_model(model).get_submodule(name)).__name__ for name in tiles.rows}
    assert_close(step(), expected, 2e-2)
    assert peak_live_bytes(step) < 0.5 * plain


def test_gradients_of_bf16_weights_are_summed_in_fp32():
    """In bf16, 256 + 1 is 256: a sum over 64 tiles in bf16 would stop growing."""
    linear = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    x = torch.full((1, 320, 1), 1.0, dtype=torch.bfloat16)
    x[:, :64] = 4.0  # 256 in the first tile
    run_in_tiles(linear, linear.forward, RowLeaves({0: 2}, 1, {0: 2}), 1, (x,), {}).sum().backward()
    assert linear.weight.grad.item() == 512  # 64 * 4 + 256


def test_hooks_on_weights_run_once_with_the_whole_gradient():
    model, seen = make_model("llama"), []
    batch = pack_pairs(make_pairs())
    expected = loss_and_gradients(model, batch)[1]["model.layers.0.mlp.up_proj.weight"]
    use_tiles(model, 16)
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    loss_and_gradients(model, batch)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_the_load_balancing_loss_reads_the_router_over_whole_rows():
    model = make_model("qwen3_moe", output_router_logits=False)
    batch = pack_pairs(make_pairs())

    def step():
        model.zero_grad(set_to_none=True)
        loss, logps = packed_loss(model, batch, lambda sums, *_: sums.sum(), router_aux_loss=True)
        (loss + 100 * logps.aux_loss).backward()
        return logps.aux_loss.item(), model.model.layers[0].mlp.gate.weight.grad.clone()

    expected = step()
    names = use_tiles(model, 64, router_aux_loss=True).rows
    assert "model.layers.0.mlp.experts" in names
    assert "model.layers.0.mlp" not in names
    found = step()
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)


class Smoothing(nn.Module):
    """An MLP that also looks a little at the row before."""

    def __init__(self, mlp, share):
        super().__init__()
        self.mlp, self.share = mlp, share

    def forward(self, hidden_states):
        before = torch.nn.functional.pad(hidden_states, (0, 0, 1, 0))[:, :-1]
        return self.mlp(hidden_states) + self.share * silu(before)


class Noisy(nn.Module):
    """An MLP that draws random numbers, as router jitter does."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden_states):
        if not self.training:
            return self.mlp(hidden_states)
        return self.mlp(hidden_states) * (1 + 0.1 * torch.rand(hidden_states.shape[:2])[..., None])


@pytest.mark.parametrize("share", [1.0, 1e-3])
def test_a_module_that_mixes_rows_runs_whole(share):
    model = make_model("llama")
    model.model.layers[1].mlp = Smoothing(model.model.layers[1].mlp, share)
    names = use_tiles(model, 64, is_packed=False).rows
    assert "model.layers.0.mlp" in names
    assert "model.layers.1.mlp" not in names
    assert "model.layers.1.mlp.mlp" in names


def test_a_module_that_draws_random_numbers_runs_whole():
    model = make_model("llama")
    model.model.layers[1].mlp = Noisy(model.model.layers[1].mlp)
    names = use_tiles(model, 64).rows
    assert "model.layers.1.mlp" not in names
    assert "model.layers.1.mlp.mlp" in names


def test_a_model_that_mixes_rows_everywhere_is_refused_by_name():
    model = prepare_model(
        AutoModelForCausalLM.from_config(
            AutoConfig.for_model("mamba", vocab_size=256, hidden_size=64, num_hidden_layers=2)
        )
    )
    with pytest.raises(ValueError, match=r"tile_rows must be None for MambaForCausalLM.*MambaMixer.*mix rows.*offload"):
        use_tiles(model, 64)


def test_tiles_by_default_are_half_the_hidden_size_and_fill_a_gpu():
    assert auto_tile_rows(8192, "cuda") == 4096
    assert auto_tile_rows(1024, "cuda") == 2048
    assert auto_tile_rows(2048, "cpu") == 1024


@pytest.mark.parametrize("lora", [False, True])
def test_tiles_take_less_memory_than_checkpointing_alone(lora):
    """Of a layer's backward the MLP is the largest part: 16 numbers for each of a hidden state here."""
    model = make_llama(vocab_size=64, hidden_size=64, intermediate_size=1024, num_hidden_layers=2)
    if lora:
        model = with_lora(model, r=4)
        model.enable_input_require_grads()
    bare_model(model).gradient_checkpointing_enable()
    prepare_model(model).train()
    batch = pack_pairs(make_pairs(64, [(512, 128, 128)]))
    plain = peak_live_bytes(lambda: loss_and_gradients(model, batch))
    use_tiles(model, 128)
    assert peak_live_bytes(lambda: loss_and_gradients(model, batch)) < 0.4 * plain
