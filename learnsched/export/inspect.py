"""``inspect``: what a hardware engineer asks first about an exported network."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnsched.export import graph as g
from learnsched.export.emit import need_onnx
from learnsched.export.errors import FolderError
from learnsched.export.reference import integer_reference
from learnsched.tables import aligned

_QUANTIZERS = ("QuantizeLinear", "Quant", "BipolarQuant")
_PRODUCTS = ("Conv", "ConvTranspose", "MatMul")


@dataclass(frozen=True)
class LayerReport:
    """One product of a network.

    Attributes:
        name: of the layer.
        shape: of its output, without the batch dimension.
        weight_bits: of a stored weight; 32 if it is real.
        output_bits: of the codes that it is turned into; 32 if its output stays an accumulator or real.
        weights: how many.
        zeros: how many of them are 0.
        operations: multiply-accumulates for one sample.
        weight_bytes: of the weights as stored.
        activation_bytes: of the codes at its output for one sample, packed.
        input_bytes: of the codes that it reads for one sample, packed.
    """

    name: str
    shape: tuple[int, ...]
    weight_bits: float
    output_bits: int
    weights: int
    zeros: int
    operations: int
    weight_bytes: int
    activation_bytes: int
    input_bytes: int


@dataclass(frozen=True)
class Report:
    """Layers and totals of an exported network; ``str`` makes a table.

    Attributes:
        path: of the file or folder.
        format: ternary, ONNX or QONNX, with its version.
        file_bytes: size on disk.
        layers: products, from the input.
    """

    path: str
    format: str
    file_bytes: int
    layers: tuple[LayerReport, ...]

    @property
    def weights(self) -> int:
        """How many weights there are."""
        return sum(layer.weights for layer in self.layers)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as stored."""
        return sum(layer.weight_bytes for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Share of weights that are 0."""
        return sum(layer.zeros for layer in self.layers) / max(self.weights, 1)

    @property
    def operations(self) -> int:
        """Multiply-accumulates for one sample."""
        return sum(layer.operations for layer in self.layers)

    @property
    def nonzero_operations(self) -> int:
        """Multiply-accumulates with weights other than 0."""
        return sum(
            layer.operations * (layer.weights - layer.zeros) // layer.weights
            for layer in self.layers
        )

    @property
    def activation_bytes(self) -> int:
        """The most that a layer's input and output codes take for one sample, without shortcuts."""
        return max(layer.input_bytes + layer.activation_bytes for layer in self.layers)

    def __str__(self) -> str:
        head = ("layer", "output", "weight bits", "output bits", "weights", "zero", "MACs", "bytes")
        rows = [
            (
                layer.name,
                "×".join(map(str, layer.shape)),
                f"{layer.weight_bits:g}",
                str(layer.output_bits),
                f"{layer.weights:,}",
                f"{layer.zeros / layer.weights:.1%}",
                f"{layer.operations:,}",
                f"{layer.weight_bytes:,}",
            )
            for layer in self.layers
        ]
        float_bytes = 4 * self.weights
        total = max(self.weight_bytes, 1)
        return "\n".join(
            [
                f"{self.path}: {self.format}, {self.file_bytes:,} bytes on disk",
                aligned([head, *rows], left=2),
                f"weights: {self.weights:,}, {self.sparsity:.1%} of them zero, in "
                f"{self.weight_bytes:,} bytes "
                f"(float32: {float_bytes:,}, {float_bytes / total:.1f} times as much)",
                f"operations for one input: {self.operations:,} multiply-accumulates, "
                f"{self.nonzero_operations:,} with a weight other than zero",
                f"activation memory for one input: {self.activation_bytes:,} bytes at most, for one "
                "layer's input and output codes",
            ]
        )


def inspect(path: str | os.PathLike[str]) -> Report:
    """Layers, bits, sizes, operations, sparsity and memory of an exported network.

    Args:
        path: a folder of ``export_ternary``, or a file of ``export_onnx`` or ``export_qonnx``.

    Returns:
        a report; ``print`` shows it as a table.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        FolderError: it is none of these, was altered, or has no layers.
        ImportError: it is an ONNX file, and onnx is not installed.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from learnsched import export_ternary, finalize_, quantize_, ternary
        >>> from learnsched.export import QuantizedInput
        >>> net = nn.Sequential(QuantizedInput(0.05), nn.Linear(10, 4))
        >>> net = finalize_(quantize_(net, ternary()))
        >>> folder = tempfile.mkdtemp()
        >>> export_ternary(net, torch.randn(20, 10), folder)
        >>> report = inspect(folder)
        >>> report.weights, report.weight_bytes, report.operations
        (40, 8, 40)
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give an exported file or folder")
    report = _folder_report(path) if path.is_dir() else _file_report(path)
    if not report.layers:
        raise FolderError(
            f"{path} has no linear layer or convolution of the kind that learnsched.export writes, of "
            "which a report could tell; export a network that has one"
        )
    return report


def _folder_report(path: Path) -> Report:
    reference = integer_reference(path)
    graph, layers = reference.graph, []
    for node in graph:
        if isinstance(node, g.Product):
            after = _following(graph, node.name)
            bits, shape = (32, node.shape) if after is None else (after.levels.bits, after.shape)
            layers.append(
                LayerReport(
                    node.name,
                    node.shape,
                    1.6,  # five trits a byte
                    bits,
                    node.weight.size,
                    int((node.weight == 0).sum()),
                    graph.operations(node),
                    -(-node.weight.size // 5),
                    _packed(shape, bits),
                    _packed(graph[node.inputs[0]].shape, _code_bits(graph, node.inputs[0])),
                )
            )
    size = sum(file.stat().st_size for file in path.iterdir())
    version = f"{reference.manifest['format']} {reference.manifest['version']}"
    return Report(str(path), version, size, tuple(layers))


def _following(graph: g.Graph, name: str) -> g.Threshold | None:
    """The node that turns an accumulator into codes; None where it stays one."""
    for node in graph:
        if name in node.inputs:
            if isinstance(node, g.Threshold):
                return node
            if isinstance(node, g.STRUCTURAL):
                return _following(graph, node.name)
    return None


def _code_bits(graph: g.Graph, name: str) -> int:
    """Bits of the widest codes that an operand is made of."""
    node = graph[name]
    if isinstance(node, g.Threshold | g.Quantize):
        return node.levels.bits
    return max((_code_bits(graph, before) for before in node.inputs), default=32)


def _file_report(path: Path) -> Report:
    need_onnx()
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, format="protobuf")  # whatever the suffix
    except DecodeError as error:
        raise FolderError(f"{path} is no ONNX file; give an exported file or folder") from error
    if not model.graph.node:
        raise FolderError(f"{path} is no ONNX file; give an exported file or folder")
    try:
        layers = _layers(onnx, model)
    except (KeyError, IndexError, ValueError) as error:
        raise FolderError(
            f"{path} was not written by export_onnx or export_qonnx; export the network with one of them"
        ) from error
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    kind = "QONNX" if any("qonnx" in domain for domain in opsets) else "ONNX"
    version = f"{kind}, opset {opsets.get('', '?')}"
    return Report(str(path), version, path.stat().st_size, tuple(layers))


def _layers(onnx: Any, model: Any) -> list[LayerReport]:
    """The products of a graph, in order.

    Raises:
        KeyError, IndexError, ValueError: it is not of the form that the exports write.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}
    infos = [*model.graph.input, *model.graph.value_info, *model.graph.output]
    shapes = {
        info.name: tuple(d.dim_value for d in info.type.tensor_type.shape.dim[1:]) for info in infos
    }
    types = {info.name: info.type.tensor_type.elem_type for info in infos}
    layers = []
    for node in model.graph.node:
        if node.op_type in _PRODUCTS:
            weight, bits = _weight(onnx, makers, constants, node.input[1])
            shape = shapes[node.output[0]]
            places = shapes[node.input[0]] if node.op_type == "ConvTranspose" else shape
            out, after = _output(onnx, model.graph.node, constants, types, node.output[0])
            layers.append(
                LayerReport(
                    node.output[0].removesuffix(".product"),
                    shape,
                    bits,
                    out,
                    weight.size,
                    int((weight == 0).sum()),
                    math.prod(places[1:]) * weight.size,
                    -(-weight.size * bits // 8),
                    _packed(shapes.get(after, shape), out),
                    _packed(
                        shapes[node.input[0]],
                        _input_bits(onnx, makers, constants, types, node.input[0]),
                    ),
                )
            )
    return layers


def _weight(onnx: Any, makers: Any, constants: Any, name: str) -> tuple[NDArray[Any], int]:
    """A weight's values, and the bits of one in its format."""
    maker = makers.get(name)
    if maker is None:
        return onnx.numpy_helper.to_array(constants[name]), 32
    stored = constants[maker.input[0]]
    values = np.asarray(onnx.numpy_helper.to_array(stored)).astype(np.int64)
    return values, _quantizer_bits(onnx, maker, constants, stored.data_type)


def _output(onnx: Any, nodes: Any, constants: Any, types: Any, name: str) -> tuple[int, str]:
    """Bits and output of the first quantizer that a tensor meets; 32 bits if a product comes first."""
    for node in nodes:
        if name not in node.input or node.op_type in _PRODUCTS:
            continue
        output = node.output[0]
        if node.op_type in _QUANTIZERS:
            return _quantizer_bits(onnx, node, constants, types.get(output, 0)), output
        found = _output(onnx, nodes, constants, types, output)
        if found[0] != 32:
            return found
    return 32, name


def _input_bits(onnx: Any, makers: Any, constants: Any, types: Any, name: str) -> int:
    """Bits of the widest quantizers that a tensor comes from, 32 if a product or the input is closer."""
    maker = makers.get(name)
    if maker is None or maker.op_type in _PRODUCTS:
        return 32
    if maker.op_type in _QUANTIZERS:
        return _quantizer_bits(onnx, maker, constants, types.get(name, 0))
    before = [other for other in maker.input if other and other not in constants]
    return max(_input_bits(onnx, makers, constants, types, other) for other in before)


def _quantizer_bits(onnx: Any, node: Any, constants: Any, stored: int) -> int:
    if node.op_type == "BipolarQuant":
        return 1
    if node.op_type == "Quant":
        return int(onnx.numpy_helper.to_array(constants[node.input[3]]))
    return int(onnx.TensorProto.DataType.Name(stored).split("INT")[1])


def _packed(shape: tuple[int, ...], bits: int) -> int:
    return -(-math.prod(shape) * bits // 8)
