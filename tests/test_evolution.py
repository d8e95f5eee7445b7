"""Evolution strategies against closed forms and against the inner loop itself."""

from dataclasses import dataclass, field

import pytest
import torch
from small_task import SMALL

from learnsched.data import load
from learnsched.meta.evolution import (
    EvolutionStrategies,
    lift,
    project,
    regression,
    tangent_basis,
    valid,
)
from learnsched.meta.inner import InnerState
from learnsched.meta.rollout import PolicyRollout, run_forward, table_rollout
from learnsched.policies import LearnedPolicy, MetaNetwork
from learnsched.schedule import FIELDS, LayerInfo, RunInfo, Telemetry

DIGITS = load("digits")


@dataclass
class Linear:
    """An inner loop without a network: the outer loss is linear in the schedule."""

    weights: torch.Tensor  # (horizon, members, layers, fields)
    copies: int = 1
    seed: int = 7
    run: RunInfo = field(
        default=RunInfo((LayerInfo("a", 4, 3, 4), LayerInfo("b", 4, 3, 4)), horizon=5)
    )

    def initial(self):
        return InnerState((torch.zeros(self.copies * self.weights.shape[1]),), 0)

    def epoch(self, state, settings, epoch, *, track):
        weights = self.weights[epoch].repeat(self.copies, 1, 1)
        loss = state.tensors[0] + (weights * settings).flatten(1).sum(1)
        return InnerState((loss,), state.step + 1), loss

    def outer_loss(self, state, settings):
        return state.tensors[0]

    def outer_error(self, state, settings):
        return -state.tensors[0]

    def telemetry(self, state, losses):
        one = torch.ones(self.copies * self.weights.shape[1])
        return Telemetry(one, one, one.unsqueeze(-1).expand(-1, 2))

    def repeated(self, count):
        return Linear(self.weights, self.copies * count, self.seed, self.run)


def interior(horizon, members, layers):
    """A schedule so far from the ends of its ranges that no perturbation is cut off."""
    table = torch.full((horizon, members, layers, len(FIELDS)), 0.5)
    table[..., FIELDS.index("fraction")] = torch.linspace(0.2, 0.8, horizon).view(-1, 1, 1)
    table[..., -2:] = 0
    return table


def test_the_gradient_of_a_linear_loss_is_found_along_the_knots():
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(5, 2, 2, len(FIELDS), generator=generator)
    inner = Linear(weights)
    table = interior(5, 2, 2)
    es = EvolutionStrategies(pairs=400, std=0.01, relative_std=0.01, knots=3, ridge=0.0)
    estimate = es(inner, table_rollout(table))
    basis = tangent_basis(estimate.settings, 3, by_layer=True)
    torch.testing.assert_close(
        project(basis, estimate.gradient), project(basis, weights), rtol=1e-2, atol=1e-2
    )


def test_one_knot_moves_the_whole_run_and_all_layers_alike():
    weights = torch.ones(5, 1, 2, len(FIELDS))
    es = EvolutionStrategies(
        pairs=100, std=0.01, relative_std=0.01, knots=1, by_layer=False, ridge=0.0
    )
    gradient = es(Linear(weights), table_rollout(interior(5, 1, 2))).gradient
    # forward std: alike in the four epochs that are not terminal
    torch.testing.assert_close(gradient[:4, ..., 0], torch.ones(4, 1, 2), rtol=1e-2, atol=1e-2)
    assert bool((gradient[4, ..., 0] == 0).all())
    assert bool((gradient[..., -2:] == 0).all())


def test_the_objective_decides_what_is_followed_not_what_is_reported():
    weights = torch.ones(5, 2, 2, len(FIELDS))
    estimates = [
        EvolutionStrategies(pairs=8, objective=objective)(
            Linear(weights), table_rollout(interior(5, 2, 2))
        )
        for objective in ("loss", "error")
    ]
    torch.testing.assert_close(estimates[1].gradient, -estimates[0].gradient)
    with pytest.raises(ValueError, match="unknown objective 'accuracy'; choose one of loss, error"):
        EvolutionStrategies(objective="accuracy")


