"""Settings, schedules and the policies that make them.

A *setting* is what one layer gets in one epoch; a *schedule* is the table of settings, horizon ×
layers; a *policy* makes the settings epoch by epoch and may look at telemetry of the run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from learnsched.choices import whole_number


@dataclass(frozen=True)
class Setting:
    """What one layer gets in one epoch. Levels of noise are in level steps.

    Attributes:
        weight_forward_std: std of the noise in the value of the weights, at least 0; 0 is hard.
        weight_backward_std: std of the noise in the gradient of the weights, at least 0.
        activation_forward_std: the same for activations.
        activation_backward_std: the same for activations.
        fraction: share of the weights that INQ has frozen, in [0, 1].
        weight_forward_mean: shift of the noise of the weights, in the gradient as in the value.
        activation_forward_mean: the same for activations.

    Raises:
        TypeError: something is no number.
        ValueError: a std is negative, the fraction leaves [0, 1], or a number is not finite.

    Example:
        >>> Setting(weight_forward_std=0.3).is_terminal, Setting(fraction=1.0).is_terminal
        (False, True)
    """

    weight_forward_std: float = 0.0
    weight_backward_std: float = 1.0
    activation_forward_std: float = 0.0
    activation_backward_std: float = 1.0
    fraction: float = 0.0
    weight_forward_mean: float = 0.0
    activation_forward_mean: float = 0.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if type(value) is not float:
                # NumPy's numbers and tensors are welcome, and are kept as plain ones.
                try:
                    value = float(1.0 * value)
                except OverflowError:
                    value = math.inf
                except (TypeError, ValueError, RuntimeError) as error:
                    raise TypeError(f"{name} must be one number, got {value!r}") from error
                object.__setattr__(self, name, value)
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
            if name.endswith("_std") and value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}; 0 quantizes hard")
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"fraction must lie in [0, 1], got {self.fraction}")

    @property
    def is_terminal(self) -> bool:
        """Whether nothing is left to anneal: hard, unshifted and frozen."""
        return (
            self.weight_forward_std == self.activation_forward_std == 0
            and self.weight_forward_mean == self.activation_forward_mean == 0
            and self.fraction == 1
        )


# Columns of a table of settings, in the order of a setting's attributes; then the places of some: the
# noise in values, the noise in gradients, and the share of frozen weights.
FIELDS = tuple(f.name for f in dataclasses.fields(Setting))
FORWARD_STDS = tuple(i for i, name in enumerate(FIELDS) if name.endswith("forward_std"))
BACKWARD_STDS = tuple(i for i, name in enumerate(FIELDS) if name.endswith("backward_std"))
FRACTION = FIELDS.index("fraction")


@dataclass(frozen=True, eq=False)
class Schedule:
    """Settings of every epoch and layer.

    Args:
        table: shape ``(horizon, layers, len(FIELDS))``, columns as in :data:`FIELDS`.
        layers: names of the layers, from the input.

    Raises:
        ValueError: shapes do not match, or a fraction decreases.

    Example:
        >>> rows = [[Setting(weight_forward_std=0.4)], [Setting(fraction=1.0)]]
        >>> schedule = Schedule.from_settings(rows, ["fc"])
        >>> schedule.horizon, schedule["weight_forward_std"].flatten().tolist()
        (2, [0.4, 0.0])
    """

    table: Tensor
    layers: tuple[str, ...]

    def __post_init__(self) -> None:
        expected = (len(self.layers), len(FIELDS))
        if self.table.dim() != 3 or tuple(self.table.shape[1:]) != expected:
            raise ValueError(
                f"a schedule of {len(self.layers)} layers has shape (horizon, {expected[0]}, "
                f"{expected[1]}), got {tuple(self.table.shape)}"
            )
        fraction = self["fraction"]
        if bool((falls := fraction[1:] < fraction[:-1]).any()):
            layer = self.layers[int(falls.any(0).nonzero()[0])]
            raise ValueError(
                "INQ fractions count all weights that are frozen so far, and may not decrease from one "
                f"epoch to the next, as that of {layer} does"
            )

    @classmethod
    def from_settings(cls, rows: Sequence[Sequence[Setting]], layers: Sequence[str]) -> Schedule:
        """From one row of settings an epoch, one setting a layer."""
        numbers = [[[getattr(s, name) for name in FIELDS] for s in row] for row in rows]
        return cls(torch.tensor(numbers, dtype=torch.float64, device="cpu"), tuple(layers))

    @property
    def horizon(self) -> int:
        """Number of epochs."""
        return len(self.table)

    def __getitem__(self, name: str) -> Tensor:
        """The values of one field, shape ``(horizon, layers)``.

        Raises:
            KeyError: there is no such field.
        """
        if name not in FIELDS:
            raise KeyError(f"a setting has no field {name!r}; it has {', '.join(FIELDS)}")
        return self.table[..., FIELDS.index(name)]

    def settings(self, epoch: int) -> tuple[Setting, ...]:
        """The settings of one epoch, one a layer."""
        return tuple(Setting(*row) for row in self.table[epoch].tolist())

    def __iter__(self) -> Iterator[tuple[Setting, ...]]:
        return (self.settings(epoch) for epoch in range(self.horizon))


@dataclass(frozen=True)
class LayerInfo:
    """What a policy may know of a layer before training.

    Attributes:
        name: where the layer sits in the model.
        fan_in: inputs of one output unit; 0 for a layer without quantized weights.
        weight_levels: number of levels of its weights; 0 if they stay real.
        activation_levels: number of levels of its activation; 0 if it stays real.
        spatial_dims: dimensions along which its weights slide over the input: 1 to 3 for convolutions,
            0 for a matrix.

    Example:
        >>> LayerInfo("fc", fan_in=10, weight_levels=3, activation_levels=4).name
        'fc'
    """

    name: str
    fan_in: int
    weight_levels: int
    activation_levels: int
    spatial_dims: int = 0


@dataclass(frozen=True)
class RunInfo:
    """What a policy may know of a run before training.

    Attributes:
        layers: the layers, from the input.
        horizon: number of epochs, at least 1.
        steps_per_epoch: optimizer steps in an epoch, or None while unknown.
        fine_tuning: whether training starts from a trained float network.

    Raises:
        ValueError: there is no layer, or the horizon or the steps of an epoch are no whole numbers of at
            least 1.

    Example:
        >>> RunInfo((LayerInfo("fc", 10, 3, 4),), horizon=5).progress(2)
        0.5
    """

    layers: tuple[LayerInfo, ...]
    horizon: int
    steps_per_epoch: int | None = None
    fine_tuning: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "horizon", whole_number("the horizon", self.horizon))
        if not self.layers:
            raise ValueError("a run needs at least one quantized layer")
        if self.steps_per_epoch is not None:
            steps = whole_number("steps_per_epoch", self.steps_per_epoch)
            object.__setattr__(self, "steps_per_epoch", steps)

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the run, or None while unknown."""
        return None if self.steps_per_epoch is None else self.horizon * self.steps_per_epoch

    def progress(self, epoch: int) -> float:
        """``epoch / (horizon - 1)`` in [0, 1]; 1 for a horizon of one epoch."""
        return 1.0 if self.horizon == 1 else epoch / (self.horizon - 1)


