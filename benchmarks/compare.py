"""Compares two files of JSON lines: what became slower, faster, larger or smaller since a saved baseline.

    python -m benchmarks.compare OLD.jsonl NEW.jsonl [--threshold 0.1]

In: records of `fastdpo bench --out` or of a benchmark's --out. Out: a line per measurement that both have, with the
ratio of time and of memory. Exit code 1 if fastdpo's time or memory grew by more than the threshold and beyond the
spread of both runs; 2 if the files share no measurement.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fastdpo.evidence.bench.records import MACHINE, Record, measurement_of, read


def measurements(path: Path) -> dict[tuple[Any, ...], Record]:
    """The last record of each measurement that has a time or a speed."""
    return {measurement_of(r): r for r in read(path) if "ms" in r or "pairs_per_s" in r}


def times(record: Record) -> tuple[float, float, float]:
    """(median, least, most) of the time of one call, or of one pair."""
    if "ms" in record:
        return record["ms"], record["ms_min"], record["ms_max"]
    return tuple(1e3 / record[key] for key in ("pairs_per_s", "pairs_per_s_max", "pairs_per_s_min"))  # type: ignore


def is_worse(old: Record, new: Record, threshold: float) -> bool:
    """Whether time or memory grew by more than the threshold; for time, also beyond both spreads."""
    (before, _, most), (after, least, _) = times(old), times(new)
    slower = after > (1 + threshold) * before and least > most
    return slower or new["peak_mib"] > (1 + threshold) * old["peak_mib"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--threshold", type=float, default=0.1, help="growth that counts; default: 0.1")
    options = parser.parse_args(argv)
    for path in (options.old, options.new):
        if not path.is_file():
            parser.error(f"records must be in an existing file, got {path}")
    old, new = measurements(options.old), measurements(options.new)
    shared = [key for key in new if key in old]
    if not shared:
        print("the files share no measurement: device, shape, pass and method must be equal", file=sys.stderr)
        return 2
    worse = 0
    for key in shared:
        grew = is_worse(old[key], new[key], options.threshold)
        worse += grew and new[key]["method"].startswith("fastdpo")
        time = times(new[key])[0] / times(old[key])[0]
        memory = new[key]["peak_mib"] / old[key]["peak_mib"]
        name = ", ".join(str(part) for part in key[len(MACHINE) :] if part is not None)
        print(f"{'WORSE' if grew else '     '} time x {time:.2f}, memory x {memory:.2f}  {name}")
    print(f"{len(shared)} measurements compared, {worse} of fastdpo worse")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
