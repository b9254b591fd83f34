"""Logits by the matmul library, folded in blocks: the numbers of the kernels that multiply themselves."""

import pytest
import torch
from head_cases import BF16, FP16, FP32, Case, assert_at_most_twice_plain, make_inputs

from fastdpo import linear_logps
from fastdpo.kernels import launch, library
from fastdpo.kernels.backward import fill_logit_grads
from fastdpo.kernels.forward import fused_forward, fused_forward_with_grads
from fastdpo.kernels.launch import INTERPRETED, Blocks
from fastdpo.types import TOKEN_OUTPUTS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="small blocks, for Triton's interpreter")
FOLDED = Blocks(16, 64, 64, 1, 1, library=True)
CASES = [
    Case(67, 40, 257, FP32),
    Case(67, 40, 257, BF16, has_bias=True, logit_scale=0.5, softcap=4.0),
    Case(70, 72, 261, FP16),
    Case(1, 40, 64, BF16),
    Case(67, 40, 257, FP32, ignored="all"),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of logits in both directions, the last ones ragged."""
    monkeypatch.setattr(library, "BLOCK_ROWS", 48)
    monkeypatch.setattr(library, "BLOCK_IDS", 128)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_sums_statistics_and_gradients_are_those_of_the_kernels(case):
    leaves, labels, upstream = make_inputs(case, 0)
    bias = leaves.get("bias")
    head = (leaves["hidden_states"], leaves["lm_head_weight"], bias, labels, case.logit_scale, case.softcap)
    head = [x.detach() if torch.is_tensor(x) else x for x in head]
    rough = {FP32: 1e-5, BF16: 2e-2, FP16: 3e-3}[case.dtype]
    results = []
    for blocks in (INTERPRETED, FOLDED):
        values = fused_forward(*head, TOKEN_OUTPUTS, blocks)
        width = -(-case.V // 16) * 16
        d, again = (torch.full((case.T, width), torch.nan, dtype=case.dtype)[:, : case.V] for _ in range(2))
        made = fused_forward_with_grads(d, *head, (), blocks)
        lse = values["lse_whole"], values["lse_rest"]
        fill_logit_grads(again, *head[:4], *lse, upstream, 0, case.V, case.logit_scale, case.softcap, blocks)
        results.append([*values.values(), *made.values(), d, again])
    for ours, other in zip(results[1], results[0], strict=True):
        tolerance = rough if ours.dtype == case.dtype and ours.dim() == 2 else 1e-5
        torch.testing.assert_close(ours, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("blocks", [INTERPRETED, FOLDED], ids=["kernels", "library"])
def test_the_columns_of_an_adapter_are_multiplied_where_they_lie(blocks):
    leaves, labels, _ = make_inputs(Case(67, 40, 257, FP32), 0)
    hidden_states, weight = (x.detach() for x in leaves.values())
    split = weight[:, :33].contiguous(), weight[:, 33:].contiguous()  # 7 columns of an adapter
    results = []
    for first, adapter_weight in ((weight, None), split):
        out = torch.full((67, 272), torch.nan)[:, :257]
        head = (hidden_states, first, None, labels, 0.5, 4.0, TOKEN_OUTPUTS, blocks)
        made = fused_forward_with_grads(out, *head, adapter_weight=adapter_weight)
        values = fused_forward(*head, adapter_weight=adapter_weight)
        results.append([*made.values(), *values.values(), out])
    for ours, other in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)


def test_a_block_of_the_vocabulary_knows_its_first_id():
    leaves, labels, upstream = make_inputs(Case(67, 40, 600, FP32), 0)
    hidden_states, weight = (x.detach() for x in leaves.values())
    values = fused_forward(hidden_states, weight, None, labels, 1.0, None, ())
    lse, found = (values["lse_whole"], values["lse_rest"]), []
    for blocks in (INTERPRETED, FOLDED):
        out = torch.empty(67, 250)
        fill_logit_grads(out, hidden_states, weight[300:550], None, labels, *lse, upstream, 300, 600, 1.0, None, blocks)
        found.append(out)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.id)
def test_the_head_op_is_as_exact_with_it(case, monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", FOLDED)

    def ours(*args, **settings):
        return linear_logps(*args, **settings, impl="triton").logps

    assert_at_most_twice_plain(ours, case)


@pytest.mark.slow
def test_the_logits_that_are_there_at_once_do_not_grow(monkeypatch):
    sizes = []
    original = library.scratch
    monkeypatch.setattr(library, "scratch", lambda shape, *rest: sizes.append(shape[0]) or original(shape, *rest))
    for T, V in ((40, 100), (400, 3000)):
        head = (torch.randn(T, 8), torch.randn(V, 8), None, torch.zeros(T, dtype=torch.int64), 1.0, None)
        fused_forward(*head, (), FOLDED)
    assert sizes == [40 * 100, 48 * 128]
    assert 1024 * 8192 * 4 == 33554432  # of a GPU's: 34 MB


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_the_tuner_tries_it_for_every_gpu_and_operand(capability, itemsize):
    assert any(blocks.library for blocks in launch.candidates_for(capability, itemsize))
