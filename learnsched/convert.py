"""``quantize_``: turn the layers of a model into quantized ones, in place."""

from __future__ import annotations

import fnmatch
import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from learnsched.levels import LevelSet
from learnsched.modules import (
    QUANTIZED_TYPES,
    ActivationQuantizer,
    PReLUQuantizer,
    QuantizedLayer,
    WeightQuantizer,
    channel_dim,
    fan_in,
)
from learnsched.scales import LeastSquares, ScaleRule, default_weight_rule, unit_normal_scale
from learnsched.schedule import LayerInfo
from learnsched.tables import aligned

# A staircase contains the clipping of these; the others are computed ahead of it.
_CLIPPING = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
_SMOOTH = (nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish)
_ACTIVATIONS = _CLIPPING + _SMOOTH
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_KNOWN = (*QUANTIZED_TYPES, *_ACTIVATIONS)

# Level set and scale rule of each module to quantize, by name.
Chosen = dict[str, tuple[LevelSet, ScaleRule | None]]

QUANTIZED_LAYERS = tuple(QUANTIZED_TYPES.values())

# A search of a tenth of a second, the same for all activations of a level set.
_initial_scale = functools.cache(unit_normal_scale)


@dataclass(frozen=True)
class LayerConfig:
    """How one layer and the activations after it are quantized.

    Attributes:
        weight: level set of the weight; None keeps it real.
        activation: level set of the activations; None keeps them real.
        weight_scale: scale rule of the weight; the level set's customary rule if None.
        activation_scale: scale rule of calibration; least squares if None.

    Example:
        >>> from learnsched import binary, ternary
        >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> net = quantize_(net, ternary(), overrides={"2": LayerConfig(weight=binary())})
        >>> [layer.info.weight_levels for layer in quantized_layers(net)]
        [3, 2]
    """

    weight: LevelSet | None = None
    activation: LevelSet | None = None
    weight_scale: ScaleRule | None = None
    activation_scale: ScaleRule | None = None


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


@dataclass(frozen=True)
class Report:
    """What ``quantize_`` did with each module that it knows; ``repr`` prints it as a table.

    Example:
        >>> import learnsched as ls
        >>> ls.report(ls.quantize_(nn.Sequential(nn.Linear(8, 4)), ls.ternary())).rows[0][0]
        '0'
    """

    rows: tuple[tuple[str, str, str, str], ...]

    def __repr__(self) -> str:
        return aligned([("module", "kind", "levels", "scale"), *self.rows])


def quantize_(
    model: nn.Module,
    weight: LevelSet | None = None,
    activation: LevelSet | None = None,
    *,
    weight_scale: ScaleRule | None = None,
    activation_scale: ScaleRule | None = None,
    skip: Sequence[Literal["first", "last"]] = (),
    overrides: Mapping[str, LayerConfig | None] | None = None,
    example_input: Tensor | tuple[Any, ...] | None = None,
) -> nn.Module:
    """Quantize the Linear, convolution and ReLU-like modules of a model, in place.

    Parameters stay the same objects with the same values and names, so an optimizer made before, and
    checkpoints of the float model, stay valid. Activations that follow a weight belong to its layer.
    Convolutions may be grouped, depthwise or transposed, in one or two dimensions. Modules that share
    a weight are one layer.

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
        example_input: one input, or a tuple of inputs, to find the order of execution with; without
            it the order of registration is taken.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: a level set is not a :class:`LevelSet`, a scale rule not a scale rule, or a weight
            not of real numbers of 16 bits or more.
        ValueError: nothing is asked for, a pattern matches nothing, no weight or no activation can
            be quantized though asked for, a weight is empty, computed, recurrent, or shared with a
            module that is not quantized alike, or the model is quantized already. The model is as it
            was.

    Example:
        >>> from learnsched import ternary, unsigned
        >>> net = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
        >>> net = quantize_(net, ternary(), unsigned(2), example_input=torch.zeros(1, 8))
        >>> [layer.info.name for layer in quantized_layers(net)]
        ['0', '3']
    """
    base = LayerConfig(weight, activation, weight_scale, activation_scale)
    overrides = dict(overrides or {})
    _check_request(model, base, skip, overrides)
    order, executed = _execution_order(model, example_input)
    configs = _configure(order, executed, base, skip, overrides)
    _check_found(order, configs, base, overrides)
    _convert(model, order, configs)
    return model


