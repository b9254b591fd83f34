"""Checks the user's model before training: do packed rows give the log-probs of the stock model? Three questions.

1. Does the head op compute the model's own logits (on padded rows)? If not, fastdpo cannot train the model.
2. Does a packed row equal one sequence at a time? Some architectures drop the arguments of packing, mix neighbouring
   tokens outside attention, or never call an attention function. The check assumes nothing from a model's name.
   Questions 1 and 2 run in fp32 where it fits, with an attention backend that runs on any device.
3. Do the attention backend and precision of the run agree with this up to rounding? This finds kernels that are wrong
   on this machine.

The tolerance for rounding comes from the model itself: its own forward runs again with embeddings changed by as much as
this device rounds products. With fp32 products of lower precision (TF32) the tolerance is larger.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.data.batches.packing import pack_pairs, pad_pairs
from fastdpo.modeling.attention import BACKENDS, MASKS, Observed, UnsupportedAttention, can_do_without, observed
from fastdpo.modeling.attention.check import attention_fault, scores_note
from fastdpo.modeling.backbone import bare_model, text_config, text_ids
from fastdpo.modeling.head import execution_device
from fastdpo.modeling.head_check import before_head, check_causal
from fastdpo.modeling.mixers import mixers_of
from fastdpo.modeling.packed import packed_logps
from fastdpo.modeling.positions import short_scales
from fastdpo.modeling.prepared import attention_backend, give_masks, prepare_model, prepared_state, run_mixers_packed
from fastdpo.modeling.vocab_rows import is_dtensor
from fastdpo.types import TokenizedPair

# Largest difference of a summed log-prob, relative to 1 + its size, that rounding explains
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Packed rows may differ by this plus ten times the difference of padded rows, which shows this model's rounding
_PACKED_FLOOR = {torch.float64: 1e-10, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
_LEAST_NUDGE = 2.0**-20  # smallest relative change of embeddings, a few units in the last place of fp32
_MOST_FROM_ROUNDING = 1e-2  # larger errors never count as rounding
_MAX_PARAMETERS_COPIED = (
    10**9
)  # up to here a 16-bit model is checked as a fp32 copy, where leaks cannot hide in rounding


@dataclass(frozen=True)
class PackingCheck:
    """Whether packed rows are exact on a model, with the largest relative error or the reason why the check failed."""

    ok: bool
    error: float  # of summed log-probs, relative to 1 + their size; inf where packing raised
    reason: str
    backends: dict[str, str] = field(default_factory=dict)  # attention backends of the run, and why each was taken
    excluded: dict[str, str] = field(default_factory=dict)  # backends that "auto" skips here, with their faults
    note: str | None = None  # about the cost of the run's attention
    seconds: float = 0.0  # that the check took

    def __str__(self) -> str:
        taken = [f"{name}, {BACKENDS[name].title} ({why})" for name, why in self.backends.items()]
        return "; ".join([*taken, f"{self.reason}, checked in {self.seconds:.2g} s"])


@dataclass(frozen=True)
class _Probe:
    """A few short pairs of random tokens, and the stock model's log-probs for them, one sequence at a time."""

    pairs: list[TokenizedPair]
    expected: Tensor  # (S,) fp64, nats
    impl: str

    def rounding_of(self, model: nn.Module) -> float:
        """The change of the stock model's own log-probs if its embeddings change by the rounding of a product."""
        device = self.expected.device
        plain = _stock_sums(model, self.pairs, device)
        with _nudged_embeddings(model, max(_LEAST_NUDGE, _product_error(device))):
            nudged = _stock_sums(model, self.pairs, device)
        return ((nudged - plain).abs() / (1 + plain.abs())).max().item()

    def error_of(self, sums: Tensor) -> float:
        return ((sums.double() - self.expected).abs() / (1 + self.expected.abs())).max().item()

    def padded_error(self, model: nn.Module) -> float:
        batch = pad_pairs(self.pairs).to(self.expected.device)
        return self.error_of(packed_logps(model, batch, impl=self.impl).sequences.sums)

    def packed_error(self, model: nn.Module, seen: Observed) -> float:
        """The relative error of packed log-probs; `seen` records the attention calls of the model's layers."""
        batch = pack_pairs(self.pairs).to(self.expected.device)
        token = observed.set(seen)
        try:
            return self.error_of(packed_logps(model, batch, impl=self.impl).sequences.sums)
        finally:
            observed.reset(token)


