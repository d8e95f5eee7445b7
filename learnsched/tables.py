"""Tables of text: in columns, for a terminal, and in Markdown, for pages."""

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


def markdown(rows: Sequence[Sequence[str]], *, head: bool = True) -> str:
    """A table in Markdown, the first row its head.

    Args:
        rows: cells, as many in each row.
        head: whether the first row is the head; if not, the rows go on with a table that is there.

    Raises:
        ValueError: there is no row for the head.

    Example:
        >>> print(markdown([("a", "b"), ("1", "2")]))
        | a | b |
        | --- | --- |
        | 1 | 2 |
        >>> print(markdown([("3", "4")], head=False))
        | 3 | 4 |
    """
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    if head:
        if not rows:
            raise ValueError("the head of a table is its first row, and there is none")
        lines.insert(1, "| " + " | ".join("---" for _ in rows[0]) + " |")
    return "\n".join(lines)
