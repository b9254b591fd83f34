"""The table of block shapes."""

import pytest

from fastdpo.kernels.launch import BLOCKS, blocks_for


@pytest.mark.parametrize(
    ("capability", "row"),
    [((8, 0), (8, 0)), ((8, 7), (8, 6)), ((8, 9), (8, 6)), ((9, 0), (9, 0)), ((10, 3), (10, 0)), ((13, 0), (12, 0))],
)
def test_a_gpu_takes_the_newest_row_that_it_reaches(capability, row):
    assert blocks_for(capability, 2) == BLOCKS[row][2]


def test_bf16_tiles_of_sm_90_are_at_least_128_by_128_by_64():
    block_t, block_v, block_h, *_ = blocks_for((9, 0), 2)
    assert block_t >= 128
    assert block_v >= 128
    assert block_h >= 64
