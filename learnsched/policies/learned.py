"""The learned policy: a recurrent meta-network that outputs every layer's setting, epoch by epoch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from learnsched.policies.base_curve import BaseCurve, depths
from learnsched.policies.base_curves import BaseCurves
from learnsched.schedule import FIELDS, RunInfo, Setting, Telemetry

# Raised with every change of the features or outputs; artefacts of another schema are refused.
FEATURE_SCHEMA = 4

# Of the training loss in the first epoch's: twice what the features are clipped to.
_LARGEST_LOSS = round(2 * math.e, 1)

_KNOTS = (0.1, 0.3, 0.5, 0.7, 0.9)
_STATIC = 11 + len(_KNOTS)
_FEEDBACK = 3
_OUTPUTS = 5


@dataclass(frozen=True)
class Domain:
    """The range of runs that meta-training has seen; inputs beyond it are clipped to it.

    Attributes:
        horizon: fewest and most epochs.
        steps: fewest and most optimizer steps of a run.
        depth: fewest and most layers.
        fan_in: smallest and largest fan-in.
        activation_levels: fewest and most levels of activations. A run with others gets the base
            curve alone: what is learned of one level set does harm to another.

    Raises:
        ValueError: a range is not positive and finite, or is reversed.

    Example:
        >>> from learnsched.schedule import LayerInfo
        >>> Domain(horizon=(5, 20)).outside(RunInfo((LayerInfo("fc", 10, 3, 4),), horizon=90))
        ['horizon (epochs) 90 to 90 (seen 5 to 20)']
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
            f"{name} {min(values):g} to {max(values):g} (seen {low:g} to {high:g})"
            for name, (low, high), values in seen
            if min(values) < low / 2 or max(values) > high * 2
        ]

    def has_seen_levels(self, run: RunInfo) -> bool:
        """Whether the run's quantized activations have as many levels as meta-training has seen.

        Example:
            >>> from learnsched.schedule import LayerInfo
            >>> run = RunInfo((LayerInfo("fc", 10, 3, 2), LayerInfo("out", 10, 3, 0)), horizon=9)
            >>> [Domain(activation_levels=seen).has_seen_levels(run) for seen in ((2, 4), (4, 4))]
            [True, False]
        """
        low, high = self.activation_levels
        levels = [layer.activation_levels for layer in run.layers if layer.activation_levels]
        return all(low <= count <= high for count in levels)


class MetaNetwork(nn.Module):
    """A GRU cell shared by all layers, with a mean and a maximum over layers as common input.

    The noise is put out for the whole network, by the mean over layers, the fraction by each layer:
    the differences in noise that layers learned when each had its own were those of chance, and cost
    half a point of accuracy.

    Args:
        hidden: units of the cell, per layer.
        embedding: units of the embedded inputs.

    Shape:
        features ``(..., layers, features)`` and hidden state ``(..., layers, hidden)`` in; raw
        outputs ``(..., layers, 5)``, zero at initialisation, and the new hidden state out.

    Example:
        >>> network = MetaNetwork(hidden=6, embedding=4)
        >>> network.hidden, network.embedding
        (6, 4)
    """

    def __init__(self, hidden: int = 24, embedding: int = 16) -> None:
        super().__init__()
        self.hidden, self.embedding = hidden, embedding
        self.embed = nn.Linear(_STATIC + _FEEDBACK + _OUTPUTS, embedding)
        self.cell = nn.GRUCell(3 * embedding, hidden)
        self.out = nn.Linear(hidden, _OUTPUTS)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(self.embed(features))
        common = torch.cat([x.mean(-2, keepdim=True), x.amax(-2, keepdim=True)], dim=-1)
        x = torch.cat([x, common.expand(*x.shape[:-1], -1)], dim=-1)
        shape = state.shape
        state = self.cell(x.flatten(0, -2), state.flatten(0, -2)).view(shape)
        raw = self.out(state)
        noise, fraction = raw.split([_OUTPUTS - 1, 1], dim=-1)
        return torch.cat([noise.mean(-2, keepdim=True).expand_as(noise), fraction], -1), state


