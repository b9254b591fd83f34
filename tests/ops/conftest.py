"""Fixtures of the head op's tests."""

import pytest


@pytest.fixture
def small_tiles(monkeypatch):
    """Blocks so small that ordinary test shapes have several in every direction, the last ones ragged."""
    from fastdpo.ops import fused, tiled

    monkeypatch.setattr(tiled, "BLOCK_ROWS", 31)
    monkeypatch.setattr(tiled, "MAX_TILE_ELEMENTS", 3000)
    monkeypatch.setattr(fused, "BLOCK_ROWS", 70)
    monkeypatch.setattr(fused, "WORKSPACE_BYTES", 80000)
