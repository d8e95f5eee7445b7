"""Benchmarks made of jobs: ranks of torchrun share them, a file keeps their records and is taken up."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from learnsched.benchmarks.environment import write_results
from learnsched.meta import processes

Job = TypeVar("Job")


@contextmanager
def one_of_the_ranks() -> Iterator[None]:
    """Take part in what torchrun started, if it did, on one thread."""
    processes.start()
    torch.set_num_threads(1)  # the tensors are small: threads cost more than they bring
    try:
        yield
    finally:
        processes.stop()


def recorded(
    path: Path | None,
    jobs: Mapping[Any, Job],
    work: Callable[[Job], list[dict[str, Any]]],
    key: Callable[[Mapping[str, Any]], Hashable],
    *,
    progress: Callable[[dict[str, Any]], None] | None = None,
    **content: Any,
) -> list[dict[str, Any]]:
    """Records of all jobs, those that the file has before those that are made now, on every rank.

    Args:
        path: of a JSON file, written by the first rank after every round; None keeps nothing.
        jobs: by what tells their records apart.
        work: from a job to its records.
        key: from a record to the key of its job.
        progress: called with every record that is made, on the first rank.
        content: what else the file says, such as the seed: what records of one file have in common.

    Raises:
        ValueError: the file holds records of other content.

    Example:
        >>> recorded(None, {1: "a", 2: "b"}, lambda job: [{"key": job}], lambda record: record["key"])
        [{'key': 'a'}, {'key': 'b'}]
    """

    def keep(made: list[dict[str, Any]], records: list[dict[str, Any]]) -> None:
        if processes.rank() == 0:
            if progress is not None:
                for record in made:
                    progress(record)
            write_results(path, {**content, "records": records})

    return completed(stored_records(path, **content), jobs, work, key, keep)


def stored_records(path: Path | None, **content: Any) -> list[dict[str, Any]]:
    """The records of an interrupted run's file; none without a file.

    Args:
        path: of a JSON file.
        content: what else the file should say; what it does not say is not compared.

    Raises:
        ValueError: the file holds records of other content.
    """
    if path is None or not path.exists():
        return []
    stored = json.loads(path.read_text())
    if differing := [k for k, value in content.items() if stored.get(k, value) != value]:
        raise ValueError(
            f"{path} holds records of another {', '.join(differing)} than "
            f"{', '.join(str(content[k]) for k in differing)}; choose another file"
        )
    records: list[dict[str, Any]] = stored["records"]
    return records


def completed(
    done: Sequence[Mapping[str, Any]],
    jobs: Mapping[Any, Job],
    work: Callable[[Job], list[dict[str, Any]]],
    key: Callable[[Mapping[str, Any]], Hashable],
    progress: Callable[[list[dict[str, Any]], list[dict[str, Any]]], None] | None = None,
) -> list[dict[str, Any]]:
    """The records that are done, and those of the other jobs, on every rank; each does one a round.

    Args:
        done: records of an interrupted run, which are not made again.
        jobs: by what tells their records apart.
        work: from a job to its records.
        key: from a record to the key of its job.
        progress: called after every round, on every rank, with its records and with all of them.

    Example:
        >>> completed([{"n": 1}], {1: 1, 2: 2}, lambda job: [{"n": job}], lambda record: record["n"])
        [{'n': 1}, {'n': 2}]
    """
    records = [dict(record) for record in done]
    finished = {key(record) for record in records}
    todo = [job for name, job in jobs.items() if name not in finished]
    for parts in processes.shared(todo, work):
        made = [record for part in parts for record in part]
        records += made
        if progress is not None:
            progress(made, records)
    return records
