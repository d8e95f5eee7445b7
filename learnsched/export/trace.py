"""From a finalized PyTorch model to the integer layers of :mod:`learnsched.export.graph`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from learnsched.convert import quantized_layers
from learnsched.export import graph as g
from learnsched.export.errors import ExportError
from learnsched.export.operations import (
    RISING,
    Operation,
    convolution_window,
    count,
    pool_window,
    shape_of,
    symbolic_trace,
)
from learnsched.export.thresholds import search
from learnsched.finalize import IntegerWeights, integer_weights
from learnsched.levels import LevelSet
from learnsched.modules import ActivationQuantizer, PReLUQuantizer

# float32 holds every integer up to here, so that a float convolution of integers is exact.
EXACT = 2**24
# Values of a second operand of an addition that get thresholds of their own.
_ROWS = 4096

Doubles = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _Integer:
    """An integer tensor: ``integer * scale + bias``, numbers or one a channel."""

    node: str
    scale: Doubles
    bias: Doubles | None
    low: g.Integers
    high: g.Integers

    def decode(self, integers: g.Integers) -> Doubles:
        value = integers * self.scale
        return value if self.bias is None else value + self.bias


@dataclass(frozen=True)
class _Real:
    node: str


class _Pending:
    """A pointwise operation: part of what a quantizer after it decides, or else a real operation."""


_Value = _Integer | _Real | _Pending


def trace(model: nn.Module, example_input: Tensor) -> g.Graph:
    """The integer layers of a finalized model.

    Args:
        model: converted by ``quantize_`` and finished by ``finalize_``; it is left as it is.
        example_input: a batch of inputs; shapes are taken from it.

    Raises:
        ExportError: the model is not finalized, not float32 and finite, or holds an operation that has
            no counterpart; the message names the layer and the way out.
        ValueError: the model has no quantized layers.

    Example:
        >>> from learnsched import finalize_, quantize_, ternary
        >>> net = finalize_(quantize_(nn.Sequential(nn.Linear(8, 4)), ternary()))
        >>> [type(node).__name__ for node in trace(net, torch.zeros(1, 8))]
        ['Input', 'RealProduct']
    """
    return translate(model, example_input).graph


def translate(model: nn.Module, example_input: Tensor) -> Translation:
    """As :func:`trace`, with what led to the graph.

    Raises:
        ExportError: as :func:`trace` does.
        ValueError: the model has no quantized layers.
    """
    _check_finalized(model)
    model = copy.deepcopy(model).cpu().eval()
    _check_numbers(model, example_input)
    with torch.no_grad():
        traced = symbolic_trace(model)
        ShapeProp(traced).propagate(example_input.detach().cpu())
        return Translation(model, traced)


def _check_finalized(model: nn.Module) -> None:
    try:
        integer_weights(model)
    except RuntimeError as error:
        raise ExportError(str(error)) from error
    for name, module in model.named_modules():
        noisy = isinstance(module, ActivationQuantizer) and bool(
            (module.forward_std != 0) | (module.forward_mean != 0)
        )
        if noisy:
            raise ExportError(f"{name} has noise; call learnsched.finalize_(model) first")


def _check_numbers(model: nn.Module, example_input: Tensor) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ExportError(f"{name} is {tensor.dtype}; call model.float() first")
        if not bool(tensor.isfinite().all()):
            raise ExportError(f"{name} is not finite: training has diverged, or it was overwritten")
    if not isinstance(example_input, Tensor) or example_input.dim() < 2 or not len(example_input):
        raise ExportError(
            "example_input must be one tensor, a batch of at least one input, "
            f"got {getattr(example_input, 'shape', type(example_input).__name__)}"
        )
    if example_input.dtype != torch.float32:
        raise ExportError(f"example_input must be float32, got {example_input.dtype}")


class Translation:
    """A translation: its nodes, and the value of every call.

    Attributes:
        graph: the result.
        decided: the call of a quantizer, by the name of its threshold node.
        operations: what every call is.
    """

    def __init__(self, model: nn.Module, traced: fx.GraphModule) -> None:
        self.traced = traced
        self.modules = dict(model.named_modules())
        weights = integer_weights(model)
        self.weights: dict[nn.Module, IntegerWeights] = {
            layer.weight: weights[layer.info.name]
            for layer in quantized_layers(model)
            if layer.weight is not None
        }
        self.nodes: list[g.Node] = []
        self.names: dict[str, str] = {}
        self.values: dict[fx.Node, _Value] = {}
        self.operations: dict[fx.Node, Operation] = {}
        self.realised: dict[fx.Node, str] = {}
        self.decided: dict[str, fx.Node] = {}
        self.graph = self._translate()

    def _translate(self) -> g.Graph:
        inputs = [node for node in self.traced.graph.nodes if node.op == "placeholder"]
        if len(inputs) != 1:
            raise ExportError(
                f"the model takes {len(inputs)} inputs; export needs exactly one tensor"
            )
        for node in self.traced.graph.nodes:
            operation = Operation(node, self.modules)
            self.operations[node] = operation
            if operation.kind != "ignored":
                value = getattr(self, f"_{operation.kind}")(operation)
                if value is not None:
                    self.values[node] = value
        return g.Graph(tuple(self.nodes), dict(self.names))

    # Each kind of operation, from the values of its inputs to its own.

    def _input(self, operation: Operation) -> _Value:
        return _Real(self._add(g.Input, "input", (), shape_of(operation.node)))

    def _output(self, operation: Operation) -> None:
        result = operation.node.args[0]
        if not isinstance(result, fx.Node):
            raise ExportError("the model must put out one tensor; wrap it in a module that does")
        value = self._value(result)
        folded = self._folded(result) if isinstance(value, _Pending) else None
        if isinstance(value, _Integer):
            self._decoded(value, shape_of(result), "output")
        elif folded is not None:
            source, scale, bias = folded
            combined = _Integer(source.node, scale, bias, source.low, source.high)
            self._decoded(combined, shape_of(result), "output")
        else:
            self._real(result)

    def _passing(self, operation: Operation) -> _Value:
        return self._value(operation.node.all_input_nodes[0])

    def _batch_norm(self, operation: Operation) -> _Value:
        module: Any = operation.module
        if module.running_var is None:
            raise ExportError(
                f"{operation.name} keeps no running statistics, so that one input's result depends on "
                "the others; use track_running_stats=True"
            )
        return _Pending()

    def _addition(self, operation: Operation) -> _Value:
        shapes = {shape_of(node) for node in operation.node.all_input_nodes}
        if len(shapes) > 1:
            raise ExportError(f"{operation.name} adds tensors of different shapes {sorted(shapes)}")
        return _Pending()

    def _activation(self, operation: Operation) -> _Value:
        return _Pending()

    def _reshape(self, operation: Operation) -> _Value:
        source, shape = operation.node.all_input_nodes[0], shape_of(operation.node)
        value = self._value(source)
        before = shape_of(source)
        if np.prod(shape) != np.prod(before):
            raise ExportError(
                f"{operation.name} changes the batch dimension, which export leaves alone"
            )
        if shape == before:
            return value
        if isinstance(value, _Integer):
            per_channel = value.scale.ndim or value.bias is not None
            if not per_channel or (before[0] == shape[0] == np.prod(shape)):
                node = self._add(g.Reshape, operation.name, (value.node,), shape)
                low, high = value.low, value.high
                if low.ndim and low.shape[0] != shape[0]:
                    low, high = low.min(), high.max()
                return _Integer(node, value.scale, value.bias, low, high)
        real = self._real(source)
        return _Real(self._add(g.Reshape, operation.name, (real,), shape))

    def _product(self, operation: Operation) -> _Value:
        module: Any = operation.module
        source, name = operation.node.all_input_nodes[0], operation.name
        value, shape = self._value(source), shape_of(operation.node)
        if isinstance(module, nn.Linear) and len(shape) != 1:
            raise ExportError(
                f"{name} is applied to more than (batch, features); flatten its input"
            )
        if len(shape) != (1 if isinstance(module, nn.Linear) else len(module.kernel_size) + 1):
            raise ExportError(f"{name} needs a batch dimension in example_input")
        window = convolution_window(name, module)
        bias = None if module.bias is None else module.bias.double().numpy()
        weights = self.weights.get(module)
        levels = None if weights is None else integer_levels(weights.values, module)
        plain = isinstance(value, _Integer) and not value.scale.ndim and value.bias is None
        if weights is None or levels is None or not plain or not isinstance(value, _Integer):
            return self._real_product(operation, weights, levels, window, plain)
        integers = np.array(levels.integers)[weights.codes.numpy()]
        scale = _per_channel(weights, levels) * value.scale
        low, high = _reach(name, integers, value, window)
        arguments = {
            "weight": integers,
            "levels": levels,
            "window": window,
            "low": low,
            "high": high,
        }
        node = self._add(g.Product, name, (value.node,), shape, **arguments)
        return _Integer(node, scale, bias, low, high)

    def _max_pool(self, operation: Operation) -> _Value:
        source, shape = operation.node.all_input_nodes[0], shape_of(operation.node)
        kernel, window = pool_window(operation.name, _module(operation), shape_of(source))
        value = self._value(source)
        arguments = {"kernel": kernel, "window": window}
        if isinstance(value, _Integer):
            node = self._add(g.MaxPool, operation.name, (value.node,), shape, **arguments)
            return _Integer(node, value.scale, value.bias, value.low, value.high)
        return _Real(
            self._add(g.MaxPool, operation.name, (self._real(source),), shape, **arguments)
        )

    def _mean_pool(self, operation: Operation) -> _Value:
        source, shape = operation.node.all_input_nodes[0], shape_of(operation.node)
        before = shape_of(source)
        kernel, window = pool_window(operation.name, _module(operation), before)
        value = self._value(source)
        # A mean that drops the spatial dimensions is a pool and a reshape.
        full = (before[0], *(n // s for n, s in zip(before[1:], window.stride, strict=True)))
        pooled = full if len(shape) != len(before) else shape
        arguments = {"kernel": kernel, "window": window}
        if isinstance(value, _Integer):
            node = self._add(g.SumPool, operation.name, (value.node,), pooled, **arguments)
            if pooled != shape:
                node = self._add(g.Reshape, f"{operation.name}.squeeze", (node,), shape)
            n = count(kernel)
            low, high = value.low * n, value.high * n
            if any(window.padding):
                low, high = np.minimum(low, 0), np.maximum(high, 0)
            if any(window.padding) and value.bias is not None:
                raise ExportError(
                    f"{operation.name} pads what has a bias; pool after the activation"
                )
            return _Integer(node, value.scale / n, value.bias, low, high)
        arguments["mean"] = True
        node = self._add(g.SumPool, operation.name, (self._real(source),), pooled, **arguments)
        if pooled != shape:
            node = self._add(g.Reshape, f"{operation.name}.squeeze", (node,), shape)
        return _Real(node)

    def _quantizer(self, operation: Operation) -> _Value:
        module: Any = operation.module
        name, node = operation.name, operation.node
        levels = integer_levels(module.levels.values, module)
        if levels is None:
            raise ExportError(
                f"{name}: the levels {module.levels.values} are not whole multiples of one step; use "
                "unsigned(bits), signed(bits), ternary(), binary() or power_of_two(bits)"
            )
        scale = np.asarray(module.scale.double().item() * levels.unit)
        sources = self._sources(node)
        chosen = self._thresholds(operation, levels, sources)
        if chosen is None:
            real = self._real(node.all_input_nodes[0])
            before = _before(module)
            if before is not None:
                real = self._real_activation(f"{name}.before", before, real, shape_of(node))
            arguments: dict[str, Any] = {
                "levels": levels,
                "thresholds": module.levels.thresholds,
                "scale": module.scale.item(),
            }
            chosen = self._add(g.Quantize, name, (real,), shape_of(node), **arguments)
        if node.op == "call_module":
            self.names.setdefault(name, chosen)
        low, high = (np.asarray(levels.integers[i], dtype=np.int64) for i in (0, -1))
        return _Integer(chosen, scale, None, low, high)

    # Thresholds.

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """The calls behind the pointwise operations that lead to ``node``."""
        found: list[fx.Node] = []
        for argument in node.all_input_nodes:
            inner = isinstance(self._value(argument), _Pending)
            for source in self._sources(argument) if inner else [argument]:
                if source not in found:
                    found.append(source)
        # A dropout or identity is another name of the same value.
        unique = {id(self._value(source)): source for source in reversed(found)}
        return list(reversed(unique.values()))

    def _thresholds(
        self, operation: Operation, levels: g.IntegerLevels, sources: list[fx.Node]
    ) -> str | None:
        """The node that decides in integers, or None if that cannot be."""
        values = [self._value(source) for source in sources]
        integers = [value for value in values if isinstance(value, _Integer)]
        shapes = {shape_of(source) for source in sources}
        shape = shape_of(operation.node)
        if len(integers) < len(values) or len(integers) > 2 or shapes != {shape}:
            return None
        self._check_rising(operation)
        pairs = sorted(
            zip(sources, integers, strict=True), key=lambda p: -int((p[1].high - p[1].low).max())
        )
        (main_node, main), others = pairs[0], pairs[1:]
        channels = shape[0]
        low, high = (np.broadcast_to(b, channels).copy() for b in (main.low, main.high))
        row_low = int(others[0][1].low.min()) if others else 0
        rows = int(others[0][1].high.max()) - row_low + 1 if others else 1
        if rows > _ROWS:
            return None
        rank = len(shape)

        def codes(x: g.Integers, row: g.Integers) -> g.Integers:
            """Codes of ``x`` with the second operand in ``row``, shapes ``(many, channels)``."""
            given = {main_node: _tensor(main.decode(x), rank)}
            for other, value in others:
                given[other] = _tensor(value.decode(row + row_low), rank)
            return self._codes(operation, given).reshape(x.shape)

        ends = np.stack([low, high]).repeat(rows, 0)
        row = np.broadcast_to(np.tile(np.arange(rows), 2)[:, None], ends.shape)
        first, last = np.split(codes(ends, row), 2)
        slopes = self._slopes(operation, [node for node, _ in pairs], channels)
        falling = (last < first).any(0) if slopes is None else slopes[0] < 0
        sign = np.where(falling, -1, 1)
        low, high = np.where(falling, -high, low), np.where(falling, -low, high)
        steps = len(levels.integers) - 1

        def code(u: g.Integers) -> g.Integers:
            flat = (u * sign[:, None, None]).transpose(1, 2, 0).reshape(-1, channels)
            row = np.broadcast_to(np.arange(rows).repeat(steps)[:, None], flat.shape)
            return codes(flat, row).reshape(rows, steps, channels).transpose(2, 0, 1)

        arguments: dict[str, Any] = {
            "sign": sign,
            "thresholds": search(code, low, high, rows, steps),
            "low": low,
            "high": high,
            "row_low": row_low,
            "levels": levels,
            "slopes": slopes,
        }
        names = tuple(value.node for _, value in pairs)
        name = self._add(g.Threshold, operation.name, names, shape, **arguments)
        self.decided[name] = operation.node
        return name

    def _codes(self, operation: Operation, given: dict[fx.Node, Tensor]) -> g.Integers:
        """The codes that PyTorch's own modules give."""
        quantizer: Any = operation.module
        x = self._evaluate(operation.node.all_input_nodes[0], given)
        levels: LevelSet = quantizer.levels
        return levels.codes(quantizer.ahead(x) / quantizer.scale).numpy()

    def _evaluate(self, node: fx.Node, given: dict[fx.Node, Tensor]) -> Tensor:
        if node in given:
            return given[node]
        for other, tensor in given.items():
            if self.values[other] is self.values[node]:
                return tensor
        arguments = [self._evaluate(a, given) for a in node.args if isinstance(a, fx.Node)]
        if node.op == "call_module":
            result: Tensor = self.modules[str(node.target)](*arguments)
        elif node.op == "call_method":
            result = getattr(arguments[0], str(node.target))(*arguments[1:])
        else:
            function: Callable[..., Tensor] = node.target  # type: ignore[assignment]
            result = function(*arguments)
        return result

    def _check_rising(self, operation: Operation) -> None:
        """Refuse activations ahead of the staircase that fall somewhere."""
        module: Any = operation.module
        before = _before(module)
        pending = [operation.node.all_input_nodes[0]]
        activations = [] if before is None else [(operation.name, before)]
        while pending:
            node = pending.pop()
            if isinstance(self._value(node), _Pending):
                pending += node.all_input_nodes
                inner = self.operations[node]
                if inner.kind == "activation":
                    activations.append((inner.name, _module(inner)))
        for name, activation in activations:
            if not isinstance(activation, RISING) or _least_slope(activation) < 0:
                raise ExportError(
                    f"{name}: {type(activation).__name__} does not rise everywhere, so that its codes "
                    "have no thresholds; use ReLU, or LeakyReLU with a slope of at least 0"
                )

    def _slopes(
        self, operation: Operation, sources: list[fx.Node], channels: int
    ) -> Doubles | None:
        """Derivatives of what is quantized, in level steps, by each source's integer."""
        module: Any = operation.module
        found = self._affine(operation.node.all_input_nodes[0], channels)
        if found is None or _before(module) is not None or isinstance(module, PReLUQuantizer):
            return None
        by_value, _ = found
        step = module.scale.double().item() * module.levels.step
        values = [self._value(source) for source in sources]
        rows = [by_value[id(v)] * v.scale / step for v in values if isinstance(v, _Integer)]
        return np.stack([np.broadcast_to(row, channels) for row in rows])

    def offset(self, node: fx.Node) -> Doubles | None:
        """What a quantizer is given where all accumulators are 0; None if that says nothing."""
        channels = shape_of(node)[0]
        source = node.all_input_nodes[0]
        found = self._affine(source, channels)
        if found is None:
            return None
        factors, offset = found
        for value in (self._value(s) for s in self._sources(node)):
            if isinstance(value, _Integer) and value.bias is not None:
                offset = offset + factors[id(value)] * value.bias
        return offset

    def _affine(self, node: fx.Node, channels: int) -> tuple[dict[int, Doubles], Doubles] | None:
        """Factors of the real values behind ``node``, by identity, and the offset, in float64."""
        value = self._value(node)
        if not isinstance(value, _Pending):
            return {id(value): np.ones(channels)}, np.zeros(channels)
        operation = self.operations[node]
        parts = [self._affine(a, channels) for a in node.args if isinstance(a, fx.Node)]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts) or operation.kind not in ("addition", "batch_norm"):
            return None
        factors: dict[int, Doubles] = {}
        offset = np.zeros(channels)
        for part, constant in known:
            for key, factor in part.items():
                factors[key] = factors.get(key, 0.0) + factor
            offset = offset + constant
        if operation.kind == "batch_norm":
            scale, shift = _batch_norm_affine(_module(operation))
            factors = {key: factor * scale for key, factor in factors.items()}
            offset = offset * scale + shift
        return factors, offset

    # Real operations.

    def _folded(self, node: fx.Node) -> tuple[_Integer, Doubles, Doubles] | None:
        """Scale and bias of an output that is a batch norm of one integer tensor."""
        sources = [self._value(source) for source in self._sources(node)]
        if len(sources) != 1 or not isinstance(sources[0], _Integer):
            return None
        source = sources[0]
        found = self._affine(node, shape_of(node)[0])
        if found is None:
            return None
        factor, offset = found[0][id(source)], found[1]
        bias = 0.0 if source.bias is None else source.bias
        return source, factor * source.scale, factor * bias + offset

    def _real(self, node: fx.Node) -> str:
        """The name of a node that holds the value of ``node`` as real numbers."""
        value, shape = self._value(node), shape_of(node)
        if isinstance(value, _Real):
            return value.node
        if isinstance(value, _Integer):
            known = f"{value.node}.real"
            if any(n.name == known for n in self.nodes):
                return known
            return self._decoded(value, shape, known)
        if node in self.realised:
            return self.realised[node]
        operation = self.operations[node]
        inputs = tuple(self._real(a) for a in node.args if isinstance(a, fx.Node))
        if operation.kind == "addition":
            name = self._add(g.RealAdd, operation.name, inputs, shape)
        elif operation.kind == "batch_norm":
            scale, bias = (a.astype(np.float32) for a in _batch_norm_affine(_module(operation)))
            name = self._add(g.RealAffine, operation.name, inputs, shape, scale=scale, bias=bias)
        else:
            name = self._real_activation(operation.name, _module(operation), inputs[0], shape)
        self.realised[node] = name
        return name

    def _real_activation(
        self, name: str, module: nn.Module, source: str, shape: tuple[int, ...]
    ) -> str:
        known: Any = module
        arguments: dict[str, Any]
        if isinstance(module, nn.LeakyReLU):
            arguments = {"operator": "LeakyRelu", "alpha": known.negative_slope}
        elif isinstance(module, nn.ELU | nn.CELU):
            arguments = {"operator": type(module).__name__.capitalize(), "alpha": known.alpha}
        elif isinstance(module, nn.SELU | nn.ReLU):
            arguments = {"operator": type(module).__name__.capitalize()}
        elif isinstance(module, nn.PReLU):
            slope = module.weight.detach().numpy()
            arguments = {"operator": "PRelu", "slope": slope if len(slope) > 1 else slope[0]}
        else:
            raise ExportError(
                f"{name}: {type(module).__name__} of real numbers cannot be exported; use ReLU, "
                "LeakyReLU, PReLU, ELU, CELU or SELU, or quantize its layer's input and weight"
            )
        return self._add(g.RealActivation, name, (source,), shape, **arguments)

    def _real_product(
        self,
        operation: Operation,
        weights: IntegerWeights | None,
        levels: g.IntegerLevels | None,
        window: g.Window | None,
        plain: bool,
    ) -> _Value:
        module: Any = operation.module
        if weights is None:
            reason = "its weight is real; quantize it, leaving it out of quantize_'s skip= and overrides="
        elif levels is None:
            reason = (
                f"its levels {weights.values} are not whole multiples of one step; use ternary()"
            )
        elif not plain:
            reason = (
                "its input is real; put learnsched.export.QuantizedInput in front of the network if it "
                "is the first layer, or else a quantized activation in front of this layer"
            )
        weight: Any = module.weight.detach().numpy()
        scale = None
        if weights is not None and levels is not None:
            weight = np.array(levels.integers)[weights.codes.numpy()]
            scale = np.asarray(_per_channel(weights, levels), dtype=np.float32)
        name = self._add(
            g.RealProduct,
            operation.name,
            (self._real(operation.node.all_input_nodes[0]),),
            shape_of(operation.node),
            weight=weight,
            levels=levels,
            scale=scale,
            bias=None if module.bias is None else module.bias.detach().numpy(),
            window=window,
            reason=reason,
        )
        return _Real(name)

    def _decoded(self, value: _Integer, shape: tuple[int, ...], name: str) -> str:
        return self._add(
            g.Decode,
            name,
            (value.node,),
            shape,
            scale=value.scale.astype(np.float32),
            bias=None if value.bias is None else value.bias.astype(np.float32),
        )

    def _value(self, node: fx.Node) -> _Value:
        if node not in self.values:
            raise ExportError(f"{node.name} uses a tensor's numbers, which export does not know")
        return self.values[node]

    def _add(
        self,
        kind: type[g.Node],
        name: str,
        inputs: tuple[str, ...],
        shape: tuple[int, ...],
        **arguments: Any,
    ) -> str:
        taken = {node.name for node in self.nodes}
        unique, number = name, 2
        while unique in taken:
            unique, number = f"{name}#{number}", number + 1
        self.nodes.append(kind(name=unique, inputs=inputs, shape=shape, **arguments))
        return unique


