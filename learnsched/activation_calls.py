"""Modules in the place of activation functions that a model calls itself, for ``quantize_`` to take."""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from learnsched.attributes import Attributes
from learnsched.execution import (
    ACTIVATION_FUNCTIONS,
    Example,
    call,
    hooked,
    in_evaluation,
    tensors,
    varied,
)
from learnsched.modules import ACTIVATIONS
from learnsched.traced_forward import Code, restore_arguments, with_forward

_METHODS: Mapping[str, type[nn.Module] | None] = {
    "relu": nn.ReLU, "relu_": nn.ReLU, "prelu": None,
}  # fmt: skip
_DROPOUTS: Mapping[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
}
# Methods of a tensor that give numbers of Python's.
_READS = ("item", "tolist", "__float__", "__int__", "__bool__", "__index__", "__complex__")
_Way = Callable[[], AbstractContextManager[Any]]
_WAY_OUT = (
    "make it a module there (self.relu = nn.ReLU(), one for each place), or change other parts alone: "
    "learnsched.activations_to_modules_(model.encoder, its_input)"
)


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
        ...         return F.relu(self.fc(x))
        >>> net = activations_to_modules_(Net(), torch.zeros(1, 8))
        >>> [name for name, _ in net.named_children()]
        ['fc', 'relu_0']
    """
    names = {module: name or "the model itself" for name, module in model.named_modules()}
    callers: dict[nn.Module, set[str]] = {}
    before = _results(model, example_input, _watched(model, callers))
    if not callers:
        raise ValueError(
            "the model calls no activation functions itself; quantize_ takes it as it is, if its "
            "activations are modules"
        )
    if not before:
        raise ValueError(
            "the model's output holds no tensors that could be compared before and after; let it return "
            "tensors, in collections or dataclasses"
        )
    traced = {module: _traced(module, names[module], given) for module, given in callers.items()}
    others = _other_ways(model, example_input)
    changed: list[tuple[nn.Module, type[nn.Module], list[str]]] = []
    try:
        # From here on the model changes, and back again if anything fails.
        for module, (graph, added) in traced.items():
            changed.append((module, type(module), list(added)))
            for name, child in added.items():
                module.add_module(name, child.train(module.training))
            module.__class__ = with_forward(type(module), Code.of(graph))
        try:
            after = _results(model, example_input)
            again = [(known, _results(model, example, way=way)) for example, way, known in others]
        except Exception as error:
            raise ValueError(
                f"what torch.fx traced of {[names[module] for module in callers]} fails on the example "
                f"input ({_first_line(error)}); {_WAY_OUT}"
            ) from error
        if not all(_all_same(*pair) for pair in ((before, after), *again)):
            raise ValueError(
                f"what torch.fx traced of {[names[module] for module in callers]} computes something "
                "else on the example input, or has other gradients: a condition on an argument, "
                f"perhaps, a change in place, torch.no_grad or torch.autocast; {_WAY_OUT}"
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
) -> list[tuple[Example, _Way, list[Tensor]]]:
    """What else is compared: numbers where the example is constant, and autocast where it works.

    Each with what the model makes of it.
    """
    found: list[tuple[Example, _Way, list[Tensor]]] = []
    numbers = varied(example_input)
    if numbers is not None:
        try:
            found.append((numbers, nullcontext, _results(model, numbers)))
        except Exception as error:
            raise ValueError(
                "the example input is constant, which tells little, and random numbers in its place "
                f"fail ({_first_line(error)}); give real data"
            ) from error
    device = next((p.device.type for p in model.parameters()), "cpu")

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast(device, torch.bfloat16)

    with suppress(Exception):  # a model that does not work there, as on some devices
        found.append((example_input, autocast, _results(model, example_input, way=autocast)))
    return found


def _results(
    model: nn.Module,
    example_input: Example,
    watch: AbstractContextManager[None] | None = None,
    way: _Way = nullcontext,
) -> list[Tensor]:
    """Outputs and gradients: a trace forgets, among others, where a method went without gradients."""
    # Gradients too, since checkpoints compute activations again for them.
    with in_evaluation(model), torch.enable_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        with watch or nullcontext(), way():
            outputs = list(tensors(call(model, example_input)))
        gradients = _gradients(model, outputs)
    none = torch.empty(0)
    return [
        *(out.detach().clone() for out in outputs),
        *(none if gradient is None else gradient for gradient in gradients),
    ]


def _gradients(model: nn.Module, outputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Gradients of the parameters, which keep their own."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses = [out.abs().square().sum() for out in outputs if out.requires_grad]
    if not losses or not parameters:
        return ()
    try:
        return torch.autograd.grad(losses, parameters, allow_unused=True)
    except RuntimeError as error:
        raise ValueError(
            "the model's gradients, which must be the same afterwards, cannot be taken "
            f"({_first_line(error)}); give torch.utils.checkpoint use_reentrant=False"
        ) from error


def _all_same(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    return len(before) == len(after) and all(map(_same, before, after))


def _same(one: Tensor, other: Tensor) -> bool:
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and torch.equal(one.nan_to_num(), other.nan_to_num())


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class _Looking(TorchFunctionMode):
    """Calls ``look`` with every function of torch ahead of its call."""

    def __init__(self, look: Callable[[Callable[..., Any]], None]) -> None:
        super().__init__()
        self._look = look

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self._look(func)
        return func(*args, **(kwargs or {}))


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

    with hooked(model.modules(), enter, leave), _Looking(look):
        yield


class _Flat(fx.Tracer):
    """Traces one module's own code; its children are calls."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _refuse_reads(function: Callable[..., Any]) -> None:
    """Refuse that a trace reads the number of a tensor, which would stay what it is at the trace."""
    if getattr(function, "__name__", "") in _READS:
        raise ValueError("it reads a number from a tensor, which may change later")


