"""What a scheduler's state tells of policies and level sets, snapshots of it, checks of a loaded one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from learnsched.levels import LevelSet
from learnsched.scales import ScaleRule
from learnsched.schedule import Policy


def spelled(levels: LevelSet) -> str:
    """A level set in words; of more than four levels, its ends."""
    if len(levels.values) <= 4:
        return f"{levels.name} {levels.values} from {levels.thresholds}"
    low, high = levels.values[0], levels.values[-1]
    return f"{levels.name} {len(levels.values)} from {low:g} to {high:g}"


def description(thing: Policy | ScaleRule) -> str:
    """Of a policy or a scale rule and its parameters, if it has a ``repr`` of its own; else its name."""
    if name := getattr(thing, "__qualname__", None):  # a function's ``repr`` holds an address
        return str(name)
    described = type(thing).__repr__ is not object.__repr__
    return repr(thing) if described else type(thing).__name__


def check_complete(
    epoch: int, epochs: int, layers: int, settings: Sequence[Any], metrics: Sequence[Any]
) -> None:
    """Whether the parts of a state fit each other and a run of so many epochs and layers.

    Raises:
        ValueError: they do not.
    """
    rows = min(epoch + 1, epochs)
    if not 0 <= epoch <= epochs or len(metrics) != epoch:
        raise ValueError(f"epoch {epoch} of {epochs}, with {len(metrics)} rows of metrics")
    if [len(row) for row in settings] != [layers] * rows:
        raise ValueError(f"settings must be of {rows} epochs and {layers} layers")


def snapshot(state: Any) -> Any:
    """A policy's state with tensors, dictionaries and lists of its own."""
    if isinstance(state, Mapping):
        return {name: snapshot(value) for name, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(snapshot(value) for value in state)
    return state.detach().clone() if isinstance(state, Tensor) else state


def as_own(state: Any, own: Any) -> Any:
    """A policy's state on the device and of the dtype of its own, whatever file it comes from.

    Raises:
        ValueError: there is none where there should be, or the reverse; a part of it is missing; or a
            tensor has another shape.
    """
    if (state is None) != (own is None):
        raise ValueError(f"the policy's state is {state!r}")
    if isinstance(own, Mapping):
        if not (isinstance(state, Mapping) and own.keys() <= state.keys()):
            raise ValueError(f"the policy's state needs {', '.join(own)}")
        return {**state, **{name: as_own(state[name], value) for name, value in own.items()}}
    if not isinstance(own, Tensor):
        return snapshot(state)
    if not isinstance(state, Tensor) or state.shape != own.shape:
        raise ValueError(f"a tensor of the policy's state must have the shape {tuple(own.shape)}")
    return state.detach().to(own, copy=True)
