"""Which of the two estimates is taken, and that nothing is changed in it."""

import dataclasses
import math

import pytest
import torch
from small_task import SMALL as TWO_MEMBERS
from small_task import THREE_MEMBERS as SMALL

from learnsched.data import load
from learnsched.meta.evolution import EvolutionStrategies
from learnsched.meta.guarded import Guarded
from learnsched.meta.rollout import PolicyRollout
from learnsched.meta.unrolled import Unrolled
from learnsched.policies import LearnedPolicy, MetaNetwork

DIGITS = load("digits")
UNROLLED, EVOLUTION = Unrolled(damping=0.5), EvolutionStrategies(pairs=3, knots=2)


def gradient(estimator):
    inner = SMALL.build(DIGITS)
    rollout = PolicyRollout(LearnedPolicy(MetaNetwork()), inner.run, 3)
    return estimator(inner, rollout)


def test_the_limit_decides():
    median = float(gradient(UNROLLED).norms.median())
    above = gradient(Guarded(UNROLLED, EVOLUTION, limit=1.01 * median))
    below = gradient(Guarded(UNROLLED, EVOLUTION, limit=0.99 * median))
    assert torch.equal(above.gradient, gradient(UNROLLED).gradient)
    assert torch.equal(below.gradient, gradient(EVOLUTION).gradient)
    assert below.settings.requires_grad


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_gradients_that_are_not_finite_have_exploded(lost):
    @dataclasses.dataclass(frozen=True)
    class Lost(Unrolled):
        def __call__(self, inner, rollout):
            estimate = super().__call__(inner, rollout)
            broken = estimate.gradient.clone()
            broken[:, :2] = lost  # two members of three
            return dataclasses.replace(estimate, gradient=broken)

    found = gradient(Guarded(Lost(damping=0.5), EVOLUTION, limit=1e9))
    assert torch.equal(found.gradient, gradient(EVOLUTION).gradient)


def test_half_of_an_even_number_of_members_is_enough():
    @dataclasses.dataclass(frozen=True)
    class Lost(Unrolled):
        def __call__(self, inner, rollout):
            estimate = super().__call__(inner, rollout)
            broken = estimate.gradient.clone()
            broken[:, 0] = math.nan
            return dataclasses.replace(estimate, gradient=broken)

    def found(estimator):
        inner = TWO_MEMBERS.build(DIGITS)
        return estimator(inner, PolicyRollout(LearnedPolicy(MetaNetwork()), inner.run, 2)).gradient

    guarded = Guarded(Lost(damping=0.5), EVOLUTION, limit=1e9)
    assert torch.equal(found(guarded), found(EVOLUTION))


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan])
def test_a_limit_that_is_not_positive_is_refused(limit):
    with pytest.raises(ValueError, match="must be positive"):
        Guarded(limit=limit)