def integer_levels(values: tuple[float, ...], module: nn.Module) -> g.IntegerLevels | None:
    """The levels as multiples of their smallest distance, or None if they are not such.

    Example:
        >>> integer_levels((-0.5, 0.0, 0.5), nn.Identity()).integers
        (-1, 0, 1)
    """
    gaps = [b - a for a, b in zip(values, values[1:], strict=False)]
    unit = min(*gaps, *(abs(v) for v in values if v))
    integers = tuple(round(v / unit) for v in values)
    if any(i * unit != v for i, v in zip(integers, values, strict=True)):
        return None
    quantizer: Any = getattr(module, "weight_quantizer", module)
    name = getattr(getattr(quantizer, "levels", None), "name", "custom")
    return g.IntegerLevels(integers, unit, name)


def _per_channel(weights: IntegerWeights, levels: g.IntegerLevels) -> Doubles:
    channels = weights.codes.shape[0]
    scale = weights.scale.double().numpy() * levels.unit
    return (
        scale.reshape(-1)
        if scale.size == channels
        else np.broadcast_to(scale.reshape(()), channels)
    )


def _reach(
    name: str, weight: g.Integers, value: _Integer, window: g.Window | None
) -> tuple[g.Integers, g.Integers]:
    """The least and greatest sums that a weight can make of its inputs."""
    low, high = int(value.low.min()), int(value.high.max())
    if window is not None and any(window.padding):
        low, high = min(low, 0), max(high, 0)
    flat = weight.reshape(len(weight), -1)
    ends = np.stack([flat * low, flat * high])
    largest = int(np.abs(ends).max(0).sum(1).max())
    if largest >= EXACT:
        raise ExportError(
            f"{name}: its sums reach {largest}, beyond the integers that float32 holds (2^24); use "
            "fewer bits for its weight or its input"
        )
    return ends.min(0).sum(1), ends.max(0).sum(1)