def quantized_layers(model: nn.Module) -> tuple[Layer, ...]:
    """The quantized layers of a model, from the input.

    Raises:
        ValueError: the model has none.

    Example:
        >>> import learnsched as ls
        >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> [layer.info.name for layer in quantized_layers(ls.quantize_(net, ls.ternary()))]
        ['0', '2']
    """
    weights: dict[int, QuantizedLayer] = {}
    activations: dict[int, list[ActivationQuantizer]] = {}
    names: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, QUANTIZED_LAYERS):
            twin = weights.setdefault(module.weight_quantizer.layer_index, module)
            if twin.weight_quantizer is not module.weight_quantizer:
                raise ValueError(
                    f"{twin.weight_quantizer.layer_name} and {module.weight_quantizer.layer_name} "
                    "were quantized in different calls; call quantize_ once, on the whole model"
                )
        if isinstance(module, WeightQuantizer | ActivationQuantizer):
            names[module.layer_index] = module.layer_name
        if isinstance(module, ActivationQuantizer):
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
        )
        result.append(Layer(info, weight, after))
    return tuple(result)


def report(model: nn.Module) -> Report:
    """What is quantized in a model, and what is not.

    Example:
        >>> from learnsched import ternary
        >>> net = quantize_(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), ternary())
        >>> report(net)
        module  kind    levels   scale
        0       Linear  ternary  AbsoluteMean
        1       ReLU    real
    """
    rows = []
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        if isinstance(module, QUANTIZED_LAYERS):
            quantizer = module.weight_quantizer
            kind = type(module).__name__.removeprefix("Quantized")
            rows.append((name, kind, quantizer.levels.name, type(quantizer.rule).__name__))
        elif isinstance(module, ActivationQuantizer):
            inside.update(module.modules())
            rows.append((name, "activation", module.levels.name, f"{module.scale.item():.4g}"))
        elif isinstance(module, _KNOWN):
            rows.append((name, type(module).__name__, "real", ""))
    return Report(tuple(rows))


def _check_request(
    model: nn.Module,
    base: LayerConfig,
    skip: Sequence[str],
    overrides: Mapping[str, LayerConfig | None],
) -> None:
    configs = [base, *(c for c in overrides.values() if c is not None)]
    for config in configs:
        if not isinstance(config, LayerConfig):
            raise TypeError(
                f"overrides map patterns to LayerConfig or None, got {type(config).__name__}"
            )
        for levels in (config.weight, config.activation):
            if levels is not None and not isinstance(levels, LevelSet):
                raise TypeError(
                    "level sets are made by ternary(), unsigned(2) and the like, "
                    f"got {type(levels).__name__}"
                )
        for rule in (config.weight_scale, config.activation_scale):
            if rule is not None and (isinstance(rule, type) or not isinstance(rule, ScaleRule)):
                raise TypeError(
                    f"scale rules are made by AbsoluteMean(), LeastSquares() and the like, got {rule!r}"
                )
    if all(c.weight is None and c.activation is None for c in configs):
        raise ValueError("nothing to do: give weight=, activation= or overrides= a level set")
    if isinstance(skip, str) or any(s not in ("first", "last") for s in skip):
        raise ValueError(f"skip takes a sequence of 'first' and 'last', got {skip!r}")
    if any(isinstance(m, WeightQuantizer | ActivationQuantizer) for m in model.modules()):
        raise ValueError("the model is quantized already; start again from the float model")
    if any(map(is_lazy, model.parameters())):
        raise ValueError("the model has lazy modules; run a batch through it first")


def _execution_order(
    model: nn.Module, example_input: Tensor | tuple[Any, ...] | None
) -> tuple[list[tuple[str, nn.Module]], int]:
    """Named leaf modules of interest, by first execution, and how many of them were executed."""
    wanted = {
        module: name
        for name, module in model.named_modules()
        # Only a parent can put something in the place of an activation.
        if type(module) in QUANTIZED_TYPES
        or (name and type(module) in _ACTIVATIONS)
        or isinstance(module, (*BATCH_NORMS, *_RECURRENT))
    }
    if example_input is None:
        return [(name, module) for module, name in wanted.items()], len(wanted)
    executed: dict[nn.Module, str] = {}

    def record(module: nn.Module, _: Any) -> None:
        executed.setdefault(module, wanted[module])

    handles = [module.register_forward_pre_hook(record) for module in wanted]
    training = [module for module in model.modules() if module.training]
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    try:
        model.eval()
        with torch.no_grad():
            model(*inputs)
    finally:
        for module in training:
            module.training = True
        for handle in handles:
            handle.remove()
    every = {**executed, **wanted}
    return [(name, module) for module, name in every.items()], len(executed)


