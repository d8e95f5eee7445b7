"""The options that every guide has."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def parse(description: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    """``quick``, ``seed`` and ``out`` of a guide; the folder ``out`` is made if need be."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/guide"), help="folder of the files")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    return options