@dataclass(frozen=True, eq=False)
class Telemetry:
    """What a policy may see of a run, without units and without gradient.

    Leading dimensions, if any, are runs that are trained together.

    Attributes:
        loss: mean training loss of the epoch before over that of the first epoch, shape ``(...)``.
        loss_trend: mean training loss of the epoch before over that of the one before it, same shape.
        weight_error: relative quantization error of each layer's weights, shape ``(..., layers)``.

    Example:
        >>> Telemetry.initial(torch.tensor([0.5, 0.4])).loss.item()
        1.0
    """

    loss: Tensor
    loss_trend: Tensor
    weight_error: Tensor

    @classmethod
    def initial(cls, weight_error: Tensor) -> Telemetry:
        """Before any training, on the device of the errors."""
        one = weight_error.new_ones(weight_error.shape[:-1])
        return cls(one, one, weight_error)

    def __getitem__(self, runs: slice) -> Telemetry:
        """What is seen of some of the runs that are trained together."""
        return Telemetry(self.loss[runs], self.loss_trend[runs], self.weight_error[runs])


@runtime_checkable
class Policy(Protocol):
    """What makes the settings of a run, epoch by epoch.

    Attributes:
        noise: shape of the noise that the settings' std belongs to.
        partition: order in which INQ takes weights.
        metrics: names of the metrics that ``QuantizationScheduler.step`` must be given.

    A policy may have a ``mode`` too, the forward value while there is noise, which is
    ``"expectation"`` otherwise; see :func:`learnsched.annealed_quantize`. With ``"random"``, samples
    come from the global generator, as those of dropout do. It may also have a method
    ``learning_rate_factor(run, progress)``, see :func:`learnsched.learning_rate.learning_rate_factor`,
    and ``evenly_spaced = True`` where it takes the levels of weights to be so, as one does whose noise
    leaves weights real. Let its ``repr`` show its parameters, as that of a dataclass does: by it a
    scheduler's state tells whether it belongs to the same policy; without one, by the class alone.

    Example:
        >>> class Hard:
        ...     noise, partition, metrics = "normal", "settled", ()
        ...     def begin(self, run):
        ...         return None
        ...     def settings(self, run, epoch, telemetry, state):
        ...         return [Setting()] * len(run.layers), state
        >>> isinstance(Hard(), Policy)
        True
    """

    @property
    def noise(self) -> str: ...

    @property
    def partition(self) -> str: ...

    @property
    def metrics(self) -> tuple[str, ...]: ...

    def begin(self, run: RunInfo) -> Any:
        """The policy's own state at the start of a run: None, or tensors in a dictionary."""
        ...

    def settings(
        self, run: RunInfo, epoch: int, telemetry: Telemetry, state: Any
    ) -> tuple[Sequence[Setting], Any]:
        """The settings of ``epoch``, one a layer, and the policy's new state."""
        ...