def _configure(
    order: list[tuple[str, nn.Module]],
    executed: int,
    base: LayerConfig,
    skip: Sequence[str],
    overrides: Mapping[str, LayerConfig | None],
) -> Chosen:
    """Level set and scale rule of every module that gets quantized."""
    weights = [name for name, module in order[:executed] if type(module) in QUANTIZED_TYPES]
    real = {weights[0 if end == "first" else -1] for end in skip if weights}
    unmatched = set(overrides)
    configs: Chosen = {}
    following = base
    for name, module in order:
        if isinstance(module, BATCH_NORMS):
            continue
        is_weight = type(module) in QUANTIZED_TYPES
        matches = [pattern for pattern in overrides if fnmatch.fnmatchcase(name, pattern)]
        unmatched.difference_update(matches)
        config: LayerConfig | None
        if matches:
            config = overrides[matches[0]]
        elif is_weight:
            config = None if name in real else base
        else:
            config = following
        if is_weight:
            following = config or base
        if config is None:
            continue
        if isinstance(module, _RECURRENT):
            if config.weight is None:
                continue
            raise ValueError(
                f"{name} is a recurrent layer ({type(module).__name__}), whose weights cannot be "
                f"quantized; keep it real with overrides={{{name!r}: None}}"
            )
        levels = config.weight if is_weight else config.activation
        if levels is not None:
            rule = config.weight_scale if is_weight else config.activation_scale
            configs[name] = levels, rule
    if unmatched:
        raise ValueError(
            f"no module matches {sorted(unmatched)}; the modules that can be quantized are "
            f"{[name for name, m in order if not isinstance(m, BATCH_NORMS)]}"
        )
    return configs


def _check_found(
    order: list[tuple[str, nn.Module]],
    configs: Chosen,
    base: LayerConfig,
    overrides: Mapping[str, LayerConfig | None],
) -> None:
    """Refuse what was asked for and would change nothing."""
    quantized = [type(module) in QUANTIZED_TYPES for name, module in order if name in configs]
    asked = [base, *(c for c in overrides.values() if c is not None)]
    if any(c.weight is not None for c in asked) and True not in quantized:
        raise ValueError(
            f"no weight is left to quantize: no {', '.join(t.__name__ for t in QUANTIZED_TYPES)} "
            "remains after skip and overrides"
        )
    if any(c.activation is not None for c in asked) and False not in quantized:
        raise ValueError(
            "no activation is left to quantize: the model holds no ReLU-like module, or none remains "
            "after overrides. Activations called as functions (F.relu) are not modules: use nn.ReLU "
            "instead, or leave activation= out"
        )


@dataclass
class _Group:
    name: str
    members: list[str]


def _group(order: list[tuple[str, nn.Module]], configs: Chosen) -> list[_Group]:
    """Each weight with the activations that follow it; real weights may lead a layer too."""
    groups: list[_Group] = []
    for name, module in order:
        if type(module) in QUANTIZED_TYPES or (name in configs and not groups):
            groups.append(_Group(name, []))
        if name in configs:
            groups[-1].members.append(name)
    return [group for group in groups if group.members]


def _convert(model: nn.Module, order: list[tuple[str, nn.Module]], configs: Chosen) -> None:
    modules = dict(order)
    of_weight: dict[nn.Parameter, WeightQuantizer] = {}
    quantizers: dict[str, WeightQuantizer | ActivationQuantizer] = {}
    for name, config in configs.items():
        module = modules[name]
        if type(module) in QUANTIZED_TYPES:
            weight = _own_weight(model, name, module, configs)
            if weight not in of_weight:
                of_weight[weight] = _weight_quantizer(module, weight, *config)
            quantizers[name] = of_weight[weight]
        else:
            quantizers[name] = _activation_quantizer(model, module, *config)
    _warn(model, order, configs)
    # All that can fail comes before this line: from here on the model changes.
    placed: set[nn.Module] = set()
    for index, group in enumerate(_group(order, configs)):
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


def _warn(model: nn.Module, order: list[tuple[str, nn.Module]], configs: Chosen) -> None:
    normalized = {
        name
        for (_, before), (name, _) in zip(order, order[1:], strict=False)
        if isinstance(before, BATCH_NORMS)
    }
    uncalibrated = [
        name
        for name, module in order
        if name in configs and type(module) in _ACTIVATIONS and name not in normalized
    ]
    if uncalibrated:
        warnings.warn(
            f"no batch norm precedes {uncalibrated}: their scale is a guess until "
            "learnsched.calibrate_(model, batches) has seen data",
            stacklevel=4,
        )
    foreign = [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, _KNOWN) and type(module) not in _KNOWN
    ]
    if foreign:
        warnings.warn(
            f"{foreign} stay real: what a subclass computes with its weight is not known",
            stacklevel=4,
        )


def _own_weight(model: nn.Module, name: str, module: nn.Module, configs: Chosen) -> nn.Parameter:
    """The weight parameter of a module, if all its users are quantized alike."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    keep = f"or keep it real with overrides={{{name!r}: None}}"
    if weight is None:
        raise ValueError(
            f"the weight of {name} is computed from others, as by weight_norm or pruning; remove "
            f"that, {keep}"
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
        and (type(user) is not type(module) or configs.get(other) != configs[name])
    ]
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
    before = None if isinstance(module, _CLIPPING) else module
    return ActivationQuantizer(levels, scale, rule, before, like)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is registered, so that a shared module stays shared."""
    for parent in list(model.modules()):
        # named_children() would leave out the second name of the same module.
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
