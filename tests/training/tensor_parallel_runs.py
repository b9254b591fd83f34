"""Runs of a tiny model whose layers and LM head are cut over processes, by transformers' plans.

accelerate refuses meshes of CPU processes, so `shards_on_cpus` makes it take them for GPUs. All else is what runs on
GPUs: transformers cuts the model over gloo processes and its Trainer trains it.
"""

import os
from pathlib import Path
from unittest.mock import patch

import torch
from datasets import Dataset
from sharded_runs import (
    evaluation,
    lora,
    settings_of,
    settings_of_steps,
    shards_on_cpus,
    share_of_reference,
    train_and_keep,
)
from tiny import make_llama, make_rows, save_model
from tiny_runs import tiny_trainer
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
QWEN3 = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}


def make_qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**QWEN3))


def make_qwen3_moe():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**QWEN3, **experts))


def saved(folder):
    """The model beside the run's folder; the test has saved it there for several processes."""
    path = Path(folder).parent / "model"
    return str(path if path.is_dir() else save_model(path))


def cut_when_loaded(folder, cut_over, num_readers):
    """A model that transformers has cut, for a trainer that is not told so."""
    options = {}
    if cut_over > 1:
        from transformers.distributed import DistributedConfig

        options = {"distributed_config": DistributedConfig(tp_size=cut_over, fsdp_size=num_readers)}
    model = AutoModelForCausalLM.from_pretrained(saved(folder), **options)
    return {"model": model, "tensor_parallel_size": 1}


def settings_here(mode, num_readers, folder, cut_over):
    """Those of the trainer. `num_readers` processes read different rows."""
    rows = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4 // num_readers}
    own = {
        "given by name": lambda: {"model": saved(folder), "ref_model": saved(folder)},
        "LoRA on every layer, micro-batches": lambda: {
            **lora(target_modules=EVERY_LINEAR),
            "max_tokens_per_microbatch": 30,
        },
        "cut when loaded": lambda: cut_when_loaded(folder, cut_over, num_readers),
        "stream": lambda: {"train_dataset": Dataset.from_list(make_rows(60)).to_iterable_dataset()},
        "clipped": lambda: {"max_grad_norm": 0.5},
        "AdamW": lambda: {"optim": "adamw_torch", "learning_rate": 1e-3},
        "vocabulary that does not divide": lambda: {"model": make_llama(vocab_size=33)},
        "biases": lambda: {"model": make_llama(attention_bias=True, mlp_bias=True)},
        "qwen3, accumulation": lambda: {"model": make_qwen3(), **rows},
        "qwen3, micro-batches": lambda: {"model": make_qwen3(), "max_tokens_per_microbatch": 30},
        # a balance of experts over the rows of a process is another one than over all rows
        "qwen3-moe": lambda: {"model": make_qwen3_moe(), "router_aux_loss_coef": 0.0},
        "qwen3-moe, balanced": lambda: {"model": make_qwen3_moe()},
    }
    return own[mode]() if mode in own else settings_of(mode, num_readers)


def train(folder, mode, steps=1, cut_over=1, num_processes=1, evaluates=False):
    """Log of the run; the trained weights before and after are in files of the folder, and the saved model."""
    if cut_over > 1:
        shards_on_cpus()
    num_readers = num_processes // cut_over
    settings = {
        **settings_of_steps(12 // num_readers, steps),
        "tensor_parallel_size": cut_over,
        **settings_here(mode, num_readers, folder, cut_over),
    }
    trainer = tiny_trainer(folder, **settings)
    return {
        "logs": train_and_keep(folder, trainer),
        "num_cut": sum(isinstance(p, DTensor) for p in trainer.model.parameters()),
        "share_of_reference": share_of_reference(trainer),
        "head_rows": trainer.model.get_output_embeddings().weight.to_local().shape[0] if cut_over > 1 else None,
        "evaluation": evaluation(trainer, num_readers) if evaluates else None,
    }


def refusal(folder, environment=None, **settings):
    """What the trainer says to these settings; `model` and `peft_config` are names of what MADE makes."""
    shards_on_cpus()
    made = {name: MADE[value]() if value in MADE else value for name, value in settings.items()}
    try:
        with patch.dict(os.environ, environment or {}):
            tiny_trainer(folder, **{"tensor_parallel_size": 2, **made})
    except ValueError as error:
        return str(error)
    return ""


def _with_adapter():
    from peft import get_peft_model
    from tiny_runs import make_lora

    return get_peft_model(make_llama(), make_lora())


def _lora(**settings):
    return lora(**settings)["peft_config"]


MADE = {
    "one key head": lambda: make_llama(num_key_value_heads=1),
    "a model with an adapter": _with_adapter,
    "LoRA, PiSSA": lambda: _lora(init_lora_weights="pissa"),
    "LoRA, whole head": lambda: _lora(modules_to_save=["lm_head"]),
    "LoRA on embeddings": lambda: _lora(target_modules=["embed_tokens"]),
}


def run(folder, what, **case):
    return {"train": train, "refusal": refusal}[what](folder, **case)
