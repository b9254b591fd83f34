"""Recipes of LLaMA-Factory with `stage: dpo`.

In: the mapping in the YAML file, and its folder, near which dataset_info.json is searched. Out: lines in a Book.
Refuses recipes of other stages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdpo.cli.recipes.book import Book, Lost, Rule, as_number, follow, if_true, with_others
from fastdpo.cli.recipes.common import put_data, put_deepspeed, put_held_out, without_evaluation
from fastdpo.cli.recipes.trl import options_of_train

MARKS = (
    *("stage", "finetuning_type", "pref_beta", "pref_loss", "pref_ftx", "cutoff_len", "template", "dataset_dir"),
    *("lora_rank", "lora_target", "max_samples", "quantization_bit", "flash_attn", "overwrite_cache", "plot_loss"),
    *("val_size", "neat_packing", "additional_target", "enable_liger_kernel", "use_unsloth"),
)
LOSSES = ("sigmoid", "hinge", "ipo", "orpo", "simpo")


def migrate_llama_factory(recipe: Mapping[str, Any], book: Book, folder: Path) -> None:
    """Raises:
    ValueError: the recipe is of another stage.
    """
    if recipe.get("stage") != "dpo":
        raise ValueError(f"stage must be 'dpo' in a recipe of LLaMA-Factory's, got {recipe.get('stage')!r}")
    info = _dataset_info(recipe, folder)
    for key, ours in (("dataset", False), ("eval_dataset", True)):
        if recipe.get(key):
            _put_sets(key, recipe, book, info, evaluated=ours)
    follow({key: value for key, value in recipe.items() if key not in _DONE}, _RULES, options_of_train(), book)
    _put_loss(recipe, book)
    book.default("learning_rate", 5e-5, "LLaMA-Factory")
    book.default("max_length", 2048, "LLaMA-Factory")
    if book.value("use_peft"):
        rank = int(book.value("lora_r", 8))
        book.default("lora_r", rank, "LLaMA-Factory")
        book.default("lora_alpha", 2 * rank, "LLaMA-Factory")
    without_evaluation(book, "LLaMA-Factory")


def _inside(folder: Path, file: str, name: str) -> Path:
    """The file of a set in the folder of dataset_info.json, which must not name files elsewhere.

    Raises:
        ValueError: the path leaves the folder.
    """
    path = folder / file
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"dataset_info.json must name files in its own folder, got file_name {file!r} for the set {name!r}; if you"
            " want that file, write its path into the recipe"
        )
    return path


def _dataset_info(recipe: Mapping[str, Any], folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """The folder of the data, and the entries of dataset_info.json; empty if it is not found."""
    named = Path(str(recipe.get("dataset_dir") or "data"))
    for place in (named, folder / named, *(parent / named for parent in folder.parents)):
        file = place / "dataset_info.json"
        if file.is_file():
            try:
                known = json.loads(file.read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file} is not valid JSON: {error}") from None
            if not isinstance(known, dict) or not all(isinstance(entry, dict) for entry in known.values()):
                raise ValueError(f"{file} must hold an object per set")
            return place, known
    return None, {}


def _put_sets(
    key: str, recipe: Mapping[str, Any], book: Book, info: tuple[Path | None, dict[str, Any]], *, evaluated: bool
) -> None:
    value = recipe[key]
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else list(value)
    parts = [_part(str(name), key, book, info) for name in names]
    limit = recipe.get("max_samples")
    if limit is not None and not evaluated:
        parts = [{**part, "split": f"{part.get('split', 'train')}[:{int(limit)}]"} for part in parts]
    comment = f"was {key}: {value}" + ("" if limit is None or evaluated else f", max_samples: {limit}")
    put_data(book, parts, comment, evaluated=evaluated)


def _part(name: str, key: str, book: Book, info: tuple[Path | None, dict[str, Any]]) -> dict[str, Any]:
    """The dataset that dataset_info.json defines for a name."""
    folder, known = info
    if name not in known:
        if not Path(name).exists():
            book.lose(key, name, "dataset_info.json, which defines this name, was not found: write the file's path")
        return {"path": name}
    entry, part = known[name], {}
    if "hf_hub_url" in entry:
        part["path"] = entry["hf_hub_url"]
    elif "file_name" in entry and folder is not None:
        part["path"] = str(_inside(folder, str(entry["file_name"]), name))
    else:
        book.lose(key, name, f"dataset_info.json gives neither a file nor a name on the Hub, only {sorted(entry)}")
        part["path"] = name
    for theirs, ours in (("subset", "name"), ("split", "split")):
        if theirs in entry:
            part[ours] = entry[theirs]
    if entry.get("ranking") is not True:
        book.lose(
            key, name, "dataset_info.json does not mark it as a ranking: its rows must hold a better and a worse answer"
        )
    for theirs in ("columns", "tags"):
        if theirs in entry:
            book.lose(
                f"dataset_info.json: {name}.{theirs}", entry[theirs], "fastdpo reads rows by the names of their columns"
            )
    if "num_samples" in entry:
        part["split"] = f"{part.get('split', 'train')}[:{int(entry['num_samples'])}]"
    return part


def _put_loss(recipe: Mapping[str, Any], book: Book) -> None:
    loss = recipe.get("pref_loss", "sigmoid")
    if loss == "kto_pair":
        book.lose("pref_loss", loss, "the nearest are loss_type: apo_zero and bco_pair")
        loss = "sigmoid"
    if loss not in LOSSES:
        raise ValueError(f"pref_loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    share = as_number(recipe.get("pref_ftx"))
    if share:
        book.put("loss_type", [loss, "sft"], f"was pref_loss: {loss}, pref_ftx: {recipe['pref_ftx']}")
        book.put("loss_weights", [1.0, share], f"was pref_ftx: {recipe['pref_ftx']}")
    elif "pref_loss" in recipe:
        book.put("loss_type", loss, f"was pref_loss: {loss}")
    if loss == "simpo":
        gamma, beta = as_number(recipe.get("simpo_gamma", 0.5)), as_number(book.value("beta", 0.1))
        if gamma is not None and beta:
            book.put("gamma_beta_ratio", gamma / beta, f"was simpo_gamma: {gamma}, over pref_beta")


def _method(value: Any, book: Book, recipe: Mapping[str, Any]) -> None:
    if value == "lora":
        book.put("use_peft", True, "was finetuning_type: lora")
    elif value not in (None, "full"):
        book.lose(
            "finetuning_type",
            value,
            "the command line trains all weights, or LoRA with use_peft; use Python for other methods",
        )


def _target(value: Any, book: Book, recipe: Mapping[str, Any]) -> None:
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    if names == ["all"]:
        book.put("lora_target_modules", ["all-linear"], "was lora_target: all")
    elif names:
        book.put("lora_target_modules", names, "was lora_target")


def _additional(value: Any, book: Book, recipe: Mapping[str, Any]) -> None:
    if value:
        names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
        book.put("lora_modules_to_save", names, "was additional_target")


def _bits(value: Any, book: Book, recipe: Mapping[str, Any]) -> None:
    if value in (4, 8):
        book.put(f"load_in_{value}bit", True, f"was quantization_bit: {value}")
        if value == 4 and recipe.get("double_quantization", True):
            whose = "was double_quantization" if "double_quantization" in recipe else "LLaMA-Factory's default"
            book.put("use_bnb_nested_quant", True, whose)
    elif value is not None:
        book.lose("quantization_bit", value, "fastdpo quantizes weights to 4 or 8 bits only")


def _attention(value: Any, book: Book, recipe: Mapping[str, Any]) -> None:
    backends = {"fa2": "flash2", "fa3": "flash3", "sdpa": "sdpa", "disabled": "mask"}
    if value in backends:
        book.put("attention_backend", backends[value], f"was flash_attn: {value}")
    elif value not in (None, "auto"):
        book.lose("flash_attn", value, "attention_backend: auto takes the fastest exact attention")


def _adapter_folder(value: Any, book: Book, recipe: Mapping[str, Any]) -> None:
    if value:
        book.put("model", value, "was adapter_name_or_path: training continues this adapter on its own base model")
        book.lose("model_name_or_path", recipe.get("model_name_or_path"), "the adapter's folder names its base")


def _model(value: Any, book: Book, recipe: Mapping[str, Any]) -> None:
    if not recipe.get("adapter_name_or_path"):
        book.put("model", value, "was model_name_or_path")


def _former(ours: str, key: str) -> Rule:
    def rule(value: Any, book: Book, recipe: Mapping[str, Any]) -> None:
        if value is not None and ours not in recipe:
            book.put(ours, value, f"was {key}")

    return rule


def _reentrant(value: Any, book: Book, recipe: Mapping[str, Any]) -> None:
    book.put("gradient_checkpointing_kwargs", {"use_reentrant": bool(value)}, "was use_reentrant_gc")


def _cache_dir(value: Any, book: Book, recipe: Mapping[str, Any]) -> None:
    if value:
        book.put("model_init_kwargs", {"cache_dir": value}, "was cache_dir")


_DONE = ("dataset", "eval_dataset", "max_samples", "dataset_dir", "stage", "pref_loss", "pref_ftx", "simpo_gamma")
_PACKED = Lost("no effect: rows are always packed without padding", (None, False, True))
_NEEDLESS_CACHE = Lost("tokenized rows are stored in datasets' cache", (None, False, True))

_RULES: dict[str, Rule] = {
    "model_name_or_path": _model,
    "adapter_name_or_path": _adapter_folder,
    "do_train": Lost("", (None, True, False)),
    "do_predict": Lost("for an evaluation set eval_dataset or eval_fraction"),
    "predict_with_generate": Lost("num_eval_samples: 8"),
    "finetuning_type": _method,
    "lora_rank": "lora_r",
    "lora_target": _target,
    "additional_target": _additional,
    "create_new_adapter": Lost("merge the old adapter first: model.merge_and_unload()"),
    "loraplus_lr_ratio": Lost("both factors of LoRA have one learning rate"),
    "pissa_init": Lost("peft_config=LoraConfig(init_lora_weights='pissa') in Python"),
    "freeze_trainable_layers": Lost("freeze parameters in Python: parameter.requires_grad_(False)"),
    "pref_beta": "beta",
    "pref_bco_weight": Lost("loss_type: bco_pair with loss_weights", (None, 0, 0.0)),
    "dpo_label_smoothing": "label_smoothing",
    "ref_model_adapters": Lost("set ref_model to that folder, an adapter that names its base model"),
    "ref_model_quantization_bit": Lost("a separate reference model is not quantized; with use_peft there is none"),
    "template": Lost(
        "the tokenizer's own chat template is used; for another one write chat_template: FILE.jinja", (None,)
    ),
    "default_system": Lost("begin the rows' prompts with a message of the role system"),
    "enable_thinking": Lost("add a column chat_template_kwargs to the rows", (None, True)),
    "cutoff_len": "max_length",
    "overwrite_cache": _NEEDLESS_CACHE,
    "tokenized_path": _NEEDLESS_CACHE,
    "preprocessing_num_workers": "dataset_num_proc",
    "preprocessing_batch_size": Lost("", (None, 1000)),
    "streaming": "dataset_streaming",
    "buffer_size": Lost("a stream is read in its own order", (None, 16384)),
    "mix_strategy": Lost("datasets are always concatenated and shuffled", (None, "concat")),
    "interleave_probs": Lost("write datasets with a fraction for each"),
    "val_size": lambda value, book, recipe: put_held_out(book, "val_size", value) if value else None,
    "train_on_prompt": Lost("the loss always covers response tokens only"),
    "mask_history": Lost("the loss covers only the responses of a pair", (None, False, True)),
    "packing": _PACKED,
    "neat_packing": _PACKED,
    "plot_loss": Lost("report.html has the curves", (None, False, True)),
    "flash_attn": _attention,
    "quantization_bit": _bits,
    "quantization_method": Lost("weights are quantized by bitsandbytes", (None, "bnb", "bitsandbytes")),
    "quantization_type": "bnb_4bit_quant_type",
    "double_quantization": with_others,  # quantization_bit
    "enable_liger_kernel": if_true("enable_liger_kernel", "use_liger_kernel", True),
    "use_unsloth": Lost("fastdpo uses its own kernels"),
    "use_unsloth_gc": Lost("gradient_checkpointing: true, activation_offloading: true"),
    "disable_gradient_checkpointing": if_true("disable_gradient_checkpointing", "gradient_checkpointing", False),
    "use_reentrant_gc": _reentrant,
    "upcast_layernorm": Lost("weights are loaded in float32 unless dtype is set"),
    "upcast_lmhead_output": Lost("log-probs are always computed in float32", (None, False, True)),
    "pure_bf16": if_true("pure_bf16", "dtype", "bfloat16"),
    "rope_scaling": Lost("model_init_kwargs: {rope_scaling: ...}, with the keys of the model's config"),
    "cache_dir": _cache_dir,
    "use_fast_tokenizer": Lost("the fast tokenizer is taken where there is one", (None, True)),
    "resize_vocab": Lost("save a model with enough embeddings for the tokenizer"),
    "add_tokens": Lost("save a model and a tokenizer with these tokens"),
    "use_swanlab": Lost("report_to: swanlab"),
    "use_galore": Lost("optim: galore_adamw, with optim_target_modules"),
    "use_badam": Lost("an optimizer of its own: DPOTrainer(optimizers=...) in Python"),
    "deepspeed": lambda value, book, recipe: put_deepspeed(book, value),
    "ray_run_name": Lost("processes are started by accelerate", (None,)),
    "evaluation_strategy": _former("eval_strategy", "evaluation_strategy"),
    "warmup_ratio": _former("warmup_steps", "warmup_ratio"),
    "include_effective_tokens_per_second": Lost("num_tokens is in the log", (None, False, True)),
}
