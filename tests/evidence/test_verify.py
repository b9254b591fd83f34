"""verify passes what is right, fails each plausible mistake by name, and says what it could not check."""

import pytest
import torch
from wrong import wrong_heads

from fastdpo import linear_logps
from fastdpo.evidence import checks, verify
from fastdpo.evidence.checks import Line, Subject
from fastdpo.evidence.problems import Shape, make_problem
from fastdpo.types import TokenLogps

SMALL = Shape(67, 40, 521)
INTERPRETED = Shape(67, 40, 257)  # fewer rows or ids, and rounding decides whether an error is twice another
WITH_ALL = " (bias, scale, softcap)"


def lines_of(impl="tiled", dtype="float32", shape=SMALL):
    return verify.verify_one(Subject(impl, dtype, torch.device("cpu"), shape))


def failed(lines):
    return {line.check for line in lines if line.verdict == "FAILED"}


@pytest.fixture
def without_memory(monkeypatch):
    monkeypatch.setattr(verify, "CHECKS", [check for check in checks.CHECKS if check is not checks.memory])


@pytest.fixture
def replace_tiled(monkeypatch, without_memory):
    """Puts another function in the place of impl="tiled"; `op` is handed what linear_logps gets."""

    def replace(op):
        def patched(*args, impl, **kwargs):
            return op(*args, **kwargs) if impl == "tiled" else linear_logps(*args, impl=impl, **kwargs)

        monkeypatch.setattr(checks, "linear_logps", patched)

    return replace


def right(*args, **kwargs):
    return linear_logps(*args, impl="tiled", **kwargs)


