"""Every kernel compiles for the table's GPUs, uses the matrix units, fits shared memory and spills nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("ahead_of_time.py")
MATRIX_UNIT = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
SHARED_LIMIT_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
NO_MATMUL = ("merge", "finish", "column_sums", "token_sums", "row_grads", "fold", "choice")


def compiled_facts(capability, operand, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), str(capability), operand, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_machine_code(fact):
    """Fits shared memory; bf16 operands go through the matrix units, and to them by the copy engine where asked."""
    assert fact["shared"] <= SHARED_LIMIT_KIB[fact["sm"]] * 1024, fact
    if fact["operand"] == "bf16" and not fact["kernel"].startswith(NO_MATMUL):
        assert fact["matrix"][MATRIX_UNIT[fact["sm"]]] > 0, fact
        assert (fact["matrix"]["UTMALDG"] > 0) == fact["tma"], fact


def check(capability, operand, *words, num_kernels=32):
    found = compiled_facts(capability, operand, *words)
    assert len(found) == num_kernels
    for fact in found:
        check_machine_code(fact)
        if (capability, fact["kernel"]) == (100, "partials to skip by, every option"):  # 32 bytes, after the loop
            assert fact["spills"] <= 16, fact
        elif capability == 90 and fact["triton"].startswith("3.9."):  # after the loop too, see kernels/README.md
            assert fact["spills"] <= 160, fact
        else:
            assert fact["stack"] == fact["spills"] == 0, fact


def test_plain_bf16_kernels_use_the_matrix_units_and_spill_nothing():
    check(90, "bf16", "plain", num_kernels=18)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_bf16_kernels_use_the_matrix_units_and_spill_nothing(capability):
    check(capability, "bf16")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "operand"),
    [(86, "bf16"), (89, "bf16"), (120, "bf16"), *((c, "fp32") for c in (80, 86, 89, 90, 100, 120))],
)
def test_other_architectures_and_dtypes_spill_nothing_either(capability, operand):
    check(capability, operand)


@pytest.mark.slow
@pytest.mark.parametrize("operand", ["bf16", "fp32"])
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_everything_that_a_tuner_may_try_compiles_and_fits_shared_memory(capability, operand):
    found = compiled_facts(capability, operand, "candidates")
    assert len(found) >= 6
    for fact in found:
        check_machine_code(fact)
