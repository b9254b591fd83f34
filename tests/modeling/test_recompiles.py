"""torch.compile of the policy: batches of ever other lengths and branches soon find a graph that is there."""

import pytest
import torch
from test_attention_backends import emulated  # noqa: F401  the fixture
from test_packed_logps import build
from torch._dynamo.utils import counters
from varlen_emulation import attend_by_hand

from fastdpo import TokenizedGroup, pack_pairs, packed_logps, prepare_model
from fastdpo.modeling.attention.varlen import TorchVarlen


@torch.library.custom_op("fastdpo_tests::varlen", mutates_args=())
def _varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    left: int,
) -> torch.Tensor:
    return attend_by_hand(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window=(left, 0))


@_varlen.register_fake
def _(q, k, v, *_):
    return torch.empty_like(q)


def _setup(ctx, inputs, output):
    q, k, v, cu_q, cu_k, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, cu_q, cu_k)


def _backward(ctx, grad):
    *rows, cu_q, cu_k = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in rows]
        max_q, max_k, scale, left = ctx.numbers
        output = attend_by_hand(*leaves, cu_q, cu_k, max_q, max_k, scale=scale, window=(left, 0))
        return *torch.autograd.grad(output, leaves, grad), None, None, None, None, None, None


_varlen.register_autograd(_backward, setup_context=_setup)


def opaque_varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """To the compiler what torch's varlen_attn is: one operator, into which it does not look."""
    return torch.ops.fastdpo_tests.varlen(query, key, value, cu_q, cu_k, max_q, max_k, scale, window_size[0])


class OpaqueVarlen(TorchVarlen):
    device_types = ("cpu",)
    dtypes = (torch.float32,)

    def load(self):
        return opaque_varlen_attn


def random_batch(generator):
    def draw(low, high):
        return torch.randint(low, high, (1,), generator=generator).item()

    def tokens(low, high):
        return torch.randint(1, 67, (draw(low, high),), generator=generator).tolist()

    groups = [
        TokenizedGroup(tokens(1, 9), [[i + 1, *tokens(1, 9)] for i in range(draw(2, 5))]) for _ in range(draw(1, 5))
    ]
    return pack_pairs(groups)


@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)  # else it would go on without the compiler
@pytest.mark.parametrize("backend", ["sdpa", pytest.param("varlen", marks=pytest.mark.slow)])
def test_a_compiled_model_is_not_compiled_anew_for_every_batch(backend, emulated):  # noqa: F811
    emulated("varlen", OpaqueVarlen())
    model = prepare_model(build("mistral", num_hidden_layers=1), attention_backend=backend)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=backend == "varlen")
    generator, num_graphs = torch.Generator().manual_seed(0), []
    for _ in range(16):
        batch = random_batch(generator)
        expected = packed_logps(model, batch).sequences.sums
        actual = packed_logps(compiled, batch).sequences.sums
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        actual.sum().backward()
        num_graphs.append(counters["stats"]["unique_graphs"])
    assert num_graphs[0] > 0
    assert num_graphs[5] == num_graphs[-1], num_graphs
