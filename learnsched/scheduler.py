"""``QuantizationScheduler``: applies a policy's settings to a model, epoch by epoch."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from learnsched.annealed import MODES
from learnsched.apply_settings import (
    check_fractions,
    freeze_,
    has_noise_of,
    is_finalized,
    restore_,
    set_noise_,
)
from learnsched.choices import check_choice, whole_number
from learnsched.history import History, as_numbers
from learnsched.incremental import check_partition
from learnsched.layers import check_weight, quantized_layers
from learnsched.learning_rate import learning_rate_factor
from learnsched.modules import QUANTIZED_LAYERS
from learnsched.noise import NoiseShape, noise_shape
from learnsched.optimizer_checks import own_optimizer, warn_of_strangers, warn_of_untrained
from learnsched.quantizer import Quantizer
from learnsched.ranks import over_ranks, several_ranks
from learnsched.schedule import Policy, RunInfo, Setting, ask, check_policy, terminal
from learnsched.scheduler_state import as_own, check_complete, description, snapshot, spelled
from learnsched.step_counter import StepCounter
from learnsched.telemetry import telemetry_of
from learnsched.weight_warnings import warn_of_gaps, warn_of_weights

_STATE_VERSION = 2
# With more optimizer steps an epoch, but one of the learning rate at most, its step() is misplaced.
_FEW_STEPS = 2


class UnwrappedModelWarning(UserWarning):
    """Several processes train a model that is not wrapped in DistributedDataParallel yet."""


class QuantizationScheduler:
    """Sets noise and frozen fractions of a quantized model for each epoch.

    The constructor applies the settings of epoch 0. Call :meth:`step` after every epoch, the last
    one included; then ``finalize_``.

    Args:
        model: converted by ``quantize_``. If it is wrapped by ``DistributedDataParallel``, metrics
            are averaged over its ranks, so that all get the same settings: call :meth:`step` on each.
            Its ``broadcast_buffers=False`` saves sending what is frozen, twice the size of the weights,
            at every pass: that is alike on all ranks anyway.
        policy: what makes the settings, from :mod:`learnsched.policies` or ``load_pretrained``.
        epochs: the horizon, at least 1.
        steps_per_epoch: optimizer steps in an epoch: ``len(loader)``, or where gradients of several
            batches are accumulated, ``ceil(len(loader) / batches)``. A learned policy reads it; if
            None, it is counted in the first epoch: steps of ``optimizer`` if given, otherwise forward
            passes in training mode, those of a search for a learning rate among them.
        fine_tuning: whether training starts from a trained float network.
        optimizer: if given, frozen weights are put back after each of its steps, as by :meth:`watch`;
            otherwise the forward pass uses their frozen values, and the parameter follows at
            :meth:`step`.
        seed: of random INQ partitions.

    Raises:
        TypeError: ``model`` is no module, ``policy`` no policy, what it returns no settings, or
            ``optimizer`` no optimizer.
        ValueError: the model has no quantized layers or more frozen weights than the policy starts
            with, ``epochs`` or ``steps_per_epoch`` is no whole number of at least 1, or the policy's
            settings do not fit. The model is as it was.

    Example:
        >>> import learnsched as ls
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU())
        >>> net = ls.quantize_(net, ls.ternary(), ls.unsigned(2))
        >>> scheduler = ls.QuantizationScheduler(net, ls.policies.StraightThrough(), epochs=2)
        >>> scheduler.get_last_setting()[0].fraction
        0.0
        >>> scheduler.step()
        >>> scheduler.get_last_setting()[0].fraction
        1.0
    """

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        epochs: int,
        *,
        steps_per_epoch: int | None = None,
        fine_tuning: bool = False,
        optimizer: torch.optim.Optimizer | None = None,
        seed: int = 0,
    ) -> None:
        self._noise, self._mode = _checked(policy)
        self._model, self._layers = model, quantized_layers(model)
        if optimizer is not None:
            optimizer = own_optimizer(optimizer)
            warn_of_strangers(optimizer, model)
        warn_of_gaps(self._layers, policy)
        epochs = whole_number("epochs", epochs)
        if steps_per_epoch is not None:
            steps_per_epoch = whole_number("steps_per_epoch", steps_per_epoch)
        parallel = isinstance(model, DistributedDataParallel)
        self._process_group: Any = model.process_group if parallel else None
        if policy.metrics and not parallel and several_ranks():
            warnings.warn(
                "the model is not wrapped in DistributedDataParallel yet: the settings of ranks that "
                "step with metrics of their own will differ. Wrap it before you make the scheduler, or "
                "give step() metrics that are averaged over the ranks",
                UnwrappedModelWarning,
                stacklevel=2,
            )
        self.policy = policy
        infos = tuple(layer.info for layer in self._layers)
        self._run = RunInfo(infos, epochs, steps_per_epoch, fine_tuning)
        self.epoch = 0
        self.history = History([info.name for info in infos])
        self._seed = operator.index(seed)
        self._counter = StepCounter()
        self._rate_step: int | None = None  # the latest that a learning rate was asked for
        self._optimizers: list[torch.optim.Optimizer] = []  # those that are watched
        self._token = object()  # by which the model knows whose settings it has
        self._state = policy.begin(self._run)
        settings, state = self._ask(self._run, 0, [])
        # All that can fail comes before this line: from here on the model changes.
        if optimizer is not None:
            self._watch(optimizer)
        elif steps_per_epoch is None:
            self._counter.count_passes(model)
        self._apply(settings, state)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Put frozen weights back after each step of an optimizer, and count its steps.

        The same as ``optimizer`` of the constructor, for one that is made later, of this model. Of
        several optimizers the one that steps most often is counted.

        Raises:
            TypeError: it is no optimizer.
        """
        optimizer = own_optimizer(optimizer)
        warn_of_strangers(optimizer, self._model)
        self._watch(optimizer)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({type(self.policy).__name__}, epoch {self.epoch} of {self.epochs}, "
            f"{len(self._layers)} layers)"
        )

    @property
    def epochs(self) -> int:
        """The horizon."""
        return self._run.horizon

    def get_last_setting(self) -> tuple[Setting, ...]:
        """The settings in force, one a layer, from the input."""
        last = self.history.settings[-1]
        return last if self.epoch < self.epochs else tuple(replace(s, fraction=1.0) for s in last)

    def learning_rate_factor(self, step: int) -> float:
        """The factor on the learning rate that the policy is made for, by default a cosine.

        For ``torch.optim.lr_scheduler.LambdaLR(optimizer, scheduler.learning_rate_factor)``, whose
        ``step()`` follows each step of the optimizer.

        Args:
            step: optimizer steps taken so far, at least 0; after the last epoch it stays what it was.

        Raises:
            ValueError: the steps of an epoch are not known yet, or the step is negative.
        """
        if self._run.steps is None:
            raise ValueError(
                "the learning rate changes with every optimizer step: give the scheduler "
                "steps_per_epoch, the length of the data loader"
            )
        if step < 0:
            raise ValueError(f"optimizer steps are counted from 0, got {step}")
        self._rate_step = step
        progress = min(1.0, step / self._run.steps)
        return learning_rate_factor(self.policy, self._run, progress)

    def step(self, metrics: Mapping[str, float | Tensor] | None = None) -> None:
        """End an epoch: take its metrics and apply the settings of the next.

        Args:
            metrics: numbers by name, such as ``{"train_loss": loss}``, the mean over the epoch.

        Raises:
            RuntimeError: all epochs have been stepped through, ``finalize_`` was called before, or the
                model has another scheduler now.
            KeyError: a metric that the policy needs is missing.
            TypeError: a metric is not a number, or the policy's settings are none.
            ValueError: the policy's settings do not fit. Nothing has changed then, nor with the others.
        """
        self._check_steppable()
        numbers, counted = over_ranks(metrics, self._counter.total, self._process_group)
        self._check_metrics(numbers)
        warn_of_weights(self._layers, self.history.settings[-1])
        if self.epoch == 0 and counted and self._optimizers:
            warn_of_untrained(self._layers, self._optimizers)
        run = self._run_after_counting(counted)
        epoch = self.epoch + 1
        if epoch < self.epochs:
            settings, state = self._ask(run, epoch, [*self.history.metrics, numbers])
        # All that can fail comes before this line: from here on the model changes.
        self.history.metrics.append(numbers)
        self.epoch, self._run = epoch, run
        self._counter.stop()
        if epoch < self.epochs:
            self._apply(settings, state)
        else:
            self._freeze()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives only; the model's own buffers are in the model's state_dict."""
        return {
            "version": _STATE_VERSION,
            "epoch": self.epoch,
            "epochs": self.epochs,
            "layers": list(self.history.layers),
            "levels": self._levels(),
            "scales": self._scales(),
            "fine_tuning": self._run.fine_tuning,
            "steps_per_epoch": self._run.steps_per_epoch,
            "counted": self._counter.total,
            "seed": self._seed,
            "policy": description(self.policy),
            "policy_state": snapshot(self._state),
            "settings": self.history.schedule.table,
            "metrics": [dict(m) for m in self.history.metrics],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; load the model's state_dict too.

        Raises:
            ValueError: the state is of another version, horizon, policy or model, or a part of it is
                missing. Nothing has changed then.
        """
        expected = {
            "version": _STATE_VERSION,
            "epochs": self.epochs,
            "layers": list(self.history.layers),
            "levels": self._levels(),
            "fine_tuning": self._run.fine_tuning,
            "policy": description(self.policy),
        }
        if "scales" in state_dict:  # older states do not know
            expected["scales"] = self._scales()
        for name, value in expected.items():
            if state_dict.get(name) != value:
                raise ValueError(
                    f"this state has {name} {state_dict.get(name)!r}, the scheduler {value!r}; "
                    "make the scheduler with the same model, policy and epochs as before"
                )
        try:
            rows = state_dict["settings"].tolist()
            settings = [tuple(Setting(*values) for values in row) for row in rows]
            metrics = [as_numbers(m) for m in state_dict["metrics"]]
            state, steps = state_dict["policy_state"], state_dict["steps_per_epoch"]
            epoch, seed, counted = (
                operator.index(state_dict[key]) for key in ("epoch", "seed", "counted")
            )
            steps = steps if steps is None else whole_number("steps_per_epoch", steps)
            check_complete(epoch, self.epochs, len(self._layers), settings, metrics)
            state = as_own(state, self._state)
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"this is no whole state of a scheduler: {error!r}") from error
        own = self._run.steps_per_epoch
        if own is not None and steps not in (None, own):
            warnings.warn(
                f"an epoch has {own} steps now, and had {steps} when the state was taken: the policy is "
                f"shown {own} from here on",
                stacklevel=2,
            )
        # All that can fail comes before this line, a warning among it.
        self.epoch, self._seed, self._state = epoch, seed, state
        self.history.settings, self.history.metrics = settings, metrics
        if own is None:
            self._run = replace(self._run, steps_per_epoch=steps)
        self._counter.resume(counted, counting=epoch == 0)
        set_noise_(self._layers, self.get_last_setting())

    def _check_steppable(self) -> None:
        if self.epoch >= self.epochs:
            raise RuntimeError(
                f"step() was called {self.epoch + 1} times for a horizon of {self.epochs} epochs; "
                "to train for longer, quantize the float model again and give the scheduler more epochs"
            )
        if self._is_displaced():
            raise RuntimeError(
                "another scheduler has been made for this model since, and sets its noise now: step "
                "that one; to train two ways, give each a model of its own"
            )
        for layer in self._layers:
            if isinstance(layer.weight, QUANTIZED_LAYERS):
                check_weight(layer.weight)
        if is_finalized(self._layers, self.history.settings[-1]):
            raise RuntimeError(
                f"after {self.epoch} of {self.epochs} epochs the model is not as step() left it: "
                "finalize_ was called, which belongs after the last step(), or another state was loaded "
                "into the model; load the scheduler's state with it"
            )
        if not has_noise_of(self._layers, self.history.settings[-1]):
            warnings.warn(
                f"in epoch {self.epoch} the model had other noise than its settings say: another state "
                "was loaded into it, as of an interrupted run. Load the scheduler's state with it, or "
                "the schedule goes on where the scheduler is",
                stacklevel=3,
            )

    def _check_metrics(self, numbers: Mapping[str, float]) -> None:
        missing = [name for name in self.policy.metrics if name not in numbers]
        if missing:
            where = "" if self._process_group is None else " on every rank"
            raise KeyError(
                f"{type(self.policy).__name__} needs the metric {missing[0]!r}{where}; call "
                f"scheduler.step(metrics={{{missing[0]!r}: value}})"
            )
        for name in self.policy.metrics:
            if not math.isfinite(numbers[name]):
                warnings.warn(
                    f"the metric {name!r} is {numbers[name]}: the policy is shown no change instead",
                    stacklevel=3,
                )

    def _run_after_counting(self, counted: int) -> RunInfo:
        """The run, with the optimizer steps of an epoch if they were not known before."""
        told = self._run.steps_per_epoch
        if self.epoch == 0 and not counted and self._counter.of_optimizers:
            warnings.warn(
                "the optimizer took no step of its own in the first epoch; of one that wraps another, "
                "give scheduler.watch() the inner one",
                stacklevel=3,
            )
        if self.epoch == 0 and self._rate_step in (0, 1) and counted > _FEW_STEPS:
            warnings.warn(
                f"the learning rate took {self._rate_step} steps in the first epoch, the optimizer "
                f"{counted}: call step() of the LambdaLR after each step of the optimizer, not once an "
                "epoch",
                stacklevel=3,
            )
        if told is None and counted:
            return replace(self._run, steps_per_epoch=counted)
        if told is not None and self.epoch == 0 and counted and _differ(told, counted):
            warnings.warn(
                f"the first epoch took {counted} optimizer steps, steps_per_epoch is {told}: schedule "
                "and learning rate are made for a run of another length. Where gradients are "
                "accumulated, count the optimizer's steps, not the batches; steps that were taken on "
                "trial count, too: make the scheduler after them",
                stacklevel=3,
            )
        return self._run

    def _ask(
        self, run: RunInfo, epoch: int, metrics: Sequence[Mapping[str, float]]
    ) -> tuple[tuple[Setting, ...], Any]:
        """The policy's settings of an epoch, checked, and its new state; nothing changes."""
        # A policy may change the state that it is given, and what follows may fail.
        before = snapshot(self._state)
        raw, state = ask(self.policy, run, epoch, telemetry_of(metrics, self._layers), before)
        settings = tuple(terminal(setting, run, epoch) for setting in raw)
        last = self.history.settings[-1] if self.history.settings else settings
        check_fractions(self._layers, last, settings)
        return settings, state

    def _freeze(self) -> None:
        settings, partition = self.get_last_setting(), self.policy.partition
        freeze_(self._layers, settings, partition, self._seed * 1_000_003 + self.epoch * 1_009)

    def _apply(self, settings: tuple[Setting, ...], state: Any) -> None:
        self._state = state
        self.history.settings.append(settings)
        for quantizer in self._quantizers():
            quantizer.noise, quantizer.mode = self._noise, self._mode
            quantizer.scheduled_by = self._token
        set_noise_(self._layers, settings)
        self._freeze()

    def _quantizers(self) -> Iterator[Quantizer]:
        return (quantizer for layer in self._layers for quantizer in layer.quantizers)

    def _is_displaced(self) -> bool:
        """Whether another scheduler has been made for the model since."""
        return any(q.scheduled_by is not self._token for q in self._quantizers())

    def _levels(self) -> list[list[str]]:
        """The level sets of each layer, in words, for those who load this state without the model's."""
        return [[spelled(q.levels) for q in layer.quantizers] for layer in self._layers]

    def _scales(self) -> list[str]:
        """The rule of each layer's weight, in words; empty where it has none."""
        weights = [layer.weight for layer in self._layers]
        return ["" if w is None else description(w.weight_quantizer.rule) for w in weights]

    def _watch(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizers.append(optimizer)
        self._counter.count_steps(optimizer)
        optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        restore_(self._layers, optimizer)
        told = self._run.steps_per_epoch
        late = not self.epoch and told is not None and self._counter.total == 2 * told + _FEW_STEPS
        if late and not self._is_displaced():
            warnings.warn(
                f"the optimizer has taken {self._counter.total} steps, an epoch has {told}, and the "
                "schedule is at its first: call scheduler.step() after every epoch",
                stacklevel=3,
            )


def _differ(told: int, counted: int) -> bool:
    """Whether steps an epoch are others than was said, but for a few that were skipped."""
    return abs(counted - told) > max(2, 0.1 * told)


def _checked(policy: Policy) -> tuple[NoiseShape, str]:
    """Noise shape and mode of a policy, if it is one.

    Raises:
        TypeError: it is no policy.
        ValueError: its noise, partition or mode is unknown.
    """
    check_policy(policy)
    if isinstance(policy.metrics, str):
        raise TypeError(
            f"the policy's metrics must be a tuple of names, got the string {policy.metrics!r}"
        )
    noise = noise_shape(policy.noise)
    mode = getattr(policy, "mode", "expectation")
    check_partition(policy.partition)
    check_choice("mode", mode, MODES)
    return noise, mode
