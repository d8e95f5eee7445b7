"""A slope that steepens: weights pass a piecewise-affine map that turns into the staircase."""

from __future__ import annotations

import math
from dataclasses import dataclass

from learnsched.incremental import check_partition
from learnsched.policies.incremental import IDENTITY_STD
from learnsched.policies.same_for_all_layers import SameForAllLayers
from learnsched.schedule import Setting


@dataclass(frozen=True)
class PiecewiseAffine(SameForAllLayers):
    """PARQ's map of the weights: plateaus at the levels, straight lines of growing slope between.

    Uniform noise of width w steps has an expectation of slope 1/w around each threshold, and flat
    beyond. The width falls from 1 (the identity, where levels are evenly spaced) to 0 (the staircase)
    along a normalized sigmoid::

        w = (s(c - f) - s(-1/2)) / (s(1/2) - s(-1/2)),  s(x) = 1 / (1 + exp(-steepness x))

    with f the share of [start, end] that has passed, and c = ½. Activations are hard, with backward
    noise of fixed std. PARQ proper hands the gradient at the mapped weights on to the weights
    unchanged; a wide backward noise comes near to that.

    Args:
        start: progress at which the slope begins to grow, in [0, 1).
        end: progress at which weights are hard, in (start, 1].
        steepness: of the sigmoid, in (0, 100]; almost linear below 1.
        weight_backward_std: std of the weights' backward noise, in level steps.
        activation_backward_std: the same for activations.

    Raises:
        ValueError: an argument is out of range.

    Source:
        Jin et al. 2025 (arXiv:2503.15748), equation of the piecewise-affine proximal map; annealing
        of the slope as in torchao's ``ProxPARQ``, whose steepness is 10.

    Example:
        >>> from learnsched.schedule import LayerInfo, RunInfo, plan
        >>> run = RunInfo((LayerInfo("fc", 10, 3, 4),), horizon=5)
        >>> stds = plan(PiecewiseAffine(steepness=1e-6), run)["weight_forward_std"].flatten()
        >>> [round(math.sqrt(12) * std, 3) for std in stds.tolist()]
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """

    start: float = 0.0
    end: float = 1.0
    steepness: float = 10.0
    weight_backward_std: float = 1.0
    activation_backward_std: float = IDENTITY_STD
    partition: str = "settled"
    metrics: tuple[str, ...] = ()

    noise = "uniform"
    evenly_spaced = True

    def __post_init__(self) -> None:
        check_partition(self.partition)
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(
                f"start and end are shares of the run, 0 <= start < end <= 1, got {self.start} and "
                f"{self.end}"
            )
        if not 0 < self.steepness <= 100:
            raise ValueError(f"steepness must be in (0, 100], got {self.steepness}")
        self._setting(0.0)  # checks the levels of noise

    def width(self, progress: float) -> float:
        """Inverse slope of the map, in [0, 1]."""
        passed = min(max((progress - self.start) / (self.end - self.start), 0.0), 1.0)
        half = self.steepness / 2
        if passed == 1:
            return 0.0
        # The normalized difference of sigmoids, written with tanh, which cancels nothing.
        return (math.tanh(half * (0.5 - passed)) / math.tanh(half / 2) + 1) / 2

    def _setting(self, progress: float) -> Setting:
        return Setting(
            weight_forward_std=IDENTITY_STD * self.width(progress),
            weight_backward_std=self.weight_backward_std,
            activation_backward_std=self.activation_backward_std,
        )
