"""The attributes of a module ahead of what may write to them: to be told of it, and to undo it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, eq=False)
class Attributes:
    """The attributes of a module and its children, and what their collections held."""

    attributes: list[tuple[nn.Module, dict[str, Any]]]
    collections: list[tuple[Any, Any]]

    @classmethod
    def of(cls, module: nn.Module) -> Attributes:
        """As they are now."""
        attributes = [(m, dict(vars(m))) for m in module.modules()]
        values = (value for _, every in attributes for value in every.values())
        held = [(v, copy.copy(v)) for v in values if isinstance(v, list | dict | set)]
        return cls(attributes, held)

    def changed(self) -> list[str]:
        """Names of those that are not what they were."""
        spoiled = {id(now) for now, before in self.collections if not _identical(now, before)}
        return [
            name
            for module, before in self.attributes
            for name in {**vars(module), **before}
            if vars(module).get(name, self) is not before.get(name, self)
            or id(before.get(name)) in spoiled
        ]

    def put_back(self) -> None:
        """Make them what they were."""
        for now, before in self.collections:
            if not _identical(now, before):
                now.clear()
                (now.extend if isinstance(now, list) else now.update)(before)
        for module, before in self.attributes:
            vars(module).clear()
            vars(module).update(before)


def _identical(one: Any, other: Any) -> bool:
    """Whether two collections hold the same objects."""

    def parts(held: Any) -> list[Any]:
        named = isinstance(held, dict)
        return [(k, id(v)) for k, v in held.items()] if named else [*map(id, held)]

    return parts(one) == parts(other)
