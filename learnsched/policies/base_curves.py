"""A base curve for each kind of run: what is best differs between level sets and regimes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from learnsched.policies.base_curve import BaseCurve
from learnsched.policies.domain import REAL_LEVELS, activation_levels
from learnsched.schedule import RunInfo, Setting, Telemetry

_MOST_LEVELS = 2**16


@dataclass(frozen=True)
class Case:
    """A kind of run, and its curve.

    Attributes:
        weight_levels: how many levels weights have, 2 to 65,536 (16 bits).
        activation_levels: how many levels activations have, the same, or 0 where they are real.
        fine_tuning: whether runs start from a float network.
        curve: what to do there.
        spatial_dims: along how many dimensions the first quantized weight slides in the networks that
            it is for: 1 for signals, 2 for images, 0 for vectors; None for all without a case of their
            own.

    Raises:
        ValueError: a number of levels or of dimensions is out of range.

    Example:
        >>> Case(3, 4, False, BaseCurve()).activation_levels
        4
    """

    weight_levels: int
    activation_levels: int
    fine_tuning: bool
    curve: BaseCurve
    spatial_dims: int | None = None

    def __post_init__(self) -> None:
        # A case without levels of weights would be one of nothing to schedule.
        for levels in (self.weight_levels, self.activation_levels or 2):
            if not 2 <= levels <= _MOST_LEVELS:
                raise ValueError(f"a quantizer has 2 to {_MOST_LEVELS} levels, not {levels}")
        if self.spatial_dims not in (None, 0, 1, 2, 3):
            raise ValueError(f"weights slide along 0 to 3 dimensions, not {self.spatial_dims!r}")


@dataclass(frozen=True)
class BaseCurves:
    """The curve of the nearest case; a :class:`~learnsched.schedule.Policy` of its own.

    Nearest in the logarithm of the numbers of levels, averaged over the layers that have them (real
    activations count as 8 bits if all are real); among equals, of the same regime; among these, the one
    for the dimensions of the network's first weight, then the one for any, then the first.

    Attributes:
        cases: at least one.

    Raises:
        ValueError: there is no case.

    Example:
        >>> from learnsched.schedule import LayerInfo
        >>> run = RunInfo((LayerInfo("fc", 10, 3, 3),), horizon=5)
        >>> two_bit, ternary = BaseCurve(power=1.0), BaseCurve(power=2.0)
        >>> curves = BaseCurves((Case(3, 4, False, two_bit), Case(3, 3, False, ternary)))
        >>> curves.nearest(run).power
        2.0
    """

    cases: tuple[Case, ...]

    noise = BaseCurve.noise
    partition = BaseCurve.partition

    def __post_init__(self) -> None:
        if not self.cases:
            raise ValueError("base curves need at least one case")

    @classmethod
    def everywhere(cls, curve: BaseCurve) -> BaseCurves:
        """The same curve for every run."""
        return cls((Case(3, 4, False, curve),))

    @classmethod
    def from_config(cls, config: Sequence[dict[str, Any]]) -> BaseCurves:
        """The reverse of :meth:`config`.

        Raises:
            KeyError, TypeError, ValueError: the configuration is not one of :meth:`config`.
        """
        return cls(tuple(Case(**{**c, "curve": BaseCurve(**c["curve"])}) for c in config))

    def config(self) -> list[dict[str, Any]]:
        """The cases as JSON data, as in the first artefacts: dimensions only where they matter."""
        cases = [asdict(case) for case in self.cases]
        for case in cases:
            if case["spatial_dims"] is None:
                del case["spatial_dims"]
        return cases

    @property
    def metrics(self) -> tuple[str, ...]:
        """The training loss, if a curve follows it."""
        return ("train_loss",) if any(case.curve.metrics for case in self.cases) else ()

    def nearest(self, run: RunInfo) -> BaseCurve:
        """The curve for a run."""
        weights = _mean_log([layer.weight_levels for layer in run.layers])
        activations = _mean_log(activation_levels(run))

        dims = next((layer.spatial_dims for layer in run.layers if layer.fan_in), 0)

        def distance(case: Case) -> tuple[float, bool, int]:
            gaps = [
                0.0 if mean is None else abs(mean - math.log2(levels))
                for mean, levels in (
                    (weights, case.weight_levels),
                    (activations, case.activation_levels or REAL_LEVELS),
                )
            ]
            # Rounded: what is equally near must tie.
            return (
                round(sum(gaps), 6),
                case.fine_tuning != run.fine_tuning,
                {dims: 0, None: 1}.get(case.spatial_dims, 2),
            )

        return min(self.cases, key=distance).curve

    def power_in(self, run: RunInfo) -> float:
        """The exponent of the loss in a run."""
        return self.nearest(run).power_in(run)

    def begin(self, run: RunInfo) -> None:
        """No state."""

    def settings(
        self, run: RunInfo, epoch: int, telemetry: Telemetry, state: None
    ) -> tuple[Sequence[Setting], None]:
        """Those of the nearest case's curve."""
        return self.nearest(run).settings(run, epoch, telemetry, state)

    def learning_rate_factor(self, run: RunInfo, progress: float) -> float:
        """That of the nearest case's curve."""
        return self.nearest(run).learning_rate_factor(run, progress)


def _mean_log(levels: Sequence[int]) -> float | None:
    """Mean logarithm to base 2 of the numbers that are not 0."""
    logs = [math.log2(count) for count in levels if count]
    return sum(logs) / len(logs) if logs else None
