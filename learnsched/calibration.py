"""The scales of quantized activations, fitted to data."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from learnsched.activation_quantizer import ActivationQuantizer
from learnsched.batch_norm import batch_norms
from learnsched.batches import (
    Forward,
    checked,
    keep,
    on_first,
    put_back,
    put_back_on_failure,
    run_with_batch_statistics,
)
from learnsched.example import hooked
from learnsched.layers import quantized_activations

# What a rule is fitted to: least squares goes over it a hundred times.
_LARGEST_SAMPLE = 2**18


@torch.no_grad()
def calibrate_(
    model: nn.Module, batches: Iterable[Any], *, forward: Forward | None = None
) -> nn.Module:
    """Fit the scale of every quantized activation to data, in the order of execution.

    Each activation is fitted to what the layers before it, already calibrated, put out: one pass,
    and the mean over batches. Batch norms use the statistics of each batch, and keep their own. An
    activation that is 0 throughout keeps its scale, with a warning. Of more than 2^18 values of a batch
    as many are drawn, always the same. In training from random weights activations grow: let their
    scales be learned from there (:func:`learnsched.learn_scales_`).

    Args:
        model: converted by ``quantize_``.
        batches: inputs, or tuples that start with the input, as a data loader gives; finitely many, as
            ``itertools.islice(loader, 100)`` makes them of an endless stream.
        forward: ``forward(model, batch)`` runs the model on a batch of any other kind, on the device
            of the model: ``lambda model, batch: model(**batch)`` where batches are dictionaries.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: without ``forward``, a batch is neither a tensor nor a tuple that starts with one.
        ValueError: the model has no quantized activations, there are no batches, one is empty or too
            small for batch norm, or an activation is not finite. The scales are as they were.

    Example:
        >>> from learnsched import quantize_, ternary, unsigned
        >>> net = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU())
        >>> net = quantize_(net, ternary(), unsigned(2))
        >>> net = calibrate_(net, [torch.randn(64, 8)])
    """
    activations = quantized_activations(model, "fitted")
    run = forward or on_first
    batches = checked(batches, model, run)
    norms = batch_norms(model)
    statistics = keep(b for module in norms for b in module.buffers())
    fits = {a: _Fit() for a in activations}
    try:
        with (
            put_back_on_failure(a.scale for a in activations),
            hooked(activations, lambda a, *given: fits[a](a, *given)),
        ):
            run_with_batch_statistics(model, norms, batches, run)
    finally:
        put_back(statistics)
    for activation in activations:
        activation.bound_scale_()
    if missed := [a.layer_name for a, fit in fits.items() if not fit.seen]:
        warnings.warn(
            f"the batches do not reach activations after {missed}, so they keep their scale",
            stacklevel=3,
        )
    dead = [a.layer_name for a, fit in fits.items() if fit.seen and not fit.fitted]
    if dead:
        warnings.warn(
            f"activations after {dead} are 0 in all of these batches, so they keep their scale; look "
            "at the data and the biases",
            stacklevel=3,
        )
    return model


class _Fit:
    """A hook that fits an activation's scale to its input, and keeps the mean over batches."""

    def __init__(self) -> None:
        self.seen = 0
        self.fitted: list[Tensor] = []

    def __call__(
        self, module: ActivationQuantizer, inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]
    ) -> None:
        self.seen += 1
        # The forward pass comes after this, and must find its input as it is.
        x = module.ahead((inputs[0] if inputs else named["input"]).clone())
        if not bool(x.isfinite().all()):
            raise ValueError(
                f"an activation after {module.layer_name} is not finite, so no scale fits it; look "
                "for NaN in the data and the weights"
            )
        # What is clipped away does not count as quantization error.
        if module.levels.values[0] >= 0:
            x = x.clamp(min=0)
        x = x.clamp(-module.ceiling, module.ceiling)
        if bool(x.any()):
            # One row: the rules take rows for channels, and an activation has one scale.
            scale = module.rule(_sample(x.flatten()), module.levels).mean()
            self.fitted.append(scale.clamp(max=module.largest_scale))
            module.scale.copy_(torch.stack(self.fitted).mean())


def _sample(x: Tensor) -> Tensor:
    """Of a long row, values drawn at random, with a seed of their own; a stride would favour columns."""
    if len(x) <= _LARGEST_SAMPLE:
        return x
    drawn = torch.randint(
        len(x), (_LARGEST_SAMPLE,), generator=torch.Generator("cpu").manual_seed(0), device="cpu"
    )
    return x[drawn.to(x.device)]
