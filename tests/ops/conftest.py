"""Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before they are imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def small_tiles(monkeypatch):
    """Blocks so small that ordinary test shapes have several in every direction, the last ones ragged."""
    from fastdpo.ops import fused, tiled

    monkeypatch.setattr(tiled, "BLOCK_ROWS", 31)
    monkeypatch.setattr(tiled, "MAX_TILE_ELEMENTS", 3000)
    monkeypatch.setattr(fused, "BLOCK_ROWS", 70)
    monkeypatch.setattr(fused, "MAX_TILE_ELEMENTS", 10000)
