"""``export_ternary``: a folder for ternary accelerators.

It holds ``manifest.json``, which describes the layers in order, and one file for each array: ternary and
binary weights at five trits a byte, thresholds and test vectors as little-endian int32. The manifest
states the size and SHA-256 of every file, and its own.

What it describes is integer arithmetic only: convolutions of trits, comparisons with thresholds, pools.
At the two ends stand the real scale that turns inputs into codes and those that turn the last
accumulators into outputs.
"""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor, nn

from learnsched.export import graph as g
from learnsched.export.check import prove
from learnsched.export.errors import ExportError
from learnsched.export.folder import check_replaceable, write_folder
from learnsched.export.manifest import Files, write_entry
from learnsched.export.reference import integers
from learnsched.export.trace import trace

_VECTORS = 8


def export_ternary(model: nn.Module, example_input: Tensor, folder: str | os.PathLike[str]) -> None:
    """Write a finalized network for a ternary accelerator: trits, integer thresholds, test vectors.

    Batch norm, activation and residual addition become integer thresholds for each channel, exactly as
    PyTorch decides, negative γ included. The network's input must be quantized: put
    :class:`learnsched.export.QuantizedInput` in front of it.

    Args:
        model: finished by ``finalize_``; it is left as it is.
        example_input: a batch of inputs; the codes of these are compared with PyTorch's, and the first
            eight become test vectors.
        folder: a new folder, or one with an export of this format, which is replaced; written whole
            or not at all.

    Raises:
        ExportError: the model is not finalized, a layer computes with real numbers or has other than
            ternary or binary weights, or codes differ from PyTorch's on the example; the message names
            the layer and the way out.
        FileExistsError: the folder holds something else.
        ValueError: the model has no quantized layers.

    Example:
        >>> import tempfile, torch
        >>> from learnsched import finalize_, quantize_, ternary
        >>> from learnsched.export import QuantizedInput
        >>> net = nn.Sequential(QuantizedInput(0.05), nn.Linear(8, 4))
        >>> net = finalize_(quantize_(net, ternary()))
        >>> folder = Path(tempfile.mkdtemp()) / "net"
        >>> export_ternary(net, torch.randn(20, 8), folder)
        >>> sorted(file.name for file in folder.iterdir())
        ['1.weight.trits', 'input.vectors.i32', 'manifest.json', 'output.vectors.i32']
    """
    graph = trace(model, example_input)
    _check_integer(graph)
    prove(model, graph, example_input)
    check_replaceable(Path(folder))
    found = integers(graph, example_input[:_VECTORS].detach().cpu().numpy())
    coded = next(node for node in graph if isinstance(node, g.Quantize))
    vectors = {"input": found[coded.name], "output": found[graph.output.name]}
    files = Files()
    described = {
        "layers": [write_entry(node, files) for node in graph],
        "vectors": {name: files.add(f"{name}.vectors", v, "i32") for name, v in vectors.items()},
    }
    write_folder(Path(folder), files.content, described)


def _origins(graph: g.Graph, node: g.Node) -> list[g.Node]:
    """What a node reads, behind reshapes."""
    found = []
    for source in (graph[name] for name in node.inputs):
        found += _origins(graph, source) if isinstance(source, g.Reshape) else [source]
    return found


def _check_integer(graph: g.Graph) -> None:
    for node in graph:
        if isinstance(node, g.RealProduct):
            raise ExportError(
                f"{node.name} cannot be written as integers: {node.reason}; export_qonnx and "
                "export_onnx can hold it as it is"
            )
        if isinstance(node, g.Product) and not set(node.levels.integers) <= {-1, 0, 1}:
            raise ExportError(
                f"{node.name} has {node.levels.name} weights, which are no trits; quantize it with "
                "ternary() or binary(), or use export_qonnx"
            )
        if isinstance(node, g.REAL):
            raise ExportError(
                f"{node.name} computes with real numbers, since no quantized activation comes right "
                "after it. What becomes thresholds stands between a layer and its quantized activation "
                "(a module, so that quantize_ finds it): batch norms and one addition of two tensors. "
                "Put pools and concatenations behind the activation, or use export_qonnx or export_onnx"
            )
        if (
            isinstance(node, g.STRUCTURAL)
            and not isinstance(node, g.Reshape)
            and any(isinstance(source, g.Input) for source in _origins(graph, node))
        ):
            raise ExportError(
                f"{node.name} comes before the input is quantized; put learnsched.export.QuantizedInput "
                "ahead of it"
            )
        if isinstance(node, g.STRUCTURAL) and any(
            isinstance(graph[name], g.Decode) for name in node.inputs
        ):
            raise ExportError(f"{node.name} comes after the last quantized layer; leave it out")
    if not isinstance(graph.output, g.Decode) or sum(isinstance(n, g.Quantize) for n in graph) != 1:
        raise ExportError(
            "the network must have one quantized input and an integer output; put "
            "learnsched.export.QuantizedInput in front of it, or use export_qonnx or export_onnx"
        )