def _traced(module: nn.Module, name: str, given: set[str]) -> tuple[fx.Graph, dict[str, nn.Module]]:
    """What a module's forward does with modules for functions, and those modules by name."""
    if "forward" in vars(module):
        raise ValueError(f"the forward of {name} was replaced on the module itself; {_WAY_OUT}")
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        raise ValueError(
            f"{name} is a {type(module).__name__}, which takes its activation as a module: make it with "
            "activation=nn.ReLU()"
        )
    graph, evaluated = (_trace_in(mode, module, name, given) for mode in (True, False))
    nodes, others = list(graph.nodes), list(evaluated.nodes)
    if [_call(node) for node in nodes] != [_call(node) for node in others]:
        raise ValueError(
            f"the forward of {name} does other things in training than in evaluation; {_WAY_OUT}"
        )
    # Before a node changes, since its name is an argument of later ones.
    origins = _origins(nodes)
    places = [
        (node, own)
        for node, other in zip(nodes, others, strict=True)
        if (own := _dropout(node, other, name) or _activation(node, name)) is not None
    ]
    added: dict[str, nn.Module] = {}
    of_origin: dict[int, str] = {}
    for node, own in places:
        place = of_origin.get(origins[node])
        if place is None:
            free = (f"{_word(node)}_{number}" for number in itertools.count())
            place = next(n for n in free if n not in added and not hasattr(module, n))
            added[place], of_origin[origins[node]] = own, place
        with graph.inserting_before(node):
            source = node.args[0] if node.args else node.kwargs["input"]
            call = graph.call_module(place, (source,))
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    graph.lint()
    return graph, added


