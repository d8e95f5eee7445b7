"""``quantize_``: turn the layers of a model into quantized ones, in place."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from learnsched.activation_quantizer import ActivationQuantizer, PReLUQuantizer
from learnsched.choose import Chosen, LayerConfig, choose
from learnsched.conversion_notes import notes_ahead
from learnsched.example import Example, reached
from learnsched.execution import Execution
from learnsched.levels import LevelSet
from learnsched.modules import (
    CLIPPING,
    QUANTIZED_TYPES,
    CopiedDecoderLayer,
    channel_dim,
)
from learnsched.scales import LeastSquares, ScaleRule, default_weight_rule, unit_normal_scale
from learnsched.weight_quantizer import WeightQuantizer

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# A search of a tenth of a second, the same for all activations of a level set.
_initial_scale = functools.cache(unit_normal_scale)


def quantize_(
    model: nn.Module,
    weight: LevelSet | None = None,
    activation: LevelSet | None = None,
    *,
    weight_scale: ScaleRule | None = None,
    activation_scale: ScaleRule | None = None,
    skip: Sequence[Literal["first", "last"]] = (),
    overrides: Mapping[str, LayerConfig | None] | None = None,
    example_input: Example | None = None,
) -> nn.Module:
    """Quantize the Linear, convolution and ReLU-like modules of a model, in place.

    Parameters stay the same objects with the same values and names, so an optimizer made before, and
    checkpoints of the float model, stay valid; averages (``AveragedModel``) are made afterwards.
    Activations that follow a weight belong to its layer. Convolutions may be grouped, depthwise or
    transposed, in one to three dimensions. Modules that share a weight are one layer. Two or three
    signed levels, as of ``binary()``, take the place of a ReLU; larger signed level sets quantize what
    it puts out.

    Args:
        model: any module.
        weight: level set of the weights; None keeps them real.
        activation: level set of the activations; None keeps them real.
        weight_scale: scale rule of the weights; by default the level set's customary one.
        activation_scale: scale rule that calibration uses; by default least squares.
        skip: ``"first"``, ``"last"`` or both: weight layers to keep real, by order of execution. With
            an example input, all layers count as last whose results the model puts out, as they are or
            through no further layer: several heads, with a softmax or a change of shape behind them.
            Activations behind such a layer stay real too. First is one layer, that of several inputs'
            stems that is computed first.
        overrides: from a pattern of module names (as in :mod:`fnmatch`) to the configuration of the
            weight layers that match, and of the activations after them, or to None to keep those
            weights real. The first match decides. Activations can be matched by their own names, and
            those that a pattern with None matches stay real as well.
        example_input: one input, a tuple of inputs, or inputs by name, to find the order of execution
            with, and what the model computes past its modules; without it the order of registration
            is taken, and nothing is found.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: the model is no module, a level set not a :class:`LevelSet`, a scale rule not a scale
            rule, overrides no mapping, or a weight not of real numbers of 16 bits or more.
        ValueError: nothing is asked for, a pattern matches nothing, no weight or no activation can
            be quantized though asked for, a weight is empty, on the meta device, computed by hooks (as
            of pruning; layers with parametrizations stay real, with a warning), recurrent, or shared
            with a module that is not quantized alike, a layer's ``forward`` was replaced, a level of
            weights lies outside its own cell, or the model is quantized already. The model is as it
            was, unless it fails itself on the example input once it is quantized.

    Example:
        >>> from learnsched import ternary, unsigned
        >>> from learnsched.layers import quantized_layers
        >>> net = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
        >>> net = quantize_(net, ternary(), unsigned(2), example_input=torch.zeros(1, 8))
        >>> [layer.info.name for layer in quantized_layers(net)]
        ['0', '3']
    """
    base = LayerConfig(weight, activation, weight_scale, activation_scale)
    overrides = {} if overrides is None else overrides
    # Buffers that are made in inference mode could not be changed outside of it.
    with torch.inference_mode(False):
        found, chosen = choose(model, base, skip, overrides, example_input)
        placed = _convert(model, found, chosen)
        if example_input is not None:
            _warn_of_idle(model, example_input, found, placed)
    return model


def _groups(order: list[tuple[str, nn.Module]], chosen: Chosen) -> dict[str, list[str]]:
    """What is chosen of each weight and the activations after it, by the weight's name, if real, too."""
    groups: dict[str, list[str]] = {}
    leader: str | None = None
    for name, module in order:
        if type(module) in QUANTIZED_TYPES:
            leader = name
        if name in chosen:
            leader = name if leader is None else leader
            groups.setdefault(leader, []).append(name)
    return groups


