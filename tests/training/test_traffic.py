"""Processes send what the cost model says, to the byte: DDP and FSDP2, counted at the collectives.

The vocabulary cut over processes is counted in tests/ops/test_shard.py.
"""

import pytest
from processes import on_processes
from traffic_runs import count

KINDS = [
    {"reference": reference, "checkpointing": checkpointing, "is_tied": is_tied}
    for reference in ("frozen", "cached", "adapter")
    for checkpointing in (False, True)
    for is_tied in (False, True)
]


def counted(kind, num_processes, folder):
    cases = [{"kind": kind, "num_processes": num_processes, **settings} for settings in KINDS]
    return list(zip(KINDS, on_processes(count, cases, folder, num_processes), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 4])
@pytest.mark.parametrize(
    ("kind", "collectives"), [("DDP", {"all_reduce"}), ("FSDP2", {"all_gather", "reduce_scatter"})]
)
def test_bytes_are_those_of_the_formula(kind, collectives, num_processes, tmp_path):
    for settings, of_processes in counted(kind, num_processes, tmp_path):
        for found, expected in of_processes:
            assert set(found) == collectives
            assert found == expected, settings
