"""Records of the accuracy benchmark: one a cell and method, each a file of its own.

Processes that share a folder claim what they make; see :mod:`learnsched.benchmarks.accuracy`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from learnsched.benchmarks.cells import GRIDS
from learnsched.benchmarks.environment import read_lines
from learnsched.files import write_text

# What a method is to the comparison: the learned one, the same before meta-training, hand-coded, a
# search over the learned one's closed form, never hardened, without quantization, of another package.
LEARNED, START, HAND_CODED, PARAMETRIC, RELAXED, FLOAT, PEER = (
    "learned", "start", "hand-coded", "parametric", "relaxed", "float", "peer",
)  # fmt: skip


def slug(text: str) -> str:
    """A name as part of a path.

    Example:
        >>> slug("ANA, normal (2019)")
        'ana-normal-2019'
    """
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def record_path(folder: Path, cell: str, method: str) -> Path:
    """Where the record of a cell and method lies.

    Example:
        >>> record_path(Path("runs"), "mnist1d cnn1d", "ANA, normal").as_posix()
        'runs/records/mnist1d-cnn1d/ana-normal.json'
    """
    return folder / "records" / slug(cell) / f"{slug(method)}.json"


def write_record(record: dict[str, Any], folder: Path) -> None:
    """Put a record in its place."""
    path = record_path(folder, record["cell"], record["method"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """All records of a folder, or of a file of JSON lines, by cell and method.

    Cells are in the order of the full grid, others after them by name.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_record({"cell": "digits", "method": "RPR"}, folder)
        >>> read(folder)
        [{'cell': 'digits', 'method': 'RPR'}]
    """
    if folder.is_file():
        records = read_lines(folder)
    else:
        records = [json.loads(path.read_text()) for path in (folder / "records").glob("*/*.json")]
    order = [cell.name for cell in GRIDS["full"].cells]
    place = {name: index for index, name in enumerate(order)}
    return sorted(records, key=lambda r: (place.get(r["cell"], len(order)), r["cell"], r["method"]))


def unpack(records: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write the records that a folder lacks, of cells and methods that it has none of.

    Args:
        records: as :func:`read` returns them.
        folder: of records, journals and claims.
    """
    for record in records:
        if not record_path(folder, record["cell"], record["method"]).exists():
            write_record(record, folder)


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether this process alone may do the work that a file stands for, within the block.

    The claim is a lock of the operating system, so it ends with the process however that ends.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "job"
        >>> with claim(path) as mine, claim(path) as too:
        ...     print(mine, too)
        True False
    """
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
