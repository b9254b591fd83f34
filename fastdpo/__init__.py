"""fastdpo: Direct Preference Optimization with fused kernels, packed rows and shared prompts.

The public names load on first use, so `import fastdpo` imports neither triton nor transformers nor datasets.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "IGNORE_INDEX": "types",
    "PreferenceRow": "types",
    "TokenizedGroup": "types",
    "TokenizedPair": "types",
    "PackedBatch": "types",
    "TokenLogps": "types",
    "SequenceLogps": "types",
    "PairLogps": "types",
    "PairScores": "types",
    "linear_logps": "ops",
    "sequence_logps": "ops",
    "linear_cross_entropy": "ops",
    "LOSSES": "losses",
    "preference_loss": "losses",
    "LinearDPOLoss": "integrations",
    "LinearCPOLoss": "integrations",
    "LinearSimPOLoss": "integrations",
    "LinearORPOLoss": "integrations",
    "LinearKTOLoss": "integrations",
    "pack_pairs": "data.batches.packing",
    "pad_pairs": "data.batches.packing",
    "prepare_model": "modeling",
    "packed_logps": "modeling",
    "DPOConfig": "training",
    "DPOTrainer": "training",
    "SFTConfig": "training",
    "SFTTrainer": "training",
    "StopOnSignal": "training",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastdpo' has no attribute {name!r}")
    value = getattr(import_module(f"fastdpo.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
