"""What a user should know of a conversion, before it is made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

from learnsched.choose import Chosen
from learnsched.execution import Execution, size_of
from learnsched.left_real import notes_on_what_stays_real
from learnsched.modules import ACTIVATIONS, CLIPPING, QUANTIZED_TYPES

# Root mean squares of what a batch norm puts out for which the initial scale is good enough.
_USUAL_SIZES = (0.5, 2.0)
# So many times as many weights a row as levels: that few values are no accident.
_MANY = 4


def notes_ahead(model: nn.Module, found: Execution, chosen: Chosen) -> Iterator[str]:
    """What a user should know of what is chosen, before it is converted."""
    order = found.order
    activations = [n for n, module in order if n in chosen and type(module) in ACTIVATIONS]
    modules = dict(order)
    sizes = {n: size_of(found.normalized[n]) for n in activations if n in found.normalized}
    low, high = _USUAL_SIZES
    if unusual := [f"{n} ({size:.2g})" for n, size in sizes.items() if not low < size < high]:
        yield (
            f"the batch norms ahead of {unusual} put out values of that root mean square, and scales "
            "are made for 1: call learnsched.calibrate_(model, batches) before training goes on"
        )
    uncalibrated = [name for name in activations if name not in found.normalized]
    if uncalibrated:
        yield (
            f"no batch norm precedes {uncalibrated}: their scale is a guess until "
            "learnsched.calibrate_(model, batches) has seen data; from random weights, learn it from "
            "there with learnsched.learn_scales_(model)"
        )
    used = Counter(found.calls)
    if several := [name for name in uncalibrated if used[name] > 1]:
        yield (
            f"{several} are used several times each, where one scale must serve all; without a batch "
            "norm ahead, give each place a module of its own"
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
    if found.clamps and activations:
        yield (
            f"the model rectifies with {', '.join(found.clamps)}, whose results stay real; where these "
            "are activations, use nn.ReLU"
        )
    if last := [name for name in found.outputs if name in chosen]:
        levels = len(chosen[last[0]][0].values)
        yield (
            f"the model puts out what {last} make, quantized: {levels} different numbers. Where that is "
            f"no hidden activation, keep it real with overrides={{{last[0]!r}: None}}"
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
    if finished := [
        name
        for name, (levels, _) in chosen.items()
        if type(module := modules[name]) in QUANTIZED_TYPES
        and _has_few_values(getattr(module, "weight", None), len(levels.values))
    ]:
        yield (
            f"the weights of {finished} have no more different values than there are levels, as those "
            "that finalize_ has put there; quantized anew they get the scale that its rule gives, which "
            "is another. Keep finished layers real, with overrides={name: None}"
        )
    weights = any(type(modules[name]) in QUANTIZED_TYPES for name in chosen)
    yield from notes_on_what_stays_real(model, found.products, weights=weights)


def _has_few_values(weight: Any, levels: int) -> bool:
    """Whether some row of a weight, and every row, has at most so many different values, of many."""
    if not isinstance(weight, nn.Parameter) or weight.numel() == 0:
        return False
    rows = weight.detach().flatten(1)
    # The first row alone tells of nearly every weight that it has more.
    if rows.shape[1] < _MANY * levels or len(rows[0].unique()) > levels:
        return False
    few = all(len(row.unique()) <= levels for row in rows)
    return few and bool((rows != rows[:, :1]).any())


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
