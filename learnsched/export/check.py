"""What PyTorch itself computes at every layer, as integers, to hold exports against."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from learnsched.example import varied
from learnsched.export import graph as g
from learnsched.export.errors import ExportError
from learnsched.export.operations import QUANTIZERS
from learnsched.export.real import REAL
from learnsched.export.reference import propagate

# Rounding of a few float32 operations, in units of the largest number among them.
_ROUNDING = 2.0**-21
# How far real outputs may be apart, as a part of the largest.
_TOLERANCE = 1e-3
# The share of codes that float32 may round otherwise.
_FEW = 0.02
_ROUNDED = (
    "whose float32 sums round around a threshold, one way or the other with the size of the batch. Call "
    "learnsched.export.align_(model, example_input) first: it moves thresholds away from the sums, and "
    "changes no decision"
)
_UNSEEN = (
    "since the model does something that a trace does not show: it changes a tensor in place that is "
    "used again (write y = y + z, y = F.relu(y)), or a hook changes what a layer puts out"
)


def pytorch_codes(model: nn.Module, graph: g.Graph, x: Tensor) -> dict[str, NDArray[np.int64]]:
    """The integers behind the outputs of the finalized model's quantizers, and of its output.

    Args:
        model: finalized; evaluated as it is, its training flags are kept.
        graph: of the model.
        x: inputs, shape ``(samples, ...)``.

    Returns:
        by node name: the levels of every quantizer, and under the output's name the accumulators
        that stand behind the output, if it is decoded from integers. Masked are those of which the
        output says nothing, its factor being 0 or lost in the rounding of its offset.

    Raises:
        ExportError: an output is no level of its quantizer.
    """
    return _run(model, graph, x)[0]


@torch.no_grad()
def _run(
    model: nn.Module, graph: g.Graph, x: Tensor
) -> tuple[dict[str, NDArray[np.int64]], NDArray[np.float32]]:
    """As :func:`pytorch_codes`, and the model's output."""
    found: dict[str, NDArray[np.int64]] = {}
    model = copy.deepcopy(model).cpu().eval()

    def keep(name: str, node: Any) -> Any:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            found.setdefault(name, _integers(node, module, output))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, QUANTIZERS) and name in graph.modules:
            node = graph[graph.modules[name]]
            module.register_forward_hook(keep(node.name, node))
    y = model(x.cpu())
    output = graph.output
    if isinstance(output, g.Decode):
        shape = (-1, *[1] * (y.dim() - 2))
        real = y.double().numpy()
        if output.bias is not None:
            real = real - output.bias.astype(np.float64).reshape(shape)
        scale = output.scale.astype(np.float64).reshape(shape)
        codes = np.rint(real / np.where(scale == 0, 1, scale)).astype(np.int64)
        silent = np.abs(scale) <= _ROUNDING * np.maximum(np.abs(real), np.abs(real - y.numpy()))
        found[output.name] = np.ma.masked_array(codes, silent) if silent.any() else codes
    return found, y.numpy()


def check(
    graph: g.Graph, expected: dict[str, NDArray[Any]], found: dict[str, NDArray[Any]], what: str
) -> None:
    """Refuse results that differ from PyTorch's anywhere.

    Raises:
        ExportError: the message names the first layer that differs.
    """
    for node in graph:
        if node.name not in expected or node.name not in found:
            continue
        wrong = int(np.ma.filled(expected[node.name] != found[node.name], False).sum())
        if wrong:
            size = expected[node.name].size
            why = _ROUNDED if wrong <= max(2, _FEW * size) else _UNSEEN
            raise ExportError(
                f"{node.name}: {wrong} of {size} codes of {what} differ from PyTorch's, {why}"
            )


def prove(model: nn.Module, graph: g.Graph, x: Tensor) -> None:
    """Compare every layer of the graph, computed with integers, with PyTorch's own codes.

    Of an example that is constant, random numbers too: all networks make the same of zeros. Where real
    operations precede a quantizer, as behind a float first layer, PyTorch's own codes of that quantizer
    are taken, and all that follows from them is compared, the network's real output among it.

    Raises:
        ExportError: codes or outputs differ; the message names the first layer that does.
    """
    _prove(model, graph, x)
    numbers = varied(x)
    if isinstance(numbers, Tensor):
        _prove(model, graph, numbers)


def _prove(model: nn.Module, graph: g.Graph, x: Tensor) -> None:
    expected, own = _run(model, graph, x)
    known = {graph.nodes[0].name: x.detach().cpu().numpy()}
    for node in graph:
        if isinstance(node, g.Quantize) and not _reads_input(graph, node) and node.name in expected:
            known[node.name] = expected[node.name].astype(np.int32)
    found = propagate(graph, known, REAL)
    output, y = graph.output, found[graph.output.name]
    if isinstance(output, g.Decode):
        found[output.name] = found[output.inputs[0]]
    check(graph, expected, found, "the example")
    if not np.allclose(y, own, rtol=0, atol=_TOLERANCE * float(np.abs(own).max(initial=0.0))):
        raise ExportError(
            f"{output.name}: the exported network's outputs differ from PyTorch's, {_UNSEEN}"
        )


def _reads_input(graph: g.Graph, node: g.Node) -> bool:
    source = graph[node.inputs[0]]
    return isinstance(source, g.Input) or (
        isinstance(source, g.Reshape) and _reads_input(graph, source)
    )


def _integers(node: Any, module: Any, output: Tensor) -> NDArray[np.int64]:
    levels = output.new_tensor(module.levels.values) * module.scale
    code = torch.bucketize(output.contiguous(), levels)
    if not torch.equal(levels[code.clamp(max=len(levels) - 1)], output):
        raise ExportError(f"{node.name} puts out values off its levels; call finalize_ first")
    return np.asarray(node.levels.integers, dtype=np.int64)[code.numpy()]
