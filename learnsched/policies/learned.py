"""The learned policy: a recurrent meta-network that outputs every layer's setting, epoch by epoch."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from learnsched.digest import digest
from learnsched.policies.base_curve import BaseCurve, loss_gain
from learnsched.policies.base_curves import BaseCurves
from learnsched.policies.domain import LATER_RANGES, Domain
from learnsched.policies.features import FEEDBACK, STATIC, feedback_features, static_features
from learnsched.policies.meta_network import OUTPUTS, MetaNetwork
from learnsched.schedule import FIELDS, RunInfo, Setting, Telemetry

# Relative to the first epoch's loss, without a warning: twice what the features are clipped to.
_LARGEST_LOSS = round(2 * math.e, 1)
# Choices that the first artefacts do not name; they are made without.
LATER_CHOICES = ("shared_noise", "moved_start")
# The network can change a backward std by this factor either way.
_LOG_RANGE = math.log(6.0)


class LearnedPolicy:
    """The schedule of a meta-network, a :class:`~learnsched.schedule.Policy`.

    Forward std and fraction are bounded offsets from the base curve, the backward std a bounded
    factor. A forward std of exactly 0 can be reached in any epoch and left again. With a fresh
    network, or for level sets of activations outside its domain, the policy is the base curve.

    Args:
        network: the meta-network.
        base: the curve that its outputs are offsets from; one for each kind of run, or for all.
        domain: what meta-training has seen.
        open_loop: show network and base no telemetry.
        shared_noise: give all layers the mean of what the network adds to their noise; each keeps its
            own fraction.
        moved_start: what the network adds to the fraction moves the start of freezing, and freezes
            nothing before. Without, it may freeze a few weights of a layer from the first epoch on,
            and their scale with them; no gradient sees that.

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
        shared_noise: bool = False,
        moved_start: bool = False,
    ) -> None:
        self.network = network
        base = base or BaseCurve()
        self.base = BaseCurves.everywhere(base) if isinstance(base, BaseCurve) else base
        self.domain = domain or Domain()
        self.open_loop = open_loop
        self.shared_noise = shared_noise
        self.moved_start = moved_start
        self.metrics: tuple[str, ...] = () if open_loop else ("train_loss",)

    def __repr__(self) -> str:
        # Another network is another policy, whose states are not to be mixed up.
        parameters = dict(self.network.named_parameters())
        return f"LearnedPolicy({self.config()}, network {digest(parameters)[:16]})"

    def config(self) -> dict[str, Any]:
        """All but the network's parameters, as JSON data."""
        return {
            "hidden": self.network.hidden,
            "embedding": self.network.embedding,
            "open_loop": self.open_loop,
            "shared_noise": self.shared_noise,
            "moved_start": self.moved_start,
            "base": self.base.config(),
            "domain": {name: list(seen) for name, seen in asdict(self.domain).items()},
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LearnedPolicy:
        """The reverse of :meth:`config`, with a fresh network.

        Raises:
            KeyError, TypeError, ValueError: the configuration is not one of :meth:`config`.
        """
        config = completed(config)
        domain = Domain(**{name: (low, high) for name, (low, high) in config["domain"].items()})
        # Artefacts are in single precision, whatever the default is; and reading one must not change
        # what a user draws next. Telemetry is on the CPU.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            network = MetaNetwork(config["hidden"], config["embedding"]).float()
        base = BaseCurves.from_config(config["base"])
        later = {name: config[name] for name in LATER_CHOICES}
        return cls(network, base, domain, open_loop=config["open_loop"], **later)

    def replaced(
        self,
        *,
        network: MetaNetwork | None = None,
        shared_noise: bool | None = None,
        moved_start: bool | None = None,
    ) -> LearnedPolicy:
        """The same policy with what is given in place of its own."""
        given = {"network": network, "shared_noise": shared_noise, "moved_start": moved_start}
        result = copy.copy(self)
        vars(result).update({name: value for name, value in given.items() if value is not None})
        return result

    def begin(self, run: RunInfo) -> dict[str, Tensor]:
        """The state before the first epoch; warns if the run lies outside the domain.

        Not where activations are others than the network has seen: the base curve has no such inputs.
        """
        outside = self.domain.outside(run) if self.domain.has_seen_levels(run) else []
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
            "outputs": like.new_zeros(*shape, OUTPUTS),
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
                stacklevel=5,  # ask, the scheduler and its step lie between
            )
        with torch.no_grad():
            table, state = self.tensors(run, epoch, telemetry, state)
        return [Setting(*row) for row in table.double().tolist()], state

    def learning_rate_factor(self, run: RunInfo, progress: float) -> float:
        """That of the base curve; the network has no say in it."""
        return self.base.learning_rate_factor(run, progress)

    def tensors(
        self, run: RunInfo, epoch: int, telemetry: Telemetry, state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Differentiable settings, shape ``(..., layers, len(FIELDS))``, and the new state."""
        offset, hidden = self._offsets(run, epoch, telemetry, state)
        curve = self.base.nearest(run)
        base = torch.tensor(curve.rows(run, epoch), dtype=offset.dtype, device=offset.device)
        gain: Tensor | float = 1.0
        if not self.open_loop:
            gain = loss_gain(telemetry.loss, curve.power_in(run)).to(offset).unsqueeze(-1)
        weight, weight_back, activation, activation_back, line = base.unbind(-1)
        by_weight, by_weight_back, by_activation, by_activation_back, by_line = offset.unbind(-1)
        weight = leaky_clamp(weight * gain + by_weight)
        weight_back = weight_back * torch.exp(_LOG_RANGE * by_weight_back)
        activation = leaky_clamp(activation * gain + by_activation)
        activation_back = activation_back * torch.exp(_LOG_RANGE * by_activation_back)
        if self.moved_start:
            fraction = (line + by_line).clamp(0, 1)
        else:
            fraction = leaky_clamp(line.clamp(min=0) + by_line)
        fraction = torch.maximum(state["fraction"], fraction)
        outputs = torch.stack([weight, weight_back, activation, activation_back, fraction], dim=-1)
        means = torch.zeros_like(outputs[..., : len(FIELDS) - OUTPUTS])
        own = [weight, activation, weight_back.log(), activation_back.log(), fraction]
        state = {
            "hidden": hidden,
            "fraction": fraction,
            "outputs": torch.stack(own, dim=-1).detach(),
        }
        return torch.cat([outputs, means], dim=-1), state

    def _offsets(
        self, run: RunInfo, epoch: int, telemetry: Telemetry, state: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """What the network adds to the base curve, ``(..., layers, OUTPUTS)``, and its hidden state."""
        like = self.network.out.bias
        static = static_features(run, run.progress(epoch), self.domain).to(like)
        feedback = (
            like.new_zeros(FEEDBACK) if self.open_loop else feedback_features(telemetry).to(like)
        )
        shape = state["outputs"].shape[:-1]
        features = torch.cat(
            [static.expand(*shape, STATIC), feedback.expand(*shape, FEEDBACK), state["outputs"]],
            dim=-1,
        )
        raw, hidden = self.network(features, state["hidden"])
        offset = torch.tanh(raw) if self.domain.has_seen_levels(run) else torch.zeros_like(raw)
        if self.shared_noise:
            noise, line = offset.split([OUTPUTS - 1, 1], dim=-1)
            offset = torch.cat([noise.mean(-2, keepdim=True).expand_as(noise), line], dim=-1)
        return offset, hidden


def completed(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with what older ones leave unsaid.

    Raises:
        KeyError, TypeError: it has no domain.
    """
    ranges = {name: list(seen) for name, seen in LATER_RANGES.items()}
    domain = {**ranges, **config["domain"]}
    return {**dict.fromkeys(LATER_CHOICES, False), **config, "domain": domain}


_LEAK = 0.3


class _LeakyClamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return torch.where((x > 0) & (x < 1), grad, _LEAK * grad)


def leaky_clamp(x: Tensor) -> Tensor:
    """Clamp to [0, 1] whose gradient does not die outside but is multiplied by 0.3.

    So an output can sit on exactly 0, the hard quantizer, and come back.
    """
    result: Tensor = _LeakyClamp.apply(x)
    return result
