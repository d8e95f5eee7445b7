"""A population: networks of one architecture in one graph, each with its own weights and settings.

On small networks the cost of a training step is dispatching operations, not computing them; one
graph for many networks makes more of them almost free.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from learnsched.layers import noise_fields, quantized_layers
from learnsched.meta.convolution import ConvolutionsAsProducts
from learnsched.modules import BATCH_NORMS
from learnsched.schedule import FIELDS, LayerInfo
from learnsched.weight_quantizer import WeightQuantizer

# Buffers that the inner loop carries itself, as part of its state.
CARRIED = ("membership", "held", "held_scale", "scale_held")


class Population(nn.Module):
    """Quantized networks of one architecture, stacked along a new first dimension.

    ``higher`` patches it as one module; its parameters are the stacked parameters.

    Args:
        models: at least one model, all converted by ``quantize_`` in the same way.

    Shape:
        ``x`` of shape ``(members, batch, ...)``; logits of shape ``(members, batch, classes)``.

    Raises:
        ValueError: there is no model, or the models do not stack.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        if not models:
            raise ValueError("a population needs at least one model")
        parameters, buffers = stack_module_state(list(models))
        # In a tuple, so that neither nn.Module nor higher takes the template for a submodule.
        self._template = (models[0],)
        self._names = {self.key(name): name for name in parameters}
        self._buffer_names = {self.key(name): name for name in buffers}
        for name, value in parameters.items():
            self.register_parameter(self.key(name), nn.Parameter(value.detach().clone()))
        for name, value in buffers.items():
            self.register_buffer(self.key(name), value.detach().clone())
        self.members = len(models)
        self.layers: tuple[LayerInfo, ...] = tuple(
            layer.info for layer in quantized_layers(models[0])
        )
        self._noise_buffers = _noise_buffers(models[0])
        self.weights = _weights(models[0])
        self.track_batch_norm(None)

    @property
    def template(self) -> nn.Module:
        """The module whose structure every member has."""
        return self._template[0]

    def forward(self, x: Tensor, replaced: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits of every member on its own batch; ``replaced`` are buffers to use instead."""
        parameters = {name: getattr(self, key) for key, name in self._names.items()}
        buffers = {name: getattr(self, key) for key, name in self._buffer_names.items()}
        buffers.update(replaced or {})

        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
            result: Tensor = functional_call(self.template, (parameters, buffers), (x,))
            return result

        with ConvolutionsAsProducts() if x.is_cuda else contextlib.nullcontext():
            result: Tensor = vmap(one, randomness="different")(parameters, buffers, x)
        return result

    def repeated(self, count: int) -> Population:
        """``count`` copies of the population, one after the other, as one population."""
        result = copy.deepcopy(self)
        for name, parameter in self.named_parameters():
            setattr(result, name, nn.Parameter(_tiled(parameter.detach(), count)))
        for name, buffer in self.named_buffers():
            setattr(result, name, _tiled(buffer, count))
        result.members = count * self.members
        return result

    def noise_buffers(self, settings: Tensor) -> dict[str, Tensor]:
        """The buffers that hold ``settings``.

        Args:
            settings: shape ``(members, layers, len(FIELDS))``.

        Returns:
            buffers by their name in the template, each of shape ``(members,)``.
        """
        columns = [
            # No policy learns the means: a gradient to them would cost time for nothing.
            column.detach() if name.endswith("mean") else column
            for name, column in zip(FIELDS, settings.unbind(-1), strict=True)
        ]
        return {
            name: columns[field][:, layer] for name, (layer, field) in self._noise_buffers.items()
        }

    def track_batch_norm(self, momentum: float | None) -> None:
        """Let training passes move the running statistics of batch norms; None leaves them alone."""
        for module in self.template.modules():
            if isinstance(module, BATCH_NORMS):
                module.track_running_stats = momentum is not None
                module.momentum = momentum or 0.1

    @staticmethod
    def key(name: str) -> str:
        """Under which name a parameter or buffer of the template is registered here."""
        return name.replace(".", "__")


def _tiled(tensor: Tensor, count: int) -> Tensor:
    return tensor.repeat(count, *[1] * (tensor.dim() - 1))


def _noise_buffers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """From each noise buffer of a model to its layer and its column in a table of settings."""
    names = {module: name for name, module in model.named_modules()}
    result = {}
    for index, layer in enumerate(quantized_layers(model)):
        for quantizer in layer.quantizers:
            for buffer, field in noise_fields(quantizer).items():
                result[f"{names[quantizer]}.{buffer}"] = (index, FIELDS.index(field))
    return result


class QuantizedWeight(NamedTuple):
    """A quantized weight of the template: names of weight and quantizer, the quantizer, its layer."""

    name: str
    quantizer_name: str
    quantizer: WeightQuantizer
    layer: int


def _weights(model: nn.Module) -> tuple[QuantizedWeight, ...]:
    names = {module: name for name, module in model.named_modules()}
    result = []
    for index, layer in enumerate(quantized_layers(model)):
        if layer.weight is not None:
            name = names[layer.weight]
            quantizer = layer.weight.weight_quantizer
            prefix = f"{name}." if name else ""
            result.append(
                QuantizedWeight(f"{prefix}weight", f"{prefix}weight_quantizer", quantizer, index)
            )
    return tuple(result)
