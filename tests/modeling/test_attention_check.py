"""The self-check's own attention call: what it catches that short pairs forward do not, and what comes then.

Kernels are emulations with a mistake in them. On a GPU the real ones go through the same check.
"""

import logging

import pytest
import torch
from covering import every_pair
from test_attention_backends import emulated, no_gpu  # noqa: F401  the fixture
from test_packed_logps import GROUPS, build, separate_sums
from varlen_emulation import EmulatedFlash, EmulatedVarlen, flash_attn_2, varlen_attn_2_13

from fastdpo import pack_pairs, packed_logps, prepare_model
from fastdpo.modeling import check_packing
from fastdpo.modeling.attention import Observed, UnsupportedAttention, observed
from fastdpo.modeling.attention.backends import CallShape
from fastdpo.modeling.attention.check import attention_fault, scores_note
from fastdpo.modeling.prepared import prepared_state


class WrongGradient(torch.autograd.Function):
    """The same number, a gradient that a mistake has gone through."""

    @staticmethod
    def forward(ctx, x, mistake):
        ctx.mistake = mistake
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.mistake(grad.clone()), None


def loses_rows(first, last):
    def mistake(grad):
        grad[first:last] = 0
        return grad

    return mistake


def with_wrong_gradient(position, mistake):
    def function(*args, scale=None, window_size=(-1, -1), enable_gqa=False):
        args = list(args)
        args[position] = WrongGradient.apply(args[position], mistake)
        return varlen_attn_2_13(*args, scale=scale, window_size=window_size, enable_gqa=enable_gqa)

    return function


def shape(**changed):
    sizes = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 16, "value_dim": 16, "scale": 0.25}
    settings = {"dtype": torch.float32, "device": torch.device("cpu"), "window": None, "softcap": None, "sinks": None}
    return CallShape(**{**sizes, **settings, **changed})


SHAPES = {
    "plain": {},
    "window": {"window": 48},
    "window longer than a branch": {"window": 4096},
    "one head for all": {"num_heads": 6, "num_kv_heads": 1},
    "every head its own": {"num_heads": 32, "num_kv_heads": 32, "head_dim": 20, "value_dim": 12},
    "no scaling": {"scale": 1.0},
}


@pytest.mark.parametrize(
    *every_pair(
        backend=["varlen", "flash2", "flash3", "flash4"], changed=list(SHAPES), dtype=[torch.float32, torch.bfloat16]
    ),
    ids=str,
)
def test_a_kernel_that_is_right_passes(backend, changed, dtype, emulated):  # noqa: F811
    emulated(backend)
    assert attention_fault(shape(dtype=dtype, **SHAPES[changed]), "auto", {}) == (backend, None)


@pytest.mark.parametrize(("softcap", "sinks"), [(20.0, None), (None, False)])
def test_softcaps_and_sinks_are_checked_where_the_kernel_has_them(softcap, sinks, emulated):  # noqa: F811
    emulated("flash4")
    assert attention_fault(shape(softcap=softcap, sinks=sinks), "auto", {}) == ("flash4", None)
    emulated("flash4", EmulatedFlash(4, ignoring))
    name, fault = attention_fault(shape(softcap=softcap, sinks=sinks), "auto", {})
    assert name == "flash4"
    assert fault.startswith("its output is off by")


def ignoring(*args, softcap=0.0, learnable_sink=None, **more):
    return EmulatedFlash(4).function(*args, **more)


def test_sinks_that_want_a_gradient_are_checked_with_what_training_will_take(emulated):  # noqa: F811
    emulated("flash4")
    assert attention_fault(shape(sinks=True), "auto", {}) == ("sdpa", None)
    with pytest.raises(UnsupportedAttention, match="no gradient of attention sinks"):
        attention_fault(shape(sinks=True), "flash4", {})
    assert attention_fault(shape(sinks=True), "flash4", {}, with_grad=False) == ("flash4", None)


