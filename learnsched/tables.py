"""Tables of text, for reports that people read on a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], left: int | None = None) -> str:
    """Rows as columns of text, two spaces apart.

    Args:
        rows: cells, as many in each row.
        left: how many columns, from the first, are flush left; the others are flush right. All if None.

    Example:
        >>> print(aligned([("name", "count"), ("a", "10")], left=1))
        name  count
        a        10
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = len(widths) if left is None else left
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
