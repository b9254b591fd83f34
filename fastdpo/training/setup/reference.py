"""Chooses the reference of a run and manages its model: the mode is named by the user or is the cheapest exact one; a
cached reference is loaded, scores all rows once, and is freed.

In: the config, the policy before its first step, and the user's reference model, if any. Refuses models that cannot be
the reference of this policy.
"""

from __future__ import annotations

import copy
import gc
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.data.batches.packing import pack_pairs, pad_pairs
from fastdpo.data.sources.nearest import check_model_folder
from fastdpo.data.tokens.tokenization import padding_id
from fastdpo.losses import losses_where
from fastdpo.modeling import prepare_model
from fastdpo.modeling.backbone import bare_model
from fastdpo.modeling.prepared import unprepare_model
from fastdpo.modeling.vocab_rows import local
from fastdpo.references import AdapterReference, FrozenReference
from fastdpo.references.adapters import (
    REFERENCE_ADAPTER,
    brings_reference,
    is_peft_model,
    starts_from_adapter,
    trained_outside_adapter,
)
from fastdpo.references.cache import LogpsCache
from fastdpo.references.fingerprint import reference_facts
from fastdpo.references.precompute import Scorer
from fastdpo.training.settings.config import DPOConfig
from fastdpo.training.setup.gguf_files import as_folder
from fastdpo.training.setup.model_files import readable_files
from fastdpo.training.setup.model_kinds import auto_class
from fastdpo.training.setup.models import (
    adapter_base,
    check_model_and_tokenizer,
    load_model,
    where_from,
)
from fastdpo.training.setup.tensor_parallel import copy_of_cut, cut_over_processes, distributed_options, is_cut
from fastdpo.types import PackedBatch, TokenizedGroup

_TOKENS_PER_BATCH = {"cuda": 16384}  # forward only: a few times the size of a training step
_TOKENS_PER_BATCH_ELSEWHERE = 4096
_FACTOR_OFFLOADED = 8  # every batch reads all weights again


def choose_reference(
    args: DPOConfig, model: nn.Module, ref_model: Any, has_ref_logps: bool, *, too_large: str = ""
) -> tuple[str, str]:
    """The reference mode and the reason for it.

    Args:
        has_ref_logps: whether every row of the training and evaluation data has reference log-probs.
        too_large: the reason why a second model does not fit, from `too_large_to_hold`.
    Raises:
        ValueError: the requested mode does not work with the model or the dataset.
    """
    has_adapter = is_peft_model(model)
    outside = trained_outside_adapter(model) if has_adapter else None
    mode = "none" if args.reference_free else args.reference
    free = next(iter(losses_where(lambda loss: not loss.reference, args.loss_type)), None)
    if mode == "none" and ref_model is not None:
        why = f"loss_type={free!r}" if free else "reference='none' or reference_free"
        raise ValueError(f"ref_model must be None if there is no reference ({why})")
    if mode == "adapter" and (not has_adapter or ref_model is not None or outside):
        why = f"{outside} is trained too" if outside else "ref_model is given" if has_adapter else "there is no adapter"
        raise ValueError(f"reference must not be 'adapter' here: {why}")
    if mode == "frozen" and too_large:
        raise ValueError(f"reference must be 'cached' or 'auto' here, got 'frozen': {too_large}")
    if mode != "auto":
        return mode, f"loss_type {free!r} has none" if free else "asked for"
    if ref_model is not None:
        return ("cached", too_large) if too_large else ("frozen", "ref_model was given")
    if has_ref_logps:
        return "cached", "the dataset brings ref_chosen_logps and ref_rejected_logps"
    if too_large and (outside or not has_adapter):
        return "cached", too_large
    if outside:
        return "frozen", f"{outside} is trained beside the adapter, so the reference is a copy: {_adapter_start(model)}"
    if has_adapter:
        return "adapter", f"{_adapter_start(model)} is the reference, which needs no second model"
    return "frozen", "all weights are trained, so the reference is a copy of the start"


def _adapter_start(model: nn.Module) -> str:
    if brings_reference(model):
        return "the model with the adapter 'ref' that it brings"
    return "the model as its adapter starts" if starts_from_adapter(model) else "the model without its adapter"


def check_beside_policy(reference: nn.Module, policy: nn.Module) -> None:
    """Checks that a given reference is a separate model with the same vocabulary.

    Raises:
        ValueError: it shares weights with the policy, or has another vocabulary.
    """
    trained = {local(p).data_ptr() for p in policy.parameters()} - {0}  # of weights that are elsewhere
    if any(local(p).data_ptr() in trained for p in reference.parameters()):
        raise ValueError("ref_model must not share weights with the model that is trained; give it a copy")
    num_tokens = [bare_model(m).get_output_embeddings().weight.shape[0] for m in (policy, reference)]
    if num_tokens[0] != num_tokens[1]:
        raise ValueError(f"ref_model must have the policy's vocabulary of {num_tokens[0]} logits, got {num_tokens[1]}")


