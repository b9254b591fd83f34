"""Runs of a tiny model on processes whose optimizer state, gradients or weights DeepSpeed divides (ZeRO 1 to 3).

DeepSpeed itself runs here, on CPUs with gloo. Where ninja is installed, it first compiles an exchange in shared memory:
a minute of every test run, unless TORCH_EXTENSIONS_DIR names a folder that stays.
"""

from pathlib import Path

from sharded_runs import evaluation, resumed_digests, settings_of, settings_of_steps, train_and_keep
from tiny import make_llama
from tiny_runs import tiny_trainer


def zero(stage, **settings):
    """A config as users write it; every weight is divided under stage 3, also small ones."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "stage3_gather_16bit_weights_on_model_save": True,
            **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
        },
        **settings,
    }


def named(model):
    """The trained weights, whole, under the names that they have on one process."""
    import deepspeed

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    divided = [p for p in trained.values() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(divided):
        return {name: p.detach().clone().contiguous() for name, p in trained.items()}


def count_divided(model):
    """How many weights this process does not hold whole."""
    return sum(hasattr(p, "ds_id") and p.numel() == 0 for p in model.parameters())


def train(folder, mode, stage, steps=1, num_processes=2, evaluates=False, **more):
    """Log of the run; the trained weights before and after are in files of the folder."""
    settings = {
        **settings_of_steps(12 // num_processes, steps),
        "deepspeed": zero(stage),
        **settings_of(mode, num_processes),
        **more,
    }
    trainer = tiny_trainer(folder, **settings)
    logs = train_and_keep(folder, trainer, named)
    reference = getattr(trainer.reference, "model", None)  # which DeepSpeed divides at the start of training
    return {
        "logs": logs,
        "num_divided": count_divided(trainer.model),
        "num_divided_of_reference": 0 if reference is None else count_divided(reference),
        "num_parameters": sum(1 for _ in trainer.model.parameters()),
        # last: DeepSpeed keeps small models gathered after a forward without a backward
        "evaluation": evaluation(trainer, num_processes) if evaluates else None,
    }


def resume(folder, mode, stage):
    """Digests of the trained weights of a run of four steps, and of one that goes on from its second step."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "num_rows": 10}
    return resumed_digests(folder, {**settings, **settings_of(mode, 2), "deepspeed": zero(stage)}, named)


def refused(folder, stage, settings):
    """The message with which a run is refused."""
    rows = tiny_trainer(Path(folder, "rows"), num_rows=4).train_dataset
    try:
        tiny_trainer(folder, deepspeed=zero(stage), eval_dataset=rows, ref_model=make_llama(seed=1), **settings)
    except ValueError as error:
        return str(error)
    return "not refused"
