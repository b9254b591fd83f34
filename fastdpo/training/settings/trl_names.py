"""Argument names of TRL, today's and former ones, and their translations.

In: the keyword arguments that a script passes. Out: fastdpo's keyword arguments, with one FutureWarning for each
argument that is translated or has no effect here. Arguments without a translation are refused with the line to write
instead, unknown names with the nearest existing ones.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

Settings = dict[str, Any]
ConfigClass = TypeVar("ConfigClass", bound=type)


@dataclass(frozen=True)
class Gone:
    """A name that fastdpo does not have."""

    instead: str  # the line to write, or why none is needed
    becomes: Callable[[Any, Settings], Settings] | None = None  # (value, all settings) -> settings that mean the same
    off: tuple[Any, ...] = (None, False)  # values that ask for nothing: dropped without a warning


def _renamed(name: str) -> Gone:
    return Gone(f"{name}={{value!r}}", lambda value, settings: {name: value})


def _needless(why: str) -> Gone:
    return Gone(f"nothing, because {why}", lambda value, settings: {})


def _with_sft(alpha: Any, settings: Settings) -> Settings:
    losses = settings.get("loss_type", "sigmoid")
    losses = [loss.strip() for loss in losses.split(",")] if isinstance(losses, str) else list(losses)
    weights = settings.get("loss_weights") or [1.0] * len(losses)
    return {"loss_type": [*losses, "sft"], "loss_weights": [*weights, alpha]}


def _gamma_beta_ratio(gamma: Any, settings: Settings) -> Settings:
    beta = settings.get("beta", 0.1)
    try:
        return {"gamma_beta_ratio": gamma / beta}
    except (TypeError, ZeroDivisionError) as error:
        raise ValueError(f"simpo_gamma must be a number and beta a number > 0, got {gamma!r} and {beta!r}") from error


_PADDING = "padding is masked out and fastdpo makes the labels, so the value has no effect"
_SELECT = "activate the adapter before you build the trainer: model.set_adapter({value!r})"

_OF_TRANSFORMERS: Mapping[str, Gone] = {  # former names of TrainingArguments
    "evaluation_strategy": _renamed("eval_strategy"),
    "no_cuda": _renamed("use_cpu"),
    "push_to_hub_token": _renamed("hub_token"),
    "push_to_hub_model_id": _renamed("hub_model_id"),
    "group_by_length": _renamed("length_bucketing"),
    "warmup_ratio": _renamed("warmup_steps"),  # values below 1 are a share of the steps
    "per_gpu_train_batch_size": _renamed("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": _renamed("per_device_eval_batch_size"),
    "overwrite_output_dir": _needless("files of another run in output_dir are always replaced"),
    "save_safetensors": Gone("nothing, because models are always saved as safetensors", off=(None, True)),
    "logging_dir": Gone("the environment variable TENSORBOARD_LOGGING_DIR={value!r}"),
}

# Of DPOConfig, and some of DPOTrainer before that.
SETTINGS: Mapping[str, Gone] = {
    "rpo_alpha": Gone("loss_type=['sigmoid', 'sft'], loss_weights=[1.0, {value}]", _with_sft),
    "simpo_gamma": Gone("gamma_beta_ratio={value} / beta", _gamma_beta_ratio),  # of CPOConfig
    "use_liger_loss": _needless("the head op never makes logits"),
    "use_logits_to_keep": _needless("only response positions reach the LM head"),
    "use_num_logits_to_keep": _needless("only response positions reach the LM head"),
    "base_model_attribute_name": _needless("the backbone is the model's base_model"),
    "force_use_ref_model": _needless("ref_model is always the reference if you give one, even for an adapter"),
    "padding_value": _needless(_PADDING),
    "label_pad_token_id": _needless(_PADDING),
    "max_completion_length": Gone("max_length={value}, which limits prompt and response together"),
    "max_target_length": Gone("max_length={value}, which limits prompt and response together"),
    "is_encoder_decoder": Gone("a causal LM: fastdpo does not train encoder-decoder models"),
    "generate_during_eval": Gone("num_eval_samples=8", lambda value, settings: {"num_eval_samples": 8}),
    "model_adapter_name": Gone(_SELECT),
    "ref_adapter_name": Gone('model.load_adapter(path, "ref"), which becomes the reference, or ref_model=...'),
    "ref_model_init_kwargs": Gone("ref_model=AutoModelForCausalLM.from_pretrained(..., **{value!r})"),
    "tools": Gone("a column `tools` in the dataset: dataset.map(lambda row: {{'tools': tools}})"),
    **_OF_TRANSFORMERS,
}

# Of SFTConfig, and some of SFTTrainer before that.
SFT_SETTINGS: Mapping[str, Gone] = {
    "max_seq_length": _renamed("max_length"),
    "chat_template_path": _renamed("chat_template"),
    "dataset_text_field": Gone(
        "columns that fastdpo reads: dataset.rename_column({value!r}, 'text')", off=(None, "text")
    ),
    "dataset_kwargs": Gone("prepare the dataset before you pass it: fastdpo only tokenizes it"),
    "eos_token": Gone("set it on the tokenizer: processing_class.eos_token = {value!r}"),
    "shuffle_dataset": Gone("dataset.shuffle(seed=...); training visits rows in random order in any case"),
    "packing_strategy": _needless("packing never cuts a row"),
    "eval_packing": _needless("evaluation gives the same numbers packed and padded"),
    "completion_only_loss": Gone(
        "nothing, because only responses are trained; to train on whole texts, use a column `text`", off=(None, True)
    ),
    "assistant_only_loss": _needless("only the assistant's turns are trained"),
    "loss_type": Gone("nothing: the loss is the negative log-prob per token", off=(None, "nll", "chunked_nll")),
    "num_of_sequences": _needless("packed rows have no fixed length"),
    "chars_per_token": _needless("packed rows have no fixed length"),
    "use_liger": Gone("use_liger_kernel={value!r}"),
    **_OF_TRANSFORMERS,
}

RENAMED_LOSSES: Mapping[str, str] = {
    "aot_pair": "'aot_unpaired', its name in TRL today",
    "kto_pair": "'apo_zero' or 'bco_pair'; KTO itself needs data without pairs",
}

TRAINER_ARGUMENTS = (  # of DPOTrainer, in the order of TRL's
    *("model", "ref_model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class"),
    *("compute_metrics", "callbacks", "optimizers", "quantization_config", "peft_config"),
)

# Of DPOTrainer alone.
ARGUMENTS: Mapping[str, Gone] = {
    "tokenizer": _renamed("processing_class"),
    "model_init": Gone("model=..., the model itself"),
    "optimizer_cls_and_kwargs": Gone("optimizers=(optimizer, scheduler), with an optimizer of that class"),
    "preprocess_logits_for_metrics": Gone("nothing, because there are no logits to preprocess"),
}

# Of SFTTrainer alone.
_SFT_METRICS = "nothing: no logits exist; fastdpo logs eval_loss, eval_mean_token_accuracy and eval_entropy"
SFT_ARGUMENTS: Mapping[str, Gone] = {
    **ARGUMENTS,
    "compute_metrics": Gone(_SFT_METRICS, off=(None,)),
    "preprocess_logits_for_metrics": Gone(_SFT_METRICS, off=(None,)),
    "compute_loss_func": Gone("a subclass that overrides compute_loss", off=(None,)),
    "formatting_func": Gone(
        "dataset.map(lambda row: {{'text': formatting_func(row)}}), or rows in a form that fastdpo reads", off=(None,)
    ),
}

# Methods of TRL's DPOTrainer (1.16 and before) that subclasses override to change the loss or the data.
METHODS = (
    *("_compute_loss", "compute_ref_log_probs", "_precompute_ref_logps"),
    *("dpo_loss", "get_batch_loss_metrics", "concatenated_forward", "concatenated_inputs", "tokenize_row"),
)


def check_methods(trainer: type) -> None:
    """Raises ValueError if a trainer overrides methods of TRL's, because fastdpo would never call them."""
    found = [name for name in METHODS if hasattr(trainer, name)]
    if found:
        raise ValueError(
            f"{trainer.__name__} must not override methods of TRL's trainer, got {found}: fastdpo never calls them."
            " Override compute_loss, or keep TRL's trainer with fastdpo.integrations.trl.accelerate(trainer)"
        )


