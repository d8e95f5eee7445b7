"""The range of runs that a learned policy has seen in meta-training."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from learnsched.schedule import RunInfo

# Ranges that the first artefacts do not name, and what these had seen.
LATER_RANGES = {"weight_levels": (3, 3)}
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
        weight_levels: fewest and most levels of weights. Up to a factor of two beyond, the network is
            shown them as they are: what was learned with ternary weights was measured with binary ones.

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
    weight_levels: tuple[float, float] = (1, 1_000_000)

    def __post_init__(self) -> None:
        for name, (low, high) in asdict(self).items():
            if not 0 < low <= high < math.inf:
                raise ValueError(f"{name} must go from a positive number up, got {low} to {high}")

    def outside(self, run: RunInfo) -> list[str]:
        """What of a run lies more than a factor of two outside, in words."""
        fan_ins: list[float] = [layer.fan_in for layer in run.layers if layer.fan_in] or [
            self.fan_in[0]
        ]
        weights: list[float] = [
            layer.weight_levels for layer in run.layers if layer.weight_levels
        ] or [self.weight_levels[0]]
        seen: list[tuple[str, tuple[float, float], list[float]]] = [
            ("horizon (epochs)", self.horizon, [run.horizon]),
            ("depth (layers)", self.depth, [len(run.layers)]),
            ("fan-in", self.fan_in, fan_ins),
            ("weight levels", self.weight_levels, weights),
        ]
        if run.steps is not None:
            seen.append(("optimizer steps", self.steps, [run.steps]))
        return [
            f"{name} {' to '.join(f'{v:g}' for v in sorted({min(values), max(values)}))} "
            f"(seen {ends[0]:g} to {ends[1]:g})"
            for name, ends, values in seen
            if not (_is_near(min(values), ends) and _is_near(max(values), ends))
        ]

    def shown_weight_levels(self, levels: int) -> float:
        """Levels of weights as the network is shown them.

        Example:
            >>> domain = Domain(weight_levels=(3, 3))
            >>> [domain.shown_weight_levels(levels) for levels in (2, 3, 256)]
            [2, 3, 3]
        """
        low, high = self.weight_levels
        return levels if _is_near(levels, self.weight_levels) else min(max(levels, low), high)

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


def _is_near(value: float, seen: tuple[float, float]) -> bool:
    """Whether a value lies no more than a factor of two outside of a range."""
    return seen[0] / 2 <= value <= seen[1] * 2


def activation_levels(run: RunInfo) -> list[int]:
    """Numbers of levels of a run's quantized activations; one of real ones if it has none."""
    levels = [layer.activation_levels for layer in run.layers if layer.activation_levels]
    return levels or [REAL_LEVELS]
