"""The settings that every run has: TrainingArguments plus settings of model, data and engine.

Names are TRL's wherever TRL has the setting. `__post_init__` checks the values before anything is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils import logging

from fastdpo.data.forms.formats import FORMAT_NAMES, check_columns
from fastdpo.data.tokens.chat.templates import resolve_template, training_templates
from fastdpo.data.tokens.tokenization import TokenizationSettings
from fastdpo.modeling.attention import ATTENTION_BACKENDS
from fastdpo.ops.engine import IMPLS
from fastdpo.ops.validation import check_settings
from fastdpo.training.settings.checks import (
    as_dict,
    check_choice,
    check_count,
    check_number,
    check_order_of_rows,
    check_oversized_row,
    check_packing_settings,
    check_sequence_parallel_settings,
    check_steps,
    check_trainer_settings,
    count_or_auto,
    help_text,
    load_whole_models,
    offload_checkpoints,
    resolve_checkpointing,
    with_torch_dtype,
)
from fastdpo.training.updates.in_backward import CLIPPINGS
from fastdpo.training.updates.rounding import ROUNDINGS

logger = logging.get_logger(__name__)

PACKING_MODES = ("auto", "packed", "padded")
OVERSIZED_ROWS = ("alone", "raise", "skip", "split")
FULL_DISK = ("stop", "wait")
WORKERS_ON_A_GPU = 2  # without workers, the GPU waits 5 to 15 ms a step while the main process collates


@dataclass
class EngineConfig(TrainingArguments):
    """What DPOConfig and SFTConfig have in common."""

    # Defaults that differ from TrainingArguments. The first two are TRL's defaults.
    logging_steps: float = field(default=10, metadata=help_text("Optimizer steps between two log entries."))
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata=help_text("Recompute activations in backward. Default: on with a GPU, else off."),
    )
    bf16: bool | None = field(
        default=None,
        metadata=help_text("Use bf16 autocast. Default: on if a GPU supports it and fp16 is off, else off."),
    )
    remove_unused_columns: bool = field(
        default=False, metadata=help_text("No effect: unused columns are always dropped after tokenization.")
    )
    dataloader_num_workers: int | None = field(
        default=None,
        metadata=help_text(
            "Processes that build batches while the GPU works. Default: 2 with a GPU, else 0; 0 for streams."
        ),
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata=help_text("Must stay off. If a loss is not finite, the run stops and saves the batch.")
    )

    # Model
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata=help_text("Keyword arguments of from_pretrained, for a model given by name (JSON)."),
    )
    trust_remote_code: bool = field(
        default=False, metadata=help_text("Run code from the Hub that comes with models and tokenizers.")
    )
    disable_dropout: bool = field(
        default=True, metadata=help_text("Set every dropout of policy and reference to 0, including LoRA's.")
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata=help_text(
            "Weight of the load-balancing loss of mixture-of-experts models. Default: the weight in the model's"
            " config; 0 turns it off."
        ),
    )

    # Data
    max_length: int | None = field(
        default=1024, metadata=help_text("Tokens of prompt + response to keep. None keeps all.")
    )
    max_prompt_length: int | None = field(
        default=None, metadata=help_text("Tokens of the prompt to keep. None keeps all.")
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata=help_text("Which end of a long sequence or prompt to keep: keep_start or keep_end."),
    )
    on_bad_row: str = field(
        default="drop",
        metadata=help_text(
            "What to do with unusable rows. drop: leave them out, count and list them. raise: stop at the first."
        ),
    )
    on_long_row: str = field(
        default="truncate",
        metadata=help_text(
            "What to do with rows longer than max_length or max_prompt_length. truncate: cut them. drop: leave"
            " them out, count and list them. raise: stop at the first."
        ),
    )
    on_lost_content: str = field(
        default="warn",
        metadata=help_text(
            "What to do with rows from which the chat template omits something: a thought, a call, a message."
            " warn: train on them, count and report them. drop: leave them out. raise: stop at the first."
        ),
    )
    chat_template: str | None = field(
        default=None,
        metadata=help_text(
            "Chat template of the run: a file, Jinja text, one of the tokenizer's named templates, or a training"
            f" template ({', '.join(training_templates())}). Training templates keep the thoughts of the trained turn,"
            " and are not saved with the tokenizer. Default: the tokenizer's."
        ),
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata=help_text(
            'Variables for the chat template (JSON: {"enable_thinking": false}). Those in a row override them.'
        ),
    )
    dataset_format: str = field(
        default="auto",
        metadata=help_text(
            f"Form of the rows. auto: recognize it by the columns. Or one of {', '.join(FORMAT_NAMES)}."
        ),
    )
    columns: dict[str, Any] | str | None = field(
        default=None,
        metadata=help_text(
            "Maps the dataset's own column names: prompt=instruction,rejected=worst. ignore=foo,bar lists columns"
            " not to read. Also as JSON."
        ),
    )
    dataset_num_proc: int | None = field(default=None, metadata=help_text("Number of processes that tokenize."))
    pad_token: str | None = field(
        default=None,
        metadata=help_text("Token of the vocabulary to use as the tokenizer's pad_token, also when saved."),
    )

    # Engine
    packing: str = field(
        default="auto",
        metadata=help_text(
            "packed: all sequences in one row without padding. padded: one row per sequence. auto: packed if a"
            " check shows that it is exact for this model, else padded with a warning."
        ),
    )
    padding_free: bool = field(
        default=False,
        metadata=help_text("TRL's name for rows without padding. No effect: they are the default here (packing)."),
    )
    pad_to_multiple_of: int | str | None = field(
        default="auto",
        metadata=help_text(
            "Pad every row of a batch, packed or padded, to a multiple of this many tokens, for compilers that"
            " want few shapes. Results do not change. auto and None: no padding."
        ),
    )
    prefix_sharing: bool = field(
        default=True, metadata=help_text("Compute the common start of the responses to a prompt only once.")
    )
    max_tokens_per_microbatch: int | str | None = field(
        default=None,
        metadata=help_text(
            "Run per_device_train_batch_size pairs in packed micro-batches of at most this many tokens; shared"
            " tokens count once. Loss and gradient stay those of the whole batch. auto: find what fits the free"
            " memory of the GPU when training starts; on a CPU no limit. None: no limit."
        ),
    )
    on_oversized_row: str = field(
        default="alone",
        metadata=help_text(
            "What to do with a row of more than max_tokens_per_microbatch tokens. alone: run it in a micro-batch"
            " of its own, with a warning at the start. raise: do not start the run. skip: as alone, and leave the row"
            " out if it does not fit into memory; otherwise such a row ends the run. split: run its responses in"
            " several micro-batches, with the gradient of the whole row and one more forward; its longest response"
            " with its prompt must fit."
        ),
    )
    regroup_dataset: bool = field(
        default=False,
        metadata=help_text(
            "Visit all rows of a prompt one after the other, so that they share a batch and the prompt is"
            " computed once. This changes the order: prompts are shuffled, rows are not, and each step sees fewer"
            " prompts."
        ),
    )
    length_bucketing: bool = field(
        default=False,
        metadata=help_text(
            "Build each step from rows of similar length. This reduces padding in padded batches, and the time"
            " that processes wait for each other. Long and short rows then never share a step, so gradients differ"
            " more between steps."
        ),
    )
    balance_ranks: bool = field(
        default=True,
        metadata=help_text(
            "On several processes: deal the rows of each step so that all processes have about equally many tokens."
            " Every step keeps its rows. No effect on streams, and with regroup_dataset."
        ),
    )
    attention_backend: str = field(
        default="auto",
        metadata=help_text(
            "Attention over packed rows. flash: flash-attn; flash2, flash3 and flash4 select a generation."
            " varlen: torch's varlen_attn. sdpa: one call per branch. mask: one mask over the whole row. auto: the"
            " first of flash, varlen and sdpa that runs the model exactly."
        ),
    )
    impl: str = field(
        default="auto",
        metadata=help_text("Implementation of the head op: triton, tiled, reference, or auto (triton on CUDA)."),
    )
    skip_tolerance: float = field(
        default=0.0,
        metadata=help_text(
            "Probability mass in [0, 1) that backward may leave out of any token's softmax in the head. This"
            " skips vocabulary that a trained model rules out. 0 is exact. Above 0, backward computes logits a"
            " second time."
        ),
    )
    workspace_bytes: int | None = field(
        default=None,
        metadata=help_text(
            "Maximum bytes that a pass of the head op uses beyond gradients. Default: 256 MiB on a GPU (up to 1"
            " GiB of its free memory if the head is trained); 32 MiB elsewhere, and more for a long pair."
        ),
    )
    weight_rounding: str = field(
        default="nearest",
        metadata=help_text(
            "How the optimizer's updates are rounded to bf16 weights. nearest: updates below half a unit of the last"
            " place are lost. stochastic: rounded up or down so that the mean is kept. kahan: what rounding cuts off is"
            " kept in 2 more bytes per weight. The last two compute each update in fp32, and let weights be trained"
            " that are loaded in bf16 (dtype in model_init_kwargs)."
        ),
    )
    optimizer_in_backward: bool = field(
        default=False,
        metadata=help_text(
            "Update each weight in backward, as soon as its gradient is whole, and drop the gradient. Needs one"
            " micro-batch per step on one process. For clipping see clipping_in_backward."
        ),
    )
    clipping_in_backward: str = field(
        default="previous_norm",
        metadata=help_text(
            "Which norm clips the gradient with optimizer_in_backward. previous_norm: that of the step before."
            " two_passes: that of the step itself, from a forward and backward of its own: exact, at twice the time."
        ),
    )
    tensor_parallel_size: int = field(
        default=1,
        metadata=help_text(
            "Processes over which every layer and the LM head are cut, by the plan of the model's class. They read the"
            " same rows. Must divide the number of processes; groups of this size then shard their parts among them"
            " (FSDP2)."
        ),
    )
    tile_rows: int | str | None = field(
        default=None,
        metadata=help_text(
            "Run the position-wise parts of every layer (MLPs, experts, norms, projections with adapters) over tiles of"
            " this many rows, so that the wide activations inside them exist for one tile only. Results change by"
            " rounding at most. auto: half of the hidden size, at least 2048 on a GPU. None: no tiles."
        ),
    )
    activation_offloading: bool = field(
        default=False,
        metadata=help_text(
            "Move checkpointed activations to host memory (GPU only). The same as offload in"
            " activation_checkpointing_kwargs."
        ),
    )

    sequence_parallel_size: int = field(
        default=1,
        metadata=help_text(
            "Number of processes that compute each packed row together, for pairs too long for one GPU. Each holds an"
            " equal part of the tokens; attention exchanges heads for tokens. Must divide the number of processes and"
            " of attention heads."
        ),
    )

    # Saving
    on_full_disk: str = field(
        default="stop",
        metadata=help_text(
            "What to do if a checkpoint does not fit on the disk. stop: end the run, with the path and the bytes that"
            " are missing; earlier checkpoints stay. wait: try again until there is space."
        ),
    )

    def __post_init__(self) -> None:
        check_choice("packing", self.packing, PACKING_MODES)
        check_choice("impl", self.impl, IMPLS)
        check_choice("attention_backend", self.attention_backend, ATTENTION_BACKENDS)
        check_choice("on_oversized_row", self.on_oversized_row, OVERSIZED_ROWS)
        check_choice("on_full_disk", self.on_full_disk, FULL_DISK)
        check_choice("weight_rounding", self.weight_rounding, ROUNDINGS)
        check_choice("clipping_in_backward", self.clipping_in_backward, CLIPPINGS)
        for name in (
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            *("sequence_parallel_size", "tensor_parallel_size"),
        ):
            check_count(name, getattr(self, name))
        check_count("dataset_num_proc", self.dataset_num_proc, optional=True)
        check_number("learning_rate", self.learning_rate, least=0.0)
        if self.router_aux_loss_coef is not None:
            check_number("router_aux_loss_coef", self.router_aux_loss_coef, least=0.0)
        self.max_tokens_per_microbatch = count_or_auto("max_tokens_per_microbatch", self.max_tokens_per_microbatch)
        self.tile_rows = count_or_auto("tile_rows", self.tile_rows)
        if self.tile_rows is not None and self.torch_compile:
            raise ValueError(
                f"tile_rows must be None with torch_compile, got {self.tile_rows}: each tile would end a compiled graph"
            )
        self.pad_to_multiple_of = count_or_auto("pad_to_multiple_of", self.pad_to_multiple_of)
        self.model_init_kwargs = as_dict("model_init_kwargs", self.model_init_kwargs)
        self.columns = check_columns(self.columns)
        self.chat_template_kwargs = as_dict("chat_template_kwargs", self.chat_template_kwargs)
        self.init_kwargs()
        self.tokenization_settings()
        check_settings(1.0, None, (), self.skip_tolerance, self.workspace_bytes, self.impl)
        check_steps(self)
        check_order_of_rows(self)
        check_packing_settings(self)
        check_sequence_parallel_settings(self)
        check_oversized_row(self)
        check_trainer_settings(self)
        self.remove_unused_columns = False  # prepared datasets have no unused columns
        self._follow_device()
        super().__post_init__()
        load_whole_models()

    def _follow_device(self) -> None:
        """Fills in the defaults that depend on whether there is a GPU."""
        on_gpu = torch.cuda.is_available() and not self.use_cpu
        if self.bf16 is None:
            self.bf16 = on_gpu and not self.fp16 and torch.cuda.is_bf16_supported()
        resolve_checkpointing(self, on_gpu)
        if self.activation_offloading:
            offload_checkpoints(self, on_gpu)
        self.has_default_workers = self.dataloader_num_workers is None
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = WORKERS_ON_A_GPU if on_gpu else 0
        if not on_gpu:
            self.dataloader_pin_memory = False
            if self.fp16:
                logger.warning("fp16 on a CPU is slow and overflows above 65,504: use bf16 or fp32 instead")

    @property
    def row_group_size(self) -> int:
        """How many consecutive processes read the same rows: those of a tensor- or sequence-parallel group."""
        return self.sequence_parallel_size * self.tensor_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """How many processes, or groups of them, read different rows."""
        return max(self.world_size // self.row_group_size, 1)

    @property
    def data_parallel_index(self) -> int:
        """Which of them this process is, or its group."""
        return self.process_index // self.row_group_size

    def to_dict(self) -> dict[str, Any]:
        """As in TrainingArguments, which hides every value named ..._token as a secret; pad_token is kept readable."""
        return {**super().to_dict(), "pad_token": self.pad_token}

    def init_kwargs(self) -> dict[str, Any]:
        """The keyword arguments of from_pretrained for a model that is loaded by name."""
        trust = {"trust_remote_code": True} if self.trust_remote_code else {}
        return {**trust, **with_torch_dtype(self.model_init_kwargs)}

    def tokenization_settings(self) -> TokenizationSettings:
        return TokenizationSettings(
            max_length=self.max_length,
            max_prompt_length=self.max_prompt_length,
            truncation_mode=self.truncation_mode,
            on_bad_row=self.on_bad_row,
            on_long_row=self.on_long_row,
            on_lost_content=self.on_lost_content,
            chat_template=None if self.chat_template is None else resolve_template(self.chat_template),
            chat_template_kwargs=as_dict("chat_template_kwargs", self.chat_template_kwargs),
            dataset_format=self.dataset_format,
            columns=check_columns(self.columns),
        )
