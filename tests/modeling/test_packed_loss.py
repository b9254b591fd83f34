"""A loss whose gradient is made in the model's forward: the same numbers as log-probs and autograd give."""

import pytest
import torch
import torch.nn.functional as F
from covering import every_pair
from test_packed_logps import GROUPS, build

from fastdpo import pack_pairs, packed_logps, pad_pairs
from fastdpo.modeling import packed_loss
from fastdpo.ops import sequence_loss as op


def loss_of_batch(batch):
    """A DPO loss of the batch's pairs, of whose sequences only some come at a time."""

    def loss_of(sums, lengths, sequences, pairs):
        chosen, rejected = (batch.pairs[pairs] - sequences.start).unbind(1)
        margins = (sums[chosen] - sums[rejected]) / lengths[chosen]
        return -F.logsigmoid(0.3 * margins + 0.1 * torch.arange(pairs.start, pairs.stop)).sum()

    return loss_of


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    *every_pair(
        model_type=["llama", "gemma2", "phi"],  # plain, tied with a softcap, with a bias
        layout=[pack_pairs, pad_pairs],
        rows_at_once=[1000, 9, 2],  # all groups; some; not even one, so that logits are recomputed
        frozen_head=[False, True],
    ),
)
def test_loss_and_every_gradient_are_those_of_packed_logps(model_type, layout, rows_at_once, frozen_head, monkeypatch):
    monkeypatch.setattr(op, "max_chunk_rows", lambda *_: rows_at_once)
    model, batch = build(model_type), layout(GROUPS)
    head = model.get_output_embeddings()
    head.requires_grad_(not frozen_head)
    loss_of = loss_of_batch(batch)

    logps = packed_logps(model, batch)
    sums, lengths = logps.sequences.sums, logps.sequences.lengths
    expected = loss_of(sums, lengths, slice(0, len(sums)), slice(0, batch.num_pairs))
    expected.backward()
    expected_grads = gradients(model)

    loss, found = packed_loss(model, batch, loss_of)
    (3 * loss).backward()
    grads = gradients(model)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.chosen, logps.chosen, rtol=1e-5, atol=1e-5)
    assert not found.chosen.requires_grad
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, 3 * expected_grads[name], rtol=1e-4, atol=1e-5, msg=name)


def test_without_gradient_in_forward_the_log_probs_stay_differentiable():
    model, batch = build("llama"), pack_pairs(GROUPS)
    loss, found = packed_loss(model, batch, loss_of_batch(batch), grad_in_forward=False)
    assert found.chosen.requires_grad
    with torch.no_grad():
        same, _ = packed_loss(model, batch, loss_of_batch(batch))
    assert not same.requires_grad
    torch.testing.assert_close(same, loss.detach(), rtol=1e-5, atol=1e-6)