MISTAKES = {
    "dq of a ragged tile": (0, loses_rows(640, 650), "its gradient of the queries"),
    "dk of the second branch": (1, loses_rows(550, 600), "its gradient of the keys"),
    "dv of one row": (2, loses_rows(127, 128), "its gradient of the values"),
    "dv of one head twice": (
        2,
        lambda grad: torch.cat([grad[:, :1] * 2, grad[:, 1:]], 1),
        "its gradient of the values",
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("position", "mistake", "named"), MISTAKES.values(), ids=MISTAKES)
def test_a_backward_that_is_wrong_is_found(position, mistake, named, dtype, emulated):  # noqa: F811
    emulated("varlen", EmulatedVarlen(with_wrong_gradient(position, mistake)))
    name, fault = attention_fault(shape(dtype=dtype), "auto", {})
    assert name == "varlen"
    assert fault.startswith(named)


def test_a_window_that_no_short_branch_reaches_is_found_where_the_kernel_ignores_it(emulated):  # noqa: F811
    def no_window(*args, scale=None, window_size=(-1, -1), enable_gqa=False):
        return varlen_attn_2_13(*args, scale=scale, window_size=(-1, 0), enable_gqa=enable_gqa)

    emulated("varlen", EmulatedVarlen(no_window))
    assert attention_fault(shape(), "auto", {}) == ("varlen", None)
    for window in (64, 512, 4096):
        _, fault = attention_fault(shape(window=window), "auto", {})
        assert f"with a window of {min(window, 128)} tokens" in fault


def test_the_check_leaves_out_a_backend_whose_backward_is_wrong_and_says_so(emulated, caplog):  # noqa: F811
    emulated("flash2", EmulatedFlash(2, with_wrong_flash_gradient))
    emulated("varlen")
    model = build("llama")
    with caplog.at_level(logging.WARNING):
        check = check_packing(model)
    assert check.ok
    assert set(check.backends) == {"varlen"}
    assert list(check.excluded) == ["flash2"]
    assert (
        "flash2: is wrong on this machine (attention by flash2: its gradient of the keys is off by"
        in check.backends["varlen"]
    )
    assert "Attention by flash2 is wrong on this machine" in caplog.text
    assert "varlen is used instead" in caplog.text
    seen = Observed()
    token = observed.set(seen)
    sums = packed_logps(model, pack_pairs(GROUPS)).sequences.sums
    observed.reset(token)
    assert set(seen.backends) == {"varlen"}
    torch.testing.assert_close(sums, separate_sums(model), rtol=1e-5, atol=1e-6)


def with_wrong_flash_gradient(q, k, v, *args, **more):
    return flash_attn_2(q, WrongGradient.apply(k, loses_rows(100, 140)), v, *args, **more)


def test_a_kernel_that_raises_is_left_out_and_the_next_one_is_asked(emulated):  # noqa: F811
    def broken(*args, window_size, scale, enable_gqa=False):
        raise RuntimeError("no kernel image is available")

    def also_broken(*args, window_size=(-1, -1), **more):
        raise TypeError("unexpected keyword")

    emulated("flash3", EmulatedFlash(3, also_broken))
    emulated("varlen", EmulatedVarlen(broken))
    check = check_packing(build("llama"))
    assert check.ok
    assert set(check.backends) == {"sdpa"}
    assert check.excluded == {
        "flash3": "is wrong on this machine (TypeError: unexpected keyword)",
        "varlen": "is wrong on this machine (RuntimeError: no kernel image is available)",
    }
    assert "no kernel image is available" in str(check)


def test_a_kernel_that_fails_in_backward_alone_is_left_out(emulated):  # noqa: F811
    def broken(grad):
        raise RuntimeError("head dim 256 is not supported in backward")

    emulated("varlen", EmulatedVarlen(with_wrong_gradient(2, broken)))
    check = check_packing(build("llama"))
    assert (check.ok, set(check.backends)) == (True, {"sdpa"})
    assert "head dim 256" in check.excluded["varlen"]


def test_what_was_left_out_is_asked_again_by_the_next_check(emulated):  # noqa: F811
    emulated("varlen", EmulatedVarlen(with_wrong_gradient(1, loses_rows(0, 650))))
    model = build("llama")
    assert set(check_packing(model).backends) == {"sdpa"}
    assert set(prepared_state(model).excluded_backends) == {"varlen"}
    emulated("varlen")
    assert set(check_packing(model).backends) == {"varlen"}
    assert prepared_state(model).excluded_backends == {}


def test_a_setting_that_allows_several_generations_takes_another_of_them(emulated):  # noqa: F811
    emulated("flash3", EmulatedFlash(3, with_wrong_flash_gradient_3))
    emulated("flash2")
    check = check_packing(prepare_model(build("llama"), attention_backend="flash"))
    assert (check.ok, set(check.backends), set(check.excluded)) == (True, {"flash2"}, {"flash3"})


def with_wrong_flash_gradient_3(q, k, v, *args, **more):
    return EmulatedFlash(3).function(q, WrongGradient.apply(k, loses_rows(100, 140)), v, *args, **more)


def test_a_model_without_gradients_is_checked_forward_alone(emulated):  # noqa: F811
    emulated("varlen", EmulatedVarlen(with_wrong_gradient(1, loses_rows(0, 650))))
    model = build("llama").requires_grad_(False)
    assert set(check_packing(model).backends) == {"varlen"}


def test_products_of_fp32_are_whole_while_the_architecture_is_checked_and_the_users_in_the_run():
    """TF32 in the stock logits alone is off by 0.5 to 2.3e-4, more than a good model may be."""
    model, seen = build("llama"), []
    model.lm_head.register_forward_hook(lambda *_: seen.append(torch.backends.cuda.matmul.fp32_precision))
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert check_packing(model).ok
        assert seen
        assert set(seen) == {"ieee"}
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize(("softcap", "sinks", "what"), [(50.0, None, "a softcap"), (None, True, "attention sinks")])
def test_scores_that_would_be_built_on_a_gpu_are_said_with_their_size(softcap, sinks, what):
    cuda = {
        "device": torch.device("cuda"),
        "dtype": torch.bfloat16,
        "num_heads": 16,
        "softcap": softcap,
        "sinks": sinks,
    }
    note = scores_note({shape(**cuda): "sdpa"})
    assert note.startswith(
        f"sdpa builds the fp32 scores of {what}, 1.0 GiB a layer for a branch that sees 4,096 tokens"
    )
    assert "flash-attn" in note
    assert scores_note({shape(**cuda): "flash2"}) is None
    assert scores_note({shape(**{**cuda, "softcap": None, "sinks": None}): "sdpa"}) is None
    assert scores_note({shape(softcap=softcap, sinks=sinks): "sdpa"}) is None  # a CPU, which has nothing else


# On a GPU

HEAD_DIMS = (64, 96, 128, 256)


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize(
    *every_pair(backend=["varlen", "flash2", "flash3", "flash4", "sdpa"], head_dim=HEAD_DIMS, window=[None, 128, 512])
)
def test_a_kernel_is_right_at_the_edges_of_tiles_and_windows(backend, head_dim, window):
    sizes = {"num_heads": 32, "num_kv_heads": 8, "head_dim": head_dim, "value_dim": head_dim, "window": window}
    call = shape(dtype=torch.bfloat16, device=torch.device("cuda"), **sizes)
    try:
        found = attention_fault(call, backend, {})
    except UnsupportedAttention as refusal:
        if not backend.startswith("flash"):
            raise
        pytest.skip(str(refusal))
    assert found == (backend, None)
