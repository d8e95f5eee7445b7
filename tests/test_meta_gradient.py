"""The unrolled gradient equals finite differences to 1e-6, where the loss is smooth.

Backpropagation takes a quantizer's *backward* noise for its derivative. Where backward and forward
noise are equal that is the true derivative of the value, so that every derivative is true; the tests
take gradients at such points, perturbing forward and backward noise each on its own. A projection
has a value without a slope; :func:`project_far_from_thresholds` sees to it that its surrogate has none
either. Telemetry carries no gradient: an estimate is the derivative with telemetry held at what it
was. So finite differences replay the telemetry of the unperturbed run.
"""

import dataclasses

import pytest
import torch
from small_task import SMALL as TASK

from learnsched.data import load
from learnsched.meta.inner_optimizers import SGD, Adam
from learnsched.meta.parameter_evolution import ParameterEvolution, perturbations
from learnsched.meta.rollout import PolicyRollout, table_rollout
from learnsched.meta.unrolled import Unrolled
from learnsched.policies import BaseCurve, LearnedPolicy, MetaNetwork
from learnsched.schedule import FIELDS

DIGITS = load("digits")
W_FORWARD, W_BACKWARD, A_FORWARD, A_BACKWARD, FRACTION = range(5)
OPTIMIZERS = {
    "sgd": (SGD(), 20.0),
    "momentum": (SGD(momentum=0.9, weight_decay=1e-3), 5.0),
    "adam": (Adam(), 1.0),
    "adamw": (Adam(decoupled_decay=0.1), 1.0),
}


class Smooth:
    """An inner loop whose terminal epoch trains nothing and whose outer loss stays relaxed.

    Estimators know an inner loop as a protocol only; this one differs from the real one in what is
    hard at the end, and in nothing else.
    """

    def __init__(self, inner, std):
        self.inner, self.std, self.seed = inner, std, inner.seed
        self.run = dataclasses.replace(inner.run, horizon=inner.run.horizon + 1)
        self.seen = []

    def initial(self):
        self.seen.clear()
        return self.inner.initial()

    def epoch(self, state, settings, epoch, **options):
        if epoch == self.run.horizon - 1:
            return state, state.tensors[0].detach().new_zeros(self.inner.population.members)
        return self.inner.epoch(state, settings, epoch, **options)

    def outer_loss(self, state, settings):
        relaxed = torch.zeros_like(settings.detach())
        relaxed[..., :FRACTION] = self.std
        return self.inner.outer_loss(state, relaxed)

    def telemetry(self, state, losses):
        self.seen.append(self.inner.telemetry(state, losses))
        return self.seen[-1]

    def repeated(self, count):
        return Smooth(self.inner.repeated(count), self.std)


def smooth(optimizer="adam", factor=None, std=0.8, partition="settled"):
    spec, usual = OPTIMIZERS[optimizer]
    inner = TASK.build(DIGITS)
    inner = type(inner)(
        inner.population.double(),
        dataclasses.replace(
            inner.batches,
            x=inner.batches.x.double(),
            x_held_out=inner.batches.x_held_out.double(),
        ),
        (factor or usual) * inner.learning_rate.double(),
        optimizer=spec,
        partition=partition,
        membership_width=0.3,
    )
    return Smooth(inner, std)


def wide_table(inner, *, seed=0):
    """Equal forward and backward noise of .7 to .9 steps, different in every epoch and layer."""
    generator = torch.Generator().manual_seed(seed)
    shape = (inner.run.horizon, inner.inner.population.members, len(inner.run.layers), 2)
    std = 0.7 + 0.2 * torch.rand(shape, generator=generator, dtype=torch.float64)
    table = torch.zeros(*shape[:3], len(FIELDS), dtype=torch.float64)
    table[..., :FRACTION] = std.repeat_interleave(2, dim=-1)
    return table


def loss_under(inner, rollout, telemetry=None):
    """Outer losses without a graph, by a loop of its own; the telemetry is replayed, if given."""
    state, losses = inner.initial(), []
    for epoch in range(inner.run.horizon):
        seen = inner.telemetry(state, losses) if telemetry is None else telemetry[epoch]
        with torch.no_grad():
            settings = rollout(epoch, seen)
        state, loss = inner.epoch(state, settings, epoch, track=False)
        losses.append(loss)
    with torch.no_grad():
        return inner.outer_loss(state, settings)


def derivative(f, step):
    """Central difference of the fourth order of a function of a number, at 0."""
    weights = {1: 8 / 12, 2: -1 / 12}
    return sum(w * (f(k * step) - f(-k * step)) for k, w in weights.items()) / step


