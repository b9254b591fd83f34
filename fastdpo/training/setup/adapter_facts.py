"""Facts about an adapter for the start of a run: its layers, experts without an adapter, tied embeddings.

In: a PeftModel before its first step. Out: sentences.
"""

from __future__ import annotations

import re
from typing import Any

from fastdpo.modeling.backbone import bare_model


def adapter_lines(model: Any) -> list[str]:
    """The layers of the adapter, the experts without it, and the effect of merging on tied embeddings."""
    config = model.peft_config[model.active_adapter]
    method = getattr(config.peft_type, "value", config.peft_type)
    rank = f" of rank {config.r}" if hasattr(config, "r") else ""
    lines = [f"{method}{rank} on {', '.join(_kinds(adapted_modules(model)))}"]
    experts = fused_experts_left_out(model)
    if experts:
        names = ", ".join(experts)
        option = " ".join(experts)
        lines.append(
            f"not on the experts' weights ({names}), which are not linear layers: set target_parameters={experts!r}"
            f" to include them (--lora_target_parameters {option})"
        )
    lines += [line for line in (merging_tied(model),) if line]
    return lines


def adapted_modules(model: Any) -> list[str]:
    """Names, in the bare model, of the modules that the active adapter changes or trains fully."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    kinds = (BaseTunerLayer, ModulesToSaveWrapper)
    found = [name for name, module in bare_model(model).named_modules() if isinstance(module, kinds)]
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def fused_experts_left_out(model: Any) -> list[str]:
    """The last three name parts of 3-dimensional expert weights (one matrix per expert) that have no adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    taken = {(id(layer.get_base_layer()), getattr(layer, "parameter_name", None)) for layer in layers}
    names = set()
    for path, module in bare_model(model).named_modules():
        if "expert" not in path or isinstance(module, BaseTunerLayer):
            continue
        for name, weight in module.named_parameters(recurse=False):
            if weight.dim() == 3 and not weight.requires_grad and not {(id(module), name), (id(module), None)} & taken:
                parts = [part for part in f"{path}.{name}".split(".") if part != "base_layer"]
                names.add(".".join(parts[-3:]))
    return sorted(names)


def merging_tied(model: Any) -> str:
    """The effect of merging an adapter on tied embeddings; empty without such an adapter.

    Tried with PEFT 0.21: the product of a LoRA is added to the weight that embedding and head share, so both change;
    fully trained weights stay separate, and are saved as two weights.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    bare = bare_model(model)
    if not getattr(bare.config.get_text_config(), "tie_word_embeddings", False):
        return ""
    ends: dict[str, Any] = {"embedding": bare.get_input_embeddings(), "head": bare.get_output_embeddings()}
    on = [name for name, module in ends.items() if isinstance(module, BaseTunerLayer)]
    if on:
        return (
            f"on the {' and the '.join(on)} of a model that ties both: merge_and_unload() would change both and give"
            " another model than the one trained. Keep the adapter, or merge it with `fastdpo merge`"
        )
    whole = [name for name, module in ends.items() if isinstance(module, ModulesToSaveWrapper)]
    if whole and not getattr(model.peft_config[model.active_adapter], "ensure_weight_tying", False):
        return (
            f"the {' and the '.join(whole)} {'are' if len(whole) == 2 else 'is'} trained apart though this model ties"
            " both: a merged model keeps two weights, and is saved with both"
        )
    return ""


def _kinds(names: list[str]) -> list[str]:
    """Names without layer numbers, each once, with its count."""
    counts: dict[str, int] = {}
    for name in names:
        kind = re.split(r"\.\d+\.", name)[-1]
        counts[kind] = counts.get(kind, 0) + 1
    return [f"{kind} ({count})" if count > 1 else kind for kind, count in counts.items()]
