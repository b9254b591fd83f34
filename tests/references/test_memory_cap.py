"""A reference whose weights exceed what the system lets the process have is cached all the same, over large batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_llama

SHAPE = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": 6}
CAPPED = """
import json, resource, sys, threading
sys.path[:0] = {paths!r}
from pathlib import Path
import torch
torch.set_num_threads(1)
threading.stack_size(2**18)  # stacks count as memory too
import test_offloading
from transformers import AutoConfig, AutoModelForCausalLM
from fastdpo.references import precompute
from fastdpo.training.setup import reference

path, folder, cap = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
batches, read_units = [], precompute.read_units

def counting(dataset, units):
    batches.append(sum(unit.num_packed for unit in units))
    return read_units(dataset, units)

precompute.read_units = counting
reference._TOKENS_PER_BATCH_ELSEWHERE = 40
first = test_offloading.trainer(folder, None, reference="cached", max_steps=1)  # what libraries load, they have loaded
first.train()
of_a_held_one = [batches.pop(0) for _ in list(batches)]

load = reference._loaded

def load_and_cap(*args):
    # not sooner: transformers maps all files at once, which takes no memory and counts as if it did
    model = load(*args)
    (used,) = [int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData")]
    resource.setrlimit(resource.RLIMIT_DATA, (used + cap, resource.RLIM_INFINITY))
    return model

reference._loaded = load_and_cap
trainer = test_offloading.trainer(folder, path, ref_max_memory={{"cpu": "1MB"}})
try:
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    whole.to_empty(device="cpu")
    whole = "fits"
except (RuntimeError, MemoryError) as error:
    whole = str(error)
ref_logps = list(trainer.train_dataset["ref_logps"])
print(json.dumps({{"held": of_a_held_one, "offloaded": batches, "ref_logps": ref_logps, "whole": whole}}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on a process's data is Linux's")
def test_a_reference_that_exceeds_the_memory_of_the_process_is_cached(tmp_path):
    import test_offloading

    model = make_llama(seed=9, **SHAPE).eval()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(tmp_path / "large", max_shard_size="6MB")  # a file is mapped as a whole
    here = Path(__file__).parent
    script = CAPPED.format(paths=[str(here), str(here.parent)])
    arguments = [str(tmp_path / "large"), str(tmp_path / "capped"), str(int(0.8 * size))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert "memory" in found["whole"], "the cap does not keep the model from being loaded"
    assert max(found["held"]) <= 40 < 100 < max(found["offloaded"]) <= 8 * 40
    assert len(found["offloaded"]) < len(found["held"]) / 3  # every batch reads all weights again
    live = test_offloading.trainer(tmp_path / "live", model, reference="cached")
    for one, other in zip(found["ref_logps"], live.train_dataset["ref_logps"], strict=True):
        assert one == pytest.approx(other, abs=1e-4)