def _convert(model: nn.Module, found: Execution, chosen: Chosen) -> dict[str, nn.Module]:
    """Quantizers in their places, by the name of the module that they are in or took the place of."""
    modules = dict(found.order)
    of_weight: dict[nn.Parameter, WeightQuantizer] = {}
    quantizers: dict[str, WeightQuantizer | ActivationQuantizer] = {}
    for name, config in chosen.items():
        module = modules[name]
        if type(module) in QUANTIZED_TYPES:
            weight = _own_weight(model, name, module, chosen)
            if weight not in of_weight:
                of_weight[weight] = _weight_quantizer(module, weight, *config)
            quantizers[name] = of_weight[weight]
        else:
            quantizers[name] = _activation_quantizer(model, module, *config)
    for note in (*notes_ahead(model, found, chosen), *_notes_on_scales(quantizers)):
        warnings.warn(note, stacklevel=3)
    # All that can fail comes before this line: from here on the model changes.
    placed: set[nn.Module] = set()
    for index, (leader, members) in enumerate(_groups(found.order, chosen).items()):
        for name in members:
            module, quantizer = modules[name], quantizers[name]
            if quantizer not in placed:  # a shared weight belongs to the layer that uses it first
                quantizer.layer_name, quantizer.layer_index = leader, index
                placed.add(quantizer)
            quantizer.train(module.training)
            if isinstance(quantizer, ActivationQuantizer):
                _replace(model, module, quantizer)
            else:
                # The class changes, not the object: hooks, parameters, references stay valid.
                module.__class__ = QUANTIZED_TYPES[type(module)]
                module.add_module("weight_quantizer", quantizer)
    for module in model.modules():
        # In evaluation these would hand the real weights to one fused operation.
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        elif type(module) is nn.TransformerDecoderLayer:
            module.__class__ = CopiedDecoderLayer
    return dict(quantizers)


def _notes_on_scales(
    quantizers: Mapping[str, WeightQuantizer | ActivationQuantizer],
) -> Iterator[str]:
    """Weights that have a scale each, as filters of one input may: those are on a level as they are."""
    if own := [
        name
        for name, quantizer in quantizers.items()
        if isinstance(quantizer, WeightQuantizer)
        and quantizer.held_scale.numel() == quantizer.held.numel() > 1
    ]:
        yield (
            f"each weight of {own} has a scale of its own, so that nothing is quantized there: channels "
            "have one weight each. Give them one scale, LayerConfig(..., "
            "weight_scale=learnsched.AbsoluteMean('tensor')) in overrides, or keep them real"
        )


def _warn_of_idle(
    model: nn.Module, example_input: Example, found: Execution, placed: Mapping[str, nn.Module]
) -> None:
    """Warn where the model went through a module, and now passes its quantizer by."""
    executed = {name for name, _ in found.order[: found.executed]}
    now = reached(model, example_input, placed.values())
    idle = [name for name, module in placed.items() if name in executed and module not in now]
    if idle:
        warnings.warn(
            f"the model does not call the quantizers of {idle}: it keeps these modules elsewhere than "
            "in its attributes, as in a plain list, and calls those. Use nn.ModuleList or nn.Sequential",
            stacklevel=3,
        )


def _own_weight(model: nn.Module, name: str, module: nn.Module, chosen: Chosen) -> nn.Parameter:
    """The weight parameter of a module, if all its users are quantized alike."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    keep = f"or keep it real with overrides={{{name!r}: None}}"
    if weight is None:
        raise ValueError(
            f"the weight of {name} is computed from others, as by weight_norm or pruning; remove "
            f"that, {keep}"
        )
    if "forward" in vars(module):
        raise ValueError(
            f"the forward of {name} was replaced on the module itself, as hooks of accelerate do, which "
            f"passes a quantizer by; take that away until after quantize_, {keep}"
        )
    if weight.dtype not in _DTYPES:
        raise TypeError(
            f"the weight of {name} is {weight.dtype}, not one of {', '.join(map(str, _DTYPES))}; "
            f"convert it, {keep}"
        )
    if weight.numel() == 0:
        raise ValueError(f"the weight of {name} is empty; take the layer out, {keep}")
    others = [
        other
        for other, user in model.named_modules()
        if user is not module
        and any(p is weight for p in user.parameters(recurse=False))
        and (type(user) is not type(module) or chosen.get(other) != chosen[name])
    ]
    aliases = [
        other
        for other, parameter in model.named_parameters()
        if parameter is not weight
        and parameter.device == weight.device
        and parameter.data_ptr() == weight.data_ptr()
    ]
    if aliases:
        raise ValueError(
            f"the weight of {name} lies in the same memory as {aliases}, which is another parameter; "
            f"make them one parameter (b.weight = a.weight) or two tensors (clone()), {keep}"
        )
    if others:
        raise ValueError(
            f"{name} shares its weight with {others}, which are not quantized alike; give it its own, "
            f"{keep}"
        )
    return weight


def _weight_quantizer(
    module: nn.Module, weight: nn.Parameter, levels: LevelSet, rule: ScaleRule | None
) -> WeightQuantizer:
    return WeightQuantizer(levels, rule or default_weight_rule(levels), weight, channel_dim(module))


def _activation_quantizer(
    model: nn.Module, module: nn.Module, levels: LevelSet, rule: ScaleRule | None
) -> ActivationQuantizer:
    scale, rule = _initial_scale(levels), rule or LeastSquares("tensor")
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    if isinstance(module, nn.PReLU):
        return PReLUQuantizer(levels, scale, rule, module, like)
    # Two or three levels around 0 take a ReLU's place, as in binary networks; more of them would let
    # negative values through that the float network never had.
    many_signed = levels.values[0] < 0 and len(levels.values) > 3
    contained = (nn.Hardtanh,) if many_signed else CLIPPING
    floor, ceiling = -math.inf, math.inf
    if isinstance(module, nn.Hardtanh):  # ReLU6 is one
        floor, ceiling = module.min_val, module.max_val
    # The staircase ends at the ceiling, and as far below 0 if it goes there.
    same_ends = floor == -ceiling if many_signed else floor <= 0
    if type(module) not in contained or ceiling <= 0 or not same_ends:
        return ActivationQuantizer(levels, scale, rule, module, like)
    return ActivationQuantizer(levels, scale, rule, None, like, ceiling)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is registered, so that a shared module stays shared."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is old and name:
            model.set_submodule(name, new)
