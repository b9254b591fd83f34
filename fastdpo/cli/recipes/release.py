"""The original DPO release's Hydra configs: overrides from its command line, its config.yaml, or both.

In: a mapping of dotted names. Out: lines in a Book, including the defaults of its config.yaml that are not overridden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from fastdpo.cli.recipes.book import Book, Lost, Rule, as_number, follow
from fastdpo.cli.recipes.common import put_data

MARKS = (
    *("loss", "lr", "n_epochs", "n_examples", "policy_dtype", "exp_name", "do_first_eval", "sample_during_eval"),
    *("trainer", "eval_every", "n_eval_examples", "local_dirs", "minimum_log_interval_secs", "fsdp_port"),
)
# config/model/*.yaml: the names for `model=`
MODELS = {
    "gpt2-large": "gpt2-large",
    "gpt2-xl": "gpt2-xl",
    "gptj": "EleutherAI/gpt-j-6B",
    "llama7b": "huggyllama/llama-7b",
    "pythia28": "EleutherAI/pythia-2.8b",
    "pythia69": "EleutherAI/pythia-6.9b",
}
SETS = {"hh": "Anthropic/hh-rlhf", "shp": "stanfordnlp/SHP", "se": "HuggingFaceH4/stack-exchange-preferences"}
WHOSE = "the release"


def read_overrides(words: Sequence[str]) -> dict[str, Any]:
    """`loss.beta=0.1`, `+x=1`, `datasets=[hh,shp]` as a mapping of dotted names.

    Raises:
        ValueError: a word is not an override.
    """
    found: dict[str, Any] = {}
    for word in words:
        name, joined, text = word.partition("=")
        if not joined or not name.strip("+~"):
            raise ValueError(f"overrides must be name=value, got {word!r}")
        try:
            found[name.lstrip("+~")] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"overrides must have a value in valid YAML, got {word!r}: {error}") from error
    return found


def flattened(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"loss": {"beta": 0.1}} as {"loss.beta": 0.1}; entries of Hydra's `defaults` as `loss: dpo`."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        if key == "defaults" and isinstance(value, list):
            for entry in value:
                flat.update({str(k): v for k, v in entry.items()} if isinstance(entry, Mapping) else {})
        elif isinstance(value, Mapping):
            flat.update(flattened(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def migrate_release(recipe: Mapping[str, Any], book: Book) -> None:
    """Raises:
    ValueError: the release does not have this loss.
    """
    recipe = {key: value for key, value in flattened(recipe).items() if not _is_open(key, value, book)}
    loss = recipe.get("loss.name", recipe.get("loss", "sft"))
    if loss not in ("dpo", "ipo", "sft"):
        raise ValueError(f"loss must be dpo, ipo or sft, the losses of the release, got {loss!r}")
    book.command = "sft" if loss == "sft" else "train"
    _put_model(recipe, book)
    if recipe.get("datasets", ["hh"]):
        _put_sets(recipe, book)
    if loss != "sft":
        book.put("loss_type", "sigmoid" if loss == "dpo" else "ipo", f"was loss: {loss}")
    if loss == "ipo":
        book.lose(
            "loss",
            "ipo",
            "fastdpo takes the mean over a response's tokens; the release sums them, like preference_loss(ipo=True)",
        )
    follow({key: value for key, value in recipe.items() if key not in _DONE}, _RULES, _SAME, book)
    _put_steps(recipe, book)
    _put_names(recipe, book)
    for name, value in _DEFAULTS.items():
        book.default(name, value, WHOSE)
    if loss != "sft":
        book.default("max_prompt_length", 256, WHOSE)


def _is_open(key: str, value: Any, book: Book) -> bool:
    """Whether the value is a placeholder that Hydra would fill in."""
    if isinstance(value, str) and ("${" in value or value == "???"):
        if key.partition(".")[0] not in ("local_run_dir", "hydra"):
            book.lose(key, value, "Hydra would fill in this value: give it as an override, name=value")
        return True
    return False


def _put_model(recipe: Mapping[str, Any], book: Book) -> None:
    group, archive = recipe.get("model"), recipe.get("model.archive")
    name = recipe.get("model.name_or_path") or MODELS.get(str(group))
    if archive:
        book.put("model", archive, "was model.archive")
        book.lose(
            "model.archive",
            archive,
            "load the file's `state` into the model, save it by save_pretrained, and set model to that folder",
        )
    elif name is not None:
        book.put(
            "model",
            name,
            f"was model: {group}" if group and "model.name_or_path" not in recipe else "was model.name_or_path",
        )
    elif group is not None and group != "blank_model":
        book.put("model", group, "was model: fastdpo does not know its name_or_path")


def _put_sets(recipe: Mapping[str, Any], book: Book) -> None:
    value = recipe.get("datasets", ["hh"])
    names = [value] if isinstance(value, str) else list(value)
    comment = f"was datasets: {names}" if "datasets" in recipe else f"not in the recipe: {WHOSE}'s default"
    put_data(book, [{"path": SETS.get(str(name), str(name))} for name in names], comment)
    if names == ["hh"]:
        book.put("eval_split", "test", "the split that the release evaluates on")
        book.put("truncation_mode", "keep_end", "the release's mode for hh, which still cuts responses at their end")


def _put_steps(recipe: Mapping[str, Any], book: Book) -> None:
    """The release's batch_size is for a whole step on all GPUs; gradient_accumulation_steps divides it."""
    batch = int(as_number(recipe.get("batch_size", 4)) or 4)
    parts = int(as_number(recipe.get("gradient_accumulation_steps", 1)) or 1)
    why = f"was batch_size: {batch}" if "batch_size" in recipe else f"not in the recipe: {WHOSE}'s default of {batch}"
    more = f" / {parts} accumulated" if parts > 1 else ""
    book.put(
        "per_device_train_batch_size", max(batch // parts, 1), f"{why}{more}; divide it by the number of processes"
    )
    if parts > 1:
        book.put("gradient_accumulation_steps", parts)
    if recipe.get("n_examples") is not None:
        book.put("max_steps", max(int(recipe["n_examples"]) // batch, 1), "was n_examples, over batch_size")
    every = as_number(recipe.get("eval_every", 20_000))
    if every:
        whose = "was eval_every" if "eval_every" in recipe else f"not in the recipe: {WHOSE}'s default"
        book.put("eval_strategy", "steps", whose)
        book.put("eval_steps", max(int(every) // batch, 1), f"{whose}: {int(every)} examples, over batch_size")
    if recipe.get("do_first_eval", True):
        book.put("eval_on_start", True, "was do_first_eval" if "do_first_eval" in recipe else f"{WHOSE}'s default")
    if recipe.get("sample_during_eval", True) and book.command == "train":
        book.put("num_eval_samples", recipe.get("n_eval_model_samples", 16), "was n_eval_model_samples")


def _put_names(recipe: Mapping[str, Any], book: Book) -> None:
    name = recipe.get("exp_name")
    if name is not None:
        book.put("run_name", name, "was exp_name")
    book.put("output_dir", f"{name or 'dpo'}-out", "not in the recipe: the release makes a folder in .cache")
    if recipe.get("wandb.enabled", True) and not recipe.get("debug"):
        book.put("report_to", "wandb", "was wandb.enabled" if "wandb.enabled" in recipe else f"{WHOSE}'s default")
    for key, variable in (("wandb.project", "WANDB_PROJECT"), ("wandb.entity", "WANDB_ENTITY")):
        if recipe.get(key):
            book.environment[variable] = str(recipe[key])


def _optimizer(value: Any, book: Book, recipe: Mapping[str, Any]) -> None:
    known = {"rmsprop": "rmsprop", "adam": "adamw_torch", "adamw": "adamw_torch", "sgd": "sgd", "adagrad": "adagrad"}
    name = known.get(str(value).lower())
    if name is None:
        book.lose("optimizer", value, "write its name in transformers as optim, see --help")
    else:
        book.put("optim", name, f"was optimizer: {value}")


def _trainer(value: Any, book: Book, recipe: Mapping[str, Any]) -> None:
    if value == "FSDPTrainer":
        book.lose("trainer", value, "accelerate_config: fsdp2, or multi_gpu if the model fits on one GPU")
    elif value not in (None, "BasicTrainer"):
        book.lose("trainer", value, "accelerate_config: multi_gpu starts one process per GPU")


def _mixed_precision(value: Any, book: Book, recipe: Mapping[str, Any]) -> None:
    if value == "bfloat16":
        book.put("bf16", True, "was model.fsdp_policy_mp: bfloat16")


_DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-7,
    "optim": "rmsprop",
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 150,
    "max_grad_norm": 10.0,
    "max_length": 512,
    "num_train_epochs": 1,
    "per_device_eval_batch_size": 16,
    "seed": 0,
}
_DONE = (
    *("loss", "loss.name", "model", "model.name_or_path", "model.archive", "datasets", "batch_size", "n_examples"),
    *("gradient_accumulation_steps", "eval_every", "do_first_eval", "sample_during_eval", "n_eval_model_samples"),
    *("exp_name", "wandb.enabled", "wandb.project", "wandb.entity"),
)
_SAME = {"warmup_steps", "max_grad_norm", "max_length", "max_prompt_length", "seed"}
_RULES: dict[str, Rule] = {
    "loss.beta": "beta",
    "loss.label_smoothing": "label_smoothing",
    "loss.reference_free": "reference_free",
    "lr": "learning_rate",
    "optimizer": _optimizer,
    "n_epochs": "num_train_epochs",
    "eval_batch_size": "per_device_eval_batch_size",
    "n_eval_examples": Lost("fastdpo evaluates on all rows: for fewer, write a range in eval_split", (None,)),
    "activation_checkpointing": "gradient_checkpointing",
    "trainer": _trainer,
    "model.tokenizer_name_or_path": "tokenizer",
    "model.policy_dtype": "dtype",
    "model.reference_dtype": Lost(
        "the reference is loaded in the policy's dtype", (None, "float32", "float16", "bfloat16")
    ),
    "model.fsdp_policy_mp": _mixed_precision,
    "model.block_name": Lost("FSDP finds the blocks automatically", (None,)),
    "debug": Lost("report_to: none, save_strategy: no", (None, False)),
    "fsdp_port": Lost("main_process_port", (None,)),
    "minimum_log_interval_secs": Lost("set logging_steps, in optimizer steps", (None, 1.0, 1)),
    "local_dirs": Lost("output_dir", (None,)),
    "local_run_dir": Lost("output_dir", (None,)),
    "revision": "model_revision",
    **{key: Lost("Hydra's own", (None,)) for key in ("hydra.run.dir", "hydra.job.chdir")},
}
