"""Runs of a tiny model on one process, or on several, with whole weights (DDP) or weights that FSDP2 divides.

accelerate does not shard on CPUs: it silently replicates. `shards_on_cpus` makes it take its CPU processes for GPUs, so
that its own code shards, with gloo.
"""

import hashlib
from collections import Counter
from pathlib import Path

import torch
from accelerate.parallelism_config import ParallelismConfig
from safetensors.torch import save_file
from tiny import make_llama, make_rows
from tiny_runs import make_lora, tiny_trainer
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config, Qwen2ForCausalLM

from fastdpo.training.memory.cluster.holding import process_memory
from fastdpo.training.memory.cluster.sizes import model_sizes
from fastdpo.training.memory.cluster.traffic import Precision
from fastdpo.training.memory.dry_run import StepPeak

FSDP2 = {
    "fsdp": "full_shard auto_wrap",
    "fsdp_config": {"version": 2, "fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}


BF16_SHAPE = (140_000, 32)  # of the LM head


def make_qwen2():
    """Of the vocabulary of the tiny Llama."""
    torch.manual_seed(1)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    shape = {"vocab_size": make_llama().config.vocab_size, "hidden_size": 32, "intermediate_size": 48}
    return Qwen2ForCausalLM(Qwen2Config(**shape, **heads, num_hidden_layers=2))


def lora(**settings):
    return {"peft_config": make_lora(**settings), "learning_rate": 1.0}


def settings_of(mode, num_processes):
    """Those of the trainer, made anew: they hold models."""
    return {
        "cached reference": lambda: {"precompute_ref_log_probs": True},
        "frozen reference": lambda: {"ref_model": make_llama(seed=1)},
        "reference of another class": lambda: {"ref_model": make_qwen2()},
        "LoRA": lora,
        "LoRA on the head": lambda: lora(target_modules=["q_proj", "lm_head"]),
        "LoRA, cached reference": lambda: {**lora(), "precompute_ref_log_probs": True},
        "LoRA, checkpointing": lambda: {**lora(), "gradient_checkpointing": True},
        "LoRA, micro-batches": lambda: {**lora(), "max_tokens_per_microbatch": 30},
        "micro-batches": lambda: {"max_tokens_per_microbatch": 30, "precompute_ref_log_probs": False},
        "accumulation": lambda: {
            "gradient_accumulation_steps": 3,
            "per_device_train_batch_size": 4 // num_processes,
        },
        "checkpointing": lambda: {"gradient_checkpointing": True},
        "tied embeddings": lambda: {"model": make_llama(tie_word_embeddings=True)},
        "no reference, sft": lambda: {"reference_free": True, "loss_type": ["sigmoid", "sft"]},
        "padded": lambda: {"packing": "padded"},
        "listwise": lambda: {"loss_type": "plackett_luce"},
        "bf16": lambda: {"bf16": True},
        "tiles, checkpointing": lambda: {"tile_rows": 8, "gradient_checkpointing": True},
        # so large that the head op cannot upcast the weight of its LM head at once
        "bf16, large vocabulary": lambda: {"bf16": True, "model": make_llama(vocab_size=BF16_SHAPE[0])},
        # steps of 4, 4 and 1 rows: in the last, only one process has any
        "uneven pairs": lambda: {"num_rows": 9, "per_device_train_batch_size": 4 // num_processes},
        "uneven pairs, in order": lambda: {**settings_of("uneven pairs", num_processes), "balance_ranks": False},
    }[mode]()


class Shapes(TorchDispatchMode):
    """Counts the plain tensors that operations make on this process, by shape and dtype; views count too."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    @classmethod
    def of_steps(cls, trainer):
        """Those of the training steps to come."""
        made, step = cls(), trainer.training_step

        def counted(*args, **kwargs):
            with made:
                return step(*args, **kwargs)

        trainer.training_step = counted
        return made

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        found = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if type(tensor) is torch.Tensor:
                self.counts[tuple(tensor.shape), tensor.dtype] += 1
        return found


def shards_on_cpus():
    from accelerate.state import DistributedType, PartialState

    original = PartialState.__init__
    if hasattr(original, "original"):
        return

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    init.original = original
    PartialState.__init__ = init


def own_bytes(tensor):
    """Those that this process holds."""
    return whole_bytes(tensor.to_local() if isinstance(tensor, DTensor) else tensor)


def whole_bytes(tensor):
    return tensor.numel() * tensor.element_size()


def share_of_reference(trainer):
    """What this process holds of a frozen reference; None without one."""
    if trainer.ref_model is None:
        return None
    weights = [*trainer.ref_model.parameters()]
    return sum(map(own_bytes, weights)) / sum(map(whole_bytes, weights))


def share_by_formula(layout, model=None):
    """The same by the cost model, of a copy of the tiny Llama or of another model."""
    sizes = model_sizes(make_llama() if model is None else model)
    nothing = StepPeak(casts=0, gradients=0, head=0, activations=0)
    settings = {"state_bytes": 0, "hidden_bytes": 0, "checkpointing": False, "reference_bytes": 1.0}
    return process_memory(sizes, layout, nothing, Precision(), **settings).reference


def whole(parameter):
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()


def named(model):
    """The trained weights, whole, under the names that they have on one process."""
    return {name: whole(p) for name, p in model.named_parameters() if p.requires_grad}


def settings_of_steps(num_rows, steps):
    """Of `num_rows` rows on each process."""
    return {
        "per_device_train_batch_size": num_rows,
        "learning_rate": 0.1,
        "optim": "sgd",  # so that weights move by the gradient
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": steps,
        "num_rows": 60,
    }


def train_and_keep(folder, trainer, named=named):
    """Log of the run; in the folder are the saved model and what `named` tells of the weights before and after."""
    weights = {"before": named(trainer.model)}
    trainer.train()
    weights["after"] = named(trainer.model)
    for moment, found in weights.items():
        contiguous = {name: x.contiguous() for name, x in found.items()}
        save_file(contiguous, Path(folder, f"{moment}{trainer.args.process_index}"))
    trainer.save_model(str(Path(folder, "saved")))
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def evaluation(trainer, num_readers):
    """Metrics and log-probs on rows that do not divide evenly."""
    trainer.args.per_device_eval_batch_size = 4 // num_readers
    found = trainer.predict(make_rows(7, seed=1))
    metrics = {
        name: value for name, value in found.metrics.items() if "runtime" not in name and "per_second" not in name
    }
    return {
        "summary": trainer.summary(),
        "bytes_of_model": trainer._bytes_of_model(),
        "metrics": metrics,
        "logps": found.predictions["chosen_logps"].tolist(),
    }


def copies(num_processes, num_copies):
    """The setting for several copies that are each divided (HSDP)."""
    sizes = {"dp_replicate_size": num_copies, "dp_shard_size": num_processes // num_copies}
    return {"parallelism_config": ParallelismConfig(**sizes)} if num_copies > 1 else {}


def train(folder, mode, steps=1, num_processes=1, num_copies=1, is_sharded=True, evaluates=False, **more):
    """Log of the run; the trained weights before and after are in files of the folder.

    With several copies, each is divided over a part of the processes (HSDP). Weights that are not sharded are whole on
    every process (DDP).
    """
    if num_processes > 1 and is_sharded:
        shards_on_cpus()
        more |= FSDP2
    more |= copies(num_processes, num_copies)
    settings = {**settings_of_steps(12 // num_processes, steps), **settings_of(mode, num_processes), **more}
    trainer = tiny_trainer(folder, **settings)
    made = Shapes.of_steps(trainer)
    logs = train_and_keep(folder, trainer)
    return {
        "logs": logs,
        "share_of_reference": share_of_reference(trainer),
        "num_sharded": sum(isinstance(p, DTensor) for p in trainer.model.parameters()),
        "num_parameters": sum(1 for _ in trainer.model.parameters()),
        "evaluation": evaluation(trainer, num_processes) if evaluates else None,
        "num_heads_in": {str(dtype): made.counts[BF16_SHAPE, dtype] for dtype in (torch.float32, torch.bfloat16)},
    }


def resume(folder, mode, kind=None, num_processes=2, num_copies=1, **more):
    """Digests of the trained weights of a run of four steps, and of one that goes on from its second step.

    Without a `kind` of checkpoint, weights are whole on every process. The third step is an epoch's last, with half of
    the rows: the others are rows of the first step, which must not count again.
    """
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "num_rows": 5 * num_processes}
    settings |= {**settings_of(mode, num_processes), **copies(num_processes, num_copies), **more}
    if kind is not None:
        shards_on_cpus()
        settings |= {"fsdp": FSDP2["fsdp"], "fsdp_config": FSDP2["fsdp_config"] | {"state_dict_type": kind}}
    return resumed_digests(folder, settings)


def resumed_digests(folder, settings, named=named):
    found = []
    for name, checkpoint in (("a", None), ("b", Path(folder, "a", "checkpoint-2"))):
        trainer = tiny_trainer(Path(folder, name), per_device_train_batch_size=2, **settings)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        weights = named(trainer.model)
        found.append({name: hashlib.sha256(x.numpy().tobytes()).hexdigest() for name, x in weights.items()})
    return found
