"""The speeds and the memory that the README and the pages of docs/ state are those of benchmarks/results/*.jsonl, to
every digit that is printed.
"""

import importlib
import itertools
import json
import math
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGE = (ROOT / "docs" / "migrating.md").read_text()


def newest(name, key):
    """Of each `key` of a results file, the last record that has a figure."""
    lines = (ROOT / "benchmarks" / "results" / f"{name}.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {tuple(r[k] for k in key): r for r in records if r.get("num_threads") == 2 and "peak_mib" in r}


def figures(table, *first_cells):
    """The numbers of the line that begins with these cells, in the table whose first cell is `table`."""
    start = "".join(f"| {cell} " for cell in first_cells)
    lines = PAGE.split(f"| {table} |")[-1].splitlines()
    line = next(line for line in lines if line.startswith(start))
    return numbers(line.split("|", len(first_cells) + 1)[-1])


def numbers(text):
    return [float(x) for x in re.findall(r"[\d.]+", text.replace(",", ""))]


def rounded(values, *formats):
    """As a table prints them, whose columns take turns with the formats."""
    return [float(format(value, f)) for value, f in zip(values, itertools.cycle(formats), strict=False)]


@pytest.mark.parametrize(("reference", "suffix"), [("live", ""), ("cached", ", cached")])
def test_figures_of_training_steps_are_those_of_the_results(reference, suffix):
    measured = newest("training_step", ("workload", "method"))
    plain = ("plain PyTorch, padded, response rows", "plain, response rows")
    for title, method in (("TRL 1.16", "TRL"), plain, ("fastdpo", "fastdpo")):
        expected = []
        for workload in ("short", "long"):
            own, base = measured[workload, method + suffix], measured[workload, "TRL" + suffix]
            expected += [own["pairs_per_s"] / base["pairs_per_s"], own["peak_mib"]]
        assert figures("trainer", title, reference) == rounded(expected, ".1f", ".0f")


def test_the_strongest_line_of_the_readme_is_that_of_the_results():
    measured = newest("training_step", ("workload", "method"))
    own, *others = (measured["long", f"{method}, cached"] for method in ("fastdpo", "TRL", "plain, response rows"))
    faster, share = ([own[key] / other[key] for other in others] for key in ("pairs_per_s", "peak_mib"))
    words = (
        f"fastdpo trains {faster[0]:.1f} times as many pairs per second as TRL and {faster[1]:.1f} times as many as the"
        f" plain loop, in {share[0]:.0%} and {share[1]:.0%} of their memory."
    )
    assert words in " ".join(README.split())


def test_the_picture_of_the_readme_is_drawn_from_the_results(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "site"))
    drawn = importlib.import_module("speed_plot")
    records = [json.loads(line) for line in drawn.RECORDS.read_text().splitlines()]
    assert f"docs/pictures/{drawn.PICTURE.name}" in README
    texts = {text.get_text().strip() for panel in drawn.figure(records).axes for text in panel.texts}
    for row in README_ROWS:
        line = next(line for line in README.splitlines() if line.startswith(f"| {row} |"))
        assert {text for cell in line.split("|")[2:-1] for text in re.findall(r"[\d.,]+\d|\d", cell)} <= texts
    assert drawn.PICTURE.exists()


def test_the_cost_of_checksums_is_that_of_the_results():
    lines = (ROOT / "benchmarks" / "results" / "saves.jsonl").read_text().splitlines()
    record = next(line for line in map(json.loads, reversed(lines)) if "checksum_share" in line)
    words = (
        f"They hold up a save of {record['bytes'] / 1e6:.0f} MB for {record['checksum_share']:.1%} of its time, and"
        f" take {record['checksum_cpu_share']:.1%} of its CPU time"
    )
    assert words in " ".join((ROOT / "docs" / "resuming.md").read_text().split())


