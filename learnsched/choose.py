"""Which modules of a model are quantized, and how."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset

from learnsched.example import Example
from learnsched.execution import RECURRENT, Execution, execution
from learnsched.layers import is_quantized
from learnsched.left_real import notes_on_what_stays_real
from learnsched.levels import LevelSet, check_level_set
from learnsched.modules import ACTIVATIONS, BATCH_NORMS, QUANTIZED_TYPES, check_module, stays_real
from learnsched.scales import ScaleRule

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
    example_input: Example | None,
) -> tuple[Execution, Chosen]:
    """What the example input shows of the model, and what is chosen of it to quantize.

    Arguments and errors are those of :func:`learnsched.quantize_`; the model is left as it is.
    """
    _check_request(model, base, skip, overrides)
    if isinstance(example_input, DataLoader | Dataset):
        raise TypeError(
            "example_input is what the model takes, as of one batch: x, _ = next(iter(loader)); got a "
            f"{type(example_input).__name__}"
        )
    found = execution(model, example_input)
    _check_overrides(model, found.order, overrides)
    chosen = _configure(found, base, skip, overrides, ordered=example_input is not None)
    _check_found(model, found, chosen, base, overrides)
    return found, chosen


def _check_request(
    model: nn.Module,
    base: LayerConfig,
    skip: Sequence[str],
    overrides: Mapping[str, LayerConfig | None],
) -> None:
    check_module(model)
    if not isinstance(overrides, Mapping):
        raise TypeError(
            "overrides map patterns of module names to LayerConfig or None, such as {'head.*': None}; "
            f"got {overrides!r}"
        )
    configs = [base, *(c for c in overrides.values() if c is not None)]
    for config in configs:
        if not isinstance(config, LayerConfig):
            raise TypeError(
                f"overrides map patterns to LayerConfig or None, got {type(config).__name__}"
            )
        for levels in (config.weight, config.activation):
            if levels is not None:
                check_level_set(levels)
        if config.weight is not None and not config.weight.is_idempotent:
            raise ValueError(
                f"the levels {config.weight.values} of weights must lie inside their own cells, off the "
                f"thresholds {config.weight.thresholds}: frozen weights would fall to other levels"
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
    if is_quantized(model):
        raise ValueError("the model is quantized already; start again from the float model")
    hidden = [
        f"{name}.{own}".lstrip(".")
        for name, module in model.named_modules()
        for own in module._modules
        if own in vars(module)
    ]
    if hidden:
        raise ValueError(
            f"{hidden} are modules that attributes of the same name hide, as copies of "
            "nn.TransformerDecoderLayer do, which compute F.relu whatever they were given; take the "
            "attribute away, del vars(layer)['activation'], where the module is meant"
        )
    if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        raise ValueError("the model has lazy modules; run a batch through it first")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "the model is on the meta device, where weights have no values to fit scales to; "
            "materialize it first: model.to_empty(device=...), then load or initialize its weights"
        )


def _check_overrides(
    model: nn.Module,
    order: list[tuple[str, nn.Module]],
    overrides: Mapping[str, LayerConfig | None],
) -> None:
    """Refuse patterns that match nothing, and warn of those whose configuration would change nothing."""
    known = [(name, module) for name, module in order if not isinstance(module, BATCH_NORMS)]
    unmatched = []
    for pattern, config in overrides.items():
        matched = [
            module
            for name, module in known
            # To keep real what stays real is no mistake.
            if fnmatch.fnmatchcase(name, pattern) and (config is None or not stays_real(module))
        ]
        of_weights = any(type(module) in QUANTIZED_TYPES for module in matched)
        weight_alone = (
            config is not None and config.weight is not None and config.activation is None
        )
        if not matched:
            unmatched.append(pattern)
        elif weight_alone and not of_weights:
            warnings.warn(
                f"the override {pattern!r} has a level set for weights and none for activations, and "
                "matches activations alone, which stay real; was the weight's layer meant?",
                stacklevel=4,
            )
    if unmatched:
        names = {module: name for name, module in known}
        others = [
            f"{alias!r} is {names[module]!r}, by its first name"
            for alias, module in model.named_modules(remove_duplicate=False)
            if module in names and any(fnmatch.fnmatchcase(alias, p) for p in unmatched)
        ]
        raise ValueError(
            f"no module matches {sorted(unmatched)}; the modules that can be quantized are "
            f"{[name for name, module in known if not stays_real(module)]}"
            f"{'; ' if others else ''}{', '.join(others)}"
        )


def _configure(
    found: Execution,
    base: LayerConfig,
    skip: Sequence[str],
    overrides: Mapping[str, LayerConfig | None],
    *,
    ordered: bool,
) -> Chosen:
    """Level set and scale rule of every module that gets quantized.

    Only in order of execution are activations behind last layers that stay real the network's output.
    """
    # An end that stays real in any case is an end all the same.
    weights = [
        name
        for name, module in found.order[: found.executed]
        if type(module) in QUANTIZED_TYPES or isinstance(module, RECURRENT) or stays_real(module)
    ]
    real = {weights[0 if end == "first" else -1] for end in skip if weights}
    ends = {*weights[-1:], *found.ends} if ordered and "last" in skip else set()
    if "last" in skip:  # each of several heads is one
        real |= {*found.heads, *found.ends} & {*weights}
    configs: Chosen = {}
    following = base
    behind: dict[str, LayerConfig] = {}  # what the activations get that follow a weight
    for index, (name, module) in enumerate(found.order):
        if index == found.executed:
            following = base
        if isinstance(module, BATCH_NORMS):
            continue
        if stays_real(module):
            following = behind[name] = replace(base, activation=None) if name in ends else base
            continue
        is_weight = type(module) in QUANTIZED_TYPES
        config: LayerConfig | None = base if is_weight else following
        if name in real:
            config = None
        for pattern, own in overrides.items():
            if fnmatch.fnmatchcase(name, pattern):
                config = own
                break
        if is_weight:
            following = config or (replace(base, activation=None) if name in ends else base)
            behind[name] = following
        if config is None:
            continue
        if isinstance(module, RECURRENT):
            if config.weight is None:
                continue
            raise ValueError(
                f"{name or 'the model'} is a recurrent layer ({type(module).__name__}), whose weights "
                f"cannot be quantized; keep it real with overrides={{{name!r}: None}}"
            )
        levels = config.weight if is_weight else config.activation
        if levels is not None:
            rule = config.weight_scale if is_weight else config.activation_scale
            configs[name] = levels, rule
    _warn_of_shared(found, configs, behind, overrides)
    return configs


def _warn_of_shared(
    found: Execution,
    chosen: Chosen,
    behind: Mapping[str, LayerConfig],
    overrides: Mapping[str, LayerConfig | None],
) -> None:
    """Warn of activations that are used behind several weights, and would be another one there."""
    own = {
        name
        for name, module in found.order
        if type(module) in ACTIVATIONS
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in overrides)
    }
    differing: dict[str, str] = {}
    ahead = None
    for name in found.calls:
        if name in behind:
            ahead = name
        elif name in own and ahead is not None:
            config = behind[ahead]
            levels = config.activation
            wanted = None if levels is None else (levels, config.activation_scale)
            if chosen.get(name) != wanted:
                differing[name] = ahead
    for name, ahead in differing.items():
        levels = None if name not in chosen else chosen[name][0]
        warnings.warn(
            f"{name} is used several times, and stays {'real' if levels is None else levels.name} "
            f"behind {ahead}, too, for which other levels are asked for; use an activation module of "
            f"its own there, or override {name!r} itself",
            stacklevel=5,
        )


def _check_found(
    model: nn.Module,
    found: Execution,
    configs: Chosen,
    base: LayerConfig,
    overrides: Mapping[str, LayerConfig | None],
) -> None:
    """Refuse what was asked for and would change nothing."""
    quantized = [type(module) in QUANTIZED_TYPES for name, module in found.order if name in configs]
    asked = [base, *(c for c in overrides.values() if c is not None)]
    if any(c.weight is not None for c in asked) and True not in quantized:
        others = notes_on_what_stays_real(model, found.products, weights=True)
        raise ValueError(
            "; ".join(
                (
                    f"no weight is left to quantize: no {_names(QUANTIZED_TYPES)} of torch.nn remains "
                    "after skip and overrides",
                    *others,
                )
            )
        )
    if any(c.activation is not None for c in asked) and False not in quantized:
        raise ValueError(
            f"no activation is left to quantize: the model holds none of {_names(ACTIVATIONS)}, or none "
            "remains after overrides. Activations called as functions (F.relu) are not modules: call "
            "learnsched.activations_to_modules_(model, example_input) first, use nn.ReLU instead, or "
            "leave activation= out. One that is written out, as x * torch.sigmoid(x) or a GELU by tanh, "
            "is not recognised: put nn.SiLU() or nn.GELU('tanh') in its place"
        )


def _names(types: Iterable[type[nn.Module]]) -> str:
    return ", ".join(kind.__name__ for kind in types)
