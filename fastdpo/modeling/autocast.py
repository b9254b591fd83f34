"""The state of autocast in a forward, for what runs in its backward: autograd's threads have their own."""

from __future__ import annotations

from typing import Any

import torch


def autocast_of(device_type: str) -> dict[str, Any]:
    """The state of autocast, as arguments of `torch.autocast`."""
    return {
        "device_type": device_type,
        "dtype": torch.get_autocast_dtype(device_type),
        "enabled": torch.is_autocast_enabled(device_type),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }
