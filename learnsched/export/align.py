"""Thresholds moved between the integers, where the rounding of float32 sums cannot reach."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from learnsched.export import graph as g
from learnsched.export.errors import ExportError
from learnsched.export.operations import BATCH_NORMS
from learnsched.export.thresholds import centre
from learnsched.export.trace import Translation, trace, translate
from learnsched.export.values import Doubles


@torch.no_grad()
def align_(model: nn.Module, example_input: Tensor) -> nn.Module:
    """Make a finalized model's own float32 codes independent of batch size, threads and machine.

    A float32 convolution rounds its partial sums. Where the true sum lies on a threshold up to that
    rounding, the code depends on the order of summation. Between two neighbouring sums of integers a
    threshold can be moved freely: no decision changes. This moves the bias of the batch norm (or of the
    layer) ahead of each quantized activation to the place where all thresholds are as far from the sums
    as they can be together. Exports give the same codes with and without it; with it, so does PyTorch.

    Args:
        model: finished by ``finalize_``; changed in place.
        example_input: a batch of inputs; shapes are taken from it.

    Returns:
        ``model`` itself.

    Raises:
        ExportError: the model cannot be traced, or a decision would have changed; it is as it was then.
        ValueError: the model has no quantized layers.

    Example:
        >>> import learnsched as ls
        >>> from learnsched.export import QuantizedInput
        >>> net = nn.Sequential(QuantizedInput(0.1), nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU())
        >>> net = ls.finalize_(ls.quantize_(net, ls.ternary(), ls.unsigned(2)))
        >>> net = align_(net, torch.zeros(1, 8))
    """
    before = translate(model, example_input)
    moved = []
    for node in before.graph:
        if isinstance(node, g.Threshold):
            found = _shift(before, node)
            if found is not None:
                parameter, shift = _target(model, *found)
                moved.append((parameter, parameter.clone()))
                parameter.add_(torch.from_numpy(shift).to(parameter))
    try:
        after = trace(model, example_input)
        for node in before.graph:
            twin = after[node.name]
            if not isinstance(node, g.Threshold) or not isinstance(twin, g.Threshold):
                continue
            if not np.array_equal(node.thresholds, twin.thresholds):
                raise ExportError(
                    f"{node.name}: its thresholds are closer together than float32 can keep apart"
                )
    except BaseException:
        for parameter, value in moved:
            parameter.copy_(value)
        raise
    return model


def _shift(translation: Translation, node: g.Threshold) -> tuple[str, Doubles] | None:
    """The module to move and by how much its output must rise, in real numbers."""
    call = translation.decided[node.name]
    found = translation.calls.integer_affine(call.all_input_nodes[0])
    quantizer: Any = translation.calls.operations[call].module
    levels = quantizer.levels
    spaced = np.allclose(np.diff(levels.thresholds), levels.step, rtol=1e-12)
    target = _movable(translation, call.all_input_nodes[0])
    if node.slopes is None or found is None or target is None or not spaced:
        return None
    # In codes, a quantizer rounds (z / scale - t_0) / step + 1/2 to the nearest integer.
    wanted = levels.thresholds[0] + (centre(node, node.slopes) - 0.5) * levels.step
    real = wanted * quantizer.scale.double().item()
    edges, low, high = node.thresholds, node.low[:, None, None], node.high[:, None, None]
    decides = ((edges > low) & (edges <= high)).any((1, 2))
    return target, np.where(decides, real - found[1], 0.0)


def _movable(translation: Translation, call: fx.Node) -> str | None:
    """The batch norm or biased layer whose output enters the quantizer as a plain summand."""
    operation = translation.calls.operations[call]
    if len(call.users) > 1:
        return None
    if operation.kind == "batch_norm":
        return operation.name
    if operation.kind == "product":
        module: Any = operation.module
        return None if module.bias is None else operation.name
    if operation.kind in ("addition", "passing"):
        found = (_movable(translation, a) for a in call.all_input_nodes)
        return next((name for name in found if name is not None), None)
    return None


def _target(model: nn.Module, name: str, shift: Doubles) -> tuple[Tensor, Doubles]:
    """The parameter to add to, and what."""
    module: Any = model.get_submodule(name)
    if module.bias is not None or not isinstance(module, BATCH_NORMS):
        return module.bias, shift
    variance: Any = module.running_var
    deviation = np.sqrt(variance.double().cpu().numpy() + module.eps)
    mean: Any = module.running_mean
    return mean, -shift * deviation