class LearnedPolicy:
    """The schedule of a meta-network, a :class:`~learnsched.schedule.Policy`.

    Forward std and fraction are bounded offsets from the base curve, the backward std a bounded
    factor. A forward std of exactly 0 can be reached in any epoch and left again. With a fresh
    network, or for level sets of activations outside its domain, the policy is the base curve.

    Args:
        network: the meta-network.
        base: the curve that its outputs are offsets from; one for each kind of run, or for all.
        domain: what meta-training has seen.
        open_loop: show the network no telemetry.

    Example:
        >>> from learnsched.schedule import LayerInfo, plan
        >>> run = RunInfo((LayerInfo("fc", 10, 3, 4),), horizon=5, steps_per_epoch=10)
        >>> schedule = plan(LearnedPolicy(MetaNetwork()), run)
        >>> [round(s, 3) for s in schedule["weight_forward_std"].flatten().tolist()]
        [0.35, 0.204, 0.058, 0.0, 0.0]
    """

    noise = "normal"
    partition = "settled"

    def __init__(
        self,
        network: MetaNetwork,
        base: BaseCurves | BaseCurve | None = None,
        domain: Domain | None = None,
        *,
        open_loop: bool = False,
    ) -> None:
        self.network = network
        base = base or BaseCurve()
        self.base = BaseCurves.everywhere(base) if isinstance(base, BaseCurve) else base
        self.domain = domain or Domain()
        self.open_loop = open_loop
        self.metrics: tuple[str, ...] = () if open_loop else ("train_loss",)

    def __repr__(self) -> str:
        return f"LearnedPolicy({self.config()})"

    def config(self) -> dict[str, Any]:
        """All but the network's parameters, as JSON data."""
        return {
            "hidden": self.network.hidden,
            "embedding": self.network.embedding,
            "open_loop": self.open_loop,
            "base": self.base.config(),
            "domain": {name: list(seen) for name, seen in asdict(self.domain).items()},
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LearnedPolicy:
        """The reverse of :meth:`config`, with a fresh network.

        Raises:
            KeyError, TypeError, ValueError: the configuration is not one of :meth:`config`.
        """
        domain = Domain(**{name: (low, high) for name, (low, high) in config["domain"].items()})
        network = MetaNetwork(config["hidden"], config["embedding"])
        base = BaseCurves.from_config(config["base"])
        return cls(network, base, domain, open_loop=config["open_loop"])

    def begin(self, run: RunInfo) -> dict[str, Tensor]:
        """The state before the first epoch; warns if the run lies outside the domain."""
        outside = self.domain.outside(run)
        if outside:
            warnings.warn(
                f"outside of what the schedule was trained on: {'; '.join(outside)}. "
                "These inputs are clipped to what it has seen",
                stacklevel=3,
            )
        return self.initial_state(run)

    def initial_state(self, run: RunInfo, members: tuple[int, ...] = ()) -> dict[str, Tensor]:
        """Zero state for runs of shape ``members`` that are scheduled together."""
        like = self.network.out.bias
        shape = (*members, len(run.layers))
        return {
            "hidden": like.new_zeros(*shape, self.network.hidden),
            "fraction": like.new_zeros(shape),
            "outputs": like.new_zeros(*shape, _OUTPUTS),
        }

    def settings(
        self, run: RunInfo, epoch: int, telemetry: Telemetry, state: dict[str, Tensor]
    ) -> tuple[Sequence[Setting], dict[str, Tensor]]:
        """The network's settings of the epoch; warns of a loss that meta-training has not seen."""
        if not self.open_loop and not 0 < float(telemetry.loss) <= _LARGEST_LOSS:
            # Always the same words, so that they are said once.
            warnings.warn(
                "the training loss has fallen to zero or below, or has grown to more than "
                f"{_LARGEST_LOSS:g} times that of the first epoch, which the schedule has not seen in "
                "training; it is clipped. Pass a positive loss, such as the cross entropy, and see "
                "whether training diverges",
                stacklevel=4,
            )
        with torch.no_grad():
            table, state = self.tensors(run, epoch, telemetry, state)
        return [Setting(*row) for row in table.double().tolist()], state

    def tensors(
        self, run: RunInfo, epoch: int, telemetry: Telemetry, state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Differentiable settings, shape ``(..., layers, len(FIELDS))``, and the new state."""
        like = self.network.out.bias
        progress = run.progress(epoch)
        static = _static_features(run, progress, self.domain).to(like)
        if self.open_loop:
            feedback = like.new_zeros(_FEEDBACK)
        else:
            feedback = _feedback_features(telemetry).to(like)
        shape = state["outputs"].shape[:-1]
        features = torch.cat(
            [
                static.expand(*shape, _STATIC),
                feedback.expand(*shape, _FEEDBACK),
                state["outputs"],
            ],
            dim=-1,
        )
        raw, hidden = self.network(features, state["hidden"])
        offset = torch.tanh(raw) if self.domain.has_seen_levels(run) else torch.zeros_like(raw)
        curve = self.base.nearest(run)
        rows = [curve.at(progress, depth) for depth in depths(len(run.layers))]
        base = torch.tensor(rows, dtype=like.dtype, device=like.device).unbind(-1)
        fraction = torch.maximum(state["fraction"], leaky_clamp(base[4] + offset[..., 4]))
        columns = (
            leaky_clamp(base[0] + offset[..., 0]),
            base[1] * torch.exp(_LOG_RANGE * offset[..., 1]),
            leaky_clamp(base[2] + offset[..., 2]),
            base[3] * torch.exp(_LOG_RANGE * offset[..., 3]),
            fraction,
        )
        outputs = torch.stack(columns, dim=-1)
        own = torch.stack(
            [*columns[::2][:2], *(torch.log(c) for c in columns[1:4:2]), fraction], -1
        )
        means = torch.zeros_like(outputs[..., : len(FIELDS) - _OUTPUTS])
        state = {"hidden": hidden, "fraction": fraction, "outputs": own.detach()}
        return torch.cat([outputs, means], dim=-1), state


_LOG_RANGE = math.log(6.0)


class _LeakyClamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, leak: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.leak = leak
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return torch.where((x > 0) & (x < 1), grad, ctx.leak * grad), None


def leaky_clamp(x: Tensor, leak: float = 0.3) -> Tensor:
    """Clamp to [0, 1] whose gradient does not die outside but is multiplied by ``leak``.

    So an output can sit on exactly 0, the hard quantizer, and come back.
    """
    result: Tensor = _LeakyClamp.apply(x, leak)
    return result


def _static_features(run: RunInfo, progress: float, domain: Domain) -> Tensor:
    """What is known before training, shape ``(layers, features)``, of order 1."""

    def log_within(value: float, seen: tuple[float, float], typical: float) -> float:
        return math.log(min(max(value, seen[0]), seen[1]) / typical)

    count = len(run.layers)
    horizon = log_within(run.horizon, domain.horizon, 15.0)
    steps = run.steps_per_epoch
    typical_steps = math.sqrt(domain.steps[0] * domain.steps[1])
    total = typical_steps if steps is None else run.horizon * steps
    rows = []
    for index, (layer, depth) in enumerate(zip(run.layers, depths(count), strict=True)):
        fan_in = log_within(layer.fan_in, domain.fan_in, 50.0) if layer.fan_in else 0.0
        rows.append(
            [
                depth,
                float(index == 0),
                float(index == count - 1),
                fan_in / 2,
                math.log2(layer.weight_levels) / 2 if layer.weight_levels else 0.0,
                math.log2(layer.activation_levels) / 2 if layer.activation_levels else 0.0,
                log_within(count, domain.depth, 4.0),
                horizon,
                log_within(total, domain.steps, 300.0),
                float(run.fine_tuning),
                progress,
                *(math.tanh((progress - knot) / 0.15) for knot in _KNOTS),
            ]
        )
    return torch.tensor(rows)


def _feedback_features(telemetry: Telemetry) -> Tensor:
    """Telemetry, shape ``(..., layers, 3)``, of order 1 whatever the run."""
    error = telemetry.weight_error
    loss = telemetry.loss.clamp(min=1e-4).log().clamp(-4, 1)
    trend = (4 * telemetry.loss_trend.clamp(min=1e-4).log()).clamp(-2, 2)
    columns = [loss.unsqueeze(-1).expand_as(error), trend.unsqueeze(-1).expand_as(error), error]
    return torch.nan_to_num(torch.stack(columns, dim=-1))
