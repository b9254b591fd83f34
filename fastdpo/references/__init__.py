"""Where reference log-probs come from: a frozen copy, the policy without its adapter, the dataset, or nowhere."""

from fastdpo.references.references import (
    REFERENCE_MODES,
    AdapterReference,
    DatasetReference,
    FrozenReference,
    NoReference,
    Reference,
)

__all__ = [
    "REFERENCE_MODES",
    "AdapterReference",
    "DatasetReference",
    "FrozenReference",
    "NoReference",
    "Reference",
]
