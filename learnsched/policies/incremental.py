"""Incremental network quantization: a growing fraction of the weights frozen on their levels."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from learnsched.incremental import check_fraction, check_partition
from learnsched.learning_rate import warm_cosine
from learnsched.noise import noise_shape
from learnsched.schedule import RunInfo, Setting, Telemetry

# Cumulative fractions of Zhou et al. 2017, section 3.3 (5 bits) and table 4 (4, 3 and 2 bits).
PUBLISHED_FRACTIONS: dict[int, tuple[float, ...]] = {
    5: (0.5, 0.75, 0.875, 1.0),
    4: (0.3, 0.5, 0.8, 0.9, 0.95, 1.0),
    3: (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0),
    2: (0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975, 1.0),
}

# Uniform noise one step wide: the expectation of the staircase is the identity inside its range. Rounded
# up in single precision, so that windows of neighbouring thresholds meet: a weight on a level, as the
# zeros that a layer may start from, has a gradient.
IDENTITY_STD = float(np.nextafter(np.float32(1 / math.sqrt(12)), np.float32(1)))


@dataclass(frozen=True)
class IncrementalQuantization:
    """INQ: freeze the given cumulative fractions, one after the other, over the run.

    Free weights stay real inside the range of their level set, by uniform noise one step wide; of
    unevenly spaced levels (powers of two of 4 bits and more) only around the smallest ones, and the
    scheduler warns. Activations are hard, with backward noise of fixed std.

    Args:
        fractions: non-decreasing, ending at 1; or the number of bits (2 to 5) for the paper's.
        partition: ``magnitude`` or ``random`` (the paper), ``redraw`` (RPR) or ``settled``. Magnitudes
            are in units of the scale, which each channel may have for itself; the paper has one a layer.
        start: share of the run before the first fraction is frozen, in [0, 1).
        activation_backward_std: std of the activations' backward noise, in level steps.
        activation_forward_std: constant std of the activations' forward noise, in level steps.
        noise: its shape; another than ``uniform`` softens free weights, and does not leave them real.
        restarts: whether ``learning_rate_factor`` starts anew with each fraction, as in the paper;
            otherwise it is one cosine.

    Raises:
        ValueError: fractions decrease, leave [0, 1] or do not end at 1, or the paper has none for so
            many bits; start leaves [0, 1), a std is negative or not finite, or the partition or the
            noise is unknown.

    Source:
        Zhou et al. 2017 (arXiv:1702.03044), table 4; RPR: Cavigelli and Benini 2020
        (arXiv:2001.01091).

    Example:
        >>> from learnsched.schedule import LayerInfo, plan
        >>> run = RunInfo((LayerInfo("fc", 10, 3, 4),), horizon=4)
        >>> plan(IncrementalQuantization(5), run)["fraction"].flatten().tolist()
        [0.5, 0.75, 0.875, 1.0]
    """

    fractions: int | tuple[float, ...] = 2
    partition: str = "magnitude"
    start: float = 0.0
    activation_backward_std: float = IDENTITY_STD
    activation_forward_std: float = 0.0
    noise: str = "uniform"
    metrics: tuple[str, ...] = ()
    restarts: bool = False

    evenly_spaced = True

    def __post_init__(self) -> None:
        check_partition(self.partition)
        if self._bits is not None and self._bits not in PUBLISHED_FRACTIONS:
            raise ValueError(
                f"the paper has fractions for 2, 3, 4 and 5 bits, not {self.fractions}; "
                "give a tuple of your own"
            )
        noise_shape(self.noise)
        if not 0 <= self.start < 1:
            raise ValueError(f"start is a share of the run in [0, 1), got {self.start}")
        values = self.cumulative
        for fraction in values:
            check_fraction(fraction)
        if any(b < a for a, b in zip(values, values[1:], strict=False)):
            raise ValueError(f"fractions are cumulative and may not decrease, got {values}")
        if not values or values[-1] != 1:
            raise ValueError(f"the last fraction must be 1, got {values}")
        self._setting(0.0)  # checks the levels of noise

    @property
    def cumulative(self) -> tuple[float, ...]:
        """The cumulative fractions in force."""
        if self._bits is not None:
            return PUBLISHED_FRACTIONS[self._bits]
        return cast(tuple[float, ...], self.fractions)

    @property
    def _bits(self) -> int | None:
        """Whose fractions are the paper's; None where they are given."""
        try:
            return operator.index(cast(int, self.fractions))
        except TypeError:
            return None

    def restarted(self, progress: float) -> float:
        """Factor on the learning rate that starts anew with each fraction, as in the paper.

        Before the first fraction, and after each, it is a cosine from 1 to 0.

        Args:
            progress: of the optimizer steps, in [0, 1).

        Example:
            >>> policy = IncrementalQuantization(5)
            >>> [round(policy.restarted(u), 2) for u in (0.0, 0.125, 0.25, 0.375)]
            [1.0, 0.5, 1.0, 0.5]
        """
        if progress < self.start:
            passed = progress / self.start
        else:
            phase = (progress - self.start) / (1 - self.start) * len(self.cumulative)
            passed = (phase + 1e-9) % 1
        return warm_cosine(passed)

    def learning_rate_factor(self, run: RunInfo, progress: float) -> float:
        """The factor on the learning rate, for :meth:`QuantizationScheduler.learning_rate_factor`."""
        # The last step of a run has none of the next phase's.
        return self.restarted(progress) if self.restarts and progress < 1 else warm_cosine(progress)

    def begin(self, run: RunInfo) -> None:
        """No state."""

    def settings(
        self, run: RunInfo, epoch: int, telemetry: Telemetry, state: None
    ) -> tuple[Sequence[Setting], None]:
        """The fraction of the phase that the epoch belongs to, the same for all layers."""
        return [self._setting(epoch / run.horizon)] * len(run.layers), None

    def _setting(self, elapsed: float) -> Setting:
        return Setting(
            weight_forward_std=IDENTITY_STD,
            weight_backward_std=IDENTITY_STD,
            activation_forward_std=self.activation_forward_std,
            activation_backward_std=self.activation_backward_std,
            fraction=self._fraction(elapsed),
        )

    def _fraction(self, elapsed: float) -> float:
        if elapsed < self.start:
            return 0.0
        values = self.cumulative
        # The tolerance keeps k / n * n from falling into the phase before.
        phase = int((elapsed - self.start) / (1 - self.start) * len(values) + 1e-9)
        return values[min(phase, len(values) - 1)]
