"""Plans past one GPU: sizes, traffic, memory and time follow arithmetic that can be done by hand."""

import pytest
import torch
from tiny import make_llama
from tiny_runs import make_lora

from fastdpo.training.memory.cluster import plans
from fastdpo.training.memory.cluster.hardware import make_cluster
from fastdpo.training.memory.cluster.holding import process_memory
from fastdpo.training.memory.cluster.layouts import Layout, layouts_for
from fastdpo.training.memory.cluster.plans import BF16, largest, make_cluster_plans
from fastdpo.training.memory.cluster.sizes import model_sizes
from fastdpo.training.memory.cluster.step_time import flops_of_pair, step_time
from fastdpo.training.memory.cluster.traffic import MicroBatch, transfers
from fastdpo.training.memory.dry_run import StepPeak
from fastdpo.training.memory.weightless import weightless_model

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
LAYER = 4 * 64 * 64 - 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64  # two of four heads hold keys and values; two norms
ENDS = 1000 * 64
NVLINK, IB400 = 450e9, 50e9


def config(**more):
    return make_llama(vocab_size=1000, **SHAPE, **more).config


def sizes(lora=False, **more):
    return model_sizes(weightless_model(config(**more), torch.float32, make_lora() if lora else None))


def cluster(gpus=8, nodes=2, memory=10**9, gpu="h100", interconnect="nvlink,ib400"):
    return make_cluster(gpus, nodes, memory, gpu, interconnect)


def sent(found, kind):
    return sum(transfer.sent for transfer in found if transfer.kind == kind)


NO_BATCH = MicroBatch(0, 0)


def of(layout, batch=NO_BATCH, reference="cached", checkpointing=False, gpus=8):
    lora = reference == "adapter"
    return transfers(sizes(lora), layout, gpus, batch, BF16, checkpointing=checkpointing, reference=reference)


def test_sizes_are_those_of_layers_embedding_and_head():
    found = sizes()
    assert found.layers.count == 3 * LAYER
    assert found.largest_layer.count == LAYER
    assert found.embedding.count == found.head.count == ENDS
    assert found.rest.count == 64  # the last norm
    assert found.all.count == found.all.trained == 3 * LAYER + 2 * ENDS + 64
    assert found.all.num_bytes == 4 * found.all.count
    assert (found.num_layers, found.num_heads, found.num_kv_heads, found.head_dim) == (3, 4, 2, 16)


def test_tied_weights_count_once_and_an_adapter_is_all_that_is_trained():
    assert sizes(tie_word_embeddings=True).head.count == 0
    adapted = sizes(lora=True)
    assert adapted.all.trained == 3 * (4 * (64 + 64) + 4 * (64 + 32))  # r=4 on queries and values
    assert adapted.all.count == sizes().all.count + adapted.all.trained
    assert adapted.embedding.trained == adapted.head.trained == 0


def test_a_network_card_sends_each_gradient_twice_on_a_ring():
    numel = sizes().all.count
    (reduce,) = of(Layout("DDP", copies=16))
    assert reduce.crosses_nodes
    assert reduce.sent == pytest.approx(2 * 4 * numel * 15 / 16)
    assert not of(Layout("DDP", copies=8))[0].crosses_nodes


def test_sharded_weights_are_gathered_for_forward_and_backward():
    numel = sizes().all.count
    found = of(Layout("FSDP2", shards=16))
    assert all(transfer.crosses_nodes and transfer.overlaps for transfer in found)
    assert sent(found, "all_gather") == pytest.approx(
        2 * (2 * numel - ENDS - 64) * 15 / 16
    )  # the head and its norm once
    assert sent(found, "reduce_scatter") == pytest.approx(2 * numel * 15 / 16)
    frozen = of(Layout("FSDP2", shards=16), reference="frozen")
    assert sent(frozen, "all_gather") - sent(found, "all_gather") == pytest.approx(2 * numel * 15 / 16)
    assert sent(frozen, "reduce_scatter") == sent(found, "reduce_scatter")


def test_copies_of_shards_only_exchange_gradients_of_their_part_between_nodes():
    found = of(Layout("HSDP", shards=8, copies=2))
    inside = [transfer for transfer in found if not transfer.crosses_nodes]
    assert {transfer.kind for transfer in inside} == {"all_gather", "reduce_scatter"}
    (between,) = [transfer for transfer in found if transfer.crosses_nodes]
    assert between.sent == pytest.approx(2 * (2 * sizes().all.count / 8) / 2)


