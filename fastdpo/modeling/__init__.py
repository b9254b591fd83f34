"""From a PackedBatch to log-probs with any Hugging Face causal LM: packed attention, backbone, LM head, self-check."""

from fastdpo.modeling.packed import packed_logps, packed_loss
from fastdpo.modeling.prepared import prepare_model
from fastdpo.modeling.self_check import PackingCheck, check_packing

__all__ = ["PackingCheck", "check_packing", "packed_logps", "packed_loss", "prepare_model"]
