"""The curve that a learned policy starts from, and whose offsets it learns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from learnsched.learning_rate import warm_cosine
from learnsched.schedule import RunInfo, Setting, Telemetry


@dataclass(frozen=True)
class _Range:
    """An interval, whose ends belong to it unless they are open."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, number: float) -> bool:
        above = self.low < number if self.open_low else self.low <= number
        return above and (number < self.high if self.open_high else number <= self.high)

    def __str__(self) -> str:
        ends = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"{ends[0]}{self.low:g}, {self.high:g}{ends[1]}"


# Of what is positive: far beyond any use, near enough that nothing overflows.
_LARGEST = 1000.0
_STD = _Range(0, 1)
_END = _Range(0, 1, open_low=True)
_START = _Range(0, 1, open_high=True)
_POSITIVE = _Range(0, _LARGEST, open_low=True)
_COUNT = _Range(0, math.inf, open_high=True)
_TILT = _Range(-math.log(_LARGEST), math.log(_LARGEST))

_RANGES = {
    "weight_forward_std": _STD,
    "activation_forward_std": _STD,
    "weight_hard_from": _END,
    "activation_hard_from": _END,
    "power": _POSITIVE,
    "weight_backward_std": _POSITIVE,
    "weight_backward_end": _POSITIVE,
    "activation_backward_std": _POSITIVE,
    "activation_backward_end": _POSITIVE,
    "freeze_from": _START,
    "hard_tilt": _Range(-1, 1),
    "weight_backward_tilt": _TILT,
    "activation_backward_tilt": _TILT,
    "frozen_fan_in": _COUNT,
    "warm_until": _START,
    "loss_power": _Range(0, 4),
    "loss_from": _COUNT,
}