def directions(table, fields, epochs, count=2):
    """Random directions in the given fields of the given epochs."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        direction = torch.zeros_like(table)
        part = torch.randn(table[epochs][..., fields].shape, generator=generator).to(table)
        for place, field in enumerate(fields):
            direction[epochs, ..., field] = part[..., place]
        yield direction


def check(inner, table, fields, epochs=slice(0, -1), step=1e-5):
    gradient = Unrolled()(inner, table_rollout(table)).gradient
    assert bool((gradient[epochs][..., fields] != 0).any())
    for direction in directions(table, fields, epochs):
        found = (gradient * direction).transpose(0, 1).flatten(1).sum(1)
        true = derivative(
            lambda s, d=direction: loss_under(inner, table_rollout(table + s * d)), step
        )
        torch.testing.assert_close(found, true, rtol=1e-6, atol=0)


@pytest.mark.parametrize("fields", [[W_FORWARD, A_FORWARD], [W_BACKWARD, A_BACKWARD]])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gradients_in_noise_are_true(optimizer, fields):
    inner = smooth(optimizer)
    check(inner, wide_table(inner), fields)


def test_the_gradient_in_a_fraction_frozen_at_the_start_is_true():
    inner = smooth()
    table = wide_table(inner)
    table[0, ..., FRACTION] = torch.tensor([0.3, 0.4, 0.5])
    check(inner, table, [FRACTION], slice(0, 1))
    check(inner, table, [W_FORWARD, W_BACKWARD, A_FORWARD, A_BACKWARD], slice(1, -1))


def project_far_from_thresholds(inner, table, epoch):
    """Narrow noise for the weights in the epoch that freezes, and weights where it has no density."""
    table[epoch, ..., [W_FORWARD, W_BACKWARD]] = 0.02
    table[epoch, ..., FRACTION] = torch.tensor([0.3, 0.4, 0.5])
    generator = torch.Generator().manual_seed(2)
    population = inner.inner.population
    for name, _, quantizer, _ in population.weights:
        weight = getattr(population, population.key(name))
        with torch.no_grad():
            scale = weight.flatten(1).abs().mean(1).view(-1, *[1] * (weight.dim() - 1))
            code = quantizer.levels.quantize(weight / scale)
            spread = 0.2 * torch.rand(weight.shape, generator=generator).to(weight) - 0.1
            weight.copy_(scale * (code + spread))


def test_gradients_in_what_came_before_a_projection_are_true():
    # Slow enough that weights stay far from the thresholds. Gradients are small then: SGD, smoother
    # than Adam, allows a step whose rounding they stand out of. The order of a random partition does
    # not depend on the weights; others jump where two weights change places.
    inner = smooth("momentum", factor=0.2, partition="random")
    table = wide_table(inner)
    project_far_from_thresholds(inner, table, 1)
    check(inner, table, [FRACTION], slice(1, 2))
    check(inner, table, [W_FORWARD, W_BACKWARD, A_FORWARD, A_BACKWARD], slice(0, 1), step=3e-4)


class Feedback:
    """Settings from telemetry, forward and backward noise alike."""

    def __init__(self, parameters):
        self.parameters = parameters  # (3 features + 1, 2 kinds of noise)

    def __call__(self, epoch, telemetry):
        error = telemetry.weight_error
        columns = [t.unsqueeze(-1).expand_as(error) for t in (telemetry.loss, telemetry.loss_trend)]
        features = torch.stack([*columns, error, torch.ones_like(error)], dim=-1)
        std = 0.8 + 0.1 * torch.tanh(features @ self.parameters)
        rest = torch.zeros_like(std[..., :1]).expand(*std.shape[:-1], len(FIELDS) - FRACTION)
        return torch.cat([std.repeat_interleave(2, dim=-1), rest], dim=-1)


def test_the_gradient_of_a_closed_loop_is_the_one_with_telemetry_held():
    inner = smooth()
    generator = torch.Generator().manual_seed(3)
    centre, direction = torch.randn(2, 4, 2, generator=generator, dtype=torch.float64)
    parameters = centre.clone().requires_grad_()
    estimate = Unrolled()(inner, Feedback(parameters))
    telemetry = list(inner.seen)
    found = (estimate.parameter_gradient([parameters]) * direction.flatten()).sum()

    def along(telemetry):
        return derivative(
            lambda s: loss_under(inner, Feedback(centre + s * direction), telemetry).mean(), 1e-5
        )

    torch.testing.assert_close(found, along(telemetry), rtol=1e-6, atol=0)
    # what the closed loop adds, and the estimate leaves out
    assert abs(along(None) / found - 1) > 1e-4


def fresh_policy():
    """A policy with a fresh network, whose base curve has equal forward and backward noise."""
    base = BaseCurve(
        weight_forward_std=0.8, activation_forward_std=0.8, weight_hard_from=1.0,
        activation_hard_from=1.0, power=1e-9, weight_backward_std=0.8, weight_backward_end=0.8,
        activation_backward_std=0.8, activation_backward_end=0.8, freeze_from=0.99,
    )  # fmt: skip
    torch.manual_seed(0)
    return LearnedPolicy(MetaNetwork(hidden=3, embedding=2).double(), base)


def test_the_gradient_chains_to_the_meta_network_and_equals_that_of_perturbed_networks():
    inner, policy = smooth("momentum"), fresh_policy()
    rollout = PolicyRollout(policy, inner.run, 2)
    parameters = list(policy.network.parameters())
    gradient = Unrolled()(inner, rollout).parameter_gradient(parameters)
    direction = torch.randn(
        gradient.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64
    )
    true = derivative(
        lambda s: loss_under(inner, rollout.changed(s * direction.unsqueeze(0))).mean(), 1e-5
    )
    torch.testing.assert_close((gradient * direction).sum(), true, rtol=1e-6, atol=0)

    es = ParameterEvolution(pairs=3, std=1e-5, seed=5)
    estimate = es(inner, rollout)
    noise = perturbations(3, gradient, 5, inner.seed)
    expected = (noise @ gradient) @ noise / 3  # what three directions show of the gradient
    torch.testing.assert_close(estimate.parameter_gradient(parameters), expected, rtol=1e-5, atol=0)
    assert estimate.norms.shape == (2,)
