"""Loads a model given by name, and checks model and tokenizer before training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.compute
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from fastdpo.data.batches.lengths import row_lengths
from fastdpo.data.sources.arrow import arrow_column
from fastdpo.data.sources.nearest import check_model_folder
from fastdpo.data.tokens.chat.templates import give_template
from fastdpo.data.tokens.tokenization import padding_id
from fastdpo.modeling.backbone import backbone, bare_model, freeze_towers, tower_names
from fastdpo.training.settings.checks import load_whole_models
from fastdpo.training.settings.engine import EngineConfig
from fastdpo.training.setup.checkpoint_keys import check_all_loaded
from fastdpo.training.setup.gguf_files import as_folder
from fastdpo.training.setup.model_files import check_json_files, readable_files, too_deep
from fastdpo.training.setup.model_kinds import auto_class, check_kind, has_other_parts, is_encoder
from fastdpo.training.setup.source_files import source_file
from fastdpo.training.setup.tensor_parallel import cut_over_processes, distributed_options

logger = logging.get_logger(__name__)

# arguments of from_pretrained that also apply to configs and tokenizers
_WHERE_FROM = ("revision", "subfolder", "trust_remote_code", "token", "cache_dir", "local_files_only", "gguf_file")


def resolve_model(
    model: str | nn.Module,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None,
    args: EngineConfig,
    quantization_config: Any = None,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Model and tokenizer as objects, loaded if given by name, and checked against each other.

    Args:
        args: model_init_kwargs, trust_remote_code and pad_token are read.
    Raises:
        ValueError: one of them cannot be found, or they cannot be trained together.
    """
    if not isinstance(model, str | nn.Module):
        raise ValueError(f"model must be a model or the name of one, got {model!r}")
    init_kwargs = args.init_kwargs()
    if isinstance(model, str):
        load_config(model, init_kwargs)  # to refuse it before a tokenizer or weights are loaded
    tokenizer = resolve_tokenizer(model, tokenizer, args)
    if isinstance(model, str):
        if quantization_config is not None and "quantization_config" in init_kwargs:
            raise ValueError("quantization_config must not be given twice, as an argument and in model_init_kwargs")
        options = {} if quantization_config is None else {"quantization_config": quantization_config}
        if adapter_base(model) is None:
            options |= distributed_options(args)
        model = load_model(model, init_kwargs, **options)
    elif quantization_config is not None:
        raise ValueError("quantization_config must be None if model is an object instead of a name")
    elif args.model_init_kwargs is not None:
        logger.warning("model_init_kwargs has no effect, because the model is given as an object.")
    check_model_and_tokenizer(model, tokenizer)
    freeze_towers(bare_model(model))
    return cut_over_processes(model, args), tokenizer


def resolve_tokenizer(
    model: str | nn.Module, tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None, args: EngineConfig
) -> PreTrainedTokenizerBase:
    """The given tokenizer, possibly inside a processor, or the one saved with the model; with `args.pad_token` and, if
    the run saves its chat template with the tokenizer, with that template.

    Raises:
        ValueError: there is no tokenizer, it is not for text, or pad_token is not in its vocabulary.
    """
    if tokenizer is None:
        tokenizer = load_tokenizer(model_name(model), args.init_kwargs())
    if isinstance(tokenizer, ProcessorMixin):
        tokenizer = tokenizer_of(tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"processing_class must be a text tokenizer, got {type(tokenizer).__name__}")
    if args.pad_token is not None:
        if args.pad_token not in tokenizer.get_vocab():
            raise ValueError(f"pad_token must be in the tokenizer's vocabulary, got {args.pad_token!r}")
        tokenizer.pad_token = args.pad_token
    if args.chat_template is not None:
        give_template(tokenizer, args.chat_template)
    return tokenizer


