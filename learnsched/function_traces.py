"""What torch.fx traces of a module's own code, with modules for the activation functions it calls."""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from learnsched.activation_functions import ACTIVATION_FUNCTIONS
from learnsched.attributes import Attributes
from learnsched.traced_forward import restore_arguments

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
WAY_OUT = (
    "make it a module there (self.relu = nn.ReLU(), one for each place), or change other parts alone: "
    "learnsched.activations_to_modules_(model.encoder, its_input)"
)


def first_line(error: Exception) -> str:
    """What an error says first, or its kind."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class Looking(TorchFunctionMode):
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


class _Flat(fx.Tracer):
    """Traces one module's own code; its children are calls."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _refuse_reads(function: Callable[..., Any]) -> None:
    """Refuse that a trace reads the number of a tensor, which would stay what it is at the trace."""
    if getattr(function, "__name__", "") in _READS:
        raise ValueError("it reads a number from a tensor, which may change later")


def traced(module: nn.Module, name: str, given: set[str]) -> tuple[fx.Graph, dict[str, nn.Module]]:
    """What a module's forward does with modules for functions, and those modules by name."""
    if "forward" in vars(module):
        raise ValueError(f"the forward of {name} was replaced on the module itself; {WAY_OUT}")
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        raise ValueError(
            f"{name} is a {type(module).__name__}, which takes its activation as a module: make it with "
            "activation=nn.ReLU()"
        )
    graph, evaluated = (_trace_in(mode, module, name, given) for mode in (True, False))
    nodes, others = list(graph.nodes), list(evaluated.nodes)
    if [_call(node) for node in nodes] != [_call(node) for node in others]:
        raise ValueError(
            f"the forward of {name} does other things in training than in evaluation; {WAY_OUT}"
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
            with Looking(_refuse_reads):
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
            f"activation function ({first_line(error)}); {WAY_OUT}. A forward can be traced that does "
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
    return ValueError(f"{name} calls {_word(node)} with what a module cannot be given; {WAY_OUT}")


def _word(node: fx.Node) -> str:
    """The function's name, such as ``relu``."""
    return str(getattr(node.target, "__name__", node.target)).rstrip("_")