def terminal(setting: Setting, run: RunInfo, epoch: int) -> Setting:
    """The setting with the terminal conditions forced in the last epoch.

    There the forward noise vanishes and every weight is frozen. A horizon of one epoch trains hard
    and freezes when it ends, since it would train nothing otherwise.

    Example:
        >>> run = RunInfo((LayerInfo("fc", 10, 3, 4),), horizon=3)
        >>> terminal(Setting(0.5), run, 1).weight_forward_std
        0.5
        >>> terminal(Setting(0.5), run, 2).is_terminal
        True
    """
    if epoch < run.horizon - 1:
        return setting
    return dataclasses.replace(
        setting,
        weight_forward_std=0.0,
        activation_forward_std=0.0,
        weight_forward_mean=0.0,
        activation_forward_mean=0.0,
        fraction=1.0 if run.horizon > 1 else 0.0,
    )


def ask(
    policy: Policy, run: RunInfo, epoch: int, telemetry: Telemetry, state: Any
) -> tuple[Sequence[Setting], Any]:
    """A policy's ``settings()``, whose answer is checked.

    Raises:
        TypeError: it is not a pair of settings and state.
        ValueError: there are more or fewer settings than layers.
    """
    answer = policy.settings(run, epoch, telemetry, state)
    pair = isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], Sequence)
    if not pair or not all(isinstance(setting, Setting) for setting in answer[0]):
        raise TypeError(
            f"settings() of {type(policy).__name__} must return one Setting a layer and the policy's "
            f"state, as in: return [Setting()] * len(run.layers), state; got {answer!r}"
        )
    if len(answer[0]) != len(run.layers):
        raise ValueError(
            f"{type(policy).__name__} gave {len(answer[0])} settings for {len(run.layers)} layers; "
            "return one Setting for each of run.layers"
        )
    return answer


def check_policy(policy: object) -> None:
    """Refuse what is no policy.

    Raises:
        TypeError: it lacks ``begin`` or ``settings``, or is a class.

    Example:
        >>> from learnsched.policies import StraightThrough
        >>> check_policy(StraightThrough())
    """
    if isinstance(policy, type) or not isinstance(policy, Policy):
        raise TypeError(
            f"policy must have begin() and settings(), got {policy!r}; see "
            "learnsched.policies and learnsched.load_pretrained"
        )


def plan(
    policy: Policy,
    run: RunInfo,
    *,
    hardened: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Schedule:
    """The schedule of a policy that needs no telemetry, or as if telemetry stood still.

    Args:
        policy: what makes the settings.
        run: what is trained.
        hardened: whether the terminal conditions hold, as they do under a scheduler.
        progress: called with the number of epochs that are planned, after each.

    Raises:
        TypeError: ``policy`` is no policy, or ``run`` no :class:`RunInfo`.
        TypeError, ValueError: the policy's settings are none, or of another number of layers.

    Example:
        >>> from learnsched.policies import StraightThrough
        >>> run = RunInfo((LayerInfo("fc", 10, 3, 4),), horizon=3)
        >>> plan(StraightThrough(), run)["fraction"].flatten().tolist()
        [0.0, 0.0, 1.0]
    """
    check_policy(policy)
    if not isinstance(run, RunInfo):
        raise TypeError(
            f"a schedule is planned for a RunInfo(layers, horizon), got {run!r}; the layers of a "
            "quantized model are those of learnsched.layers.quantized_layers(model), their info"
        )
    telemetry = Telemetry.initial(torch.full((len(run.layers),), 0.5, device="cpu"))
    state, rows = policy.begin(run), []
    for epoch in range(run.horizon):
        settings, state = ask(policy, run, epoch, telemetry, state)
        rows.append([terminal(s, run, epoch) if hardened else s for s in settings])
        if progress is not None:
            progress(epoch + 1)
    return Schedule.from_settings(rows, [layer.name for layer in run.layers])