def with_logps_of(mistake):
    """The mistake's log-probs and gradients, everything else as it should be."""

    def op(*args, outputs=(), skip_tolerance=0.0, **kwargs):
        if outputs:
            return right(*args, outputs=outputs, **kwargs)
        return TokenLogps(mistake(*args, **kwargs))

    return op


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("impl", ["tiled", "triton", "reference"])
def test_every_implementation_passes(impl, dtype):
    lines = lines_of(impl, dtype, INTERPRETED if impl == "triton" else SMALL)
    assert failed(lines) == set()
    checked = {line.check for line in lines if line.verdict == "ok"}
    assert {"log-probs", "grad hidden_states", "grad lm_head_weight", "grad bias" + WITH_ALL} <= checked
    assert {"lse", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs"} <= checked
    assert ("peak memory" in checked) == (impl == "tiled")
    assert all(line.note for line in lines if line.verdict == "skipped")


@pytest.mark.parametrize("seed", range(6))
def test_right_code_passes_on_any_draw_of_few_rows(seed, monkeypatch):
    """Here one draw alone had bounds from 3.6e-3 to 8.2e-3, and the kernel's error reached 6.1e-3."""

    def draw(*args, **kwargs):
        return make_problem(*args, **{**kwargs, "seed": kwargs.get("seed", 0) + 100 * seed})

    monkeypatch.setattr(checks, "make_problem", draw)
    subject = Subject("triton", "bfloat16", torch.device("cpu"), Shape(37, 40, 131))
    lines = [*checks.against_fp64(subject), *checks.statistics(subject)]
    assert [(line.check, line.error, line.bound) for line in lines if line.verdict != "ok"] == []
    assert len(lines) == 14


PLAIN = Shape(67, 150, 257)
CAUGHT_AS = {
    wrong_heads.off_by_one_shift: ("float32", PLAIN, "log-probs"),
    wrong_heads.ignored_row_counted: ("float32", PLAIN, "ignored rows: values that are not 0"),
    wrong_heads.missing_last_tile: ("float32", PLAIN, "log-probs"),
    wrong_heads.unmasked_vocab_tail: ("float32", PLAIN, "log-probs"),
    wrong_heads.wrong_merge: ("float32", PLAIN, "log-probs"),
    wrong_heads.bf16_accumulation: ("bfloat16", Shape(130, 200, 131), "log-probs"),
    wrong_heads.weight_grad_summed_in_bf16: ("bfloat16", Shape(600, 40, 19), "grad lm_head_weight"),
    wrong_heads.softcap_slope_forgotten: ("float32", PLAIN, "grad hidden_states" + WITH_ALL),
    wrong_heads.bias_after_scale: ("float32", PLAIN, "log-probs" + WITH_ALL),
}


@pytest.mark.parametrize("mistake", CAUGHT_AS, ids=lambda mistake: mistake.__name__)
def test_a_wrong_head_fails_under_the_name_of_what_is_wrong(mistake, replace_tiled):
    dtype, shape, check = CAUGHT_AS[mistake]
    replace_tiled(with_logps_of(mistake))
    lines = lines_of(dtype=dtype, shape=shape)
    assert check in failed(lines)
    line = next(line for line in lines if line.check == check)
    assert line.error > line.bound


def test_every_wrong_head_is_tried():
    defined = {f for name, f in vars(wrong_heads).items() if callable(f) and f.__module__ == wrong_heads.__name__}
    assert {f for f in defined if not f.__name__.startswith("_")} == set(CAUGHT_AS)


def statistic_off(*args, **kwargs):
    tokens = right(*args, **kwargs)
    return TokenLogps(tokens.logps, **{name: getattr(tokens, name) for name in ("lse", "mean_logits", "is_top1")},
                      entropy=None if tokens.entropy is None else tokens.entropy * 1.001,
                      log_sum_sq_probs=tokens.log_sum_sq_probs)  # fmt: skip


def never_top1(*args, **kwargs):
    tokens = right(*args, **kwargs)
    if tokens.is_top1 is not None:
        tokens.is_top1.zero_()
    return tokens


def last_bit_at_random(*args, **kwargs):
    tokens = right(*args, **kwargs)
    return TokenLogps(tokens.logps * (1 + 1e-7 * torch.rand_like(tokens.logps)), **statistics_of(tokens))


def statistics_of(tokens):
    return {name: value for name, value in vars(tokens).items() if name != "logps"}


def label_clamped(hidden_states, lm_head_weight, labels, **kwargs):
    return right(hidden_states, lm_head_weight, labels.clamp(max=len(lm_head_weight) - 1), **kwargs)


def default_skips(*args, **kwargs):
    return right(*args, **{"skip_tolerance": 1e-3} | kwargs)


def drops_too_much(*args, **kwargs):
    kwargs["skip_tolerance"] = 0.9 if kwargs.get("skip_tolerance") else 0.0
    return right(*args, **kwargs)


@pytest.mark.parametrize(
    ("op", "check"),
    [
        (statistic_off, "entropy"),
        (never_top1, "is_top1"),
        (last_bit_at_random, "same call again: bits that differ"),
        (label_clamped, "label outside [0, V): rows that pass unseen"),
        (default_skips, "skip_tolerance 0: bits that differ"),
        (drops_too_much, "skip_tolerance 2**-9: grad hidden_states, worst row"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_a_broken_promise_fails_alone_and_by_name(op, check, replace_tiled):
    replace_tiled(op)
    found = failed(lines_of(shape=Shape(150, 40, 1021)))
    assert check in found
    assert len(found) <= 2


def test_an_op_that_builds_the_logits_fails_the_memory_check(monkeypatch):
    monkeypatch.setattr(verify, "CHECKS", [checks.memory])

    def patched(*args, impl, **kwargs):
        return linear_logps(*args, impl="reference", **kwargs)

    monkeypatch.setattr(checks, "linear_logps", patched)
    assert failed(lines_of()) == {"peak memory", "peak memory (head frozen)"}


def test_memory_shapes_are_larger_than_their_bound():
    """Otherwise an op that builds the logits would pass."""
    for device, shape in checks.MEMORY_SHAPES.items():
        grads = shape.hidden * (shape.rows + shape.vocab) * 8
        partials = 8 * shape.rows * -(-shape.vocab // 64)
        bf16_logits = 2 * shape.rows * shape.vocab
        assert bf16_logits > 1.2 * (checks.WORKSPACE_BYTES[device] + grads + partials), device


def test_an_op_that_raises_is_a_failed_line_and_the_other_checks_run(replace_tiled):
    def raises_for_statistics(*args, outputs=(), **kwargs):
        if outputs:
            raise RuntimeError("no statistics today")
        return right(*args, **kwargs)

    replace_tiled(raises_for_statistics)
    lines = lines_of()
    assert failed(lines) == {"statistics against fp64"}
    assert next(line for line in lines if line.verdict == "FAILED").note == "RuntimeError: no statistics today"
    assert any(line.check == "log-probs" and line.verdict == "ok" for line in lines)


def test_nan_is_no_small_error():
    line = Subject("tiled", "float32", torch.device("cpu"), SMALL).line("log-probs", float("nan"), 1.0)
    assert line.verdict == "FAILED"


def test_an_implementation_that_cannot_run_here_is_skipped_with_the_reason(monkeypatch):
    def refuses(*args, impl, **kwargs):
        raise ValueError("needs a GPU")

    monkeypatch.setattr(checks, "linear_logps", refuses)
    assert lines_of("triton") == [Line("triton", "float32", "all", "skipped", note="needs a GPU")]
    assert "log-probs and gradients against fp64" in failed(lines_of("tiled"))  # runs everywhere, so this is an error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "meta"}, "device must be cpu or cuda, got 'meta'"),
        ({"shape": Shape(31, 8, 8)}, "rows must be at least 32 .* got 31"),
        ({"dtypes": ["float64"]}, "dtype must be one of bfloat16, float32, float16, got 'float64'"),
    ],
)
def test_what_cannot_be_verified_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        verify.verify(**arguments)


def test_a_shape_without_rows_is_refused():
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        Shape(0, 8, 8)


def test_each_line_is_told_as_it_comes(monkeypatch):
    def half(subject):
        """One line, and a failure."""
        yield subject.skipped("first", "told")
        raise RuntimeError("then it breaks")

    monkeypatch.setattr(verify, "CHECKS", [half])
    monkeypatch.setattr(verify, "NAMES", ("tiled",))
    told = []
    lines = verify.verify("cpu", ["float32"], each=told.append)
    assert told == lines
    assert [line.verdict for line in lines] == ["skipped", "FAILED"]
    assert verify.verify("cpu", ["float32"]) == lines


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_everything_passes_on_a_gpu():
    lines = verify.verify("cuda")
    assert failed(lines) == set()
    assert {"triton", "tiled"} <= {line.impl for line in lines if line.check == "peak memory"}
