"""``quantize_``: turn the layers of a model into quantized ones, in place."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from learnsched.choose import Chosen, LayerConfig, choose
from learnsched.execution import Example, Execution, reached
from learnsched.levels import LevelSet
from learnsched.modules import (
    ACTIVATIONS,
    BATCH_NORMS,
    CLIPPING,
    KNOWN,
    QUANTIZED_LAYERS,
    QUANTIZED_TYPES,
    REAL,
    CopiedDecoderLayer,
    channel_dim,
    matrices,
)
from learnsched.quantizers import ActivationQuantizer, PReLUQuantizer, WeightQuantizer
from learnsched.scales import LeastSquares, ScaleRule, default_weight_rule, unit_normal_scale

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Of what batch norms put out, as a root mean square: beyond, a scale made for 1 costs accuracy.
_USUAL_SIZES = (0.5, 2.0)

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
    checkpoints of the float model, stay valid. Activations that follow a weight belong to its layer.
    Convolutions may be grouped, depthwise or transposed, in one to three dimensions. Modules that share
    a weight are one layer. Two or three signed levels, as of ``binary()``, take the place of a ReLU;
    larger signed level sets quantize what it puts out.

    Args:
        model: any module.
        weight: level set of the weights; None keeps them real.
        activation: level set of the activations; None keeps them real.
        weight_scale: scale rule of the weights; by default the level set's customary one.
        activation_scale: scale rule that calibration uses; by default least squares.
        skip: ``"first"``, ``"last"`` or both: weight layers to keep real, by order of execution.
        overrides: from a pattern of module names (as in :mod:`fnmatch`) to the configuration of the
            weight layers that match, and of the activations after them, or to None to keep those
            weights real. The first match decides. Activations can be matched by their own names.
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


@dataclass
class _Group:
    name: str
    members: list[str]


def _group(order: list[tuple[str, nn.Module]], chosen: Chosen) -> list[_Group]:
    """Each weight with the activations that follow it; real weights may lead a layer too."""
    groups: list[_Group] = []
    for name, module in order:
        if type(module) in QUANTIZED_TYPES or (name in chosen and not groups):
            groups.append(_Group(name, []))
        if name in chosen:
            groups[-1].members.append(name)
    return [group for group in groups if group.members]


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
    for note in _notes(model, found, chosen):
        warnings.warn(note, stacklevel=3)
    # All that can fail comes before this line: from here on the model changes.
    placed: set[nn.Module] = set()
    for index, group in enumerate(_group(found.order, chosen)):
        for name in group.members:
            module, quantizer = modules[name], quantizers[name]
            if quantizer not in placed:  # a shared weight belongs to the layer that uses it first
                quantizer.layer_name, quantizer.layer_index = group.name, index
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


def _notes(model: nn.Module, found: Execution, chosen: Chosen) -> Iterator[str]:
    """What a user should know of what is chosen, before it is converted."""
    order = found.order
    activations = [n for n, module in order if n in chosen and type(module) in ACTIVATIONS]
    modules = dict(order)
    normalized = {
        name: before
        for (_, before), (name, _) in zip(order, order[1:], strict=False)
        if isinstance(before, BATCH_NORMS)
    }
    sizes = {n: _size(normalized[n]) for n in activations if n in normalized}
    low, high = _USUAL_SIZES
    if unusual := [f"{n} ({size:.2g})" for n, size in sizes.items() if not low < size < high]:
        yield (
            f"the batch norms ahead of {unusual} put out values of that root mean square, and scales "
            "are made for 1: call learnsched.calibrate_(model, batches) before training goes on"
        )
    if uncalibrated := [name for name in activations if name not in normalized]:
        yield (
            f"no batch norm precedes {uncalibrated}: their scale is a guess until "
            "learnsched.calibrate_(model, batches) has seen data; from random weights, learn it from "
            "there with learnsched.learn_scales_(model)"
        )
    if idle := [name for name, _ in order[found.executed :] if name in chosen]:
        functions = ", whose activation functions were not looked for" if activations else ""
        yield (
            f"the example input did not reach {idle}: a branch taken in training alone, as of auxiliary "
            f"heads{functions}, is the likely reason. If the model computes with their weights itself "
            "(F.linear), it trains in full precision there; call the modules instead"
        )
    if borrowed := [name for name in found.borrowed if name in chosen]:
        yield (
            f"the model computes with the weights of {borrowed} outside of their modules too, in full "
            "precision; call the modules instead"
        )
    if found.functions and activations:
        yield (
            f"the model calls {', '.join(found.functions)} as functions, whose results stay real; call "
            "learnsched.activations_to_modules_(model, example_input) first, or use modules (nn.ReLU)"
        )
    if unused := [name for name in found.unused if name in chosen]:
        yield (
            f"the model calls {unused} for what they do to their input, and a quantized activation "
            "leaves its input as it is; use what it returns: x = self.relu(x)"
        )
    if overwritten := [
        n for n in found.overwritten if n in chosen and type(modules[n]) in CLIPPING
    ]:
        yield (
            f"the model uses the input of {overwritten} again, after they have changed it in place; a "
            "quantized activation leaves its input as it is. Use what it returns where that is meant, "
            "or make them inplace=False"
        )
    if hooked := [name for name in activations if _has_hooks(modules[name])]:
        yield (
            f"{hooked} have hooks, which stay with the modules that are replaced; register them after "
            "quantize_"
        )
    weights = any(type(modules[name]) in QUANTIZED_TYPES for name in chosen)
    yield from _notes_on_what_stays_real(model, weights=weights)


def _size(norm: Any) -> float:
    """Root mean square of what a batch norm puts out, by its weights."""
    scale, shift = norm.weight, norm.bias
    if scale is None:
        return 1.0
    squares = scale.detach().double().square()
    if shift is not None:
        squares = squares + shift.detach().double().square()
    return float(squares.mean().sqrt())


def _notes_on_what_stays_real(model: nn.Module, *, weights: bool) -> Iterator[str]:
    """Modules that hold products or activations of no quantized kind.

    Args:
        model: before it is converted.
        weights: whether any weight is quantized; else those that are not need no word.
    """
    attention = {n: m for n, m in model.named_modules() if type(m) is nn.MultiheadAttention}
    if weights and attention:
        yield (
            f"{[*attention]} stay real: they are nn.MultiheadAttention, whose projections are bare "
            "parameters; call learnsched.attention_to_linears_(model) first"
        )
    told = {module.out_proj for module in attention.values()}
    named = [
        (f"{name} ({type(module).__name__})", module)
        for name, module in model.named_modules()
        if module not in told
    ]
    if foreign := [
        n for n, module in named if isinstance(module, KNOWN) and type(module) not in KNOWN
    ]:
        yield (
            f"{foreign} stay real: what a subclass computes is not known (a parametrization makes one, "
            "too)"
        )
    if weights and (real := [n for n, module in named if isinstance(module, REAL)]):
        yield f"{real} stay real: of such layers no quantized kind is known"
    bare = [
        f"{f'{name}.{parameter}'.lstrip('.')} ({type(module).__name__})"
        for name, module in model.named_modules()
        if _is_a_layer_of_ones_own(module)
        for parameter in matrices(module)
    ]
    if weights and bare:
        yield (
            f"{bare} stay real: they are parameters of no layer of torch's; where products are formed "
            "with them, let an nn.Linear or a convolution hold them. What is looked up or added, as "
            "tables and positions are, is right as it is"
        )


def _is_a_layer_of_ones_own(module: nn.Module) -> bool:
    """Whether a module is not torch's, and leaves products to no layers inside of it, as blocks do."""
    known = (*KNOWN, *QUANTIZED_LAYERS, nn.Embedding, nn.EmbeddingBag)
    foreign = not type(module).__module__.startswith("torch.") and not isinstance(module, known)
    inside = (m for m in module.modules() if m is not module)
    return foreign and not any(isinstance(m, (*QUANTIZED_TYPES, *REAL)) for m in inside)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


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
