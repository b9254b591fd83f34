"""Any shapes and values of the head op: as the definition in fp64 says, or refused; never another kind of error.

Values are finite, with ties, zeros and huge logits, or hold inf and nan: then every row that fp64 finds finite is right
and no other row looks finite.
"""

import torch
from fuzzing import assert_ours, fuzz
from hypothesis import strategies as st

import fastdpo
from fastdpo.ops.head import Head
from fastdpo.ops.reference import reference_linear_logps
from fastdpo.types import IGNORE_INDEX

KINDS = ("normal", "ties", "zeros", "huge", "inf", "nan", "minus inf bias", "one row")
OUTPUTS = ("lse", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


@st.composite
def heads(draw):
    """Inputs of the head op in fp64, and settings."""
    kind = draw(st.sampled_from(KINDS))
    T = 1 if kind == "one row" else draw(st.integers(0, 9))
    H, V = draw(st.integers(1, 9)), draw(st.sampled_from([1, 2, 7, 33, 130]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    h, w = torch.randn(T, H, generator=g).double(), torch.randn(V, H, generator=g).double()
    bias = torch.randn(V, generator=g).double() if draw(st.booleans()) or kind == "minus inf bias" else None
    labels = torch.randint(0, V, (T,), generator=g)
    labels[torch.rand(T, generator=g) < draw(st.sampled_from([0.0, 0.4, 1.0]))] = IGNORE_INDEX
    row = draw(st.integers(0, max(T - 1, 0)))
    if kind == "ties":
        w[:] = w[:1]
    elif kind == "zeros":
        h[:], w[: V // 2] = 0.0, 0.0
    elif kind == "huge":
        h *= 1e3
        w *= 1e2
    elif kind in ("inf", "nan") and T:
        h[row] = float(kind)
    elif kind == "minus inf bias":  # a token that cannot be: its log-prob is -inf
        bias[draw(st.integers(0, V - 1))] = float("-inf")
    settings = {
        "logit_scale": draw(st.sampled_from([1.0, 0.25, -1.5, 1e-3])),
        "softcap": draw(st.sampled_from([None, None, 5.0, 30.0])),
    }
    return kind, h, w, bias, labels, settings, draw(st.sampled_from([None, 1, 4096])), g.initial_seed()


def exact(h, w, bias, labels, settings):
    return reference_linear_logps(h, w, bias, labels, Head(settings["logit_scale"], settings["softcap"], OUTPUTS))


def gradients(logps, upstream, leaves):
    return torch.autograd.grad((logps * upstream).sum(), leaves)


def test_any_finite_and_any_broken_input_of_the_head_is_as_defined():
    def check(case):
        kind, h, w, bias, labels, settings, workspace, seed = case
        leaves = [x.clone().requires_grad_() for x in (h, w, bias) if x is not None]
        inputs = (*leaves[:2], leaves[2] if bias is not None else None)
        found = fastdpo.linear_logps(
            *inputs[:2], labels, bias=inputs[2], workspace_bytes=workspace, outputs=OUTPUTS, impl="tiled", **settings
        )
        wanted = exact(*inputs, labels, settings)
        for name in ("logps", "lse", "entropy", "mean_logits", "log_sum_sq_probs"):
            a, b = getattr(found, name).detach(), getattr(wanted, name).detach()
            if name not in ("logps", "lse"):  # of a row without a softmax they mean nothing
                a, b = a[wanted.lse.isfinite()], b[wanted.lse.isfinite()]
            assert torch.equal(a.isfinite(), b.isfinite()), f"{name}: {a} for {b}"
            torch.testing.assert_close(a[b.isfinite()], b[b.isfinite()], rtol=1e-9, atol=1e-9)
        if kind in ("inf", "nan"):  # has no gradient where it is ignored
            inputs = (h.where((labels != IGNORE_INDEX)[:, None], 0.0).requires_grad_(), *inputs[1:])
            wanted = exact(*inputs, labels, settings)
            if not inputs[0].isfinite().all():
                return kind
        elif kind == "minus inf bias":
            return kind
        upstream = torch.randn(len(labels), generator=torch.Generator().manual_seed(seed)).double()
        of_wanted = [x for x in inputs if x is not None]
        for a, b in zip(
            gradients(found.logps, upstream, leaves), gradients(wanted.logps, upstream, of_wanted), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7 * (1 + float(b.abs().max()) if b.numel() else 1))
        return kind

    outcomes = fuzz("head", heads(), check)
    assert set(outcomes) == set(KINDS), outcomes


@st.composite
def splits(draw):
    """A head, and sequences over its rows that may share them, split in two at a sequence."""
    _, h, w, bias, labels, settings, *_ = draw(heads().filter(lambda case: case[0] not in ("inf", "nan")))
    lengths = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4)) if len(labels) else [0]
    rows = [draw(st.integers(0, len(labels) - 1)) for _ in range(sum(lengths))]
    return h, w, bias, labels, settings, lengths, rows, draw(st.integers(0, len(lengths)))


def test_the_sums_of_a_split_are_those_of_the_whole():
    def check(case):
        h, w, bias, labels, settings, lengths, rows, cut = case

        def sums(first, last):
            ends = torch.tensor([0, *lengths[first:last]]).cumsum(0)
            start = sum(lengths[:first])
            some = torch.tensor(rows[start : start + int(ends[-1])], dtype=torch.int64)
            found = fastdpo.sequence_logps(h, w, labels, ends, rows=some, bias=bias, impl="tiled", **settings)
            return found.sums, found.lengths

        whole, num_counted = sums(0, len(lengths))
        logps = exact(h, w, bias, labels, settings).logps
        by_hand = [logps[part].sum() for part in torch.tensor(rows, dtype=torch.int64).split(lengths)]
        torch.testing.assert_close(whole, torch.stack(by_hand), rtol=1e-9, atol=1e-9, equal_nan=True)
        parts = [sums(0, cut), sums(cut, len(lengths))]
        torch.testing.assert_close(torch.cat([part[0] for part in parts]), whole, rtol=1e-9, atol=1e-9, equal_nan=True)
        assert torch.equal(torch.cat([part[1] for part in parts]), num_counted)
        return "shared rows" if len(set(rows)) < len(rows) else "separate rows"

    fuzz("sums", splits(), check)


tensors = st.one_of(
    st.none(),
    st.just("text"),
    st.just([[1.0]]),
    st.builds(
        lambda shape, dtype: torch.zeros(shape, dtype=dtype),
        st.lists(st.integers(0, 3), max_size=3),
        st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64]),
    ),
)
odd = st.one_of(st.none(), st.floats(), st.text(max_size=2), st.integers(-2, 2), st.booleans(), st.just([1.0]))
fields = {
    "hidden_states": tensors,
    "lm_head_weight": tensors,
    "labels": st.one_of(st.builds(lambda a, b: torch.tensor([a, b]), *[st.integers(-101, 5)] * 2), tensors),
    "bias": st.one_of(st.just(torch.zeros(4)), tensors),
    "logit_scale": odd,
    "softcap": odd,
    "outputs": st.one_of(st.sampled_from(["lse", ("lse", "entropy"), (), "x", None, 3]), odd),
    "skip_tolerance": odd,
    "workspace_bytes": odd,
    "impl": st.one_of(st.sampled_from(["auto", "tiled", "reference", "triton"]), odd),
}


@st.composite
def calls(draw):
    """A call that is right, but for up to three arguments."""
    call = {"hidden_states": torch.ones(2, 3), "lm_head_weight": torch.ones(4, 3), "labels": torch.tensor([1, 3])}
    for name in draw(st.lists(st.sampled_from(sorted(fields)), max_size=3)):
        call[name] = draw(fields[name])
    return call


def test_any_call_of_the_head_is_answered_or_refused_by_name():
    def check(call):
        try:
            fastdpo.linear_logps(**call)
        except ValueError as error:
            assert_ours(error)
            return "refused"
        return "answered"

    outcomes = fuzz("head calls", calls(), check)
    assert outcomes["answered"] > 5, outcomes
