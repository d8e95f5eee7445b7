"""Running a model on an example input, and what it is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

# One input, a tuple of inputs, or inputs by name.
Example = Tensor | tuple[Any, ...] | Mapping[str, Any]


def reached(
    model: nn.Module, example_input: Example, modules: Iterable[nn.Module]
) -> set[nn.Module]:
    """Which of the modules the example input reaches; the model stays as it is."""
    found: set[nn.Module] = set()
    with hooked(modules, lambda module, *_: found.add(module)):
        run_example(model, example_input)
    return found


@contextmanager
def hooked(
    modules: Iterable[nn.Module],
    enter: Callable[[nn.Module, Any, Any], None],
    leave: Callable[[nn.Module, Any, Any], Any] | None = None,
) -> Iterator[None]:
    """Hooks ahead of (with arguments by name) and behind the modules' forward, within the block."""
    modules = list(modules)
    handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in modules]
    if leave is not None:
        handles += [module.register_forward_hook(leave) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_example(model: nn.Module, example_input: Example) -> Any:
    """What the model makes of the example input, in evaluation and without a graph."""
    with in_evaluation(model), torch.no_grad():
        return call(model, example_input)


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in evaluation, and is not compiled."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        # Compiled, the model would hand its weights to a graph, outside of its modules.
        with (
            torch.random.fork_rng(devices=[]),  # what it draws is not missed in training
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        for module in training:
            module.training = True


def varied(example_input: Example) -> Example | None:
    """The example with random numbers where its tensors are constant; None where none of them is.

    Of zeros alone all networks make the same, so that nothing can be told from what they make.
    """
    constant = False

    def vary(value: Any) -> Any:
        nonlocal constant
        of_numbers = isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 1
        if not of_numbers or not bool((value == value.flatten()[0]).all()):
            return value
        constant = True
        generator = torch.Generator("cpu").manual_seed(0)
        drawn = torch.randn(value.shape, generator=generator, device="cpu")
        return value + drawn.to(value)

    if isinstance(example_input, Mapping):
        found: Example = {name: vary(value) for name, value in example_input.items()}
    elif isinstance(example_input, tuple):
        found = tuple(map(vary, example_input))
    else:
        found = vary(example_input)
    return found if constant else None


def call(model: nn.Module, example_input: Example) -> Any:
    """What the model makes of the example input."""
    if isinstance(example_input, Mapping):
        return model(**example_input)
    return model(*example_input if isinstance(example_input, tuple) else (example_input,))


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a value: alone, in nested collections, in attributes of plain objects."""
    seen: set[int] = set()
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            yield value
        elif id(value) not in seen:
            seen.add(id(value))
            pending += reversed(_parts(value))


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, type | nn.Module | Callable):  # type: ignore[arg-type]
        return []
    if is_dataclass(value):
        return [getattr(value, field.name) for field in fields(value)]
    return list(getattr(value, "__dict__", {}).values())