def check_packing(
    model: nn.Module,
    *,
    impl: str = "auto",
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> PackingCheck:
    """Compares `packed_logps` with separate unpadded forwards of the stock model on a few short pairs of random tokens.

    The random state, the model's mode and its gradients do not change.

    Args:
        model: prepared with the attention backend of the run.
        impl: implementation of the head op, see `linear_logps`.
        autocast: the precision of the run, as a context manager.
    Raises:
        ValueError: padded rows do not give the model's own log-probs, so that the op does not compute its head; or the
            user named an attention backend that cannot run this model.
    """
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    prepared_state(model).excluded_backends.clear()  # checked again
    device = execution_device(bare_model(model))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            checked = in_fp32_where_it_fits(model)
            anywhere = "mask" if attention_backend(model) == "mask" else "sdpa"
            with _attention_backend(checked, anywhere), whole_fp32_products(), short_scales(checked):
                check_causal(bare_model(checked), device)
                probe, check = _tried(checked, impl, device)
                if not check.ok:
                    _check_training(checked, probe)
            give_masks(model, prepared_state(checked).masks)
            if check.ok:
                with autocast(), short_scales(model):
                    run_mixers_packed(model, like=checked)
                    check = _check_run(model, probe, check)
            mixers = mixers_of(bare_model(model))
            if check.ok and mixers is not None and mixers.names:
                check = replace(check, reason=f"{check.reason}; {mixers.describe(bare_model(model))}")
    finally:
        model.train(was_training)
    _say_what_is_left_out(check)
    return replace(check, seconds=time.perf_counter() - started)


def _say_what_is_left_out(check: PackingCheck) -> None:
    from transformers.utils import logging

    for name, why in check.excluded.items():
        taken = " and ".join(check.backends) if check.ok else "nothing"
        logging.get_logger(__name__).warning(f"Attention by {name} {why}; {taken} is used instead.")


def _tried(model: nn.Module, impl: str, device: torch.device) -> tuple[_Probe, PackingCheck]:
    """The check with the simplest kind of mask for which packed rows are exact, or without masks if there is none."""
    found = []
    for masks in MASKS:
        give_masks(model, masks)
        leaks = run_mixers_packed(model)
        probe = _probe(model, impl, device)
        check = _check_architecture(model, probe, leaks)
        if check.ok or attention_backend(model) == "mask":  # "mask" passes its own mask
            return probe, check
        found.append((probe, check))
    give_masks(model, "none")
    run_mixers_packed(model)
    return min(found, key=lambda pair: pair[1].error if math.isfinite(pair[1].error) else math.inf)  # says most


@contextmanager
def _attention_backend(model: nn.Module, name: str) -> Iterator[None]:
    before = attention_backend(model)
    prepare_model(model, attention_backend=name)
    try:
        yield
    finally:
        prepare_model(model, attention_backend=before)


@contextmanager
def whole_fp32_products() -> Iterator[None]:
    """Context manager for full-precision fp32 products, without TF32 or bf16 even if the user allows them."""
    backends: Any = torch.backends
    kinds = [backends.cuda.matmul, backends.mkldnn.matmul]
    before = [kind.fp32_precision for kind in kinds]
    for kind in kinds:
        kind.fp32_precision = "ieee"
    try:
        yield
    finally:
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision


def _product_error(device: torch.device) -> float:
    """Relative error of an fp32 product on this device, with the current precision settings."""
    generator = torch.Generator().manual_seed(2)
    left, right = torch.rand(2, 64, 64, generator=generator).to(device)
    exact = left.double() @ right.double().T
    return ((nn.functional.linear(left, right).double() - exact).abs() / exact).max().item()


@contextmanager
def _nudged_embeddings(model: nn.Module, size: float) -> Iterator[None]:
    """Context manager that changes each number from the input embeddings by a relative amount, up or down."""
    generator = torch.Generator().manual_seed(1)

    def nudge(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        signs = torch.randint(2, output.shape, generator=generator).to(output) * 2 - 1
        return output * (1 + size * signs)

    handle = bare_model(model).get_input_embeddings().register_forward_hook(nudge)
    try:
        yield
    finally:
        handle.remove()


def in_fp32_where_it_fits(model: nn.Module) -> nn.Module:
    """A copy in fp32 of a 16-bit model that is not too large; else the model itself."""
    dtypes = {p.dtype for p in model.parameters()}
    if any(p.is_meta or is_dtensor(p) for p in model.parameters()):  # weights that are kept elsewhere
        return model
    is_16_bit = dtypes & {torch.float16, torch.bfloat16} and all(d.is_floating_point for d in dtypes)
    if is_16_bit and sum(p.numel() for p in model.parameters()) <= _MAX_PARAMETERS_COPIED:
        return copy.deepcopy(model).float()
    return model


def _probe(model: nn.Module, impl: str, device: torch.device) -> _Probe:
    ids = text_ids(bare_model(model))
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        return ids[torch.randint(len(ids), (length,), generator=generator)].tolist()

    # prompts of three lengths and sequences of two: few stock forwards, but padding is still tested
    lengths = [(3, 5, 2), (4, 1, 4), (1, 4, 7)]
    mixers = mixers_of(bare_model(model))
    if mixers is not None and mixers.names:  # past the 64 tokens that kernels take at a time, by either branch
        lengths += [(39, 32, 9), (37, 4, 34)]
    pairs = [TokenizedPair(draw(p), draw(c), draw(r)) for p, c, r in lengths]
    return _Probe(pairs, _stock_sums(model, pairs, device), impl)


def _check_architecture(model: nn.Module, probe: _Probe, leaks: tuple[str, ...]) -> PackingCheck:
    """Checks head and packing with an attention backend that runs on any machine."""
    bare = bare_model(model)
    dtype = next(bare.parameters()).dtype
    bad = probe.expected[~probe.expected.isfinite()].tolist()
    if bad:
        raise ValueError(
            f"model must give finite log-probs, got {bad[0]} for a few short rows; its weights hold NaN or infinity, or"
            " its activations overflow"
        )
    padded_error, tolerance, rounding = probe.padded_error(model), _TOLERANCE[dtype], 0.0
    if not padded_error <= tolerance:
        rounding = probe.rounding_of(model)
        tolerance = max(tolerance, min(10 * rounding, _MOST_FROM_ROUNDING))
    if not padded_error <= tolerance:
        raise ValueError(
            f"model must compute its logits as its LM head times its last hidden state; {type(bare).__name__}"
            f" {before_head(bare, probe.pairs[0].prompt_ids)}:"
            f" log-probs differ by {padded_error:.1e} (rounding explains {tolerance:.0e})"
        )
    seen = Observed()
    try:
        error = probe.packed_error(model, seen)
    except Exception as refusal:  # any exception on unknown arguments: the model cannot be packed
        return PackingCheck(False, float("inf"), f"{type(refusal).__name__}: {refusal}")
    tolerance = _PACKED_FLOOR[dtype] + 10 * padded_error
    if not error <= tolerance:
        tolerance = _explained(dtype, padded_error, rounding or probe.rounding_of(model))
    if not error <= tolerance:
        difference = f"packed log-probs differ from separate ones by {error:.1e} (rounding explains {tolerance:.0e})"
        why = "tokens of one sequence affect another, or the model uses row numbers as positions"
        return PackingCheck(False, error, f"{difference}: {why}")
    if leaks:
        reason = f"{' and '.join(leaks)} mix the tokens of one sequence into another, outside the attention interface"
        return PackingCheck(False, error, reason)
    missing = _local_attention(text_config(bare)) - seen.windows
    if missing and seen.num_masks < seen.num_calls:
        reason = f"the model limits attention to {missing} in its mask alone, and a packed row has no mask"
        return PackingCheck(False, error, reason)
    return PackingCheck(True, error, f"packed and separate log-probs agree to {error:.1e}")


def _check_training(model: nn.Module, probe: _Probe) -> None:
    """Raises:
    ValueError: the model cannot run padded rows in training mode, so that nothing is left to train on.
    """
    model.train()
    try:
        probe.padded_error(model)
    except Exception as failure:  # whatever the model's code raises
        raise ValueError(
            f"model must take rows of any length in training, got {type(bare_model(model)).__name__}, which raises"
            f" {type(failure).__name__}: {failure}"
        ) from failure
    finally:
        model.eval()


def _check_run(model: nn.Module, probe: _Probe, check: PackingCheck) -> PackingCheck:
    """Checks attention and precision of the run; `check` is the result of the architecture check.

    A backend that is wrong on this machine is excluded, and the next one is checked if the setting allows others.
    """
    state = prepared_state(model)
    while True:
        found, culprit = _check_backends(model, probe, check)
        found = replace(found, excluded=dict(state.excluded_backends))
        if found.ok or culprit is None:
            return found
        if not can_do_without(culprit, state.attention_backend, state.excluded_backends):
            return found
        state.excluded_backends[culprit] = f"is wrong on this machine ({found.reason})"


def _check_backends(model: nn.Module, probe: _Probe, check: PackingCheck) -> tuple[PackingCheck, str | None]:
    """The check with the currently allowed backends; if it fails, also the wrong backend."""
    seen = Observed()
    try:
        error = probe.packed_error(model, seen)
        reason = _difference(model, probe, error, seen)
        if reason is not None:
            wrong = replace(check, ok=False, error=error, reason=reason, backends=seen.backends)
            return wrong, next(iter(seen.backends), None)
        seen.failed, fault = _first_fault(model, seen)
    except UnsupportedAttention:
        raise
    except Exception as failure:  # any exception of an unsuitable kernel
        return PackingCheck(False, float("inf"), f"{type(failure).__name__}: {failure}"), seen.failed
    check = replace(check, backends=seen.backends, note=scores_note(seen.shapes))
    return (check if fault is None else replace(check, ok=False, reason=fault)), seen.failed


def _difference(model: nn.Module, probe: _Probe, error: float, seen: Observed) -> str | None:
    """The fault if the error of packed log-probs is larger than rounding explains."""
    bare = bare_model(model)
    device_type, dtype = execution_device(bare).type, next(bare.parameters()).dtype
    if torch.is_autocast_enabled(device_type) and dtype == torch.float32:
        dtype = torch.get_autocast_dtype(device_type)
    if error <= _PACKED_FLOOR[dtype]:
        return None
    tolerance = _explained(dtype, probe.padded_error(model), probe.rounding_of(model))
    if error <= tolerance:
        return None
    names = " and ".join(seen.backends)
    return (
        f"with attention by {names} in {str(dtype).removeprefix('torch.')}, packed log-probs differ from separate ones"
        f" by {error:.1e} (rounding explains {tolerance:.0e}); attention_backend='sdpa' may be exact here"
    )


def _first_fault(model: nn.Module, seen: Observed) -> tuple[str | None, str | None]:
    """A backend of the run that is wrong on longer branches or in backward, and its fault."""
    state, with_grad = prepared_state(model), any(parameter.requires_grad for parameter in model.parameters())
    for shape, name in seen.shapes.items():
        seen.failed = name  # where it raises
        name, fault = attention_fault(shape, state.attention_backend, state.excluded_backends, with_grad=with_grad)
        if fault is not None:
            return name, f"attention by {name}: {fault}"
    return None, None


def _explained(dtype: torch.dtype, padded_error: float, rounding: float) -> float:
    """The tolerance for packed rows, given the model's errors with padded rows and with nudged embeddings."""
    floor = _PACKED_FLOOR[dtype]
    return floor + 10 * max(padded_error, min(rounding, _MOST_FROM_ROUNDING / 10))


def _local_attention(config: Any) -> set[Any]:
    """The windows and chunks that limit the layers; those longer than the probe do not affect its numbers."""
    layer_types = getattr(config, "layer_types", None)
    limits: set[Any] = set()
    window = getattr(config, "sliding_window", None)
    is_used = layer_types is None or "sliding_attention" in layer_types
    if window is not None and is_used and getattr(config, "use_sliding_window", True):
        limits.add(window)
    if getattr(config, "attention_chunk_size", None) is not None and "chunked_attention" in (layer_types or ()):
        limits.add(f"chunks of {config.attention_chunk_size}")
    return limits


def _stock_sums(model: nn.Module, pairs: list[TokenizedPair], device: torch.device) -> Tensor:
    """(S,) fp64 log-probs of every response from the model's own forward and full logits.

    Sequences of one length are rows of one forward, so nothing is padded and rows do not interact.
    """
    sequences = [(len(pair.prompt_ids), [*pair.prompt_ids, *response]) for pair in pairs for response in pair.responses]
    sums: dict[int, Tensor] = {}
    for length in {len(ids) for _, ids in sequences}:
        indices = [index for index, (_, ids) in enumerate(sequences) if len(ids) == length]
        input_ids = torch.tensor([sequences[index][1] for index in indices], device=device)
        logps = model(input_ids=input_ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
        picked = logps.gather(-1, input_ids[:, 1:, None])[:, :, 0]
        sums.update({index: row[sequences[index][0] - 1 :].sum() for index, row in zip(indices, picked, strict=True)})
    return torch.stack([sums[index] for index in range(len(sequences))])
