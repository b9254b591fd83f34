"""Checks the settings of losses and the combinations of losses before anything is loaded."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from fastdpo.losses.divergence import DIVERGENCES
from fastdpo.losses.registry import LOSSES, losses_where
from fastdpo.losses.settings import LossConfig


def check_loss_settings(loss_type: str | Sequence[str], config: Any) -> None:
    """Raises ValueError if `loss_type` is not a loss, or if it cannot be computed with the settings in `config`.

    Args:
        loss_type: a name, or several names whose losses are added.
        config: with beta, label_smoothing and discopop_tau.
    """
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    for name in names:
        if name not in LOSSES:
            raise ValueError(f"loss_type must be one of {sorted(LOSSES)}, got {name!r}{nearest_hint(name, LOSSES)}")
    check_beta(config.beta)
    if not _is_number(config.label_smoothing) or not 0 <= config.label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {config.label_smoothing!r}")
    if config.label_smoothing > 0 and not losses_where(lambda loss: loss.smoothed, names):
        raise ValueError(
            f"label_smoothing must be 0 for loss_type {_named(names)}, which has no flipped labels,"
            f" got {config.label_smoothing}"
        )
    if config.label_smoothing == 0 and "exo_pair" in names:
        raise ValueError("label_smoothing must be > 0 for loss_type 'exo_pair' (the paper uses 1e-3), got 0")
    if not _is_number(config.discopop_tau) or config.discopop_tau <= 0:
        raise ValueError(f"discopop_tau must be > 0 and finite, got {config.discopop_tau!r}")


def check_beta(beta: Any) -> None:
    if not _is_number(beta) or beta <= 0:
        raise ValueError(f"beta must be > 0 and finite, got {beta!r}")


def check_at_least_0(name: str, value: Any) -> None:
    if not _is_number(value) or value < 0:
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")


def check_combination(config: LossConfig) -> None:
    """Raises ValueError if a run's losses cannot be added, or conflict with a setting that changes scores."""
    names = config.loss_type
    if not names:
        raise ValueError("loss_type must name at least one loss, got none")
    _check_weights(config)
    for field in ("gamma_beta_ratio", "cpo_alpha"):
        check_at_least_0(field, getattr(config, field))
    free = losses_where(lambda loss: not loss.reference, names)
    others = [name for name in names if name not in free[:1] and LOSSES[name].unit != "token"]
    if free and others:
        raise ValueError(
            f"loss_type must not hold both {free[0]!r} and {others[0]!r}, whose betas differ in scale, got {names}"
        )
    listwise = losses_where(lambda loss: loss.unit == "ranking", names)
    if listwise and len(names) > 1:
        raise ValueError(
            f"loss_type {listwise[0]!r} must be the only loss, because it is a mean over rankings and the others are"
            f" means over pairs, got {names}"
        )
    _check_divergence(config)
    _check_ld_alpha(config)
    _check_something_is_compared(config)
    _refuse(
        config.use_weighting,
        names,
        losses_where(lambda loss: loss.unit in ("batch", "ranking") or (loss.likelihood and loss.unit == "pair")),
        "use_weighting must be False for loss_type {name}, got True: it weights single pairs, and this loss is not a"
        " sum over single pairs",
    )


def _check_weights(config: LossConfig) -> None:
    weights = config.loss_weights
    if weights is None:
        return
    if not isinstance(weights, list | tuple) or len(weights) != len(config.loss_type):
        raise ValueError(
            f"loss_weights must have one value for each of the {len(config.loss_type)} losses, got {weights}"
        )
    if not all(_is_number(weight) and weight >= 0 for weight in weights):
        raise ValueError(f"loss_weights must be finite numbers >= 0, got {weights}")


def _check_divergence(config: LossConfig) -> None:
    kind = config.f_divergence_type
    if kind not in DIVERGENCES:
        raise ValueError(
            f"f_divergence_type must be one of {sorted(DIVERGENCES)}, got {kind!r}{nearest_hint(kind, DIVERGENCES)}"
        )
    if not _is_number(config.f_alpha_divergence_coef):
        raise ValueError(f"f_alpha_divergence_coef must be a finite number, got {config.f_alpha_divergence_coef!r}")
    _refuse(
        kind != "reverse_kl",
        config.loss_type,
        losses_where(lambda loss: not loss.divergence and loss.unit != "token"),
        f"f_divergence_type must be 'reverse_kl' for loss_type {{name}}, got {kind!r}: other divergences add a term of"
        " the prompt to the reward, which cancels only in a difference of rewards",
    )


def _check_ld_alpha(config: LossConfig) -> None:
    alpha = config.ld_alpha
    if alpha is None:
        return
    if not _is_number(alpha) or not 0 <= alpha <= 1:
        raise ValueError(f"ld_alpha must be None or in [0, 1], got {alpha!r}")
    _refuse(
        True,
        config.loss_type,
        losses_where(lambda loss: not loss.reference or loss.unit == "ranking"),
        f"ld_alpha must be None for loss_type {{name}}, got {alpha}: it needs a pair's log-ratios to the reference, in"
        " which it weights the extra tokens of the longer response",
    )


def _check_something_is_compared(config: LossConfig) -> None:
    """Refuses settings for comparing responses if no loss compares responses."""
    if losses_where(lambda loss: loss.unit != "token", config.loss_type):
        return
    for field, off, is_set in (
        ("f_divergence_type", "'reverse_kl'", config.f_divergence_type != "reverse_kl"),
        ("ld_alpha", "None", config.ld_alpha is not None),
        ("use_weighting", "False", config.use_weighting),
    ):
        if is_set:
            raise ValueError(
                f"{field} must be {off} for loss_type {_named(config.loss_type)} alone, which compares no responses,"
                f" got {getattr(config, field)!r}"
            )


def _refuse(is_set: bool, names: Sequence[str], refused: Sequence[str], message: str) -> None:
    for name in names:
        if is_set and name in refused:
            raise ValueError(message.replace("{name}", repr(name)))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _named(names: Sequence[str]) -> str:
    return repr(names[0]) if len(names) == 1 else repr(list(names))


def nearest_hint(name: Any, valid: Any) -> str:
    """The end of an error message that offers the nearest valid name; empty if none is near."""
    nearest = difflib.get_close_matches(str(name), list(valid), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
