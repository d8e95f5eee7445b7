"""Benchmarks made of jobs: ranks of torchrun share them, a file keeps their records and is taken up."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from learnsched.benchmarks.environment import stored_records, write_results
from learnsched.meta import distribution

Job = TypeVar("Job")


@contextmanager
def one_of_the_ranks() -> Iterator[None]:
    """Take part in what torchrun started, if it did, on one thread."""
    distribution.start()
    torch.set_num_threads(1)  # the tensors are small: threads cost more than they bring
    try:
        yield
    finally:
        distribution.stop()


def recorded(
    path: Path | None,
    jobs: Mapping[Any, Job],
    work: Callable[[Job], list[dict[str, Any]]],
    key: Callable[[dict[str, Any]], Hashable],
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
        content: what else the file says.

    Example:
        >>> recorded(None, {1: "a", 2: "b"}, lambda job: [{"key": job}], lambda record: record["key"])
        [{'key': 'a'}, {'key': 'b'}]
    """
    records = stored_records(path)
    done = {key(record) for record in records}
    todo = [job for name, job in jobs.items() if name not in done]
    for made in distribution.shared(todo, work):
        new = [record for part in made for record in part]
        records += new
        if distribution.rank() == 0:
            if progress is not None:
                for record in new:
                    progress(record)
            write_results(path, {**content, "records": records})
    return records