def test_tensor_parallelism_reduces_hidden_states_twice_a_layer_and_pass():
    batch = MicroBatch(tokens=100, rows=40)
    found = of(Layout("TP 2", tensor=2), batch)
    hidden = 100 * 64 * 2
    assert sent(found, "all_reduce") == pytest.approx(2 * (2 * 3 * 2 * hidden + hidden + 4 * 40 * 64) / 2)
    assert sent(found, "all_gather") == pytest.approx(4 * 6 * 40)
    again = of(Layout("TP 2", tensor=2), batch, checkpointing=True)
    assert sent(again, "all_reduce") - sent(found, "all_reduce") == pytest.approx(2 * 2 * 3 * hidden / 2)
    for reference in ("frozen", "adapter"):  # one more forward, whose head has no statistics
        more = of(Layout("TP 2", tensor=2), batch, reference)
        assert sent(more, "all_reduce") - sent(found, "all_reduce") == pytest.approx(2 * (2 * 3 + 1) * hidden / 2)
        assert sent(more, "all_gather") - sent(found, "all_gather") == pytest.approx(4 * 3 * 40)


def test_sequence_parallelism_moves_heads_for_tokens():
    # 4 query heads, 2 of keys and of values, repeated to 4 for 4 processes; 16 numbers of 2 bytes; 25 of 100 tokens
    found = of(Layout("FSDP2 x SP 4", shards=8, sequence=4), MicroBatch(100, 40))
    assert sent(found, "all_to_all") == pytest.approx(3 * 2 * (4 + 4 + 4 + 4) * 16 * 25 * 2 * 3 / 4)
    two = of(Layout("FSDP2 x SP 2", shards=8, sequence=2), MicroBatch(100, 40))
    assert sent(two, "all_to_all") == pytest.approx(3 * 2 * (4 + 2 + 2 + 4) * 16 * 50 * 2 / 2)
    frozen = of(Layout("FSDP2 x SP 4", shards=8, sequence=4), MicroBatch(100, 40), "frozen")
    assert sent(frozen, "all_to_all") == pytest.approx(1.5 * sent(found, "all_to_all"))
    log_probs = [transfer for transfer in frozen if transfer.num_processes == 4 and transfer.kind == "all_gather"]
    assert [transfer.num_bytes for transfer in log_probs] == [4 * (1 + 3 + 1) * 40]


def test_a_process_holds_its_part_and_what_runs():
    peak = StepPeak(casts=70, gradients=0, head=5, activations=1000)
    arguments = {"state_bytes": 8 * sizes().all.count, "hidden_bytes": 100, "checkpointing": True}
    whole = process_memory(sizes(), Layout("DDP", copies=4), peak, BF16, **arguments)
    part = process_memory(sizes(), Layout("FSDP2", shards=4), peak, BF16, **arguments)
    assert whole.weights == 4 * part.weights == 4 * sizes().all.count
    assert whole.optimizer == 4 * part.optimizer == 8 * sizes().all.count
    assert whole.gradients == 8 * part.gradients  # DDP holds them in buckets too
    assert (whole.gathered, part.gathered) == (70, 3 * 2 * (ENDS + 64))  # the head, which is larger than four layers
    assert part.activations == whole.activations == 1000
    few_words = model_sizes(weightless_model(make_llama(vocab_size=32, **SHAPE).config, torch.float32))
    gathered = process_memory(few_words, Layout("FSDP2", shards=4), peak, BF16, **arguments).gathered
    assert gathered == 4 * 2 * LAYER  # three and the buffer of gradients
    tensor = process_memory(sizes(), Layout("TP 2", tensor=2), peak, BF16, **arguments)
    assert tensor.activations == 300 + 700 / 2  # a layer's input is on every process
    norms = 3 * 2 * 64 + 64
    assert tensor.weights == pytest.approx(4 * ((sizes().all.count - norms) / 2 + norms))


def test_a_process_holds_its_part_of_a_frozen_reference():
    """A copy that is divided as the policy is, and nothing else."""
    peak = StepPeak(casts=70, gradients=0, head=5, activations=1000)
    numel, norms = sizes().all.count, 3 * 2 * 64 + 64
    cut = (numel - norms) / 2 + norms
    for layout, part in (
        (Layout("DDP", copies=4), numel),
        (Layout("FSDP2", shards=4), numel / 4),
        (Layout("HSDP", shards=4, copies=2), numel / 4),
        (Layout("FSDP2 x SP 4", shards=8, sequence=4), numel / 8),
        (Layout("TP 2", tensor=2), cut),
        (Layout("TP 2 x FSDP2", shards=4, tensor=2), cut / 4),
    ):
        without, frozen = (
            process_memory(
                sizes(), layout, peak, BF16, state_bytes=0, hidden_bytes=0, checkpointing=True, reference_bytes=given
            )
            for given in (0, 4 * numel)
        )
        assert frozen.reference == pytest.approx(4 * part), layout
        assert frozen.total - without.total == pytest.approx(4 * part), layout


def test_flops_are_those_of_products_and_of_attention():
    found = sizes()
    matrices = 3 * (LAYER - 2 * 64)
    attention = 4 * 64 * 3 * 0.4375 * 100**2
    forward, head = 2 * matrices * 100 + attention, 2 * ENDS * 50
    settings = {"repeated": 0, "references": 0}
    assert flops_of_pair(found, 100, full=True, **settings) == pytest.approx(3 * forward + 3 * head)
    settings = {"repeated": 0, "references": 1}
    assert flops_of_pair(found, 100, full=True, **settings) == pytest.approx(4 * forward + 4 * head)
    settings = {"repeated": 1, "references": 1}
    assert flops_of_pair(found, 100, full=False, **settings) == pytest.approx(4 * forward + attention + 3 * head)