def unknown_name(name: str, known: Collection[str]) -> str:
    """A hint with the nearest names, to append to a message; empty if there are none."""
    nearest = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""


def line_instead(name: str) -> str | None:
    """What to write instead of a former setting of TRL; None if TRL never had that name."""
    return SETTINGS[name].instead.replace("!r", "").format(value="...") if name in SETTINGS else None


def translated(
    owner: str, given: Settings, known: Collection[str], gone: Mapping[str, Gone], *, stacklevel: int
) -> Settings:
    """Keyword arguments as fastdpo names them.

    Args:
        owner: name of the class that got the arguments, for messages.
        known: the names that this class has.
        gone: translations of names that it does not have.
        stacklevel: of the warnings, so that they name the user's line: 2 is the caller's.
    Raises:
        ValueError: a name of TRL has no translation, or its translation is already given under the new name.
        TypeError: neither fastdpo nor TRL has the name.
    """
    settings = {name: value for name, value in given.items() if name in known}
    for name in [name for name in given if name not in known]:
        if name not in gone:
            raise TypeError(f"{owner} has no argument {name!r}{unknown_name(name, [*known, *gone])}")
        value, entry = given[name], gone[name]
        if any(type(value) is type(off) and value == off for off in entry.off):
            continue
        if entry.becomes is None:
            instead = entry.instead.format(value=value)
            raise ValueError(f"{owner} has no argument {name!r}, got {value!r}; instead: {instead}")
        new = entry.becomes(value, settings)
        twice = [key for key in new.keys() & settings.keys() if key not in ("loss_type", "loss_weights")]
        if twice:
            raise ValueError(f"{name} must not be given together with {twice[0]}, its name in fastdpo, got {value!r}")
        settings.update(new)
        instead = ", ".join(f"{key}={setting!r}" for key, setting in new.items()) or entry.instead
        message = f"{owner} has no argument {name!r}; instead: {instead}"
        warnings.warn(message, FutureWarning, stacklevel=stacklevel)
    return settings


