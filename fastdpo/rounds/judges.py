"""Judges by name: functions that score responses. All have the signature of TRL's `reward_funcs`.

    length                 number of characters
    shortest               the same, negated
    regex:PATTERN          matches of a pattern in the response
    logp                   mean log-prob per token under the model that wrote the responses
    implicit:MODEL         the implicit reward of a DPO checkpoint; implicit:MODEL,REFERENCE names its reference
    classifier:MODEL       a sequence-classification reward model with one output
    http(s)://...          an OpenAI-compatible endpoint that compares two responses in both orders (`endpoint.py`)
    module:function        a function of your own: (prompts, completions, **kwargs) -> scores

A score of None leaves a response out.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastdpo.data.sources.nearest import check_model_folder
from fastdpo.data.tokens.chat.rendering import rendering_ends
from fastdpo.rewards.implicit import implicit_reward
from fastdpo.rounds.endpoint import TIMEOUT, EndpointJudge
from fastdpo.training.settings.config import DPOConfig

Judge = Callable[..., Sequence[float | None]]
KINDS = ("length", "shortest", "regex:PATTERN", "logp", "implicit:MODEL", "classifier:MODEL", "http://URL")
KIND_NAMES = tuple(kind.partition(":")[0] for kind in KINDS)
_ENDPOINTS = ("http://", "https://")


def is_endpoint(name: str) -> bool:
    return name.startswith(_ENDPOINTS)


def check_judge(name: str, endpoint_model: str | None, timeout: float = TIMEOUT) -> None:
    """Raises ValueError if there is no such judge, as far as that shows without loading its model."""
    if not timeout > 0:
        raise ValueError(f"judge_timeout must be > 0, got {timeout}")
    if is_endpoint(name):
        if not endpoint_model:
            raise ValueError("judge_model must name the endpoint's model if judge is a URL, got none")
        return
    kind, _, rest = name.partition(":")
    if kind in ("implicit", "classifier") and rest:
        for model in rest.split(",") if kind == "implicit" else (rest,):
            check_model_folder("judge", model)
    elif name != "logp":
        make_judge(name)


def make_judge(
    name: str,
    endpoint_model: str | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    args: DPOConfig | None = None,
    timeout: float = TIMEOUT,
) -> Judge | EndpointJudge:
    """The judge with this name.

    Args:
        endpoint_model: the model that an endpoint runs, if the name is its URL.
        model, tokenizer: the model that wrote the responses (or its name), and its tokenizer; for `logp`.
        args: precision, device and max_length for judges that are models.
        timeout: seconds for a request to an endpoint.
    Raises:
        ValueError: there is no such judge, or it cannot be loaded.
    """
    if is_endpoint(name):
        check_judge(name, endpoint_model, timeout)
        return EndpointJudge(name, str(endpoint_model), timeout=timeout)
    kind, _, rest = name.partition(":")
    if name == "length":
        return lambda prompts, completions, **kwargs: [float(len(text_of(said))) for said in completions]
    if name == "shortest":
        return lambda prompts, completions, **kwargs: [-float(len(text_of(said))) for said in completions]
    if kind == "regex" and rest:
        try:
            pattern = re.compile(rest)
        except re.error as error:
            raise ValueError(f"judge regex must be a regular expression, got {rest!r}: {error}") from error
        return lambda prompts, completions, **kwargs: [float(len(pattern.findall(text_of(c)))) for c in completions]
    if name == "logp":
        return implicit_reward(model, None, tokenizer, 1.0, per_token=True, args=args)
    if kind == "implicit" and rest:
        policy, _, reference = rest.partition(",")
        return implicit_reward(policy, reference or None, None, 1.0, args=args)
    if kind == "classifier" and rest:
        return Classifier(rest, args)
    if kind not in KIND_NAMES and re.fullmatch(r"[\w.]+:\w+", name):
        return _own(kind, rest)
    raise ValueError(f"judge must be one of {', '.join(KINDS)} or module:function, got {name!r}")


def judged(judge: Judge | EndpointJudge, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float | None]:
    """One score per completion from a judge that scores each by itself; None for a score that is not a finite number.

    Raises:
        ValueError: the judge returns another number of scores, or something else than numbers.
    """
    assert not isinstance(judge, EndpointJudge)
    found: Any = judge(list(prompts), list(completions))
    try:
        scores = [score.item() if hasattr(score, "item") else score for score in found]  # of NumPy and torch
    except TypeError as error:
        raise ValueError(f"judge must return a list of scores, got {type(found).__name__}") from error
    if len(scores) != len(completions):
        raise ValueError(f"judge must return a score for each of {len(completions)} completions, got {len(scores)}")
    for score in scores:
        if score is not None and not isinstance(score, int | float):
            raise ValueError(f"judge must return numbers or None, got {type(score).__name__}")
    return [None if score is None or not math.isfinite(score) else float(score) for score in scores]


def text_of(completion: Any) -> str:
    """The text of a completion. Contents of messages are joined by line breaks."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message.get("content") or "") for message in completion)


def _own(module: str, function: str) -> Judge:
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"judge must be an importable module:function, got {module}:{function}: {error}") from error
    if not callable(found):
        raise ValueError(f"judge {module}:{function} must be callable, got {type(found).__name__}")
    return found


class Classifier:
    """A reward model: `AutoModelForSequenceClassification` with one output, on prompt and response."""

    def __init__(self, name: str, args: DPOConfig | None = None) -> None:
        from transformers import AutoModelForSequenceClassification

        from fastdpo.training.setup.model_files import readable_files
        from fastdpo.training.setup.models import load_tokenizer, refuse_unpickling

        args = DPOConfig("not_used") if args is None else args
        refuse_unpickling(args.init_kwargs())
        options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": False, **args.init_kwargs()}
        try:
            with readable_files("judge classifier", name):
                model: Any = AutoModelForSequenceClassification.from_pretrained(name, **options)
            self.tokenizer: Any = load_tokenizer(name, args.init_kwargs())
        except OSError as error:
            raise ValueError(f"judge classifier must name a model, got {name!r}: {error}") from error
        if model.config.num_labels != 1:
            raise ValueError(f"judge classifier must have one output, got {model.config.num_labels} in {name}")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.model, self.batch_size = model.to(args.device).eval(), 16

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float | None]:
        texts = [self._text(prompt, said) for prompt, said in zip(prompts, completions, strict=True)]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        scores: list[float | None] = [None] * len(texts)
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            batch = self.tokenizer([texts[i] for i in places], return_tensors="pt", padding=True)
            found = self.model(**batch.to(self.model.device)).logits[:, 0].float().tolist()
            for place, score in zip(places, found, strict=True):
                scores[place] = score if math.isfinite(score) else None
        return scores

    def _text(self, prompt: Any, completion: Any) -> str:
        if isinstance(prompt, str) and isinstance(completion, str):
            return prompt + completion
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        said = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
        if getattr(self.tokenizer, "chat_template", None) is None:
            return "\n\n".join(message["content"] for message in (*asked, *said))
        with rendering_ends(self.tokenizer.chat_template):
            text: str = self.tokenizer.apply_chat_template([*asked, *said], tokenize=False)
        return text
