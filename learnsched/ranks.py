"""Metrics and counts of the ranks that train one model in parallel."""

from __future__ import annotations

from typing import Any

import torch.distributed


def over_ranks(numbers: dict[str, float], counted: int, group: Any) -> tuple[dict[str, float], int]:
    """Means of metrics that all ranks have, and the most that one of them has counted.

    Args:
        numbers: metrics of this rank, by name.
        counted: what this rank has counted.
        group: a process group; None is this process alone.
    """
    if group is None:
        return numbers, counted
    ranks = torch.distributed.get_world_size(group)
    parts: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(parts, (numbers, counted), group=group)
    common = [name for name in numbers if all(name in part for part, _ in parts)]
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
