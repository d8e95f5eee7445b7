"""Concrete samples: against the categorical distribution, finite differences and the hard staircase."""

import pytest
import torch
from torch import nn

import learnsched as ls
from learnsched.annealed import level_probabilities
from learnsched.concrete import concrete_quantize
from learnsched.layers import quantized_layers
from learnsched.noise import noise_shape

LOGISTIC = noise_shape("logistic")


def sample(x, levels, std, temperature, seed=0, backward_std=0.5):
    generator = torch.Generator().manual_seed(seed)
    return concrete_quantize(
        x, levels, std, 0.0, backward_std, 0.0, LOGISTIC, temperature, generator
    )


@pytest.mark.parametrize("levels", [ls.ternary(), ls.unsigned(2), ls.binary()])
def test_at_a_low_temperature_levels_come_as_often_as_they_are_probable(levels):
    x = torch.full((100_000,), 0.6, dtype=torch.double)
    drawn = sample(x, levels, 0.7, temperature=1e-3)
    expected = level_probabilities(x[:1], levels, 0.7, noise="logistic")[0]
    for value, probability in zip(levels.values, expected, strict=True):
        share = (drawn - value).abs().lt(0.05).double().mean()
        assert float(share) == pytest.approx(float(probability), abs=0.01)


def test_at_a_high_temperature_all_levels_weigh_alike():
    x = torch.tensor([-0.4, 0.2, 2.0])
    torch.testing.assert_close(sample(x, ls.unsigned(2), 0.5, 1e6), torch.full((3,), 1.5))


def test_gradients_are_those_of_the_sample_by_finite_differences():
    x = torch.linspace(-1.2, 1.7, 9, dtype=torch.double, requires_grad=True)
    std = torch.tensor(0.4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, s: sample(x, ls.ternary(), s, 0.7), (x, std))


def test_without_noise_it_is_the_hard_staircase_with_the_backward_noise():
    x = torch.linspace(-2, 4, 40, requires_grad=True)
    found = sample(x, ls.unsigned(2), torch.tensor(0.0), 1.0)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    plain = ls.annealed_quantize(
        x, ls.unsigned(2), forward_std=0.0, backward_std=0.5, noise="logistic"
    )
    assert torch.equal(found, plain)
    assert torch.equal(gradient, torch.autograd.grad(plain.sum(), x)[0])


def test_networks_draw_until_they_are_hard():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    ls.quantize_(net, ls.ternary(), ls.unsigned(2))
    ls.sample_concrete_(net, 0.8)
    x = torch.randn(16, 8)
    scheduler = ls.QuantizationScheduler(net, ls.policies.RelaxedQuantization(0.5), epochs=2)
    assert not torch.equal(net(x), net(x))
    net(x).square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters())
    for _ in range(2):
        scheduler.step()
    ls.finalize_(net, [x]).eval()
    assert torch.equal(net(x), net(x))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    net = ls.quantize_(nn.Sequential(nn.Linear(4, 2)), ls.ternary())
    with pytest.raises(ValueError, match="temperature must be positive"):
        ls.sample_concrete_(net, temperature)
    assert quantized_layers(net)[0].weight.weight_quantizer.temperature is None


def test_in_evaluation_a_network_computes_with_the_expectation():
    torch.manual_seed(0)
    net = ls.quantize_(nn.Sequential(nn.Linear(8, 6)), ls.ternary())
    ls.QuantizationScheduler(net, ls.policies.RelaxedQuantization(), 4)
    x = torch.randn(16, 8)
    expected = net.eval()(x)
    ls.sample_concrete_(net, 0.8)
    state = torch.get_rng_state()
    assert torch.equal(net(x), expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(net.train()(x), expected)
