"""One epoch of the inner loop: its adjoint under damping, what it freezes, and its telemetry."""

import dataclasses
import math

import pytest
import small_task
import torch
from torch import nn

from learnsched.data import load
from learnsched.meta.inner import InnerState
from learnsched.meta.inner_optimizers import SGD, Adam
from learnsched.meta.networks import Family
from learnsched.schedule import FIELDS

DIGITS = load("digits")
BACKWARD, FRACTION = FIELDS.index("weight_backward_std"), FIELDS.index("fraction")
OPTIMIZERS = {
    "sgd": SGD(),
    "momentum": SGD(momentum=0.9, weight_decay=1e-3),
    "adam": Adam(),
    "adamw": Adam(decoupled_decay=0.1),
}
RATE = 0.02

every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def loop(*, optimizer="sgd", partition="settled", width=0.0, rate=RATE, **changes):
    """An inner loop of two members in double precision, at a constant learning rate."""
    inner = dataclasses.replace(small_task.SMALL, **changes).build(DIGITS)
    b = inner.batches
    return type(inner)(
        inner.population.double(),
        dataclasses.replace(b, x=b.x.double(), x_held_out=b.x_held_out.double()),
        torch.full((2,), rate, dtype=torch.float64),
        optimizer=OPTIMIZERS[optimizer],
        partition=partition,
        membership_width=width,
        rates=torch.ones(inner.run.horizon * inner.run.steps_per_epoch, 1, dtype=torch.float64),
    )


def settings_of(inner, *, std=0.8, fraction=0.0):
    """Equal noise everywhere; the fraction is one for all or one a member."""
    table = torch.zeros(2, len(inner.run.layers), len(FIELDS), dtype=torch.float64)
    table[..., :FRACTION] = std
    table[..., FRACTION] = torch.as_tensor(fraction, dtype=torch.float64).view(-1, 1)
    return table


def parameters_of(inner, state):
    names = [name for name, _ in inner.population.named_parameters()]
    return dict(zip(names, state.tensors, strict=False))


def weights_of(inner, state):
    """Of each quantized weight: layer, levels, parameter, and what is carried with it."""
    weights, parameters = inner.population.weights, parameters_of(inner, state)
    carried = state.tensors[-4 * len(weights) :]
    for place, weight in enumerate(weights):
        parameter = parameters[inner.population.key(weight.name)]
        yield weight.layer, weight.quantizer, parameter, carried[4 * place : 4 * place + 4]


def adjoint(inner, settings, damping):
    """New parameters, a cotangent of theirs, and what one epoch makes of it."""
    start = inner.initial()
    leaves = tuple(t.clone().requires_grad_() for t in start.tensors)
    settings = settings.clone().requires_grad_()
    state, _ = inner.epoch(InnerState(leaves, 0), settings, 0, track=True, damping=damping)
    count = len(list(inner.population.parameters()))
    new = state.tensors[:count]
    generator = torch.Generator().manual_seed(0)
    outer = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in new]
    *of_parameters, of_settings = torch.autograd.grad(
        new, [*leaves[:count], settings], outer, materialize_grads=True
    )
    return [p.detach() for p in new], outer, of_parameters, of_settings


@every_optimizer
def test_without_the_second_order_parameters_pass_their_adjoint_on_as_it_is(optimizer):
    """All that a step does to them then is to add what does not depend on them, and to decay them."""
    steps = 3
    inner = loop(optimizer=optimizer, steps=steps)
    _, outer, found, _ = adjoint(inner, settings_of(inner), 0.0)
    kept = (1 - OPTIMIZERS[optimizer].decoupled_decay * RATE) ** steps
    for of_parameter, v in zip(found, outer, strict=True):
        torch.testing.assert_close(of_parameter, kept * v, rtol=1e-12, atol=0)


