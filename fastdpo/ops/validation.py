"""Checks the arguments of the head op. Every refusal is a ValueError that names the argument, the rule and the value.

Values inside tensors are checked on the CPU only, because on a GPU this would synchronize. Labels are checked when the
op runs, not when it is traced. On a GPU a label outside the vocabulary makes its row nan instead, in forward and
backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpo.ops.engine import IMPLS
from fastdpo.types import IGNORE_INDEX, TOKEN_OUTPUTS

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MOST = 1e30  # of a factor of the logits: fp32 ends at 3.4e38
INT_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_head(
    hidden_states: Tensor, lm_head_weight: Tensor, labels: Tensor, bias: Tensor | None, choices: bool = False
) -> None:
    """Checks shapes, devices and dtypes; `choices` allows several labels per row."""
    tensors = {"hidden_states": hidden_states, "lm_head_weight": lm_head_weight, "labels": labels, "bias": bias}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and not (name == "bias" and tensor is None):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    check_shape("hidden_states", hidden_states, "(T, H)", 2)
    check_shape("lm_head_weight", lm_head_weight, "(V, H)", 2)
    (T, H), V = hidden_states.shape, lm_head_weight.shape[0]
    if lm_head_weight.shape[1] != H:
        raise ValueError(
            f"lm_head_weight must have shape (V, {H}) to match hidden_states, got {tuple(lm_head_weight.shape)}"
        )
    if H == 0 or V == 0:
        raise ValueError(f"lm_head_weight must have at least one row and one column, got {(V, H)}")
    if tuple(labels.shape) != (T,) and not (choices and labels.dim() == 2 and labels.shape[0] == T):
        shapes = f"({T},) or ({T}, K)" if choices else f"({T},)"
        raise ValueError(f"labels must have shape {shapes} to match hidden_states, got {tuple(labels.shape)}")
    if bias is not None and tuple(bias.shape) != (V,):
        raise ValueError(f"bias must have shape ({V},) to match lm_head_weight, got {tuple(bias.shape)}")
    check_integers("labels", labels)
    floats = {"hidden_states": hidden_states, "lm_head_weight": lm_head_weight}
    floats |= {} if bias is None else {"bias": bias}
    for name, x in floats.items():
        if x.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name} must be fp16, bf16, fp32 or fp64, got {x.dtype}")
    for name, x in {**floats, "labels": labels}.items():
        check_device(name, x, hidden_states)


def check_labels(labels: Tensor, num_vocab: int) -> None:
    """Checks the values of labels on the CPU."""
    out_of_range = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= num_vocab))
    if bool(out_of_range.any()):
        place = tuple(out_of_range.nonzero()[0].tolist())  # (row,) or (row, column)
        raise ValueError(
            f"labels must lie in [0, {num_vocab}) or be IGNORE_INDEX ({IGNORE_INDEX}), "
            f"got {int(labels[place])} in row {place[0]}"
        )


def output_names(argument: str, outputs: object) -> tuple[str, ...]:
    """The names of optional results, each once; a single name may stand by itself."""
    names = (outputs,) if isinstance(outputs, str) else outputs
    if not isinstance(names, list | tuple | set | frozenset | dict) or not all(isinstance(n, str) for n in names):
        raise ValueError(f"{argument} must be a sequence of names out of {TOKEN_OUTPUTS}, got {outputs!r}")
    return tuple(dict.fromkeys(names))


def check_settings(
    logit_scale: float,
    softcap: float | None,
    outputs: tuple[str, ...],
    skip_tolerance: float,
    workspace_bytes: int | None,
    impl: str,
) -> None:
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS}, got {impl!r}")
    unknown = [name for name in outputs if name not in TOKEN_OUTPUTS]
    if unknown:
        raise ValueError(f"outputs must be among {TOKEN_OUTPUTS}, got {unknown[0]!r}")
    check_number("logit_scale", logit_scale)
    check_number("skip_tolerance", skip_tolerance)
    if softcap is not None:
        check_number("softcap", softcap)
    if not 0 < abs(logit_scale) < float("inf"):
        raise ValueError(f"logit_scale must be finite and not zero, got {logit_scale}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be a positive finite number or None, got {softcap}")
    for name, value in (("logit_scale", logit_scale), ("softcap", softcap)):
        if value is not None and abs(value) > MOST:
            raise ValueError(f"{name} must be at most {MOST:g} in size, got {value}")
    if not 0.0 <= skip_tolerance < 1.0:
        raise ValueError(f"skip_tolerance must be a probability mass in [0, 1), got {skip_tolerance}")
    if workspace_bytes is not None and (type(workspace_bytes) is not int or workspace_bytes < 1):
        raise ValueError(f"workspace_bytes must be a positive int, in bytes, or None, got {workspace_bytes!r}")
    if skip_tolerance > 0.0 and impl == "reference":
        raise ValueError(f'skip_tolerance must be 0.0 for impl="reference", which is exact, got {skip_tolerance}')


def check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {value!r}")


def operand_dtype(hidden_states: Tensor, lm_head_weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """The operand dtype of the matmuls: autocast's if it is on (autocast ignores fp64), else the inputs' own."""
    dtypes = {x.dtype for x in (hidden_states, lm_head_weight, bias) if x is not None}
    device_type = hidden_states.device.type
    if torch.is_autocast_enabled(device_type) and torch.float64 not in dtypes:
        return torch.get_autocast_dtype(device_type)
    if len(dtypes) > 1:
        names = "hidden_states and lm_head_weight" if bias is None else "hidden_states, lm_head_weight and bias"
        found = ", ".join(str(x.dtype) for x in (hidden_states, lm_head_weight, bias) if x is not None)
        raise ValueError(f"{names} must have one dtype outside autocast (and fp64 never mixes), got {found}")
    return hidden_states.dtype


def check_sequences(cu_seqlens: Tensor, rows: Tensor | None, weights: Tensor | None, labels: Tensor) -> None:
    """Checks the additional arguments of `sequence_logps`."""
    num_rows = labels.shape[0]
    check_shape("cu_seqlens", cu_seqlens, "(S + 1,)", 1)
    if cu_seqlens.shape[0] == 0:
        raise ValueError("cu_seqlens must have shape (S + 1,) with at least one entry, got none")
    check_integers("cu_seqlens", cu_seqlens)
    check_device("cu_seqlens", cu_seqlens, labels)
    if rows is not None:
        check_shape("rows", rows, "(N,)", 1)
        check_integers("rows", rows)
        check_device("rows", rows, labels)
    num_tokens = num_rows if rows is None else rows.shape[0]
    if weights is not None:
        if tuple(weights.shape) != (num_tokens,):
            raise ValueError(
                f"weights must have one entry per token, shape ({num_tokens},), got {tuple(weights.shape)}"
            )
        check_device("weights", weights, labels)
    if labels.device.type != "cpu" or torch.compiler.is_compiling():  # while compiling there are no values
        return
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != num_tokens or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of tokens ({num_tokens}), got {cu_seqlens.tolist()}"
        )
    if rows is not None and num_tokens > 0 and not (int(rows.min()) >= 0 and int(rows.max()) < num_rows):
        raise ValueError(f"rows must lie in [0, {num_rows}), got {int(rows.min())} to {int(rows.max())}")


def check_shape(name: str, x: Tensor, shape: str, num_dims: int) -> None:
    if x.dim() != num_dims:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")


def check_integers(name: str, x: Tensor) -> None:
    if x.dtype not in INT_DTYPES:
        raise ValueError(f"{name} must hold integers, got {x.dtype}")


def check_device(name: str, x: Tensor, hidden_states: Tensor) -> None:
    if x.device != hidden_states.device:
        raise ValueError(f"{name} must be on {hidden_states.device} like hidden_states, got {x.device}")
