"""Position-wise parts of a model's layers (MLPs, experts, norms, projections with adapters) over tiles of rows: finding
them (`trial.py`), running one of them forward and backward (`run.py`), and putting them into a model (`install.py`).
"""

from fastdpo.modeling.tiles.check import use_tiles
from fastdpo.modeling.tiles.install import auto_tile_rows, install_tiles, remove_tiles, tiles_of
from fastdpo.modeling.tiles.run import only_first_tiles
from fastdpo.modeling.tiles.trial import find_tiles

__all__ = [
    "auto_tile_rows",
    "find_tiles",
    "install_tiles",
    "only_first_tiles",
    "remove_tiles",
    "tiles_of",
    "use_tiles",
]
