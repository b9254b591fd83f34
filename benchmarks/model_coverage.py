"""Every causal LM of transformers: is it packed, are prompts shared, and how exactly?

    python benchmarks/model_coverage.py                      # all types; prints the counts, and a line for each
    python benchmarks/model_coverage.py --types llama mamba  # some
    python benchmarks/model_coverage.py --out FILE           # and writes JSON lines, one a type
    python benchmarks/model_coverage.py --write              # all, into results/ and docs/models.md
    python benchmarks/model_coverage.py --docs               # docs/models.md from the results as they are

A tiny random model of each type (`shared/tiny_models.py`), in a process of its own with a time limit, is asked what a
run would ask of it: the self-check decides; then log-probs and the gradients of all weights are held to separate
forwards of the stock model, in fp32 and, where the model is packed, in fp64 throughout, where an error that fp32 shows
is small if it was rounding and as large as before if it was not. The status is one of STATUSES, with the reason.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from shared import pages
from shared.doubles import WholeDoubles, in_fp64
from shared.tiny_models import build_tiny, tiny_config
from torch import Tensor

from fastdpo import TokenizedGroup, TokenizedPair, pack_pairs, packed_logps, pad_pairs, prepare_model
from fastdpo.modeling import check_packing
from fastdpo.modeling.backbone import freeze_towers, text_ids
from fastdpo.training.setup.model_kinds import check_kind

RESULTS, DOCS = pages.RESULTS / "model_coverage.jsonl", pages.DOCS / "models.md"
STATUSES = ("packed and shared", "packed", "padded", "refused", "wrong", "cannot be built")
EXACT = 1e-5  # error of log-probs, and of the gradient of each weight, that counts as none in fp32
EXACT_IN_FP64 = 1e-9  # and in fp64
# what refusals say, and which kind of model that is: the rest are decoders with a linear head
NOT_DECODERS = {
    "is an encoder": "encoders",
    "configured as an encoder": "encoders",
    "times its last hidden state": "decoders with more than a linear layer between last hidden state and logits",
    "must have one text decoder": "models that write no text",
    "speculative decoding": "draft models that read another model's keys and values",
}
# (prompt, responses) in tokens: shared starts, one token, longer than windows, chunks and convolutions
SHAPES = ((6, (5, 3)), (1, (1, 7)), (22, (4, 9)), (3, (2, 1, 3)), (70, (3, 6)))
TIME_LIMIT = 600


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
    logps = ((actual - expected).abs() / (1 + expected.abs())).max().item()
    worst, error = largest_error(gradients(model, actual), expected_grads)
    return {"logps_error": logps, "grad_error": error, "worst": worst}


def largest_error(grads: dict[str, Tensor], expected_grads: dict[str, Tensor]) -> tuple[str, float]:
    """The weight whose gradient is furthest from what it should be, and the relative error."""
    # what is zero in exact arithmetic is compared with the size of the others
    floor = 0.05 * torch.stack([grad.norm() for grad in expected_grads.values()]).median()
    of: dict[str, float] = {}
    for name, grad in expected_grads.items():
        other = grads.get(name, torch.zeros_like(grad))
        of[name] = ((other - grad).norm() / grad.norm().clamp(min=floor)).item()
    worst = max(of, key=lambda name: of[name])
    return worst, of[worst]


def errors_in_fp64(model: Any, groups: Sequence[TokenizedGroup]) -> dict[str, Any]:
    """The errors of packed and shared rows in fp64 throughout, or why there are none."""
    try:
        with torch.no_grad():  # some keep states of their last run, with its graph
            model(input_ids=torch.tensor([[5, 6, 7, 8]]), use_cache=False)
        torch.set_default_dtype(torch.float64)
        with WholeDoubles():
            found = errors(in_fp64(model), pack_pairs(groups), groups)
    except Exception as failure:
        return {"fp64_reason": _line(failure)}
    finally:
        torch.set_default_dtype(torch.float32)
    return {"fp64_logps_error": found["logps_error"], "fp64_grad_error": found["grad_error"]}


def coverage_of(model_type: str) -> dict[str, Any]:
    """The record of one type."""
    record: dict[str, Any] = {"type": model_type}
    try:
        check_kind(tiny_config(model_type), model_type)
    except ValueError as refusal:
        if str(refusal).startswith("model must"):
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
        if "reason" in found:
            return {**record, "status": "refused", "reason": f"padded rows raise in training: {found['reason']}"}
        status = "padded" if found["logps_error"] <= EXACT else "wrong"
        return {**record, "status": status, "reason": check.reason, **found}
    found = _measured(model, pack_pairs(groups), groups) | errors_in_fp64(model, groups)
    if is_exact(found):
        return {**record, "status": "packed and shared", "reason": "", **found}
    record["rounding"] = _measured(model, pad_pairs(groups), groups)["logps_error"]
    if is_exact(found, record["rounding"]):
        return {**record, "status": "packed and shared", "reason": "rounding alone moves its log-probs", **found}
    unshared = _measured(model, pack_pairs(groups, prefix_sharing=False), groups)
    status = "packed" if is_exact(unshared) else "wrong"
    return {**record, "status": status, "reason": "the self-check did not see it", **found}


def is_exact(found: dict[str, Any], rounding: float = 0.0) -> bool:
    """In fp64, and in fp32 but for the rounding of gradients; in fp32 alone where fp64 does not run.

    Args:
        rounding: error of padded rows' log-probs in fp32; that of packed rows may be ten times as large.
    """
    if "fp64_grad_error" not in found:
        return max(found["logps_error"], found["grad_error"]) <= EXACT
    is_rounded = found["logps_error"] <= max(EXACT, 10 * rounding)
    return is_rounded and max(found["fp64_logps_error"], found["fp64_grad_error"]) <= EXACT_IN_FP64


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
    import transformers

    about = {"transformers": transformers.__version__, "seconds": round(time.perf_counter() - started, 1)}
    results.put({**record, **about})


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


def read_results(path: Path = RESULTS) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def kind_of(record: dict[str, Any]) -> str:
    """What kind of model a type is, by its refusal; "" for a decoder whose logits are a linear head."""
    if record["status"] == "cannot be built":
        return "types that cannot be built"
    return next((kind for words, kind in NOT_DECODERS.items() if words in record["reason"]), "")


def reach(records: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: how many of the decoders with a linear head train, are packed, and share prompts."""
    others: dict[str, int] = {}
    for record in records:
        if kind := kind_of(record):
            others[kind] = others.get(kind, 0) + 1
    decoders = [record for record in records if not kind_of(record)]
    left_out = ", ".join(f"{count} {kind}" for kind, count in others.items())
    lines = [
        f"{len(decoders)} of {len(records)} types are decoders whose logits are a linear layer of the last hidden"
        f" state. The others are {left_out}. Of these decoders",
        "",
        "| | types | share |",
        "|---|---|---|",
    ]
    for words, statuses in (
        ("train", ("packed and shared", "packed", "padded")),
        ("are packed", ("packed and shared", "packed")),
        ("are packed with shared prompts", ("packed and shared",)),
    ):
        count = sum(record["status"] in statuses for record in decoders)
        lines.append(f"| {words} | {count} of {len(decoders)} | {count / max(len(decoders), 1):.1%} |")
    return lines


