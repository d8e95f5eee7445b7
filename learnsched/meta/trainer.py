"""The outer loop: meta-training of a learned policy, with checkpoints that lose nothing.

Every outer step draws its tasks from (seed, step), so a resumed run sees what the uninterrupted one
would have seen, and a run on several processes what a run on one would have.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learnsched.choices import check_choice, whole_number
from learnsched.data import DataSet, load
from learnsched.digest import digest
from learnsched.meta import processes
from learnsched.meta.estimators import Estimator
from learnsched.meta.mix import Mix
from learnsched.meta.networks import FAMILIES, Family, check_depth
from learnsched.meta.rollout import begin
from learnsched.meta.run_folder import has_run, load_checkpoint, save_checkpoint, write_config
from learnsched.meta.tasks import Task, layer_of
from learnsched.meta.unrolled import Unrolled
from learnsched.meta.validation import hard_errors
from learnsched.policies.learned import LearnedPolicy
from learnsched.schedule import RunInfo


@dataclass(frozen=True)
class TrainerConfig:
    """All that decides the result of meta-training, beside the number of outer steps.

    Attributes:
        mix: the distribution of tasks.
        validation: tasks that select the policy; never trained on.
        seed: of tasks.
        learning_rate: of the outer optimizer, Adam, at the start; positive.
        decay: outer steps after which the learning rate is half of it; ``1 / (1 + step / decay)``.
        betas: Adam's coefficients, in [0, 1).
        average: decay of the exponential average of the meta-parameters, in [0, 1).
        clip: largest norm of one member's gradient, in running medians of such norms; positive, and
            infinite where nothing is to be clipped.
        validate_every: outer steps between validations, at least 1.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> from dataclasses import replace
        >>> from learnsched.meta.presets import PRESETS
        >>> replace(PRESETS["quick"].trainer, learning_rate=0.001, validate_every=2).validate_every
        2
    """

    mix: Mix
    validation: tuple[Task, ...]
    seed: int = 0
    learning_rate: float = 0.01
    decay: float = 30.0
    betas: tuple[float, float] = (0.9, 0.99)
    average: float = 0.95
    clip: float = 1.0
    validate_every: int = 10

    def __post_init__(self) -> None:
        whole_number("validate_every", self.validate_every)
        positive = (self.learning_rate, self.decay)
        shares = (*self.betas, self.average)
        if not (
            all(0 < n < math.inf for n in positive)
            and self.clip > 0
            and all(0 <= share < 1 for share in shares)
        ):
            raise ValueError(
                "learning_rate and decay are positive and finite, clip is positive, betas and average "
                f"lie in [0, 1); got {positive}, {self.clip}, {self.betas} and {self.average}"
            )

    def load_data(self) -> dict[str, DataSet]:
        """The data sets of the mix and of validation, by name."""
        return {name: load(name) for name in sorted(self.data_names)}

    @property
    def networks(self) -> set[tuple[str, int]]:
        """Families and depths of the networks of the mix and of validation."""
        drawn = {(a[1], depth) for a in self.mix.architectures for depth in a[3]}
        return drawn | {(task.family, task.depth) for task in self.validation}

    @property
    def data_names(self) -> set[str]:
        """Of the data sets of the mix and of validation."""
        return {a[0] for a in self.mix.architectures} | {t.data for t in self.validation}


class MetaTrainer:
    """Trains the network of a policy.

    Args:
        policy: its network is changed in place.
        config: how to train.
        folder: where ``checkpoint.safetensors``, ``log.jsonl`` and ``config.json`` are kept.
        data: the data sets of the mix and of validation, by name.
        estimator: what gives gradients; the full unroll if None.
        families: kinds of networks by name, those of the mix and of validation among them.
        device: where inner runs train.

    Raises:
        FileExistsError: the folder holds a run of another configuration, or on data of other sizes; the
            message names what differs.
        FileNotFoundError: the folder holds a checkpoint without its configuration.
        KeyError: a data set of the mix or of validation is missing.
        TypeError: the estimator's ``repr`` is an address.
        ValueError: a family of the mix or of validation is unknown, or has no network of a depth; the
            policy's network is frozen, its domain lacks level sets of the mix, or the folder's
            checkpoint or configuration is damaged.

    Example:
        >>> import tempfile
        >>> from dataclasses import replace
        >>> from learnsched.meta.presets import PRESETS
        >>> from learnsched.policies import MetaNetwork
        >>> config = PRESETS["quick"].trainer
        >>> mix = replace(config.mix, architectures=(("digits", "mlp", (4,), (2,)),), horizons=(2,),
        ...               total_steps=(4, 4), members=2, tasks=1)
        >>> config = replace(config, mix=mix, validation=(), validate_every=9)
        >>> policy = LearnedPolicy(MetaNetwork())
        >>> trainer = MetaTrainer(policy, config, tempfile.mkdtemp(), config.load_data())
        >>> trainer.run(steps=1)
        >>> trainer.log[0]["step"]
        1
    """

    def __init__(
        self,
        policy: LearnedPolicy,
        config: TrainerConfig,
        folder: str | Path,
        data: Mapping[str, DataSet],
        estimator: Estimator | None = None,
        *,
        families: Mapping[str, Family] = FAMILIES,
        device: str | torch.device = "cpu",
    ) -> None:
        for family, depth in sorted(config.networks):
            check_choice("family", family, families)
            check_depth(family, depth, families)
        missing = config.data_names - data.keys()
        if missing:
            raise KeyError(
                f"data lacks {', '.join(sorted(missing))}, which the mix or validation names; "
                f"it has {', '.join(data) or 'nothing'}"
            )
        if frozen := [n for n, p in policy.network.named_parameters() if not p.requires_grad]:
            raise ValueError(
                f"{', '.join(frozen)} of the policy's network are frozen, as those of load_pretrained "
                "are; copy the policy and call network.requires_grad_(True)"
            )
        for bits, _ in config.mix.bits:
            if not policy.domain.has_seen_levels(RunInfo((layer_of(bits),), horizon=1)):
                raise ValueError(
                    f"the network has no say with {bits}, which the mix draws: the policy's domain has "
                    f"activation_levels={policy.domain.activation_levels}; widen it, or change the mix"
                )
        if re.search(r" at 0x[0-9a-f]+>", repr(estimator)):
            raise TypeError(
                f"the estimator's repr is {estimator!r}, by which a resumed run would not know it; let "
                "it tell its parameters, as that of a frozen dataclass does"
            )
        self.policy = policy
        self.config = config
        self.folder = Path(folder)
        self.data = data
        self.families = families
        self.estimator = estimator or Unrolled()
        self.device = torch.device(device)
        self.step = 0
        self.seconds = 0.0
        self._parameters = dict(policy.network.named_parameters())
        self._optimizer = torch.optim.Adam(
            self._parameters.values(), lr=config.learning_rate, betas=config.betas
        )
        for parameter in self._parameters.values():
            # What Adam begins with in its first step: so a state has the same tensors at any time.
            self._optimizer.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self._average = {n: p.detach().clone() for n, p in self._parameters.items()}
        self._best = {n: p.detach().clone() for n, p in self._parameters.items()}
        self.best_error = math.inf
        self.best_step = 0
        self._typical_norm = math.nan
        self._log: list[dict[str, Any]] = []
        self._kept = self._copied()
        self._open()

    def run(self, steps: int, progress: Callable[[dict[str, Any]], None] | None = None) -> None:
        """Train until ``steps`` outer steps have been taken since the very start.

        It goes on from where the last whole outer step left off, whatever :meth:`load_best` or
        :meth:`load_last` gave the policy since, and wherever an exception ended the run before.

        Args:
            steps: outer steps in all.
            progress: called with the log entry of every outer step.
        """
        self._restore(*self._kept)
        if self.step == 0 and self.config.validation:
            # What does not beat the curve that training starts from is not selected.
            self._log = [{"step": 0, "validation_error": self._validate()}]
        while self.step < steps:
            entry = self._outer_step()
            if self.config.validation and self.step % self.config.validate_every == 0:
                entry["validation_error"] = self._validate()
            self._log.append(entry)
            state = self._copied()
            if processes.rank() == 0:
                save_checkpoint(self.folder, *state)
            self._kept = state
            if progress is not None:
                progress(entry)

    def load_best(self) -> None:
        """Give the policy the averaged parameters that did best in validation, step 0 included.

        Without validation tasks: those of the last step.
        """
        self._assign(self._best if math.isfinite(self.best_error) else self._average)

    def load_last(self) -> None:
        """Give the policy the averaged parameters of the last step."""
        self._assign(self._average)

    @property
    def log(self) -> list[dict[str, Any]]:
        """One entry an outer step, and before them the validation of the start, of step 0."""
        return list(self._log)

    def _outer_step(self) -> dict[str, Any]:
        start = time.perf_counter()
        tasks = self.config.mix.sample(self.config.seed, self.step)
        results = processes.mapped(tasks, self._task_gradient)
        gradient = torch.stack([r["gradient"] for r in results]).mean(0)
        norms = torch.cat([r["norms"] for r in results])
        losses = torch.cat([r["losses"] for r in results])
        used = norms.isfinite()
        # Of none, mean and median are NaN, and momentum alone would move the network.
        median = float(norms[used].median())
        if bool(used.any()):
            self._apply(gradient)
            old = median if math.isnan(self._typical_norm) else self._typical_norm
            self._typical_norm = 0.9 * old + 0.1 * median
        self.step += 1
        elapsed = time.perf_counter() - start
        self.seconds += elapsed
        return {
            "step": self.step,
            "outer_loss": float(losses[used].mean()),
            "norm_median": median,
            "norm_largest": max(norms[used].tolist(), default=math.inf),
            "dropped": int((~used).sum()),
            "seconds": elapsed,
        }

    def _task_gradient(self, task: Task) -> dict[str, Tensor]:
        """The clipped gradient of a task, a mean over members, flat over parameters."""
        data = self.data[task.data]
        inner, rollout = begin(self.policy, task, data, self.device, families=self.families)
        estimate = self.estimator(inner, rollout)
        norms = estimate.norms
        finite = norms.isfinite() & estimate.loss.isfinite()
        limit = self.config.clip * self._typical_norm
        if math.isnan(limit):
            limit = self.config.clip * float(norms[finite].median()) if bool(finite.any()) else 1.0
        gradient = estimate.clipped(limit).parameter_gradient(list(self._parameters.values()))
        return {
            "gradient": gradient.cpu(),
            "norms": torch.where(finite, norms, math.inf).cpu(),
            "losses": estimate.loss.cpu(),
        }

    def _apply(self, gradient: Tensor) -> None:
        sizes = [p.numel() for p in self._parameters.values()]
        for parameter, part in zip(self._parameters.values(), gradient.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.device, copy=True)
        rate = self.config.learning_rate / (1 + self.step / self.config.decay)
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        keep = min(self.config.average, self.step / (self.step + 5))
        for name, parameter in self._parameters.items():
            self._average[name].lerp_(parameter.detach(), 1 - keep)

    def _validate(self) -> float:
        """Classification error of the averaged policy's hard networks on the validation tasks.

        Not their loss: that has tails so heavy that few members decide between two policies.
        """
        current = {n: p.detach().clone() for n, p in self._parameters.items()}
        self._assign(self._average)
        errors = processes.mapped(self.config.validation, self._task_error)
        self._assign(current)
        error = float(torch.stack(errors).mean())
        if error < self.best_error:
            self.best_error, self.best_step = error, self.step
            self._best = {n: p.clone() for n, p in self._average.items()}
        return error

    @torch.no_grad()
    def _assign(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])

    def _task_error(self, task: Task) -> Tensor:
        data = self.data[task.data]
        errors = hard_errors(self.policy, task, data, self.device, families=self.families)
        return errors.mean()

    def _open(self) -> None:
        """Start a run in the folder, or take up the one that is there."""
        config = self._config()
        if not has_run(self.folder, config) and processes.rank() == 0:
            write_config(self.folder, config)
        processes.barrier()
        tensors, scalars = self._kept
        if found := load_checkpoint(self.folder, tensors, scalars):
            self._restore(*found)
            self._kept = self._copied()

    def _config(self) -> dict[str, Any]:
        """What tells this run from others."""
        return {
            "policy": self.policy.config(),
            "trainer": asdict(self.config),
            "estimator": repr(self.estimator),
            "data": {name: _sizes(self.data[name]) for name in sorted(self.config.data_names)},
            "start": digest(self._parameters),
        }

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors that training changes, by name."""
        tensors = {}
        for name, parameter in self._parameters.items():
            tensors[f"parameter.{name}"] = parameter.detach()
            tensors[f"average.{name}"] = self._average[name]
            tensors[f"best.{name}"] = self._best[name]
            for moment, tensor in self._optimizer.state[parameter].items():
                tensors[f"adam.{moment}.{name}"] = tensor
        return tensors

    def _copied(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A copy of all that training changes: tensors, and what a checkpoint says beside them."""
        tensors = {name: tensor.clone() for name, tensor in self._tensors().items()}
        return tensors, {
            "step": self.step,
            "seconds": self.seconds,
            "best_error": self.best_error,
            "best_step": self.best_step,
            "typical_norm": self._typical_norm,
            "log": list(self._log),
        }

    def _restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """The reverse of :meth:`_copied`."""
        for name, tensor in self._tensors().items():
            tensor.copy_(tensors[name])
        self.step, self.seconds = scalars["step"], scalars["seconds"]
        self.best_error, self.best_step = scalars["best_error"], scalars["best_step"]
        self._typical_norm, self._log = scalars["typical_norm"], list(scalars["log"])


def _sizes(data: DataSet) -> dict[str, Any]:
    """What tells data sets of a name apart; not their values, which may be rounded elsewhere."""
    return {
        "train": len(data.train),
        "validation": len(data.validation),
        "shape": list(data.shape),
        "classes": data.classes,
    }
