"""Where two configurations differ, to name it to the user."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def differences(before: Any, after: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Key, old and new value of whatever differs, keys of dictionaries in dictionaries with dots.

    Args:
        before: JSON data.
        after: the same; what only one of the two has is None in the other.
        key: of both, in what they are part of.

    Example:
        >>> list(differences({"seed": 0, "mix": {"tasks": 2}}, {"seed": 0, "mix": {"tasks": 4}}))
        [('mix.tasks', 2, 4)]
    """
    if isinstance(before, dict) and isinstance(after, dict):
        for name in before | after:
            whole = f"{key}.{name}" if key else name
            yield from differences(before.get(name), after.get(name), whole)
    elif before != after:
        yield key, before, after
