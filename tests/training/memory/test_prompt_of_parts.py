"""The prompt of a row in parts runs once, with the gradient of the whole row; and what runs where it cannot."""

import pytest
import torch
from datasets import Dataset
from hybrids import build_hybrid
from test_memory_estimate import make_model
from test_out_of_memory import MESSAGE
from test_row_parts import RANKING, ROWS, assert_same_gradients, gradient, make_gpt2, of_model
from tiny import make_llama
from tiny_runs import make_lora

from fastdpo import pack_pairs
from fastdpo.evidence.memory import peak_live_bytes
from fastdpo.modeling.prompt_once import after_prompt, loss_after_prompt
from fastdpo.training.inputs.collator import PackingCollator
from fastdpo.training.memory.dry_run import RowShape, dry_step, fake_mode, shape_only
from fastdpo.training.memory.row_parts import parts_of_row, repeats_much
from fastdpo.types import TokenizedGroup

SPLIT = {"max_tokens_per_microbatch": 9, "on_oversized_row": "split"}
ONE_TOKEN = [{**RANKING[0], "prompt_ids": [1]}]


def make_double(**overrides):
    return make_llama(**overrides).double()


def make_mistral():
    """With windows of 4 tokens, shorter than a sequence."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=32, num_key_value_heads=2, sliding_window=4, **sizes)
    return MistralForCausalLM(config).double()


def listwise(**settings):
    return {"loss_type": "plackett_luce", **settings}


CASES = {
    "pair": (make_gpt2, ROWS, {}),
    "ranking": (make_gpt2, RANKING, listwise()),
    "ranking, one token": (make_gpt2, ONE_TOKEN, listwise(max_tokens_per_microbatch=7)),
    "checkpointing": (make_gpt2, RANKING, listwise(gradient_checkpointing=True)),
    "grouped heads": (make_double, ROWS, {"gradient_checkpointing": True}),
    "tied": (lambda: make_double(tie_word_embeddings=True), RANKING, listwise(gradient_checkpointing=True)),
    "windows": (make_mistral, RANKING, listwise(gradient_checkpointing=True)),
    "cached": (make_gpt2, ROWS, {"reference": "cached"}),
    "lora": (make_gpt2, ROWS, {"peft_config": lambda: make_lora(target_modules=["c_attn"])}),
    "lora, checkpointing": (
        make_double,
        RANKING,
        listwise(peft_config=lambda: make_lora(target_modules=["q_proj", "v_proj"]), gradient_checkpointing=True),
    ),
    "lora on the head": (
        make_double,
        ROWS,
        {"peft_config": lambda: make_lora(target_modules=["v_proj", "lm_head"]), "gradient_checkpointing": True},
    ),
}


def of_case(folder, case, **more):
    make, rows, settings = CASES[case]
    settings = {**settings, **more}
    if "peft_config" in settings:
        settings["peft_config"] = settings["peft_config"]()
    elif "reference" not in settings:
        settings["ref_model"] = make_gpt2(seed=1)
    torch.manual_seed(0)  # of adapters
    return checkpointed(of_model(folder, rows, make(), **settings))


def checkpointed(trainer):
    """As the trainer's own loop prepares it."""
    if trainer.args.gradient_checkpointing:
        kwargs = trainer.args.gradient_checkpointing_kwargs or {"use_reentrant": False}
        trainer.model.activation_checkpointing_enable(kwargs)
        trainer.model.enable_input_require_grads()
        assert trainer.model.is_activation_checkpointing
    return trainer


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_the_whole_row(tmp_path, case):
    at_most = 1e-12 if CASES[case][0] is make_gpt2 else 1e-6  # norms are in fp32
    if "cached" in case:
        at_most = 1e-7
    whole = gradient(of_case(tmp_path / "whole", case))
    parts = of_case(tmp_path / "parts", case, **{**SPLIT, **CASES[case][2]})
    assert parts.out_of_memory.repeats_prompt == ""
    found = gradient(parts)
    assert_same_gradients(whole, found, at_most)
    prompts = [len(row["prompt_ids"]) for row in CASES[case][1]]
    assert set(found[2]) & set(prompts)  # a forward of a prompt alone
    assert parts.out_of_memory.least_prompt is None