def _batch_norm_affine(module: nn.Module) -> tuple[Doubles, Doubles]:
    norm: Any = module
    scale = 1 / np.sqrt(norm.running_var.double().numpy() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double().numpy()
    shift = -norm.running_mean.double().numpy() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double().numpy()
    return scale, shift


def _before(module: Any) -> nn.Module | None:
    """What a quantizer computes ahead of its staircase."""
    if isinstance(module, PReLUQuantizer):
        prelu = nn.PReLU(module.weight.numel())
        prelu.weight = module.weight
        return prelu
    before: nn.Module | None = module.before
    return before


def _least_slope(module: nn.Module) -> float:
    """The least derivative of an activation of the rising kinds."""
    known: Any = module
    if isinstance(module, nn.PReLU):
        return float(known.weight.min())
    if isinstance(module, nn.LeakyReLU):
        return float(known.negative_slope)
    if isinstance(module, nn.RReLU):
        return float(known.lower + known.upper)
    return float(getattr(known, "alpha", 0.0)) if isinstance(module, nn.ELU | nn.CELU) else 0.0


def _module(operation: Operation) -> nn.Module:
    if operation.module is None:
        raise ExportError(f"{operation.name} is not a module")
    return operation.module


def _tensor(values: Doubles, rank: int) -> Tensor:
    """float32, shape ``(many, channels, 1, …)``, as deep as the layer's own tensors."""
    rounded = torch.from_numpy(np.ascontiguousarray(values.astype(np.float32)))
    return rounded.reshape(*values.shape, *[1] * (rank - 1))
