"""Tables and figure of the training step's records, one for each machine and workload."""

from __future__ import annotations

from typing import Any

from fastdpo.evidence.bench.records import Record

BASELINES = ("TRL", "TRL, defaults")  # live reference
CACHED_BASELINES = ("TRL, cached", "TRL, best")


def training_table(records: list[Record]) -> str:
    """Markdown: methods, then what each feature is worth."""
    if not records:
        return "Nothing was measured.\n"
    first = records[0]
    if "pairs_per_step" not in first:  # the QLoRA check
        return "\n".join(f"{r['workload']}, {r['method']}: {qlora_text(r)}" for r in records) + "\n"
    model = first["model"]
    lines = [
        f"**{first['workload']}**: hidden {model['hidden_size']}, MLP {model['intermediate_size']},"
        f" {model['num_layers']} layers, vocabulary {model['vocab_size']}, {first['dtype']}; {first['data']},"
        f" {first['pairs_per_step']} pairs and {first['tokens_per_step']} tokens a step;"
        f" {max(r['rounds'] for r in records)} x {first['steps']} steps;"
        f" bare matmul {max(r['matmul_tflops'] for r in records):.3g} TFLOP/s\n",
        "| method | pairs/s | min to max | x TRL | tokens/s | MFU | peak MiB | of TRL's | collator | losses off |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    of = {r["method"]: r for r in records if "pairs_per_s" in r}
    lines += [_line(r, _baseline(r, of)) for r in records]
    worth = [_worth(r, of["fastdpo, cached"]) for r in of.values() if r.get("off")] if "fastdpo, cached" in of else []
    if worth:
        lines += ["", "| without | x slower than fastdpo, cached | peak MiB added |", "|---|---|---|", *worth]
    return "\n".join(lines) + "\n"


def qlora_text(record: Record) -> str:
    if "error" in record:
        return record["error"]
    return (
        f"{record['tokens_per_pair']} tokens a pair within {record['cap_mib']:.0f} MiB, peak"
        f" {record['peak_mib']:.0f} MiB, {record['step_s']:.1f} s a pair, first loss {record['losses'][0]:.6f}"
    )


def _baseline(record: Record, of: dict[str, Record]) -> Record | None:
    """TRL with the same kind of reference."""
    is_cached = "cached" in record["method"] or "best" in record["method"]
    return next((of[name] for name in (CACHED_BASELINES if is_cached else BASELINES) if name in of), None)


def _line(r: Record, baseline: Record | None) -> str:
    name = r["method"]
    if r.get("micro_batch", r["pairs_per_step"]) != r["pairs_per_step"]:
        name += f" ({r['micro_batch']} pairs at a time)"
    if "pairs_per_s" not in r:
        return f"| {name} | {r.get('error', 'not measured')} | | | | | | | | |"
    speed = share = ""
    if baseline is not None:
        speed = f"{r['pairs_per_s'] / baseline['pairs_per_s']:.2f}"
        share = f"{r['peak_mib'] / baseline['peak_mib']:.2f}"
    collator = f"{r['collator_share']:.2%}" if r["collator_share"] else ""
    return (
        f"| {name} | {r['pairs_per_s']:.3g} | {r['pairs_per_s_min']:.3g} to {r['pairs_per_s_max']:.3g} | {speed}"
        f" | {r['tokens_per_s']:,.0f} | {r['mfu']:.0%} | {r['peak_mib']:,.0f} | {share} | {collator}"
        f" | {r['loss_off']:.0e} |"
    )


def _worth(r: Record, base: Record) -> str:
    slower = base["pairs_per_s"] / r["pairs_per_s"]
    return f"| {r['off']} | {slower:.2f} | {r['peak_mib'] - base['peak_mib']:,.0f} |"


def training_figure(records: list[Record]) -> Any:
    """Pairs per second with their spread, and peak memory."""
    import matplotlib.pyplot as plt

    found = [r for r in records if "pairs_per_s" in r]
    names = [r["method"] for r in found]
    colors = ["#c44e52" if name.startswith("fastdpo") else "#8c9bb0" for name in names]
    figure, (speed, memory) = plt.subplots(
        1, 2, figsize=(10, 0.35 * len(names) + 1.5), sharey=True, layout="constrained"
    )
    speed.barh(names, [r["pairs_per_s"] for r in found], color=colors)
    for place, r in enumerate(found):
        speed.plot([r["pairs_per_s_min"], r["pairs_per_s_max"]], [place, place], color="#404040")
        speed.text(r["pairs_per_s_max"], place, f" {r['pairs_per_s']:.3g}", va="center", fontsize=7)
    memory.barh(names, [r["peak_mib"] for r in found], color=colors)
    for place, r in enumerate(found):
        memory.text(r["peak_mib"], place, f" {r['peak_mib']:,.0f}", va="center", fontsize=7)
    for axis, label in ((speed, "pairs per second, median with min and max"), (memory, "peak MiB")):
        axis.set_xlabel(label, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.15)
    speed.invert_yaxis()
    return figure