def test_a_prompt_runs_twice_forward_and_no_part_has_it(tmp_path):
    """Once in the first pass, and once with a graph."""
    row = {**RANKING[0], "prompt_ids": [1] * 20}
    sizes = gradient(of_model(tmp_path, [row], make_gpt2(), reference_free=True, **listwise(), **SPLIT))[2]
    assert sizes == 2 * [20, 6, 5, 4, 1]


def test_a_short_prompt_of_long_responses_runs_with_every_part(tmp_path):
    def parts(prompt, *responses):
        group = TokenizedGroup([1] * prompt, [[2 + i] * length for i, length in enumerate(responses)])
        return parts_of_row((0, group), PackingCollator(), 1, torch.zeros(1))

    assert not repeats_much(parts(1, 20, 20))  # 1 of 42 tokens
    assert repeats_much(parts(3, 20, 20))  # 3 of 46
    assert not repeats_much(parts(0, 20, 20))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"prefix_sharing": False}, "rows do not share their prompts"),
        ({"packing": "padded"}, "rows do not share their prompts"),
        ({"attention_backend": "mask"}, "layers read a mask of the whole row"),
    ],
    ids=["unshared", "padded", "mask"],
)
def test_settings_that_repeat_the_prompt(tmp_path, settings, why):
    whole = gradient(of_model(tmp_path / "whole", ROWS, make_gpt2(), reference_free=True, **settings))
    trainer = of_model(tmp_path / "parts", ROWS, make_gpt2(), reference_free=True, **settings, **SPLIT)
    assert trainer.out_of_memory.repeats_prompt == why
    assert_same_gradients(whole, gradient(trainer))


def test_a_hybrid_repeats_the_prompt(tmp_path):
    settings = {"reference_free": True, "beta": 0.1}
    whole = gradient(of_model(tmp_path / "whole", ROWS, build_hybrid("lfm2"), **settings))
    trainer = of_model(tmp_path / "parts", ROWS, build_hybrid("lfm2"), **settings, **SPLIT)
    assert trainer.out_of_memory.repeats_prompt == "layers mix tokens outside attention"
    assert_same_gradients(whole, gradient(trainer), 1e-4)


@pytest.mark.parametrize("kind", ["reentrant", "twice"])
def test_layers_that_cannot_be_recorded_are_found_in_the_first_attempt(tmp_path, kind, caplog):
    def make():
        model = make_double()
        if kind == "twice":
            model.model.layers[1] = model.model.layers[0]
        return model

    settings = {"reference_free": True, **listwise()}
    if kind == "reentrant":
        settings |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    whole = gradient(of_model(tmp_path / "whole", RANKING, make(), **settings))
    trainer = checkpointed(of_model(tmp_path / "parts", RANKING, make(), **settings, **SPLIT))
    with caplog.at_level("WARNING"):
        found = gradient(trainer)
    assert "A prompt of 3 tokens cannot run once for all parts of its row (LlamaAttention" in caplog.text
    assert_same_gradients(whole, found, 1e-6)


# Memory


def memory_of_parts(checkpointing, lora, autocast):
    """Measured and estimated bytes beyond weights and gradients, of a prompt of 600 tokens and three responses."""
    model = make_model("small", lora, checkpointing)
    draw = torch.Generator().manual_seed(0)
    prompt, *responses = (torch.randint(1000, (n,), generator=draw).tolist() for n in (600, 150, 90, 150))
    batches = [pack_pairs([TokenizedGroup(prompt, [response], preferences=())]) for response in responses]
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast is not None):
            loss = loss_after_prompt(model, batches, len(prompt), 3 * [lambda sums, *_: sums.sum()])
        loss.backward()

    measured, mode = peak_live_bytes(step), fake_mode()
    row = RowShape(after_prompt(batches[0], 600).segments, 150, num_prompt=600)
    settings = {"impl": "tiled", "varlen": False, "accumulates": True, "autocast": autocast}
    estimated = dry_step(shape_only(model, mode), row, mode, **settings)
    gradients = sum(p.numel() * p.element_size() for p in trained)
    return measured, estimated.total - gradients


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_a_row_whose_prompt_runs_once_takes_what_was_estimated(checkpointing, lora, autocast):
    measured, estimated = memory_of_parts(checkpointing, lora, autocast)
    assert estimated == pytest.approx(measured, rel=0.05)


