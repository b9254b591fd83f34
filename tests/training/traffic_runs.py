"""What a process of a tiny run hands to collectives in a training step, and what the cost model says."""

import torch.distributed as dist
from sharded_runs import FSDP2, shards_on_cpus
from tiny import make_llama
from tiny_runs import make_lora, tiny_trainer

from fastdpo.training.memory.cluster.layouts import Layout
from fastdpo.training.memory.cluster.sizes import model_sizes
from fastdpo.training.memory.cluster.traffic import MicroBatch, Precision, transfers

# every dimension that FSDP divides is a multiple of four: nothing is padded
SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
AS_STORED = Precision(activation=4)


def size_of(tensor):
    return tensor.numel() * tensor.element_size()


def count(folder, kind, num_processes, reference, checkpointing=False, is_tied=False):
    """Bytes by kind of collective: of one training step with one micro-batch, and by `transfers`."""
    settings = {"per_device_train_batch_size": 2, "max_steps": 1, "gradient_checkpointing": checkpointing}
    settings["reference"] = reference
    if kind == "FSDP2":
        shards_on_cpus()
        settings |= FSDP2
    if reference == "adapter":
        settings["peft_config"] = make_lora(target_modules="all-linear")
    trainer = tiny_trainer(folder, make_llama(tie_word_embeddings=is_tied, **SHAPE), **settings)
    sizes = model_sizes(trainer.model)
    counted = {}
    step = trainer.training_step

    def counting_step(model, *arguments):
        if kind == "DDP":
            model.register_comm_hook(None, counting_hook)
        with _Counting(counted):
            return step(model, *arguments)

    def counting_hook(state, bucket):
        add(counted, "all_reduce", bucket.buffer())
        future = dist.all_reduce(bucket.buffer().div_(num_processes), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    trainer.training_step = counting_step
    trainer.train()
    layout = Layout(kind, shards=num_processes) if kind == "FSDP2" else Layout(kind, copies=num_processes)
    settings = {"checkpointing": checkpointing, "reference": reference}
    expected = transfers(sizes, layout, num_processes, MicroBatch(0, 0), AS_STORED, **settings)
    return [counted, {transfer.kind: transfer.num_bytes for transfer in expected}]


def add(counted, kind, tensor):
    counted[kind] = counted.get(kind, 0) + size_of(tensor)


# torch 2.13 has renamed them
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


class _Counting:
    """Counts what FSDP2 gathers and reduces."""

    def __init__(self, counted):
        self.counted = counted

    def __enter__(self):
        self.originals = {name: getattr(dist, name) for name in (GATHER, SCATTER)}
        setattr(dist, GATHER, self.counting(GATHER, "all_gather", lambda output, input: output))
        setattr(dist, SCATTER, self.counting(SCATTER, "reduce_scatter", lambda output, input: input))

    def __exit__(self, *_):
        for name, original in self.originals.items():
            setattr(dist, name, original)

    def counting(self, name, kind, whole):
        def function(*arguments, **settings):
            named = {"output": 0, "input": 1}
            found = {key: settings[key] if key in settings else arguments[place] for key, place in named.items()}
            add(self.counted, kind, whole(**found))
            return self.originals[name](*arguments, **settings)

        return function
