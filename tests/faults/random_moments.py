"""Kills a run at random moments, resumes it, and compares its end with that of an undisturbed run, bit by bit.

`make faults` runs it: 20 moments of training, evaluating, saving, precomputing and generating, with SIGKILL and then
with SIGTERM. FAULTS="--seed 7 --moments 100" chooses others; the seed is printed and reproduces them.
"""

import argparse
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from killing import differences, end_of, output, train_until

CASE = {
    "max_steps": 24,
    "num_rows": 44,  # 11 steps are an epoch
    "gradient_accumulation_steps": 2,
    "save_steps": 4,
    "save_total_limit": 2,
    "eval_strategy": "steps",
    "eval_steps": 6,
    "logging_steps": 5,
    "num_eval_samples": 2,
    "eval_sample_tokens": 5,
    "eval_sample_temperature": 1.0,
    "reference": "cached",
    "ref_tokens_per_batch": 96,
}
KINDS = {
    "training": ["step", "substep"],
    "evaluating": ["evaluation"],
    "saving": ["save", "torn"],
    "precomputing": ["precompute"],
    "generating": ["generate"],
}


def count_events(folder, case):
    """{where: the number of such events in an undisturbed run}. The last of these runs stays in `folder`."""
    found = {}
    for where in (where for places in KINDS.values() for where in places):
        shutil.rmtree(folder, ignore_errors=True)
        assert train_until(folder, case, (where, 0)) == 0, output(folder)
        found[where] = end_of(folder)["num_events"]
    return found


def moments(seed, count, num_events):
    """Random moments, of every kind in turn. `num_events` is the number of events by where they are."""
    chosen = random.Random(seed)
    found = []
    for kind in itertools.islice(itertools.cycle(KINDS), count):
        where = chosen.choice(KINDS[kind])
        found.append((kind, where, chosen.randint(1, num_events[where])))
    return found


def try_moment(folder, case, moment, number):
    """The exit status of the run that is killed, the checkpoint it is resumed from, and what differs in the end."""
    status = train_until(folder, case, moment, number=number)
    begun = sorted(folder.glob("out/checkpoint-*"), key=lambda path: int(path.name[11:]))
    last = train_until(folder, case, resume=bool(begun))
    if last != 0:
        return status, begun, [f"the resumed run ended with {last}: {output(folder)[-500:]}"]
    return status, begun, differences(end_of(folder.parent / "whole"), end_of(folder))


def run(seed, count, number):
    """Prints a line per moment. Returns the number of moments at which the ends differed."""
    case = {**CASE, "signals": number == signal.SIGTERM}
    num_wrong = num_killed = 0
    with tempfile.TemporaryDirectory() as root:
        num_events = count_events(Path(root, "whole"), case)
        for index, (kind, event, nth) in enumerate(moments(seed, count, num_events)):
            # "torn" cuts a file off, which only a run that dies then leaves behind
            where = "save" if event == "torn" and number == signal.SIGTERM else event
            folder = Path(root, str(index))
            status, begun, wrong = try_moment(folder, case, (where, nth), number)
            num_killed += status != 0
            num_wrong += bool(wrong)
            how = "not reached" if status == 0 else f"ended with {status}"
            source = f"resumed from {begun[-1].name}" if begun else "started again"
            result = "; ".join(wrong) if wrong else "the same, bit by bit"
            print(f"{number.name} {index + 1:3}  {kind:<12} {where} {nth:<3} {how}, {source}: {result}", flush=True)
    print(f"{number.name}, seed {seed}: {count} moments, {num_killed} runs killed, {num_wrong} with another end")
    return num_wrong


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--moments", type=int, default=20)
    options = parser.parse_args(argv)
    return sum(run(options.seed, options.moments, number) for number in (signal.SIGKILL, signal.SIGTERM))


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.exit(min(main(), 1))
