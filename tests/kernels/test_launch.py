"""The table of block shapes, and which compiled kernel a launch takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from closeness import assert_same_to_rounding
from head_cases import BF16, FP16, FP32, Case, make_inputs

from fastdpo.kernels import backward, forward, logits
from fastdpo.kernels.launch import BLOCKS, CANDIDATES, Blocks, Row, blocks_for, num_programs
from fastdpo.types import TOKEN_OUTPUTS

SCRIPT = Path(__file__).with_name("specializations.py")
KERNELS = (
    "partials_kernel",
    "partials_kernel with grads",
    "merge_kernel",
    "finish_grads_kernel",
    "logit_grads_kernel",
    "choice_logits_kernel",
    "choice_grads_kernel",
    "choice_labels_kernel",
)


@pytest.mark.parametrize(
    ("capability", "row"),
    [((8, 0), (8, 0)), ((8, 7), (8, 6)), ((8, 9), (8, 9)), ((9, 0), (9, 0)), ((10, 3), (10, 0)), ((13, 0), (12, 0))],
)
@pytest.mark.parametrize("kernel", Row._fields)
def test_a_gpu_takes_the_newest_row_that_it_reaches(capability, row, kernel):
    assert blocks_for(capability, 2, kernel) == getattr(BLOCKS[row][2], kernel)


def test_plain_bf16_tiles_of_sm_90_are_at_least_128_by_128_by_64():
    for kernel in ("forward", "forward_options", "eager", "logit_grads", "logit_grads_options", "skipping"):
        blocks = blocks_for((9, 0), 2, kernel)
        assert min(blocks.block_t, blocks.block_v) >= 128
        assert blocks.block_h >= 64


def test_only_gpus_with_a_copy_engine_are_told_to_use_it():
    for table in (BLOCKS, CANDIDATES):
        for capability, by_itemsize in table.items():
            for row in by_itemsize.values():
                assert capability >= (9, 0) or not any(blocks.tma for blocks in row)


@pytest.fixture(scope="module")
def specializations():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_another_number_of_rows_compiles_nothing_anew(specializations):
    for kernel in KERNELS:
        for way in ("tma", "pointers"):
            keys = {
                fact["key"] for fact in specializations if (fact["kernel"], fact["way"], fact["H"]) == (kernel, way, 64)
            }
            assert len(keys) == 1, (kernel, way, keys)


def test_another_hidden_size_may_compile_anew(specializations):
    """Or else the test above would find nothing, whatever the kernels did."""
    for way in ("tma", "pointers"):
        found = [fact for fact in specializations if (fact["kernel"], fact["way"]) == ("partials_kernel", way)]
        assert len({fact["key"] for fact in found}) == 2


@pytest.mark.parametrize("persistent", [0, 1])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_tiles_through_descriptors_are_those_through_pointers(dtype, persistent):
    case = Case(67, 72, 257, dtype, has_bias=True, softcap=4.0)
    leaves, labels, _ = make_inputs(case, 0)
    hidden_states, weight, bias = (x.detach() for x in leaves.values())
    described, pointers = Blocks(32, 64, 32, 1, 1, tma=True, persistent=persistent), Blocks(32, 64, 32, 1, 1)
    assert logits.tile_operands(hidden_states, weight, described)[1]
    head = (hidden_states, weight, bias, labels, 1.5, 4.0)
    results = []
    for blocks in (described, pointers):
        out, again = torch.full((2, 67, 257), torch.nan, dtype=dtype)
        values = forward.fused_forward_with_grads(out, *head, TOKEN_OUTPUTS, blocks)
        lse = values["lse_whole"], values["lse_rest"]
        backward.fill_logit_grads(
            again, hidden_states, weight, bias, labels, *lse, torch.ones_like(lse[0]), 0, 257, 1.5, 4.0, blocks
        )
        results.append([*values.values(), out, again])
    assert_same_to_rounding(*results)


def test_operands_that_the_copy_engine_cannot_read_come_through_pointers():
    blocks = Blocks(32, 64, 32, 1, 1, tma=True)
    weight = torch.randn(100, 40, dtype=BF16)
    good = torch.randn(9, 40, dtype=BF16)
    assert logits.tile_operands(good, weight, blocks)[1]
    assert logits.tile_operands(good[3:4].as_strided((1, 40), (1, 1)), weight, blocks)[1]  # one row has no stride
    transposed = torch.randn(40, 9, dtype=BF16).T
    odd_stride = torch.randn(9, 43, dtype=BF16)[:, :40]
    odd_address = torch.randn(9 * 40 + 1, dtype=BF16)[1:].view(9, 40)
    for hidden_states in (transposed, odd_stride, odd_address):
        operands, tma = logits.tile_operands(hidden_states, weight, blocks)
        assert not tma
        assert operands == (hidden_states, weight)


def test_persistent_programs_are_as_many_as_the_device_runs_but_no_more_than_tiles():
    x = torch.empty(0)
    assert num_programs(Blocks(32, 64, 64, 1, 1), 100, x) == 100
    assert num_programs(Blocks(32, 64, 64, 1, 1, persistent=3), 100, x) == 6
    assert num_programs(Blocks(32, 64, 64, 1, 1, persistent=3), 5, x) == 5
