"""The calls of a traced network, and the pointwise ones between two integer tensors.

Batch norm, addition and activation are not translated one by one: together with the quantizer after
them they decide, for every integer, a code. What they decide is asked of PyTorch's own modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from learnsched.activation_quantizer import PReLUQuantizer
from learnsched.export import graph as g
from learnsched.export.errors import ExportError
from learnsched.export.operations import RISING, Operation, shape_of
from learnsched.export.values import Doubles, Integer, Pending, Value
from learnsched.levels import LevelSet


class Calls:
    """Every call so far: its operation and what is known of its output.

    Args:
        modules: of the network, by name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.values: dict[fx.Node, Value] = {}
        self.operations: dict[fx.Node, Operation] = {}

    def value(self, call: fx.Node) -> Value:
        """What is known of a call's output.

        Raises:
            ExportError: nothing, since it is a number such as a size.
        """
        if call not in self.values:
            raise ExportError(f"{call.name} uses a tensor's numbers, which export does not know")
        return self.values[call]

    def arguments(self, call: fx.Node) -> list[fx.Node]:
        """The calls whose outputs a pointwise call takes, one as often as it does."""
        return [argument for argument in call.args if isinstance(argument, fx.Node)]

    def sources(self, call: fx.Node) -> list[fx.Node]:
        """The calls behind the pointwise operations that lead to ``call``, each once."""
        found: dict[int, fx.Node] = {}
        for argument in call.all_input_nodes:
            inner = isinstance(self.value(argument), Pending)
            for source in self.sources(argument) if inner else [argument]:
                # Two ways may lead to the same value.
                found.setdefault(id(self.value(source)), source)
        return list(found.values())

    def codes(self, quantizer: fx.Node, given: Mapping[fx.Node, Tensor]) -> g.Integers:
        """The codes that PyTorch's modules give, if the sources put out ``given``."""
        module: Any = self.operations[quantizer].module
        levels: LevelSet = module.levels
        tensors = {id(self.value(source)): tensor for source, tensor in given.items()}
        x = self._evaluate(quantizer.all_input_nodes[0], tensors)
        # An activation in place would change what the sources put out.
        return levels.codes(module.ahead(x.clone()) / module.scale).numpy()

    def _evaluate(self, call: fx.Node, given: Mapping[int, Tensor]) -> Tensor:
        known = given.get(id(self.value(call)))
        if known is not None:
            return known
        arguments = [self._evaluate(argument, given) for argument in self.arguments(call)]
        if call.op == "call_module":
            result: Tensor = self.modules[str(call.target)](*arguments)
        elif call.op == "call_method":
            result = getattr(arguments[0], str(call.target))(*arguments[1:])
        else:
            function: Callable[..., Tensor] = call.target  # type: ignore[assignment]
            result = function(*arguments)
        return result

    def check_rising(self, quantizer: fx.Node) -> None:
        """Refuse activations ahead of a quantizer that fall somewhere.

        Raises:
            ExportError: there is one, such as GELU.
        """
        operation = self.operations[quantizer]
        before = activation_before(operation.module)
        activations = [] if before is None else [(operation.name, before)]
        pending = [quantizer.all_input_nodes[0]]
        while pending:
            call = pending.pop()
            if isinstance(self.value(call), Pending):
                pending += call.all_input_nodes
                inner = self.operations[call]
                if inner.kind == "activation" and inner.module is not None:
                    activations.append((inner.name, inner.module))
        for name, activation in activations:
            if not isinstance(activation, RISING) or _least_slope(activation) < 0:
                raise ExportError(
                    f"{name}: {type(activation).__name__} does not rise everywhere, so that its codes "
                    "have no thresholds; use ReLU, or LeakyReLU with a slope of at least 0"
                )

    def affine(self, call: fx.Node) -> tuple[dict[int, Doubles], Doubles] | None:
        """A pointwise call as an affine function of real values, in float64.

        Returns:
            factors by the identity of the values, and offset, one number a channel each; None after an
            activation.
        """
        channels = shape_of(call)[0]
        value = self.value(call)
        if not isinstance(value, Pending):
            return {id(value): np.ones(channels)}, np.zeros(channels)
        operation = self.operations[call]
        parts = [self.affine(argument) for argument in self.arguments(call)]
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
            scale, shift = batch_norm_affine(operation.module)
            factors = {key: factor * scale for key, factor in factors.items()}
            offset = offset * scale + shift
        return factors, offset

    def integer_affine(self, call: fx.Node) -> tuple[list[Doubles], Doubles] | None:
        """The same of the integers of the sources, in the order of :meth:`sources`; all are integer."""
        found = self.affine(call)
        if found is None:
            return None
        factors, offset = found
        slopes = []
        for source in self.sources(call) if isinstance(self.value(call), Pending) else [call]:
            value = self.value(source)
            if not isinstance(value, Integer):
                return None
            slopes.append(factors[id(value)] * value.scale)
            if value.bias is not None:
                offset = offset + factors[id(value)] * value.bias
        return slopes, offset


def activation_before(module: Any) -> nn.Module | None:
    """What a quantizer computes ahead of its staircase."""
    if isinstance(module, PReLUQuantizer):
        prelu = nn.PReLU(module.weight.numel())
        prelu.weight = module.weight
        return prelu
    before: nn.Module | None = module.before
    return before


def batch_norm_affine(module: Any) -> tuple[Doubles, Doubles]:
    """Factor and shift of a batch norm in evaluation, in float64."""
    scale = 1 / np.sqrt(module.running_var.double().numpy() + module.eps)
    if module.weight is not None:
        scale = scale * module.weight.detach().double().numpy()
    shift = -module.running_mean.double().numpy() * scale
    if module.bias is not None:
        shift = shift + module.bias.detach().double().numpy()
    return scale, shift


def as_tensor(values: Doubles, rank: int) -> Tensor:
    """float32, shape ``(many, channels, 1, …)``, as deep as the layer's own tensors."""
    rounded = torch.from_numpy(np.ascontiguousarray(values.astype(np.float32)))
    return rounded.reshape(*values.shape, *[1] * (rank - 1))


def _least_slope(module: nn.Module) -> float:
    """The least derivative of an activation of the rising kinds."""
    known: Any = module
    if isinstance(module, nn.PReLU):
        return float(known.weight.min())
    if isinstance(module, nn.LeakyReLU):
        return float(known.negative_slope)
    if isinstance(module, nn.RReLU):
        return float(known.lower + known.upper) / 2
    return float(known.alpha) if isinstance(module, nn.ELU | nn.CELU) else 0.0
