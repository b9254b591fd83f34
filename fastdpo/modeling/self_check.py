"""Does this model give the same log-probs packed as it does one sequence at a time? Asked of the user's model before
training.

Some architectures drop the arguments that packing travels by, mix neighbouring tokens outside attention, or never
call an attention function. For these a packed row would leak between sequences, so nothing is assumed from the
model's name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdpo.data.packing import pack_pairs
from fastdpo.modeling.packed import bare_model, packed_logps
from fastdpo.types import TokenizedPair

# Largest difference of a summed log-prob, relative to 1 + its size, that rounding explains. Leaks are seen from 1e-2
# upwards.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class PackingCheck:
    """Whether packed rows are exact on a model, with the largest relative error seen or why it could not run."""

    ok: bool
    error: float  # of summed log-probs, relative to 1 + their size; inf where packing raised
    reason: str


def check_packing(model: nn.Module, *, impl: str = "auto") -> PackingCheck:
    """Compares `packed_logps` with separate unpadded forwards of the stock model on a few short pairs of random tokens.

    Leaves the random state, the mode and the gradients of the model as they were.
    """
    bare = bare_model(model)
    device = next(bare.parameters()).device
    vocab_size = bare.get_output_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        return torch.randint(vocab_size, (length,), generator=generator).tolist()

    pairs = [TokenizedPair(draw(p), draw(c), draw(r)) for p, c, r in ((3, 4, 2), (5, 1, 3), (1, 3, 5))]
    batch = pack_pairs(pairs).to(device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            expected = _stock_sums(model, pairs, device)
            # anything a model may raise on arguments it does not know means the same: it cannot be packed
            try:
                packed = packed_logps(model, batch, impl=impl).sequences.sums.double()
            except Exception as refusal:
                return PackingCheck(False, float("inf"), f"{type(refusal).__name__}: {refusal}")
    finally:
        model.train(was_training)
    error = ((packed - expected).abs() / (1 + expected.abs())).max().item()
    tolerance = _TOLERANCE[next(bare.parameters()).dtype]
    if error <= tolerance:
        return PackingCheck(True, error, f"packed and separate log-probs agree to {error:.1e}")
    return PackingCheck(
        False,
        error,
        f"packed log-probs differ from separate ones by {error:.1e} (rounding explains {tolerance:.0e}):"
        " tokens of one sequence reach another",
    )


def _stock_sums(model: nn.Module, pairs: list[TokenizedPair], device: torch.device) -> Tensor:
    """(S,) fp64 log-probs of every response from the model's own forward and full logits, one sequence at a time."""
    sums = []
    for pair in pairs:
        for response in pair.responses:
            input_ids = torch.tensor([[*pair.prompt_ids, *response]], device=device)
            logps = model(input_ids=input_ids, use_cache=False).logits[0].double().log_softmax(-1)
            rows = torch.arange(len(pair.prompt_ids) - 1, input_ids.shape[1] - 1, device=device)
            sums.append(logps[rows, input_ids[0, rows + 1]].sum())
    return torch.stack(sums)
