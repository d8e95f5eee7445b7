"""The quantized layers of a model, as a schedule sees them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from learnsched.activation_quantizer import ActivationQuantizer
from learnsched.modules import QUANTIZED_LAYERS, QuantizedLayer, check_module, fan_in
from learnsched.schedule import LayerInfo
from learnsched.weight_quantizer import WeightQuantizer

# The field of a setting for each noise buffer: both passes have one mean.
_FIELD_OF = {
    "forward_std": "forward_std",
    "backward_std": "backward_std",
    "forward_mean": "forward_mean",
    "backward_mean": "forward_mean",
}


@dataclass(frozen=True)
class Layer:
    """A layer as a schedule sees it: a weight and the activations that follow it."""

    info: LayerInfo
    weight: QuantizedLayer | None
    activations: tuple[ActivationQuantizer, ...]

    @property
    def quantizers(self) -> tuple[WeightQuantizer | ActivationQuantizer, ...]:
        """The weight's quantizer, if any, then the activations'."""
        own = () if self.weight is None else (self.weight.weight_quantizer,)
        return (*own, *self.activations)


def noise_fields(quantizer: WeightQuantizer | ActivationQuantizer) -> dict[str, str]:
    """From each noise buffer of a quantizer to the field of a setting that it holds.

    Example:
        >>> import learnsched as ls
        >>> net = ls.quantize_(nn.Linear(8, 4), ls.ternary())
        >>> noise_fields(net.weight_quantizer)["forward_std"]
        'weight_forward_std'
    """
    kind = "weight" if isinstance(quantizer, WeightQuantizer) else "activation"
    return {buffer: f"{kind}_{field}" for buffer, field in _FIELD_OF.items()}


def quantized_activations(model: nn.Module, use: str) -> list[ActivationQuantizer]:
    """The quantized activations of a model, in the order of its layers.

    Args:
        model: converted by ``quantize_``.
        use: what is done with their scale, for the message.

    Raises:
        ValueError: it has none.
    """
    found = [activation for layer in quantized_layers(model) for activation in layer.activations]
    if not found:
        raise ValueError(
            f"the model has no quantized activations whose scale could be {use}; give quantize_ an "
            "activation level set such as unsigned(2)"
        )
    return found


def is_quantized(model: nn.Module) -> bool:
    """Whether ``quantize_`` has converted something of a model.

    Example:
        >>> import learnsched as ls
        >>> net = nn.Linear(8, 4)
        >>> is_quantized(net), is_quantized(ls.quantize_(net, ls.ternary()))
        (False, True)
    """
    return any(isinstance(m, WeightQuantizer | ActivationQuantizer) for m in model.modules())


def quantized_layers(model: nn.Module) -> tuple[Layer, ...]:
    """The quantized layers of a model, from the input.

    Raises:
        TypeError: it is no module.
        ValueError: the model has none, they were quantized in different calls, a weight has been
            parametrized or shared since, or ``remove_quantizers_`` has finished it.

    Example:
        >>> import learnsched as ls
        >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> [layer.info.name for layer in quantized_layers(ls.quantize_(net, ls.ternary()))]
        ['0', '2']
    """
    check_module(model)
    weights: dict[int, QuantizedLayer] = {}
    activations: dict[int, list[ActivationQuantizer]] = {}
    names: dict[int, str] = {}
    owners: dict[Tensor, WeightQuantizer] = {}
    for module in model.modules():
        if isinstance(module, QUANTIZED_LAYERS):
            check_weight(module)
            twin = weights.setdefault(module.weight_quantizer.layer_index, module)
            if twin.weight_quantizer is not module.weight_quantizer:
                raise _quantized_apart(
                    twin.weight_quantizer.layer_name, module.weight_quantizer.layer_name
                )
            owner = owners.setdefault(module.weight, module.weight_quantizer)
            if owner is not module.weight_quantizer:
                raise ValueError(
                    f"{owner.layer_name} and {module.weight_quantizer.layer_name} have shared a weight "
                    "since quantize_ gave each a quantizer of its own; share it before quantize_"
                )
        if isinstance(module, WeightQuantizer | ActivationQuantizer):
            known = names.setdefault(module.layer_index, module.layer_name)
            if known != module.layer_name:
                raise _quantized_apart(known, module.layer_name)
        if isinstance(module, ActivationQuantizer):
            if module.is_left_over:
                raise ValueError(
                    "remove_quantizers_ has finished this model: its weights are plain numbers now, and "
                    "it can be run, but neither trained on, hardened nor exported. Do that before"
                )
            activations.setdefault(module.layer_index, []).append(module)
    if not names:
        raise ValueError("the model has no quantized layers; call learnsched.quantize_ first")
    result = []
    for index in sorted(names):
        weight, after = weights.get(index), tuple(activations.get(index, ()))
        info = LayerInfo(
            name=names[index],
            fan_in=0 if weight is None else fan_in(weight),
            weight_levels=0 if weight is None else len(weight.weight_quantizer.levels.values),
            activation_levels=len(after[0].levels.values) if after else 0,
            spatial_dims=0 if weight is None else weight.weight.dim() - 2,
        )
        result.append(Layer(info, weight, after))
    return tuple(result)


def check_weight(layer: QuantizedLayer) -> None:
    """Refuse a layer whose weight something else makes.

    Raises:
        ValueError: it is no parameter any more.
    """
    if "weight" not in dict(layer.named_parameters(recurse=False)):
        raise ValueError(
            f"the weight of {layer.weight_quantizer.layer_name} is no parameter any more, as after "
            "weight_norm or pruning; remove that, or quantize the float model without it"
        )


def _quantized_apart(one: str, other: str) -> ValueError:
    return ValueError(
        f"{one} and {other} were quantized in different calls, or one is a copy; call quantize_ once, "
        "on the whole model, and keep copies, such as a teacher, outside of it"
    )
