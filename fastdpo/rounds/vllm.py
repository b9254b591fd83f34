"""vLLM as the engine that samples responses, if it is installed.

In: prompts as token ids. Out: token ids of responses, with the EOS if the model wrote one, sampled as
`modeling/generation.py` samples them: no top-k, no top-p, no penalties. Refuses vLLM if it is not installed, and
adapters that vLLM cannot run.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastdpo.training.setup.models import adapter_base

ENGINES = ("auto", "transformers", "vllm")
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM accepts as max_lora_rank
SHARE_OF_FREE_MEMORY = 0.85  # of what judges leave; the rest is for their activations
_BETWEEN_SEEDS = 1_000_003  # more than the responses of one call, which take consecutive seeds


def is_installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


def choose_engine(name: str, model: str, *, on_gpu: bool) -> str:
    """The engine to use: "auto" is vLLM if it is installed, there is a GPU, and vLLM can run the model's adapter.

    Raises:
        ValueError: there is no such engine, or vLLM was named and cannot be used.
    """
    if name not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {name!r}")
    if name == "transformers" or (name == "auto" and not (is_installed() and on_gpu)):
        return "transformers"
    obstacle = _adapter_obstacle(model)
    if name == "auto":
        return "transformers" if obstacle else "vllm"
    if not is_installed():
        raise ValueError("engine must be auto or transformers, got 'vllm', which is not installed: pip install vllm")
    if obstacle:
        raise ValueError(
            f"engine must be transformers for the adapter {model}, got 'vllm', which cannot run {obstacle}; or merge it"
            " with `fastdpo merge`"
        )
    return "vllm"


def _adapter_obstacle(model: str) -> str:
    """What vLLM cannot run in a saved adapter; empty if there is nothing."""
    if adapter_base(model) is None:
        return ""
    config = _adapter_config(model)
    if config.get("peft_type") != "LORA":
        return f"peft_type {config.get('peft_type')}"
    if _rank(config) > LORA_RANKS[-1]:
        return f"a rank of {_rank(config)}"
    if config.get("bias", "none") != "none":
        return f"bias={config['bias']!r}"
    unsupported = ("modules_to_save", "use_dora", "target_parameters", "trainable_token_indices")
    return next((name for name in unsupported if config.get(name)), "")


def _adapter_config(model: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(model) / "adapter_config.json").read_text())
    return found


def _rank(config: Mapping[str, Any]) -> int:
    return max(int(config.get("r", 8)), *(int(rank) for rank in (config.get("rank_pattern") or {}).values()), 0)


class VllmEngine:
    """A model in vLLM.

    Args:
        model: a name or folder, also of a LoRA adapter.
        eos_ids: the ids that end a response.
        dtype: of the weights; None for the checkpoint's.
        arguments: further arguments of `vllm.LLM`, such as {"tensor_parallel_size": 2}.
    Raises:
        ValueError: vLLM does not take the arguments.
    """

    def __init__(
        self,
        model: str,
        *,
        eos_ids: Sequence[int],
        dtype: str | None = None,
        trust_remote_code: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        import vllm  # type: ignore[import-not-found]

        base, self.eos_ids, self._lora = adapter_base(model), list(eos_ids), None
        settings: dict[str, Any] = {"dtype": dtype or "auto", "trust_remote_code": trust_remote_code}
        if base is not None:
            from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

            rank = next(rank for rank in LORA_RANKS if rank >= _rank(_adapter_config(model)))
            settings |= {"enable_lora": True, "max_lora_rank": rank}
            self._lora = LoRARequest("adapter", 1, model)
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            settings["gpu_memory_utilization"] = round(SHARE_OF_FREE_MEMORY * free / total, 3)
        try:
            self._llm = vllm.LLM(model=base or model, **{**settings, **(arguments or {})})
        except TypeError as error:
            raise ValueError(
                f"vllm_args must be arguments of vllm.LLM, got {dict(arguments or {})}: {error}"
            ) from error
        self._sampling_params = vllm.SamplingParams

    def sample_ids(
        self,
        prompt_ids: Sequence[Sequence[int]],
        *,
        num_responses: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[list[list[int]]]:
        """`num_responses` responses to each prompt. Every response has a seed of its own."""
        params = [
            self._sampling_params(
                n=num_responses,
                temperature=temperature,
                top_p=1.0,
                top_k=-1,
                max_tokens=max_new_tokens,
                stop_token_ids=self.eos_ids,
                seed=seed * _BETWEEN_SEEDS + number * num_responses,  # vLLM adds 0 to num_responses - 1
                detokenize=False,
            )
            for number in range(len(prompt_ids))
        ]
        prompts = [{"prompt_token_ids": list(ids)} for ids in prompt_ids]
        outputs = self._llm.generate(prompts, params, use_tqdm=False, lora_request=self._lora)
        return [[list(one.token_ids) for one in output.outputs] for output in outputs]
