"""Any groups: packed, padded, merged and split batches have the log-probs of separate sequences, in fp64."""

from operator import itemgetter

import numpy as np
import pytest
import torch
from fuzzing import assert_ours, fuzz
from hypothesis import strategies as st
from tiny import make_llama

from fastdpo.data.batches.packing import pack_pairs
from fastdpo.losses import LOSSES, pair_scores, preference_losses
from fastdpo.modeling.packed import packed_logps
from fastdpo.modeling.prepared import prepare_model
from fastdpo.training import DPOConfig
from fastdpo.training.inputs.collator import PackingCollator, microbatches_of
from fastdpo.types import PackedBatch, TokenizedGroup

VOCAB = 7
ids = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6)


@st.composite
def groups(draw):
    """A group whose responses often begin alike, or like those of the group before."""
    start = draw(st.sampled_from([[], [3], [3, 4, 5]]))
    prompt = draw(st.one_of(st.just([1, 2]), st.lists(st.integers(0, VOCAB - 1), max_size=5)))
    responses = [start[: draw(st.integers(0, 3))] + draw(ids) for _ in range(draw(st.integers(2, 4)))]
    masks = None
    if draw(st.booleans()):
        masks = [[draw(st.booleans()) for _ in response] for response in responses]
    sides = st.integers(0, len(responses) - 1)
    pairs = draw(st.lists(st.tuples(sides, sides).filter(lambda pair: pair[0] != pair[1]), min_size=1, max_size=4))
    ref_logps = [float(-n) for n in range(len(responses))] if draw(st.booleans()) else None
    return TokenizedGroup(prompt, responses, masks, ref_logps, tuple(pairs))


batches = st.tuples(
    st.lists(groups(), min_size=1, max_size=4),
    st.fixed_dictionaries(
        {
            "is_packed": st.booleans(),
            "prefix_sharing": st.booleans(),
            "max_tokens": st.sampled_from([None, 1, 8, 20]),
            "pad_to_multiple_of": st.sampled_from([None, 8]),
        }
    ),
)


@pytest.fixture(scope="module")
def model():
    return prepare_model(make_llama(VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1).double().eval())


def separate_sums(model, groups):
    """The summed log-probs of the responses of each group, each sequence in a row of its own."""
    sequences = [[*group.prompt_ids, *response] for group in groups for response in group.responses]
    width = max(map(len, sequences))
    tokens = torch.tensor([sequence + [0] * (width - len(sequence)) for sequence in sequences])
    rows = iter(zip(tokens, model(input_ids=tokens, use_cache=False).logits.log_softmax(-1), strict=True))
    sums = []
    for group in groups:
        sums.append([])
        for k, response in enumerate(group.responses):
            row, logps = next(rows)
            mask = [True] * len(response) if group.loss_masks is None else group.loss_masks[k]
            start = len(group.prompt_ids)
            counted = [start + i for i, keep in enumerate(mask) if keep and start + i > 0]
            sums[-1].append(sum(float(logps[i - 1, row[i]]) for i in counted))
    return sums


def test_any_batch_has_the_log_probs_of_separate_sequences(model):
    def check(case):
        of_batch, options = case
        rows = [
            {
                "prompt_ids": group.prompt_ids,
                "responses": group.responses,
                "loss_masks": group.loss_masks,
                "ref_logps": group.ref_logps,
                "preferences": group.preferences,
            }
            for group in of_batch
        ]
        with torch.no_grad():
            expected = [
                (i, sums[chosen], sums[rejected])
                for i, (group, sums) in enumerate(zip(of_batch, separate_sums(model, of_batch), strict=True))
                for chosen, rejected in group.preferences
            ]
            found, parts = [], microbatches_of(PackingCollator(**options)(rows))
            for part in parts:
                batch = PackedBatch(**part)
                logps = packed_logps(model, batch)
                examples = batch.example_ids[batch.pairs[:, 0]].tolist()
                found += zip(examples, logps.chosen.tolist(), logps.rejected.tolist(), strict=True)
        assert len(found) == len(expected)
        np.testing.assert_allclose(sorted(found, key=itemgetter(0)), expected, rtol=1e-9, atol=1e-9)
        return "split" if len(parts) > 1 else "whole"

    outcomes = fuzz("packing", batches, check)
    assert outcomes["split"] > 20, outcomes


LOSSES_OF_SUMS = sorted(name for name, loss in LOSSES.items() if loss.unit == "pair")
numbers = st.one_of(st.floats(-60, 0), st.sampled_from([0.0, -1e4, -745.0]))


@st.composite
def rankings(draw):
    """Log-probs of 2 to 5 responses and pairs of them, a loss and where the pairs are split."""
    num_responses = draw(st.integers(2, 5))
    sides = st.integers(0, num_responses - 1)
    pairs = draw(st.lists(st.tuples(sides, sides).filter(lambda pair: pair[0] != pair[1]), min_size=2, max_size=6))
    policy, reference = (draw(st.lists(numbers, min_size=num_responses, max_size=num_responses)) for _ in range(2))
    lengths = draw(st.lists(st.integers(1, 9), min_size=num_responses, max_size=num_responses))
    return pairs, policy, reference, lengths, draw(st.sampled_from(LOSSES_OF_SUMS)), draw(st.integers(1, len(pairs)))


def test_the_loss_of_several_responses_is_that_of_their_pairs_and_of_the_parts_of_a_split():
    smoothed = {name: 0.1 if LOSSES[name].smoothed else 0.0 for name in LOSSES_OF_SUMS}
    configs = {
        name: DPOConfig("unused", loss_type=[name], label_smoothing=smoothed[name], use_cpu=True, report_to="none")
        for name in LOSSES_OF_SUMS
    }

    def check(case):
        pairs, policy, reference, lengths, name, cut = case
        mean_length = torch.tensor(2.5, dtype=torch.float64)  # of the optimizer step
        of_responses = torch.tensor(policy).double(), torch.tensor(lengths), torch.tensor(reference).double()

        def losses(some):
            scores = pair_scores(torch.tensor(some), *of_responses, configs[name], mean_chosen_length=mean_length)
            return preference_losses(scores, configs[name])

        whole = losses(pairs)
        torch.testing.assert_close(torch.cat([losses([pair]) for pair in pairs]), whole, rtol=1e-12, atol=1e-12)
        parts = [losses(some).sum() for some in (pairs[:cut], pairs[cut:]) if some]
        torch.testing.assert_close(sum(parts), whole.sum(), rtol=1e-9, atol=1e-9)
        assert whole.isfinite().all()
        return name

    outcomes = fuzz("losses", rankings(), check)
    assert len(outcomes) == len(LOSSES_OF_SUMS), outcomes


def test_any_group_is_made_or_refused():
    anything = st.one_of(st.none(), st.lists(st.integers(-2, 9), max_size=3), st.text(max_size=2), st.integers(-2, 3))
    cases = st.tuples(
        anything,
        st.one_of(anything, st.lists(anything, max_size=3)),
        st.one_of(st.none(), anything, st.lists(anything, max_size=3)),
        st.one_of(st.just(((0, 1),)), anything, st.lists(anything, max_size=2)),
    )

    def check(case):
        prompt, responses, masks, preferences = case
        try:
            group = TokenizedGroup(prompt, responses, masks, None, preferences)
            pack_pairs([group])
        except ValueError as error:
            assert_ours(error)
            return "refused"
        return "packed"

    fuzz("groups", cases, check)
