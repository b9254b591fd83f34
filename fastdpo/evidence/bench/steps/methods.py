"""The methods of the training-step benchmark, behind one signature: a Job in, a dict of figures out.

Everybody gets the same model, rows in the same order, dtype, AdamW (torch's fused one), constant learning rate and
gradient clipping at 1. fastdpo and TRL run through transformers.Trainer, the plain loops are the fifteen lines that
they are. A step lasts from the end of the step before to its own end, data included.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdpo.evidence.bench.steps.workloads import WORKLOADS, Work, Workload, make_rows, make_tokenizer

BETA = 0.1
NUM_CHECKED = 3  # first steps whose losses are compared


@dataclass(frozen=True)
class Method:
    """How a step is done. `options` are the trainer's settings, or for a plain loop those of `plain_logps`."""

    name: str
    kind: str  # "fastdpo", "trl" or "plain"
    is_cached: bool = False  # reference log-probs are known before the first step
    options: dict[str, Any] = field(default_factory=dict)
    off: str | None = None  # the feature of fastdpo that is switched off
    grad_in_forward: bool = True
    micro_batch: int | None = None  # pairs at a time; None is the largest number that fits, if it can the whole step
    best_attention: bool = False  # flash-attn where it is installed
    on: str = "cpu gpu"
    note: str = ""


# In order of worth: a run that is stopped early has the first ones.
METHODS = {
    m.name: m
    for m in (
        Method("plain, response rows", "plain"),
        Method("fastdpo", "fastdpo"),
        Method("TRL", "trl", on="cpu"),
        Method("TRL, defaults", "trl", options={"gradient_checkpointing": True}, micro_batch=8, on="gpu"),
        Method("fastdpo, cached", "fastdpo", is_cached=True),
        Method("TRL, cached", "trl", is_cached=True, on="cpu"),
        Method("TRL, best", "trl", is_cached=True, best_attention=True, on="gpu"),
        Method("plain, response rows, cached", "plain", is_cached=True),
        Method("plain, all rows", "plain", options={"all_rows": True}),
        Method("plain, all rows, cached", "plain", is_cached=True, options={"all_rows": True}),
        Method("fastdpo, cached, unshared", "fastdpo", True, {"prefix_sharing": False}, "prefix sharing"),
        Method("fastdpo, cached, padded", "fastdpo", True, {"packing": "padded"}, "packing and prefix sharing"),
        Method("fastdpo, cached, full logits", "fastdpo", True, {"impl": "reference"}, "the fused head"),
        Method("fastdpo, cached, recompute", "fastdpo", True, {}, "gradient in forward", grad_in_forward=False),
        Method(
            "fastdpo, checkpointing", "fastdpo", False, {"gradient_checkpointing": True}, "kept activations", on="gpu"
        ),
    )
}


@dataclass(frozen=True)
class Job:
    """One method on one workload, in a process of its own or in one that does several."""

    workload: str
    method: str
    num_warmups: int
    num_steps: int
    own: dict[str, Any] | None = None  # fields of a Workload that is not one of WORKLOADS

    @property
    def work(self) -> Workload:
        return WORKLOADS[self.workload] if self.own is None else Workload(**self.own)

    @property
    def num_rows(self) -> int:
        return (self.num_warmups + self.num_steps) * self.work.pairs_per_step


class Clock:
    """Collects what every step of a run took and did; the warm-ups' time and work are dropped."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job, self.device = job, device
        self.ends: list[float] = []
        self.losses: list[Tensor] = []  # of micro-batches
        self.data_s = self.collate_s = 0.0
        self.passes: list[tuple[int, int, Any, Any]] = []  # factor, tokens, visible pairs, head rows

    def start(self) -> None:
        self._synchronize()
        self.ends.append(time.perf_counter())

    def end_step(self) -> None:
        self._synchronize()
        self.ends.append(time.perf_counter())
        if len(self.ends) == self.job.num_warmups + 1:
            self.data_s = self.collate_s = 0.0
            self.passes.clear()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def watch(self, model: nn.Module, head_rows: Callable[[dict[str, Any]], Any]) -> None:
        """Counts the work of every forward of `model`; `head_rows` says from its arguments what reaches the head."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            input_ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            batch = kwargs.get("packed_batch")
            if batch is not None and batch.is_packed:  # a position sees itself and all before it
                visible = batch.position_ids.sum() + batch.position_ids.numel()
            else:
                visible = input_ids.shape[0] * input_ids.shape[1] * (input_ids.shape[1] + 1) // 2
            factor = 3 if torch.is_grad_enabled() else 1
            self.passes.append((factor, input_ids.numel(), visible, head_rows({**kwargs, "input_ids": input_ids})))

        model.register_forward_pre_hook(before, with_kwargs=True)

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            setattr(self, name, getattr(self, name) + time.perf_counter() - start)
            return result

        return wrapper

    def figures(self, num_micro_batches: int = 1) -> dict[str, Any]:
        steps = [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]
        work = Work()
        for factor, tokens, visible, rows in self.passes:
            work.tokens += factor * tokens
            work.visible += factor * float(visible)
            work.head_rows += factor * float(rows)
        losses = torch.stack(self.losses).float().reshape(-1, num_micro_batches).sum(1).tolist()
        return {
            "step_s": steps[self.job.num_warmups :],
            "losses": losses[:NUM_CHECKED],
            "work": vars(work),
            "data_s": self.data_s,
            "collate_s": self.collate_s,
        }


