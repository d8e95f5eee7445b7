"""Thresholds moved between the integers, where the rounding of float32 sums cannot reach."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from learnsched.batches import keep, put_back, put_back_on_failure
from learnsched.export import graph as g
from learnsched.export.errors import ExportError
from learnsched.export.operations import FOLDED_NORMS
from learnsched.export.thresholds import centre, fit_line
from learnsched.export.trace import Translation, trace, translate
from learnsched.export.values import Doubles

# Below this share of the distance between two integers, a threshold's spacing is changed as well.
_ROOM = 0.05


@dataclass(frozen=True, eq=False)
class _Move:
    """What to do to the output of a batch norm or biased layer: ``y * gain + shift``."""

    module: str
    gain: Doubles
    shift: Doubles


@torch.no_grad()
def align_(model: nn.Module, example_input: Tensor) -> nn.Module:
    """Make a finalized model's own float32 codes independent of batch size, threads and machine.

    A float32 convolution rounds its partial sums. Where the true sum lies on a threshold up to that
    rounding, the code depends on the order of summation. Between two neighbouring sums of integers a
    threshold can be moved freely: no decision changes. This moves the bias of the batch norm (or of the
    layer) ahead of each quantized activation to the place where all thresholds are as far from the sums
    as they can be together; where that is not far, its factor too. Exports give the same codes with and
    without it; with it, so does PyTorch. Behind activations that bend, nothing is moved. Channels whose
    thresholds stand closer together than float32 can tell, as with 8-bit codes of large sums, are left
    as they are, with a warning.

    Args:
        model: finished by ``finalize_``; changed in place.
        example_input: a batch of inputs; shapes are taken from it.

    Returns:
        ``model`` itself.

    Raises:
        ExportError: the model cannot be traced, or what is moved in one layer spoils another; it is as
            it was then.
        ValueError: the model has no quantized layers.

    Example:
        >>> import learnsched as ls
        >>> from learnsched.export import QuantizedInput
        >>> net = nn.Sequential(QuantizedInput(0.1), nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU())
        >>> net = ls.finalize_(ls.quantize_(net, ls.ternary(), ls.unsigned(2)))
        >>> net = align_(net, torch.zeros(1, 8))
    """
    before = translate(model, example_input)
    thresholds = [node for node in before.graph if isinstance(node, g.Threshold)]
    # What is called twice is moved once, for its first call.
    moves: dict[str, _Move] = {}
    calls: dict[str, list[str]] = {}
    for node in thresholds:
        move = _move(before, node)
        if move is not None:
            moves.setdefault(move.module, move)
            calls.setdefault(move.module, []).append(node.name)
    modules = {name: model.get_submodule(name) for name in moves}
    kept = keep(tensor for module in modules.values() for tensor in _changeable(module))
    with put_back_on_failure([tensor for tensor, _ in kept]):
        for name, move in moves.items():
            _apply(modules[name], move)
        changed = _changed(thresholds, trace(model, example_input))
        if changed:
            put_back(kept)
            for name, move in moves.items():
                spoilt = [changed[call] for call in calls[name] if call in changed]
                _apply(modules[name], _without(move, np.any(spoilt, axis=0) if spoilt else None))
            if _changed(thresholds, trace(model, example_input)):
                raise ExportError(f"{sorted(changed)} cannot be aligned; align their layers apart")
    for name, channels in changed.items():
        warnings.warn(
            f"{name}: in {channels.sum()} of {len(channels)} channels the thresholds are closer "
            "together than float32 can tell, or belong to a layer that is called twice, and were left "
            "as they are; fewer bits would help, or a batch norm whose mean and offset are not far "
            "larger than what it puts out",
            stacklevel=3,  # no_grad wraps this function
        )
    return model


def _changed(before: list[g.Threshold], after: g.Graph) -> dict[str, NDArray[np.bool_]]:
    """The channels that decide otherwise than before, by the name of the node."""
    result = {}
    for node in before:
        twin: Any = after[node.name]
        channels = (node.thresholds != twin.thresholds).any((1, 2))
        if channels.any():
            result[node.name] = channels
    return result


def _without(move: _Move, channels: NDArray[np.bool_] | None) -> _Move:
    """The move with some channels left where they are."""
    if channels is None:
        return move
    gain, shift = np.where(channels, 1.0, move.gain), np.where(channels, 0.0, move.shift)
    return _Move(move.module, gain, shift)


def _move(translation: Translation, node: g.Threshold) -> _Move | None:
    """What takes a quantizer's thresholds away from the integers; None where nothing can."""
    call = translation.decided[node.name]
    source = call.all_input_nodes[0]
    found = translation.calls.integer_affine(source)
    quantizer: Any = translation.calls.operations[call].module
    levels, scale = quantizer.levels, quantizer.scale.double().item()
    spaced = np.allclose(np.diff(levels.thresholds), levels.step, rtol=1e-12)
    module = _movable(translation, source)
    if node.slopes is None or found is None or module is None or not spaced:
        return None
    offset, room = centre(node, node.slopes)
    gain = np.ones(len(offset))
    slope = np.abs(node.slopes[0])
    if translation.calls.operations[source].kind == "batch_norm" and len(node.inputs) == 1:
        d, c = fit_line(node.thresholds[:, 0], node.low, node.high)
        tight = (room < _ROOM * slope) & (slope > 0)
        gain = np.where(tight, 1 / (d * np.where(slope > 0, slope, 1)), 1.0)
        offset = np.where(tight, 0.5 - c / d, offset)
    # In codes, a quantizer rounds (z / scale - t_0) / step + 1/2 to the nearest integer.
    wanted = (levels.thresholds[0] + (offset - 0.5) * levels.step) * scale
    edges, low, high = node.thresholds, node.low[:, None, None], node.high[:, None, None]
    decides = ((edges > low) & (edges <= high)).any((1, 2))
    gain = np.where(decides, gain, 1.0)
    # Where no sum reaches a threshold, or all do, the last one may be near; if it is far, it stays so.
    above, below = (edges > high).all((1, 2)), (edges <= low).all((1, 2))
    far = (above & (found[1] <= wanted)) | (below & (found[1] >= wanted))
    return _Move(module, gain, np.where(far, 0.0, wanted - gain * found[1]))


