"""Telemetry of a user's run: what its metrics and weights show a policy."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from learnsched.layers import Layer
from learnsched.schedule import Telemetry


def telemetry_of(metrics: Sequence[Mapping[str, float]], layers: Sequence[Layer]) -> Telemetry:
    """What a policy sees after some epochs; a loss that is not finite counts as no change.

    Args:
        metrics: of each epoch that has ended; the training loss is called ``train_loss``.
        layers: whose weights are measured, once, if the policy asks for their error.

    Example:
        >>> shown = telemetry_of([{"train_loss": 2.0}, {"train_loss": 1.0}, {"train_loss": 0.5}], ())
        >>> shown.loss.item(), shown.loss_trend.item()
        (0.25, 0.5)
    """
    losses: list[float] = []
    for numbers in metrics:
        loss = numbers.get("train_loss", math.nan)
        if math.isfinite(loss):
            losses.append(loss)
        else:
            losses += losses[-1:]
    first, before, last = (losses[0], losses[-2:][0], losses[-1]) if losses else (1.0,) * 3
    return _LazyTelemetry(_ratio(last, first), _ratio(last, before), layers)


class _LazyTelemetry(Telemetry):
    """Measures the weights only for a policy that reads their error, and once."""

    layers: Sequence[Layer]

    def __init__(
        self,
        loss: Tensor,
        loss_trend: Tensor,
        layers: Sequence[Layer] = (),
        weight_error: Tensor | None = None,
    ) -> None:
        vars(self).update(loss=loss, loss_trend=loss_trend, layers=layers)
        if weight_error is not None:  # as dataclasses.replace gives it
            vars(self).update(weight_error=weight_error)

    @functools.cached_property
    def weight_error(self) -> Tensor:  # type: ignore[override]
        """Of each layer, 0 without a quantized weight."""
        errors = [
            torch.zeros((), device="cpu")
            if layer.weight is None
            else layer.weight.weight_quantizer.error(layer.weight.weight).float().cpu()
            for layer in self.layers
        ]
        return torch.stack(errors)


def _ratio(value: float, reference: float) -> Tensor:
    # Losses below 0 give a ratio below 0, of which policies can warn.
    return torch.tensor(value / abs(reference) if reference else 1.0, device="cpu")
