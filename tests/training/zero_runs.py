"""Runs of a tiny model on processes whose optimizer state, gradients or weights DeepSpeed divides (ZeRO 1 to 3).

DeepSpeed itself runs here, on CPUs with gloo: `DS_ACCELERATOR=cpu` is set for its processes.
"""

from pathlib import Path

from safetensors.torch import save_file
from sharded_runs import settings_of
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


def train(folder, mode, stage, steps=1, num_processes=2, **more):
    """Log of the run; the trained weights before and after are in files of the folder."""
    settings = {
        "per_device_train_batch_size": 12 // num_processes,
        "learning_rate": 0.1,
        "optim": "sgd",  # so that weights move by the gradient
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": steps,
        "num_rows": 60,
        "deepspeed": zero(stage),
        **settings_of(mode, num_processes),
        **more,
    }
    trainer = tiny_trainer(folder, **settings)
    before = named(trainer.model)
    trainer.train()
    rank = trainer.args.process_index
    num_divided = sum(hasattr(p, "ds_id") and p.numel() == 0 for p in trainer.model.parameters())
    save_file(before, Path(folder, f"before{rank}"))
    save_file(named(trainer.model), Path(folder, f"after{rank}"))
    trainer.save_model(str(Path(folder, "saved")))
    return {
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "num_divided": num_divided,
        "num_parameters": sum(1 for _ in trainer.model.parameters()),
    }
