"""Plans for one GPU: seconds follow arithmetic that can be done by hand, and the fastest that fits is recommended."""

from dataclasses import replace
from itertools import groupby

import pytest
import torch
from tiny import make_llama
from tiny_runs import make_lora

from fastdpo.ops.engine import engine_of
from fastdpo.training.memory.card.estimates import Estimator, build
from fastdpo.training.memory.card.plans import Estimates, Plan, fastest
from fastdpo.training.memory.card.seconds import StepSeconds, step_seconds
from fastdpo.training.memory.card.settings import CANDIDATES, Settings
from fastdpo.training.memory.cluster.hardware import Gpu
from fastdpo.training.memory.cluster.sizes import model_sizes
from fastdpo.training.memory.estimate import MIB, MemoryEstimate, planned_impl
from fastdpo.training.memory.weightless import weightless_model

SHAPE = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
PROJECTIONS = 2 * 64 * 64 + 2 * 64 * 32  # of a layer: queries and output; keys and values of two of four heads
MATRICES = 3 * (PROJECTIONS + 3 * 64 * 128)
ADAPTERS = 3 * 4 * (64 + 64 + 64 + 32)  # r=4 on queries and values
ATTENTION = 4 * 64 * 3 * 0.4375 * 100**2  # FLOPs of a pair of 100 tokens
FORWARD = 2 * MATRICES * 100 + ATTENTION  # through the layers
WITH_LORA = FORWARD + 2 * ADAPTERS * 100
HEAD = 2 * 1000 * 64 * 50
GPU = Gpu(flops=1e9 / 0.4, memory_rate=1e9 / 0.8, host_rate=1e6 / 0.8)  # usable: 1e9 FLOP/s, 1e9 and 1e6 bytes/s
FULL = Settings("full", False, "cached", "adamw_torch_fused")
LORA = Settings("lora", True, "adapter", "adamw_torch_fused")


def sizes(lora=False, dtype=torch.float32):
    return model_sizes(weightless_model(make_llama(**SHAPE).config, dtype, make_lora() if lora else None))


def seconds(settings, gpu=GPU, num_pairs=8, largest=450, workspace=400_000, dtype=torch.float32):
    return step_seconds(
        sizes(settings.method != "full", dtype),
        gpu,
        settings,
        num_pairs=num_pairs,
        pair_tokens=100,
        largest_microbatch=largest,
        tile_rows=150,
        workspace_bytes=workspace,
    )


def test_products_take_the_flops_of_all_forwards_and_of_backward():
    found = seconds(FULL)
    assert found.microbatches == 2  # four pairs of 100 tokens fit
    flops = 3 * FORWARD + (FORWARD + HEAD) / 3 + 3 * HEAD  # cached log-probs: a forward in three epochs
    assert found.compute == pytest.approx(8 * flops / 1e9)
    again = seconds(replace(FULL, checkpointing=True))
    assert again.compute - found.compute == pytest.approx(8 * FORWARD / 1e9)
    half = seconds(replace(FULL, checkpointing=True, every_n_layers=2))
    assert half.compute - found.compute == pytest.approx(8 * FORWARD / 2 / 1e9)
    frozen = seconds(replace(FULL, reference="frozen"))
    assert frozen.compute - found.compute == pytest.approx(8 * (FORWARD + HEAD) * 2 / 3 / 1e9)
    assert seconds(LORA).compute == pytest.approx(8 * (4 * WITH_LORA + ATTENTION + HEAD + 2 * HEAD) / 1e9)


def test_small_microbatches_take_as_long_as_their_weights_are_read():
    slow = replace(GPU, memory_rate=1e6 / 0.8)
    count = sizes().all.count
    assert seconds(FULL, slow, largest=100).compute == pytest.approx(8 * (3 + 1 / 3) * 2 * count / 1e6)


def test_the_sums_of_dw_are_read_and_written_by_every_chunk_of_rows():
    # 200 rows of 1000 fp16 numbers are 400,000 bytes; the first chunk only writes
    assert seconds(FULL).traffic == pytest.approx(2 * 4 * 1000 * 64 / 1e9)
    assert seconds(FULL, workspace=100_000).traffic == pytest.approx(2 * 7 * 4 * 1000 * 64 / 1e9)
    assert seconds(LORA).traffic == 0


def test_tiles_repeat_projections_with_an_adapter_and_add_up_gradients_of_weights():
    tiles = seconds(replace(LORA, tiles=True))
    assert tiles.compute - seconds(LORA).compute == pytest.approx(8 * 2 * 3 * PROJECTIONS * 100 / 1e9)
    assert tiles.traffic == 0
    full = replace(FULL, checkpointing=True)
    tiled = seconds(replace(full, tiles=True))
    assert tiled.compute == seconds(full).compute
    # 400 rows are three tiles of 150; per weight of the MLP 4 bytes in bf16 and 8 of the sum
    assert tiled.traffic - seconds(full).traffic == pytest.approx(2 * 3 * 12 * 3 * 3 * 64 * 128 / 1e9)


def test_a_base_in_4_bits_is_unpacked_for_every_pass():
    settings = replace(LORA, method="qlora")
    passes = 4  # forward, repeated, backward, and the reference
    expected = 2 * passes * (0.5625 + 2) * (MATRICES + ADAPTERS) / 1e9
    assert seconds(settings).traffic == pytest.approx(expected)
    assert seconds(settings).compute == seconds(LORA).compute


