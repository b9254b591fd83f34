"""Sources of reference log-probs: a frozen copy, the policy without its adapter, the dataset, or none."""

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
