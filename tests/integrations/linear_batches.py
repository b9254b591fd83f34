"""Batches of sequences as collators make them, for the losses that take hidden states."""

from dataclasses import dataclass

import torch

L, H, V = 7, 24, 131


@dataclass
class Batch:
    """The arguments of one call, and the leaves among them."""

    weight: torch.Tensor
    hidden: torch.Tensor
    target: torch.Tensor
    bias: torch.Tensor | None
    ref_input: torch.Tensor
    ref_weight: torch.Tensor
    ref_bias: torch.Tensor | None

    @property
    def leaves(self):
        return [x for x in (self.weight, self.hidden, self.bias) if x is not None]

    def policy(self):
        return self.weight, self.hidden, self.target, self.bias

    def reference(self):
        return {"ref_input": self.ref_input, "ref_weight": self.ref_weight, "ref_bias": self.ref_bias}

    def to(self, dtype):
        def cast(x):
            return x if x is None or x.dtype == torch.int64 else x.detach().to(dtype)

        batch = Batch(*(cast(x) for x in vars(self).values()))
        for leaf in batch.leaves:
            leaf.requires_grad_()
        return batch


def make_batch(num_pairs=3, dtype=torch.float64, has_bias=False, ignore_index=-100, seed=0):
    """Prompts of different lengths in front and padding behind, as collators make them."""
    g = torch.Generator().manual_seed(seed)
    shape = (2 * num_pairs, L)
    target = torch.randint(V, shape, generator=g)
    for s in range(2 * num_pairs):
        target[s, : s % 3] = ignore_index
        target[s, L - (2 * s) % 5 :] = ignore_index
    return Batch(
        weight=torch.randn(V, H, generator=g) / 3,
        hidden=torch.randn(*shape, H, generator=g),
        target=target,
        bias=torch.randn(V, generator=g) if has_bias else None,
        ref_input=torch.randn(*shape, H, generator=g),
        ref_weight=torch.randn(V, H, generator=g) / 3,
        ref_bias=torch.randn(V, generator=g) if has_bias else None,
    ).to(dtype)


def run(call, batch, *args, **kwargs):
    """Loss, everything beside it, and the gradient of every leaf for a loss that is scaled afterwards."""
    loss, logged = call(*args, **kwargs)
    return [loss, *logged, *torch.autograd.grad(loss * 2.5, batch.leaves)]
