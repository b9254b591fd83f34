"""A loss that reads a statistic of its tokens has its gradient made in forward all the same."""

import pytest
import torch

from fastdpo.ops.sequence_loss import GroupEnd, sequence_loss

H, V = 16, 67
LENGTHS = [3, 5, 2, 4]
ENDS = [GroupEnd(8, 8, 2), GroupEnd(14, 14, 4)]


def inputs():
    g = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(14, H, generator=g)
    lm_head_weight = torch.randn(V, H, generator=g)
    labels = torch.randint(V, (14,), generator=g)
    return hidden_states.requires_grad_(), lm_head_weight.requires_grad_(), labels


def weighed(sums, squares):
    """Sums of pairs, each pair weighed by how typical it is; WPO's form."""
    weights = torch.exp((sums - squares).detach() / 10)
    return (weights * torch.sigmoid(sums / 10)).view(-1, 2).prod(1).sum()


@pytest.mark.parametrize("rows_in_workspace", [8, 14, 3], ids=["one pair at a time", "whole", "twice"])
@pytest.mark.parametrize("impl", ["tiled", "triton"])
def test_loss_and_gradients_are_those_of_the_full_logits(impl, rows_in_workspace, monkeypatch):
    monkeypatch.setattr("fastdpo.ops.sequence_loss.max_chunk_rows", lambda *args: rows_in_workspace)
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    hidden_states, lm_head_weight, labels = inputs()
    logps = (hidden_states.double() @ lm_head_weight.double().T).log_softmax(-1)
    picked = logps.gather(1, labels[:, None])[:, 0]
    sums, squares = (torch.stack([part.sum() for part in x.split(LENGTHS)]) for x in (picked, (2 * logps).logsumexp(1)))
    exact = weighed(sums, squares)
    expected = torch.autograd.grad(exact, (hidden_states, lm_head_weight))

    seen = []

    def loss_of(sums, lengths, sequences, groups, log_sum_sq_probs):
        seen.append(groups.stop - groups.start)
        assert not log_sum_sq_probs.requires_grad
        return weighed(sums, log_sum_sq_probs)

    leaves = [x.detach().to(device).requires_grad_() for x in (hidden_states, lm_head_weight)]
    cu_seqlens = torch.tensor([0, *LENGTHS], device=device).cumsum(0)
    name = ("log_sum_sq_probs",)
    loss, _ = sequence_loss(*leaves, labels.to(device), cu_seqlens, ENDS, loss_of, outputs=name, summed=name, impl=impl)
    grads = torch.autograd.grad(loss, leaves)
    assert seen == ([2] if rows_in_workspace == 14 else [1, 1])
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    for actual, right in zip(grads, expected, strict=True):
        torch.testing.assert_close(actual.cpu(), right, rtol=1e-4, atol=1e-6)


def test_a_statistic_has_to_be_asked_for():
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
    with pytest.raises(ValueError, match=r"summed must be among outputs.*got"):
        sequence_loss(*inputs(), cu_seqlens, ENDS, lambda *args: None, summed=("entropy",))
