"""The README.md of a trained model: base model, data, settings, results and warnings of its run.

In: a Run. Out: README.md in the output directory at every checkpoint, in the folder of `save_model`, and before
`push_to_hub` uploads. It contains only facts that the run knows.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from torch import nn
from transformers import TrainerCallback

from fastdpo.files import write_whole
from fastdpo.modeling.backbone import bare_model, is_composite
from fastdpo.references.adapters import is_peft_model
from fastdpo.training.callbacks.log_history import RESULTS, logs_by_source
from fastdpo.training.run import Run
from fastdpo.training.settings.losses import LossSettings
from fastdpo.training.setup.model_kinds import auto_classes
from fastdpo.training.setup.optimizers import optimizer_name

PACKAGES = ("fastdpo", "transformers", "torch", "triton", "datasets", "tokenizers", "peft")
PAPERS = {"dpo": "https://arxiv.org/abs/2305.18290"}
_NAMES_IN_TRANSFORMERS = {"finetuned_from": "base_model", "dataset": "datasets", "tasks": "pipeline_tag"}


class ModelCard(TrainerCallback):
    """Writes README.md at every checkpoint, before each upload, and when `write` is called."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.create_model_card()

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer pushes a checkpoint before it calls `on_save`."""
        self.run.create_model_card()

    def write(
        self,
        folder: str,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | Sequence[str] | None = None,
        **metadata: Any,
    ) -> None:
        """Writes README.md into `folder`, on the main process.

        Args:
            model_name: the title; by default the name of the repository or of the folder.
            dataset_name: a name on the Hub, or a description.
            tags: added to the tags "fastdpo" and the method.
            metadata: more fields of the card, such as license or language. Also takes transformers' names of fields.
        """
        if not self.run.state.is_world_process_zero:
            return
        for name, name_on_card in _NAMES_IN_TRANSFORMERS.items():
            if name in metadata:
                metadata[name_on_card] = metadata.pop(name)
        name = model_name or (self.run.hub_model_id or "").split("/")[-1] or Path(folder).absolute().name
        tags = [tags] if isinstance(tags, str) else list(tags or [])
        path = Path(folder) / "README.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, model_card(self.run, name, dataset_name or self.run.dataset_name, tags, metadata))


def tag_model(model: nn.Module, method: str) -> None:
    """Tags the model with transformers' tags, so that its own card and `push_to_hub` name the training method."""
    bare = bare_model(model)
    if hasattr(bare, "add_model_tags"):
        bare.add_model_tags(["fastdpo", method])


def model_card(
    run: Run,
    name: str,
    dataset_name: str | None,
    tags: Sequence[str],
    metadata: Mapping[str, Any],
) -> str:
    """The text of README.md."""
    is_adapter = is_peft_model(run.model)
    own_tags = ["fastdpo", run.method, *(["lora"] if is_adapter else [])]
    model_tags = getattr(bare_model(run.model), "model_tags", None) or []
    base = getattr(bare_model(run.model).config, "_name_or_path", "") or None
    on_hub = {"base_model": base if base and not _is_local(base) else None}
    if dataset_name and dataset_name.count("/") == 1 and not _is_local(dataset_name):
        on_hub["datasets"] = dataset_name
    known = {
        "model_name": name,
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "image-text-to-text" if is_composite(bare_model(run.model)) else "text-generation",
        "tags": list(dict.fromkeys([*own_tags, *model_tags, *tags])),
    }
    data = ModelCardData(**{**known, **{key: value for key, value in on_hub.items() if value}, **metadata})
    start = f"`{Path(base).name}`" if base else "A model"  # for a local model the name without its folder
    if on_hub["base_model"]:
        start = f"[{base}](https://huggingface.co/{base})"
    method = run.method.upper()
    method = f"[{method}]({PAPERS[run.method]})" if run.method in PAPERS else method
    data_words = f" on {dataset_name}" if dataset_name else ""
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        f"{start}, trained by {method}{data_words} with fastdpo.",
        f"## Use\n\n```python\n{_usage(run, is_adapter)}\n```",
        f"## Training\n\n{_table(('', ''), training_facts(run))}",
    ]
    results = _results(run.state.log_history)
    if results:
        parts.append(f"## Results\n\n{_table(results[0], results[1:])}\n\nRewards and log-probs are in nats.")
    if run.warnings_given:
        parts.append("## Warnings of training\n\n" + "\n".join(f"- {text}." for text in run.warnings_given.values()))
    parts.append(f"## Versions\n\n{_versions()}")
    return "\n\n".join(parts) + "\n"


def training_facts(run: Run) -> list[tuple[str, str]]:
    """(what, fact) lines about the run, in reading order."""
    args, model, state = run.args, run.model, run.state
    facts: list[tuple[str, str]] = []
    if run.reference is not None:
        reason = "; ".join(part for part in run.reference_reason.split("; ") if not part.startswith("in "))
        facts += [*_loss_facts(args), ("reference", f"{run.reference.mode}: {reason}")]  # without its local folder
    facts += [(f"{name} data", report.lines()[0]) for name, report in run.data_reports.items()]
    bare = bare_model(model)  # its num_parameters counts 4-bit weights right, although several share one element
    num_trained = bare.num_parameters(only_trainable=True)
    facts.append(("trained parameters", f"{num_trained:,} of {bare.num_parameters():,}"))
    config = next(iter(getattr(model, "peft_config", {}).values()), None)
    if config is not None:
        kind = getattr(config.peft_type, "value", str(config.peft_type))
        rank = f", r = {config.r}, alpha = {config.lora_alpha}" if hasattr(config, "lora_alpha") else ""
        facts.append(("adapter", kind + rank))
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.data_parallel_size
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return [
        *facts,
        ("optimizer steps", f"{state.global_step:,} of {rows} rows each, {state.epoch or 0:.2f} epochs"),
        ("optimizer", optimizer_name(args)),
        ("learning rate", f"{args.learning_rate:g}, {schedule}"),
        ("max_length", str(args.max_length)),
        ("precision", "bf16 autocast" if args.bf16 else "fp16 autocast" if args.fp16 else dtype),
        ("seed", str(args.seed)),
    ]


def _loss_facts(args: Any) -> list[tuple[str, str]]:
    losses = args.loss_type
    weights = args.loss_weights or [1.0] * len(losses)
    words = " + ".join(f"{weight:g} {name}" for weight, name in zip(weights, losses, strict=True))
    facts = [("loss", losses[0] if words == f"1 {losses[0]}" else words), ("beta", f"{args.beta:g}")]
    for setting in fields(LossSettings):
        value = getattr(args, setting.name)
        if setting.name not in ("loss_type", "loss_weights", "beta") and value != setting.default:
            facts.append((setting.name, str(value)))
    return facts


def _results(history: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows of the table of results, the header first; empty if nothing was logged."""
    last = {source: entries[-1] for source, entries in logs_by_source(history).items()}
    rows = [
        [words, *(f"{entry[key]:.4f}" if key in entry else "" for entry in last.values())]
        for key, words in RESULTS.items()
        if any(key in entry for entry in last.values())
    ]
    return [["at the last log", *last], *rows] if rows else []


def _usage(run: Run, is_adapter: bool) -> str:
    where = run.hub_model_id or "path/to/this/folder"
    bare = bare_model(run.model)
    kind = _auto_class_of(bare)
    reader = "AutoProcessor" if is_composite(bare) else "AutoTokenizer"
    reads = f'{"processor" if is_composite(bare) else "tokenizer"} = {reader}.from_pretrained("{where}")'
    if not is_adapter:
        imports = [f"from transformers import {kind}, {reader}"]
        loads = f'model = {kind}.from_pretrained("{where}")'
    elif kind == "AutoModelForCausalLM":
        imports = ["from peft import AutoPeftModelForCausalLM", f"from transformers import {reader}"]
        loads = f'model = AutoPeftModelForCausalLM.from_pretrained("{where}")'
    else:
        base = getattr(bare.config, "_name_or_path", "")
        base = base if base and not _is_local(base) else "path/to/the/base/model"
        imports = ["from peft import PeftModel", f"from transformers import {kind}, {reader}"]
        loads = f'model = PeftModel.from_pretrained({kind}.from_pretrained("{base}"), "{where}")'
    return "\n".join([*imports, "", loads, reads])


def _auto_class_of(bare: Any) -> str:
    """The auto class that loads the model. For a composite model, not the one that loads only its text part."""
    for auto in auto_classes(bare.config) if is_composite(bare) else ():
        if auto._model_mapping.get(type(bare.config), None) is type(bare):
            return str(auto.__name__)
    return "AutoModelForCausalLM"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in (columns, *rows)]
    return "\n".join([lines[0], "|" + " --- |" * len(columns), *lines[1:]])


def _versions() -> str:
    found = [f"- Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"- {package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "\n".join(found)


def _is_local(name: str) -> bool:
    """Whether a name is a path, or cannot be the name of a repository on the Hub."""
    return name.count("/") > 1 or " " in name or name.startswith((".", "/", "~")) or Path(name).exists()