def test_lifted_gradients_have_the_derivatives_they_were_made_of():
    table = interior(6, 3, 2)
    basis = tangent_basis(table, 3, by_layer=True)
    generator = torch.Generator().manual_seed(0)
    coordinates = project(basis, torch.randn(6, 3, 2, len(FIELDS), generator=generator))
    lifted = lift(basis, coordinates).transpose(0, 1)
    torch.testing.assert_close(project(basis, lifted), coordinates, rtol=1e-4, atol=1e-4)


def test_a_relative_coordinate_scales_with_the_backward_std():
    table = interior(4, 1, 2)
    table[..., 1] = 3.0
    basis = tangent_basis(table, 1, by_layer=False)
    assert float(basis[0, 1, :, :, 1].max()) == pytest.approx(0.3 * 3.0)
    assert float(basis[0, 0, :, :, 0].max()) == pytest.approx(0.1)


def test_perturbed_settings_stay_in_their_ranges_and_the_fraction_never_falls():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 5, 4, 2, len(FIELDS), generator=generator)
    place = FIELDS.index("fraction")
    before = valid(first)
    after = valid(second, before[..., place])
    for settings in (before, after):
        assert float(settings.min()) == 0
        assert float(settings[..., place].max()) <= 1
    assert bool((after[..., place] >= before[..., place]).all())


def test_regression_recovers_slopes_exactly_without_noise_or_ridge():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20, 3, 5, generator=generator, dtype=torch.float64)
    slopes = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    difference = torch.einsum("pmc,mc->pm", noise, slopes)
    torch.testing.assert_close(regression(noise, difference, 0.0), slopes)


@pytest.mark.parametrize(("pairs", "ridge"), [(3, 1.0), (6, 1.0), (8, 0.01), (32, 0.1)])
def test_regression_is_unbiased_with_few_pairs_and_a_ridge(pairs, ridge):
    generator = torch.Generator().manual_seed(0)
    slopes = torch.randn(15, generator=generator, dtype=torch.float64)
    noise = torch.randn(pairs, 20_000, 15, generator=generator, dtype=torch.float64)
    found = regression(noise, noise @ slopes, ridge)
    error = found.std(0) / 20_000**0.5
    assert bool(((found.mean(0) - slopes).abs() < 5 * error).all())


def test_a_repeated_inner_loop_trains_every_copy_alike():
    inner = SMALL.build(DIGITS)
    policy = LearnedPolicy(MetaNetwork())
    with torch.no_grad():
        state, table, _ = run_forward(inner, PolicyRollout(policy, inner.run, 2))
        loss = inner.outer_loss(state, table[-1])
        many = inner.repeated(3)
        tables = table.repeat(1, 3, 1, 1)
        state, table, _ = run_forward(many, table_rollout(tables))
        repeated = many.outer_loss(state, table[-1])
    torch.testing.assert_close(repeated, loss.repeat(3), rtol=1e-4, atol=1e-5)


def test_the_same_seed_gives_the_same_gradient_and_another_another():
    policy = LearnedPolicy(MetaNetwork())

    def once(seed=0):
        inner = SMALL.build(DIGITS)
        es = EvolutionStrategies(pairs=3, knots=2, seed=seed)
        return es(inner, PolicyRollout(policy, inner.run, 2))

    assert torch.equal(once().gradient, once().gradient)
    assert not torch.equal(once().gradient, once(seed=1).gradient)


def test_the_estimate_chains_to_every_parameter_of_the_network():
    policy = LearnedPolicy(MetaNetwork())
    torch.nn.init.normal_(policy.network.out.weight, std=0.1)
    inner = SMALL.build(DIGITS)
    estimate = EvolutionStrategies(pairs=4)(inner, PolicyRollout(policy, inner.run, 2))
    gradients = torch.autograd.grad(
        estimate.settings, list(policy.network.parameters()), estimate.gradient
    )
    assert all(float(g.abs().max()) > 0 for g in gradients)


@pytest.mark.parametrize(
    "wrong", [{"pairs": 0}, {"std": 0.0}, {"relative_std": -1.0}, {"knots": 0}, {"ridge": -1.0}]
)
def test_arguments_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must be"):
        EvolutionStrategies(**wrong)


def test_fewer_pairs_than_coordinates_need_a_ridge():
    noise = torch.randn(3, 2, 5)
    with pytest.raises(ValueError, match="3 pairs do not tell 5 slopes"):
        regression(noise, torch.randn(3, 2), 0.0)
