"""What backward keeps for the embedding: one gradient of a shared weight, and nothing for frozen rows."""

import weakref

import pytest
import torch
from test_packed_logps import GROUPS, build
from test_packed_loss import gradients, loss_of_batch

from fastdpo import pack_pairs, packed_logps, pad_pairs
from fastdpo.evidence.memory import peak_live_bytes
from fastdpo.modeling import embedding, packed_loss, prepare_model


def loss_by_head(model, batch):
    return packed_loss(model, batch, loss_of_batch(batch))[0]


def loss_of_logps(model, batch):
    sums = packed_logps(model, batch).sequences.sums
    return (sums * torch.arange(1, len(sums) + 1)).sum()


def build_tied(model_type="llama", **settings):
    model = build(model_type, tie_word_embeddings=True, pad_token_id=GROUPS[0].prompt_ids[0], **settings).double()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return model


@pytest.mark.parametrize("loss", [loss_by_head, loss_of_logps])
@pytest.mark.parametrize(
    ("model_type", "layout"),
    [("llama", pack_pairs), ("llama", pad_pairs), ("gemma2", pack_pairs)],  # Gemma 2 scales its embedding
)
@pytest.mark.parametrize("block_elements", [embedding.BLOCK_ELEMENTS, 7 * 32], ids=["one block", "blocks"])
def test_the_gradient_is_that_of_autograd(model_type, layout, loss, block_elements, monkeypatch):
    monkeypatch.setattr(embedding, "BLOCK_ELEMENTS", block_elements)
    model, batch = build_tied(model_type), layout(GROUPS)
    for _ in range(2):  # the second one adds to the first
        loss(model, batch).backward()
    found = gradients(model)
    monkeypatch.setattr(embedding, "_is_tied", lambda model: False)
    for _ in range(2):
        loss(model, batch).backward()
    expected = gradients(model)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-13, msg=name)


def test_a_second_backward_of_one_forward_adds_the_same_gradient():
    model = build_tied()
    loss = loss_of_logps(model, pack_pairs(GROUPS))
    loss.backward(retain_graph=True)
    once = gradients(model)
    loss.backward(retain_graph=True)
    loss.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, 2 * once[name], rtol=1e-10, atol=1e-13, msg=name)


def test_a_hook_on_the_weight_sees_its_whole_gradient_once():
    model, seen = build_tied(), []
    weight = model.get_input_embeddings().weight
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    loss_by_head(model, pack_pairs(GROUPS)).backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], weight.grad)


@pytest.mark.parametrize("accumulates", [False, True])
def test_backward_holds_no_second_tensor_of_the_weights_size(accumulates, monkeypatch):
    monkeypatch.setattr(embedding, "BLOCK_ELEMENTS", 2**14)
    model, batch = build_tied(vocab_size=2**14), pack_pairs(GROUPS)
    prepare_model(model, workspace_bytes=2**16)
    weight = model.get_input_embeddings().weight

    def step():
        weight.grad = torch.zeros_like(weight) if accumulates else None
        loss_by_head(model, batch).backward()
        weight.grad = None

    size = weight.numel() * weight.element_size()
    alone = 2 if accumulates else 1  # the head's gradient, and what earlier micro-batches left
    assert alone <= peak_live_bytes(step) / size < alone + 0.5
    monkeypatch.setattr(embedding, "_is_tied", lambda model: False)
    assert peak_live_bytes(step) / size >= alone + 1


def test_models_that_share_no_trained_weight_are_left_alone():
    for model in (build("llama"), build_tied()):
        assert embedding.EmbeddingGradient(model).is_tied == model.config.tie_word_embeddings
        with torch.no_grad():
            assert not embedding.EmbeddingGradient(model).is_tied
        model.requires_grad_(False)
        assert not embedding.EmbeddingGradient(model).is_tied


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_frozen_rows_that_require_a_gradient_are_not_kept(use_reentrant):
    """transformers makes them require one for checkpoints, which keep them as the first layer's input in any case."""
    model, batch = build("llama").double(), pack_pairs(GROUPS)
    model.get_input_embeddings().requires_grad_(False)
    loss_by_head(model, batch).backward()
    expected = gradients(model)
    model.train().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    rows = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: rows.append(weakref.ref(args[0])))
    loss = loss_by_head(model, batch)
    assert rows[0]().requires_grad
    assert not rows[0]().is_leaf
    loss.backward()
    assert rows[0]() is None
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-13, msg=name)
