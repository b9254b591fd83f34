"""vLLM as the engine of generate, with a stand-in that has its API and samples with a tiny model."""

import json
import sys
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
import torch
from tiny import make_llama, make_tokenizer, save_model
from tiny_runs import make_lora

from fastdpo import DPOConfig
from fastdpo.rounds import vllm
from fastdpo.rounds.generate import Sampling, sample_ids
from fastdpo.rounds.loading import Loader
from fastdpo.rounds.vllm import VllmEngine, choose_engine

EOS = 2


class StandIn:
    """`vllm.LLM`: what it was given, and responses that transformers' own generate samples with the given seed."""

    made: ClassVar = []

    def __init__(self, model, *, dtype="auto", trust_remote_code=False, enable_lora=False, max_lora_rank=16, **more):
        if more.keys() - {"gpu_memory_utilization", "tensor_parallel_size"}:
            raise TypeError(f"LLM.__init__() got an unexpected keyword argument {next(iter(more))!r}")
        self.given = {
            "model": model,
            "dtype": dtype,
            "enable_lora": enable_lora,
            "max_lora_rank": max_lora_rank,
            **more,
        }
        self.calls = []
        self.made.append(self)

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None):
        self.calls.append((prompts, sampling_params, lora_request))
        return [
            SimpleNamespace(outputs=[SimpleNamespace(token_ids=self._sampled(prompt, of, k)) for k in range(of.n)])
            for prompt, of in zip(prompts, sampling_params, strict=True)
        ]

    def _sampled(self, prompt, of, number):
        model = make_llama(vocab_size=27).eval()
        torch.manual_seed(of.seed + number)
        ids = torch.tensor([prompt["prompt_token_ids"]])
        options = {"max_new_tokens": of.max_tokens, "eos_token_id": of.stop_token_ids, "pad_token_id": 0}
        output = model.generate(ids, do_sample=True, temperature=of.temperature, top_k=0, **options)
        return tuple(output[0, ids.shape[1] :].tolist())


class Params(SimpleNamespace):
    def __init__(self, *, n, temperature, top_p, top_k, max_tokens, stop_token_ids, seed, detokenize):
        assert (top_p, top_k, detokenize) == (1.0, -1, False)
        super().__init__(n=n, temperature=temperature, max_tokens=max_tokens, stop_token_ids=stop_token_ids, seed=seed)


@pytest.fixture
def stand_in(monkeypatch):
    """The package vllm; returns the LLMs that were made."""
    package, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    package.LLM, package.SamplingParams = StandIn, Params
    request.LoRARequest = lambda name, number, path: (name, number, path)
    for name, module in (("vllm", package), ("vllm.lora", lora), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(vllm, "is_installed", lambda: True)
    monkeypatch.setattr(StandIn, "made", [])
    return StandIn.made


def test_responses_come_in_the_order_of_prompts_each_with_its_own_seed(stand_in):
    engine, tokenizer = VllmEngine("folder", eos_ids=[EOS]), make_tokenizer()
    sampling = Sampling(num_responses=3, max_new_tokens=6, temperature=1.5)
    prompts = ["today ", "the cat sees a ", "never "]
    found = sample_ids(engine, tokenizer, prompts, sampling, seed=7)
    [(asked, params, lora)] = stand_in[0].calls
    assert [one["prompt_token_ids"] for one in asked] == [tokenizer(prompt)["input_ids"] for prompt in prompts]
    assert lora is None
    assert {(of.n, of.temperature, of.max_tokens, tuple(of.stop_token_ids)) for of in params} == {(3, 1.5, 6, (EOS,))}
    seeds = [of.seed + number for of in params for number in range(3)]
    assert len(set(seeds)) == 9
    assert [len(of_prompt) for of_prompt in found] == [3, 3, 3]
    assert found == sample_ids(engine, tokenizer, prompts, sampling, seed=7)
    assert found != sample_ids(engine, tokenizer, prompts, sampling, seed=8)
    assert not {of.seed for of in params} & {of.seed for of in stand_in[0].calls[2][1]}


def test_an_adapter_runs_on_its_base_model(stand_in, tmp_path):
    from peft import get_peft_model

    base = save_model(tmp_path / "base", vocab_size=27)
    adapted = get_peft_model(make_llama(vocab_size=27), make_lora(r=20))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    folder = tmp_path / "adapter"
    adapted.save_pretrained(folder)
    engine = VllmEngine(str(folder), eos_ids=[EOS], arguments={"tensor_parallel_size": 2})
    given = stand_in[0].given
    assert (given["model"], given["enable_lora"], given["max_lora_rank"]) == (str(base), True, 32)
    assert given["tensor_parallel_size"] == 2
    engine.sample_ids([[5]], num_responses=1, max_new_tokens=2, temperature=1.0, seed=0)
    assert stand_in[0].calls[0][2] == ("adapter", 1, str(folder))

    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    assert choose_engine("auto", str(folder), on_gpu=True) == "transformers"
    with pytest.raises(ValueError, match=r"engine must be transformers for the adapter .* cannot run use_dora"):
        choose_engine("vllm", str(folder), on_gpu=True)


def test_auto_is_vllm_where_it_is_installed_and_there_is_a_gpu(stand_in, monkeypatch):
    assert choose_engine("auto", "m", on_gpu=True) == "vllm"
    assert choose_engine("auto", "m", on_gpu=False) == "transformers"
    assert choose_engine("vllm", "m", on_gpu=False) == "vllm"
    assert choose_engine("transformers", "m", on_gpu=True) == "transformers"
    monkeypatch.setattr(vllm, "is_installed", lambda: False)
    assert choose_engine("auto", "m", on_gpu=True) == "transformers"
    with pytest.raises(ValueError, match=r"got 'vllm', which is not installed: pip install vllm"):
        choose_engine("vllm", "m", on_gpu=True)
    with pytest.raises(ValueError, match="engine must be one of auto, transformers, vllm, got 'tgi'"):
        choose_engine("tgi", "m", on_gpu=True)


def test_the_loader_gives_vllm_the_ends_of_responses_and_the_dtype(stand_in, tmp_path):
    folder = str(save_model(tmp_path / "model", vocab_size=27))
    config = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [2, 9]}))
    args = DPOConfig("not_used", max_length=None, use_cpu=True, model_init_kwargs={"dtype": "bfloat16"})
    engine, _, judge = Loader("length", args, engine="vllm").sampler(folder)
    assert isinstance(engine, VllmEngine)
    assert engine.eos_ids == [2, 9]
    assert stand_in[0].given["dtype"] == "bfloat16"
    assert judge(["p"], ["abc"]) == [3.0]


def test_arguments_that_vllm_does_not_have_are_refused(stand_in, tmp_path):
    with pytest.raises(ValueError, match=r"vllm_args must be arguments of vllm\.LLM, got {'tensor_paralel_size': 2}"):
        VllmEngine("folder", eos_ids=[EOS], arguments={"tensor_paralel_size": 2})
    args = DPOConfig("not_used", use_cpu=True)
    with pytest.raises(ValueError, match="vllm_args must not be given with the engine transformers"):
        Loader("length", args, vllm_args={"tensor_parallel_size": 2}).check("model")
