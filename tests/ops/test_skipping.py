"""Backward without the tiles that hold little probability: what is dropped, by how much gradients may differ."""

import pytest
import torch
from closeness import assert_as_exact
from head_cases import BF16, FP32, Case, exact_logps, make_inputs

from fastdpo import linear_logps
from fastdpo.ops.skipping import kept_tiles, row_order
from fastdpo.types import IGNORE_INDEX

CUDA = torch.cuda.is_available()
FAST = ("tiled", "triton")
FIRST = torch.arange(37)  # rows as they come


def device_of(impl):
    return "cuda" if CUDA and impl == "triton" else "cpu"


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks that a test of a few hundred ids has several of."""
    from fastdpo.ops import tiled, tiled_skipping

    for module in (tiled, tiled_skipping):
        monkeypatch.setattr(module, "SKIP_ROWS", 16)
        monkeypatch.setattr(module, "SKIP_VOCAB", 32)


def values_of(probs):
    """What forward hands over, for tiles of one id: the mass of tile v is probs[t, v]."""
    zeros = torch.zeros(len(probs))
    return {
        "tile_max": torch.zeros(probs.shape).T,
        "tile_sumexp": probs.T.contiguous(),
        "logps": zeros,
        "lse_whole": zeros,
        "lse_rest": zeros,
    }


def test_the_smallest_tiles_go_until_a_row_would_lose_more_than_the_tolerance():
    """Two rows of one block. Largest masses per tile: 0.5 0.4 0.02 0.06 0.01 (with label) 0.3.

    In that order row 0 loses 0.02, then 0.02 + 0.03 = 0.05, and the next tile, 0.3, is too much.
    """
    probs = torch.tensor([[0.50, 0.40, 0.02, 0.03, 0.01, 0.04], [0.50, 0.10, 0.01, 0.06, 0.03, 0.30]])
    labels = torch.tensor([0, 4])
    assert kept_tiles(values_of(probs), labels, FIRST[:2], 0.08, 2, 1).tolist() == [
        [True, True, False, False, True, True]
    ]
    assert kept_tiles(values_of(probs), labels, FIRST[:2], 0.06, 2, 1).tolist() == [
        [True, True, False, True, True, True]
    ]
    assert kept_tiles(values_of(probs), labels, FIRST[:2], 0.005, 2, 1).all()


def test_ignored_rows_force_nothing_and_rows_without_a_number_keep_everything():
    probs = torch.tensor([[0.9, 0.05, 0.05], [0.1, 0.1, 0.8]])
    values = values_of(probs)
    labels = torch.tensor([0, IGNORE_INDEX])
    assert kept_tiles(values, labels, FIRST[:2], 0.2, 2, 1).tolist() == [[True, False, False]]
    values["logps"] = torch.tensor([0.0, torch.nan])
    assert kept_tiles(values, torch.tensor([0, 7]), FIRST[:2], 0.2, 2, 1).all()


def test_a_row_block_that_is_not_full_and_the_chunks_of_blocks_change_nothing(monkeypatch):
    from fastdpo.ops import skipping

    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(37, 23, generator=generator).softmax(-1)
    labels = torch.randint(23, (37,), generator=generator)
    whole = kept_tiles(values_of(probs), labels, FIRST, 0.3, 8, 1)
    assert whole.shape == (5, 23)
    assert not whole.all()
    monkeypatch.setattr(skipping, "MAX_ELEMENTS", 8 * 23)
    assert torch.equal(kept_tiles(values_of(probs), labels, FIRST, 0.3, 8, 1), whole)


def test_rows_are_ordered_from_the_surest_and_blocks_follow_that_order():
    """Rows 0 and 2 know what they want, 1 and 3 do not: in pairs of two as they come every block keeps every tile."""
    sure, unsure = [0.97, 0.01, 0.01, 0.01], [0.3, 0.2, 0.3, 0.2]
    values, labels = values_of(torch.tensor([sure, unsure, sure, unsure])), torch.zeros(4, dtype=torch.int64)
    order = row_order(values, labels)
    assert order.tolist() == [0, 2, 1, 3]
    assert kept_tiles(values, labels, FIRST[:4], 0.1, 2, 1).all()
    assert kept_tiles(values, labels, order, 0.1, 2, 1).tolist() == [[True, False, False, False], [True] * 4]
    labels[3] = IGNORE_INDEX
    assert row_order(values, labels).tolist() == [3, 0, 2, 1]


def grads_of(leaves, labels, upstream, impl, **settings):
    logps = linear_logps(*leaves.values(), labels, impl=impl, **settings).logps
    return logps, torch.autograd.grad((logps * upstream).sum(), list(leaves.values()))


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("logit_std", [1e-3, 1.0, 6.0])  # flat, as with random weights; and peaked
@pytest.mark.parametrize("tolerance", [2**-9, 0.1])
def test_errors_stay_within_both_bounds(impl, logit_std, tolerance, small_blocks):
    case = Case(130, 40, 509, FP32, logit_std=logit_std, logit_scale=0.5)
    leaves, labels, upstream = make_inputs(case, 0, device_of(impl))
    settings = {**case.settings, "impl": impl}
    logps, (dh, dw) = grads_of(leaves, labels, upstream, skip_tolerance=tolerance, **settings)
    exact_leaves = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    exact = exact_logps(*exact_leaves.values(), labels, **case.settings)
    exact_dh, exact_dw = torch.autograd.grad((exact * upstream).sum(), list(exact_leaves.values()))
    torch.testing.assert_close(logps.double(), exact, rtol=1e-5, atol=1e-5)

    h, w = (x.detach().double() for x in leaves.values())
    g = upstream.double().abs() * (labels != IGNORE_INDEX)
    bound_dh = g * 0.5 * tolerance * w.norm(dim=1).max()
    bound_dw = (g * 0.5 * tolerance * h.norm(dim=1)).sum()
    rounding = 1e-6
    assert ((dh - exact_dh).norm(dim=1) <= bound_dh + rounding * exact_dh.norm()).all()
    assert (dw - exact_dw).norm() <= bound_dw + rounding * exact_dw.norm()


@pytest.mark.parametrize("impl", FAST)
def test_a_peaked_softmax_drops_tiles_and_what_no_block_keeps_is_zero(impl, small_blocks):
    leaves, labels, upstream = make_inputs(Case(130, 40, 509, FP32, logit_std=6.0, ignored="none"), 0, device_of(impl))
    labels.clamp_(max=99)
    with torch.no_grad():  # the labels are what the model expects, and nothing beyond id 99 is likely anywhere
        leaves["lm_head_weight"][100:] *= 1e-3
        leaves["hidden_states"].copy_(leaves["lm_head_weight"][labels])
    _, (_, exact) = grads_of(leaves, labels, upstream, impl)
    _, (_, dw) = grads_of(leaves, labels, upstream, impl, skip_tolerance=2**-9)
    last_tile = slice(509 // 64 * 64, None)  # of 32 or 64 ids
    assert (exact[last_tile] != 0).any()
    assert (dw[last_tile] == 0).all()
    torch.testing.assert_close(dw[:100], exact[:100], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_no_tolerance_gives_the_bits_of_no_skipping_and_a_tiny_one_nearly(impl, dtype, small_blocks):
    leaves, labels, upstream = make_inputs(Case(67, 40, 257, dtype, has_bias=True), 0, device_of(impl))
    head = list(leaves.values())[:2]

    def grads(**settings):
        logps = linear_logps(*head, labels, bias=leaves["bias"], impl=impl, **settings).logps
        return [logps, *torch.autograd.grad((logps * upstream).sum(), list(leaves.values()))]

    without, same, tiny = grads(), grads(skip_tolerance=0.0), grads(skip_tolerance=1e-30)
    assert all(torch.equal(a, b) for a, b in zip(without, same, strict=True))
    exact_leaves = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    logps = exact_logps(*list(exact_leaves.values())[:2], labels, bias=exact_leaves["bias"])
    exact = [logps, *torch.autograd.grad((logps * upstream).sum(), list(exact_leaves.values()))]
    assert_as_exact(tiny, without, exact)


@pytest.mark.parametrize("impl", FAST)
def test_softcap_and_statistics_go_together_with_skipping(impl, small_blocks):
    case = Case(67, 40, 257, FP32, softcap=5.0)
    leaves, labels, upstream = make_inputs(case, 0, device_of(impl))
    tokens = linear_logps(*leaves.values(), labels, softcap=5.0, outputs=("entropy",), skip_tolerance=1e-6, impl=impl)
    plain = linear_logps(*leaves.values(), labels, softcap=5.0, outputs=("entropy",), impl="reference")
    torch.testing.assert_close(tokens.entropy, plain.entropy, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad((x.logps * upstream).sum(), list(leaves.values())) for x in (tokens, plain)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_skipped_tiles_are_not_multiplied(small_blocks, monkeypatch):
    """The work of backward, in columns times rows, is that of the kept tiles."""
    from fastdpo.ops import tiled_skipping

    done = []
    fill = tiled_skipping.GradRows.fill

    def spy(self, out, rows, *args):
        done.append(out.numel())
        fill(self, out, rows, *args)

    monkeypatch.setattr(tiled_skipping.GradRows, "fill", spy)
    case = Case(128, 40, 512, FP32, logit_std=6.0, ignored="none")
    leaves, labels, upstream = make_inputs(case, 0)
    with torch.no_grad():
        leaves["hidden_states"].copy_(leaves["lm_head_weight"][labels])
    upstream[:32] = 0.0  # rows without weight
    grads_of(leaves, labels, upstream, "tiled", skip_tolerance=1e-30)
    assert sum(done) == 96 * 512
    done.clear()
    grads_of(leaves, labels, upstream, "tiled", skip_tolerance=1e-3)
    assert 0 < sum(done) < 0.8 * 96 * 512


def test_an_invalid_label_makes_its_row_nan_also_when_tiles_are_skipped(small_blocks, monkeypatch):
    from fastdpo.ops import autograd

    monkeypatch.setattr(autograd, "check_labels", lambda labels, num_vocab: None)
    leaves, labels, upstream = make_inputs(Case(67, 40, 257, FP32, ignored="none"), 0)
    labels[3] = 257
    logps, (dh, _) = grads_of(leaves, labels, upstream, "tiled", skip_tolerance=0.5)
    assert logps.isnan().nonzero().tolist() == [[3]]
    assert dh.isnan().any(1).nonzero().tolist() == [[3]]


@pytest.mark.parametrize("T", [1, 129])  # a last block of one row
def test_a_block_of_one_row_gathers_no_copy_of_the_head(T):
    from fastdpo.evidence.memory import peak_live_bytes

    H, V = 256, 32768
    torch.manual_seed(0)
    hidden_states, weight = torch.randn(T, H, requires_grad=True), (torch.randn(V, H) * 0.01).requires_grad_()
    labels = torch.randint(V, (T,))

    def step(**settings):
        logps = linear_logps(hidden_states, weight, labels, impl="tiled", **settings).logps
        return torch.autograd.grad(logps.sum(), [hidden_states, weight])

    gathered = 2 * 4 * 2**22 + 8 * 2**21  # rows of the weight and their product; a tile of logits
    assert peak_live_bytes(lambda: step(skip_tolerance=1e-6)) <= 4 * V * H + gathered + 2**20
