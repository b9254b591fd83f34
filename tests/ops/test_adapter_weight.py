"""A head in two column blocks: the frozen weight, and the columns that a LoRA adapter trains."""

import pytest
import torch
import torch.nn.functional as F

from fastdpo.ops.sequence_loss import GroupEnd, sequence_loss

T, H, R, V = 23, 40, 3, 67
CU_SEQLENS = torch.tensor([0, 4, 9, 9, 17, 20, 23])
ENDS = [GroupEnd(9, 9, 2), GroupEnd(17, 17, 4), GroupEnd(23, 23, 6)]


def make(dtype=torch.float32, adapter_dtype=None):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight, adapter = draw(T, H + R), draw(V, H) / 3, draw(V, R) / 3
    labels = torch.randint(V, (T,), generator=generator)
    labels[[2, 11]] = -100
    leaves = {"hidden_states": hidden.to(dtype), "adapter_weight": adapter.to(adapter_dtype or dtype)}
    return {name: x.requires_grad_() for name, x in leaves.items()}, weight.to(dtype), labels


def loss_of(sums, lengths, sequences, groups):
    chosen, rejected = sums.unflatten(0, (-1, 2)).unbind(1)
    return -F.logsigmoid(0.2 * (chosen - rejected)).sum()


def run(leaves, weight, labels, *, joined=False, **settings):
    """The loss, the log-probs and the gradients of the leaves."""
    if joined:
        head = torch.cat([weight, leaves["adapter_weight"].to(weight.dtype)], 1)
        args = (leaves["hidden_states"], head)
    else:
        args = (leaves["hidden_states"], weight)
        settings["adapter_weight"] = leaves["adapter_weight"]
    loss, found = sequence_loss(*args, labels, CU_SEQLENS, ENDS, loss_of, **settings)
    return loss, found.sums, torch.autograd.grad(loss, list(leaves.values()))


@pytest.mark.parametrize("workspace_bytes", [None, V * 8 * 9, V * 8 * 3], ids=["whole", "9 rows", "3 rows"])
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "logit_scale": 0.5}], ids=["plain", "softcap"])
def test_the_gradient_is_that_of_one_wide_head(workspace_bytes, options):
    leaves, weight, labels = make(torch.float64)
    settings = {**options, "workspace_bytes": workspace_bytes}
    loss, sums, grads = run(leaves, weight, labels, **settings)
    expected, expected_sums, expected_grads = run(leaves, weight, labels, joined=True, **settings)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(sums, expected_sums)
    for grad, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", ["tiled", "triton"])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(torch.float32,) * 2, (torch.bfloat16, torch.float32)])
def test_each_implementation_is_as_exact_as_it_is_with_one_wide_head(impl, dtype, adapter_dtype):
    leaves, weight, labels = make(dtype, adapter_dtype)
    exact_leaves = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    *_, exact = run(exact_leaves, weight.double(), labels)
    *_, grads = run(leaves, weight, labels, impl=impl)
    *_, wide = run(leaves, weight, labels, joined=True, impl=impl)
    for leaf, grad, other, true in zip(leaves.values(), grads, wide, exact, strict=True):
        assert grad.dtype == leaf.dtype
        assert (grad - true).norm() <= 2 * (other - true).norm() + 1e-7 * true.norm()


def test_autocast_takes_weights_of_two_dtypes():
    leaves, weight, labels = make(torch.float32, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        *_, grads = run(leaves, weight, labels)
        *_, wide = run(leaves, weight, labels, joined=True)
    assert [grad.dtype for grad in grads] == [torch.float32, torch.bfloat16]
    for grad, other in zip(grads, wide, strict=True):
        torch.testing.assert_close(grad, other, rtol=2e-2, atol=1e-3)


def test_without_gradient_the_loss_is_the_same():
    leaves, weight, labels = make()
    loss, sums, _ = run(leaves, weight, labels)
    with torch.no_grad():
        found, again = sequence_loss(
            leaves["hidden_states"], weight, labels, CU_SEQLENS, ENDS, loss_of, adapter_weight=leaves["adapter_weight"]
        )
    torch.testing.assert_close(found, loss.detach())
    torch.testing.assert_close(again.sums, sums)


def test_an_adapter_of_the_wrong_shape_or_beside_a_trained_weight_is_refused():
    leaves, weight, labels = make()
    args = (labels, CU_SEQLENS, ENDS, loss_of)
    with pytest.raises(ValueError, match=r"adapter_weight must have shape \(67, 3\).*got \(67, 2\)"):
        sequence_loss(leaves["hidden_states"], weight, *args, adapter_weight=torch.zeros(V, 2))
    with pytest.raises(ValueError, match="lm_head_weight must be frozen"):
        sequence_loss(leaves["hidden_states"], weight.requires_grad_(), *args, adapter_weight=leaves["adapter_weight"])


@pytest.mark.parametrize("with_grad", [True, False])
def test_the_copy_engine_takes_what_an_adapter_widens(with_grad, monkeypatch):
    """40 + 3 columns of bf16 are 86 bytes a row; 48 of them are 96, three times 16.

    In forward the weight stays as it is beside 3 columns padded to 8; without a gradient it is joined with them.
    """
    from fastdpo.kernels import forward
    from fastdpo.kernels.logits import can_be_described

    seen = []
    tile_operands = forward.tile_operands

    def recording(hidden_states, weight, blocks, *adapter):
        factors = (hidden_states, weight, *adapter)
        seen.append(tuple(x.shape[1] for x in factors if can_be_described(x)))
        return tile_operands(hidden_states, weight, blocks, *adapter)

    monkeypatch.setattr(forward, "tile_operands", recording)
    leaves, weight, labels = make(torch.bfloat16)
    with torch.set_grad_enabled(with_grad):
        loss, _ = sequence_loss(
            leaves["hidden_states"],
            weight,
            labels,
            CU_SEQLENS,
            ENDS,
            loss_of,
            adapter_weight=leaves["adapter_weight"],
            impl="triton",
        )
    assert set(seen) == {(40, 40, 8, 8) if with_grad else (48, 48)}
    if with_grad:
        loss.backward()
        assert [x.grad.shape for x in leaves.values()] == [(T, H + R), (V, R)]
