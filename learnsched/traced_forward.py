"""Forwards that torch.fx has written, as methods of modules that can be copied and pickled."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import fx, nn


@dataclass(frozen=True)
class Code:
    """A forward as torch.fx has written it: data, for copies and pickles.

    Attributes:
        source: the method.
        objects: what it refers to, by name.
        modules: full names of Python modules that it refers to, by name; such cannot be copied.
    """

    source: str
    objects: dict[str, Any]
    modules: dict[str, str]

    @classmethod
    def of(cls, graph: fx.Graph) -> Code:
        """The code of a graph."""
        code = graph.python_code("self")
        modules = {n: v.__name__ for n, v in code.globals.items() if isinstance(v, ModuleType)}
        objects = {n: v for n, v in code.globals.items() if n not in modules}
        return cls(code.src, objects, modules)

    def method(self) -> Any:
        """The method, ready to run."""
        modules = {name: importlib.import_module(path) for name, path in self.modules.items()}
        scope: dict[str, Any] = {**modules, **self.objects}
        exec(self.source, scope)  # there is no other way to run a graph as fast
        return scope["forward"]


def restore_arguments(graph: fx.Graph, defaults: Mapping[str, Any]) -> None:
    """Give arguments that a trace took at their defaults their names back, and checks that say so."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    # What torch.fx makes of an argument's name, and its own check.
    traced = {node.target: node for node in placeholders}
    for name, default in defaults.items():
        node = traced[f"{name}_1"]
        for use in (*(u for user in node.users for u in user.users), *node.users):
            graph.erase_node(use)
        node.target = name
        with graph.inserting_after(placeholders[-1]):
            graph.call_function(check_default, (name, node, default))


def check_default(name: str, value: Any, default: Any) -> None:
    """Refuse an argument that a trace took at its default, where it has another value.

    Raises:
        ValueError: it has.
    """
    if not isinstance(value, int | float | str | None) or value != default:
        raise ValueError(
            f"`{name}` was left at its default in the example input of activations_to_modules_; pass it "
            "there"
        )


def with_forward(kind: type[nn.Module], code: Code) -> type[nn.Module]:
    """A subclass with another forward."""

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        _, _, *state = tuple(kind.__reduce_ex__(self, protocol))
        return _bare, (kind, code), *state

    members = {
        "forward": code.method(),
        "__reduce_ex__": reduce,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
    }
    return type(kind.__name__, (kind,), members)


def _bare(kind: type[nn.Module], code: Code) -> nn.Module:
    """A module without its state, which whoever copies or unpickles it puts in."""
    own = with_forward(kind, code)
    return own.__new__(own)
