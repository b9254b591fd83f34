"""Checkpoints in host memory: the same numbers, in the order of the layers, each on its way before its use."""

import pytest
import torch
from tiny import make_llama

from fastdpo import TokenizedPair, pack_pairs
from fastdpo.evidence.memory import peak_live_bytes
from fastdpo.modeling import packed_loss, prepare_model
from fastdpo.modeling.offload import PlainCopies, offload_checkpoints

NUM_LAYERS = 5


class Watched(PlainCopies):
    """Records what is asked for; marks are the numbers of the copies."""

    def __init__(self):
        self.events, self.buffers = [], []

    def buffer(self, shape, dtype):
        self.buffers.append(super().buffer(shape, dtype))
        return self.buffers[-1]

    def name(self, buffer):
        return next(number for number, known in enumerate(self.buffers) if known is buffer)

    def to_host(self, tensor, buffer):
        super().to_host(tensor, buffer)
        self.events.append(("out", self.name(buffer)))
        return self.events[-1]

    def to_device(self, buffer, device):
        self.events.append(("in", self.name(buffer)))
        return super().to_device(buffer, device)[0], self.events[-1]

    def wait(self, mark):
        self.events.append(("wait", *mark))


def make_model(**overrides):
    model = make_llama(num_hidden_layers=NUM_LAYERS, **overrides)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return prepare_model(model).train()


def make_batch(*lengths):
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(32, (length,), generator=draw).tolist() for length in lengths]
    return pack_pairs([TokenizedPair(*ids)])


def gradients(model, batch):
    model.zero_grad(set_to_none=True)
    loss, _ = packed_loss(model, batch, lambda sums, *_: sums[0] - sums[1])
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_each_checkpoint_leaves_after_its_copy_and_comes_back_one_layer_early():
    model, batch, copies = make_model(), make_batch(9, 5, 4), Watched()
    expected = gradients(model, batch)
    offload_checkpoints(model, copies, least_bytes=0)
    found = gradients(model, batch)
    assert all(torch.equal(found[name], expected[name]) for name in expected)  # the same numbers in other places
    forward = [("out", 0), ("wait", "out", 0), ("out", 1), ("wait", "out", 1), ("out", 2), ("wait", "out", 2)]
    forward += [("out", 3), ("wait", "out", 3), ("out", 4)]
    backward = [("wait", "out", 4), ("in", 3), ("wait", "in", 3), ("in", 2), ("wait", "in", 2), ("in", 1)]
    backward += [("wait", "in", 1), ("in", 0), ("wait", "in", 0)]
    assert copies.events == forward + backward


def test_buffers_serve_later_steps_and_forwards_without_backward():
    model, batch, copies = make_model(), make_batch(9, 5, 4), Watched()
    offload_checkpoints(model, copies, least_bytes=0)
    for _ in range(3):
        gradients(model, batch)
    loss, _ = packed_loss(model, batch, lambda sums, *_: sums.sum())
    last = copies.events[-1]
    del loss  # a step that ran out of memory
    assert last[0] == "out"
    assert copies.events[-1] == ("wait", *last)  # the device's memory is not used again before the copy's end
    gradients(model, batch)
    assert len(copies.buffers) == NUM_LAYERS


def test_two_forwards_before_their_backwards_keep_their_own_checkpoints():
    model, copies = make_model(), Watched()
    one, other = make_batch(9, 5, 4), make_batch(3, 7, 6)
    parts = gradients(model, one), gradients(model, other)
    expected = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    offload_checkpoints(model, copies, least_bytes=0)
    model.zero_grad()
    losses = [packed_loss(model, batch, lambda sums, *_: sums[0] - sums[1])[0] for batch in (one, other)]
    for loss in losses:
        loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_small_tensors_stay_on_the_device():
    model, copies = make_model(), Watched()
    offload_checkpoints(model, copies)
    gradients(model, make_batch(9, 5, 4))
    assert copies.events == []


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_the_device_holds_two_checkpoints_and_not_one_for_each_layer(use_reentrant):
    """Buffers of PlainCopies are outside of PyTorch's allocator: what is counted is what a GPU would hold."""
    model = make_llama(
        num_hidden_layers=12, hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1
    )
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})
    prepare_model(model).train().requires_grad_(False)
    model.enable_input_require_grads()
    batch = make_batch(256, 128, 128)

    def step():
        packed_loss(model, batch, lambda sums, *_: sums[0] - sums[1])[0].backward()

    plain = peak_live_bytes(step)
    offload_checkpoints(model, PlainCopies())
    saved = plain - peak_live_bytes(step)
    assert saved >= 9 * 512 * 64 * 4  # of 12 checkpoints
