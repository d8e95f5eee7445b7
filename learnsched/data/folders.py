"""Where data sets that come as files are looked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def find(
    files: Sequence[str],
    folder: str | os.PathLike[str] | None,
    variable: str,
    default: str | None,
    source: str,
) -> list[Path]:
    """The paths of a data set's files.

    Args:
        files: names of the files.
        folder: where they are; None takes the environment variable, then the default.
        variable: name of the environment variable that may hold the folder.
        default: where they are usually, or None.
        source: how to get the files, for the error.

    Returns:
        one existing path a file.

    Raises:
        FileNotFoundError: no folder is named, or a file is missing in it.
    """
    where = folder if folder is not None else os.environ.get(variable) or default
    advice = f"{source}, and name their folder with folder= or the environment variable {variable}"
    if where is None:
        raise FileNotFoundError(f"no folder is named for {', '.join(files)}; {advice}")
    paths = [Path(where) / name for name in files]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; {advice}")
    return paths
