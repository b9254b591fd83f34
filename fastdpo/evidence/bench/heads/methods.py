"""Who computes the head op: plain PyTorch, its peers, and fastdpo, behind one signature.

In: a Problem. Out: a job, a function without arguments that runs one pass and returns values and gradients. A peer that
is not installed, or that needs a device this machine lacks, is named with its reason and never quietly replaced.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.evidence.bench.heads.problem import BETA, Problem, Shape, dpo_loss

TUNED = "FASTDPO_BENCH_TUNED"  # of the environment: tuned blocks for a row of their own; the row "fastdpo" is without
PASSES = ("forward", "forward+backward", "frozen head", "dpo loss")
# matmuls of 2 N H V FLOPs that an exact op cannot do without: logits, dH, dW
NEEDED_PRODUCTS = {"forward": 1, "forward+backward": 3, "frozen head": 2, "dpo loss": 3}
KEEPS = {"forward": 1, "forward+backward": 3, "frozen head": 2, "dpo loss": 3}
RECOMPUTES = {"forward": 1, "forward+backward": 4, "frozen head": 3, "dpo loss": 4}

Logps = Callable[[Tensor, Tensor, Tensor], Tensor]  # (N, H), (V, H), (N,) -> (N,)


@dataclass(frozen=True)
class Method:
    name: str
    products: dict[str, int]  # pass -> matmuls of 2 N H V FLOPs that it does; a pass that is missing it cannot do
    logps: Logps | None = None
    dpo: Callable[..., Tensor] | None = (
        None  # (hidden (2B, L, H), weight, labels (2B, L), refs) -> loss; None: by logps
    )
    all_rows: bool = False  # computes prompt rows too
    takes_reference: bool = True  # False: its DPO loss is the one without a reference
    bytes_per_logit: float = 0.0  # what it holds per (row, vocabulary id), for leaving out what does not fit
    notes: dict[str, str] = field(default_factory=dict)  # pass -> what a reader of its number should know
    context: Callable[[], AbstractContextManager[Any]] = nullcontext  # in which it runs, backward too


def plain(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = (hidden_states @ weight.T).float()  # (N, V)
    return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def _plain_all_rows() -> Method:
    return Method("plain, all rows", KEEPS, plain, all_rows=True, bytes_per_logit=16)


def _plain_response_rows() -> Method:
    return Method("plain, response rows", KEEPS, plain, bytes_per_logit=16)


def _compiled() -> Method:
    if not torch.cuda.is_available() and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        raise RuntimeError("torch.compile needs a C++ compiler on a CPU, none found")
    return Method("torch.compile of plain", KEEPS, torch.compile(plain, dynamic=False), bytes_per_logit=16)


def _torch_chunked() -> Method:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise RuntimeError(f"F.linear_cross_entropy(options=...) needs torch 2.13, got {torch.__version__}")
    options = torch.nn.LinearCrossEntropyOptions()

    def logps(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -F.linear_cross_entropy(hidden_states, weight, labels, reduction="none", options=options)

    return Method("F.linear_cross_entropy", RECOMPUTES, logps)


def _liger() -> Method:
    """Per-token losses by its fused cross-entropy, which is Triton; DPO by its chunked loss, which is PyTorch."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss_function = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False)

    def dpo(hidden_states: Tensor, weight: Tensor, labels: Tensor, *_refs: Tensor) -> Tensor:
        return loss_function(weight, hidden_states, labels)[0]

    notes = {"dpo loss": "loss without a reference, because it takes a reference's hidden states and not log-probs"}
    if not torch.cuda.is_available():
        return Method("Liger", {"dpo loss": 3}, dpo=dpo, takes_reference=False, notes=notes)
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    cross_entropy = LigerFusedLinearCrossEntropyLoss(reduction="none")

    def logps(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -cross_entropy(weight, hidden_states, labels)

    return Method("Liger", {**RECOMPUTES, "dpo loss": 3}, logps, dpo, takes_reference=False, notes=notes)


def _cce() -> Method:
    if not torch.cuda.is_available():
        raise RuntimeError("its Triton kernels need a CUDA device")
    from cut_cross_entropy import linear_cross_entropy

    def logps(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden_states, weight, labels, reduction="none", filter_eps=None)

    notes = dict.fromkeys(("forward+backward", "frozen head", "dpo loss"), "filter_eps=None, the exact gradient")
    return Method("CCE", RECOMPUTES, logps, notes=notes)


def _trl() -> Method:
    from trl.kernels import ChunkedLogProbFunction

    try:  # the tile width that its trainers use
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk_size
    except ImportError:
        chunk_size = 32768

    def logps(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(hidden_states, weight, None, labels, 1.0, chunk_size, None, 1.0, ())[0]

    return Method("TRL", RECOMPUTES, logps)


def _fastdpo() -> Method:
    import fastdpo

    def logps(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return fastdpo.linear_logps(hidden_states, weight, labels).logps

    products = {"forward": 1, "forward+backward": 4, "frozen head": 2}
    if not hasattr(fastdpo, "LinearDPOLoss"):
        return Method("fastdpo", products, logps)
    loss_function = fastdpo.LinearDPOLoss(beta=BETA)

    def dpo(hidden_states: Tensor, weight: Tensor, labels: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
        refs = {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        return loss_function(weight, hidden_states, labels, **refs)[0]

    return Method("fastdpo", {**products, "dpo loss": 3}, logps, dpo)


def _tuned() -> Method:
    """fastdpo with the block shapes of the file that TUNED names."""
    path = os.environ.get(TUNED)
    if not path:
        raise RuntimeError(f"no file of tuned blocks was given (--tuned, or {TUNED})")
    from fastdpo.kernels import tuned

    entries, own = tuned.load(Path(path)), _fastdpo()
    return replace(own, name="fastdpo, tuned", context=lambda: tuned.blocks_of(entries))


MAKERS: dict[str, Callable[[], Method]] = {
    "plain, all rows": _plain_all_rows,
    "plain, response rows": _plain_response_rows,
    "torch.compile of plain": _compiled,
    "F.linear_cross_entropy": _torch_chunked,
    "Liger": _liger,
    "CCE": _cce,
    "TRL": _trl,
    "fastdpo": _fastdpo,
    "fastdpo, tuned": _tuned,
}


def available(names: list[str]) -> tuple[list[Method], dict[str, str]]:
    """The methods that can run here, and for the others why not."""
    methods, missing = [], {}
    for name in names:
        try:
            methods.append(MAKERS[name]())
        except Exception as error:  # a peer may fail to import in as many ways as it has dependencies
            missing[name] = f"{type(error).__name__}: {error}".split("\n")[0]
    return methods, missing


def needed_bytes(method: Method, shape: Shape) -> int:
    """Roughly what a training pass adds: its logits, gradients of both inputs, fp32 sums of dW, and a workspace."""
    num_rows = shape.num_tokens if method.all_rows else shape.num_rows
    logits = int(method.bytes_per_logit * num_rows * shape.vocab_size)
    return logits + 8 * shape.hidden_size * (shape.vocab_size + num_rows) + 2**28


def job(method: Method, pass_name: str, problem: Problem) -> Callable[[], tuple[Tensor, ...]]:
    """One pass as a function: what it returns is what `problem.errors` checks."""
    hidden_states = problem.hidden_states if method.all_rows else problem.response_hidden
    labels = problem.labels if method.all_rows else problem.response_labels
    hidden_states = hidden_states.detach().requires_grad_(pass_name != "forward")
    weight = problem.weight.detach().requires_grad_(pass_name in ("forward+backward", "dpo loss"))
    leaves = [x for x in (hidden_states, weight) if x.requires_grad]
    num_response = problem.num_response

    def response_logps() -> Tensor:  # (2B, num_response)
        assert method.logps is not None
        logps = method.logps(hidden_states.flatten(0, 1), weight, labels.flatten())
        return logps.view(labels.shape)[:, -num_response:]

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (response_logps(),)

    def backward() -> tuple[Tensor, ...]:
        logps = response_logps()
        return (logps.detach(), *torch.autograd.grad(logps, leaves, problem.upstream.to(logps.dtype)))

    def dpo() -> tuple[Tensor, ...]:
        refs = (problem.ref_chosen_logps, problem.ref_rejected_logps)
        if method.dpo is not None:
            loss = method.dpo(hidden_states, weight, labels, *refs)
        else:
            loss = dpo_loss(response_logps(), *refs)
        return (loss.detach(), *torch.autograd.grad(loss, leaves))

    run = {"forward": forward, "dpo loss": dpo}.get(pass_name, backward)

    def in_context() -> tuple[Tensor, ...]:
        with method.context():
            return run()

    return in_context


def facts_of(method: Method, pass_name: str, shape: Shape) -> dict[str, Any]:
    """FLOPs of one record: what the method's matmuls do, and what no exact method could do without."""
    product = 2 * shape.hidden_size * shape.vocab_size
    num_rows = shape.num_tokens if method.all_rows else shape.num_rows
    return {
        "flops": method.products[pass_name] * product * num_rows,
        "flops_needed": NEEDED_PRODUCTS[pass_name] * product * shape.num_rows,
        **({"note": method.notes[pass_name]} if pass_name in method.notes else {}),
    }
