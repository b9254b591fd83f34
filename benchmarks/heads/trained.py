"""Hidden states, a head and labels whose softmaxes look like a trained language model's, at any size.

Random weights have a flat softmax, which says nothing about skipping. Here token ids are frequency ranks and

    logit_tv = log u_v + C_v . (sigma g_t + alpha_t C_{c_t})

with u a Zipf law whose exponent puts `TAIL_SHARE` of its mass outside the first `TOP` ids, C random unit vectors, g
Gaussian noise that gives every row an order of its own, and c_t a token drawn from u that the context points to.
alpha_t is set so that c_t has probability about pi_t among the others; pi_t spreads from rows that are nearly certain
to rows that are not. Labels are drawn from the softmax itself: the model is calibrated. `Statistics` says what came
out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastdpo.evidence.bench.heads.problem import Shape

TOP = 1000
TAIL_SHARE = 0.1
SIGMA = 1.5  # nats: how far a row's logits are from the unigram's
CERTAINTY = (1.5, 2.5)  # mean and deviation of logit pi_t
UNIGRAM_UNIT = 16.0  # of hidden unit 0, whose weights are log u / 16: as large as the others'
CHUNK_ROWS = 256


@dataclass(frozen=True)
class TrainedHead:
    hidden_states: Tensor  # (T, H)
    weight: Tensor  # (V, H)
    labels: Tensor  # (T,) int64
    rank: Tensor  # (V,) int64, of each id by the frequency that the head was built from


@dataclass(frozen=True)
class Statistics:
    """What is true of the numbers that the benchmark runs on, measured from their logits."""

    zipf_exponent: float  # -slope of log mean probability over log rank, ranks 10 to V / 10
    mean_entropy: float  # nats
    labels_outside_top: float  # share of labels that are not among the TOP most frequent ids
    mean_largest: float  # mean over rows of the largest probability
    mass_outside_own_top: float  # mean over rows of the mass outside the row's own TOP ids


def trained_head(shape: Shape, seed: int = 0) -> TrainedHead:
    """T = num_rows. Ids in order of frequency, the most frequent first."""
    T, H, V = shape.num_rows, shape.hidden_size, shape.vocab_size
    if V < 2 * TOP:
        raise ValueError(f"the vocabulary must have at least {2 * TOP} ids, got {V}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    log_unigram = zipf(V, zipf_exponent(V)).to(device)
    weight = torch.cat([log_unigram[:, None] / UNIGRAM_UNIT, randn(V, H - 1) / math.sqrt(H - 1)], 1)
    context = torch.multinomial(log_unigram.exp(), T, replacement=True, generator=generator)
    mean, deviation = CERTAINTY
    alpha = mean + deviation * randn(T) - log_unigram[context] + SIGMA**2 / 2
    hidden_states = alpha.clamp(min=0)[:, None] * weight[context] + SIGMA * randn(T, H)
    hidden_states[:, 0] = UNIGRAM_UNIT
    hidden_states, weight = hidden_states.to(shape.torch_dtype), weight.to(shape.torch_dtype)
    chunks = [
        torch.multinomial(rows.softmax(-1), 1, generator=generator)[:, 0] for rows in _logits(hidden_states, weight)
    ]
    return TrainedHead(hidden_states, weight, torch.cat(chunks), torch.arange(V, device=device))


def permuted(head: TrainedHead, seed: int = 1) -> TrainedHead:
    """The same distribution under random ids, as tokenizers that were not sorted by frequency have them."""
    generator = torch.Generator(head.weight.device).manual_seed(seed)
    old = torch.randperm(len(head.weight), generator=generator, device=head.weight.device)  # old[new id] = id by rank
    new = torch.empty_like(old).scatter_(0, old, torch.arange(len(old), device=old.device))
    return replace(head, weight=head.weight[old], labels=new[head.labels], rank=head.rank[old])


def zipf(num_vocab: int, exponent: float) -> Tensor:
    """(V,) log-probabilities proportional to rank ** -exponent, fp32."""
    return (-exponent * torch.arange(1, num_vocab + 1, dtype=torch.float64).log()).log_softmax(0).float()


def zipf_exponent(num_vocab: int) -> float:
    """The exponent that leaves TAIL_SHARE of the mass outside the first TOP ids, by bisection."""
    low, high = 0.0, 8.0
    for _ in range(50):
        middle = (low + high) / 2
        tail = zipf(num_vocab, middle)[TOP:].exp().sum().item()
        low, high = (middle, high) if tail > TAIL_SHARE else (low, middle)
    return low


def statistics(head: TrainedHead) -> Statistics:
    V = len(head.weight)
    total = torch.zeros(V, dtype=torch.float64, device=head.weight.device)
    entropy = largest = own_tail = 0.0
    for logits in _logits(head.hidden_states, head.weight):
        logps = logits.log_softmax(-1)
        probs = logps.exp()
        total += probs.double().sum(0)
        entropy -= (probs * logps).sum().item()
        largest += probs.amax(-1).sum().item()
        own_tail += (1 - probs.topk(TOP).values.sum(-1)).sum().item()
    T = len(head.labels)
    mean = (total / T).sort(descending=True).values[9 : V // 10].cpu()
    log_rank = torch.arange(10, 10 + len(mean), dtype=torch.float64).log()
    slope = torch.linalg.lstsq(torch.stack([log_rank, torch.ones_like(log_rank)], 1), mean.log()[:, None]).solution[0]
    outside = (head.rank[head.labels] >= TOP).double().mean().item()
    return Statistics(-slope.item(), entropy / T, outside, largest / T, own_tail / T)


def _logits(hidden_states: Tensor, weight: Tensor):  # yields (<= CHUNK_ROWS, V) fp32
    for rows in hidden_states.split(CHUNK_ROWS):
        yield (rows @ weight.T).float()
