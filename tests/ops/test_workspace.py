"""How much of a head goes through at once, on weights without storage: sizes, chunks, and the traffic they mean."""

import pytest
import torch

from fastdpo.ops import eager
from fastdpo.ops.engine import engine_of

GIB, MIB = 2**30, 2**20
GB = 10**9


def head(V, H, dtype=torch.bfloat16, device="meta"):
    return torch.empty(V, H, dtype=dtype, device=device)


def sums_bytes(V, H):
    return 4 * V * H


@pytest.mark.parametrize(
    ("V", "H", "rows"),
    [
        (128256, 4096, 4096),  # half of dW's 2.1 GB
        (262144, 2304, 2048),  # at most 1 GiB
        (151936, 896, 896),  # 256 MiB hold 883, which are 6.9 blocks of 128; half of dW's sums is 272 MB
        (32000, 512, 4096),  # 256 MiB
    ],
)
def test_the_workspace_grows_with_the_weight_whose_gradient_each_chunk_adds_to(V, H, rows):
    assert eager.max_chunk_rows(head(V, H), engine_of("triton"), None, sums_bytes(V, H)) == pytest.approx(rows, abs=127)
    assert eager.max_chunk_rows(head(V, H), engine_of("triton"), None, sums_bytes(V, H)) % 128 == 0


def test_the_traffic_of_dw_is_a_quarter_of_what_a_fixed_workspace_costs():
    V, H, N = 128256, 4096, 16384
    traffic = []
    for budget in (256 * MIB, None):
        most = eager.max_chunk_rows(head(V, H), engine_of("triton"), budget, sums_bytes(V, H))
        num_chunks = len(list(eager.even_chunks(slice(0, N), most, 128)))
        traffic.append((2 * num_chunks - 1) * sums_bytes(V, H) / GB)  # the first one writes alone
    assert traffic == [pytest.approx(65.1, abs=5), pytest.approx(14.7, abs=0.1)]


def test_a_frozen_head_has_no_sums_to_spare_and_keeps_the_smaller_workspace():
    assert eager.max_chunk_rows(head(128256, 4096), engine_of("triton")) == 1024  # 1,046 fit, which pad to 1,152


def test_a_cpu_keeps_its_workspace_of_32_mib():
    engine, weight = engine_of("tiled"), head(128256, 4096, torch.float32)
    assert eager.max_chunk_rows(weight, engine, None, sums_bytes(128256, 4096)) == 2**25 // (4 * 128256) == 65


@pytest.mark.parametrize(
    ("V", "H", "group_rows", "rows"),
    [
        (32000, 384, 250, 262),  # fits into 32 MiB
        (32000, 384, 300, 300),
        (32000, 384, 384, 384),  # as large as the weight
        (32000, 384, 385, 262),  # larger
        (128256, 4096, 523, 523),  # 256 MiB
        (128256, 4096, 524, 65),
    ],
)
def test_a_group_fits_a_cpus_workspace_if_it_is_no_larger_than_the_weight_and_256_mib(V, H, group_rows, rows):
    """Its logits would be made twice: measured on two cores, 0.69 x of the time for 275 rows a group."""
    weight = head(V, H, torch.float32)
    assert eager.max_chunk_rows(weight, engine_of("tiled"), None, 0, None, group_rows) == rows
    assert eager.max_chunk_rows(weight, engine_of("tiled"), None, sums_bytes(V, H), None, group_rows) == rows
    assert eager.max_chunk_rows(weight, engine_of("tiled"), 2**25, 0, None, group_rows) == 2**25 // (4 * V)  # asked for
    on_gpu = head(V, H), engine_of("triton")
    assert eager.max_chunk_rows(*on_gpu, None, 0, None, group_rows) == eager.max_chunk_rows(*on_gpu)


@pytest.mark.parametrize(("free", "expected"), [(80 * GIB, 1050673152), (1 * GIB, GIB // 2), (100 * MIB, 256 * MIB)])
def test_the_larger_workspace_is_what_is_free_allows(free, expected, monkeypatch):
    monkeypatch.setattr(eager, "free_bytes", lambda device: free)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert eager._default_bytes(engine_of("triton"), torch.device("cuda"), sums_bytes(128256, 4096)) == expected


def test_nothing_is_asked_of_the_driver_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(eager, "free_bytes", None)
    assert eager._default_bytes(engine_of("triton"), torch.device("cuda"), sums_bytes(128256, 4096)) == 256 * MIB


def test_what_is_free_is_counted_within_the_share_that_a_process_may_have(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 18 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 15 * GIB)
    for share, expected in ((1.0, 60 + 3), (0.25, 2 + 3), (0.1, 0 + 3)):
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device, share=share: share)
        assert eager.free_bytes(torch.device("cuda")) == expected * GIB


def test_what_adding_a_product_takes_is_part_of_the_workspace(monkeypatch):
    weight, sums = head(128256, 4096), sums_bytes(128256, 4096)
    monkeypatch.setattr(eager, "product_bytes", lambda *_: 16 * MIB)
    assert eager.max_chunk_rows(weight, engine_of("triton"), 256 * MIB, sums) == 896  # 980 fit into 240 MiB
    assert eager.max_chunk_rows(weight, engine_of("triton"), 256 * MIB) == 1024  # nothing is added to
    assert eager.max_chunk_rows(weight, engine_of("triton"), MIB, sums) == 2  # half of a small one


def test_chunks_are_even_and_all_but_the_last_are_whole_blocks():
    lengths = [c.stop - c.start for c in eager.even_chunks(slice(0, 2500), 1024, 128)]
    assert lengths == [896, 896, 708]
    assert [c.stop - c.start for c in eager.even_chunks(slice(10, 110), 40)] == [34, 34, 32]
    assert [c.stop - c.start for c in eager.even_chunks(slice(0, 100), 40, 128)] == [34, 34, 32]
    assert list(eager.even_chunks(slice(5, 5), 40)) == []