def docs_table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: counts, the types that are packed with shared prompts, and a row with the reason for every other."""
    by = {status: [record for record in records if record["status"] == status] for status in STATUSES}
    version = next((record["transformers"] for record in records if "transformers" in record), "")
    lines = [f"transformers {version}, {len(records)} types:", "", "| | types |", "|---|---|"]
    lines += [f"| {status} | {len(found)} |" for status, found in by.items()]
    shared = by["packed and shared"]
    lines += ["", *reach(records), "", f"Packed with shared prompts: {', '.join(record['type'] for record in shared)}."]
    lines += ["", *exactness(shared)]
    lines += ["", "| type | | why |", "|---|---|---|"]
    for status in STATUSES[1:]:
        for record in by[status]:
            reason = re.sub(r"^[A-Za-z]+(Error|Exception): ", "", record["reason"]).replace("|", "\\|")
            lines.append(f"| {record['type']} | {status} | {reason[:330]} |")
    return "\n".join(lines) + "\n"


def exactness(shared: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: the largest errors in both dtypes, and the types whose gradients fp32 rounds by more than EXACT."""

    def worst(name: str) -> str:
        return f"{max((record[name] for record in shared if name in record), default=0.0):.0e}"

    in_fp64 = [record for record in shared if "fp64_grad_error" in record]
    lines = [
        f"Largest error against separate forwards, of log-probs and of any weight's gradient: in fp64"
        f" {worst('fp64_logps_error')} and {worst('fp64_grad_error')} ({len(in_fp64)} of these {len(shared)} types), in"
        f" fp32 {worst('logps_error')} and {worst('grad_error')}."
    ]
    noisy = [record for record in shared if record["grad_error"] > EXACT]
    if noisy:
        lines += [
            "",
            f"In fp32, {len(shared) - len(noisy)} types are exact to {EXACT:.0e}. Rounding moves a gradient of the"
            f" other {len(noisy)} by more; in fp64, the same rows give the same gradients:",
            "",
            "| type | weight | fp32 | fp64 |",
            "|---|---|---|---|",
        ]
    for record in noisy:
        fp64 = f"{record['fp64_grad_error']:.0e}" if "fp64_grad_error" in record else record["fp64_reason"][:80]
        lines.append(f"| {record['type']} | {record['worst']} | {record['grad_error']:.0e} | {fp64} |")
    return lines


def write_docs(records: Sequence[dict[str, Any]], path: Path = DOCS) -> None:
    path.write_text(pages.filled(path.read_text(), {"model_coverage.jsonl": docs_table(records)}))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", help="model types; all by default")
    parser.add_argument("--out", type=Path, help="JSON lines are written here")
    parser.add_argument("--time_limit", type=float, default=TIME_LIMIT, help="seconds for one type")
    parser.add_argument("--write", action="store_true", help="into the project's results and docs/models.md")
    parser.add_argument("--docs", action="store_true", help="docs/models.md from the results as they are")
    options = parser.parse_args(argv)
    if options.write and options.types:
        parser.error("--write takes all types")
    if options.docs:
        write_docs(read_results())
        return 0
    records = run_types(options.types or all_types(), options.time_limit)
    for path in filter(None, (options.out, RESULTS if options.write else None)):
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    if options.write:
        write_docs(records)
    for status in STATUSES:
        print(f"{status}: {sum(record['status'] == status for record in records)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
