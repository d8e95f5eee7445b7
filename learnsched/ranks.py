"""Metrics and counts of the ranks that train one model in parallel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed

from learnsched.history import as_numbers


def over_ranks(metrics: Any, counted: int, group: Any) -> tuple[dict[str, float], int]:
    """Means of metrics that all ranks have, as plain numbers, and the most that one has counted.

    Args:
        metrics: of this rank, by name.
        counted: what this rank has counted.
        group: a process group; None is this process alone.

    Raises:
        TypeError: metrics are not given by name, or one is no number, on this rank or another: all
            ranks raise it, as one that is left alone would wait for the others.
    """
    if group is None:
        return as_numbers(metrics), counted
    mine: Mapping[str, float] | str
    try:
        mine = as_numbers(metrics)
    except TypeError as error:
        mine = str(error)
    ranks = torch.distributed.get_world_size(group)
    parts: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(parts, (mine, counted), group=group)
    for rank, (part, _) in enumerate(parts):
        if isinstance(part, str):
            raise TypeError(f"on rank {rank}, {part}")
    common = [name for name in parts[0][0] if all(name in part for part, _ in parts)]
    means = {name: sum(part[name] for part, _ in parts) / ranks for name in common}
    return means, max(counted for _, counted in parts)


def several_ranks() -> bool:
    """Whether this process is one of several."""
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )
