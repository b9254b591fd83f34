"""Every causal LM of transformers: is it packed, are prompts shared, and how exactly?

    python benchmarks/model_coverage.py                      # all types; prints the table
    python benchmarks/model_coverage.py --types llama mamba  # some
    python benchmarks/model_coverage.py --out FILE           # and writes JSON lines, one a type
    python benchmarks/model_coverage.py --write              # runs all, writes results/model_coverage.jsonl, docs/models.md
    python benchmarks/model_coverage.py --docs               # docs/models.md from the results as they are

A tiny random model of each type (`tiny_models.py`), in a process of its own with a time limit, is asked what a run
would ask of it: the self-check decides; then log-probs and the gradients of all weights are held to separate forwards
of the stock model, in fp32. The status is one of STATUSES, with the reason.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_models import build_tiny, tiny_config
from torch import Tensor

from fastdpo import TokenizedGroup, TokenizedPair, pack_pairs, packed_logps, pad_pairs, prepare_model
from fastdpo.modeling import check_packing
from fastdpo.modeling.backbone import freeze_towers, text_ids
from fastdpo.training.model_kinds import check_kind

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "model_coverage.jsonl"
STATUSES = ("packed and shared", "packed", "padded", "refused", "wrong", "cannot be built")
EXACT = 1e-5  # error of log-probs, and of the gradient of each weight, that counts as none
# (prompt, responses) in tokens: shared starts, one token, longer than windows, chunks and convolutions
SHAPES = ((6, (5, 3)), (1, (1, 7)), (22, (4, 9)), (3, (2, 1, 3)), (70, (3, 6)))
TIME_LIMIT = 180


def groups_of(ids: Tensor) -> list[TokenizedGroup]:
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        return ids[torch.randint(len(ids), (length,), generator=generator)].tolist()

    groups = [TokenizedGroup(draw(prompt), [draw(n) for n in responses]) for prompt, responses in SHAPES]
    start = draw(2)
    return [*groups, TokenizedPair(draw(4), [*start, *draw(2)], [*start, *draw(1)])]  # responses that begin alike


def separate_sums(model: Any, groups: Sequence[TokenizedGroup]) -> Tensor:
    """(S,) log-probs of every response from a forward of its own."""
    sums = []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([[*group.prompt_ids, *response]])
            logps = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            rows = torch.arange(len(group.prompt_ids) - 1, ids.shape[1] - 1)
            sums.append(logps[rows, ids[0, rows + 1]].sum())
    return torch.stack(sums)


def gradients(model: Any, sums: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (sums * torch.linspace(-1.0, 1.3, len(sums), dtype=sums.dtype)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def errors(model: Any, batch: Any, groups: Sequence[TokenizedGroup]) -> dict[str, Any]:
    """Largest relative errors of log-probs and of any weight's gradient, and whose that is."""
    expected = separate_sums(model, groups)
    expected_grads = gradients(model, expected)
    actual = packed_logps(model, batch).sequences.sums
    grads = gradients(model, actual)
    logps = ((actual - expected).abs() / (1 + expected.abs())).max().item()
    # what is zero in exact arithmetic is compared with the size of the others
    floor = 0.05 * torch.stack([grad.norm() for grad in expected_grads.values()]).median()
    of: dict[str, float] = {}
    for name, grad in expected_grads.items():
        other = grads.get(name, torch.zeros_like(grad))
        of[name] = ((other - grad).norm() / grad.norm().clamp(min=floor)).item()
    worst = max(of, key=lambda name: of[name])
    return {"logps_error": logps, "grad_error": of[worst], "worst": worst}


