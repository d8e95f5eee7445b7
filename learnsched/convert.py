"""``quantize_``: turn the layers of a model into quantized ones, in place."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from learnsched.levels import LevelSet
from learnsched.modules import (
    QUANTIZED_TYPES,
    ActivationQuantizer,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedLinear,
    WeightQuantizer,
)
from learnsched.scales import LeastSquares, ScaleRule, default_weight_rule, unit_normal_scale
from learnsched.schedule import LayerInfo

# A staircase contains the clipping of these; the others are computed ahead of it.
_CLIPPING = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
_SMOOTH = (nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish)
_ACTIVATIONS = _CLIPPING + _SMOOTH
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

QUANTIZED_LAYERS = (QuantizedLinear, QuantizedConv1d, QuantizedConv2d)


@dataclass(frozen=True)
class LayerConfig:
    """How one layer and the activations after it are quantized.

    Attributes:
        weight: level set of the weight; None keeps it real.
        activation: level set of the activations; None keeps them real.
        weight_scale: scale rule of the weight; the level set's customary rule if None.
        activation_scale: scale rule of calibration; least squares if None.
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
    """What ``quantize_`` did with each module that it knows; ``repr`` prints it as a table."""

    rows: tuple[tuple[str, str, str, str], ...]

    def __repr__(self) -> str:
        head = ("module", "kind", "levels", "scale")
        widths = [max(len(row[i]) for row in (head, *self.rows)) for i in range(4)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (head, *self.rows)
        ]
        return "\n".join(lines)


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
    """Quantize the Linear, Conv1d, Conv2d and ReLU-like modules of a model, in place.

    Parameters stay the same objects with the same values and names, so an optimizer made before, and
    checkpoints of the float model, stay valid. Activations that follow a weight belong to its layer.

    Args:
        model: any module.
        weight: level set of the weights; None keeps them real.
        activation: level set of the activations; None keeps them real.
        weight_scale: scale rule of the weights; by default the level set's customary one.
        activation_scale: scale rule that calibration uses; by default least squares.
        skip: ``"first"``, ``"last"`` or both: weight layers to keep real, by order of execution.
        overrides: from a pattern of module names (as in :mod:`fnmatch`) to the configuration of the
            weight layers that match, or to None to keep them real. The first match decides.
        example_input: one input, or a tuple of inputs, to find the order of execution with; without
            it the order of registration is taken.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: a level set is not a :class:`LevelSet`.
        ValueError: nothing is asked for, a pattern matches nothing, nothing can be quantized, or the
            model is quantized already.

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
    order = _execution_order(model, example_input)
    configs = _configure(order, base, skip, overrides)
    groups = _group(order, configs)
    if not groups:
        raise ValueError(
            "the model has nothing to quantize: no Linear, Conv1d or Conv2d and no ReLU-like module "
            "remains after skip and overrides. Activations called as functions (F.relu) are not "
            "modules: use nn.ReLU instead"
        )
    _convert(model, order, groups, configs)
    return model


def quantized_layers(model: nn.Module) -> tuple[Layer, ...]:
    """The quantized layers of a model, from the input.

    Raises:
        ValueError: the model has none.
    """
    weights: dict[int, QuantizedLayer] = {}
    activations: dict[int, list[ActivationQuantizer]] = {}
    names: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, QUANTIZED_LAYERS):
            weights[module.weight_quantizer.layer_index] = module
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
            fan_in=0 if weight is None else weight.weight[0].numel(),
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
        elif type(module) in QUANTIZED_TYPES or isinstance(module, _ACTIVATIONS):
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
    if all(c.weight is None and c.activation is None for c in configs):
        raise ValueError("nothing to do: give weight=, activation= or overrides= a level set")
    if isinstance(skip, str) or any(s not in ("first", "last") for s in skip):
        raise ValueError(f"skip takes a sequence of 'first' and 'last', got {skip!r}")
    if any(isinstance(m, WeightQuantizer | ActivationQuantizer) for m in model.modules()):
        raise ValueError("the model is quantized already; start again from the float model")


def _execution_order(
    model: nn.Module, example_input: Tensor | tuple[Any, ...] | None
) -> list[tuple[str, nn.Module]]:
    """Named leaf modules of interest, by first execution; those never executed come last."""
    wanted = {
        module: name
        for name, module in model.named_modules()
        if type(module) in QUANTIZED_TYPES or isinstance(module, _ACTIVATIONS + _BATCH_NORMS)
    }
    if example_input is None:
        return [(name, module) for module, name in wanted.items()]
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
    executed.update({m: name for m, name in wanted.items() if m not in executed})
    return [(name, module) for module, name in executed.items()]


def _configure(
    order: list[tuple[str, nn.Module]],
    base: LayerConfig,
    skip: Sequence[str],
    overrides: Mapping[str, LayerConfig | None],
) -> dict[str, LayerConfig]:
    """The configuration of every module that gets quantized, by name."""
    weights = [name for name, module in order if type(module) in QUANTIZED_TYPES]
    real = {weights[0 if end == "first" else -1] for end in skip if weights}
    unmatched = set(overrides)
    configs = {}
    for name, module in order:
        matches = [pattern for pattern in overrides if fnmatch.fnmatchcase(name, pattern)]
        unmatched.difference_update(matches)
        config = overrides[matches[0]] if matches else base
        if config is None or (not matches and name in real):
            continue
        levels = config.weight if type(module) in QUANTIZED_TYPES else config.activation
        if levels is not None and not isinstance(module, _BATCH_NORMS):
            configs[name] = config
    if unmatched:
        raise ValueError(
            f"no module matches {sorted(unmatched)}; the modules that can be quantized are "
            f"{[name for name, m in order if not isinstance(m, _BATCH_NORMS)]}"
        )
    return configs


@dataclass
class _Group:
    name: str
    weight: str | None
    activations: list[str]


def _group(order: list[tuple[str, nn.Module]], configs: Mapping[str, LayerConfig]) -> list[_Group]:
    """Each weight with the activations that follow it; real weights may lead a layer too."""
    groups: list[_Group] = []
    for name, module in order:
        if type(module) in QUANTIZED_TYPES:
            groups.append(_Group(name, name if name in configs else None, []))
        elif name in configs:
            if not groups:
                groups.append(_Group(name, None, []))
            groups[-1].activations.append(name)
    return [group for group in groups if group.weight or group.activations]


def _convert(
    model: nn.Module,
    order: list[tuple[str, nn.Module]],
    groups: list[_Group],
    configs: Mapping[str, LayerConfig],
) -> None:
    modules = dict(order)
    normalized = {
        name
        for (_, before), (name, _) in zip(order, order[1:], strict=False)
        if isinstance(before, _BATCH_NORMS)
    }
    uncalibrated = []
    for index, group in enumerate(groups):
        if group.weight is not None:
            module, config = modules[group.weight], configs[group.weight]
            _quantize_weight(module, config, group.name, index)
        for name in group.activations:
            quantizer = _activation_quantizer(model, modules[name], configs[name])
            quantizer.layer_name, quantizer.layer_index = group.name, index
            _replace(model, modules[name], quantizer)
            if name not in normalized:
                uncalibrated.append(name)
    if uncalibrated:
        warnings.warn(
            f"no batch norm precedes {uncalibrated}: their scale is a guess until "
            "learnsched.calibrate_(model, batches) has seen data",
            stacklevel=3,
        )


def _quantize_weight(module: nn.Module, config: LayerConfig, name: str, index: int) -> None:
    levels = config.weight
    weight = module.weight
    if levels is None or not isinstance(weight, Tensor):
        raise TypeError(f"{name} has no weight to quantize")
    rule = config.weight_scale or default_weight_rule(levels)
    quantizer = WeightQuantizer(levels, rule, weight)
    quantizer.layer_name, quantizer.layer_index = name, index
    # The class changes rather than the object: hooks, parameters and references to it stay valid.
    module.__class__ = QUANTIZED_TYPES[type(module)]
    module.add_module("weight_quantizer", quantizer)


def _activation_quantizer(
    model: nn.Module, module: nn.Module, config: LayerConfig
) -> ActivationQuantizer:
    levels = config.activation
    if levels is None:
        raise TypeError("no level set for the activation")
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    return ActivationQuantizer(
        levels,
        unit_normal_scale(levels),
        config.activation_scale or LeastSquares("tensor"),
        None if isinstance(module, _CLIPPING) else module,
        like,
    )


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is registered, so that a shared module stays shared."""
    for parent in list(model.modules()):
        if parent is new:
            continue
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)
