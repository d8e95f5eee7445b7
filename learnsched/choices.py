"""One message for a name that is not among the choices."""

from __future__ import annotations

from collections.abc import Iterable


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
