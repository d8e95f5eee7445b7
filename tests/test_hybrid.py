"""The hybrid estimator: which of two estimates it trusts, and that it runs on real tasks."""

import dataclasses

import pytest
import torch
from small_task import THREE_MEMBERS as SMALL

from learnsched.data import load
from learnsched.meta.estimators import clipped
from learnsched.meta.evolution import EvolutionStrategies, project, regression, tangent_basis
from learnsched.meta.guarded import Guarded
from learnsched.meta.hybrid import Hybrid, share_of_precise
from learnsched.meta.rollout import PolicyRollout
from learnsched.meta.unrolled import Unrolled
from learnsched.policies import LearnedPolicy, MetaNetwork

DIGITS = load("digits")


def estimates(noise, bias=0.0, members=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.ones(2, 3)
    return truth + bias + noise * torch.randn(members, 2, 3, generator=generator)


def test_without_bias_the_weights_are_the_inverse_variances():
    # the inverse-variance weight of the first is 4² / (1² + 4²)
    shares = [
        share_of_precise(estimates(1.0, seed=s), estimates(4.0, seed=1000 + s)) for s in range(300)
    ]
    share = torch.stack(shares).mean()
    # what is taken for a bias by chance costs the first some of its weight
    assert 0.75 < float(share) <= 16 / 17


def test_a_bias_gives_the_weight_to_the_unbiased_estimate():
    share = share_of_precise(estimates(0.1, bias=2.0), estimates(1.0, seed=1))
    assert float(share.max()) < 0.01


def test_evolution_of_a_linear_loss_leaves_an_unbiased_precise_estimate_its_weight():
    generator = torch.Generator().manual_seed(0)
    members, coordinates = 64, 15
    slopes = torch.randn(coordinates, generator=generator)
    noise = torch.randn(6, members, coordinates, generator=generator)
    difference = noise @ slopes + torch.randn(6, members, generator=generator)
    unbiased = regression(noise, difference, 1.0)
    precise = slopes + 0.1 * torch.randn(members, coordinates, generator=generator)
    share = share_of_precise(precise.unflatten(1, (5, 3)), unbiased.unflatten(1, (5, 3)))
    assert float(share.mean()) > 0.6


def test_weights_are_shares_and_exact_estimates_are_trusted():
    share = share_of_precise(estimates(0.0), estimates(1.0))
    assert bool((share >= 0).all() and (share <= 1).all())
    assert share_of_precise(estimates(0.0), estimates(0.0)).tolist() == [0.0, 0.0]


def test_the_combination_lies_between_the_two():
    policy = LearnedPolicy(MetaNetwork())

    def rollout(inner):
        return PolicyRollout(policy, inner.run, 3)

    unrolled, evolution = Unrolled(damping=0.5), EvolutionStrategies(pairs=3, knots=2)
    inner = SMALL.build(DIGITS)
    ours, theirs = (e(inner, rollout(inner)) for e in (unrolled, evolution))
    both = Hybrid(unrolled, evolution)(inner, rollout(inner))
    precise = clipped(ours.gradient, ours.norms.median())
    low = torch.minimum(precise, theirs.gradient) - 1e-6
    high = torch.maximum(precise, theirs.gradient) + 1e-6
    assert bool(((both.gradient >= low) & (both.gradient <= high)).all())
    assert torch.equal(both.settings, ours.settings)
    assert both.settings.requires_grad


def test_a_member_that_diverges_is_left_out_and_the_others_are_as_without_it():
    task = dataclasses.replace(SMALL, learning_rates=(0.01, 0.02, 0.03, 1e30))
    torch.manual_seed(0)
    policy = LearnedPolicy(MetaNetwork())
    unrolled, evolution = Unrolled(damping=0.5), EvolutionStrategies(pairs=3, knots=2)

    def estimate(estimator):
        inner = task.build(DIGITS)
        return estimator(inner, PolicyRollout(policy, inner.run, 4))

    ours, theirs = estimate(unrolled), estimate(evolution)
    both = estimate(Hybrid(unrolled, evolution))
    assert both.norms.isfinite().tolist() == [True, True, True, False]
    rest = [e.gradient[:, :3] for e in (ours, theirs)]
    precise = clipped(rest[0], ours.norms[:3].median())
    basis = tangent_basis(ours.settings.detach()[:, :3], 2, by_layer=True)
    share = torch.zeros(7)
    share[:5] = share_of_precise(
        *(project(basis, gradient).unflatten(1, (5, -1)) for gradient in (precise, rest[1]))
    )
    expected = torch.lerp(rest[1], precise, share)
    torch.testing.assert_close(both.gradient[:, :3], expected)
    parameters = list(policy.network.parameters())
    gradient = both.clipped(1.0).parameter_gradient(parameters)
    assert bool(gradient.isfinite().all()) and bool(gradient.any())


@dataclasses.dataclass(frozen=True)
class Exploded(Unrolled):
    """Backpropagation through which the first member's gradient has overflowed."""

    def __call__(self, inner, rollout):
        estimate = super().__call__(inner, rollout)
        gradient = estimate.gradient.clone()
        gradient[:, 0] = torch.inf
        return dataclasses.replace(estimate, gradient=gradient)


def test_where_backpropagation_has_exploded_evolution_has_the_word():
    policy, evolution = LearnedPolicy(MetaNetwork()), EvolutionStrategies(pairs=3, knots=2)
    inner = SMALL.build(DIGITS)
    theirs = evolution(inner, PolicyRollout(policy, inner.run, 3)).gradient
    both = Hybrid(Exploded(), evolution)(inner, PolicyRollout(policy, inner.run, 3)).gradient
    assert torch.equal(both[:, 0], theirs[:, 0]) and bool(theirs[:, 0].any())
    assert not torch.equal(both[:, 1], theirs[:, 1])


@pytest.mark.parametrize("members", [0, 1])
def test_without_a_spread_the_unbiased_estimate_has_all_the_weight(members):
    share = share_of_precise(estimates(1.0)[:members], estimates(2.0)[:members])
    assert share.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("estimator", [Hybrid, Guarded])
def test_gradients_of_the_loss_are_not_mixed_with_those_of_the_error(estimator):
    with pytest.raises(ValueError, match="must have objective 'loss', got 'error'"):
        estimator(evolution=EvolutionStrategies(objective="error"))


def test_one_member_has_no_spread():
    one = dataclasses.replace(SMALL, learning_rates=(0.01,)).build(DIGITS)
    policy = LearnedPolicy(MetaNetwork())
    with pytest.raises(ValueError, match="two members"):
        Hybrid()(one, PolicyRollout(policy, one.run, 1))


def test_clipping_keeps_small_gradients_scales_large_ones_and_drops_the_rest():
    gradient = torch.zeros(2, 3, 1, 7)
    gradient[0, 0, 0, 0], gradient[1, 1, 0, 3], gradient[0, 2, 0, 1] = 0.5, 8.0, torch.nan
    result = clipped(gradient, 2.0)
    assert result[0, 0, 0, 0] == 0.5
    assert result[1, 1, 0, 3] == 2.0
    assert bool((result[:, 2] == 0).all())
