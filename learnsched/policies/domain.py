"""The range of runs that a learned policy has seen in meta-training."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from learnsched.schedule import RunInfo

# Real activations are like those of 8 bits, on which noise of a level step has no effect either.
REAL_LEVELS = 256


@dataclass(frozen=True)
class Domain:
    """The range of runs that meta-training has seen; inputs beyond it are clipped to it.

    Attributes:
        horizon: fewest and most epochs.
        steps: fewest and most optimizer steps of a run.
        depth: fewest and most layers.
        fan_in: smallest and largest fan-in.
        activation_levels: fewest and most levels of activations; 256 for real ones. A run with
            others gets the base curve alone: what is learned of one level set does harm to another.

    Raises:
        ValueError: a range is not positive and finite, or is reversed.

    Example:
        >>> from learnsched.schedule import LayerInfo
        >>> Domain(horizon=(5, 20)).outside(RunInfo((LayerInfo("fc", 10, 3, 4),), horizon=90))
        ['horizon (epochs) 90 (seen 5 to 20)']
    """

    horizon: tuple[float, float] = (1, 1000)
    steps: tuple[float, float] = (1, 1_000_000)
    depth: tuple[float, float] = (1, 1000)
    fan_in: tuple[float, float] = (1, 1_000_000)
    activation_levels: tuple[float, float] = (1, 1_000_000)

    def __post_init__(self) -> None:
        for name, (low, high) in asdict(self).items():
            if not 0 < low <= high < math.inf:
                raise ValueError(f"{name} must go from a positive number up, got {low} to {high}")

    def outside(self, run: RunInfo) -> list[str]:
        """What of a run lies more than a factor of two outside, in words."""
        fan_ins: list[float] = [layer.fan_in for layer in run.layers if layer.fan_in] or [
            self.fan_in[0]
        ]
        seen: list[tuple[str, tuple[float, float], list[float]]] = [
            ("horizon (epochs)", self.horizon, [run.horizon]),
            ("depth (layers)", self.depth, [len(run.layers)]),
            ("fan-in", self.fan_in, [min(fan_ins), max(fan_ins)]),
        ]
        if run.steps_per_epoch is not None:
            seen.append(("optimizer steps", self.steps, [run.horizon * run.steps_per_epoch]))
        return [
            f"{name} {' to '.join(f'{v:g}' for v in sorted({min(values), max(values)}))} "
            f"(seen {low:g} to {high:g})"
            for name, (low, high), values in seen
            if min(values) < low / 2 or max(values) > high * 2
        ]

    def has_seen_levels(self, run: RunInfo) -> bool:
        """Whether the run's activations have as many levels as meta-training has seen.

        Real ones count only where all are real, as in networks whose weights alone are quantized.

        Example:
            >>> from learnsched.schedule import LayerInfo
            >>> run = RunInfo((LayerInfo("fc", 10, 3, 2), LayerInfo("out", 10, 3, 0)), horizon=9)
            >>> [Domain(activation_levels=seen).has_seen_levels(run) for seen in ((2, 4), (4, 4))]
            [True, False]
        """
        low, high = self.activation_levels
        return all(low <= count <= high for count in activation_levels(run))


def activation_levels(run: RunInfo) -> list[int]:
    """Numbers of levels of a run's quantized activations; one of real ones if it has none."""
    levels = [layer.activation_levels for layer in run.layers if layer.activation_levels]
    return levels or [REAL_LEVELS]