def test_figures_of_the_head_op_are_those_of_the_results():
    measured = newest("linear_logps", ("pass", "method"))
    base = measured["dpo loss", "plain, response rows"]
    for title, method in (
        ("plain PyTorch with full logits", "plain, response rows"),
        ("TRL 1.16", "TRL"),
        ("Liger 0.8.5", "Liger"),
        ("fastdpo", "fastdpo"),
    ):
        own = measured["dpo loss", method]
        expected = [base["ms"] / own["ms"], own["peak_mib"]]
        assert figures("head op", title) == rounded(expected, ".2f", ".0f")


@pytest.mark.parametrize("which", ["before", "after"])
def test_figures_of_the_seat_inside_trl_are_those_of_the_results(which):
    lines = (ROOT / "benchmarks" / "results" / "trl_seat.jsonl").read_text().splitlines()
    measured = {(r["workload"], r["method"]): r[which] for r in map(json.loads, lines)}
    expected = [measured[w, "TRL"][key] for w in ("short", "long") for key in ("step_s", "peak_mib")]
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| {which} |"))
    assert numbers(line) == rounded(expected, ".3g", ".0f")


README_ROWS = {
    "TRL 1.16 `DPOTrainer`": "TRL",
    "padded PyTorch loop, logits of response rows only": "plain, response rows",
    "fastdpo": "fastdpo",
}


PRETRAINED_ROWS = {
    "SmolLM2-135M: TRL": "TRL",
    "SmolLM2-135M: padded loop": "plain, response rows",
    "SmolLM2-135M: fastdpo": "fastdpo",
}


@pytest.mark.parametrize("title", [*README_ROWS, *PRETRAINED_ROWS])
def test_figures_of_the_readme_are_those_of_the_results(title):
    """A cell is `pairs per second (peak MiB)`, the first to three digits."""
    measured = newest("training_step", ("workload", "method"))
    prefix, method = ("SmolLM2 ", PRETRAINED_ROWS[title]) if title in PRETRAINED_ROWS else ("", README_ROWS[title])
    expected = []
    for workload in ("short", "long"):
        for suffix in ("", ", cached"):
            record = measured[prefix + workload, method + suffix]
            expected += [record["pairs_per_s"], record["peak_mib"]]
    line = next(line for line in README.splitlines() if line.startswith(f"| {title} |"))
    assert numbers(line.split("|", 2)[2]) == rounded(expected, ".3g", ".0f")


def test_figures_of_the_page_on_the_head_op_are_those_of_the_results():
    text = " ".join((ROOT / "docs" / "head_op.md").read_text().split())
    measured = newest("linear_logps", ("pass", "method"))
    ratios, peaks, plain_peaks = [], [], []
    for name in ("dpo loss", "forward+backward"):
        own, rows, everything = (measured[name, m] for m in ("fastdpo", "plain, response rows", "plain, all rows"))
        ratios += [own["ms"] / rows["ms"], own["ms"] / everything["ms"]]
        peaks.append(own["peak_mib"])
        plain_peaks += [rows["peak_mib"], everything["peak_mib"]]
    stated = re.search(
        r"took ([\d.]+) x .*? and ([\d.]+) x on all rows, .*? ([\d.]+) x and ([\d.]+) x, in (\d+) and (\d+) MiB"
        r" where plain took (\d+) and (\d+)",
        text,
    )
    assert [float(x) for x in stated.groups()[:4]] == rounded(ratios, ".2f")
    assert [float(x) for x in stated.groups()[4:6]] == rounded(peaks, ".0f")
    assert rounded(plain_peaks, ".0f") == [float(x) for x in stated.groups()[6:]] * 2


