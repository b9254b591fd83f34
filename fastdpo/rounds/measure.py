"""Measures a round's model on held-out prompts: judged reward, and distance from the start. Stores its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastdpo.alignment.generate import Samples, kl_to_reference
from fastdpo.alignment.results import Estimate
from fastdpo.report.sections import Response, Sample
from fastdpo.rounds.endpoint import EndpointJudge
from fastdpo.rounds.generate import Prompt, Sampling, as_completion, as_texts, prompt_ids, sample_ids, shown
from fastdpo.rounds.iterate import win_rate
from fastdpo.rounds.judges import Judge, judged
from fastdpo.rounds.state import read_json, write_json


def measure(
    model: Any,
    tokenizer: Any,
    judge: Judge | EndpointJudge,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    start: Any,
    start_file: Path,
    answers_file: Path | None = None,
) -> dict[str, float]:
    """Mean judged reward, win rate against the start, KL to the start, tokens.

    The KL is exact per token on the policy's own samples (see `kl_to_reference`). At temperature 1, this is an unbiased
    estimate of KL(policy || start).

    Args:
        start: the start's model; None if `model` is the start. Its answers are then stored in `start_file`.
        answers_file: where the answers of another model are stored.
    Raises:
        ValueError: the judge gives fewer than two scores, or a score is not a number.
    """
    one = replace(sampling, num_responses=1)
    said_ids = tuple(drawn[0] for drawn in sample_ids(model, tokenizer, prompts, one, sampling.seed))
    answers = [as_texts(tokenizer, p, [ids])[0] for p, ids in zip(prompts, said_ids, strict=True)]
    known: dict[str, Any] = read_json(start_file) if start is not None else {"answers": answers}
    if isinstance(judge, EndpointJudge):
        both = [judge.judged(shown(p), [a, s]) for p, a, s in zip(prompts, answers, known["answers"], strict=True)]
        scores: list[float | None] = [pair[0] for pair, _ in both]
        start_scores: list[float | None] = [pair[1] for pair, _ in both]
        judge.check_any(counts for _, counts in both)
    else:
        said = [as_completion(prompt, text) for prompt, text in zip(prompts, answers, strict=True)]
        scores = judged(judge, prompts, said)
        start_scores = scores if start is None else known["scores"]
    if (file := start_file if start is None else answers_file) is not None:
        write_json(file, {"prompts": list(map(shown, prompts)), "answers": answers, "scores": scores})
    ids = tuple(prompt_ids(tokenizer, prompt, sampling.chat_template_kwargs) for prompt in prompts)
    samples = Samples(tuple(map(shown, prompts)), tuple(answers), ids, said_ids)
    kl = [0.0] * len(prompts) if start is None else kl_to_reference(model, start, samples, batch_size=8)
    scored = [score for score in scores if score is not None]
    if len(scored) < 2:
        raise ValueError(f"judge must score at least two held-out answers, got {len(scored)} scores")
    reward = Estimate.of(scored)
    estimate = Estimate.of(kl)
    return {
        "reward": reward.mean,
        "reward_stderr": reward.stderr,
        "win_rate": win_rate(scores, start_scores),
        "kl": estimate.mean,
        "kl_stderr": estimate.stderr,
        "tokens": sum(map(len, said_ids)) / len(said_ids),
    }


def answers_side_by_side(files: Mapping[str, Path], num_prompts: int = 12) -> list[Sample]:
    """The answers that `measure` stored, for a page.

    Args:
        files: by name of the model. Files that do not exist are left out.
        num_prompts: the first prompts.
    """
    found = {name: read_json(file) for name, file in files.items() if file.is_file()}
    prompts: list[str] = next((of["prompts"] for of in found.values() if "prompts" in of), [])  # older files lack them
    samples = []
    for number, prompt in enumerate(prompts[:num_prompts]):
        said = [
            Response(name, of["answers"][number], "" if (score := of["scores"][number]) is None else f"{score:.3g}")
            for name, of in found.items()
        ]
        samples.append(Sample(prompt, said))
    return samples