def tokenizer_of(processor: ProcessorMixin) -> PreTrainedTokenizerBase:
    """The tokenizer in a processor, with the processor's chat template if the tokenizer has none.

    Raises:
        ValueError: the processor has no tokenizer.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(f"processing_class must have a tokenizer, got {type(processor).__name__} without one")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = getattr(processor, "chat_template", None)
    return tokenizer


def model_name(model: str | nn.Module) -> str:
    """The name or path that a model was loaded from; empty if unknown."""
    return model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")


def load_config(name: str, init_kwargs: dict[str, Any] | None = None, option: str = "model") -> Any:
    """The config of a model, or of an adapter's base model, without loading weights.

    Args:
        option: the setting that names the model, for errors.
    Raises:
        ValueError: the model does not exist, or it has no causal LM.
    """
    check_model_folder(option, name)
    base = as_folder(adapter_base(name) or name, option)
    try:
        with readable_files(option, base):
            config = AutoConfig.from_pretrained(base, **where_from(init_kwargs))
    except (OSError, ValueError) as error:
        of_adapter = "" if adapter_base(name) is None else f" (the base of the adapter {name})"
        raise ValueError(_no_model(base, error, option, of_adapter)) from error
    check_kind(config, base)
    return config


def _no_model(name: str, error: Exception, option: str = "model", what: str = "") -> str:
    return f"{option} must be a local directory or a model name on the Hub, got {name!r}{what}: {error}"


def adapter_base(name: str) -> str | None:
    """The base model of an adapter in a folder; None if the folder holds a model, or does not exist.

    Raises:
        ValueError: the adapter does not name its base model.
    """
    folder = Path(name)
    if not (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file():
        return None
    check_json_files(name)
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}/adapter_config.json must be JSON, got a file that is not ({error})") from None
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not base or not isinstance(base, str):
        raise ValueError(f"{name}/adapter_config.json must name the adapter's base_model_name_or_path, got {base!r}")
    if Path(base).is_dir() and not (Path(base) / "config.json").is_file():
        raise ValueError(
            f"{name}/adapter_config.json must name a model as base_model_name_or_path, got {base!r}, a folder without"
            " config.json"
        )
    return base


def load_tokenizer(name: str, init_kwargs: dict[str, Any] | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a model, loaded with the same `init_kwargs` as the model.

    Raises:
        ValueError: the model has no tokenizer.
    """
    if not name:
        raise ValueError("processing_class must be given, because the model does not name a folder with its tokenizer")
    where = where_from(init_kwargs)
    name = as_folder(name)
    check_json_files(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
    except RecursionError:
        raise too_deep(name) from None
    except (OSError, ValueError) as error:
        base = adapter_base(name)
        if base is not None:  # an adapter saved without a tokenizer
            return load_tokenizer(base, init_kwargs)
        raise ValueError(
            f"processing_class must be given if the model has no tokenizer, got None and no tokenizer in {name!r}:"
            f" {error}"
        ) from error
    except Exception as error:  # the last three are transformers', for values of other types than it expects
        if type(error) not in (Exception, AttributeError, KeyError, TypeError):  # the first is the tokenizers library's
            raise
        raise ValueError(f"the tokenizer of {name!r} cannot be read: {error!r}") from error
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _processors_template(name, where)
    return tokenizer


def _processors_template(name: str, where: dict[str, Any]) -> str | None:
    """The chat template of a checkpoint's processor; None if there is no processor or no template."""
    try:
        if not has_other_parts(AutoConfig.from_pretrained(name, **where)):
            return None
    except (OSError, ValueError):  # a folder with a tokenizer and no model
        return None
    try:
        return getattr(AutoProcessor.from_pretrained(name, **where), "chat_template", None)
    except Exception:  # any missing package of its parts: the file has the template too
        legacy = source_file(name, "chat_template.json", where)
        return None if legacy is None else json.loads(legacy.read_text()).get("chat_template")


def where_from(init_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """The arguments of from_pretrained that configs and tokenizers also take. Without trust_remote_code it is False:
    transformers would ask on the terminal whether to run a model's code."""
    given = {key: value for key, value in (init_kwargs or {}).items() if key in _WHERE_FROM}
    return {"trust_remote_code": False, **given}


def refuse_unpickling(init_kwargs: dict[str, Any] | None) -> None:
    """Raises:
    ValueError: these arguments of from_pretrained would unpickle weights.
    """
    if not (init_kwargs or {}).get("weights_only", True):
        raise ValueError(
            "model_init_kwargs must not turn weights_only off, got weights_only=False: unpickling weights runs code"
            " that they bring. Leave it out, and save the weights as safetensors"
        )


def load_model(name_or_path: str, model_init_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> nn.Module:
    """A causal LM by name or path, or a model with one inside, in fp32 unless `model_init_kwargs` names a dtype.

    A folder with an adapter gives its base model with the adapter, a PeftModel whose training can continue.

    Raises:
        ValueError: the model does not exist, it has no causal LM, or weights are missing.
    """
    base = adapter_base(name_or_path)
    if base is not None:
        return _with_saved_adapter(load_model(base, model_init_kwargs, **kwargs), name_or_path, model_init_kwargs)
    refuse_unpickling(model_init_kwargs)
    options: dict[str, Any] = {
        "dtype": torch.float32,
        "trust_remote_code": False,
        **(model_init_kwargs or {}),
        **kwargs,
    }
    load_whole_models()
    name_or_path = as_folder(name_or_path)
    try:
        with readable_files("model", name_or_path):
            config = AutoConfig.from_pretrained(name_or_path, **where_from(options))
            check_kind(config, str(name_or_path))
            loading = auto_class(config, str(name_or_path), **where_from(options))
            loaded = loading.from_pretrained(name_or_path, **options, output_loading_info=True)
    except TypeError as error:
        raise ValueError(
            f"model_init_kwargs must be arguments of from_pretrained, got {model_init_kwargs}: {error}"
        ) from error
    except ImportError as error:  # of a quantization, or of attn_implementation
        raise ValueError(f"loading {name_or_path!r} needs a package that is not installed: {error}") from error
    except OSError as error:
        raise ValueError(_no_model(name_or_path, error)) from error
    except RuntimeError as error:
        if "mismatched" not in str(error):
            raise
        raise ValueError(f"model must have weights of its config's sizes in {str(name_or_path)!r}: {error}") from error
    model, info = loaded
    check_all_loaded(str(name_or_path), info)
    return model


def _with_saved_adapter(base: nn.Module, folder: str, model_init_kwargs: dict[str, Any] | None) -> nn.Module:
    """The base model with a folder's adapter, for further training."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError('loading an adapter needs the peft package: pip install "fastdpo[peft]"') from error
    if not any(Path(folder).glob("adapter_model.*")):
        raise ValueError(f"model must have its adapter's weights, got {folder!r} without adapter_model.safetensors")
    with readable_files("model", folder):
        num_embeddings = _saved_embeddings(folder)
        if num_embeddings is None and (Path(folder) / "tokenizer_config.json").is_file():
            num_tokens = len(load_tokenizer(folder, model_init_kwargs))
            num_embeddings = max(num_tokens, base.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        if num_embeddings is not None:  # it was trained with tokens that the base does not have
            base.resize_token_embeddings(num_embeddings)  # type: ignore[operator]
        try:
            return PeftModel.from_pretrained(base, folder, is_trainable=True)
        except (KeyError, TypeError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "size mismatch" not in str(error):
                raise
            raise ValueError(
                f"{folder}/adapter_config.json must describe the adapter beside it, for the base model that it names:"
                f" {error!r}"
            ) from error


# Weights in an adapter's file that show the size of the vocabulary: the end of the name, and the dimension
_VOCABULARY_DIMENSIONS = (
    (re.compile(r"(embed_tokens|embed_in|wte|lm_head|embed_out)(\.modules_to_save|\.base_layer)?\.weight$"), 0),
    (re.compile(r"(lm_head|embed_out)\.lora_B\.weight$"), 0),
    (re.compile(r"\.lora_embedding_A$"), 1),
)


def _saved_embeddings(folder: str) -> int | None:
    """Number of tokens in embeddings saved with an adapter; None if no saved weight shows it."""
    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file():
        return None
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # it is no dict
            for pattern, dimension in _VOCABULARY_DIMENSIONS:
                if pattern.search(name):
                    return int(file.get_slice(name).get_shape()[dimension])
    return None


def check_model_and_tokenizer(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses combinations that would fail late or train nonsense.

    Raises:
        ValueError: the model is an encoder, or the tokenizer has no EOS within the model's embeddings.
    """
    bare = bare_model(model)
    if hasattr(bare, "config") and is_encoder(bare.config):
        raise ValueError(
            f"model must be a causal LM, got {type(bare).__name__}, an encoder: every token attends to later tokens"
        )
    num_embeddings = bare.get_input_embeddings().weight.shape[0]
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "processing_class must have an EOS token, got None: the model could not learn to end a response"
        )
    if len(tokenizer) <= num_embeddings:
        return
    too_many = f"{len(tokenizer)} tokens for a model with {num_embeddings} embeddings"
    remedy = "call model.resize_token_embeddings(len(tokenizer)) to train them"
    if max(padding_id(tokenizer), tokenizer.eos_token_id) >= num_embeddings:
        raise ValueError(
            f"processing_class must have its EOS and PAD among the model's embeddings, got {too_many}; {remedy}"
        )
    logger.warning(f"The tokenizer has {too_many}: a row with a token beyond them will stop the run; {remedy}.")


def check_token_ids(dataset: Dataset, num_embeddings: int, name: str) -> None:
    """Refuses token ids outside the embedding, which tokenized datasets may contain.

    Raises:
        ValueError: an id is not in [0, num_embeddings).
    """
    for column, depth in (("prompt_ids", 1), ("responses", 2)):
        ids = arrow_column(dataset, column)
        for _ in range(depth):
            ids = pyarrow.compute.list_flatten(ids)
        bounds = pyarrow.compute.min_max(ids).as_py()
        for bound in (bounds["min"], bounds["max"]):
            if bound is not None and not 0 <= bound < num_embeddings:
                raise ValueError(
                    f"token ids must be in [0, {num_embeddings}), the {name} dataset has {bound} in {column}"
                )


def check_lengths(model: nn.Module, dataset: Dataset, name: str) -> None:
    """Refuses sequences longer than the table of learned positions; rotary positions have no such limit.

    Raises:
        ValueError: a sequence has more tokens than the model has positions.
    """
    num_positions = learned_positions(model)
    if num_positions is None:
        return
    longest = int(row_lengths(dataset).sequences.max())
    if longest > num_positions:
        raise ValueError(
            f"max_length must be at most {num_positions}, the positions that {type(bare_model(model)).__name__} has"
            f" learned; the {name} dataset has a sequence of {longest} tokens"
        )


def learned_positions(model: nn.Module) -> int | None:
    """Number of positions in the model's table of positions; None without a table."""
    bare = bare_model(model)
    # towers, some of which are in the decoder, have tables of their own, of patches and frames
    towers = {module for name in tower_names(bare) for module in bare.get_submodule(name).modules()}
    tables = [
        module.num_embeddings - getattr(module, "offset", 0)
        for path, module in backbone(bare).named_modules()
        if isinstance(module, nn.Embedding) and module not in towers and ("wpe" in path or "position" in path)
    ]
    return min(tables) if tables else None


def head_dtype(model: nn.Module, args: Any) -> torch.dtype:
    """The dtype of the LM head's matmul: autocast's if it is on, else the weight's."""
    if args.bf16 or args.fp16:
        return torch.bfloat16 if args.bf16 else torch.float16
    return bare_model(model).get_output_embeddings().weight.dtype


def forget_accelerate(model: nn.Module) -> None:
    """Undoes an earlier `Accelerator.prepare` on a model: removes its marks and its autocast around forward.

    An evaluation before training leaves the model marked as prepared. It would not be wrapped in DDP again, and its
    processes would train separate models.
    """
    for module in model.modules():
        module.__dict__.pop("_is_accelerate_prepared", None)
        if "_original_forward" in module.__dict__:
            module.forward = module.__dict__.pop("_original_forward")


def keep_4_bits_trainable(model: Any) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights on a CPU with bf16 instructions, and undoes it.

    It repacks them at the first forward in eval mode without gradients, and multiplies with them in a product that has
    no backward: all gradients that pass a 4-bit layer would be lost without an error.
    """
    module: Any
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            module.state_dict()  # for which it packs them back, up to rounding


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability to 0: in modules, in attributes that layers read, and in PEFT's adapters."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
            elif "dropout" in name and isinstance(value, dict):
                value.update({key: 0.0 for key, p in value.items() if isinstance(p, float)})
