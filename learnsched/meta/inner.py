"""The inner loop: quantization-aware training of a population, differentiable with ``higher``.

State goes in, state comes out; one call is one epoch. So an estimator may keep every epoch's graph,
recompute it, or ask for no graph at all, without knowing what is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import higher
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from learnsched.annealed import quantize_unchecked
from learnsched.incremental import any_per_channel, hold, priority, soft_membership
from learnsched.learning_rate import warm_cosine
from learnsched.meta.inner_optimizers import Adam, InnerOptimizer
from learnsched.meta.population import CARRIED, Population
from learnsched.schedule import FIELDS, FRACTION, RunInfo, Telemetry
from learnsched.weight_quantizer import WeightQuantizer

_WEIGHT_BACKWARD = FIELDS.index("weight_backward_std")


@dataclass(frozen=True, eq=False)
class InnerState:
    """All that an epoch hands to the next: as a flat tuple of tensors for autograd, and a count.

    Attributes:
        tensors: parameters, the optimizer's moments one after the other, carried quantizer buffers.
        step: optimizer steps taken.
    """

    tensors: tuple[Tensor, ...]
    step: int


@dataclass(frozen=True, eq=False)
class Batches:
    """Which data each member of a population sees.

    Attributes:
        x: training inputs, shape ``(examples, ...)``.
        y: training labels, shape ``(examples,)``.
        order: indices, shape ``(horizon, steps, members, batch)``.
        x_held_out: inputs of the outer loss, shape ``(members, examples, ...)``.
        y_held_out: their labels, shape ``(members, examples)``.
    """

    x: Tensor
    y: Tensor
    order: Tensor
    x_held_out: Tensor
    y_held_out: Tensor

    def repeated(self, count: int) -> Batches:
        """The data of ``count`` copies of the members, one after the other."""
        held_out = (self.x_held_out, self.y_held_out)
        return Batches(
            self.x,
            self.y,
            self.order.repeat(1, 1, count, 1),
            *(t.repeat(count, *[1] * (t.dim() - 1)) for t in held_out),
        )


class InnerLoop:
    """Training of a population under given settings, epoch by epoch.

    Args:
        population: networks to train, at their initial weights.
        batches: the data of each member.
        learning_rate: its maximum over the run, shape ``(members,)``.
        fine_tuning: whether the networks were trained as float networks before.
        partition: the order in which INQ takes weights.
        membership_width: width of the soft INQ membership; 0 freezes whole weights.
        optimizer: what trains the networks; Adam if None.
        seed: of what an estimator draws, and of random partitions.
        rates: factor on the learning rate in place of a cosine, shape ``(horizon * steps, members)``,
            or one column for all.
        member_run: which run each member belongs to, counted from 0, shape ``(members,)``: those of one
            run get the same random partitions. Each has one of its own if None.
    """

    def __init__(
        self,
        population: Population,
        batches: Batches,
        learning_rate: Tensor,
        *,
        fine_tuning: bool = False,
        partition: str = "settled",
        membership_width: float = 0.05,
        optimizer: InnerOptimizer | None = None,
        seed: int = 0,
        rates: Tensor | None = None,
        member_run: Tensor | None = None,
    ) -> None:
        self.seed = seed
        self.rates = rates
        self.population = population
        if member_run is None:
            member_run = torch.arange(population.members, device=learning_rate.device)
        self.member_run = member_run
        self.batches = batches
        self.learning_rate = learning_rate
        self.partition = partition
        self.membership_width = membership_width
        horizon, steps = batches.order.shape[:2]
        self.run = RunInfo(population.layers, horizon, steps, fine_tuning)
        self.optimizer = optimizer or Adam()
        self._patched = self.optimizer.build(population.parameters())
        self._count = len(self._patched.param_groups)
        self._carried_from = (1 + len(self.optimizer.moments)) * self._count
        self._position = {name: i for i, (name, _) in enumerate(population.named_parameters())}

    def repeated(self, count: int) -> InnerLoop:
        """``count`` copies of the members, of the same weights, data and learning rates."""
        rates = self.rates
        if rates is not None and rates.shape[1] > 1:
            rates = rates.repeat(1, count)
        return InnerLoop(
            self.population.repeated(count),
            self.batches.repeated(count),
            self.learning_rate.repeat(count),
            fine_tuning=self.run.fine_tuning,
            partition=self.partition,
            membership_width=self.membership_width,
            optimizer=self.optimizer,
            seed=self.seed,
            rates=rates,
            member_run=self.member_run.repeat(count),
        )

    def initial(self) -> InnerState:
        """The state before the first epoch."""
        parameters = [p.detach().clone() for p in self.population.parameters()]
        moments = zip(*(self.optimizer.start(p) for p in parameters), strict=True)
        carried = [
            getattr(self.population, self.population.key(name)).clone()
            for name in self._carried_names()
        ]
        return InnerState((*parameters, *(t for kind in moments for t in kind), *carried), 0)

    @torch.enable_grad()
    def epoch(
        self,
        state: InnerState,
        settings: Tensor,
        epoch: int,
        *,
        track: bool,
        damping: float = 1.0,
    ) -> tuple[InnerState, Tensor]:
        """Train for one epoch.

        Args:
            state: as :meth:`initial` or an epoch before left it.
            settings: shape ``(members, layers, len(FIELDS))``.
            epoch: index, from 0.
            track: keep the graph from the settings and the state to the new state.
            damping: factor on the derivative of the inner gradient in the parameters, in that graph:
                1 is the true derivative, 0 leaves the second order out.

        Returns:
            the new state and the mean training loss of each member, shape ``(members,)``, detached.

        Raises:
            ValueError: forward values are sampled, and a graph is asked for: computed again, as for a
                gradient, the epoch would draw others.
        """
        if track and any(weight.quantizer.mode == "random" for weight in self.population.weights):
            raise ValueError(
                'runs with mode "random" are not differentiated, since an epoch that is computed again '
                'draws other values; use mode "expectation", or evolution strategies'
            )
        count = self._count
        parameters = list(state.tensors[:count])
        carried = self._freeze(parameters, state.tensors[self._carried_from :], settings, epoch)
        replaced = {**self.population.noise_buffers(settings), **self._carried_buffers(carried)}
        model = higher.monkeypatch(
            self.population, copy_initial_weights=False, track_higher_grads=track
        )
        optimizer = higher.optim.get_diff_optim(
            self._patched, self.population.parameters(), fmodel=model, track_higher_grads=track
        )
        names = self.optimizer.moments
        for i in range(count):
            optimizer.state[i][0] = {
                "step": state.step,
                **{n: state.tensors[(k + 1) * count + i] for k, n in enumerate(names)},
            }
        # Frozen values come from the parameters too: the inner gradient must not flow through them.
        # Of a state that has no graph yet, as the initial one, training takes gradients all the same.
        parameters = [
            p.clone() if track and p.requires_grad else p.detach().requires_grad_()
            for p in parameters
        ]
        damped = track and damping != 1
        decay = self.optimizer.decoupled_decay
        losses = []
        steps = self.batches.order.shape[1]
        for step in range(steps):
            index = self.batches.order[epoch, step]
            # The values are the same, the derivative of the inner gradient is damped: its path goes
            # through `seen`, that of the update's identity through `parameters`.
            seen = parameters
            if damped:
                seen = [torch.lerp(p.detach(), p, damping) for p in parameters]
            logits = model(self.batches.x[index], replaced, params=seen)
            loss = member_losses(logits, self.batches.y[index])
            rate = self._rate(epoch * steps + step, parameters)
            moved = optimizer.step(loss.sum(), params=seen, override={"lr": rate})
            if damped:
                moved = [p + (m - s) for p, m, s in zip(parameters, moved, seen, strict=True)]
            if decay:
                moved = [m - decay * r * p for m, r, p in zip(moved, rate, parameters, strict=True)]
            parameters = self._restored(moved, carried)
            if not track and (decay or self.partition == "redraw"):
                parameters = [p.detach().requires_grad_() for p in parameters]
            losses.append(loss.detach())
        moments = [optimizer.state[i][0][name] for name in names for i in range(count)]
        tensors = (*parameters, *moments, *carried)
        if not track:
            tensors = tuple(t.detach() for t in tensors)
        return InnerState(tensors, state.step + steps), torch.stack(losses).mean(0)

    def outer_loss(self, state: InnerState, settings: Tensor) -> Tensor:
        """Loss of each member on held-out data under ``settings``, shape ``(members,)``."""
        return member_losses(
            self.logits(state, settings, self.batches.x_held_out), self.batches.y_held_out
        )

    def outer_error(self, state: InnerState, settings: Tensor) -> Tensor:
        """Share of held-out data that each member gets wrong, shape ``(members,)``; no gradient."""
        with torch.no_grad():
            logits = self.logits(state, settings, self.batches.x_held_out)
            return (logits.argmax(-1) != self.batches.y_held_out).to(logits.dtype).mean(1)

    def logits(self, state: InnerState, settings: Tensor, x: Tensor) -> Tensor:
        """Logits under batch statistics, for ``x`` of shape ``(members, examples, ...)``."""
        model = higher.monkeypatch(
            self.population, copy_initial_weights=False, track_higher_grads=False
        )
        return self._call(model, state, settings, x)

    @torch.no_grad()
    def accuracy(self, state: InnerState, settings: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Accuracy of each member with batch norm statistics re-estimated on training data.

        Args:
            state: at the end of a run.
            settings: shape ``(members, layers, len(FIELDS))``; terminal ones for a hard network.
            x: inputs, shape ``(examples, ...)``, the same for all members.
            y: labels, shape ``(examples,)``.

        Returns:
            shape ``(members,)``, in [0, 1].
        """
        population = self.population
        model = higher.monkeypatch(population, copy_initial_weights=False, track_higher_grads=False)
        try:
            for seen, index in enumerate(self.batches.order[-1][:20]):
                population.track_batch_norm(1 / (seen + 1))  # a plain mean over the batches
                self._call(model, state, settings, self.batches.x[index])
            population.template.eval()
            correct = []
            for chunk, labels in zip(x.split(500), y.split(500), strict=True):
                shared = chunk.expand(population.members, *chunk.shape)
                prediction = self._call(model, state, settings, shared).argmax(-1)
                correct.append((prediction == labels).double().sum(-1))
        finally:
            population.template.train()
            population.track_batch_norm(None)
        return torch.stack(correct).sum(0) / len(y)

    def telemetry(self, state: InnerState, losses: list[Tensor]) -> Telemetry:
        """What a policy may see after the epochs whose mean losses are given; no gradient."""
        error = self._weight_error(state)
        if not losses:
            return Telemetry.initial(error)
        before = losses[-2] if len(losses) > 1 else losses[-1]
        return Telemetry(losses[-1] / losses[0], losses[-1] / before, error)

    def _call(self, model: nn.Module, state: InnerState, settings: Tensor, x: Tensor) -> Tensor:
        carried = self._carried_buffers(state.tensors[self._carried_from :])
        replaced = {**self.population.noise_buffers(settings), **carried}
        result: Tensor = model(x, replaced, params=list(state.tensors[: self._count]))
        return result

    def _rate(self, step: int, parameters: list[Tensor]) -> list[Tensor]:
        total = self.batches.order.shape[0] * self.batches.order.shape[1]
        factor = warm_cosine(step / total) if self.rates is None else self.rates[step]
        rate = self.learning_rate * factor
        return [rate.view(-1, *[1] * (p.dim() - 1)) for p in parameters]

    def _carried_names(self) -> list[str]:
        return [
            f"{weight.quantizer_name}.{name}"
            for weight in self.population.weights
            for name in CARRIED
        ]

    def _carried_buffers(self, carried: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return dict(zip(self._carried_names(), carried, strict=True))

    def _parameter(self, parameters: list[Tensor], name: str) -> Tensor:
        return parameters[self._position[self.population.key(name)]]

    def _freeze(
        self,
        parameters: list[Tensor],
        carried: tuple[Tensor, ...],
        settings: Tensor,
        epoch: int,
    ) -> tuple[Tensor, ...]:
        """The carried buffers after the settings' fractions, by soft membership."""
        result: list[Tensor] = []
        generator = torch.Generator(settings.device)
        generator.manual_seed((1_000_003 * self.seed + 1_009 * epoch) % 2**63)
        redraw = self.partition == "redraw"
        drawn = self.partition in ("random", "redraw")
        runs = int(self.member_run.max()) + 1
        for quantizer, layer, weight, scale, (membership, held, _, scale_held) in self._quantized(
            parameters, carried
        ):
            x = weight / scale
            backward = settings[:, layer, _WEIGHT_BACKWARD].view(-1, *[1] * (x.dim() - 1))
            projected = scale * quantize_unchecked(
                x, quantizer.levels, 0.0, 0.0, backward * quantizer.levels.step, 0.0,
                quantizer.noise,
            )  # fmt: skip
            order = priority(
                x.detach()[:runs] if drawn else x.detach(),
                quantizer.levels,
                self.partition,
                generator,
            )
            if drawn:
                order = order[self.member_run]
            width = max(self.membership_width, 1e-9)
            fraction = settings[:, layer, FRACTION]
            if redraw:  # what was frozen goes on from where it was
                membership = torch.zeros_like(membership)
            new = vmap(lambda o, m, f, w=width: soft_membership(o, m, f, w))(
                order, membership, fraction
            )
            if redraw:
                started = (fraction == 1).view(-1, *[1] * (scale.dim() - 1))
            else:
                started = vmap(any_per_channel)(new.detach(), scale)
            result += [
                new,
                hold(held, membership, projected, new),
                scale,
                torch.maximum(scale_held, started.to(scale.dtype).expand_as(scale_held)),
            ]
        return tuple(result)

    def _restored(self, parameters: Sequence[Tensor], carried: tuple[Tensor, ...]) -> list[Tensor]:
        """Parameters whose frozen entries are back where the optimizer has moved them from.

        It matters only where weights are released again: these go on from their levels.
        """
        result = list(parameters)
        if self.partition == "redraw":
            for place, weight in enumerate(self.population.weights):
                membership, held, *_ = carried[len(CARRIED) * place :]
                index = self._position[self.population.key(weight.name)]
                result[index] = torch.where(membership >= 1, held, result[index])
        return result

    @torch.no_grad()
    def _weight_error(self, state: InnerState) -> Tensor:
        """Relative quantization error, shape ``(members, layers)``; 0 where weights stay real.

        Frozen weights have none, as in a model whose frozen weights are put back on their levels.
        """
        error = self.learning_rate.new_zeros(self.population.members, len(self.population.layers))
        parameters = list(state.tensors[: self._count])
        carried = state.tensors[self._carried_from :]
        for quantizer, layer, weight, scale, (membership, held, *_) in self._quantized(
            parameters, carried
        ):
            gap = (1 - membership) * (weight - scale * quantizer.levels.quantize(weight / scale))
            kept = torch.lerp(weight, held, membership)
            norms = [t.flatten(1).norm(dim=1) for t in (gap, kept)]
            error[:, layer] = norms[0] / norms[1].clamp(min=1e-12)
        return error

    def _quantized(
        self, parameters: list[Tensor], carried: tuple[Tensor, ...]
    ) -> Iterator[tuple[WeightQuantizer, int, Tensor, Tensor, tuple[Tensor, ...]]]:
        """Quantizer, layer, stacked weight, scales in force and what is carried of each weight."""
        size = len(CARRIED)
        for place, (name, key, quantizer, layer) in enumerate(self.population.weights):
            own = carried[size * place : size * (place + 1)]
            weight = self._parameter(parameters, name)
            learned = [] if quantizer.log_scale is None else [f"{key}.log_scale"]
            factors = (self._parameter(parameters, name) for name in learned)
            scale = vmap(quantizer.fitted_scale)(weight, *factors)
            _, _, held_scale, scale_held = own
            yield quantizer, layer, weight, torch.where(scale_held > 0, held_scale, scale), own


def member_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of each member, shape ``(members,)``."""
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(labels.shape).mean(1)
