"""Additive noise annealing: noise that decays by a power law over an interval of the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

from learnsched.annealed import MODES
from learnsched.choices import check_choice
from learnsched.incremental import check_partition
from learnsched.noise import noise_shape
from learnsched.schedule import RunInfo, Setting, Telemetry

Interval = Literal["same_start", "same_end", "partition", "overlapped"]
INTERVALS: tuple[str, ...] = get_args(Interval)
Annealed = Literal["forward", "both", "neither"]
ANNEALED: tuple[str, ...] = get_args(Annealed)


@dataclass(frozen=True)
class AdditiveNoiseAnnealing:
    """ANA: forward std ``std * ((t1 - u) / (t1 - t0))^power`` for progress u in [t0, t1], then 0.

    With L layers, layer ℓ from the input, and everything scaled to the share ``end`` of the run, the
    interval ``[t0, t1]`` is ``[0, (ℓ + 1) / L]`` (``same_start``), ``[(L - 1 - ℓ) / L, 1]``
    (``same_end``), ``[ℓ / L, (ℓ + 1) / L]`` (``partition``) or ``[0, 1]`` (``overlapped``).

    Args:
        std: initial forward std in level steps, at least 0.
        end: share of the run after which every layer is hard, in (0, 1].
        interval: how the layers' decays are synchronised.
        power: exponent of the decay, positive.
        progressive: multiply the power by ``L - ℓ``, so that layers near the input sharpen faster.
        mean: initial shift of the noise in level steps; decays with half the power.
        backward_std: std of the backward noise in level steps, initially if it decays; the initial
            forward std if None.
        activation_backward_std: the same for activations; ``backward_std`` if None.
        noise: shape of the noise.
        mode: the forward value while there is noise, see :func:`learnsched.annealed_quantize`; samples
            are drawn in training alone, in evaluation the most probable level is taken.
        annealed: whose std decays: that of the ``forward`` noise, of ``both``, or of ``neither``,
            when only the terminal condition hardens the network.

    Raises:
        TypeError: a number is none.
        ValueError: an argument is out of range.

    Source:
        Spallanzani et al. 2019 (arXiv:1905.10452), Spallanzani et al. 2022 (arXiv:2203.11323).

    Example:
        >>> from learnsched.schedule import LayerInfo, plan
        >>> run = RunInfo((LayerInfo("fc", 10, 3, 4),), horizon=5)
        >>> policy = AdditiveNoiseAnnealing(std=0.4, end=0.5)
        >>> plan(policy, run)["weight_forward_std"].flatten().tolist()
        [0.4, 0.2, 0.0, 0.0, 0.0]
    """

    std: float = 0.35
    end: float = 0.5
    interval: Interval = "overlapped"
    power: float = 1.0
    progressive: bool = False
    mean: float = 0.0
    backward_std: float | None = None
    activation_backward_std: float | None = None
    noise: str = "normal"
    partition: str = "settled"
    metrics: tuple[str, ...] = ()
    mode: str = "expectation"
    annealed: Annealed = "forward"

    def __post_init__(self) -> None:
        noise_shape(self.noise)
        check_partition(self.partition)
        check_choice("mode", self.mode, MODES)
        check_choice("annealed", self.annealed, ANNEALED)
        check_choice("interval", self.interval, INTERVALS)
        for name in ("std", "end", "power", "mean", "backward_std", "activation_backward_std"):
            value = getattr(self, name)
            if not isinstance(value, Real) and (value is not None or "backward" not in name):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if not 0 < self.end <= 1:
            raise ValueError(f"end is a share of the run in (0, 1], got {self.end}")
        if not 0 < self.power < math.inf:
            raise ValueError(f"power must be positive and finite, got {self.power}")
        self._setting(0.0, 0, 1)  # checks the levels of noise

    def begin(self, run: RunInfo) -> None:
        """No state."""

    def settings(
        self, run: RunInfo, epoch: int, telemetry: Telemetry, state: None
    ) -> tuple[Sequence[Setting], None]:
        """The settings of the formula at the epoch's progress."""
        count = len(run.layers)
        return [self._setting(run.progress(epoch), layer, count) for layer in range(count)], None

    def _setting(self, progress: float, layer: int, count: int) -> Setting:
        start, stop = _interval(self.interval, layer, count)
        start, stop = start * self.end, stop * self.end
        left = min(max((stop - progress) / (stop - start), 0.0), 1.0)
        power = self.power * (count - layer if self.progressive else 1)
        decay = left**power
        std = self.std if self.annealed == "neither" else self.std * decay
        mean = self.mean * left ** (power / 2)
        backward = self.std if self.backward_std is None else self.backward_std
        of_activation = self.activation_backward_std
        of_activation = backward if of_activation is None else of_activation
        kept = decay if self.annealed == "both" else 1.0
        return Setting(
            weight_forward_std=std,
            weight_backward_std=backward * kept,
            activation_forward_std=std,
            activation_backward_std=of_activation * kept,
            weight_forward_mean=mean,
            activation_forward_mean=mean,
        )


def _interval(kind: str, layer: int, count: int) -> tuple[float, float]:
    """Start and stop of a layer's decay as shares of the annealed part of the run."""
    if kind == "same_start":
        return 0.0, (layer + 1) / count
    if kind == "same_end":
        return (count - 1 - layer) / count, 1.0
    if kind == "partition":
        return layer / count, (layer + 1) / count
    return 0.0, 1.0