def too_large_to_hold(args: DPOConfig, policy: nn.Module, ref_model: str | nn.Module | None) -> str:
    """The reason why the reference's weights exceed `ref_max_memory` on the training device; empty if they fit."""
    device = args.device
    limit = _own_limits(args).get((device.index or 0) if device.type == "cuda" else device.type)
    if limit is None:
        return ""
    num_bytes = weight_bytes(policy if ref_model is None else ref_model, args.init_kwargs())
    if num_bytes <= limit:
        return ""
    return f"the reference's weights ({num_bytes:,} bytes) exceed ref_max_memory ({limit:,} bytes on {device})"


def _own_limits(args: DPOConfig) -> dict[Any, int]:
    """`ref_max_memory` for this process, which has one GPU. With several processes, all use the smallest limit of any
    GPU, so that all decide equally."""
    limits: Any = args.ref_max_memory or {}
    of_gpus = {device: amount for device, amount in limits.items() if isinstance(device, int)}
    others = {device: amount for device, amount in limits.items() if not isinstance(device, int)}
    if args.device.type != "cuda" or not of_gpus:
        return others
    own = args.device.index or 0
    amount = min(of_gpus.values()) if args.world_size > 1 else of_gpus.get(own)
    return others if amount is None else {own: amount, **others}


def weight_bytes(model: str | nn.Module, model_init_kwargs: dict[str, Any] | None = None) -> int:
    """Bytes of a model's weights; a model given by name is not loaded."""
    if isinstance(model, str):
        from transformers import AutoConfig

        options = {"dtype": torch.float32, **(model_init_kwargs or {})}
        loading, model = where_from(options), as_folder(adapter_base(model) or model)
        trust = {key: loading[key] for key in ("trust_remote_code",) if key in loading}
        with readable_files("model", model), torch.device("meta"):
            config = AutoConfig.from_pretrained(model, **loading)
            dtype = config.dtype if options["dtype"] == "auto" else options["dtype"]
            model = auto_class(config).from_config(config, dtype=dtype, **trust)
    parameters: list[Tensor] = list(model.parameters())  # type: ignore[union-attr]
    return sum(p.numel() * p.element_size() for p in parameters)


def live_reference(
    args: DPOConfig, policy: nn.Module, ref_model: str | nn.Module | None, tokenizer: Any, *, will_be_sharded: bool
) -> FrozenReference:
    """A second model for the whole run: a copy of the initial policy, with its adapter "ref" active if it has one, or
    the given model. On the training device unless it will be sharded, so that no process has it there whole."""
    if ref_model is None:
        frozen: Any = copy_of_cut(policy) if is_cut(policy) else copy.deepcopy(policy)
        if is_peft_model(frozen) and brings_reference(frozen):
            frozen.set_adapter(REFERENCE_ADAPTER)
    else:
        if isinstance(ref_model, str):
            frozen = load_model(ref_model, args.init_kwargs(), **distributed_options(args))
        else:
            frozen = ref_model
        check_model_and_tokenizer(frozen, tokenizer)
        check_beside_policy(frozen, policy)
        frozen = cut_over_processes(frozen, args)
    prepare_model(frozen).requires_grad_(False)
    is_placed = getattr(frozen, "hf_device_map", None) is not None or is_cut(frozen)
    if not is_placed and not getattr(frozen, "is_quantized", False) and not will_be_sharded:
        frozen.to(args.device)
    return FrozenReference(frozen.eval(), impl=args.impl)


@dataclass(frozen=True)
class AskedOnce:
    """A reference that scores rows before training, while it is available."""

    reference: FrozenReference | AdapterReference
    model: nn.Module  # the model that runs
    adapter: str | None = None  # that is on
    is_offloaded: bool = False  # its weights come from memory or disk for every batch

    def cache(self, args: DPOConfig) -> LogpsCache:
        """The cache of its log-probs."""
        return LogpsCache(
            args.ref_cache_dir, reference_facts(self.model, adapter=self.adapter, computed_in=_computed_in(args))
        )

    def scorer(self, args: DPOConfig, *, is_packed: bool, tokenizer: Any) -> Scorer:
        """The scorer that computes its log-probs."""
        device = args.device
        pad_token_id = padding_id(tokenizer)

        def score(batch: PackedBatch) -> Tensor:
            with autocast_of(args):
                return self.reference.sums(self.model, batch.to(device))

        def collate(groups: Sequence[TokenizedGroup]) -> PackedBatch:
            if is_packed:
                return pack_pairs(groups, prefix_sharing=args.prefix_sharing)
            return pad_pairs(groups, pad_token_id=pad_token_id)

        tokens = args.ref_tokens_per_batch
        if tokens is None:
            tokens = _TOKENS_PER_BATCH.get(device.type, _TOKENS_PER_BATCH_ELSEWHERE)
            tokens *= _FACTOR_OFFLOADED if self.is_offloaded else 1
        most_prompts = args.precompute_ref_batch_size
        return Scorer(
            score, collate, is_packed, tokens, not args.disable_tqdm, most_prompts, in_step=is_cut(self.model)
        )


