"""What each process of `test_shard.py` runs: the head op on its part of the vocabulary, and alone on all of it."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from closeness import distance
from head_cases import NAMES, Case, exact_logps, make_inputs, plain_logps

from fastdpo.ops import linear_logps, sequence_logps
from fastdpo.ops.head import Head
from fastdpo.ops.reference import reference_linear_logps
from fastdpo.ops.sequence_loss import GroupEnd, sequence_loss
from fastdpo.types import TOKEN_OUTPUTS

DTYPES = {name: dtype for dtype, name in NAMES.items()}


def result_of(folder, function, **case):
    return globals()[function](folder, **case)


def group():
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.group.WORLD


def case_of(dtype="fp32", **settings):
    return Case(**({"T": 67, "H": 40, "V": 257} | settings), dtype=DTYPES[dtype])


def part_of(leaves):
    """Leaves of this process: its rows of the weights, and hidden states of its own."""
    rank, size = dist.get_rank(group()), dist.get_world_size()
    return {
        name: (x if name == "hidden_states" else x.chunk(size)[rank]).detach().clone().requires_grad_(x.requires_grad)
        for name, x in leaves.items()
    }


def whole(name, grad):
    """The gradient of a whole tensor from those of its parts."""
    if name == "hidden_states":
        return grad
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, grad)
    return torch.cat(parts)


def errors_of(found, plain, exact):
    """By name: the error of `found`, that of `plain`, and the norm."""
    norms = {name: float(x.double().norm()) for name, x in exact.items()}
    return {name: [distance(found[name], e), distance(plain[name], e), norms[name]] for name, e in exact.items()}


def log_probs(folder, impl, frozen=False, skip_tolerance=0.0, workspace_bytes=None, **settings):
    """Errors of log-probs and gradients."""
    case = case_of(**settings)
    leaves, labels, upstream = make_inputs(case, 0)
    wanted = ["hidden_states"] if frozen else list(leaves)
    for name in leaves.keys() - set(wanted):
        leaves[name].requires_grad_(False)

    def of_part(*args, **same):
        same |= {"impl": impl, "process_group": group(), "vocab_size": case.V, "workspace_bytes": workspace_bytes}
        return linear_logps(*args, **same, skip_tolerance=skip_tolerance).logps

    def run(logps_fn, leaves):
        args = dict(leaves)
        logps = logps_fn(args.pop("hidden_states"), args.pop("lm_head_weight"), labels, **args, **case.settings)
        grads = torch.autograd.grad((logps * upstream).sum(), [leaves[name] for name in wanted])
        return {"logps": logps.detach(), **dict(zip(wanted, grads, strict=True))}

    found = run(of_part, part_of(leaves))
    assert all(found[name].dtype == case.dtype for name in wanted)
    found = {name: x if name == "logps" else whole(name, x) for name, x in found.items()}
    return errors_of(found, run(plain_logps, leaves), run(exact_logps, leaves))


def statistics(folder, impl, masked=False, **settings):
    """Errors of the outputs; with `masked` the last part of the vocabulary has no probability at all."""
    case = case_of(**settings)
    leaves, labels, _ = make_inputs(case, 0)
    leaves = {name: x.detach() for name, x in leaves.items()}
    if masked:
        last = len(leaves["bias"].chunk(dist.get_world_size(group()))[-1])
        leaves["bias"][-last:] = -torch.inf
        labels = labels.clamp(max=case.V - last - 1)
    part = part_of(leaves)
    same = {"outputs": TOKEN_OUTPUTS, **case.settings}
    found = linear_logps(
        part["hidden_states"], part["lm_head_weight"], labels, bias=part.get("bias"), impl=impl,
        process_group=group(), vocab_size=case.V, **same,
    )  # fmt: skip
    exact_leaves = [leaves["hidden_states"].double(), leaves["lm_head_weight"].double(), leaves.get("bias")]
    exact_leaves[2] = None if exact_leaves[2] is None else exact_leaves[2].double()
    exact = reference_linear_logps(*exact_leaves, labels, Head(case.logit_scale, case.softcap, TOKEN_OUTPUTS))
    errors = {}
    for field in dataclasses.fields(exact):
        a, b = getattr(found, field.name), getattr(exact, field.name)
        if b is not None:
            a, b = a[labels >= 0].double(), b[labels >= 0].double()
            errors[field.name] = float((a - b)[b.isfinite()].abs().amax()) if b.isfinite().any() else 0.0
            errors[field.name] += float((a.isfinite() != b.isfinite()).sum())
    return errors


SEQUENCES = [0, 9, 20, 31, 40, 52, 67]  # rows; three groups of two sequences each
ENDS = [GroupEnd(20, 20, 2), GroupEnd(40, 40, 4), GroupEnd(67, 67, 6)]


def pair_loss(sums, lengths, sequences, groups, **statistics):
    margins = 0.1 * (sums[0::2] - sums[1::2])
    loss = -torch.nn.functional.logsigmoid(margins).sum()
    return loss + sum(0.01 * value.sum() for value in statistics.values())


def pair_losses(folder, impl, adapter=False, frozen=False, workspace_bytes=None, **settings):
    """Errors of the loss and its gradients, whose gradient is made in forward."""
    case = case_of(**settings)
    leaves, labels, _ = make_inputs(case, 0)
    if adapter:
        g = torch.Generator().manual_seed(1)
        rank = 6
        leaves["adapter_weight"] = torch.randn(case.V, rank, generator=g).to(case.dtype).requires_grad_()
        hidden = torch.cat([leaves["hidden_states"].detach(), torch.randn(case.T, rank, generator=g).to(case.dtype)], 1)
        leaves["hidden_states"] = hidden.requires_grad_()
        leaves["lm_head_weight"].requires_grad_(False)
    if frozen:
        for name in leaves.keys() - {"hidden_states"}:
            leaves[name].requires_grad_(False)
    wanted = [name for name, x in leaves.items() if x.requires_grad]
    cu_seqlens = torch.tensor(SEQUENCES)

    def run(leaves, op):
        loss = op(**leaves)
        grads = torch.autograd.grad(3 * loss, [leaves[name] for name in wanted])
        return {"loss": loss.detach()[None], **dict(zip(wanted, grads, strict=True))}

    def of_part(hidden_states, lm_head_weight, **others):
        loss, _ = sequence_loss(
            hidden_states, lm_head_weight, labels, cu_seqlens, ENDS, pair_loss, impl=impl, process_group=group(),
            vocab_size=case.V, workspace_bytes=workspace_bytes, **others, **case.settings,
        )  # fmt: skip
        return loss

    def by(logps_fn):
        def op(hidden_states, lm_head_weight, adapter_weight=None, **others):
            if adapter_weight is not None:
                lm_head_weight = torch.cat([lm_head_weight, adapter_weight], 1)
            logps = logps_fn(hidden_states, lm_head_weight, labels, **others, **case.settings)
            sums = torch.stack([part.sum() for part in logps.split(cu_seqlens.diff().tolist())])
            return pair_loss(sums, None, None, None)

        return op

    found = run(part_of(leaves), of_part)
    found = {name: x if name == "loss" else whole(name, x) for name, x in found.items()}
    return errors_of(found, run(leaves, by(plain_logps)), run(leaves, by(exact_logps)))


def bytes_sent(folder, impl, outputs=(), **settings):
    """What this process hands to the group in forward and in backward, by collective: numbers of elements and bytes."""
    case = case_of(**settings)
    leaves, labels, upstream = make_inputs(case, 0)
    part = part_of(leaves)
    sent = []

    def counted(name, position):
        collective = getattr(dist, name)

        def call(*args, **same):
            sent.append([name, args[position].numel() * args[position].element_size()])
            return collective(*args, **same)

        return collective, call

    originals = {}
    for name, position in (("all_gather", 1), ("all_reduce", 0)):
        originals[name], call = counted(name, position)
        setattr(dist, name, call)
    try:
        logps = linear_logps(
            part["hidden_states"], part["lm_head_weight"], labels, outputs=outputs, impl=impl, process_group=group(),
            vocab_size=case.V, **case.settings,
        ).logps  # fmt: skip
        forward, sent = sent, []
        (logps * upstream).sum().backward()
    finally:
        for name, collective in originals.items():
            setattr(dist, name, collective)
    return forward, sent


def refusals(folder, **same):
    """The messages for arguments that do not fit."""
    hidden, labels = torch.randn(5, 8), torch.tensor([0, 1, 2, 3, 6])
    rows = 4 - dist.get_rank(group())  # 4 and 3 of 7
    messages = []
    for changed in (
        {"vocab_size": 9},
        {"process_group": "world"},
        {"impl": "reference"},
        {"process_group": None, "vocab_size": 7},
        {"labels": torch.tensor([0, 1, 2, 3, 7])},
    ):
        args = {"labels": labels, "process_group": group(), "vocab_size": 7} | changed
        try:
            linear_logps(hidden, torch.randn(rows, 8), **args)
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
    sums = sequence_logps(
        hidden, torch.zeros(rows, 8), labels, torch.tensor([0, 2, 5]), process_group=group(), vocab_size=7
    ).sums
    return messages, sums.tolist()
