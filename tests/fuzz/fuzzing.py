"""Runs a property on many random cases: 300 in `make test`, always the same ones; 10,000 in `make fuzz`.

Environment: FUZZ_EXAMPLES cases of each strategy (300), FUZZ_SECONDS after which a strategy stops (no limit), FUZZ_SEED
the first seed (0). Cases come in rounds of at most 250, each with a seed of its own, so that time can run out between
rounds; a failure names the seed that brings it back. FUZZ_LOG names a file that gets a line of JSON for each strategy.
"""

import json
import math
import os
import re
import time
import traceback
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

import fastdpo

OURS = Path(fastdpo.__file__).parent
OF_PYTHON = re.compile(  # what Python's functions say, which have no frame of their own
    "is not in list|invalid literal|could not convert|not enough values|too many values|argument [0-9]+ is (short|long)"
    "|codec can't|unknown format|substring not found|must be in range|embedded null|Exceeds the limit"
)
ROUND = 250
PHASES = (Phase.explicit, Phase.generate, Phase.shrink)


def fuzz(name, strategy, check, *, share=1.0):
    """Calls `check(case)` on random cases, and returns how often it returned what: {outcome: times}.

    Args:
        name: of the strategy, in the log and in the message of a failure.
        check: raises if the property does not hold; else returns the case's outcome, a word.
        share: of the cases that are asked for, where one takes long.
    """
    wanted = math.ceil(share * int(os.environ.get("FUZZ_EXAMPLES", "300")))
    seconds = float(os.environ.get("FUZZ_SECONDS", "inf"))
    first = int(os.environ.get("FUZZ_SEED", "0"))
    outcomes, started, number = Counter(), time.monotonic(), first
    while outcomes.total() < wanted and time.monotonic() - started < seconds:
        before, size = outcomes.total(), min(ROUND, wanted - outcomes.total())

        @seed(number)
        @settings(
            max_examples=size,
            deadline=None,
            database=None,
            phases=PHASES,
            print_blob=False,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def run(case):
            outcomes[check(case)] += 1

        try:
            run()
        except BaseException:
            print(f"{name}: again with FUZZ_SEED={number} FUZZ_EXAMPLES={math.ceil(size / share)}")
            raise
        if outcomes.total() == before:  # a strategy with fewer cases than that
            break
        number += 1
    _log({"strategy": name, "cases": outcomes.total(), "seed": first, "seconds": round(time.monotonic() - started, 1)})
    return dict(outcomes)


def assert_ours(error):
    """The error is one that fastdpo raises itself, not one that Python or a library raised inside of it."""
    frames = traceback.extract_tb(error.__traceback__)
    assert Path(frames[-1].filename).is_relative_to(OURS), f"raised in {frames[-1].filename}: {error!r}"
    assert not OF_PYTHON.search(str(error)), f"Python's own: {error!r} in {frames[-1]}"
    assert str(error)


def _log(line):
    path = os.environ.get("FUZZ_LOG")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
