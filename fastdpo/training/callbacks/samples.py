"""Samples of policy and reference side by side, at every evaluation.

In: a built trainer. At each evaluation, policy and reference answer the first `num_eval_samples` prompts of the
evaluation data. If the reference is cached or there is none, samples of the initial policy are shown instead. Out: a
table on the console, and in TensorBoard, W&B and trackio if they are on, and lines of SAMPLES_FILE in the output
directory for the report. Refuses FSDP and DeepSpeed, which shard the weights. Generation uses the model's original
attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from fastdpo.data.terminal import PlainConsole
from fastdpo.data.visible import visible
from fastdpo.modeling.generation import DoesNotFit, generate_ids, special_ids
from fastdpo.references import AdapterReference, FrozenReference, Reference
from fastdpo.references.adapters import as_reference
from fastdpo.training.callbacks.json_lines import append_lines, read_lines, replace_lines
from fastdpo.training.callbacks.sample_tables import log_table
from fastdpo.training.callbacks.warning_checks import samples_grow
from fastdpo.training.callbacks.watch import TrainingWatch
from fastdpo.training.settings.config import DPOConfig
from fastdpo.training.setup.models import learned_positions

logger = logging.get_logger(__name__)

SAMPLES_FILE = "fastdpo_samples.jsonl"
BATCH_SIZE = 16  # prompts generated at a time


@dataclass(frozen=True)
class Answered:
    """The answers to one prompt at one evaluation; a line of SAMPLES_FILE."""

    step: int
    prompt: str
    policy: str
    policy_tokens: int
    reference: str | None  # None if it is not known
    reference_tokens: int | None
    reference_name: str  # "reference", or "before training"


class Response(NamedTuple):
    """A model's answer to one prompt."""

    text: str
    num_tokens: int