def _origins(nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """What each node computes, back to the nearest modules: alike where one place is computed twice."""
    found: dict[fx.Node, int] = {}
    numbers: dict[Hashable, int] = {}
    for node in nodes:
        called: tuple[Any, ...] = (node.op, node.target)
        if node.op in ("call_function", "call_method"):
            # Numbers, where names of nodes differ from call to call.
            called += (str(fx.map_arg((node.args, dict(node.kwargs)), found.__getitem__)),)
        found[node] = numbers.setdefault(called, len(numbers))
    return found


def _trace_in(training: bool, module: nn.Module, name: str, given: set[str]) -> fx.Graph:
    """The graph of a module's own code in training, or in evaluation."""
    # The children too, since a forward may ask for their flags.
    usual = {m: m.training for m in module.modules()}
    try:
        for m in usual:
            m.training = training
        return _trace(module, name, given)
    finally:
        for m, flag in usual.items():
            m.training = flag


def _trace(module: nn.Module, name: str, given: set[str]) -> fx.Graph:
    """The graph of a module's own code, with the arguments that are not given at their defaults."""
    parameters = inspect.signature(module.forward).parameters.values()
    defaults = {
        p.name: p.default
        for p in parameters
        if p.name not in given and isinstance(p.default, int | float | str | None)
    }
    before, drawn = Attributes.of(module), _random_states()
    try:
        forgotten = "it checkpoints activations, or packs them otherwise, which a trace forgets"
        with (
            torch.random.fork_rng(devices=[]),
            torch.autograd.graph.disable_saved_tensors_hooks(forgotten),
        ):
            with _Looking(_refuse_reads):
                graph = _Flat().trace(module, concrete_args=defaults or None)
            states = _random_states()
        if states != drawn:
            raise ValueError("it draws random numbers, by which it may decide what to do")
        if written := before.changed():
            constants = all(name.startswith("_tensor_constant") for name in written)
            what = "makes a tensor of its own" if constants else "writes to attributes"
            raise ValueError(f"it {what}, {written}")
        restore_arguments(graph, defaults)
        return graph
    # A forward may fail under a trace in any way.
    except Exception as error:
        raise ValueError(
            f"torch.fx cannot trace the forward of {name} ({type(module).__name__}), which calls an "
            f"activation function ({_first_line(error)}); {_WAY_OUT}. A forward can be traced that does "
            "not decide by values and has its tensors from register_buffer or others (x.new_zeros)"
        ) from error
    finally:
        before.put_back()


def _random_states() -> tuple[Any, ...]:
    """Of the generators that a forward may draw from."""
    numpy: Any = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2:]


def _call(node: fx.Node) -> tuple[Any, ...]:
    """What is called and with what, but for whether a dropout drops."""
    if node.target in _DROPOUTS:
        arguments = {k: v for k, v in _arguments(node).items() if k != "training"}
        return node.target, str(arguments)
    return node.op, node.target, str(node.args), str(node.kwargs)


def _arguments(node: fx.Node) -> dict[str, Any]:
    bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    bound.apply_defaults()
    return bound.arguments


def _dropout(node: fx.Node, evaluated: fx.Node, name: str) -> nn.Module | None:
    """The module that does what a call of a functional dropout does, if that drops in training alone."""
    if node.target not in _DROPOUTS:
        return None
    kind, arguments = _DROPOUTS[node.target], _arguments(node)
    # As text, since one graph's nodes never equal the other's.
    if str(arguments["training"]) == str(_arguments(evaluated)["training"]):
        return None
    if any(isinstance(arguments[key], fx.Node) for key in ("p", "training", "inplace")):
        raise _not_for_a_module(node, name)
    if kind is nn.AlphaDropout and arguments["inplace"]:
        raise ValueError(
            f"{name} calls alpha_dropout in place, and nn.AlphaDropout never works in place; use its "
            "result instead (x = F.alpha_dropout(x, p, self.training))"
        )
    # In place where the call is, since its result may be unused.
    return kind(arguments["p"], arguments["inplace"])


def _activation(node: fx.Node, name: str) -> nn.Module | None:
    """The module that does what a call of an activation function does, if the node is one."""
    kind: type[nn.Module] | None
    if node.op == "call_method" and node.target in _METHODS:
        kind = _METHODS[str(node.target)]
    elif callable(node.target) and node.target in ACTIVATION_FUNCTIONS:
        kind = ACTIVATION_FUNCTIONS[node.target]
    else:
        return None
    options = {k: v for k, v in node.kwargs.items() if k not in ("input", "inplace")}
    computed = any(isinstance(value, fx.Node) for value in (*node.args[1:], *options.values()))
    if kind is None or computed:
        raise _not_for_a_module(node, name)
    own: Any = kind(*node.args[1:], **options)
    if hasattr(own, "inplace"):
        own.inplace = False
    return own  # type: ignore[no-any-return]


def _not_for_a_module(node: fx.Node, name: str) -> ValueError:
    return ValueError(f"{name} calls {_word(node)} with what a module cannot be given; {_WAY_OUT}")


def _word(node: fx.Node) -> str:
    """The function's name, such as ``relu``."""
    return str(getattr(node.target, "__name__", node.target)).rstrip("_")
