"""The options of `fastdpo train`, `sft` and `precompute`: dataclasses, their order in --help, and the parser of a run.

In: a command line and a YAML file, which may use the names of TRL's scripts and of the alignment-handbook. Out: one
object per dataclass. Refuses unknown names (and suggests the nearest), missing options, and unreadable files.
`python -m fastdpo.cli.options.generate` writes the fields of this module and of the configs to options/options.json.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from fastdpo.cli.options.from_fields import fields_parser
from fastdpo.cli.options.mixtures import checked_parts
from fastdpo.cli.options.reading import read
from fastdpo.cli.options.table import read_table, show_only
from fastdpo.training import DPOConfig, SFTConfig
from fastdpo.training.settings.checks import check_choice, help_text
from fastdpo.training.settings.trl_names import SETTINGS, translated

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class RunArguments:
    """Model, data and number of processes: the options that are not in the trainer's config."""

    model: str = field(metadata=help_text("Model to train: a local directory or a name on the Hub. Required."))
    dataset: str = field(
        metadata=help_text(
            "Training data: a .json, .jsonl (also .gz) or .parquet file, a directory, or a name. Required, unless"
            " datasets is given."
        )
    )
    model_revision: str | None = field(
        default=None, metadata=help_text("Branch, tag or commit of a model on the Hub, and of its tokenizer.")
    )
    dtype: str | None = field(
        default=None,
        metadata=help_text(
            f"Dtype of the loaded weights: one of {', '.join(DTYPES)}. Default: float32, which bf16 autocasts."
        ),
    )
    attn_implementation: str | None = field(
        default=None,
        metadata=help_text(
            "The model's own attention, as in from_pretrained, for padded batches and samples. Packed rows use"
            " attention_backend."
        ),
    )
    tokenizer: str | None = field(
        default=None, metadata=help_text("Tokenizer: a local directory or a name. Default: the model's.")
    )
    dataset_config: str | None = field(
        default=None,
        metadata=help_text(
            "Configuration (subset) of a named dataset. Also used for an eval_dataset of the same name."
        ),
    )
    dataset_split: str = field(default="train", metadata=help_text("Split of a named dataset."))
    dataset_streaming: bool = field(
        default=False, metadata=help_text("Read the data during the run, in its own order. Needs max_steps.")
    )
    datasets: Any = field(
        default=None,
        metadata=help_text(
            "Several sets of training data (JSON, or a list in FILE). Each has a path and, if needed, name,"
            " split, data_dir, data_files, columns, and fraction (its share of the mixture) or weight (the share"
            " of its own rows)."
        ),
    )
    eval_dataset: str | None = field(default=None, metadata=help_text("Evaluation data, in the same forms as dataset."))
    eval_split: str | None = field(
        default=None,
        metadata=help_text(
            "Split of a named evaluation dataset. Default: test. Without eval_dataset: the split of the training"
            " dataset to evaluate on; files have none."
        ),
    )
    eval_datasets: Any = field(
        default=None, metadata=help_text("Several sets of evaluation data, in the form of datasets.")
    )
    eval_fraction: float = field(
        default=0.05,
        metadata=help_text(
            "Share of the training data to hold out for evaluation, if there is no eval_dataset and the data is"
            " not a stream. 0 for none."
        ),
    )
    overwrite_output_dir: bool = field(default=False, metadata=help_text("Allow output_dir to contain another run."))
    ignore_bias_buffers: bool = field(
        default=False, metadata=help_text("Keep DDP from synchronizing the model's boolean buffers.")
    )
    accelerate_config: str | None = field(
        default=None,
        metadata=help_text(
            "Start several processes with accelerate: multi_gpu, fsdp2, hybrid, zero2, zero3, tp, sp, or a YAML file"
            " from `accelerate config`."
        ),
    )
    num_processes: int | None = field(
        default=None,
        metadata=help_text(
            "Number of processes, one per GPU. Default: as in accelerate_config, else the number of GPUs."
        ),
    )
    num_machines: int | None = field(default=None, metadata=help_text("Number of machines that run the processes."))
    machine_rank: int | None = field(default=None, metadata=help_text("Number of this machine, from 0."))
    main_process_ip: str | None = field(default=None, metadata=help_text("Address of machine 0."))
    main_process_port: int | None = field(default=None, metadata=help_text("A free port of machine 0."))

    def __post_init__(self) -> None:
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction must be in [0, 1), got {self.eval_fraction}")
        if self.dtype is not None:
            self.dtype = self.dtype.removeprefix("torch.")
            check_choice("dtype", self.dtype, DTYPES)
        for name in ("datasets", "eval_datasets"):
            if getattr(self, name) is not None:
                setattr(self, name, checked_parts(getattr(self, name), name))
        if self.eval_datasets is not None and self.eval_dataset is not None:
            raise ValueError("eval_dataset must not be given together with eval_datasets: both set the evaluation data")
        if self.datasets is not None and self.dataset is not None:
            raise ValueError(
                f"dataset must not be given together with datasets, got {self.dataset!r}: add it to datasets"
            )

    def load_settings(self) -> dict[str, Any]:
        """Arguments of from_pretrained that have their own option."""
        asked = {
            "revision": self.model_revision,
            "dtype": self.dtype,
            "attn_implementation": self.attn_implementation,
        }
        return {name: value for name, value in asked.items() if value is not None}

    def data_name(self) -> str:
        """Name of the training data in reports."""
        return self.dataset if self.datasets is None else ", ".join(part["path"] for part in self.datasets)