def coverage_of(model_type: str) -> dict[str, Any]:
    """The record of one type."""
    record: dict[str, Any] = {"type": model_type}
    try:
        check_kind(tiny_config(model_type), model_type)
    except ValueError as refusal:
        if str(refusal).startswith("model must be"):
            return {**record, "status": "refused", "reason": _line(refusal)}
        return {**record, "status": "cannot be built", "reason": _line(refusal)}
    except Exception as failure:
        return {**record, "status": "cannot be built", "reason": _line(failure)}
    try:
        model = build_tiny(model_type)
        record["class"] = type(model).__name__
        model(input_ids=torch.tensor([[5, 6, 7, 8]]), use_cache=False)
    except Exception as failure:
        return {**record, "status": "cannot be built", "reason": _line(failure)}
    try:
        prepare_model(model)
        freeze_towers(model)
        check = check_packing(model)
    except Exception as refusal:  # a model's code may raise anything
        return {**record, "status": "refused", "reason": _line(refusal)}
    groups = groups_of(text_ids(model))
    if not check.ok:
        found = _measured(model, pad_pairs(groups), groups)
        status = "padded" if found["logps_error"] <= EXACT else "wrong"
        return {**record, "status": status, "reason": check.reason, **found}
    found = _measured(model, pack_pairs(groups), groups)
    if max(found["logps_error"], found["grad_error"]) <= EXACT:
        return {**record, "status": "packed and shared", "reason": "", **found}
    unshared = _measured(model, pack_pairs(groups, prefix_sharing=False), groups)
    exact = errors(copy.deepcopy(model).double(), pack_pairs(groups), groups)
    record["fp64"] = {name: exact[name] for name in ("logps_error", "grad_error")}
    if max(record["fp64"].values()) <= EXACT**2:
        return {**record, "status": "packed and shared", "reason": "rounding of fp32 alone", **found}
    status = "packed" if max(unshared["logps_error"], unshared["grad_error"]) <= EXACT else "wrong"
    return {**record, "status": status, "reason": "the self-check did not see it", **found}


def _measured(model: Any, batch: Any, groups: Sequence[TokenizedGroup]) -> dict[str, Any]:
    try:
        return errors(model, batch, groups)
    except Exception as failure:
        return {"logps_error": float("inf"), "grad_error": float("inf"), "worst": "", "reason": _line(failure)}


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _child(model_type: str, results: Any) -> None:
    warnings.filterwarnings("ignore")
    started = time.perf_counter()
    try:
        record = coverage_of(model_type)
    except Exception as failure:
        record = {"type": model_type, "status": "wrong", "reason": _line(failure)}
    results.put({**record, "seconds": round(time.perf_counter() - started, 1)})


def run_types(types: Sequence[str], time_limit: float = TIME_LIMIT) -> list[dict[str, Any]]:
    """One process after another: what one type does to its process no other sees."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")  # transformers is imported once
    records = []
    for model_type in types:
        results = context.Queue()
        process = context.Process(target=_child, args=(model_type, results), daemon=True)
        process.start()
        try:
            record = results.get(timeout=time_limit)
        except Exception:
            why = f"no answer within {time_limit:.0f} s" if process.is_alive() else f"ended by {process.exitcode}"
            record = {"type": model_type, "status": "cannot be built", "reason": why, "seconds": time_limit}
        process.kill()
        process.join()
        records.append(record)
        errors_seen = [f"{record[name]:.1e}" if name in record else "" for name in ("logps_error", "grad_error")]
        line = f"{record['type']:28} {record['status']:18} {' '.join(errors_seen):18}"
        print(f"{line} {record.get('reason', '')[:150]}", file=sys.stderr, flush=True)
    return records


def all_types() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", help="model types; all by default")
    parser.add_argument("--out", type=Path, help="JSON lines are written here")
    parser.add_argument("--time_limit", type=float, default=TIME_LIMIT, help="seconds for one type")
    options = parser.parse_args(argv)
    records = run_types(options.types or all_types(), options.time_limit)
    if options.out is not None:
        options.out.write_text("".join(json.dumps(record) + "\n" for record in records))
    for status in STATUSES:
        print(f"{status}: {sum(record['status'] == status for record in records)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