def run(job: Job, device: torch.device) -> dict[str, Any]:
    """Figures of the job: seconds of each step, first losses, work done."""
    workload, method = job.work, METHODS[job.method]
    attention = "sdpa"
    if method.best_attention and importlib.util.find_spec("flash_attn"):
        attention = "flash_attention_2"
    sizes = [n for n in range(workload.pairs_per_step, 0, -1) if workload.pairs_per_step % n == 0]
    if method.micro_batch is not None:
        sizes = [min(method.micro_batch, workload.pairs_per_step)]
    for size in sizes:
        try:
            figures = _RUNS[method.kind](job, workload, replace(method, micro_batch=size), device, attention)
            return {"micro_batch": size, "attention": attention, **figures}
        except torch.OutOfMemoryError:
            if size == sizes[-1]:
                raise
        _release(device)
    raise AssertionError("unreachable")


def _release(device: torch.device) -> None:
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _dataset(job: Job, workload: Workload) -> Any:
    from datasets import Dataset

    return Dataset.from_list(make_rows(workload, job.num_rows))


def _settings(job: Job, workload: Workload, method: Method, device: torch.device, folder: str) -> dict[str, Any]:
    """TrainingArguments that both trainers get; every setting that is not here is the trainer's default."""
    assert isinstance(method.micro_batch, int)
    return {
        "output_dir": folder,
        "per_device_train_batch_size": method.micro_batch,
        "gradient_accumulation_steps": workload.pairs_per_step // method.micro_batch,
        "max_steps": job.num_warmups + job.num_steps,
        "max_length": workload.max_length,
        "learning_rate": workload.learning_rate,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "beta": BETA,
        "bf16": False,  # the weights have the dtype
        "gradient_checkpointing": False,
        "use_cpu": device.type == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
        **method.options,
    }


def _train(trainer: Any, clock: Clock) -> None:
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.start()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.end_step()

    training_step = trainer.training_step

    def keep_loss(*args: Any, **kwargs: Any) -> Tensor:
        loss = training_step(*args, **kwargs)
        clock.losses.append(loss.detach())
        return loss

    trainer.training_step = keep_loss
    trainer.get_batch_samples = clock.timed(trainer.get_batch_samples, "data_s")
    trainer.data_collator = clock.timed(trainer.data_collator, "collate_s")
    trainer.add_callback(StepClock())
    trainer.train()


def run_fastdpo(job: Job, workload: Workload, method: Method, device: torch.device, attention: str) -> dict[str, Any]:
    from fastdpo import DPOConfig, DPOTrainer
    from fastdpo.training.callbacks.summary import summary_lines

    model = workload.make_model(str(device), attention)
    clock = Clock(job, device)
    reference = "cached" if method.is_cached else "frozen"
    with tempfile.TemporaryDirectory() as folder, _head_gradient(method.grad_in_forward):
        settings = _settings(job, workload, method, device, folder)
        settings.setdefault("packing", "packed")  # a self-check that fails is an error, not another method
        args = DPOConfig(**settings, reference=reference, ref_cache_dir=folder)
        trainer = DPOTrainer(
            model, args=args, train_dataset=_dataset(job, workload), processing_class=make_tokenizer(workload)
        )
        models = [model] if method.is_cached else [model, trainer.reference.model]
        for watched in models:
            clock.watch(watched, lambda kwargs: kwargs["packed_batch"].labels.numel())
        _train(trainer, clock)
        figures = clock.figures(trainer.args.gradient_accumulation_steps)
        return {**figures, "attention": dict(summary_lines(trainer))["attention"]}


@contextlib.contextmanager
def _head_gradient(in_forward: bool) -> Iterator[None]:
    """No user would switch this off, so there is no setting: the trainer's loss is told to compute logits twice."""
    from fastdpo.training import dpo

    original = dpo.packed_loss
    if not in_forward:
        dpo.packed_loss = lambda *args, **kwargs: original(*args, **{**kwargs, "grad_in_forward": False})
    try:
        yield
    finally:
        dpo.packed_loss = original