@dataclass
class LoraArguments:
    """LoRA and quantization of the base model."""

    use_peft: bool = field(default=False, metadata=help_text("Train a LoRA adapter instead of the model's weights."))
    lora_r: int = field(default=16, metadata=help_text("Rank of the adapter."))
    lora_alpha: int = field(
        default=32, metadata=help_text("Scale of the adapter: its product is multiplied by alpha / r.")
    )
    lora_dropout: float = field(
        default=0.0, metadata=help_text("Dropout on the adapter's input. No effect with disable_dropout.")
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata=help_text("Layers that get an adapter. Default: all linear layers except the head.")
    )
    lora_target_parameters: list[str] | None = field(
        default=None,
        metadata=help_text("Parameters that get an adapter but are not the weight of a layer, such as experts'."),
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata=help_text("Layers to train fully and to save with the adapter.")
    )
    lora_task_type: str = field(default="CAUSAL_LM", metadata=help_text("PEFT's name for the task: must be CAUSAL_LM."))
    use_rslora: bool = field(
        default=False, metadata=help_text("rsLoRA: multiply the adapter's product by alpha / sqrt(r).")
    )
    use_dora: bool = field(
        default=False, metadata=help_text("DoRA: train magnitude and direction of the weights separately.")
    )
    load_in_4bit: bool = field(default=False, metadata=help_text("QLoRA: load base weights in 4 bits (bitsandbytes)."))
    load_in_8bit: bool = field(default=False, metadata=help_text("Load base weights in 8 bits (bitsandbytes)."))
    bnb_4bit_quant_type: str = field(default="nf4", metadata=help_text("Type of 4-bit numbers: nf4 or fp4."))
    bnb_4bit_quant_storage: str | None = field(
        default=None,
        metadata=help_text("Storage dtype of 4-bit weights: uint8 (default), or the dtype that FSDP needs."),
    )
    use_bnb_nested_quant: bool = field(
        default=False, metadata=help_text("Also quantize the constants of 4-bit weights. Saves 0.4 bits per weight.")
    )

    def __post_init__(self) -> None:
        for name in ("load_in_4bit", "load_in_8bit"):
            if getattr(self, name) and not self.use_peft:
                bits = name[8]
                raise ValueError(f"{name} must be used together with use_peft: {bits}-bit weights cannot be trained")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit must not both be set, got both")
        changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        of_lora = [name for name in changed if name.startswith("lora_") or name in ("use_rslora", "use_dora")]
        if of_lora and not self.use_peft:
            raise ValueError(
                f"{of_lora[0]} must be used together with use_peft: without use_peft all weights are trained"
            )
        of_4bit = [name for name in changed if "bnb" in name]
        if of_4bit and not self.load_in_4bit:
            raise ValueError(f"{of_4bit[0]} must be used together with load_in_4bit")
        if self.lora_task_type.upper() != "CAUSAL_LM":
            raise ValueError(f"lora_task_type must be 'CAUSAL_LM', got {self.lora_task_type!r}")
        check_choice("bnb_4bit_quant_type", self.bnb_4bit_quant_type, ("nf4", "fp4"))