def test_figures_of_the_data_are_those_of_the_results():
    page = (ROOT / "benchmarks" / "README.md").read_text()
    records = map(json.loads, (ROOT / "benchmarks" / "results" / "data.jsonl").read_text().splitlines())
    for record in records:
        for method in ("TRL", "fastdpo"):
            own, base = record[method], record["TRL"]
            times = [own[name] for name in ("ready_s", "ready_s_min", "ready_s_max")]
            expected = [*times, own["ready_s"] / base["ready_s"], own["data_cpu_s"], own["peak_mib"]]
            kind = {"short": "one turn", "turns": "a system message and three turns"}[record["kind"]]
            start = rf"^\| {record['rows']:,}, {kind} \| {method} \|(.*)$"
            stated = numbers(re.search(start, page, flags=re.MULTILINE).group(1))
            assert stated == rounded(expected, ".0f", ".0f", ".0f", ".2f", ".1f", ".0f")


def test_figures_of_the_log_are_those_of_the_results():
    text = (ROOT / "docs" / "log.md").read_text()
    measured = newest("training_step", ("workload", "method"))

    def compared(other, workloads=("short", "long")):
        return [measured[w, "fastdpo, cached"]["pairs_per_s"] / measured[w, other]["pairs_per_s"] for w in workloads]

    def more(other):
        return [measured[w, other]["peak_mib"] - measured[w, "fastdpo, cached"]["peak_mib"] for w in ("short", "long")]

    lines = {
        "| prompts once per pair |": "{:.2f} x (short), {:.2f} x (long)".format(*compared("fastdpo, cached, unshared")),
        "| packing, on top of that |": "{:.2f} x and {:.2f} x with both".format(*compared("fastdpo, cached, padded")),
        "| the fused head against full logits |": "{:.2f} x and {:.2f} x, {:,.0f} MiB (long)".format(
            *compared("fastdpo, cached, full logits"), more("fastdpo, cached, full logits")[1]
        ),
        "| gradient made in forward |": "{:.2f} x and {:.2f} x; costs up to {:.0f} MiB".format(
            *compared("fastdpo, cached, recompute"), -min(more("fastdpo, cached, recompute"))
        ),
        "| reference log-probs cached |": "{:.2f} x (short), {:.2f} x (long)".format(*compared("fastdpo")),
        "| Mamba and delta-net layers:": "{:.2f} x (short), {:.2f} x (long)".format(
            *compared("fastdpo, cached, padded", ("hybrid short", "hybrid long"))
        ),
    }
    for start, words in lines.items():
        line = next(line for line in text.splitlines() if line.startswith(start))
        assert f"| {words} |" in line, (start, words)


def test_the_slow_head_of_the_log_is_that_of_the_results():
    measured = newest("linear_logps", ("pass", "method"))
    ratios = [
        measured[name, "fastdpo"]["ms"] / measured[name, "plain, response rows"]["ms"]
        for name in ("forward+backward", "frozen head", "dpo loss")
    ]
    words = (
        f"{ratios[0]:.2f} x plain PyTorch on response rows, since backward computes the logits again. With a frozen"
        f" head or a known reference it is {ratios[1]:.2f} and {ratios[2]:.2f} x."
    )
    assert words in " ".join((ROOT / "docs" / "log.md").read_text().split())


def test_what_skipping_costs_in_the_log_is_that_of_the_results():
    lines = (ROOT / "benchmarks" / "results" / "skipping.jsonl").read_text().splitlines()
    records = {(r["order"], r["tolerance"]): r["ms"] / r["exact_ms"] for r in map(json.loads, lines)}
    ratios = [ratio for (_, tolerance), ratio in records.items() if tolerance]
    pays = {
        order: min(t for (o, t), ratio in records.items() if t and o == order and ratio < 1) for order, _ in records
    }
    line = next(x for x in (ROOT / "docs" / "log.md").read_text().splitlines() if x.startswith("| skipping vocabulary"))
    assert f"| {min(ratios):.2f} to {max(ratios):.2f} x of exact" in line
    ordered, permuted = (round(math.log2(pays[order])) for order in ("by frequency", "permuted"))
    assert f"from 2^{ordered} on if ids are in order of frequency, from 2^{permuted} on in random order" in line
