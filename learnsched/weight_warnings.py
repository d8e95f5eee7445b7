"""What weights show of a run that goes wrong, or has."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from learnsched.layers import Layer
from learnsched.schedule import Policy, Setting


def warn_of_weights(layers: Sequence[Layer], settings: Sequence[Setting]) -> None:
    """Warn of weights and noise that are not finite, and of fewer frozen ones than there should be.

    Args:
        layers: of the model, from the input.
        settings: those in force, one a layer.
    """
    lost = [
        layer.info.name
        for layer in layers
        if layer.weight is not None and not bool(layer.weight.weight.isfinite().all())
    ]
    if lost:
        warnings.warn(
            f"weights of {lost} are not finite: training has diverged, or a batch held NaN, which a "
            "hard activation turns into its lowest level. finalize_ will refuse them",
            stacklevel=3,
        )
    if noise := [layer.info.name for layer in layers if has_lost_noise(layer)]:
        warnings.warn(
            f"the learned noise of {noise} is not finite, so no gradient reaches their weights: learn "
            "noise at a lower rate. finalize_ will refuse it",
            stacklevel=3,
        )
    free = [
        layer.info.name
        for layer, setting in zip(layers, settings, strict=True)
        if _is_freer(layer, setting)
    ]
    if free:
        warnings.warn(
            f"fewer weights of {free} are frozen than the settings in force say: load the model's "
            "state with the scheduler's",
            stacklevel=3,
        )


def has_lost_noise(layer: Layer) -> bool:
    """Whether noise that a layer learns has become NaN or infinite."""
    learned = (quantizer.log_std for quantizer in layer.quantizers)
    return any(log_std is not None and not bool(log_std.isfinite()) for log_std in learned)


def _is_freer(layer: Layer, setting: Setting) -> bool:
    """Whether fewer weights of a layer are frozen than its setting says."""
    if layer.weight is None:
        return False
    membership = layer.weight.weight_quantizer.membership
    return int(torch.count_nonzero(membership)) < round(setting.fraction * membership.numel())


def warn_of_gaps(layers: Sequence[Layer], policy: Policy) -> None:
    """Warn of weights with levels at uneven distances under a policy that takes them to be even."""
    if not getattr(policy, "evenly_spaced", False):
        return
    uneven = [
        layer.info.name
        for layer in layers
        if layer.weight is not None and not layer.weight.weight_quantizer.levels.is_evenly_spaced
    ]
    if uneven:
        warnings.warn(
            f"{type(policy).__name__} leaves weights real by noise as wide as the smallest gap between "
            f"levels, and those of {uneven} are further apart elsewhere: there weights are on a level "
            "from the start, without a gradient. Take evenly spaced levels, or a policy whose backward "
            "noise is wider, such as AdditiveNoiseAnnealing",
            stacklevel=3,
        )
