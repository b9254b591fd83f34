"""Checks before a run loads any weights: the models' configs, the tokenizer, the first rows.

In: the options of a run, and its datasets. Out: the tokenizer. Refuses missing or untrainable models and tokenizers,
and unreadable rows, each with the option to type. Loading a model before these checks could cost minutes.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

from fastdpo.cli.arguments import RunArguments
from fastdpo.data.forms.formats import regrouped
from fastdpo.data.rows.columns import RowPreparer
from fastdpo.data.sources.loading import raw_example
from fastdpo.training.settings.config import SFTConfig
from fastdpo.training.settings.engine import EngineConfig
from fastdpo.training.setup.models import load_config, load_tokenizer, resolve_tokenizer

NUM_ROWS = 3  # of each dataset, that are read and tokenized first


def merge_load_settings(args: EngineConfig, asked: dict[str, Any]) -> None:
    """Adds the values of load options such as --dtype to model_init_kwargs.

    Raises:
        ValueError: an option and model_init_kwargs have different values.
    """
    given = args.init_kwargs()
    for name, value in asked.items():
        if name in given and str(given[name]).removeprefix("torch.") != value:
            option = "model_revision" if name == "revision" else name
            raise ValueError(
                f"{option} must equal its value in model_init_kwargs, got {value!r} and {str(given[name])!r} there"
            )
    if asked:
        kwargs: Any = args.model_init_kwargs or {}
        args.model_init_kwargs = {**asked, **kwargs}


def look_at_models(run: RunArguments, args: EngineConfig, ref_model: str | None = None) -> Any:
    """Checks the configs of model and reference, and returns the tokenizer of the run.

    Raises:
        ValueError: one of them is missing or cannot be trained; the message names the option to change.
    """
    load_config(run.model, args.init_kwargs())
    if ref_model is not None:
        load_config(ref_model, args.init_kwargs(), "ref_model")
    tokenizer = _load_tokenizer(run, args)
    return resolve_tokenizer(run.model, tokenizer, args)


def _load_tokenizer(run: RunArguments, args: EngineConfig) -> Any:
    """Loads `tokenizer`, or the model's own."""
    if run.tokenizer is not None:
        trust = {"trust_remote_code": True} if args.trust_remote_code else {}
        try:
            return load_tokenizer(run.tokenizer, trust)
        except ValueError as error:
            raise ValueError(
                f"tokenizer must be a local directory or a name on the Hub, got {run.tokenizer!r}: {_first(error)}"
            ) from error
    try:
        return load_tokenizer(run.model, args.init_kwargs())
    except ValueError as error:
        raise ValueError(
            f"model must come with a tokenizer, got {run.model!r} without one: {_first(error.__cause__ or error)};"
            " name another one: --tokenizer FOLDER_OR_NAME"
        ) from error


def look_at_rows(train: Any, evaluated: Any, tokenizer: Any, args: EngineConfig, run: RunArguments) -> None:
    """Reads and tokenizes the first rows of both datasets with the settings of the run.

    Raises:
        ValueError: the rows cannot be read; the message names a remedy.
    """
    for name, dataset in (("training", train), ("evaluation", evaluated)):
        if dataset is not None:
            try:
                _look_at_rows(dataset, tokenizer, args)
            except ValueError as error:
                shown = run.data_name() if name == "training" else run.eval_dataset or run.eval_split or "held out"
                remedy = _remedy(str(error), args, run)
                raise ValueError(f"the {name} data ({shown}) cannot be read: {error}{remedy}") from error


def _look_at_rows(dataset: Any, tokenizer: Any, args: EngineConfig) -> None:
    settings, is_sft = args.tokenization_settings(), isinstance(args, SFTConfig)
    features = getattr(dataset, "features", None)
    examples = list(islice(iter(dataset), NUM_ROWS))
    if not examples:
        return
    if regrouped((), raw_example(examples[0], features), args.dataset_format, is_sft=is_sft) is not None:
        return  # read as a whole: a few of its rows may hold no pair
    RowPreparer(tokenizer, settings, is_sft, features).columns(examples, range(len(examples)))


def _remedy(message: str, args: EngineConfig, run: RunArguments) -> str:
    """The options to type if no format fits, or if there is no chat template."""
    if "did you mean" in message:
        return ""
    if "chat template" in message:
        return "; write --chat_template FILE"
    if hasattr(args, "columns") or hasattr(run, "columns"):
        return "; write --columns prompt=...,chosen=...,rejected=..., or name the format: --dataset_format NAME"
    return "; rename the columns, or name the format: --dataset_format NAME"


def _first(error: BaseException) -> str:
    """The first line of a message; further lines of from_pretrained are about the Hub."""
    return str(error).strip().partition("\n")[0].rstrip(".")
