"""Which modules of a model are quantized, and how."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from learnsched.levels import LevelSet
from learnsched.modules import ACTIVATIONS, BATCH_NORMS, QUANTIZED_TYPES
from learnsched.quantizers import ActivationQuantizer, WeightQuantizer
from learnsched.scales import ScaleRule

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)

# Level set and scale rule of each module to quantize, by name.
Chosen = dict[str, tuple[LevelSet, ScaleRule | None]]


@dataclass(frozen=True)
class LayerConfig:
    """How one layer and the activations after it are quantized.

    Attributes:
        weight: level set of the weight; None keeps it real.
        activation: level set of the activations; None keeps them real.
        weight_scale: scale rule of the weight; the level set's customary rule if None.
        activation_scale: scale rule of calibration; least squares if None.

    Example:
        >>> from learnsched import binary, quantize_, ternary
        >>> from learnsched.layers import quantized_layers
        >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> net = quantize_(net, ternary(), overrides={"2": LayerConfig(weight=binary())})
        >>> [layer.info.weight_levels for layer in quantized_layers(net)]
        [3, 2]
    """

    weight: LevelSet | None = None
    activation: LevelSet | None = None
    weight_scale: ScaleRule | None = None
    activation_scale: ScaleRule | None = None


def choose(
    model: nn.Module,
    base: LayerConfig,
    skip: Sequence[str],
    overrides: Mapping[str, LayerConfig | None],
    example_input: Tensor | tuple[Any, ...] | None,
) -> tuple[list[tuple[str, nn.Module]], int, Chosen]:
    """The modules of interest in their order, and what is chosen for those to quantize.

    The number is of those that the example input reaches, which come first.

    Arguments and errors are those of :func:`learnsched.quantize_`; the model is left as it is.
    """
    _check_request(model, base, skip, overrides)
    order, executed = _execution_order(model, example_input)
    chosen = _configure(order, executed, base, skip, overrides)
    _check_found(order, chosen, base, overrides)
    return order, executed, chosen


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
        or (name and type(module) in ACTIVATIONS)
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
