"""One message for a name that is not among the choices, and one for what is no whole number."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any


def check_choice(kind: str, name: str, choices: Iterable[str]) -> None:
    """Refuse a name that is not among the choices.

    Args:
        kind: what is named, for the message.
        name: what was given.
        choices: what there is, in the order in which the message lists it.

    Raises:
        ValueError: ``name`` is not among the choices, which the message lists.

    Example:
        >>> check_choice("mode", "mean", ("expectation", "random"))
        Traceback (most recent call last):
        ValueError: unknown mode 'mean'; choose one of expectation, random
    """
    choices = tuple(choices)
    if name not in choices:
        raise ValueError(f"unknown {kind} {name!r}; choose one of {', '.join(choices)}")


def whole_number(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """A whole number as a plain one: NumPy's are welcome.

    Args:
        name: what it is, for the message.
        value: what was given.
        least: the smallest that is allowed.
        most: the largest; None for no bound.

    Raises:
        ValueError: it is no whole number, or out of range.

    Example:
        >>> whole_number("epochs", 2.5)
        Traceback (most recent call last):
        ValueError: epochs must be a whole number of at least 1, got 2.5
    """
    try:
        count = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = None
    if count is None or count < least or (most is not None and count > most):
        range_ = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be a whole number {range_}, got {value!r}")
    return count