def run_trl(job: Job, workload: Workload, method: Method, device: torch.device, attention: str) -> dict[str, Any]:
    from trl import DPOConfig, DPOTrainer

    model = workload.make_model(str(device), attention)
    clock = Clock(job, device)

    def head_rows(kwargs: dict[str, Any]) -> Any:  # TRL's head leaves out ignored rows on a GPU, and nothing on a CPU
        return (kwargs["labels"] != -100).sum() if device.type == "cuda" else kwargs["input_ids"].numel()

    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(**_settings(job, workload, method, device, folder), precompute_ref_log_probs=method.is_cached)
        trainer = DPOTrainer(
            model,
            None if method.is_cached else copy.deepcopy(model),
            args=args,
            train_dataset=_dataset(job, workload),
            processing_class=make_tokenizer(workload),
        )
        models = [model] if method.is_cached else [model, trainer.accelerator.unwrap_model(trainer.ref_model)]
        for watched in models:
            clock.watch(watched, head_rows)
        _train(trainer, clock)
        return clock.figures(args.gradient_accumulation_steps)


def plain_logps(model: Any, batch: dict[str, Tensor], all_rows: bool = False) -> Tensor:
    """(S,) summed response log-probs of a right-padded batch, by full logits of all rows or of the response rows."""
    labels = batch["labels"][:, 1:]
    keep = labels != -100
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if all_rows:
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()
        logps = logits.log_softmax(-1).gather(-1, labels.where(keep, 0)[..., None])[..., 0]
        return (logps * keep).sum(1)
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    logits = F.linear(hidden[keep], model.lm_head.weight).float()
    logps = logits.log_softmax(-1).gather(-1, labels[keep][:, None])[:, 0]
    return torch.zeros(len(labels), device=logps.device).index_add(0, keep.nonzero()[:, 0], logps)


def run_plain(job: Job, workload: Workload, method: Method, device: torch.device, attention: str) -> dict[str, Any]:
    assert method.micro_batch is not None
    model = workload.make_model(str(device), attention).train()
    reference: nn.Module | None = copy.deepcopy(model).eval().requires_grad_(False)
    rows = _tokenized(job, workload)
    size, num_parts = method.micro_batch, workload.pairs_per_step // method.micro_batch
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    clock = Clock(job, device)
    all_rows = method.options.get("all_rows", False)
    cached = []
    if method.is_cached:
        with torch.no_grad():
            cached = [plain_logps(reference, collate(part, device), all_rows) for part in parts]
        reference = None
    num_responses = 0

    def head_rows(kwargs: dict[str, Any]) -> int:
        return kwargs["input_ids"].numel() if all_rows else num_responses

    for watched in filter(None, (model, reference)):
        clock.watch(watched if all_rows else watched.base_model, head_rows)  # type: ignore[arg-type]
    fetch = clock.timed(collate, "data_s")
    optimizer = torch.optim.AdamW(model.parameters(), lr=workload.learning_rate, weight_decay=0.0, fused=True)
    clock.start()
    for index, part in enumerate(parts):
        batch = fetch(part, device)
        num_responses = sum(len(row[name]) for row in part for name in ("chosen_ids", "rejected_ids"))
        with torch.no_grad():
            ref = cached[index] if reference is None else plain_logps(reference, batch, all_rows)
        logratios = plain_logps(model, batch, all_rows) - ref
        loss = -F.logsigmoid(BETA * (logratios[:size] - logratios[size:])).sum() / workload.pairs_per_step
        loss.backward()
        clock.losses.append(loss.detach())
        if (index + 1) % num_parts == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            clock.end_step()
    return clock.figures(num_parts)


def collate(rows: list[dict[str, list[int]]], device: torch.device) -> dict[str, Tensor]:
    """Chosen half first, padded on the right."""
    sequences = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows]
    width = max(len(prompt) + len(response) for prompt, response in sequences)
    input_ids = torch.zeros(len(sequences), width, dtype=torch.int64)
    mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)
    for index, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        input_ids[index, :end] = torch.tensor(prompt + response)
        mask[index, :end] = 1
        labels[index, len(prompt) : end] = torch.tensor(response)
    return {key: x.to(device) for key, x in (("input_ids", input_ids), ("attention_mask", mask), ("labels", labels))}


def _tokenized(job: Job, workload: Workload) -> list[dict[str, list[int]]]:
    from fastdpo.data.prepare import prepare_preference_dataset
    from fastdpo.data.tokens.tokenization import TokenizationSettings

    settings = TokenizationSettings(max_length=workload.max_length, on_bad_row="raise")
    prepared, _ = prepare_preference_dataset(_dataset(job, workload), make_tokenizer(workload), settings)
    return [
        {"prompt_ids": row["prompt_ids"], "chosen_ids": row["responses"][0], "rejected_ids": row["responses"][1]}
        for row in prepared
    ]


_RUNS = {"fastdpo": run_fastdpo, "trl": run_trl, "plain": run_plain}
