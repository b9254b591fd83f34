"""Runs of a tiny model on processes that compute packed rows together, with DDP or FSDP2 over all of them."""

import torch
from safetensors.torch import load_file
from sharded_runs import FSDP2, shards_on_cpus, train

LOGGED = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "entropy", "num_tokens")


def train_in_parts(folder, mode, steps=1, size=2, num_processes=2, shards=False):
    """As `sharded_runs.train`, in groups of `size` processes."""
    num_rows = 4 if mode == "accumulation" else 12
    more = {"sequence_parallel_size": size, "per_device_train_batch_size": num_rows // (num_processes // size)}
    if shards:
        shards_on_cpus()
        more |= FSDP2
    return train(folder, mode, steps, **more)
