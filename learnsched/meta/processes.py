"""Tasks split over processes or machines (``torchrun``), with the same result for any number.

Without ``torch.distributed`` there is one rank, and nothing is exchanged.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
Job = TypeVar("Job")


def start() -> None:
    """Join the process group that torchrun prepared, if this process was started by it."""
    if "RANK" in os.environ and dist.is_available() and not dist.is_initialized():
        dist.init_process_group("gloo")


def own_device(name: str) -> str:
    """The device of this process: of several GPUs each takes its own, by its place on its machine."""
    local = os.environ.get("LOCAL_RANK")
    if name != "cuda" or local is None or not torch.cuda.device_count():
        return name
    return f"cuda:{int(local) % torch.cuda.device_count()}"


def stop() -> None:
    """Leave the process group, if in one."""
    if _active():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _active() else 0


def world_size() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if _active() else 1


def barrier() -> None:
    """Wait until every process is here."""
    if _active():
        dist.barrier()


def gather(mine: Mapping[int, T], count: int) -> list[T]:
    """All ranks' results in the order of their indices, on every rank.

    Gathering rather than summing keeps the order of additions, and so every bit of the sum, the same
    for any number of ranks.

    Args:
        mine: this rank's results, by index.
        count: how many results there are in all.
    """
    if not _active():
        return [mine[i] for i in range(count)]
    parts: list[dict[int, T]] = [{} for _ in range(world_size())]
    dist.all_gather_object(parts, dict(mine))
    merged = {index: result for part in parts for index, result in part.items()}
    return [merged[i] for i in range(count)]


def mapped(jobs: Sequence[Job], work: Callable[[Job], T]) -> list[T]:
    """Results of jobs in their order, on every rank, each of which does every so many of them.

    Args:
        jobs: the same on every rank.
        work: from a job to its result.

    Example:
        >>> mapped([1, 2], lambda job: 10 * job)
        [10, 20]
    """
    mine = {index: work(jobs[index]) for index in range(rank(), len(jobs), world_size())}
    return gather(mine, len(jobs))


def shared(jobs: Sequence[Job], work: Callable[[Job], T]) -> Iterator[list[T]]:
    """Results of jobs in their order, on every rank; a round at a time, in which a rank does one.

    Args:
        jobs: the same on every rank.
        work: from a job to its result.

    Example:
        >>> list(shared([1, 2], lambda job: 10 * job))
        [[10], [20]]
    """
    for first in range(0, len(jobs), world_size()):
        yield mapped(jobs[first : first + world_size()], work)


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()
