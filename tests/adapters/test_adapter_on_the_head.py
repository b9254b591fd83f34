"""Adapters on the LM head in the fused path: log-probs and gradients of the model's own forward."""

import pytest
import torch
from peft import IA3Config, LoHaConfig, VeraConfig, get_peft_model
from peft_cases import GROUPS, adapted, assert_like_plain, learned, lora, plain_sums
from tiny import make_llama

from fastdpo import pack_pairs, packed_logps, pad_pairs, prepare_model
from fastdpo.evidence.memory import peak_live_bytes
from fastdpo.modeling import check_packing
from fastdpo.modeling.head import lm_head
from fastdpo.ops import sequence_loss as op
from fastdpo.references.adapters import as_reference

HEADS = {
    "lora": lambda: adapted(lora("lm_head")),
    "lora beside others": lambda: adapted(lora("lm_head", "q_proj")),
    "rslora": lambda: adapted(lora("lm_head", use_rslora=True, lora_alpha=5)),
    "lora bias": lambda: adapted(lora("lm_head", lora_bias=True)),
    "tied to the embedding": lambda: adapted(lora("lm_head"), tie_word_embeddings=True),
    "embedding, head tied and alone": lambda: adapted(lora("embed_tokens"), tie_word_embeddings=True),
    "embedding and head": lambda: adapted(lora("embed_tokens", "lm_head"), tie_word_embeddings=True),
    "embedding and head, tied adapters": lambda: adapted(
        lora("embed_tokens", "lm_head", ensure_weight_tying=True), tie_word_embeddings=True
    ),
    "modules_to_save": lambda: adapted(lora(modules_to_save=["lm_head"])),
    "modules_to_save, tied": lambda: adapted(lora(modules_to_save=["lm_head"]), tie_word_embeddings=True),
    "modules_to_save, both": lambda: adapted(
        lora(modules_to_save=["lm_head", "embed_tokens"]), tie_word_embeddings=True
    ),
    "tokens": lambda: adapted(lora(trainable_token_indices=[3, 7, 11])),
    "tokens, tied": lambda: adapted(lora(trainable_token_indices=[3, 7, 11]), tie_word_embeddings=True),
    "on one of two adapters": lambda: adapted(lora("lm_head", "v_proj"), lora("v_proj")),
    "on the adapter that is off": lambda: adapted(lora("v_proj"), lora("lm_head", "v_proj")),
}


@pytest.mark.parametrize("case", HEADS)
def test_log_probs_and_gradients_are_those_of_the_models_own_forward(case):
    model = HEADS[case]()
    grads = assert_like_plain(model)
    assert all(grad.abs().max() > 0 for grad in grads.values())


@pytest.mark.parametrize("rows_at_once", [5, 2])  # some groups at a time; not even one, so that logits are recomputed
def test_gradients_made_chunk_by_chunk_are_the_same(rows_at_once, monkeypatch):
    monkeypatch.setattr(op, "max_chunk_rows", lambda *_: rows_at_once)
    assert_like_plain(adapted(lora("lm_head", "q_proj")), layout=pad_pairs)


def test_two_adapters_at_once_add_up():
    model = adapted(lora("lm_head", "q_proj"), lora("lm_head", "q_proj", r=2))
    model.base_model.set_adapter(["default", "other0"])
    grads = assert_like_plain(model)
    assert any("other0" in name and "lm_head" in name for name in grads)


def test_a_head_whose_own_weight_is_trained_beside_its_adapter():
    model = adapted(lora("lm_head"))
    model.get_base_model().lm_head.base_layer.weight.requires_grad_(True)
    assert any("base_layer" in name for name in assert_like_plain(model))


@pytest.mark.parametrize("case", ["lora", "modules_to_save, tied", "tokens, tied"])
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_other_implementations_agree(case, impl):
    model = HEADS[case]().float()
    with torch.no_grad():
        found = packed_logps(model, pack_pairs(GROUPS), impl=impl).sequences.sums
        torch.testing.assert_close(found, plain_sums(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", HEADS)
def test_the_reference_is_the_head_without_the_adapter(case):
    model = HEADS[case]()
    tied = "tied" in case or case in ("embedding and head", "modules_to_save, both")
    base = make_llama(tie_word_embeddings=tied).double()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with torch.no_grad():
        with as_reference(model):
            found = packed_logps(model, pack_pairs(GROUPS)).sequences.sums
        torch.testing.assert_close(found, packed_logps(base, pack_pairs(GROUPS)).sequences.sums)
        assert not torch.allclose(found, packed_logps(model, pack_pairs(GROUPS)).sequences.sums)
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}


def test_dropout_on_the_heads_adapter_acts_on_its_input_alone():
    class EveryOther(torch.nn.Module):
        def forward(self, x):
            return x * (torch.arange(x.shape[-1]) % 2) * 2

    model = adapted(lora("lm_head", lora_dropout=0.5))
    without = plain_sums(model.eval())
    model.get_base_model().lm_head.lora_dropout["default"] = EveryOther()
    assert not torch.allclose(plain_sums(model), without)
    assert_like_plain(model.train())


@pytest.mark.parametrize("autocast", [False, True])
def test_a_bf16_head_under_an_fp32_adapter_is_as_exact_as_the_models_own_forward(autocast):
    exact = adapted(lora("lm_head", "q_proj"), dtype=torch.float32)
    model = adapted(lora("lm_head", "q_proj"), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_" not in name and not autocast:
            parameter.data = parameter.data.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = plain_sums(model).float()
        found = packed_logps(model, pack_pairs(GROUPS)).sequences.sums
        loss = found.float()
    with torch.no_grad():
        truth = plain_sums(exact)
    assert (loss - truth).abs().max() <= 2 * (plain - truth).abs().max() + 1e-3


def test_the_self_check_takes_an_adapter_on_the_head():
    check = check_packing(prepare_model(adapted(lora("lm_head"), dtype=torch.float32)))
    assert check.ok, check.reason


@pytest.mark.parametrize(
    "config",
    [
        lora("lm_head", use_dora=True),
        LoHaConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"),
        IA3Config(target_modules=["lm_head"], feedforward_modules=[], task_type="CAUSAL_LM"),
        VeraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"),
    ],
    ids=["dora", "loha", "ia3", "vera"],
)
def test_other_adapters_on_the_head_are_refused(config):
    with pytest.raises(ValueError, match=r"peft_config must put .*LoRA on the LM head.*modules_to_save=\['lm_head'\]"):
        prepare_model(get_peft_model(make_llama(), config))


def test_a_merged_adapter_is_part_of_the_weight_and_is_taken_out_for_the_reference():
    model = adapted(lora("lm_head", "q_proj"))
    expected = plain_sums(model).detach()
    model.merge_adapter()
    assert lm_head(model.get_base_model()).low_ranks == ()
    with torch.no_grad():
        found = packed_logps(model, pack_pairs(GROUPS)).sequences.sums
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        with as_reference(model):
            found = packed_logps(model, pack_pairs(GROUPS)).sequences.sums
        expected = packed_logps(make_llama().double(), pack_pairs(GROUPS)).sequences.sums
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("workspace_bytes", [2**14, 2**12])  # whole groups at a time; logits computed twice
def test_an_adapter_on_the_head_takes_no_memory_of_the_heads_size(workspace_bytes):
    """No copy of the head's weight, and no gradient of its size, in forward or later."""
    V, H, r = 512, 256, 3
    model = learned(adapted(lora("lm_head"), vocab_size=V, hidden_size=H))
    hidden = torch.randn(10, H, dtype=torch.float64, requires_grad=True)
    wide, weight, adapter_weight = lm_head(model.get_base_model()).operands(hidden, split=True)
    assert (wide.shape, weight.shape, adapter_weight.shape) == ((10, H + r), (V, H), (V, r))
    args = (torch.arange(10), torch.tensor([0, 4, 10]), [(4, 4, 1), (10, 10, 2)], lambda sums, *_: sums.sum())
    leaves = [hidden, *(p for p in model.parameters() if p.requires_grad)]

    def step():
        wide, weight, adapter_weight = lm_head(model.get_base_model()).operands(hidden, split=True)
        settings = {"adapter_weight": adapter_weight, "workspace_bytes": workspace_bytes}
        loss, _ = op.sequence_loss(wide, weight, *args, **settings)
        torch.autograd.grad(loss, leaves)

    weight_bytes = weight.numel() * weight.element_size()
    assert peak_live_bytes(step) < weight_bytes / 2