def autocast_of(args: DPOConfig) -> Any:
    """The precision of the run as a context manager, equal to accelerate's for a live reference."""
    dtype = torch.float16 if args.fp16 else torch.bfloat16
    return torch.autocast(args.device.type, dtype=dtype, enabled=bool(args.fp16 or args.bf16))


def _computed_in(args: DPOConfig) -> str:
    return "bf16 autocast" if args.bf16 else "fp16 autocast" if args.fp16 else "no autocast"


@contextmanager
def asked_once(
    args: DPOConfig,
    policy: nn.Module | None,
    ref_model: str | nn.Module | None,
    tokenizer: Any,
    quantization_config: Any = None,
) -> Iterator[AskedOnce]:
    """Context manager for the reference, on the training device or offloaded to fit `ref_max_memory`.

    Args:
        policy: the model before training; None if only `ref_model` scores and nothing is trained.
        ref_model: by default the policy in its current state.
        quantization_config: quantization of a reference given by name.
    """
    if ref_model is None:
        assert policy is not None
        with _moved(policy, args):
            yield _start_of(policy, args)
        return
    with tempfile.TemporaryDirectory(prefix="fastdpo_offload_", ignore_cleanup_errors=True) as folder:
        model = _loaded(args, ref_model, folder, quantization_config)
        check_model_and_tokenizer(model, tokenizer)
        if policy is not None:
            check_beside_policy(model, policy)
        model = cut_over_processes(model, args)
        with _on_device(args, model) as is_offloaded:
            adapter = str(model.active_adapter) if is_peft_model(model) else None
            yield AskedOnce(FrozenReference(prepare_model(model), impl=args.impl), model, adapter, is_offloaded)


@contextmanager
def _moved(model: nn.Module, args: DPOConfig) -> Iterator[None]:
    """Moves the model to the training device, and afterwards back (FSDP takes policies from the CPU)."""
    came_on = next(model.parameters()).device
    if came_on.type == args.device.type:
        yield
        return
    model.to(args.device)
    try:
        yield
    finally:
        model.to(came_on)


def give_memory_back() -> None:
    """Returns the memory of a freed reference to the device; call it when nothing refers to the reference any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _on_device(args: DPOConfig, model: nn.Module) -> Iterator[bool]:
    """The model on a device where it can run, and whether its weights are offloaded; restores it afterwards."""
    if getattr(model, "is_quantized", False) or getattr(model, "hf_device_map", None) is not None:
        yield any(hasattr(module, "_hf_hook") for module in model.modules())
        return
    if not too_large_to_hold(args, model, None):
        with _moved(model, args):
            yield False
        return
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    unprepare_model(model)  # both wrap the model's forward, and must be removed in order
    cpu_offload(model, execution_device=args.device)
    try:
        yield True
    finally:
        unprepare_model(model)
        remove_hook_from_submodules(model)


def _start_of(policy: nn.Module, args: DPOConfig) -> AskedOnce:
    if not is_peft_model(policy):
        return AskedOnce(FrozenReference(policy, impl=args.impl), policy)
    if brings_reference(policy):
        return AskedOnce(AdapterReference(policy, impl=args.impl), policy, adapter=REFERENCE_ADAPTER)
    if starts_from_adapter(policy):
        return AskedOnce(FrozenReference(policy, impl=args.impl), policy, adapter=str(policy.active_adapter))
    return AskedOnce(AdapterReference(policy, impl=args.impl), policy)


def _loaded(args: DPOConfig, ref_model: str | nn.Module, folder: str, quantization_config: Any) -> nn.Module:
    if not isinstance(ref_model, str):
        return ref_model
    check_model_folder("ref_model", ref_model)
    options: dict[str, Any] = {} if quantization_config is None else {"quantization_config": quantization_config}
    options |= distributed_options(args)
    if args.ref_max_memory is not None:
        options |= {"device_map": "auto", "max_memory": _own_limits(args), "offload_folder": folder}
    return load_model(ref_model, args.init_kwargs(), **options)
