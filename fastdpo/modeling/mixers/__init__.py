"""Token mixers in packed rows: the layers that mix neighbouring tokens outside the attention interface (gated delta
nets, Mamba, short convolutions, RWKV, ...), and layers whose attention packed attention does not implement. Finding
them (`trial.py`), and running them on the prefix and tokens of each branch (`adapter.py`, `rows.py`). All other layers
of such a model still run on shared prefixes.
"""

from fastdpo.modeling.mixers.adapter import Mixers, OwnAttention, mixers_of
from fastdpo.modeling.mixers.rows import MixerRows
from fastdpo.modeling.mixers.trial import find_mixers

__all__ = ["MixerRows", "Mixers", "OwnAttention", "find_mixers", "mixers_of"]
