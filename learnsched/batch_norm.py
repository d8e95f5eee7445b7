"""Batch norm statistics, estimated anew from batches."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

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
from learnsched.modules import BATCH_NORMS

# Beyond, statistics are of other data or of another network: in stds, and as a logarithm of variances,
# which dropout ahead of a batch norm changes, too, since it is off here.
_LARGEST_SHIFT, _LARGEST_RATIO = 0.5, 1.5
_FEW_BATCHES = 50


def batch_norms(model: nn.Module) -> list[Any]:
    """Those with running statistics, but for frozen ones: in evaluation inside a module in training."""
    # Whole blocks are frozen, too: their norms lie deeper than the module in training.
    frozen = {
        module
        for parent in model.modules()
        if parent.training
        for module in parent.modules()
        if not module.training
    }
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS) and m not in frozen]
    return [m for m in norms if m.track_running_stats]


@torch.no_grad()
def reestimate_batch_norm_(
    model: nn.Module, batches: Iterable[Any], *, forward: Forward | None = None
) -> nn.Module:
    """Replace the running statistics of batch norms by their mean over the batches.

    Each batch counts by its size, so that a small last one does no harm. Batch norms that
    the batches do not reach keep theirs, with a warning; frozen ones, which are in evaluation inside a
    module in training, without.

    Args:
        model: any module; its training flags are kept.
        batches: inputs, or tuples that start with the input, as training fed them; finitely many.
        forward: runs the model on a batch of any other kind, see :func:`calibrate_`.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: without ``forward``, a batch is neither a tensor nor a tuple that starts with one.
        ValueError: there are no batches, one is empty or too small for batch norm, or statistics are
            not finite. They are as they were then.

    Example:
        >>> net = reestimate_batch_norm_(nn.BatchNorm1d(1), [torch.tensor([[1.0], [3.0]])])
        >>> net.running_mean.item()
        2.0
    """
    run = forward or on_first
    return reestimate_(model, checked(batches, model, run), run)


def reestimate_(model: nn.Module, batches: Iterator[Any], run: Forward) -> nn.Module:
    """:func:`reestimate_batch_norm_` of batches that have been checked."""
    norms = batch_norms(model)
    momenta = [module.momentum for module in norms]
    before = {module: keep(module.buffers()) for module in norms}
    seen = dict.fromkeys(norms, 0)

    def share(norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The momentum of the mean over all values: the share of these in what has been seen."""
        x = args[0] if args else kwargs["input"]
        values = x.numel() // norm.num_features
        seen[norm] += values
        norm.momentum = values / max(1, seen[norm])

    try:
        with put_back_on_failure(b for module in norms for b in module.buffers()):
            for module in norms:
                module.reset_running_stats()
            with hooked(norms, share):
                run_with_batch_statistics(model, norms, batches, run)
            _check_statistics(model, norms)
    finally:
        for module, momentum in zip(norms, momenta, strict=True):
            module.momentum = momentum
    idle = {module for module in norms if not bool(module.num_batches_tracked)}
    for module in idle:
        put_back(before[module])
    if idle:
        warnings.warn(
            f"the batches do not reach {[n for n, m in model.named_modules() if m in idle]}, which may "
            "be for training alone: these batch norms keep their statistics",
            stacklevel=4,
        )
    return model


def _check_statistics(model: nn.Module, norms: Iterable[nn.Module]) -> None:
    """Refuse statistics that make constants of all inputs.

    Raises:
        ValueError: those of a batch norm are not finite.
    """
    wrong = {n for n in norms if not all(bool(b.isfinite().all()) for b in n.buffers())}
    if wrong:
        raise ValueError(
            f"the batches give {[name for name, m in model.named_modules() if m in wrong]} statistics "
            "that are not finite; look for NaN and infinite numbers in the data"
        )


def statistics(model: nn.Module) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """Running mean and variance of each batch norm, copied, if training has left its mark on them.

    In a few batches they do not get away from their start. Of none at all they are as they were loaded.
    """
    return {
        norm: (norm.running_mean.clone(), norm.running_var.clone())
        for norm in batch_norms(model)
        if not 0 < int(norm.num_batches_tracked) < _FEW_BATCHES
    }


def moved(before: Mapping[nn.Module, tuple[Tensor, Tensor]]) -> list[nn.Module]:
    """Batch norms whose statistics have become others than :func:`statistics` once were.

    After training, an estimate from the same data moves them by some hundredths of a std.

    Args:
        before: of batch norms with their running statistics.

    Example:
        >>> norm = nn.BatchNorm1d(3)
        >>> before = statistics(norm)
        >>> moved(before)
        []
        >>> _ = norm.running_mean.add_(2.0)
        >>> moved(before) == [norm]
        True
    """
    found = []
    for norm, (mean, variance) in before.items():
        new: Any = norm
        shift = (new.running_mean - mean).abs() / (variance + new.eps).sqrt()
        ratio = ((new.running_var + new.eps) / (variance + new.eps)).log().abs()
        if float(shift.median()) > _LARGEST_SHIFT or float(ratio.median()) > _LARGEST_RATIO:
            found.append(norm)
    return found
