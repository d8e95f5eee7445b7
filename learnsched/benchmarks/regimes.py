"""Kinds of runs that are tuned for themselves."""

from __future__ import annotations

from typing import NamedTuple

from learnsched.meta.tasks import Task


class Regime(NamedTuple):
    """Level sets, by their name in a task, and where training starts.

    Example:
        >>> str(Regime("ternary/2-bit", fine_tuning=True))
        'ternary/2-bit, fine-tuned'
    """

    bits: str
    fine_tuning: bool

    @classmethod
    def of(cls, task: Task) -> Regime:
        """That of a task."""
        return cls(task.bits, task.fine_tuning)

    def __str__(self) -> str:
        return f"{self.bits}{', fine-tuned' * self.fine_tuning}"
