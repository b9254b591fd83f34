"""What a process of a run holds at the peak of a training step, counted, and what the cost model says."""

import torch
from sharded_runs import FSDP2, own_bytes, shards_on_cpus
from tiny import make_llama
from tiny_runs import make_lora, tiny_trainer

from fastdpo.evidence.memory import peak_live_bytes
from fastdpo.training.memory.cluster.holding import process_memory
from fastdpo.training.memory.cluster.layouts import Layout
from fastdpo.training.memory.cluster.sizes import model_sizes
from fastdpo.training.memory.cluster.traffic import Precision
from fastdpo.training.memory.dry_run import RowShape, dry_step, fake_mode, shape_only
from fastdpo.training.memory.estimate import enable_checkpointing
from fastdpo.training.setup.optimizers import optimizer_state_bytes, trained_parameters

TRIES = 3


def held(folder, num_processes, reference="cached", num_layers=16, vocab_size=1000):
    """Bytes of this process: measured, and by `process_memory`. Rows are short, so that weights dominate."""
    settings = {"per_device_train_batch_size": 2, "max_steps": 1, "gradient_checkpointing": True}
    settings["reference"] = reference
    if num_processes > 1:
        shards_on_cpus()
        settings |= FSDP2
    if reference == "adapter":
        settings["peft_config"] = make_lora()
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": num_layers}
    trainer = tiny_trainer(folder, make_llama(vocab_size, **shape), **settings)
    sizes, state_bytes = (
        model_sizes(trainer.model),
        optimizer_state_bytes("adamw_torch", trained_parameters(trainer.model)),
    )
    mode = fake_mode()
    dry = shape_only(trainer.model, mode)
    enable_checkpointing(dry, {})
    trainer.train()
    model = trainer.model_wrapped
    state = [x for of in trainer.optimizer.state.values() for x in of.values() if torch.is_tensor(x)]
    inputs = next(iter(trainer.get_train_dataloader()))

    def step():
        trainer.training_step(model, inputs, trainer._get_num_items_in_batch([inputs], trainer.args.device))
        model.zero_grad(set_to_none=True)

    frozen = [] if trainer.ref_model is None else trainer.ref_model.parameters()
    # gloo's threads let go of a buffer later on a busy machine
    peak = min(peak_live_bytes(step) for _ in range(TRIES if num_processes > 1 else 1))
    measured = sum(map(own_bytes, [*model.parameters(), *state, *frozen])) + peak
    row = RowShape(inputs["segments"], len(inputs["labels"]))
    layout = Layout("FSDP2", shards=num_processes)
    estimated = process_memory(
        sizes,
        layout,
        dry_step(dry, row, mode, impl="tiled", varlen=False),
        Precision(activation=4),
        state_bytes=state_bytes,
        hidden_bytes=0,
        checkpointing=True,
        reference_bytes=sizes.all.num_bytes if reference == "frozen" else 0,
    )
    return [measured, estimated.total, estimated.gathered]
