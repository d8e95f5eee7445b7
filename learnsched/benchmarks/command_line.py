"""What the command lines of the benchmarks have in common."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GOES_ON = "write records here; an interrupted run goes on"
KEEPS = "write records here; those there are kept"
RESULTS = "write the results here"


def command_line(
    description: str | None,
    *,
    quick: str,
    json: str,
    seed: str | None = "of all that is random",
    artefact: bool = False,
) -> argparse.ArgumentParser:
    """A parser of the options that all benchmarks have; each adds its own.

    Args:
        description: of the program, as its docstring has it.
        quick: what ``--quick`` runs, in under a minute.
        json: what is written to the path of ``--json``.
        seed: of what ``--seed`` is; None leaves it out.
        artefact: whether there is a learned schedule to choose.

    Example:
        >>> options = command_line("What it measures.", quick="one task", json=RESULTS).parse_args([])
        >>> options.quick, options.seed, options.json
        (False, 0, None)
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if artefact:
        parser.add_argument(
            "--artefact", default="default", help="name or path of a learned schedule"
        )
    parser.add_argument("--quick", action="store_true", help=quick)
    if seed is not None:
        parser.add_argument("--seed", type=int, default=0, help=seed)
    parser.add_argument("--json", type=Path, help=json)
    return parser


def add_kinds(parser: argparse.ArgumentParser, kinds: Mapping[str, str]) -> Any:
    """An option for each kind, of which one at most is given; its name is ``kind`` then, else None.

    Args:
        parser: gets the options.
        kinds: names, as of variables, with what they are.

    Returns:
        the group of the options; others may come to it.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> _ = add_kinds(parser, {"warm_up": "with a warm-up", "long": "long runs"})
        >>> parser.parse_args(["--warm-up"]).kind, parser.parse_args([]).kind
        ('warm_up', None)
    """
    group = parser.add_mutually_exclusive_group()
    for name, words in kinds.items():
        option = f"--{name.replace('_', '-')}"
        group.add_argument(option, dest="kind", action="store_const", const=name, help=words)
    return group