@dataclass(frozen=True)
class BaseCurve:
    """A schedule in closed form; a :class:`~learnsched.schedule.Policy` of its own.

    With progress u in [0, 1] and relative depth d in [0, 1] from the first layer to the last, forward
    std is ``std * max(0, 1 - u / end)^power`` with ``end`` tilted by depth, backward std moves
    geometrically over the run and is tilted by depth, and the fraction rises linearly from
    ``freeze_from``. Forward std is multiplied by a power of the training loss, relative to that of the
    first epoch: in runs of ``loss_from`` steps or more, noise gives way where a network learns fast.

    Attributes:
        weight_forward_std: initial std of the weights' forward noise, in level steps, in [0, 1].
        activation_forward_std: the same for activations.
        weight_hard_from: progress from which weights are hard, in (0, 1], in the middle layer.
        activation_hard_from: the same for activations.
        power: exponent of both decays, positive, at most 1000.
        weight_backward_std: std of the weights' backward noise in the first epoch, in level steps,
            positive, at most 1000, in the middle layer.
        weight_backward_end: the same in the last epoch.
        activation_backward_std: std of the activations' backward noise in the first epoch.
        activation_backward_end: the same in the last epoch.
        freeze_from: progress from which the fraction rises, in [0, 1).
        hard_tilt: by how much of the middle layer's ``end`` the last layer's exceeds the first's, in
            [-1, 1].
        weight_backward_tilt: logarithm of the ratio of the last layer's weight backward std to the
            first's.
        activation_backward_tilt: the same for activations.
        frozen_fan_in: largest fan-in, at least 0, of a first layer whose weights are all frozen from the
            first epoch on: in fine-tuning, filters of few inputs lose more in training than they gain.
        warm_until: share of the optimizer steps, in [0, 1), in which the learning rate rises to its
            maximum; then it falls as a cosine.
        loss_power: exponent, in [0, 4], with which forward std follows the loss; with 0 no telemetry is
            needed.
        loss_from: optimizer steps, at least 0, of the shortest run that follows the loss. A run whose
            steps are not known counts as having none.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> from learnsched.schedule import LayerInfo, plan
        >>> run = RunInfo((LayerInfo("fc", 10, 3, 4),), horizon=5)
        >>> curve = BaseCurve(weight_forward_std=0.4, weight_hard_from=0.5, power=1.0)
        >>> plan(curve, run)["weight_forward_std"].flatten().tolist()
        [0.4, 0.2, 0.0, 0.0, 0.0]
    """

    weight_forward_std: float = 0.35
    activation_forward_std: float = 0.35
    weight_hard_from: float = 0.6
    activation_hard_from: float = 0.6
    power: float = 1.0
    weight_backward_std: float = 2.0
    weight_backward_end: float = 0.9
    activation_backward_std: float = 0.7
    activation_backward_end: float = 0.45
    freeze_from: float = 0.7
    hard_tilt: float = 0.0
    weight_backward_tilt: float = 0.0
    activation_backward_tilt: float = 0.0
    frozen_fan_in: float = 0.0
    warm_until: float = 0.0
    loss_power: float = 0.0
    loss_from: float = 0.0

    noise = "normal"
    partition = "settled"

    def __post_init__(self) -> None:
        for name, numbers in _RANGES.items():
            if getattr(self, name) not in numbers:
                raise ValueError(f"{name} must lie in {numbers}, got {getattr(self, name)!r}")

    @property
    def metrics(self) -> tuple[str, ...]:
        """The training loss, if it is followed."""
        return ("train_loss",) if self.loss_power else ()

    def at(
        self, progress: float, depth: float = 0.5, fan_in: float = math.inf
    ) -> tuple[float, float, float, float, float]:
        """Weight forward and backward std, activation forward and backward std, fraction.

        Forward std before it follows the loss. Before freezing starts the fraction is negative: the
        line that rises from ``freeze_from`` on, continued. What is added to it moves the start.

        Args:
            progress: of the run, in [0, 1].
            depth: 0 for the first layer, 1 for the last.
            fan_in: weights that add up to one output of the layer; 0 if they are not quantized.
        """
        tilt = depth - 0.5

        def forward(std: float, end: float) -> float:
            end = end * (1 + self.hard_tilt * tilt)
            return float(std * max(0.0, 1 - progress / end) ** self.power)

        def backward(start: float, end: float, slope: float) -> float:
            return float(start * (end / start) ** progress * math.exp(slope * tilt))

        # A layer whose weights stay real has a fan-in of 0.
        frozen = depth == 0 and 0 < fan_in <= self.frozen_fan_in
        fraction = (progress - self.freeze_from) / (1 - self.freeze_from)
        return (
            forward(self.weight_forward_std, self.weight_hard_from),
            backward(self.weight_backward_std, self.weight_backward_end, self.weight_backward_tilt),
            forward(self.activation_forward_std, self.activation_hard_from),
            backward(
                self.activation_backward_std,
                self.activation_backward_end,
                self.activation_backward_tilt,
            ),
            1.0 if frozen else fraction,
        )

    def begin(self, run: RunInfo) -> None:
        """No state."""

    def settings(
        self, run: RunInfo, epoch: int, telemetry: Telemetry, state: None
    ) -> tuple[Sequence[Setting], None]:
        """The settings of the formula at the epoch's progress, by depth and fan-in."""
        power = self.power_in(run)
        gain = float(loss_gain(telemetry.loss, power)) if power else 1.0
        return [
            Setting(
                gain * weight,
                weight_backward,
                gain * activation,
                activation_backward,
                max(0.0, fraction),
            )
            for weight, weight_backward, activation, activation_backward, fraction in self.rows(
                run, epoch
            )
        ], None

    def learning_rate_factor(self, run: RunInfo, progress: float) -> float:
        """Factor on the maximum of the learning rate, by the progress of optimizer steps."""
        return warm_cosine(progress, self.warm_until)

    def power_in(self, run: RunInfo) -> float:
        """The exponent of the loss in a run: ``loss_power``, or 0 if the run is too short."""
        return self.loss_power if (run.steps or 0) >= self.loss_from else 0.0

    def rows(self, run: RunInfo, epoch: int) -> list[tuple[float, float, float, float, float]]:
        """:meth:`at` of every layer, forward std before it follows the loss."""
        progress = run.progress(epoch)
        places = zip(depths(len(run.layers)), run.layers, strict=True)
        return [self.at(progress, depth, layer.fan_in) for depth, layer in places]


def loss_gain(loss: Tensor, power: float | Tensor) -> Tensor:
    """Factor on forward std, in [0, 1].

    Args:
        loss: relative to that of the first epoch, any shape. Above 1, or NaN, it counts as 1.
        power: at least 0, broadcasts to the loss.

    Example:
        >>> import torch
        >>> loss_gain(torch.tensor([0.25, 4.0, float("nan")]), 0.5).tolist()
        [0.5, 1.0, 1.0]
    """
    return loss.nan_to_num(nan=1.0).clamp(0, 1) ** power


def depths(count: int) -> list[float]:
    """Relative depths of the layers, 0 to 1; ½ for a single one."""
    return [index / (count - 1) for index in range(count)] if count > 1 else [0.5]
