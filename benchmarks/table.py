"""Tables and plots of the benchmarks' JSON lines: nothing in them is typed by hand.

    python benchmarks/table.py FILE.jsonl              # prints the tables
    python benchmarks/table.py FILE.jsonl --plots DIR  # and writes DIR/*.png
    python benchmarks/table.py --write [--plots DIR]   # fills the tables of benchmarks/README.md
    python benchmarks/table.py --check                 # exit code 1 where README.md and the JSON lines disagree

A table in README.md stands between `<!-- table: FILE.jsonl -->`, with FILE in benchmarks/results, and `<!-- end -->`.
Of several records of one measurement the last one counts. What failed has its line, with the reason.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from shared.pages import RESULTS, filled, names_in

from fastdpo.evidence.bench.records import MACHINE, SHAPE, Record, groups, machine_of, read, shape_of
from fastdpo.evidence.bench.steps.tables import training_table

README = Path(__file__).parent / "README.md"
NOTHING = "No measurement has been kept yet.\n"


def tables(records: list[Record]) -> str:
    """Markdown of all records: a heading per machine and shape, then a table per pass or order of ids."""
    if not records:
        return NOTHING
    parts = []
    steps = [record for record in records if "workload" in record]
    for same in groups(steps, (*MACHINE, "workload")).values():
        parts.append(f"On {machine_of(same[-1])}\n\n{training_table(same)}")
    others = [record for record in records if "workload" not in record]
    for same in groups(others, (*MACHINE, *SHAPE)).values():
        parts.append(f"**{shape_of(same[0])}** on {machine_of(same[-1])}\n")
        if "tolerance" in same[0]:
            parts.append(distribution_of(same[-1]))
            parts += [skipping_table(order, rows) for (order,), rows in groups(same, ("order",)).items()]
        else:
            parts += [head_op_table(name, rows) for (name,), rows in groups(same, ("pass",)).items()]
    return "\n".join(parts)


def head_op_table(pass_name: str, records: list[Record]) -> str:
    rate = next((r["matmul_tflops"] for r in records if "matmul_tflops" in r), None)
    runs = next((r["runs"] for r in records if "runs" in r), 0)
    measured = f"{runs} runs; bare matmul {rate:.3g} TFLOP/s" if rate else "nothing measured"
    notes: list[str] = []
    lines = [
        f"{pass_name} ({measured})\n",
        "| method | ms | min to max | x plain | peak MiB | beyond results | own FLOPs | needed FLOPs | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        name = r["method"]
        if r.get("note"):
            notes.append(f"{name}: {r['note']}.")
        if "ms" not in r:
            lines.append(f"| {name} | {r.get('error', 'not measured')} | | | | | | | |")
            continue
        own, needed = (r[key] / r["ms"] / 1e9 / r["matmul_tflops"] for key in ("flops", "flops_needed"))
        ratio = f"{r['ms'] / r['plain_ms']:.2f}" if "plain_ms" in r else ""
        error = max(r["errors"].values())
        lines.append(
            f"| {name} | {r['ms']:.1f} | {r['ms_min']:.1f} to {r['ms_max']:.1f} | {ratio} | {r['peak_mib']:.1f} "
            f"| {r['peak_mib'] - r['results_mib']:.1f} | {own:.0%} | {needed:.0%} | {error:.0e} |"
        )
    return "\n".join([*lines, *(["", *notes] if notes else [])]) + "\n"


def distribution_of(record: Record) -> str:
    return (
        f"Distribution, measured: Zipf exponent {record['zipf_exponent']:.2f}, mean entropy "
        f"{record['mean_entropy']:.2f} nats, {record['labels_outside_top']:.1%} of labels outside the 1,000 most "
        f"frequent ids, largest probability {record['mean_largest']:.2f} on average, "
        f"{record['mass_outside_own_top']:.1%} of a row's mass outside its own 1,000 likeliest ids.\n"
    )


def skipping_table(order: str, records: list[Record]) -> str:
    lines = [
        f"ids {order} ({records[0]['runs']} runs)\n",
        "| tolerance | ms | min to max | of exact | promised | kept tiles | kept, rows unsorted "
        "| dH error | dW error | of bound |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(records, key=lambda r: r["tolerance"]):
        bound = max(r["dH_of_bound"], r["dW_of_bound"])
        lines.append(
            f"| {tolerance_of(r)} | {r['ms']:.1f} | {r['ms_min']:.1f} to {r['ms_max']:.1f} "
            f"| {r['ms'] / r['exact_ms']:.2f} | {r['promised_ms'] / r['exact_ms']:.2f} | {r['kept_share']:.1%} "
            f"| {r['kept_share_unordered']:.1%} | {r['dH_error']:.0e} | {r['dW_error']:.0e} | {bound:.2f} |"
        )
    return "\n".join(lines) + "\n"


def tolerance_of(record: Record) -> str:
    tolerance = record["tolerance"]
    exponent = next((k for k in range(1, 64) if tolerance == 2.0**-k), None)
    return "0, exact" if tolerance == 0 else f"2^-{exponent}" if exponent else f"{tolerance:.1e}"


def renewed(readme: str) -> str:
    """README's text with every marked table made anew."""
    return filled(readme, {name: tables(read(RESULTS / name)) for name in names_in(readme)})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "files", nargs="*", type=Path, help="JSON lines; with --write and --check those that README names"
    )
    parser.add_argument("--plots", type=Path, help="folder for a plot of each machine and shape")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    readme = README.read_text()
    if options.write:
        README.write_text(renewed(readme))
    elif options.check and renewed(readme) != readme:
        print(f"{README} is not what the JSON lines say: run python benchmarks/table.py --write", file=sys.stderr)
        return 1
    files = options.files or [RESULTS / name for name in names_in(readme)]
    records = [read(path) for path in files]
    if options.files:
        print("\n".join(map(tables, records)))
    if options.plots:
        from shared.plots import write_plots  # needs matplotlib, which a GPU machine may lack

        for path in write_plots([record for found in records for record in found], options.plots):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
