"""Hand-coded methods as the accuracy benchmark's search left them, for comparisons elsewhere."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from learnsched.benchmarks.spaces import Trial


def add_known(parser: argparse.ArgumentParser) -> None:
    """``--known``, the records of the learned schedule's rivals."""
    parser.add_argument(
        "--known",
        type=Path,
        default=Path("figures/methods.jsonl"),
        help="records of the accuracy benchmark",
    )


def in_cell(
    records: Iterable[Mapping[str, Any]], cell: str, names: Sequence[str] = ()
) -> dict[str, Mapping[str, Any]]:
    """The records of a cell, by method.

    Args:
        records: of the accuracy benchmark.
        cell: its name.
        names: of methods that must be there.

    Raises:
        KeyError: one of them is not.
    """
    found = {record["method"]: record for record in records if record["cell"] == cell}
    missing = [name for name in names if name not in found]
    if missing:
        raise KeyError(
            f"no record of {', '.join(missing)} in {cell}; make them with "
            f"python -m learnsched.benchmarks.accuracy, or take figures/methods.jsonl"
        )
    return found


def tuned(suggest: Callable[[Trial], Any] | None, record: Mapping[str, Any]) -> Any:
    """The policy with the parameters of a record; None where a method has nothing to search."""
    from optuna.trial import FixedTrial

    return None if suggest is None else suggest(FixedTrial(record["parameters"]))