@dataclass
class AdapterArguments(LoraArguments):
    """Extra options of a preference run: an adapter on the trained model, and a separate reference model."""

    ref_model: str | None = field(
        default=None, metadata=help_text("Reference model. Default: the trained model at its start.")
    )


# Options in the order in which users look for them; options without a group are shown under "everything else".
GROUPS = {
    "model and data": "model dataset output_dir config model_revision dtype attn_implementation tokenizer chat_template"
    " dataset_config dataset_split dataset_streaming datasets eval_dataset eval_split eval_datasets eval_fraction"
    " max_length max_prompt_length truncation_mode on_long_row on_bad_row on_lost_content chat_template_kwargs"
    " dataset_format columns dataset_num_proc"
    " pad_token model_init_kwargs trust_remote_code disable_dropout",
    "preference optimization": "beta loss_type loss_weights label_smoothing f_divergence_type f_alpha_divergence_coef"
    " ld_alpha use_weighting discopop_tau gamma_beta_ratio cpo_alpha",
    "reference": "reference ref_model reference_free precompute_ref_log_probs precompute_ref_batch_size ref_cache_dir"
    " ref_max_memory ref_tokens_per_batch sync_ref_model ref_model_mixup_alpha ref_model_sync_steps",
    "steps": "learning_rate num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps"
    " lr_scheduler_type warmup_steps weight_decay max_grad_norm optim seed router_aux_loss_coef regroup_dataset"
    " length_bucketing balance_ranks",
    "engine and memory": "max_tokens_per_microbatch on_oversized_row packing padding_free pad_to_multiple_of"
    " prefix_sharing attention_backend impl skip_tolerance workspace_bytes token_metrics bf16 fp16"
    " gradient_checkpointing tile_rows activation_offloading weight_rounding optimizer_in_backward"
    " clipping_in_backward use_cpu",
    "adapters and quantized weights": "use_peft lora_r lora_alpha lora_dropout lora_target_modules"
    " lora_target_parameters lora_modules_to_save lora_task_type use_rslora use_dora load_in_4bit load_in_8bit"
    " bnb_4bit_quant_type bnb_4bit_quant_storage use_bnb_nested_quant",
    "several processes": "accelerate_config num_processes sequence_parallel_size num_machines machine_rank"
    " main_process_ip main_process_port ignore_bias_buffers",
    "evaluation and logging": "eval_strategy eval_steps per_device_eval_batch_size report_to run_name logging_steps"
    " num_eval_samples eval_sample_tokens eval_sample_temperature training_warnings disable_tqdm",
    "saving": "save_strategy save_steps save_total_limit resume_from_checkpoint overwrite_output_dir",
}


TYPES: dict[str, list[type]] = {
    "train": [RunArguments, AdapterArguments, DPOConfig],
    "sft": [RunArguments, LoraArguments, SFTConfig],
}
TYPES["precompute"] = TYPES["train"]


def parse(
    command: str, dataclass_types: Sequence[type], argv: Sequence[str], *, shown: Sequence[str] | None = None
) -> list[Any]:
    """One object per dataclass, from `--config FILE.yaml` (or .json) and flags, which override the file.

    Args:
        shown: the options listed by --help, for a command that accepts all options of `fastdpo train` but reads some.
    Raises:
        ValueError: an unknown option or key (with the nearest valid name), a missing option, or an unreadable file.
    """
    parser = fields_parser(command, dataclass_types, GROUPS, shown)
    if shown is not None:
        show_only(parser, shown)
    words = read(
        parser, argv, read_table()["former"], lambda former, given: _translated(dataclass_types, former, given)
    )
    *parsed, rest = parser.parse_args_into_dataclasses(
        words.argv, return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        raise ValueError(f"every value must follow an option, got {rest[0]!r}")
    for note in words.notes:
        warnings.warn(note, FutureWarning, stacklevel=2)
    return [value for value in parsed if not isinstance(value, argparse.Namespace)]


def _translated(
    dataclass_types: Sequence[type], former: dict[str, Any], given: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Former TRL names translated to current options, with a note for each."""
    known = {f.name for cls in dataclass_types for f in fields(cls)} | given.keys()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        settings = translated("fastdpo", {**given, **former}, known, SETTINGS, stacklevel=2)
    return {name: value for name, value in settings.items() if given.get(name) != value}, [
        str(warning.message) for warning in said
    ]
