"""Tasks: what a schedule is trained on. Network family × data × horizon × learning rate × bits × seed.

Tasks of one architecture form a :class:`Task` of several members, trained as one population.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from learnsched.annealed import MODES
from learnsched.choices import check_choice, whole_number
from learnsched.choose import LayerConfig
from learnsched.convert import quantize_
from learnsched.data import DataSet
from learnsched.incremental import check_partition
from learnsched.layers import quantized_layers
from learnsched.levels import LevelSet, binary, ternary, unsigned
from learnsched.meta.inner import Batches, InnerLoop
from learnsched.meta.inner_optimizers import OPTIMIZERS
from learnsched.meta.networks import FAMILIES, Family, check_depth
from learnsched.meta.population import Population
from learnsched.noise import noise_shape
from learnsched.schedule import LayerInfo, RunInfo

# Learning rate of the float networks that fine-tuning starts from; members of one seed share theirs.
_FLOAT_RATE = 0.02

# Validation examples of a member's outer loss.
_HELD_OUT = 256

# Quantiles of what a batch norm puts out, for scale rules of activations.
_STANDARD_NORMAL = torch.special.ndtri((torch.arange(1024) + 0.5) / 1024)

BITS: dict[str, tuple[LevelSet, LevelSet | None]] = {
    "ternary/2-bit": (ternary(), unsigned(2)),
    "ternary/ternary": (ternary(), ternary()),
    "binary/binary": (binary(), binary()),
    "binary/2-bit": (binary(), unsigned(2)),
    "ternary/real": (ternary(), None),
    "binary/real": (binary(), None),
}


def layer_of(bits: str) -> LayerInfo:
    """A layer with the level sets of a key of :data:`BITS`, for what these tell of a run.

    Example:
        >>> layer_of("ternary/real").activation_levels
        0
    """
    weight, activation = BITS[bits]
    levels = 0 if activation is None else len(activation.values)
    return LayerInfo("layer", 1, len(weight.values), levels)


_MINIMA = {"width": 1, "depth": 2, "horizon": 1, "steps": 1, "batch": 1, "runs": 0}


@dataclass(frozen=True, kw_only=True)
class Task:
    """Members of one architecture, data set and horizon; they differ in seed and learning rate.

    Attributes:
        family: a name of :data:`learnsched.meta.networks.FAMILIES`, such as ``mlp`` or ``cnn2d``, or of
            one of your own.
        data: a name of :data:`learnsched.data.DATA_SETS`; ``mnist1d``, ``digits`` or ``noisy_digits`` in
            the meta-training of the default.
        width: units or channels of the hidden layers.
        depth: layers with weights, at least 2.
        horizon: epochs.
        steps: optimizer steps an epoch.
        batch: examples a step.
        bits: a key of :data:`BITS`.
        learning_rates: maximum over the run, one a member.
        fine_tuning: start from a float network trained for as many steps, one for each seed.
        seed: of initial weights, order of the data, and held-out batches.
        runs: how many seeds the members have; member i has the seed of member ``i % runs``. All
            differ if 0.
        optimizer: of the inner loop, a key of :data:`learnsched.meta.inner_optimizers.OPTIMIZERS`.
        float_ends: keep the first and the last layer's weights real, as much of the field does; all
            activations are quantized.

    Raises:
        ValueError: the bits or the optimizer are unknown, or a number is out of its range.

    Example:
        >>> from learnsched.data import load
        >>> task = Task(family="mlp", data="digits", width=4, depth=2, horizon=3, steps=2, batch=16,
        ...             bits="ternary/2-bit", learning_rates=(0.01, 0.02), fine_tuning=False, seed=0)
        >>> task.name
        'digits mlp 2×4, ternary/2-bit, 3×2 steps'
        >>> task.build(load("digits")).run.horizon
        3
    """

    family: str
    data: str
    width: int
    depth: int
    horizon: int
    steps: int
    batch: int
    bits: str
    learning_rates: tuple[float, ...]
    fine_tuning: bool
    seed: int
    runs: int = 0
    optimizer: str = "adam"
    float_ends: bool = False

    def __post_init__(self) -> None:
        check_choice("bits", self.bits, BITS)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        for name, least in _MINIMA.items():
            whole_number(name, getattr(self, name), least)
        if not all(0 < rate < math.inf for rate in self.learning_rates):
            raise ValueError(f"learning rates must be positive, got {self.learning_rates}")

    @property
    def name(self) -> str:
        """What distinguishes the task in tables, seeds and learning rates left out."""
        start = ", fine-tuned" if self.fine_tuning else ""
        optimizer = "" if self.optimizer == "adam" else f", {self.optimizer}"
        ends = ", float ends" if self.float_ends else ""
        return (
            f"{self.data} {self.family} {self.depth}×{self.width}, {self.bits}{ends}, "
            f"{self.horizon}×{self.steps} steps{start}{optimizer}"
        )

    def build(
        self,
        data: DataSet,
        *,
        noise: str = "normal",
        partition: str = "settled",
        membership_width: float = 0.05,
        held_out: int = _HELD_OUT,
        eps: float = 1e-6,
        device: str | torch.device = "cpu",
        config: LayerConfig | None = None,
        mode: str = "expectation",
        prepare: Callable[[nn.Module], object] | None = None,
        families: Mapping[str, Family] = FAMILIES,
    ) -> InnerLoop:
        """The inner loop of this task, at its initial state.

        Args:
            data: the data set called ``self.data``.
            noise: shape of the noise that settings are for.
            partition: order in which INQ takes weights.
            membership_width: see :class:`InnerLoop`.
            held_out: validation examples of the outer loss, per member.
            eps: Adam's ε.
            device: where to train; random numbers are drawn on the CPU all the same.
            config: level sets and scale rules, in place of the level sets of ``self.bits`` with
                their customary rules. A scale rule of activations is given standard normal ones.
            mode: the forward value, ``expectation``, ``mode`` or ``random``.
            prepare: called with each quantized network; what it makes a parameter is trained too.
            families: kinds of networks by name, ``self.family`` among them.

        Raises:
            ValueError: the family, noise, partition or mode is unknown, there are no learning rates,
                the scale rule of weights does not keep their dimensions, the family has no network of
                this depth, or the data are not float32 of a shape that it takes.
        """
        shape = noise_shape(noise)
        check_partition(partition)
        check_choice("mode", mode, MODES)
        if not self.learning_rates:
            raise ValueError(f"{self.name} has no members: learning_rates is empty")
        x, y = data.train.x, data.train.y
        models, order, picked = self._drawn(data, held_out, families)
        member_run = torch.arange(len(models)) % len(order)
        order, picked = order[member_run], picked[member_run]
        batches = Batches(
            x.to(device),
            y.to(device),
            order.movedim(0, 2).contiguous().to(device),
            data.validation.x[picked].to(device),
            data.validation.y[picked].to(device),
        )
        maxima = torch.tensor(self.learning_rates, device=device)
        config = config or LayerConfig(*BITS[self.bits])
        for model in models:
            quantize_(
                model,
                config.weight,
                config.activation,
                weight_scale=config.weight_scale,
                activation_scale=config.activation_scale,
                skip=("first", "last") if self.float_ends else (),
                example_input=x[:1],
            )
            for layer in quantized_layers(model):
                for quantizer in layer.quantizers:
                    quantizer.noise = shape
                    quantizer.mode = mode
                for activation in layer.activations if config.activation_scale else ():
                    activation.scale.copy_(activation.rule(_STANDARD_NORMAL, activation.levels))
            if prepare is not None:
                prepare(model)
        if config.weight_scale is not None:
            _check_ranks(models[0])
        return InnerLoop(
            Population(models).to(device),
            batches,
            maxima,
            fine_tuning=self.fine_tuning,
            partition=partition,
            membership_width=membership_width,
            optimizer=OPTIMIZERS[self.optimizer](eps),
            seed=self.seed,
            member_run=member_run.to(device),
        )

    def floats(self, data: DataSet) -> tuple[list[nn.Module], Tensor]:
        """What :meth:`build` quantizes: the float networks of the members, and the runs' batches.

        Returns:
            networks, trained already if the task is one of fine-tuning; indices of training examples,
            shape ``(runs, horizon, steps, batch)``, where member i has those of run ``i % runs``.
        """
        models, order, _ = self._drawn(data, _HELD_OUT, FAMILIES)
        return models, order

    def _drawn(
        self, data: DataSet, held_out: int, families: Mapping[str, Family]
    ) -> tuple[list[nn.Module], Tensor, Tensor]:
        """Float networks of the members; of the runs, batches and indices of held-out examples."""
        runs = min(self.runs, len(self.learning_rates)) or len(self.learning_rates)
        generators = [
            torch.Generator().manual_seed(mixed_seed(self.seed, run)) for run in range(runs)
        ]
        order = torch.stack([self._order(len(data.train), g) for g in generators])
        picked = torch.stack(
            [torch.randint(len(data.validation), (held_out,), generator=g) for g in generators]
        )
        models = self._models(data, runs, families)
        if self.fine_tuning:
            self._pretrain_members(models, data, generators)
        return models, order, picked

    def run_of(self, data: DataSet) -> RunInfo:
        """What a policy is told of this task; no float network is trained for it.

        Args:
            data: the data set called ``self.data``.
        """
        alone = replace(self, learning_rates=(1.0,), runs=0, fine_tuning=False)
        return replace(alone.build(data).run, fine_tuning=self.fine_tuning)

    def _pretrain_members(
        self, models: list[nn.Module], data: DataSet, generators: Sequence[torch.Generator]
    ) -> None:
        """Train the float network of each run, and give it to the other members of the run."""
        runs = len(generators)
        before = torch.stack([self._order(len(data.train), g) for g in generators])
        _pretrain(models[:runs], data.train.x, data.train.y, before.flatten(1, 2))
        for member in range(runs, len(models)):
            models[member].load_state_dict(models[member % runs].state_dict())

    def _order(self, examples: int, generator: torch.Generator) -> Tensor:
        """Indices of shape (horizon, steps, batch), cycling through permutations of the examples."""
        needed = self.horizon * self.steps * self.batch
        rounds = -(-needed // examples)
        order = [torch.randperm(examples, generator=generator) for _ in range(rounds)]
        return torch.cat(order)[:needed].view(self.horizon, self.steps, self.batch)

    def _models(self, data: DataSet, runs: int, families: Mapping[str, Family]) -> list[nn.Module]:
        """Float networks of the members, initialised from their seeds."""
        check_choice("family", self.family, families)
        family, dtype = families[self.family], data.train.x.dtype
        if not family.takes(data.shape) or dtype != torch.float32:
            wanted = f" and shape {family.inputs}" if family.inputs else ""
            raise ValueError(
                f"{self.family} takes inputs of torch.float32{wanted}, those of {data.name} are of "
                f"{dtype} and shape {data.shape}; convert them, or choose another family"
            )
        check_depth(self.family, self.depth, families)
        models = []
        with torch.random.fork_rng(devices=[]):  # initialisation draws from the global generator
            for member in range(len(self.learning_rates)):
                torch.manual_seed(mixed_seed(self.seed, member % runs))
                models.append(family.make(data.shape, self.width, self.depth, data.classes))
        return models


def _check_ranks(model: nn.Module) -> None:
    """Refuse scale rules whose results do not line up where the weights of members are stacked.

    Raises:
        ValueError: a scale has fewer dimensions than its weight.
    """
    for layer in quantized_layers(model):
        if layer.weight is not None:
            weight, quantizer = layer.weight.weight, layer.weight.weight_quantizer
            scale = quantizer.fitted_scale(weight.detach())
            if scale.dim() != weight.dim():
                raise ValueError(
                    f"a population needs scales with as many dimensions as their weight, got "
                    f"{tuple(scale.shape)} for {tuple(weight.shape)} from {quantizer.rule}; let the "
                    "rule keep them, as keepdim=True does"
                )


def _pretrain(models: Sequence[nn.Module], x: Tensor, y: Tensor, order: Tensor) -> None:
    """Train float networks in place, each on its own batches of ``order`` (runs, steps, batch)."""
    for model, batches in zip(models, order, strict=True):
        optimizer = torch.optim.Adam(model.parameters(), lr=_FLOAT_RATE)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
        for index in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
            scheduler.step()


# What a row of a table of tasks says.
_ROW = ("data", "family", "width", "depth", "horizon", "steps")


def task_of(row: Sequence[Any], **rest: Any) -> Task:
    """A task by data, family, width, depth, horizon and steps an epoch, and the rest by name.

    Raises:
        ValueError: the row has more or fewer entries; as :class:`Task` does.

    Example:
        >>> task_of(("digits", "mlp", 8, 3, 6, 10), batch=32, bits="ternary/2-bit",
        ...         learning_rates=(0.01,), fine_tuning=True, seed=0).name
        'digits mlp 3×8, ternary/2-bit, 6×10 steps, fine-tuned'
    """
    known: dict[str, Any] = dict(zip(_ROW, row, strict=True))
    return Task(**known, **rest)


def mixed_seed(seed: int, step: int) -> int:
    """One seed out of two, so that neighbouring runs do not share tasks.

    Example:
        >>> mixed_seed(1, 0), mixed_seed(0, 1)
        (1012348, 20264)
    """
    return (seed * 1_000_003 + step * 7_919 + 12_345) % 2**63
