"""Nodes of a graph under construction; among them the real operations, where integers end."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx, nn

from learnsched.export import graph as g
from learnsched.export.calls import Calls, batch_norm_affine
from learnsched.export.errors import ExportError
from learnsched.export.operations import Operation, shape_of
from learnsched.export.values import (
    Integer,
    Real,
    Value,
    channels_first,
    weight_integers,
    weight_levels,
)
from learnsched.finalize import IntegerWeights


class Nodes:
    """Collects nodes and gives them names."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.nodes: list[g.Node] = []
        self._realised: dict[fx.Node, str] = {}

    def add(
        self,
        kind: type[g.Node],
        name: str,
        inputs: tuple[str, ...],
        shape: tuple[int, ...],
        **fields: Any,
    ) -> str:
        """Append a node; its name, with a number if the name is taken, or a layer is called output."""
        taken = {g.OUTPUT, *(node.name for node in self.nodes)}
        unique, number = name, 2
        while unique in taken:
            unique, number = f"{name}#{number}", number + 1
        self.nodes.append(kind(name=unique, inputs=inputs, shape=shape, **fields))
        return unique

    def finish(self, output: str, decoded: Integer | None) -> list[g.Node]:
        """The nodes that the output needs, itself the last.

        Args:
            output: the node that holds it.
            decoded: what it stands for if it is an integer: a node called output decodes it then.
        """
        nodes = list(self.nodes)
        if decoded is not None:
            shape = next(node.shape for node in nodes if node.name == output)
            nodes.append(_decode(decoded, shape, g.OUTPUT))
            output = g.OUTPUT
        needed, kept = {output}, []
        for node in reversed(nodes):
            if node.name in needed or isinstance(node, g.Input):
                needed.update(node.inputs)
                kept.append(node)
        return kept[::-1]

    def real(self, call: fx.Node) -> str:
        """A node that holds the output of ``call`` as real numbers."""
        value, shape = self.calls.value(call), shape_of(call)
        if isinstance(value, Real):
            return value.node
        if call not in self._realised:
            if isinstance(value, Integer):
                self.nodes.append(_decode(value, shape, f"{value.node}.real"))
                name = self.nodes[-1].name
            else:
                name = self._pointwise(self.calls.operations[call], shape)
            self._realised[call] = name
        return self._realised[call]

    def _pointwise(self, operation: Operation, shape: tuple[int, ...]) -> str:
        name, arguments = operation.name, self.calls.arguments(operation.node)
        inputs = tuple(self.real(argument) for argument in arguments)
        if operation.kind == "addition":
            return self.add(g.RealAdd, name, inputs, shape)
        if operation.kind == "batch_norm":
            scale, bias = (a.astype(np.float32) for a in batch_norm_affine(operation.module))
            return self.add(g.RealAffine, name, inputs, shape, scale=scale, bias=bias)
        return self.activation(name, operation.module, inputs[0], shape)

    def activation(self, name: str, module: Any, source: str, shape: tuple[int, ...]) -> str:
        """A real activation.

        Raises:
            ExportError: ONNX has no operator for it.
        """
        fields: dict[str, Any] = {"operator": type(module).__name__.capitalize()}
        if isinstance(module, nn.LeakyReLU):
            fields = {"operator": "LeakyRelu", "alpha": module.negative_slope}
        elif isinstance(module, nn.ELU | nn.CELU):
            fields["alpha"] = module.alpha
        elif isinstance(module, nn.PReLU):
            slope = module.weight.detach().numpy()
            fields = {"operator": "PRelu", "slope": slope if len(slope) > 1 else slope[0]}
        elif not isinstance(module, nn.SELU | nn.ReLU):
            raise ExportError(
                f"{name}: {type(module).__name__} of real numbers cannot be exported; use ReLU, "
                "LeakyReLU, PReLU, ELU, CELU or SELU, or quantize its layer's input and weight"
            )
        return self.add(g.RealActivation, name, (source,), shape, **fields)

    def product(
        self, operation: Operation, weights: IntegerWeights | None, window: g.Window | None
    ) -> str:
        """A product with a real operand, and the reason why it is none of integers."""
        module: Any = operation.module
        levels = weight_levels(module, weights)
        weight: Any = channels_first(module, module.weight.detach().numpy())
        scale = None
        if weights is None:
            reason = "its weight is real; leave it out of skip= and overrides= of quantize_"
        elif levels is None:
            reason = (
                f"its levels {weights.values} are not whole multiples of one step; use ternary()"
            )
        else:
            reason = _why_not_integer(self.calls.value(operation.node.all_input_nodes[0]))
            weight, factors = weight_integers(module, weights, levels)
            scale = factors.astype(np.float32)
        return self.add(
            g.RealProduct,
            operation.name,
            (self.real(operation.node.all_input_nodes[0]),),
            shape_of(operation.node),
            weight=weight,
            levels=levels,
            scale=scale,
            bias=None if module.bias is None else module.bias.detach().numpy(),
            window=window,
            reason=reason,
        )


def _why_not_integer(value: Value) -> str:
    """Why a quantized layer cannot take the input ``value`` as integers, and the way out."""
    if isinstance(value, Integer) and value.bias is None:
        return (
            "the channels of its input have different scales; put a quantized activation in front of "
            "this layer, or give the quantized activations that are concatenated there one scale, by "
            "quantize_ without calibrate_, or by b.scale.copy_(a.scale) before training"
        )
    return (
        "its input is real; put learnsched.export.QuantizedInput in front of the network if it "
        "is the first layer, or else a quantized activation in front of this layer"
    )


def _decode(value: Integer, shape: tuple[int, ...], name: str) -> g.Decode:
    """A node that turns integers into what they stand for."""
    bias = None if value.bias is None else value.bias.astype(np.float32)
    scale = value.scale.astype(np.float32)
    return g.Decode(name=name, inputs=(value.node,), shape=shape, scale=scale, bias=bias)