class Memory:
    """Out of memory in one place: forwards of so many tokens with a graph or without, or backwards of so many."""

    def __init__(self, model, where, num_tokens):
        self.where, self.num_tokens, self.failures = where, num_tokens, 0
        model.get_input_embeddings().register_forward_pre_hook(self.forward)
        model.transformer.h[0].register_full_backward_hook(self.backward)

    def forward(self, module, args):
        if self.where == ("forward" if torch.is_grad_enabled() else "first pass"):
            self.check(args[0].numel())

    def backward(self, module, grad_input, grad_output):
        if self.where == "backward":
            self.check(grad_output[0].shape[1])

    def check(self, num_tokens):
        if num_tokens == self.num_tokens:
            self.failures += 1
            raise torch.OutOfMemoryError(MESSAGE)


# of the prompt of 3 tokens, of a part of 6 after it, and of the first part that runs
PLACES = [("first pass", 3), ("first pass", 6), ("forward", 3), ("forward", 4), ("backward", 4), ("backward", 3)]


@pytest.mark.parametrize(("where", "num_tokens"), PLACES)
def test_a_prompt_that_does_not_fit_beside_the_parts_runs_with_each(tmp_path, where, num_tokens, caplog):
    settings = {"ref_model": make_gpt2(seed=1), **listwise()}
    whole = gradient(of_model(tmp_path / "whole", RANKING, make_gpt2(), **settings))
    trainer = of_model(tmp_path / "parts", RANKING, make_gpt2(), **settings, **SPLIT)
    memory = Memory(trainer.model, where, num_tokens)
    with caplog.at_level("WARNING"):
        found = gradient(trainer)
    assert memory.failures == 1
    assert f"A prompt of 3 tokens cannot run once for all parts of its row ({MESSAGE}" in caplog.text
    assert_same_gradients(whole, found)
    again = gradient(trainer)
    assert memory.failures == 1  # remembered
    assert_same_gradients(whole, again)
    assert max(again[2]) == 9


def test_smaller_parts_try_again_to_run_their_prompt_once(tmp_path):
    """Prompt 3 and parts of up to 6 tokens do not fit; nor does a part with its prompt, until it holds 5 tokens."""
    row = {"prompt_ids": [1, 7, 7], "responses": [[5], [6], [8], [9, 10], [11]], "preferences": [[0, 1], [2, 3]]}
    settings = {"reference_free": True, "on_oversized_row": "split", "max_tokens_per_microbatch": 7}
    whole = gradient(of_model(tmp_path / "whole", [row], make_gpt2(), reference_free=True))
    trainer = of_model(tmp_path / "parts", [row], make_gpt2(), **settings)
    failures = []

    def before(module, args):
        if torch.is_grad_enabled() and args[0].numel() in (4, 7):
            failures.append(args[0].numel())
            raise torch.OutOfMemoryError(MESSAGE)

    trainer.model.get_input_embeddings().register_forward_pre_hook(before)
    assert_same_gradients(whole, gradient(trainer))
    assert failures == [4, 7]
    assert trainer.out_of_memory.least_prompt is None
    found = gradient(trainer)
    assert failures == [4, 7]
    assert_same_gradients(whole, found)
    assert found[2] == [3, 2, 1, 1, 1, 1, 3, 2, 1, 1, 1, 1]


def test_an_evaluation_runs_the_prompt_once_and_with_each_part_if_that_does_not_fit(tmp_path):
    trainer = of_model(tmp_path, RANKING, make_gpt2(), ref_model=make_gpt2(seed=1), **listwise())
    rows = Dataset.from_list([trainer.train_dataset[i] for i in range(2)])
    whole = trainer.evaluate(rows)
    trainer.collator.max_tokens, trainer.out_of_memory.on_oversized_row = 9, "split"
    memory = Memory(trainer.model, "first pass", 6)
    memory.where = ""
    for where in ("", "first pass"):
        memory.where = where
        parts = trainer.evaluate(rows)
        assert parts["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-6)
    assert memory.failures == 1
