"""Prepares a model, so that packed batches run inside its own `forward`, and undoes it; its settings."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor, nn

from fastdpo.modeling.attention import ATTENTION_BACKENDS, PACKED_ATTENTIONS, register
from fastdpo.modeling.backbone import backbone_name, bare_model
from fastdpo.modeling.head import lm_head
from fastdpo.modeling.mixers import OwnAttention, find_mixers, mixers_of
from fastdpo.modeling.packed_forward import forward_with_signature_of, generate
from fastdpo.modeling.positions import counting_modules
from fastdpo.modeling.prepared_state import STATE, PreparedState, attention_as, set_attention
from fastdpo.modeling.sequence_group import SequenceGroup


def prepare_model(
    model: nn.Module,
    *,
    attention_backend: str | None = None,
    skip_tolerance: float | None = None,
    workspace_bytes: int | None = None,
    sequence_group: SequenceGroup | None = None,
) -> nn.Module:
    """Installs the packed code path inside `model.forward` and returns the same model. Idempotent.

    Args:
        attention_backend: one of ATTENTION_BACKENDS, see `fastdpo.modeling.attention.backends`; None keeps the previous
            setting, initially "auto".
        skip_tolerance, workspace_bytes: settings of the head op, see `fastdpo.linear_logps`; None keeps the previous
            setting, initially exact and with the op's default workspace.
        sequence_group: the processes that compute batches with `shares` together; None keeps the previous ones.
    Raises:
        ValueError: the model is not a causal LM with a plain linear LM head, or the backend is unknown.
    """
    if attention_backend is not None and attention_backend not in ATTENTION_BACKENDS:
        raise ValueError(f"attention_backend must be one of {sorted(ATTENTION_BACKENDS)}, got {attention_backend!r}")
    bare = bare_model(model)
    if not is_prepared(bare):
        _install(bare)
    settings = {
        "attention_backend": attention_backend,
        "skip_tolerance": skip_tolerance,
        "workspace_bytes": workspace_bytes,
        "sequence_group": sequence_group,
    }
    for name, value in settings.items():
        if value is not None:
            setattr(getattr(bare, STATE), name, value)
    return model


def unprepare_model(model: nn.Module) -> nn.Module:
    """Removes the packed code path: forward, generate and attention are the model's own again."""
    bare = bare_model(model)
    if is_prepared(bare):
        state = getattr(bare, STATE)
        set_attention(state, packed=False)
        if (mixers := mixers_of(bare)) is not None:
            mixers.remove(bare)
        for name in ("forward", "generate", STATE):
            bare.__dict__.pop(name, None)
        bare.__dict__.update(state.own_methods)
    return model


def is_prepared(model: nn.Module) -> bool:
    return hasattr(bare_model(model), STATE)


def prepared_state(model: nn.Module) -> PreparedState:
    """The state of a prepared model; an unprepared model is prepared first."""
    prepare_model(model)
    state: PreparedState = getattr(bare_model(model), STATE)
    return state


def attention_backend(model: nn.Module) -> str:
    """The attention backend setting of a prepared model."""
    return prepared_state(model).attention_backend


def give_masks(model: nn.Module, masks: str) -> None:
    """Sets the kind of mask that a prepared model gets; mixers found with other masks are searched again."""
    bare, state = bare_model(model), prepared_state(model)
    if state.masks == masks:
        return
    with attention_as(state, packed=False):
        state.masks = masks
    if (mixers := mixers_of(bare)) is not None:
        mixers.forget(bare)


def run_mixers_packed(model: nn.Module, like: nn.Module | None = None) -> tuple[str, ...]:
    """Finds the token mixers of a prepared model, unless they are known, and makes them run packed rows.

    Args:
        like: a copy of the model whose mixers are known.
    Returns:
        Names of the modules that still mix tokens of one sequence into another.
    """
    bare, state = bare_model(model), prepared_state(model)
    mixers = mixers_of(bare)
    if mixers is not None:
        return mixers.leaks
    if any(type(parameter.data) is not Tensor for parameter in bare.parameters()):
        return ()  # no numbers to look at
    known = None if like is None else mixers_of(bare_model(like))
    backend = "mask" if state.attention_backend == "mask" else "sdpa"
    attentions = state.attentions if state.masks == "sequence" else []
    with attention_as(state, packed=True):
        mixers = find_mixers(bare, backend, None if known is None else known.names, state.masks, attentions)
    return mixers.leaks if mixers is not None else ()


def _install(bare: Any) -> None:
    backbone = backbone_name(bare)
    lm_head(bare)
    register()
    configs = {
        id(m.config): m.config for m in bare.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")
    }
    state = PreparedState(
        attentions=[OwnAttention(config, _own_attention(bare, config)) for config in configs.values()],
        forward=bare.forward,
        generate=getattr(bare, "generate", None),
        own_methods={name: bare.__dict__[name] for name in ("forward", "generate") if name in bare.__dict__},
        backbone=backbone,
        counting=counting_modules(bare.get_submodule(backbone)),
    )
    setattr(bare, STATE, state)
    # bound methods, so that a copy of the model gets its own methods, even inside accelerate's wrappers
    bare.forward = MethodType(forward_with_signature_of(bare.forward), bare)
    if state.generate is not None:
        bare.generate = MethodType(generate, bare)
    if (mixers := mixers_of(bare)) is not None:
        mixers.install(bare)


def _own_attention(model: Any, config: Any) -> str:
    """The model's attention outside packed batches."""
    current: str = config._attn_implementation
    if current in PACKED_ATTENTIONS:  # the config object is also that of a model whose last batch was packed
        current = model.get_correct_attn_implementation(None)
    return current
