"""Tiles in the models of a run: the policy, and references that are models of their own.

In: a prepared model and the trainer. Out: the same model, whose position-wise modules run over tiles of `tile_rows`
rows. Refuses policies that cannot, and shards that would be gathered once per tile.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.utils import logging

from fastdpo.modeling.backbone import bare_model
from fastdpo.modeling.tiles import use_tiles

logger = logging.get_logger(__name__)


def use_tiles_in_run(model: nn.Module, run: Any) -> None:
    """Applies `tile_rows` to a model. A reference of another kind than the policy may run without tiles.

    Args:
        run: the trainer, with its model, settings, accelerator and router_aux_loss_coef.
    Raises:
        ValueError: the policy cannot run in tiles, or its weights are sharded by FSDP1.
    """
    tile_rows = run.args.tile_rows
    is_policy = bare_model(model) is bare_model(run.model)
    plugin = getattr(run.accelerator.state, "fsdp_plugin", None)
    if tile_rows is not None and plugin is not None and getattr(plugin, "fsdp_version", 2) == 1:
        raise ValueError(
            f"tile_rows must be None with FSDP1, got {tile_rows}: its weights are parts of one flat tensor; set"
            " fsdp_version: 2"
        )
    if not is_policy and any(parameter.is_meta for parameter in model.parameters()):
        return  # weights that come from memory or disk for every call
    settings = {"is_packed": run.is_packed, "router_aux_loss": is_policy and run.router_aux_loss_coef > 0}
    try:
        use_tiles(model, tile_rows, impl=run.args.impl, autocast=run.accelerator.autocast, **settings)
    except ValueError as error:
        if is_policy:
            raise
        logger.info(f"The reference runs without tiles: {error}")
