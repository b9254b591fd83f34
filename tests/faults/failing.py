"""Runs of two processes of which one fails. `run_all`, in a process of its own, forks both for each case.

In: the cases: engine, fault, folder, port. Out, in the folder of each case: the exit status of each rank, its seconds,
whether it ended within a minute, and what it has printed. A process that takes longer is killed. A minute is longer
where other processes wait for the same cores.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

TESTS = Path(__file__).parents[1]
MOST_SECONDS = 60
FAILS = 1  # the rank that fails


def seconds_allowed():
    return MOST_SECONDS * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def run(engine, fault, folder):
    """A run of six steps in which process FAILS fails."""
    import torch
    from datasets import Dataset, IterableDataset
    from sharded_runs import FSDP2, shards_on_cpus
    from tiny import make_llama, make_rows
    from tiny_runs import tiny_trainer
    from transformers import TrainerCallback

    from fastdpo.training.setup import failures

    fails = int(os.environ["RANK"]) == FAILS
    settings = {"max_steps": 6, "num_rows": 40, "per_device_train_batch_size": 2, "ref_cache_dir": f"{folder}/cache"}
    if engine == "FSDP2":
        shards_on_cpus()
        settings |= FSDP2
    model = make_llama()
    rows = make_rows(40)
    if fault in ("bad row", "bad row of a stream"):
        rows[6]["chosen"] = rows[6]["rejected"]
        settings |= {"on_bad_row": "raise", "train_dataset": Dataset.from_list(rows)}
    if fault == "bad row of a stream":
        settings |= {"train_dataset": IterableDataset.from_generator(lambda: iter(rows)), "reference_free": True}
    if fault == "not finite":
        with torch.no_grad():
            model.model.embed_tokens.weight[31] = float("inf")
        settings["train_dataset"] = [
            {"prompt_ids": [1, first], "chosen_ids": [6], "rejected_ids": [7]} for first in (5, 6, 7, 31)
        ]
    if fault == "waits forever":
        failures.SECONDS_TO_END = failures.SECONDS_TO_HEAR = 2.0
    trainer = tiny_trainer(f"{folder}/out", model, **settings)

    class DiesInTheSecondStep(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if fault == "killed" and state.global_step == 1 and fails:
                os.kill(os.getpid(), signal.SIGKILL)

        on_step_begin = on_substep_end

    trainer.add_callback(DiesInTheSecondStep())
    if fault in ("out of memory", "waits forever") and fails:
        loss_sum = trainer._loss_sum

        def out_of_memory(model, batch):
            if trainer.state.global_step == 1:
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")
            return loss_sum(model, batch)

        trainer._loss_sum = out_of_memory
    try:
        trainer.train()
    except ValueError:
        if fault == "waits forever" and fails:
            traceback.print_exc()
            time.sleep(3600)  # as a process that something keeps from ending
        raise


def child(rank, case):
    """Never returns."""
    file = os.open(Path(case["folder"], f"out{rank}.txt"), os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(MASTER_PORT=str(case["port"]), RANK=str(rank), LOCAL_RANK=str(rank))
    status = 0
    try:
        run(case["engine"], case["fault"], case["folder"])
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def ends(pids):
    """{rank: exit status, seconds, and whether it ended in time}."""
    start, found = time.monotonic(), {}
    while len(found) < len(pids):
        for rank, pid in enumerate(pids):
            seconds = time.monotonic() - start
            done, status = (0, 0) if rank in found else os.waitpid(pid, os.WNOHANG)
            if done:
                in_time = seconds <= seconds_allowed()
                found[rank] = {"status": os.waitstatus_to_exitcode(status), "seconds": seconds, "in_time": in_time}
            elif rank not in found and seconds > seconds_allowed():
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return found


def run_all(cases):
    os.environ.update(MASTER_ADDR="127.0.0.1", WORLD_SIZE="2")
    sys.path.insert(0, str(TESTS / "training"))  # of the children
    for case in cases:
        pids = []
        for rank in range(2):
            pid = os.fork()
            if pid == 0:
                child(rank, case)
            pids.append(pid)
        for rank, end in ends(pids).items():
            Path(case["folder"], f"result{rank}.json").write_text(json.dumps(end))
