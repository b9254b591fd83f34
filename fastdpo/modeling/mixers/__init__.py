"""Layers that mix neighbouring tokens outside the attention interface (gated delta nets, Mamba, short convolutions,
RWKV, ...) over a packed row: which modules they are (`trial.py`), and how they run on the tokens of a branch's prefix
and its own (`adapter.py`, `rows.py`). Everything else of such a model stays shared.
"""

from fastdpo.modeling.mixers.adapter import Mixers, mixers_of
from fastdpo.modeling.mixers.rows import MixerRows
from fastdpo.modeling.mixers.trial import find_mixers

__all__ = ["MixerRows", "Mixers", "find_mixers", "mixers_of"]
