"""Loads what the commands of rounds need: models that answer, their tokenizers, and judges.

In: names, and the settings of loading. Out: models on their device in evaluation mode, or vLLM's engine for sampling.
Everything that can be refused without loading weights is refused by `check`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, GenerationConfig

from fastdpo.modeling.generation import special_ids
from fastdpo.rounds.endpoint import TIMEOUT
from fastdpo.rounds.judges import check_judge, make_judge
from fastdpo.rounds.vllm import VllmEngine, choose_engine
from fastdpo.training.settings.config import DPOConfig
from fastdpo.training.setup.gguf_files import as_folder
from fastdpo.training.setup.model_files import readable_files
from fastdpo.training.setup.models import (
    adapter_base,
    load_config,
    load_model,
    load_tokenizer,
    resolve_tokenizer,
    where_from,
)

_OF_ANY_MODEL = ("dtype", "attn_implementation", "trust_remote_code")  # arguments of from_pretrained


@dataclass(frozen=True)
class Loader:
    """How models, tokenizers and the judge are loaded."""

    judge_name: str
    args: DPOConfig  # model_init_kwargs, device, chat_template and trust_remote_code are read
    tokenizer_name: str | None = None  # by default each model's own
    judge_model: str | None = None  # of an endpoint
    judge_timeout: float = TIMEOUT  # seconds for a request to an endpoint
    engine: str = "transformers"  # of ENGINES
    vllm_args: Mapping[str, Any] | None = None

    def check(self, model: str) -> None:
        """Raises ValueError for a judge, a model or an engine that cannot work."""
        check_judge(self.judge_name, self.judge_model, self.judge_timeout)
        engine = self.engine_of(model)
        if self.vllm_args and engine != "vllm":
            raise ValueError(f"vllm_args must not be given with the engine {engine}, got {dict(self.vllm_args)}")
        load_config(model, self.args.init_kwargs())

    def engine_of(self, model: str) -> str:
        """The engine that samples from a model: transformers or vllm."""
        return choose_engine(self.engine, model, on_gpu=self.args.device.type == "cuda")

    def model(self, name: str) -> Any:
        model: Any = load_model(name, self.args.init_kwargs())
        return model.to(self.args.device).eval()

    def tokenizer(self, name: str) -> Any:
        own = self.tokenizer_name
        given = (
            None if own is None else load_tokenizer(own, where_from({"trust_remote_code": self.args.trust_remote_code}))
        )
        return resolve_tokenizer(name, given, self.args)

    def judge(self, writer: Any, tokenizer: Any) -> Any:
        """The judge.

        Args:
            writer, tokenizer: the model that wrote the responses, and its tokenizer; for the judge `logp`.
        """
        args = copy.copy(self.args)  # a revision, for example, is of the model and not of the judge
        args.model_init_kwargs = {key: value for key, value in args.init_kwargs().items() if key in _OF_ANY_MODEL}
        return make_judge(
            self.judge_name,
            self.judge_model,
            model=writer,
            tokenizer=tokenizer,
            args=args,
            timeout=self.judge_timeout,
        )

    def sampler(self, name: str) -> tuple[Any, Any, Any]:
        """What samples responses (a model, or vLLM's engine), the tokenizer, and the judge."""
        tokenizer, is_writer = self.tokenizer(name), self.judge_name == "logp"
        judge = None if is_writer else self.judge(None, tokenizer)  # first: a mistake in its name costs no loading
        if self.engine_of(name) == "transformers":
            model = self.model(name)
            return model, tokenizer, self.judge(model, tokenizer) if is_writer else judge
        if is_writer:  # before the engine, which takes most of the memory that is left
            judge = self.judge(self.model(name), tokenizer)
        init_kwargs = self.args.init_kwargs()
        engine = VllmEngine(
            as_folder(name),
            eos_ids=_eos_ids(name, tokenizer, init_kwargs),
            dtype=str(init_kwargs["dtype"]).removeprefix("torch.") if "dtype" in init_kwargs else None,
            trust_remote_code=bool(init_kwargs.get("trust_remote_code")),
            arguments=self.vllm_args,
        )
        return engine, tokenizer, judge


def _eos_ids(name: str, tokenizer: Any, init_kwargs: Mapping[str, Any]) -> list[int]:
    """The ids that end a response, as for a model that transformers loads."""
    base, where = as_folder(adapter_base(name) or name), where_from(dict(init_kwargs))
    with readable_files("model", base):
        try:
            generation = GenerationConfig.from_pretrained(base, **where)
        except OSError:
            generation = GenerationConfig.from_model_config(AutoConfig.from_pretrained(base, **where))
    return special_ids(_Described(generation), tokenizer)[1]


@dataclass(frozen=True)
class _Described:
    """What `special_ids` reads of a model."""

    generation_config: GenerationConfig
