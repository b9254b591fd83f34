"""The start of a run says what its adapter reaches, what it leaves out, and what a merge would keep."""

import logging

import pytest
import torch
from tiny import make_llama
from tiny_runs import make_lora, tiny_trainer

from fastdpo.training.setup.adapter_facts import adapter_lines, fused_experts_left_out


def gpt_oss():
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return GptOssForCausalLM(GptOssConfig(vocab_size=32, router_aux_loss_coef=0.0, **sizes, **heads))


def test_the_summary_names_the_layers_of_the_adapter(tmp_path):
    trainer = tiny_trainer(tmp_path, peft_config=make_lora(modules_to_save=["lm_head"]))
    assert adapter_lines(trainer.model) == [
        "LORA of rank 4 on self_attn.q_proj (2), self_attn.v_proj (2), lm_head",
    ]
    assert "adapter      LORA of rank 4 on self_attn.q_proj (2)" in trainer.summary()


def test_experts_that_linear_layers_leave_out_are_named_with_the_option_that_reaches_them(tmp_path):
    trainer = tiny_trainer(tmp_path, model=gpt_oss(), peft_config=make_lora(target_modules="all-linear"))
    names = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert fused_experts_left_out(trainer.model) == names
    assert (
        "not on the experts' weights (mlp.experts.down_proj, mlp.experts.gate_up_proj), which are not linear layers:"
        " set target_parameters=['mlp.experts.down_proj', 'mlp.experts.gate_up_proj'] to include them"
        " (--lora_target_parameters mlp.experts.down_proj mlp.experts.gate_up_proj)"
    ) in trainer.summary()
    reached = tiny_trainer(
        tmp_path, model=gpt_oss(), peft_config=make_lora(target_modules="all-linear", target_parameters=names)
    )
    assert fused_experts_left_out(reached.model) == []
    one = tiny_trainer(tmp_path, model=gpt_oss(), peft_config=make_lora(target_parameters=names[:1]))
    assert fused_experts_left_out(one.model) == names[1:]


TIED = {
    "lora on the head": ({"target_modules": ["q_proj", "lm_head"]}, "on the head of a model that ties both"),
    "lora on the embedding": (
        {"target_modules": ["q_proj", "embed_tokens"]},
        "on the embedding of a model that ties both",
    ),
    "head whole": ({"modules_to_save": ["lm_head"]}, "the head is trained apart though this model ties both"),
    "both whole": (
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        "the embedding and the head are trained apart though",
    ),
    "whole and tied": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, None),
    "elsewhere": ({}, None),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TIED)
def test_what_a_merge_keeps_of_tied_embeddings_is_said_at_the_start_and_true(tmp_path, caplog, kind):
    """The words are held to a merge: it is the trained model, or it is not."""
    settings, words = TIED[kind]
    with caplog.at_level(logging.WARNING):
        trainer = tiny_trainer(
            tmp_path, model=make_llama(tie_word_embeddings=True), peft_config=make_lora(**settings), learning_rate=0.1
        )
    said = [record.message for record in caplog.records if "ties both" in record.message]
    assert len(said) == (words is not None)
    if words is not None:
        assert words in said[0].replace("The head", "the head").replace("The embedding", "the embedding")
        assert any(line.startswith(words) for line in adapter_lines(trainer.model))
    trainer.train()
    model = trainer.model.eval()
    ids = torch.arange(7, 17)[None]
    with torch.no_grad():
        trained = model(input_ids=ids).logits
        merged = model.merge_and_unload()(input_ids=ids).logits
    is_other = (merged - trained).abs().max() > 1e-3
    assert bool(is_other) == (words is not None and "another model" in said[0])
