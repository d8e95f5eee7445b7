"""Modules in the place of activation functions that a model calls itself, for ``quantize_`` to take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from learnsched.activation_functions import ACTIVATION_FUNCTIONS
from learnsched.example import Example, hooked, varied
from learnsched.function_traces import WAY_OUT, Looking, first_line, traced
from learnsched.modules import ACTIVATIONS
from learnsched.same_results import Way, all_same, results
from learnsched.traced_forward import Code, with_forward


def activations_to_modules_(model: nn.Module, example_input: Example) -> nn.Module:
    """Make modules of the activation functions that a model calls itself, in place.

    ``F.relu(x)``, ``torch.relu(x)`` or ``x.relu()`` in a ``forward`` becomes a module of its own, which
    :func:`learnsched.quantize_` can take: ``relu_0``, ``relu_1`` and so on of the module whose
    ``forward`` it is. That method is replaced by what ``torch.fx`` traces of it, with its children left
    alone; parameters, buffers, children and other methods are what they were. Functional dropout that
    follows ``self.training``, or a child's, becomes modules too, which are in training where ``self``
    is. Calls at one place of the network, as of a helper that both inputs of a siamese network go
    through, share a module. What else the method decides in Python, or reads from attributes that are
    no tensors, stays as it was at the trace; numbers of tensors it may not read. Arguments that the
    example leaves at their defaults can have no other values afterwards, which is checked. Other
    methods, as ``encode`` where ``model.encode(x)`` is called from outside, keep their functions.

    Args:
        model: any module, before it is quantized.
        example_input: one input, a tuple of inputs, or inputs by name. Afterwards the model must make of
            it what it did before, with the same gradients, in evaluation.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: the model calls no such functions, or one as no module does it, ``torch.fx`` cannot
            trace a method that does, the method writes to attributes or does other things in training
            than in evaluation, it would compute something else than before, the output holds no tensors
            to tell, or gradients cannot be taken, as through reentrant checkpoints. The model is as it
            was.

    Example:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc = nn.Linear(8, 4)
        ...
        ...     def forward(self, x):
        ...         return torch.relu(self.fc(x))
        >>> net = activations_to_modules_(Net(), torch.zeros(1, 8))
        >>> [name for name, _ in net.named_children()]
        ['fc', 'relu_0']
    """
    names = {module: name or "the model itself" for name, module in model.named_modules()}
    callers: dict[nn.Module, set[str]] = {}
    before = results(model, example_input, _watched(model, callers))
    if not callers:
        raise ValueError(
            "the model calls no activation functions itself; quantize_ takes it as it is, if its "
            "activations are modules of torch.nn. One that is written out, as x * torch.sigmoid(x) or a "
            "GELU by tanh, is not recognised: put nn.SiLU() or nn.GELU('tanh') in its place"
        )
    if not before:
        raise ValueError(
            "the model's output holds no tensors that could be compared before and after; let it return "
            "tensors, in collections or dataclasses"
        )
    graphs = {module: traced(module, names[module], given) for module, given in callers.items()}
    others = _other_ways(model, example_input)
    changed: list[tuple[nn.Module, type[nn.Module], list[str]]] = []
    try:
        # From here on the model changes, and back again if anything fails.
        for module, (graph, added) in graphs.items():
            changed.append((module, type(module), list(added)))
            for name, child in added.items():
                module.add_module(name, child.train(module.training))
            module.__class__ = with_forward(type(module), Code.of(graph))
        try:
            after = results(model, example_input)
            again = [(known, results(model, example, way=way)) for example, way, known in others]
        except Exception as error:
            raise ValueError(
                f"what torch.fx traced of {[names[module] for module in callers]} fails on the example "
                f"input ({first_line(error)}); {WAY_OUT}"
            ) from error
        if not all(all_same(*pair) for pair in ((before, after), *again)):
            raise ValueError(
                f"what torch.fx traced of {[names[module] for module in callers]} computes something "
                "else on the example input, or has other gradients: a condition on an argument, "
                f"perhaps, a change in place, torch.no_grad or torch.autocast; {WAY_OUT}"
            )
    except BaseException:
        for module, kind, added_names in changed:
            module.__class__ = kind
            for name in added_names:
                if hasattr(module, name):
                    delattr(module, name)
        raise
    return model


def _other_ways(
    model: nn.Module, example_input: Example
) -> list[tuple[Example, Way, list[Tensor]]]:
    """What else is compared: numbers where the example is constant, and autocast where it works.

    Each with what the model makes of it.
    """
    found: list[tuple[Example, Way, list[Tensor]]] = []
    numbers = varied(example_input)
    if numbers is not None:
        try:
            found.append((numbers, nullcontext, results(model, numbers)))
        except Exception as error:
            raise ValueError(
                "the example input is constant, which tells little, and random numbers in its place "
                f"fail ({first_line(error)}); give real data"
            ) from error
    device = next((p.device.type for p in model.parameters()), "cpu")

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast(device, torch.bfloat16)

    with suppress(Exception):  # a model that does not work there, as on some devices
        found.append((example_input, autocast, results(model, example_input, way=autocast)))
    return found


@contextmanager
def _watched(model: nn.Module, found: dict[nn.Module, set[str]]) -> Iterator[None]:
    """Find the modules whose own code calls activation functions within the block, by their first calls.

    With the names of the arguments that they were called with.
    """
    running: list[nn.Module] = []
    given: dict[nn.Module, set[str]] = {}

    def look(function: Callable[..., Any]) -> None:
        # A module of torch's that is an activation calls its own function.
        if (
            function in ACTIVATION_FUNCTIONS
            and running
            and not isinstance(running[-1], ACTIVATIONS)
        ):
            found[running[-1]] = given[running[-1]]

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        running.append(module)
        names = given.setdefault(module, set())
        with suppress(TypeError, ValueError):  # the call itself will tell
            names.update(inspect.signature(module.forward).bind(*args, **kwargs).arguments)

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        running.pop()

    with hooked(model.modules(), enter, leave), Looking(look):
        yield
