"""Every kernel compiles for the table's GPUs, uses the matrix units, fits shared memory and spills nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("ahead_of_time.py")
MATRIX_UNIT = {80: "HMMA", 86: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
SHARED_LIMIT_KIB = {80: 163, 86: 99, 90: 227, 100: 227, 120: 99}


def compiled_facts(capability, operand):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), str(capability), operand]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(capability, operand):
    found = compiled_facts(capability, operand)
    assert len(found) == 10
    for fact in found:
        assert fact["stack"] == fact["spills"] == 0, fact
        assert fact["shared"] <= SHARED_LIMIT_KIB[capability] * 1024, fact
        if operand == "bf16" and not fact["kernel"].startswith(("merge", "finish")):
            assert fact["matrix"][MATRIX_UNIT[capability]] > 0, fact


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_bf16_kernels_use_the_matrix_units_and_spill_nothing(capability):
    check(capability, "bf16")


def test_fp32_kernels_spill_nothing():
    check(90, "fp32")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "operand"), [(86, "bf16"), (120, "bf16"), *((c, "fp32") for c in (80, 86, 100, 120))]
)
def test_other_architectures_and_dtypes_spill_nothing_either(capability, operand):
    check(capability, operand)
