"""What a scheduler has applied so far: to plot, to write, to read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from learnsched.files import write_text
from learnsched.json_numbers import as_json, from_json
from learnsched.schedule import FIELDS, Schedule, Setting

_VERSION = 1


class History:
    """The settings that were applied so far and the metrics that were reported.

    Attributes:
        layers: names of the layers, from the input.
        settings: one tuple of settings, one a layer, for every epoch that has begun.
        metrics: one dictionary of numbers for every epoch that has ended.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "history.json"
        >>> history = History(["fc"])
        >>> history.settings.append((Setting(fraction=0.5),))
        >>> history.save(path)
        >>> History.load(path).schedule["fraction"].tolist()
        [[0.5]]
    """

    def __init__(self, layers: Sequence[str]) -> None:
        self.layers = tuple(layers)
        self.settings: list[tuple[Setting, ...]] = []
        self.metrics: list[dict[str, float]] = []

    @property
    def schedule(self) -> Schedule:
        """What was applied, as a schedule of as many epochs as have begun."""
        return Schedule.from_settings(self.settings, self.layers)

    def plot(self, path: str | Path | None = None, *, title: str | None = None) -> Any:
        """Plot the settings, layers × epochs; see :func:`learnsched.plotting.plot_schedule`."""
        from learnsched.plotting import plot_schedule

        return plot_schedule(self.schedule, path, title=title)

    def save(self, path: str | Path) -> None:
        """Write the history as JSON; ``learnsched plot PATH`` draws it.

        Raises:
            OSError: the file cannot be written; one that was there before is as it was.
        """
        content = {
            "learnsched_history": _VERSION,
            "layers": list(self.layers),
            "fields": list(FIELDS),
            "settings": [[[getattr(s, f) for f in FIELDS] for s in row] for row in self.settings],
            "metrics": [as_json(row) for row in self.metrics],
        }
        write_text(path, json.dumps(content, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> History:
        """Read what :meth:`save` has written.

        Raises:
            OSError: the file cannot be read.
            ValueError: it holds no history, or one of another version.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(content, dict) or "learnsched_history" not in content:
                raise ValueError("scheduler.history.save() did not write it")
            if content["learnsched_history"] != _VERSION or content.get("fields") != list(FIELDS):
                raise ValueError("it is of another version of learnsched")
            layers = content["layers"]
            if not isinstance(layers, list) or not all(isinstance(name, str) for name in layers):
                raise ValueError("its layers are not given by name")
            history = cls(layers)
            history.settings = [tuple(Setting(*s) for s in row) for row in content["settings"]]
            history.metrics = [as_numbers(from_json(metrics)) for metrics in content["metrics"]]
            # A schedule checks its own shape.
            if len(history.metrics) > len(history.schedule.table):
                raise ValueError("it has more metrics than epochs")
        except (
            ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError,
        ) as error:  # fmt: skip
            raise ValueError(f"{path} is not the history of a run: {error}") from error
        return history


def as_numbers(metrics: Mapping[str, float | Tensor] | None) -> dict[str, float]:
    """Metrics as plain numbers.

    Raises:
        TypeError: they are not given by name, or one is no number.
    """
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise TypeError(f'metrics are given by name, as {{"train_loss": loss}}, got {metrics!r}')
    result = {}
    for name, value in metrics.items():
        try:
            if isinstance(value, str):
                raise TypeError("a string")
            result[name] = float(value.detach() if isinstance(value, Tensor) else value)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TypeError(f"the metric {name!r} must be a number, got {value!r}") from error
    return result
