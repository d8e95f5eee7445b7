"""From a finalized PyTorch model to the integer layers of :mod:`learnsched.export.graph`."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from learnsched.export import graph as g
from learnsched.export.calls import Calls, activation_before
from learnsched.export.decide import thresholds
from learnsched.export.errors import ExportError
from learnsched.export.nodes import Nodes
from learnsched.export.operations import (
    Operation,
    convolution_window,
    pool_window,
    shape_of,
    symbolic_trace,
)
from learnsched.export.values import (
    Integer,
    Pending,
    Real,
    Value,
    integer_levels,
    joined,
    weight_integers,
    weight_levels,
)
from learnsched.finalize import IntegerWeights, check_finalized, integer_weights

# float32 holds every integer up to here, so that a float convolution of integers is exact.
EXACT = 2**24
# A mean of float32 is off by few roundings: up to here, its sum is the integer next to it.
_EXACT_MEAN = 2**21


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
    _check_unwrapped(model)
    _check_finalized(model)
    model = copy.deepcopy(model).cpu().eval()
    _check_numbers(model, example_input)
    with torch.no_grad():
        traced = symbolic_trace(model)
        inputs = [call for call in traced.graph.nodes if call.op == "placeholder"]
        if len(inputs) != 1:
            raise ExportError(f"the model takes {len(inputs)} inputs; export needs exactly one")
        x = example_input.detach().cpu()
        try:
            model(x)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise ExportError(
                f"the model does not take example_input of shape {tuple(x.shape)}, whose first "
                f"dimension must be the batch: {error}"
            ) from error
        ShapeProp(traced).propagate(x)
        _drop_identities(traced)
        return Translation(model, traced)


class Translation:
    """A translation, made call by call.

    Attributes:
        graph: the result.
        calls: what is known of every call.
        decided: the call of a quantizer, by the name of its threshold node.
    """

    def __init__(self, model: nn.Module, traced: fx.GraphModule) -> None:
        self.weights: dict[nn.Module, IntegerWeights] = {
            model.get_submodule(name): found for name, found in integer_weights(model).items()
        }
        self.calls = Calls(dict(model.named_modules()))
        self.nodes = Nodes(self.calls)
        self.names: dict[str, str] = {}
        self.decided: dict[str, fx.Node] = {}
        self.graph = g.Graph(())
        for call in traced.graph.nodes:
            self._translate(call)

    def _translate(self, call: fx.Node) -> None:
        operation = Operation(call, self.calls.modules)
        self.calls.operations[call] = operation
        if operation.kind == "output":
            self._output(call)
        elif operation.kind != "ignored":
            value: Value = {
                "input": self._input,
                "batch_norm": self._batch_norm,
                "addition": self._addition,
                "activation": self._activation,
                "reshape": self._reshape,
                "product": self._product,
                "max_pool": self._max_pool,
                "mean_pool": self._mean_pool,
                "concatenation": self._concatenation,
                "padding": self._padding,
                "upsampling": self._upsampling,
                "quantizer": self._quantizer,
            }[operation.kind](operation)
            self.calls.values[call] = value

    def _input(self, operation: Operation) -> Value:
        return Real(self.nodes.add(g.Input, "input", (), shape_of(operation.node)))

    def _output(self, call: fx.Node) -> None:
        result = call.args[0]
        if not isinstance(result, fx.Node):
            raise ExportError("the model must put out one tensor; wrap it in a module that does")
        value = self.calls.value(result)
        if isinstance(value, Pending):
            value = self._folded(result) or value
        if isinstance(value, Integer):
            nodes = self.nodes.finish(value.node, value)
        else:
            nodes = self.nodes.finish(self.nodes.real(result), None)
        kept = {node.name for node in nodes}
        names = {module: node for module, node in self.names.items() if node in kept}
        self.graph = g.Graph(tuple(nodes), names)

    def _folded(self, call: fx.Node) -> Integer | None:
        """Batch norms after the last product, as its scale and bias."""
        found, sources = self.calls.integer_affine(call), self.calls.sources(call)
        source = self.calls.value(sources[0])
        if found is None or len(sources) > 1 or not isinstance(source, Integer):
            return None
        return Integer(source.node, found[0][0], found[1], source.low, source.high)

    def _batch_norm(self, operation: Operation) -> Value:
        module: Any = operation.module
        if module.running_var is None:
            raise ExportError(
                f"{operation.name} keeps no running statistics, so that one input's result depends on "
                "the others; use track_running_stats=True"
            )
        return Pending()

    def _addition(self, operation: Operation) -> Value:
        shapes = {shape_of(call) for call in operation.node.all_input_nodes}
        if len(shapes) > 1:
            raise ExportError(f"{operation.name} adds tensors of different shapes {sorted(shapes)}")
        return Pending()

    def _activation(self, operation: Operation) -> Value:
        return Pending()

    def _reshape(self, operation: Operation) -> Value:
        source, shape = operation.node.all_input_nodes[0], shape_of(operation.node)
        value, before = self.calls.value(source), shape_of(source)
        if math.prod(shape) != math.prod(before):
            raise ExportError(
                f"{operation.name} changes the batch dimension, which export leaves alone"
            )
        # A scale for each channel survives only if each element is a channel.
        flat = before[0] == shape[0] == math.prod(shape)
        if isinstance(value, Integer) and (value.plain or flat):
            name = self.nodes.add(g.Reshape, operation.name, (value.node,), shape)
            low, high = (value.low, value.high) if flat else (value.low.min(), value.high.max())
            return Integer(name, value.scale, value.bias, np.asarray(low), np.asarray(high))
        real = self.nodes.real(source)
        return Real(self.nodes.add(g.Reshape, operation.name, (real,), shape))

    def _product(self, operation: Operation) -> Value:
        module: Any = operation.module
        name, shape = operation.name, shape_of(operation.node)
        window = convolution_window(name, module)
        rank = 1 if window is None else len(window.stride) + 1
        if len(shape) != rank:
            raise ExportError(
                f"{name} takes inputs of {rank + 1} dimensions here, the batch first, "
                f"got {len(shape) + 1}; flatten all but the batch ahead of it, or for a Linear along "
                "the last of several dimensions use a convolution of kernel size 1, channels first"
            )
        value = self.calls.value(operation.node.all_input_nodes[0])
        weights = self.weights.get(module)
        levels = weight_levels(module, weights)
        if weights is None or levels is None or not isinstance(value, Integer) or not value.plain:
            return Real(self.nodes.product(operation, weights, window))
        weight, scale = weight_integers(module, weights, levels)
        low, high = _reach(name, weight, value, window)
        fields = {"weight": weight, "levels": levels, "window": window, "low": low, "high": high}
        node = self.nodes.add(g.Product, name, (value.node,), shape, **fields)
        bias = None if module.bias is None else module.bias.double().numpy()
        return Integer(node, scale * value.scale, bias, low, high)

    def _max_pool(self, operation: Operation) -> Value:
        source = operation.node.all_input_nodes[0]
        kernel, window = pool_window(operation.name, operation.module, shape_of(source))
        value = self.calls.value(source)
        name = self._structural(g.MaxPool, operation, value, kernel=kernel, window=window)
        return replace(value, node=name) if isinstance(value, Integer) else Real(name)

    def _mean_pool(self, operation: Operation) -> Value:
        source, shape = operation.node.all_input_nodes[0], shape_of(operation.node)
        before = shape_of(source)
        kernel, window = pool_window(operation.name, operation.module, before)
        value = self.calls.value(source)
        padded = any(window.padding)
        if padded and isinstance(value, Integer) and value.bias is not None:
            raise ExportError(f"{operation.name} pads what has a bias; pool after the activation")
        fields = {"kernel": kernel, "window": window, "mean": not isinstance(value, Integer)}
        given = value.node if isinstance(value, Integer) else self.nodes.real(source)
        # A mean over space that drops it is a pool and a reshape.
        pooled = shape if len(shape) == len(before) else (*shape, *[1] * (len(before) - len(shape)))
        name = self.nodes.add(g.SumPool, operation.name, (given,), pooled, **fields)
        if pooled != shape:
            name = self.nodes.add(g.Reshape, f"{operation.name}.squeeze", (name,), shape)
        if not isinstance(value, Integer):
            return Real(name)
        count = math.prod(kernel)
        low, high = value.low * count, value.high * count
        if padded:
            low, high = np.minimum(low, 0), np.maximum(high, 0)
        largest = int(np.maximum(-low, high).max())
        if largest > _EXACT_MEAN:
            raise ExportError(
                f"{operation.name}: its sums reach {largest}, so that a float32 mean may miss them "
                "(2^21); pool after the activation, or in two steps"
            )
        return Integer(name, value.scale / count, value.bias, low, high)

    def _concatenation(self, operation: Operation) -> Value:
        given, shape = operation.joined(), shape_of(operation.node)
        values = [self.calls.value(source) for source in given]
        integers = [value for value in values if isinstance(value, Integer)]
        if len(integers) < len(values):
            real = tuple(self.nodes.real(source) for source in given)
            return Real(self.nodes.add(g.Concat, operation.name, real, shape))
        names = tuple(value.node for value in integers)
        node = self.nodes.add(g.Concat, operation.name, names, shape)
        return joined(node, integers, [shape_of(source)[0] for source in given])

    def _padding(self, operation: Operation) -> Value:
        source = operation.node.all_input_nodes[0]
        before, after = operation.padding()
        value = self.calls.value(source)
        if isinstance(value, Integer) and value.bias is not None:
            raise ExportError(f"{operation.name} pads what has a bias; pad after the activation")
        name = self._structural(g.Pad, operation, value, before=before, after=after)
        if not isinstance(value, Integer):
            return Real(name)
        low, high = np.minimum(value.low, 0), np.maximum(value.high, 0)
        return Integer(name, value.scale, None, low, high)

    def _upsampling(self, operation: Operation) -> Value:
        value = self.calls.value(operation.node.all_input_nodes[0])
        name = self._structural(g.Repeat, operation, value, times=operation.repetitions())
        return replace(value, node=name) if isinstance(value, Integer) else Real(name)

    def _structural(
        self, kind: type[g.Node], operation: Operation, value: Value, **fields: Any
    ) -> str:
        """A node that computes with integers or real numbers as they come."""
        source = operation.node.all_input_nodes[0]
        given = value.node if isinstance(value, Integer) else self.nodes.real(source)
        shape = shape_of(operation.node)
        return self.nodes.add(kind, operation.name, (given,), shape, **fields)

    def _quantizer(self, operation: Operation) -> Value:
        module: Any = operation.module
        name, call, shape = operation.name, operation.node, shape_of(operation.node)
        levels = integer_levels(module.levels.values, module.levels.name)
        if levels is None:
            raise ExportError(
                f"{name}: the levels {module.levels.values} are not whole multiples of one step; use "
                "unsigned(bits), signed(bits), ternary(), binary() or power_of_two(bits)"
            )
        fields = thresholds(self.calls, call, levels)
        if fields is not None:
            node = self.nodes.add(g.Threshold, name, **fields)
            self.decided[node] = call
        else:
            real = self.nodes.real(call.all_input_nodes[0])
            before = activation_before(module)
            if before is not None:
                real = self.nodes.activation(f"{name}.before", before, real, shape)
            fields = {
                "levels": levels,
                "thresholds": module.levels.thresholds,
                "scale": module.scale.item(),
            }
            node = self.nodes.add(g.Quantize, name, (real,), shape, **fields)
        if call.op == "call_module":
            self.names.setdefault(name, node)
        low, high = (np.asarray(levels.integers[end], dtype=np.int64) for end in (0, -1))
        return Integer(
            node, np.asarray(module.scale.double().item() * levels.unit), None, low, high
        )


def _drop_identities(traced: fx.GraphModule) -> None:
    """Take out calls that leave their input as it is, so that every value has one call."""
    modules = dict(traced.named_modules())
    for call in list(traced.graph.nodes):
        kind = Operation(call, modules).kind
        source = call.all_input_nodes[0] if kind in ("passing", "reshape") else None
        if source is not None and shape_of(call) == shape_of(source):
            call.replace_all_uses_with(source)
            traced.graph.erase_node(call)


def _check_unwrapped(model: nn.Module) -> None:
    if isinstance(model, DataParallel | DistributedDataParallel | AveragedModel):
        wrapper, inside = type(model).__name__, "module"
    elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
        wrapper, inside = "torch.compile", "_orig_mod"
    else:
        return
    raise ExportError(f"the model is wrapped by {wrapper}; export what is inside, model.{inside}")


def _check_finalized(model: nn.Module) -> None:
    try:
        check_finalized(model)
    except RuntimeError as error:
        raise ExportError(str(error)) from error


def _check_numbers(model: nn.Module, example_input: Tensor) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ExportError(f"{name} is {tensor.dtype}; call model.float() first")
        if not bool(tensor.isfinite().all()):
            raise ExportError(
                f"{name} is not finite: training has diverged, or it was overwritten; go back to a "
                "checkpoint before that, and lower the learning rate"
            )
    if not isinstance(example_input, Tensor) or example_input.dim() < 2 or not len(example_input):
        raise ExportError(
            "example_input must be one tensor, a batch of at least one input, "
            f"got {getattr(example_input, 'shape', type(example_input).__name__)}"
        )
    if example_input.dtype != torch.float32:
        raise ExportError(f"example_input must be float32, got {example_input.dtype}")


def _reach(
    name: str, weight: g.Integers, value: Integer, window: g.Window | None
) -> tuple[g.Integers, g.Integers]:
    """The least and greatest sums that a weight can make of its inputs."""
    low, high = int(value.low.min()), int(value.high.max())
    if window is not None and (window.transposed or any(window.padding)):
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
