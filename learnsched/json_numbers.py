"""Numbers in JSON, which has no NaN, nor infinity: they are written as words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_WORDS = ("nan", "inf", "-inf")


def as_json(row: Mapping[str, float]) -> dict[str, float | str]:
    """Numbers by name, as strict JSON can hold them.

    Example:
        >>> as_json({"loss": float("nan"), "step": 3})
        {'loss': 'nan', 'step': 3}
    """
    return {name: value if math.isfinite(value) else str(value) for name, value in row.items()}


def from_json(row: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of :func:`as_json`; what is no number stays what it is.

    Example:
        >>> from_json({"loss": "-inf", "step": 3})
        {'loss': -inf, 'step': 3}
    """
    return {name: float(v) if v in _WORDS else v for name, v in row.items()}