def test_a_step_takes_the_longer_of_computing_and_sending():
    arguments = {"num_pairs": 64, "pair_tokens": 100, "largest_microbatch": 450}
    arguments |= {"full": True, "checkpointing": False, "reference": "cached"}
    found = step_time(sizes(), Layout("FSDP2", shards=8, copies=1), cluster(nodes=1), BF16, **arguments)
    assert found.microbatches == 2  # 8 pairs of each GPU, four at a time
    assert found.blocking == 0
    assert found.total == max(found.compute, found.overlapped) + found.optimizer
    slow = step_time(sizes(), Layout("FSDP2", shards=8), cluster(nodes=1, interconnect="eth25"), BF16, **arguments)
    assert slow.overlapped == pytest.approx(found.overlapped * NVLINK / 3.125e9)
    assert slow.total > found.total
    assert slow.sent == found.sent


def test_tensor_and_sequence_parallelism_stay_inside_a_node_and_divide_heads():
    names = [layout.name for layout in layouts_for(cluster(), sizes())]
    # 4 heads, 2 of keys and values; 8 GPUs in a node
    assert names == ["DDP", "FSDP2", "HSDP", "TP 2 x FSDP2", "FSDP2 x SP 4"]
    for layout in layouts_for(cluster(), sizes()):
        assert layout.shards * layout.copies * layout.tensor == 16
    assert [layout.name for layout in layouts_for(cluster(gpus=3, nodes=1), sizes())] == ["DDP", "FSDP2"]
    assert [layout.name for layout in layouts_for(cluster(gpus=1, nodes=2), sizes())] == ["DDP", "FSDP2"]


def test_the_largest_that_fits_is_found_to_the_last_256_tokens():
    assert largest(lambda tokens: tokens <= 1000) == 768
    assert largest(lambda tokens: False) == 0
    assert largest(lambda tokens: True) == plans.MOST_TOKENS


@pytest.fixture(scope="module")
def found():
    return make_cluster_plans(config(), cluster(memory=1000 * 2**20), lora_r=4, pair_tokens=512, num_pairs=64)


def test_plans_that_fit_use_the_memory_and_no_more(found):
    usable = 0.95 * 1000 * 2**20
    for plan in found:
        assert plan.tokens > 0
        assert 0.98 * usable < plan.memory.total <= usable, plan


def test_checkpointing_shards_and_sequence_parallelism_take_longer_pairs(found):
    tokens = {
        (plan.method, plan.layout.name, plan.checkpointing): plan.tokens for plan in found if plan.reference != "frozen"
    }
    assert len(tokens) == 2 * 5 * 2
    for (method, name, checkpointing), longest in tokens.items():
        if not checkpointing:
            assert longest < tokens[method, name, True]
    for checkpointing in (False, True):
        assert tokens["full", "DDP", checkpointing] < tokens["full", "HSDP", checkpointing]
        assert tokens["full", "HSDP", checkpointing] <= tokens["full", "FSDP2", checkpointing]
        longest = tokens["full", "FSDP2 x SP 4", checkpointing]
        assert longest == pytest.approx(4 * tokens["full", "FSDP2", checkpointing], rel=0.02)


def test_a_frozen_reference_costs_memory_and_seconds(found):
    kinds = {(plan.layout.name, plan.checkpointing, plan.reference): plan for plan in found if plan.method == "full"}
    assert len(kinds) == 5 * 2 * 2
    for (name, checkpointing, reference), plan in kinds.items():
        if reference == "frozen":
            cached = kinds[name, checkpointing, "cached"]
            assert plan.memory.reference > cached.memory.reference == 0, (name, checkpointing)
            assert plan.tokens <= cached.tokens, (name, checkpointing)
            assert plan.time.compute > cached.time.compute, (name, checkpointing)
    assert {plan.reference for plan in found if plan.method == "lora"} == {"adapter"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpus": 0}, "gpus must be at least 1, got 0"),
        ({"nodes": -1}, "nodes must be at least 1, got -1"),
        ({"gpu": "h10"}, "gpu must be one of .*got 'h10'; did you mean 'h100'"),
        ({"interconnect": "nvlink,ib40"}, "interconnect must hold names of .*got 'ib40'; did you mean 'ib400'"),
        ({"interconnect": "nvlink"}, "interconnect must name the network inside a node and the one between nodes"),
        ({"interconnect": "nvlink,ib400,ib200"}, "interconnect must name the network inside"),
        ({"interconnect": ""}, "interconnect must hold names"),
    ],
)
def test_what_is_no_cluster_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        cluster(**settings)