def _movable(translation: Translation, call: fx.Node) -> str | None:
    """The batch norm or biased layer whose output enters the quantizer as a plain summand."""
    operation = translation.calls.operations[call]
    if len(call.users) > 1:
        return None
    if operation.kind == "batch_norm":
        return operation.name
    if operation.kind == "product":
        product: Any = operation.module
        return None if product.bias is None else operation.name
    if operation.kind == "addition":
        found = (_movable(translation, argument) for argument in call.all_input_nodes)
        return next((name for name in found if name is not None), None)
    return None


def _changeable(module: Any) -> list[Tensor]:
    """The tensors of a batch norm or biased layer that :func:`_apply` changes."""
    if not isinstance(module, FOLDED_NORMS):
        return [module.bias]
    if module.weight is None or module.bias is None:
        return [module.running_mean, module.running_var]
    return [module.weight, module.bias]


def _apply(module: Any, move: _Move) -> None:
    """Change what the module puts out."""
    norm = isinstance(module, FOLDED_NORMS)
    if norm and (module.weight is None or module.bias is None):
        # Without factors of its own: (x - mean) / deviation, of which both can change.
        mean, variance = module.running_mean, module.running_var
        deviation = (variance.double() + module.eps).sqrt() / torch.from_numpy(move.gain).to(
            mean.device
        )
        mean.sub_((torch.from_numpy(move.shift).to(mean.device) * deviation).to(mean.dtype))
        variance.copy_((deviation.square() - module.eps).to(variance.dtype))
        return
    gain, shift = (torch.from_numpy(v).to(module.bias) for v in (move.gain, move.shift))
    module.bias.mul_(gain).add_(shift)
    if norm:
        module.weight.mul_(gain)
