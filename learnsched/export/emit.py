"""From integer layers to the nodes of an ONNX graph, for every dialect of it.

Every tensor is float32 and holds integers, as far as the network does: sums of integers below 2^24 are
exact in float32 in any order, so that every runtime gets the same ones. A tensor that stands for a
layer's output has the layer's name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from learnsched.export import graph as g
from learnsched.export.thresholds import affine

if TYPE_CHECKING:
    import onnx


class Dialect(Protocol):
    """How a format writes quantized tensors."""

    domains: dict[str, int]
    batch: int | str

    def weight(
        self, emitter: Emitter, name: str, weight: g.Integers, levels: g.IntegerLevels
    ) -> str:
        """A constant of integers, as float32."""
        ...

    def codes(
        self, emitter: Emitter, name: str, x: str, shape: tuple[int, ...], levels: g.IntegerLevels
    ) -> None:
        """The tensor ``name``: ``x`` rounded to the nearest integer and clipped to the levels."""
        ...

    def bipolar(
        self, emitter: Emitter, name: str, x: str, shape: tuple[int, ...], levels: g.IntegerLevels
    ) -> None:
        """The tensor ``name``: the upper of two levels where ``x`` is at least 0."""
        ...


class Emitter:
    """Collects nodes, constants and shapes of an ONNX graph.

    Args:
        dialect: how quantized tensors are written.
    """

    def __init__(self, dialect: Dialect) -> None:
        import onnx

        self.onnx = onnx
        self.dialect = dialect
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.infos: dict[str, onnx.ValueInfoProto] = {}
        self.kinds: dict[str, str] = {}

    def model(self, graph: g.Graph) -> onnx.ModelProto:
        """The whole graph, checked by ONNX's own checker where it knows the domains."""
        helper = self.onnx.helper
        first, last = graph.nodes[0], graph.output
        batch, real = self.dialect.batch, self.onnx.TensorProto.FLOAT
        self.infos[first.name] = helper.make_tensor_value_info(
            first.name, real, [batch, *first.shape]
        )
        for node in graph.nodes[1:]:
            self._emit(node)
        if last.name != g.OUTPUT:
            self.op("Identity", [last.name], g.OUTPUT, last.shape)
        result = helper.make_graph(
            self.nodes,
            "learnsched",
            [self.infos.pop(first.name)],
            [self.infos.pop(g.OUTPUT)],
            list(self.constants.values()),
            value_info=list(self.infos.values()),
        )
        opsets = [
            helper.make_opsetid(name, version) for name, version in self.dialect.domains.items()
        ]
        ir_version = 13 if self.dialect.domains[""] >= 25 else 10
        model = helper.make_model(
            result, opset_imports=opsets, ir_version=ir_version, producer_name="learnsched"
        )
        self.onnx.checker.check_model(model, full_check=True)
        return model

    def constant(self, name: str, values: NDArray[Any] | float, kind: int | None = None) -> str:
        """A constant; float32 unless ``kind`` is another of ONNX's types."""
        if name not in self.constants:
            array = np.asarray(values)
            if kind is None:
                array = np.array(array, np.float32, order="C")
                tensor = self.onnx.numpy_helper.from_array(array, name)
            else:
                tensor = self.onnx.helper.make_tensor(
                    name, kind, array.shape, array.ravel().tolist()
                )
            self.constants[name] = tensor
        return name

    def shared(self, name: str, values: NDArray[Any] | float, kind: int | None = None) -> str:
        """A :meth:`constant` of no layer, under a name that no layer has."""
        return self.constant(f"shared:{name}", values, kind)

    def op(
        self,
        kind: str,
        inputs: list[str],
        name: str,
        shape: tuple[int, ...],
        *,
        dtype: int | None = None,
        domain: str = "",
        batched: bool = True,
        **attributes: Any,
    ) -> str:
        """Append a node.

        Args:
            kind: the operator.
            inputs: names of tensors.
            name: of the output.
            shape: of the output, after the batch dimension unless it is not ``batched``.
            dtype: of the output, one of ONNX's types; float32 if None.
            domain: of the operator.
            batched: whether the output has a batch dimension; constants have none.
            attributes: of the operator.

        Returns:
            ``name``.
        """
        node = self.onnx.helper.make_node(
            kind, inputs, [name], name=f"{name}:{kind}", domain=domain, **attributes
        )
        self.nodes.append(node)
        self.kinds[name] = kind
        dims = [self.dialect.batch, *shape] if batched else list(shape)
        dtype = dtype or self.onnx.TensorProto.FLOAT
        self.infos[name] = self.onnx.helper.make_tensor_value_info(name, dtype, dims)
        return name

    def _channels(self, name: str, values: NDArray[Any], shape: tuple[int, ...]) -> str:
        """A constant of one number, or one a channel of tensors of ``shape``."""
        values = np.asarray(values)
        return self.constant(
            name, values.reshape(-1, *[1] * (len(shape) - 1)) if values.ndim else values
        )

    def _emit(self, node: g.Node) -> None:
        {
            g.Reshape: self._reshape,
            g.Quantize: self._quantize,
            g.Product: self._product,
            g.Threshold: self._threshold,
            g.MaxPool: self._max_pool,
            g.SumPool: self._sum_pool,
            g.Concat: self._concat,
            g.Pad: self._pad,
            g.Repeat: self._repeat,
            g.Decode: self._decode,
            g.RealProduct: self._real_product,
            g.RealAffine: self._real_affine,
            g.RealActivation: self._real_activation,
            g.RealAdd: self._real_add,
        }[type(node)](node)  # type: ignore[operator]

    def _reshape(self, node: g.Reshape) -> None:
        target = self.constant(
            f"{node.name}.shape", np.array([-1, *node.shape]), self.onnx.TensorProto.INT64
        )
        self.op("Reshape", [self._shielded(node), target], node.name, node.shape)

    def _quantize(self, node: g.Quantize) -> None:
        name, shape, integers = node.name, node.shape, node.levels.integers
        scale = self.constant(f"{name}.scale", node.scale)
        x = self.op("Div", [node.inputs[0], scale], f"{name}.scaled", shape)
        halves = tuple(i + 0.5 for i in integers[:-1])
        if node.levels.contiguous and node.thresholds == halves:
            # Round takes halves to the even neighbour, PyTorch's staircase to the upper one. The
            # difference to the rounded number is exact, and one half where they disagree.
            near = self.op("Round", [x], f"{name}.near", shape)
            rest = self.op("Sub", [x, near], f"{name}.rest", shape)
            reached = self._reached(name, rest, self.shared("half", 0.5), shape)
            total = self.op("Add", [near, reached], f"{name}.rounded", shape)
            self.dialect.codes(self, name, total, shape, node.levels)
        else:
            edges = self.constant(f"{name}.thresholds", np.array(node.thresholds))
            self._stairs(name, x, edges, shape, node.levels)

    def _product(self, node: g.Product) -> None:
        weight = self._weight(node.name, node.weight, node.levels, node.window)
        self._multiply(node, weight, node.name)

    def _threshold(self, node: g.Threshold) -> None:
        levels, shape, name = node.levels, node.shape, node.name
        two = len(levels.integers) == 2 and not levels.contiguous
        found = affine(node) if two or levels.contiguous else None
        if found is None:
            self._compare(node)
            return
        factors, offset = found
        total = ""
        for index, source in enumerate(node.inputs):
            factor = self._channels(f"{name}.factor{index}", factors[index], shape)
            part = self.op("Mul", [source, factor], f"{name}.scaled{index}", shape)
            total = part if not total else self.op("Add", [total, part], f"{name}.sum", shape)
        start = offset - np.float32(0.5) if two else offset + np.float32(levels.integers[0])
        shift = self._channels(f"{name}.offset", start, shape)
        total = self.op("Add", [total, shift], f"{name}.shifted", shape)
        write = self.dialect.bipolar if two else self.dialect.codes
        write(self, name, total, shape, levels)

    def _compare(self, node: g.Threshold) -> None:
        """Counts the thresholds that are reached, for codes that no line gives."""
        name, shape = node.name, node.shape
        sign = self._channels(f"{name}.sign", node.sign, shape)
        x = self.op("Mul", [node.inputs[0], sign], f"{name}.signed", shape)
        rows, steps = node.thresholds.shape[1:]
        if len(node.inputs) == 1:
            table = node.thresholds.reshape(-1, *[1] * (len(shape) - 1), steps)
            edges = self.constant(f"{name}.thresholds", table)
        else:
            first = np.arange(shape[0]) * rows - node.row_low
            start = self._channels(f"{name}.rows", first, shape)
            row = self.op("Add", [node.inputs[1], start], f"{name}.row", shape)
            whole = self.onnx.TensorProto.INT64
            index = self.op("Cast", [row], f"{name}.index", shape, dtype=whole, to=whole)
            rowwise = self.constant(f"{name}.thresholds", node.thresholds.reshape(-1, steps))
            edges = self.op("Gather", [rowwise, index], f"{name}.edges", (*shape, steps), axis=0)
        self._stairs(name, x, edges, shape, node.levels)

    def _stairs(
        self, name: str, x: str, edges: str, shape: tuple[int, ...], levels: g.IntegerLevels
    ) -> None:
        """The level of ``x`` by thresholds that stand along a last dimension of their own."""
        gaps = np.diff(levels.integers)
        last = self.shared("last", np.array([-1]), self.onnx.TensorProto.INT64)
        apart = self.op("Unsqueeze", [x, last], f"{name}.apart", (*shape, 1))
        reached = self._reached(name, apart, edges, (*shape, len(gaps)))
        if (gaps != 1).any():
            heights = self.constant(f"{name}.gaps", gaps)
            reached = self.op("Mul", [reached, heights], f"{name}.rises", (*shape, len(gaps)))
        risen = self.op("ReduceSum", [reached, last], f"{name}.risen", shape, keepdims=0)
        lowest = self.constant(f"{name}.lowest", float(levels.integers[0]))
        level = self.op("Add", [risen, lowest], f"{name}.level", shape)
        self.dialect.codes(self, name, level, shape, levels)

    def _reached(self, name: str, x: str, threshold: str, shape: tuple[int, ...]) -> str:
        """1 where ``x`` is at least the threshold, 0 elsewhere."""
        truth, real = self.onnx.TensorProto.BOOL, self.onnx.TensorProto.FLOAT
        inputs = [x, threshold]
        reached = self.op("GreaterOrEqual", inputs, f"{name}.reached", shape, dtype=truth)
        return self.op("Cast", [reached], f"{name}.steps", shape, to=real)

    def _max_pool(self, node: g.MaxPool) -> None:
        attributes = _window(node.window, node.kernel)
        self.op("MaxPool", [self._shielded(node)], node.name, node.shape, **attributes)

    def _sum_pool(self, node: g.SumPool) -> None:
        attributes = _window(node.window, node.kernel)
        attributes.pop("dilations")
        attributes["count_include_pad"] = 1
        mean = node.name if node.mean else f"{node.name}.mean"
        self.op("AveragePool", [node.inputs[0]], mean, node.shape, **attributes)
        if not node.mean:
            # A mean rounds, but by far less than a half once it is a sum again.
            n = self.constant(f"{node.name}.count", float(np.prod(node.kernel)))
            total = self.op("Mul", [mean, n], f"{node.name}.total", node.shape)
            self.op("Round", [total], node.name, node.shape)

    def _concat(self, node: g.Concat) -> None:
        parts = [self._shielded(node, source) for source in node.inputs]
        self.op("Concat", parts, node.name, node.shape, axis=1)

    def _pad(self, node: g.Pad) -> None:
        pads = np.array([0, 0, *node.before, 0, 0, *node.after])
        pads_name = self.constant(f"{node.name}.pads", pads, self.onnx.TensorProto.INT64)
        inputs = [self._shielded(node), pads_name, self.shared("zero", 0.0)]
        self.op("Pad", inputs, node.name, node.shape)

    def _repeat(self, node: g.Repeat) -> None:
        scales = self.constant(f"{node.name}.scales", np.array([1.0, 1.0, *node.times]))
        self.op(
            "Resize", [self._shielded(node), "", scales], node.name, node.shape, mode="nearest",
            coordinate_transformation_mode="asymmetric", nearest_mode="floor",
        )  # fmt: skip

    def _decode(self, node: g.Decode) -> None:
        self._scaled(node.name, node.inputs[0], node.shape, node.scale, node.bias)

    def _real_product(self, node: g.RealProduct) -> None:
        if node.levels is None:
            weight = self.constant(f"{node.name}.weight", _layout(node.weight, node.window))
        else:
            weight = self._weight(node.name, node.weight.astype(np.int64), node.levels, node.window)
        last = node.scale is None and node.bias is None
        product = node.name if last else f"{node.name}.product"
        self._multiply(node, weight, product)
        if not last:
            self._scaled(node.name, product, node.shape, node.scale, node.bias)

    def _real_affine(self, node: g.RealAffine) -> None:
        self._scaled(node.name, node.inputs[0], node.shape, node.scale, node.bias)

    def _real_activation(self, node: g.RealActivation) -> None:
        inputs = list(node.inputs)
        if node.slope is not None:
            inputs.append(self._channels(f"{node.name}.slope", node.slope, node.shape))
        attributes: dict[str, Any] = {} if node.alpha is None else {"alpha": float(node.alpha)}
        self.op(node.operator, inputs, node.name, node.shape, **attributes)

    def _real_add(self, node: g.RealAdd) -> None:
        self.op("Add", list(node.inputs), node.name, node.shape)

    def _shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without the batch dimension."""
        return tuple(d.dim_value for d in self.infos[name].type.tensor_type.shape.dim[1:])

    def _shielded(self, node: g.Node, source: str | None = None) -> str:
        """The node's input, behind an operation that changes nothing.

        ONNX Runtime moves a DequantizeLinear across a Reshape or MaxPool and forgets its type there:
        negative codes become 0, or loading fails (microsoft/onnxruntime issue 27845).
        """
        source = source or node.inputs[0]
        if self.kinds.get(source) != "DequantizeLinear":
            return source
        shield = f"{source}.shielded"
        if shield not in self.kinds:
            self.op("Round", [source], shield, self._shape(source))
        return shield

    def _weight(
        self, name: str, weight: g.Integers, levels: g.IntegerLevels, window: g.Window | None
    ) -> str:
        return self.dialect.weight(self, name, _layout(weight, window), levels)

    def _multiply(self, node: g.Product | g.RealProduct, weight: str, name: str) -> None:
        inputs = [node.inputs[0], weight]
        if node.window is None:
            self.op("MatMul", inputs, name, node.shape)
        else:
            attributes = _window(node.window, node.weight.shape[2:])
            attributes["group"] = node.window.groups
            if node.window.transposed:
                attributes["output_padding"] = self._output_padding(node, node.window)
            kind = "ConvTranspose" if node.window.transposed else "Conv"
            self.op(kind, inputs, name, node.shape, **attributes)

    def _output_padding(self, node: g.Product | g.RealProduct, window: g.Window) -> tuple[int, ...]:
        """What a transposed convolution puts out beyond its last window."""
        places = self._shape(node.inputs[0])[1:]
        sizes = zip(
            places, node.shape[1:], node.weight.shape[2:],
            window.stride, window.padding, window.dilation, strict=True,
        )  # fmt: skip
        return tuple(out - ((n - 1) * s - 2 * p + d * (k - 1) + 1) for n, out, k, s, p, d in sizes)

    def _scaled(
        self,
        name: str,
        x: str,
        shape: tuple[int, ...],
        scale: NDArray[Any] | None,
        bias: NDArray[Any] | None,
    ) -> None:
        if scale is not None:
            factor = self._channels(f"{name}.scale", scale, shape)
            x = self.op("Mul", [x, factor], name if bias is None else f"{name}.scaled", shape)
        if bias is not None:
            self.op("Add", [x, self._channels(f"{name}.bias", bias, shape)], name, shape)


def need_onnx() -> None:
    """Refuse to go on without an optional package.

    Raises:
        ImportError: onnx is not installed.
    """
    import importlib.util

    if importlib.util.find_spec("onnx") is None:
        raise ImportError("onnx is not installed; pip install 'learnsched[export]'")


def _layout(weight: NDArray[Any], window: g.Window | None) -> NDArray[Any]:
    """A weight as ONNX's operators take it."""
    if window is None:
        return weight.T
    return g.swap_channels(weight, window.groups) if window.transposed else weight


def _window(window: g.Window, kernel: tuple[int, ...]) -> dict[str, Any]:
    return {
        "kernel_shape": kernel,
        "strides": window.stride,
        "pads": [*window.padding, *window.padding],
        "dilations": window.dilation,
    }