class EvalSamples(TrainerCallback):
    """Takes samples at every evaluation. `answered` holds all samples of the run.

    Args:
        policy_of: returns the trainer's model, which may be replaced.
        autocast: returns a context with the precision of the run.
        callbacks: all callbacks of the run, including its loggers.
        watch: warns if the answers grow too long.
        is_sharded: whether the weights are sharded over processes.
    Raises:
        ValueError: there is no evaluation data, no usable prompt, or the weights are sharded.
    """

    def __init__(
        self,
        args: DPOConfig,
        policy_of: Callable[[], nn.Module],
        reference: Reference,
        tokenizer: Any,
        eval_dataset: Any,
        *,
        autocast: Callable[[], Any],
        callbacks: Sequence[TrainerCallback],
        watch: TrainingWatch | None,
        is_sharded: bool,
    ) -> None:
        if is_sharded:
            raise ValueError(
                "num_eval_samples must be 0 under FSDP, DeepSpeed and tensor parallelism, which divide the weights, got"
                f" {args.num_eval_samples}"
            )
        if eval_dataset is None:
            raise ValueError(f"num_eval_samples must be 0 without eval_dataset, got {args.num_eval_samples}")
        self.args, self.policy_of, self.reference, self.tokenizer = args, policy_of, reference, tokenizer
        self.autocast, self.callbacks, self.watch = autocast, callbacks, watch
        num_positions = learned_positions(policy_of()) or math.inf
        longest = num_positions - args.eval_sample_tokens
        self.prompt_ids = _prompts(eval_dataset, args.num_eval_samples, longest)
        if not self.prompt_ids:
            raise ValueError(
                f"num_eval_samples must be 0, got {args.num_eval_samples}: no row of eval_dataset has a separate prompt"
                + (f" of at most {longest} tokens, which would leave room for the answer" if longest < math.inf else "")
            )
        self.answered: list[Answered] = []
        self._of_reference: list[Response] | None = None  # its answers, once they are known and cannot change

    def state(self) -> dict[str, Any]:
        """The answers of the initial policy for a checkpoint, if they are shown: a resumed run cannot generate them."""
        is_kept = self._of_reference is not None and self._live_reference() is None
        return {"of_reference": [list(response) for response in self._of_reference or ()] if is_kept else None}

    def restore(self, state: dict[str, Any]) -> None:
        if state["of_reference"] is not None:
            self._of_reference = [Response(*response) for response in state["of_reference"]]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / SAMPLES_FILE
        if state.global_step == 0:  # an old file is of another run, except for an evaluation just before training
            self.answered = [entry for entry in self.answered if entry.step == 0]
            replace_lines(path, map(asdict, self.answered))
            if self._live_reference() is None:
                self._of_reference = self._generate_or_warn(self.policy_of(), 0)
        elif path.is_file():
            found = [Answered(**line) for line in read_lines(path)]
            before = found[: len(found) - len(self.answered)] or found  # drop an evaluation just before resuming
            self.answered = [entry for entry in before if entry.step <= state.global_step]  # later ones are repeated
            replace_lines(path, map(asdict, self.answered))
            first = self.answered[: len(self.prompt_ids)]
            known = [Response(e.reference, e.reference_tokens or 0) for e in first if e.reference is not None]
            if len(known) == len(self.prompt_ids) and self._live_reference() is None:
                self._of_reference = known

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_new = not self.answered or self.answered[-1].step != state.global_step  # once for several datasets
        if state.is_world_process_zero and is_new:
            self.take(state.global_step)

    def take(self, step: int) -> list[Answered]:
        """Generates, shows and stores the samples at this step; none if they do not fit into memory."""
        policy = self._generate_or_warn(self.policy_of(), step)
        if policy is None:
            return []
        references, live = self._of_reference, self._live_reference()
        if references is None and live is not None:
            with live as model:
                references = self._generate_or_warn(model, step)
        elif references is None and step == 0:
            references = policy
        if not self.args.sync_ref_model:
            self._of_reference = references
        name = "before training" if live is None else "reference"
        prompts = self._decoded(self.prompt_ids)
        unknown = [(None, None)] * len(prompts)
        new = [
            Answered(step, prompt, ours.text, ours.num_tokens, *theirs, name)
            for prompt, ours, theirs in zip(prompts, policy, references or unknown, strict=True)
        ]
        self.answered.extend(new)
        self._write(new)
        self._show(new)
        if self.watch is not None and references is not None:
            lengths = [[response.num_tokens for response in responses] for responses in (policy, references)]
            self.watch.say("samples_grow", samples_grow(*lengths), self.args, step)
        return new

    def _write(self, entries: Sequence[Answered]) -> None:
        if not entries:
            return
        append_lines(Path(self.args.output_dir) / SAMPLES_FILE, map(asdict, entries))

    def _live_reference(self) -> Any:
        """A context that yields the reference model; None if no such model is loaded."""
        reference = self.reference
        if isinstance(reference, FrozenReference):
            return nullcontext(reference.model)
        if isinstance(reference, AdapterReference):
            return _asked(reference)
        return None

    def _generate_or_warn(self, model: nn.Module, step: int) -> list[Response] | None:
        """The answers, or None if a single one does not fit into memory, which must not end a run."""
        try:
            return self._generate(model)
        except DoesNotFit as error:
            reason = str(error).replace("max_new_tokens", "eval_sample_tokens")
            logger.warning(f"No samples at step {step}: {reason}")
            return None

    def _generate(self, model: nn.Module) -> list[Response]:
        args, tokenizer = self.args, self.tokenizer
        pad_id, eos_ids = special_ids(model, tokenizer)
        with self.autocast():
            ids = generate_ids(
                model,
                self.prompt_ids,
                pad_id=pad_id,
                eos_ids=eos_ids,
                max_new_tokens=args.eval_sample_tokens,
                temperature=args.eval_sample_temperature,
                batch_size=BATCH_SIZE,
                seed=args.seed,
            )
        return [Response(text, len(row)) for text, row in zip(self._decoded(ids), ids, strict=True)]

    def _decoded(self, rows: Sequence[Sequence[int]]) -> list[str]:
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        texts: list[str] = self.tokenizer.batch_decode(rows, **options)
        return texts

    def _show(self, samples: list[Answered]) -> None:
        from rich.table import Table
        from rich.text import Text

        step, reference_name = samples[0].step, samples[0].reference_name
        columns = ["prompt", "policy", reference_name]
        rows = [[entry.prompt, entry.policy, entry.reference or ""] for entry in samples]
        table = Table(title=f"samples at step {step}", show_lines=True)
        for column in columns:
            table.add_column(column, ratio=1, overflow="fold")
        for row in rows:
            table.add_row(*(Text(visible(cell.strip(), keeps="\n")) for cell in row))
        PlainConsole().print(table)
        log_table(self.callbacks, "eval/samples", columns, rows, step)


@contextmanager
def _asked(reference: AdapterReference) -> Iterator[nn.Module]:
    with as_reference(reference.peft_model):
        yield reference.peft_model


def _prompts(eval_dataset: Any, num_prompts: int, longest: float) -> list[list[int]]:
    """The first different prompts of at most `longest` tokens. Of several datasets, only the first is used."""
    dataset = next(iter(eval_dataset.values())) if isinstance(eval_dataset, dict) else eval_dataset
    prompts: dict[tuple[int, ...], None] = {}
    for row in dataset.select_columns(["prompt_ids"]) if isinstance(dataset, Dataset) else dataset:
        if len(prompts) == num_prompts:
            break
        # prompt_ids is empty if truncation cut the prompt differently for each response
        if 0 < len(row["prompt_ids"]) <= longest:
            prompts[tuple(row["prompt_ids"])] = None
    return [list(prompt) for prompt in prompts]