@every_optimizer
@pytest.mark.parametrize("damping", [0.5, 0.2])
def test_damping_is_a_factor_on_the_second_order_and_on_nothing_else(optimizer, damping):
    inner = loop(optimizer=optimizer, steps=1)
    settings = settings_of(inner)
    new, outer, true, of_settings = adjoint(inner, settings, 1.0)
    damped_new, _, damped, damped_of_settings = adjoint(inner, settings, damping)
    identity = 1 - OPTIMIZERS[optimizer].decoupled_decay * RATE
    second_order = [g - identity * v for g, v in zip(true, outer, strict=True)]
    assert max(float(part.abs().max()) for part in second_order) > 1e-3
    for found, v, part in zip(damped, outer, second_order, strict=True):
        torch.testing.assert_close(found, identity * v + damping * part, rtol=1e-9, atol=1e-12)
    # one step takes the settings' first order alone
    assert damped_of_settings.abs().max() > 0
    torch.testing.assert_close(damped_of_settings, of_settings, rtol=1e-9, atol=1e-15)
    for found, value in zip(damped_new, new, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("bits", ["binary/2-bit", "ternary/2-bit"])
def test_a_frozen_value_moves_with_its_weight_by_the_backward_density(bits):
    """The std counts level steps, and binary levels are two apart."""
    inner = loop(bits=bits, steps=1)
    start = inner.initial()
    settings = settings_of(inner, fraction=1.0)
    layers = torch.arange(len(inner.run.layers), dtype=torch.float64)
    settings[..., BACKWARD] = 0.3 + 0.1 * layers + torch.tensor([[0.0], [0.25]])
    for _, _, _, (_, _, scale, scale_held) in weights_of(inner, start):
        scale.uniform_(0.2, 0.4, generator=torch.Generator().manual_seed(1))
        scale_held.fill_(1.0)  # held, so that the density is all that there is
    leaves = tuple(t.requires_grad_() for t in start.tensors)
    state, _ = inner.epoch(InnerState(leaves, 0), settings, 0, track=True)
    before, after = (weights_of(inner, s) for s in (InnerState(leaves, 0), state))
    for (layer, quantizer, weight, (_, _, scale, _)), (*_, carried) in zip(
        before, after, strict=True
    ):
        assert carried[0].min() == 1
        (found,) = torch.autograd.grad(carried[1].sum(), weight, retain_graph=True)
        values = quantizer.levels.values
        std = settings[:, layer, BACKWARD].view(-1, 1, 1) * (values[1] - values[0])
        density = torch.zeros_like(weight)
        for low, high in zip(values, values[1:], strict=False):
            z = (weight / scale - (low + high) / 2) / std
            density = density + (high - low) * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi) / std
        torch.testing.assert_close(found, density.detach(), rtol=1e-10, atol=1e-300)


def test_a_redrawn_partition_holds_its_scales_when_all_weights_are_frozen_and_not_before():
    inner = loop(partition="redraw", optimizer="momentum", horizon=4, steps=2)
    table = [(0.3, 0.3), (0.6, 0.8), (1.0, 0.8), (1.0, 1.0)]
    states = [inner.initial()]
    for epoch, fraction in enumerate(table):
        settings = settings_of(inner, fraction=fraction)
        states.append(inner.epoch(states[-1], settings, epoch, track=False)[0])
    for member in (0, 1):
        for epoch, fraction in enumerate(table):
            whole = fraction[member] == 1
            started = whole and table[epoch - 1][member] < 1
            pairs = zip(
                weights_of(inner, states[epoch]), weights_of(inner, states[epoch + 1]), strict=True
            )
            for (_, quantizer, weight, before), (*_, (membership, _, scale, scale_held)) in pairs:
                assert bool((scale_held[member] == whole).all())
                assert bool((membership[member] > 0).any())
                fitted = quantizer.rule(weight[member], quantizer.levels)
                if whole and not started:
                    assert torch.equal(scale[member], before[2][member])
                    assert not torch.isclose(scale[member], fitted, rtol=1e-6).all()
                else:
                    torch.testing.assert_close(scale[member], fitted)