def takes_trl_names(cls: ConfigClass, gone: Mapping[str, Gone] = SETTINGS) -> ConfigClass:
    """Lets a config class also take the names in `gone`, and suggest the nearest names for unknown ones.

    Decorate a dataclass subclass as well (`@takes_trl_names` above `@dataclass`): its own `__init__` refuses these
    names with Python's TypeError otherwise.
    """
    made = cls.__init__  # type: ignore[misc]
    known = {f.name for f in dataclasses.fields(cls) if f.init}

    @functools.wraps(made)
    def __init__(self: Any, *args: Any, **settings: Any) -> None:
        made(self, *args, **translated(cls.__name__, settings, known, gone, stacklevel=3))

    cls.__init__ = __init__  # type: ignore[misc]
    return cls


def takes_trls_sft_names(cls: ConfigClass) -> ConfigClass:
    """As `takes_trl_names`, with the names of TRL's SFTConfig."""
    return takes_trl_names(cls, SFT_SETTINGS)


@dataclass(frozen=True)
class TrainerNames:
    """The keyword arguments of a trainer, and those that TRL's trainer of the same name has or had."""

    trainer: str
    arguments: tuple[str, ...]
    gone_settings: Mapping[str, Gone]
    gone_arguments: Mapping[str, Gone]


DPO_NAMES = TrainerNames("DPOTrainer", TRAINER_ARGUMENTS, SETTINGS, ARGUMENTS)
SFT_NAMES = TrainerNames(
    "SFTTrainer",
    tuple(name for name in TRAINER_ARGUMENTS if name not in ("ref_model", "compute_metrics")),
    SFT_SETTINGS,
    SFT_ARGUMENTS,
)


def tokenizer_given_as(given: Settings, processing_class: Any, config: type, names: TrainerNames = DPO_NAMES) -> Any:
    """The processing_class, also if the caller gave it under a former name of TRL.

    Args:
        given: the trainer's unknown keyword arguments.
        processing_class: the argument of that name, or None.
        config: the class of the trainer's settings.
    Raises:
        ValueError: a name is a setting of the config, or has no translation.
        TypeError: TRL's trainer never had the name.
    """
    of_config = {f.name for f in dataclasses.fields(config)} | set(names.gone_settings)
    for name in sorted(given.keys() & of_config):
        raise ValueError(
            f"{name} must be given in the config: {names.trainer}(..., args={config.__name__}({name}=...)),"
            f" got {given[name]!r} as an argument of {names.trainer}"
        )
    own = {} if processing_class is None else {"processing_class": processing_class}
    taken = translated(names.trainer, {**own, **given}, names.arguments, names.gone_arguments, stacklevel=4)
    return taken.get("processing_class")


def is_trls_config(args: Any) -> bool:
    """Whether `args` is TRL's DPOConfig or a subclass of it. Does not import TRL."""
    return any(c.__name__ == "DPOConfig" and c.__module__.partition(".")[0] == "trl" for c in type(args).__mro__)


def settings_of(args: Any) -> Settings:
    """The settings that differ from the defaults of their class."""
    settings = {}
    for f in dataclasses.fields(args):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        value = getattr(args, f.name)
        if f.init and value != default:
            settings[f.name] = value
    return settings