def test_copies_to_the_host_count_as_far_as_layers_do_not_hide_them():
    offload = replace(LORA, offload=True)
    copies, forward = 3 * 100 * 64 * 2 / 1e6, WITH_LORA / 1e9
    assert forward < copies < 2 * forward  # hidden by backward alone
    assert seconds(offload).bus == pytest.approx(8 * (copies - forward))
    slower = seconds(offload, replace(GPU, host_rate=0.25e6 / 0.8))
    assert slower.bus == pytest.approx(8 * (2 * 4 * copies - 3 * forward))
    assert seconds(offload, replace(GPU, host_rate=1e9)).bus == 0
    assert seconds(replace(FULL, checkpointing=True, offload=True)).bus > seconds(offload).bus  # 4 bytes in fp32


def test_an_update_reads_and_writes_weight_gradient_and_moments():
    trained = sizes().all.trained
    assert seconds(FULL).optimizer == pytest.approx(28 * trained / 1e9)
    assert seconds(replace(FULL, optim="adamw_bnb_8bit")).optimizer == pytest.approx(16 * trained / 1e9)
    paged = seconds(replace(FULL, optim="paged_adamw_8bit")).optimizer
    assert paged == pytest.approx(16 * trained / 1e9 + 4 * trained / 1e6)
    in_backward = replace(FULL, optim="adamw_bnb_8bit", weight_rounding="stochastic", in_backward=True)
    found = seconds(in_backward, dtype=torch.bfloat16)
    assert found.microbatches == 8  # a step is one pair
    assert found.optimizer == pytest.approx(8 * 10 * trained / 1e9)


def plan_of(settings):
    return Plan(settings, 1000, MemoryEstimate(*[0] * 8))


def timed(settings, total):
    return plan_of(settings), None if total is None else StepSeconds(1, total, 0, 0, 0)


def test_the_fastest_of_those_that_update_alike_is_taken():
    tiles, offload = replace(LORA, tiles=True), replace(LORA, offload=True)
    for bus, best in ((GPU.host_rate, tiles), (1e9, offload)):  # a slow bus, and a fast one
        gpu = replace(GPU, host_rate=bus)
        found = fastest([(plan_of(settings), seconds(settings, gpu)) for settings in (tiles, offload)])
        assert [plan.settings for plan in found] == [best]


def test_updates_that_round_less_come_first_where_they_take_the_pair():
    in_8_bit = replace(FULL, optim="adamw_bnb_8bit")
    both = fastest([timed(FULL, 3.0), timed(in_8_bit, 1.0), timed(LORA, 2.0)])
    assert [plan.settings for plan in both] == [FULL, LORA]
    assert [plan.settings for plan in fastest([timed(FULL, None), timed(in_8_bit, 1.0)])] == [in_8_bit]
    assert [plan.settings for plan in fastest([timed(FULL, None), timed(in_8_bit, None)])] == [FULL]


@pytest.mark.skipif(planned_impl() != "triton", reason="only the kernels' workspace grows")
def test_the_workspace_of_a_trained_head_is_what_is_left_and_a_frozen_one_keeps_its_own():
    config = make_llama(vocab_size=262_144, hidden_size=1024, num_hidden_layers=1).config
    trained = Estimator(build(config, 8, True, "nearest"), replace(FULL, reference="", optim=""))
    half = 2 * 262_144 * 1024  # of dW's fp32 sums
    assert [trained.workspace(free) // MIB for free in (0, 700 * MIB, 2**40)] == [256, 350, half // MIB]
    small, large = (trained(FULL, 4096, workspace) for workspace in (None, half))
    assert large.head - small.head == pytest.approx(half - 256 * MIB, rel=0.05)
    assert Estimator(build(config, 8, False, "nearest"), replace(LORA, reference="", optim="")).workspace(2**40) is None


@pytest.mark.skipif(planned_impl() != "triton", reason="only the kernels' workspace grows")
def test_a_plan_takes_the_workspace_that_fits_beside_the_pair_and_names_it():
    config = make_llama(vocab_size=262_144, hidden_size=1024, num_hidden_layers=1).config
    estimates = Estimates(config, 8, [FULL])
    ((_, estimate),) = estimates.candidates
    memory = 20_000 * MIB
    (plan,) = estimates.plans(memory, 256)
    least = estimate(FULL, plan.tokens).total
    assert 256 * MIB <= plan.workspace_bytes == estimate.workspace(int(memory * 0.95) - least + 256 * MIB)
    assert plan.estimate == estimate(FULL, plan.tokens, plan.workspace_bytes)
    assert plan.estimate.total <= memory * 0.95
    assert f"--workspace_bytes {plan.workspace_bytes} " in plan.options(8)
    (of_length,) = estimates.at_length(1024)
    assert of_length.workspace_bytes == 256 * MIB == engine_of("triton").workspace_bytes
    assert of_length.estimate == estimate(FULL, 1024)


def test_candidates_are_different_and_those_that_update_alike_stand_together():
    assert len(set(CANDIDATES)) == len(CANDIDATES)
    updates = [(settings.method, settings.update) for settings in CANDIDATES]
    assert len(list(groupby(updates))) == len(set(updates))