def test_telemetry_counts_the_error_of_the_weights_that_are_free():
    inner = loop(optimizer="momentum")
    state = inner.initial()
    for epoch, fraction in enumerate([(0.3, 0.6), (0.4, 1.0)]):
        settings = settings_of(inner, fraction=fraction)
        state, _ = inner.epoch(state, settings, epoch, track=False)
    error = inner.telemetry(state, []).weight_error
    assert error.shape == (2, len(inner.run.layers))
    for layer, quantizer, weight, (membership, held, scale, scale_held) in weights_of(inner, state):
        levels = quantizer.levels
        for member in (0, 1):
            w, free = weight[member], membership[member] == 0
            fitted = quantizer.rule(w, levels)
            unit = torch.where(scale_held[member] > 0, scale[member], fitted)
            nearest = min_distance(w, unit, levels)
            assert nearest[~free].norm() > 0.1  # frozen values are carried, parameters stay behind
            kept = torch.where(free, w, held[member])
            expected = nearest[free].norm() / kept.norm()
            torch.testing.assert_close(error[member, layer], expected)
        assert error[1, layer] == 0
        assert error[0, layer] > 0.05


def min_distance(weight, scale, levels):
    """How far each weight is from the nearest level."""
    return torch.stack([(weight - scale * value).abs() for value in levels.values]).amin(0)


@every_optimizer
def test_weights_that_are_drawn_anew_go_on_from_their_levels(optimizer):
    inner = loop(partition="redraw", optimizer=optimizer, horizon=3, steps=3)
    state = inner.initial()
    for epoch in range(2):
        state, _ = inner.epoch(state, settings_of(inner, fraction=(0.3, 0.7)), epoch, track=False)
        for _, _, weight, (membership, held, *_) in weights_of(inner, state):
            frozen = membership == 1
            assert bool(frozen.any())
            assert torch.equal(weight[frozen], held[frozen])
            assert not torch.isclose(weight, held)[~frozen].any()


@pytest.mark.parametrize("partition", ["random", "redraw"])
def test_random_partitions_are_those_of_a_run(partition):
    def memberships(seed, epoch=0, times=1):
        task = dataclasses.replace(
            small_task.SMALL, learning_rates=(0.01, 0.01, 0.02, 0.02), runs=2, seed=seed
        )
        inner = task.build(DIGITS, partition=partition, membership_width=0.0).repeated(times)
        table = torch.zeros(4 * times, len(inner.run.layers), len(FIELDS))
        table[..., FRACTION] = 0.5
        state, _ = inner.epoch(inner.initial(), table, epoch, track=False)
        return next(iter(weights_of(inner, state)))[3][0]

    found = memberships(0, times=2)
    assert torch.equal(found[:2], found[2:4])
    assert torch.equal(found[:4], found[4:])
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[:4], memberships(0))
    assert not torch.equal(found[:4], memberships(1))
    assert not torch.equal(found[:4], memberships(0, epoch=1))


def test_transposed_convolutions_train_in_a_population():
    def decoder(shape, width, depth, classes):
        return nn.Sequential(
            nn.Conv2d(1, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.ConvTranspose2d(width, 2, 2, 2), nn.Flatten(), nn.Linear(128, classes),
        )  # fmt: skip

    task = dataclasses.replace(small_task.SMALL, family="decoder")
    inner = task.build(DIGITS, families={"decoder": Family(decoder)}, membership_width=0.0)
    table = torch.zeros(2, len(inner.run.layers), len(FIELDS))
    table[..., FRACTION] = 0.5
    state, _ = inner.epoch(inner.initial(), table, 0, track=False)
    scales = [carried[2].shape for *_, carried in weights_of(inner, state)]
    assert scales[1] == (2, 1, 2, 1, 1)  # its channels lie along the second dimension
    error = inner.telemetry(state, []).weight_error
    assert bool(((error > 0) & (error < 1)).all())
