"""The original release (github.com/eric-mitchell/direct-preference-optimization) written out: summed response log-probs
from the full logits of separate, unpadded forwards, and the losses of its `preference_loss`, one number at a time.
"""

import math

import pytest
import torch
from tiny import make_llama

from fastdpo import TokenizedPair, pack_pairs, packed_logps, preference_loss

PAIRS = [
    TokenizedPair([1, 2, 3], [4, 5], [6]),
    TokenizedPair([7, 8], [9, 4, 4, 4], [9, 10, 11, 12]),
    TokenizedPair([1, 2, 3, 4, 5, 6], [13], [14, 15, 16]),
]
BETA = 0.4
OPTIONS = {
    "sigmoid": {},
    "cDPO": {"label_smoothing": 0.2},
    "reference_free": {"reference_free": True},
    "ipo": {"ipo": True},
}


def response_logp(model, prompt_ids, response_ids):
    """log p(response | prompt), summed over its tokens."""
    logps = model(input_ids=torch.tensor([[*prompt_ids, *response_ids]])).logits[0].double().log_softmax(-1)
    positions = range(len(prompt_ids) - 1, len(prompt_ids) + len(response_ids) - 1)  # each predicts the token after it
    return sum(logps[position, token] for position, token in zip(positions, response_ids, strict=True))


def original_loss(policy, reference, label_smoothing=0.0, ipo=False, reference_free=False):
    """DPO, eq. 7; cDPO mixes in the loss of the flipped pair; IPO, eq. 17, with log-probs that are sums over tokens."""
    margin = policy[0] - policy[1] - (0.0 if reference_free else reference[0] - reference[1])
    if ipo:
        return (margin - 1 / (2 * BETA)) ** 2
    as_labelled, as_flipped = (-torch.log(1 / (1 + torch.exp(-sign * BETA * margin))) for sign in (1, -1))
    return (1 - label_smoothing) * as_labelled + label_smoothing * as_flipped


@pytest.mark.parametrize("name", OPTIONS)
def test_losses_rewards_and_gradients_are_those_of_the_original_release(name):
    plain, packed, reference = make_llama(seed=0), make_llama(seed=0), make_llama(seed=1)
    policy_logps = [[response_logp(plain, p.prompt_ids, r) for r in p.responses] for p in PAIRS]
    with torch.no_grad():
        ref_logps = [[response_logp(reference, p.prompt_ids, r) for r in p.responses] for p in PAIRS]
    expected = torch.stack(
        [original_loss(pi, ref, **OPTIONS[name]) for pi, ref in zip(policy_logps, ref_logps, strict=True)]
    )
    expected.mean().backward()

    batch = pack_pairs(PAIRS)
    ours = packed_logps(packed, batch)
    with torch.no_grad():
        ours_ref = packed_logps(reference, batch)
    losses, chosen, rejected = preference_loss(
        ours.chosen, ours.rejected, ours_ref.chosen, ours_ref.rejected, BETA, **OPTIONS[name]
    )
    losses.mean().backward()

    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    assert not chosen.requires_grad
    assert not rejected.requires_grad
    for rewards, side in ((chosen, 0), (rejected, 1)):
        logratios = [pi[side].item() - ref[side].item() for pi, ref in zip(policy_logps, ref_logps, strict=True)]
        assert rewards.tolist() == pytest.approx([BETA * x for x in logratios], abs=1e-5)
    for (parameter, own), other in zip(packed.named_parameters(), plain.parameters(), strict=True):
        off = (own.grad - other.grad).norm() / other.grad.norm()
        assert off < 1e-5, f"{parameter}: {off:.1e}"


def test_an_untrained_pair_costs_ln_2_and_ipo_its_target_squared():
    """The numbers that the original release prints first, policy and reference being one model."""
    zeros = [torch.zeros(1)] * 4
    assert preference_loss(*zeros, BETA)[0].item() == pytest.approx(math.log(2))
    assert preference_loss(*zeros, BETA, ipo=True)[0].item() == pytest.approx((1 / (2 * BETA)) ** 2)
