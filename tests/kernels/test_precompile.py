"""Kernels compiled before they are launched: which, for which GPU, in whose cache; and that nothing runs meanwhile.

The compiler is Triton's own in a process without its interpreter; here it is asked for a few small kernels.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from fastdpo.kernels import launch
from fastdpo.kernels.launch import Blocks

CODE = """
import json, sys, torch
from fastdpo.kernels import precompile, token_sums, tuning
from fastdpo.kernels.launch import as_if_on, candidate_blocks, device_blocks, can_flatten

{code}
"""


def run(code, tmp_path):
    """In a process that compiles: tests run Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, "-c", CODE.format(code=code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


SUMS = """
def sums(device):
    x, ends = torch.ones(300, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    return token_sums.token_sums([x], None, ends, None, None, 0, torch.float32)[0]
"""


def test_launches_are_compiled_once_each_and_not_run(tmp_path):
    found = run(
        SUMS
        + """
with precompile.compiling_only((9, 0)) as compiled:
    for _ in range(3):
        sums("meta")
    precompile._launch_sums(torch.empty(256, device="meta"), torch.empty(256, dtype=torch.int64, device="meta"), False)
print(json.dumps([compiled.names, compiled.failures, list(sums.__code__.co_names)]))
""",
        tmp_path,
    )
    assert sorted(name.split(",")[0] for name in found[0]) == ["row_grads_kernel", *["token_sums_kernel"] * 3]
    assert found[1] == {}
    cubins = list((tmp_path / "cache").rglob("*.cubin"))
    assert len(cubins) == 4  # where a later launch finds them


def test_what_does_not_compile_is_named_and_stops_nothing(tmp_path):
    found = run(
        SUMS
        + """
from triton.runtime.jit import JITFunction
before = JITFunction.run
with precompile.compiling_only((9, 0)) as compiled:
    blocks = tuning.Blocks(100, 128, 64, 8, 3)  # 100 is no power of two
    h = torch.empty(256, 64, dtype=torch.bfloat16, device="meta")
    y = torch.empty(256, dtype=torch.int64, device="meta")
    precompile.fused_forward(h, h, None, y, 1.0, None, (), blocks)
    sums("meta")
assert JITFunction.run is before
print(json.dumps([len(compiled.names), list(compiled.failures.values())]))
""",
        tmp_path,
    )
    assert found[0] == 3
    assert len(found[1]) == 1
    assert "power of 2" in found[1][0] or "power of two" in found[1][0] or "CompilationError" in found[1][0]


def test_blocks_are_those_of_the_gpu_that_is_compiled_for():
    x = torch.empty(8, 64, dtype=torch.bfloat16, device="meta")
    assert launch.device_blocks(x) == launch.INTERPRETED
    for capability in ((8, 0), (9, 0), (10, 0)):
        with launch.as_if_on(capability):
            assert launch.device_blocks(x, "eager") == launch.blocks_for(capability, 2, "eager")
            assert set(launch.candidates_for(capability, 2)) <= set(launch.candidate_blocks(x))
            assert launch.can_flatten(x) == (capability >= (10, 0))
    assert launch.device_blocks(x) == launch.INTERPRETED


def test_two_programs_a_multiprocessor_are_tried_first_on_hopper():
    x = torch.empty(8, 64, dtype=torch.bfloat16, device="meta")
    with launch.as_if_on((9, 0)):
        first, second, *_ = launch.candidate_blocks(x)
    assert first == Blocks(128, 128, 64, 4, 3, tma=True)
    assert second == Blocks(128, 128, 64, 8, 3, tma=True)
    shared = (first.block_t + first.block_v) * first.block_h * 2 * first.num_stages
    assert 2 * shared <= 227 * 1024


@pytest.mark.slow
def test_all_that_a_tuner_tries_is_compiled_without_a_gpu(tmp_path):
    command = [sys.executable, "-m", "fastdpo.kernels.tuning", "--hidden-size", "128", "--vocab-size", "512"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command += ["--num-rows", "256", "--capability", "8.0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 did not compile" in done.stdout
