"""`accelerate`: replaces TRL's fused LM head by fastdpo's head op inside an existing `trl.DPOTrainer`.

In: a `trl.DPOTrainer`, usually before `train()`. Out: the same trainer; its policy and reference now get log-probs and
token statistics from `linear_logps`, over response rows only, on any device. Batches, losses, metrics, logging and
checkpoints are still TRL's, and all numbers are equal up to rounding. Packing and shared prompts need fastdpo's own
DPOTrainer. Refuses other trainers, weights sharded over processes, and TRL releases whose fused head differs from that
of 1.16.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from types import MethodType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastdpo.modeling.backbone import bare_model
from fastdpo.modeling.head import lm_head
from fastdpo.ops import linear_logps
from fastdpo.types import IGNORE_INDEX

Trainer = TypeVar("Trainer")

_SEAT = "_fastdpo_seat_in_trl"  # attribute of a model whose head op is ours
_SETTINGS = {"temperature", "cast_lm_head_to_fp32", "outputs"}  # settings of TRL's fused forward
_LOGPS = "log_probs"
_STATISTICS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # TRL's names, and those of the head op
_OUTPUT_FIELDS = {"loss", _LOGPS, *_STATISTICS, "label_mask", "aux_loss"}


def accelerate(trainer: Trainer) -> Trainer:
    """Puts fastdpo's head op into a `trl.DPOTrainer`, in place, for policy and reference. Idempotent.

    Args:
        trainer: full or LoRA, with a live or a precomputed reference, and any TRL loss type.
    Returns:
        The given trainer.
    Raises:
        ValueError: the object is not a `trl.DPOTrainer`, its weights are sharded (FSDP, DeepSpeed ZeRO-3, tensor
            parallelism), its LM head is not a plain linear layer, or TRL's internals differ in this release.
    """
    output_class = _output_class()
    _check_trainer(trainer)
    for model in (trainer.model, trainer.ref_model):  # type: ignore[attr-defined]
        if model is not None:
            _take_seat(bare_model(model), output_class, trainer.accelerator.autocast)  # type: ignore[attr-defined]
    return trainer


def _output_class() -> Any:
    """TRL's class for the result of a fused forward."""
    try:
        import trl
        from trl.trainer.utils import FusedCausalLMOutput
    except ImportError as error:
        raise ValueError(f"accelerate needs a trl with a fused LM head: pip install trl==1.16.0 ({error})") from error
    found = {field.name for field in fields(FusedCausalLMOutput)}
    if found != _OUTPUT_FIELDS:
        raise _differs(trl.__version__, f"its fused head returns {sorted(found)}, not {sorted(_OUTPUT_FIELDS)}")
    return FusedCausalLMOutput


def _differs(version: str, how: str) -> ValueError:
    return ValueError(f"trl must be 1.16, or have its fused LM head unchanged; trl {version} differs: {how}")


def _check_trainer(trainer: Any) -> None:
    from trl import DPOTrainer

    if not isinstance(trainer, DPOTrainer):
        name = f"{type(trainer).__module__.partition('.')[0]}.{type(trainer).__name__}"
        raise ValueError(f"trainer must be a trl.DPOTrainer, got {name}")
    if trainer.is_fsdp_enabled or getattr(trainer.args.deepspeed_plugin, "zero_stage", 0) == 3:
        raise ValueError(
            "trainer must hold whole weights, got weights sharded by FSDP or DeepSpeed ZeRO-3: use fastdpo.DPOTrainer"
        )
    if any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters()):
        raise ValueError("trainer must hold whole weights, got tensor parallelism")


def _take_seat(model: nn.Module, output_class: Any, autocast: Callable[[], Any]) -> None:
    """Replaces `model.forward` by one that uses our op if TRL asks for its fused head, and else calls the old forward.

    Args:
        autocast: the precision of the run. accelerate has already wrapped a reference's forward in autocast, and will
            wrap the policy's, which is then wrapped twice.
    """
    if hasattr(model, _SEAT):
        return
    lm_head(model)  # refused now rather than in the first step
    statistics = tuple(name for name in _trl_settings(model)["outputs"] if name != _LOGPS)
    before: Any = model.forward

    @functools.wraps(getattr(before, "__func__", before))  # generate reads the signature
    def forward(self: nn.Module, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return before(*args, **kwargs)
        with autocast():
            return output_class(**_scored(self, statistics, *args, **kwargs))

    model.forward = MethodType(forward, model)
    setattr(model, _SEAT, True)


def _trl_settings(model: nn.Module) -> dict[str, Any]:
    """The settings of TRL's fused forward of this model, even if accelerate has wrapped the forward since."""
    import trl

    function: Any = model.forward
    while function is not None:
        function = getattr(function, "__func__", function)
        if inspect.isfunction(function) and "fused_lm_head" in function.__code__.co_varnames:
            settings = inspect.getclosurevars(function).nonlocals
            if not settings.keys() >= _SETTINGS:
                raise _differs(trl.__version__, f"its fused forward holds {sorted(settings)}, not {sorted(_SETTINGS)}")
            unknown = set(settings["outputs"]) - {_LOGPS, *_STATISTICS}
            if unknown or settings["temperature"] != 1.0 or settings["cast_lm_head_to_fp32"]:
                raise _differs(trl.__version__, f"its fused forward was made with {settings}")
            return dict(settings)
        function = getattr(function, "__wrapped__", None)
    raise _differs(trl.__version__, f"the forward of {type(model).__name__} has no fused head")


def _scored(
    model: Any,
    statistics: tuple[str, ...],
    *args: Any,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    **kwargs: Any,
) -> dict[str, Tensor | None]:
    """The fields of TRL's output: (B, L - 1) per token, 0 at positions without a label.

    Args:
        labels: (B, L), label l + 1 is predicted from position l; or shift_labels, already shifted to these positions.
    """
    backbone = model.base_model(*args, **{**kwargs, "use_cache": False})
    hidden_states = backbone.last_hidden_state
    if shift_labels is None:
        if labels is None:
            raise ValueError("labels must be given if fused_lm_head is set, got None")
        hidden_states, shift_labels = hidden_states[:, :-1], labels[:, 1:]
    head = lm_head(model)
    shift_labels = shift_labels.to(head.weight.device)  # the last layer may lie on another device than the head
    mask = shift_labels != IGNORE_INDEX
    rows, weight, _ = head.operands(hidden_states.to(head.weight.device)[mask], split=False)
    tokens = linear_logps(
        rows,
        weight,
        shift_labels[mask],
        bias=head.bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        outputs=statistics,
    )
    found: dict[str, Tensor] = {_LOGPS: tokens.logps, **{name: getattr(tokens, name) for name in statistics}}
    spread = {name: value.new_zeros(mask.shape).masked_scatter(mask, value) for name, value in found.items()}
    num_items = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    loss = -spread[_LOGPS].sum() / num_items
    aux_loss = None
    if kwargs.get("output_router_logits"):
        aux_loss = _aux_loss(model, backbone.router_logits, kwargs.get("attention_mask"))
        loss = loss + getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux_loss
    return {"loss": loss, **spread, "label_mask": mask, "aux_loss": aux_loss}


def _aux_loss(model: Any, router_logits: Any, attention_mask: Tensor | None) -> Any:
    """The load-balancing loss of a mixture of experts, by transformers' function for all model families."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    return load_balancing_loss_func(router_logits, config.num_experts, config.num_experts_per_tok, attention_mask)
