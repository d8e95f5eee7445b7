"""Evolution strategies in parameter space: a closed form, clipping, and a trainer that uses them."""

import dataclasses
import math

import pytest
import torch
from small_task import SMALL

from learnsched.data import load
from learnsched.meta.inner import InnerState
from learnsched.meta.parameter_evolution import (
    ParameterEstimate,
    ParameterEvolution,
    perturbations,
)
from learnsched.meta.presets import PRESETS
from learnsched.meta.rollout import PolicyRollout
from learnsched.meta.trainer import MetaTrainer
from learnsched.policies import LearnedPolicy, MetaNetwork
from learnsched.schedule import FIELDS, LayerInfo, RunInfo, Telemetry

DIGITS = load("digits")


@dataclasses.dataclass
class Quadratic:
    """An inner loop without a network: each member's outer loss is quadratic in its first setting."""

    curvature: torch.Tensor  # (members,)
    copies: int = 1
    seed: int = 7
    run = RunInfo((LayerInfo("a", 4, 3, 4),), horizon=1)

    def initial(self):
        return InnerState((torch.zeros(self.copies * len(self.curvature)),), 0)

    def epoch(self, state, settings, epoch, *, track):
        backward = settings[:, 0, 1]  # the terminal conditions leave it alone
        loss = self.curvature.repeat(self.copies) * backward.square()
        return InnerState((loss,), 1), loss

    def outer_loss(self, state, settings):
        return state.tensors[0]

    def telemetry(self, state, losses):
        one = torch.ones(self.copies * len(self.curvature))
        return Telemetry(one, one, one.unsqueeze(-1))

    def repeated(self, count):
        return Quadratic(self.curvature, self.copies * count, self.seed)


class Sum:
    """A rollout whose first backward std is a weighted sum of its parameters."""

    def __init__(self, parameters, weights, members):
        self.parameters, self.weights, self.members = parameters, weights, members

    def __call__(self, epoch, telemetry):
        return self._settings((self.parameters @ self.weights).expand(self.members))

    def _settings(self, values):
        settings = torch.zeros(len(values), 1, len(FIELDS))
        settings[:, 0, 1] = values
        return settings

    def changed(self, changes):
        values = (self.parameters + changes) @ self.weights
        return lambda epoch, telemetry: self._settings(values.repeat_interleave(self.members))


def test_the_gradient_of_a_quadratic_is_found_within_its_standard_error():
    curvature, weights = torch.tensor([1.0, 3.0]), torch.tensor([0.5, -1.0, 2.0])
    parameters = torch.tensor([1.0, 0.2, 0.8])
    pairs = 20_000
    es = ParameterEvolution(pairs=pairs, std=0.1)
    estimate = es(Quadratic(curvature), Sum(parameters, weights, 2))
    # loss_m = c_m (w·θ)²; the antithetic difference of a quadratic has no error but sampling
    true = 2 * curvature.unsqueeze(1) * (parameters @ weights) * weights
    error = ((true.square().sum(1, keepdim=True) + true.square()) / pairs).sqrt()
    assert bool(((estimate.gradient - true).abs() < 4 * error).all())
    assert bool((error < 0.02 * true.norm(dim=1, keepdim=True)).all())


def test_losses_and_gradients_of_members_are_their_own():
    es = ParameterEvolution(pairs=5, std=0.1)
    rollout = Sum(torch.ones(3), torch.tensor([0.5, -1.0, 2.0]), 2)
    both = es(Quadratic(torch.tensor([1.0, 3.0])), rollout)
    torch.testing.assert_close(both.gradient[1], 3 * both.gradient[0])
    torch.testing.assert_close(both.loss[1], 3 * both.loss[0])


def test_perturbed_networks_schedule_as_networks_of_those_parameters_do():
    inner = SMALL.build(DIGITS)
    policy = LearnedPolicy(MetaNetwork(hidden=3, embedding=2))
    torch.nn.init.normal_(policy.network.out.weight, std=0.1)
    rollout = PolicyRollout(policy, inner.run, 2)
    changes = 0.1 * torch.randn(
        2, rollout.parameters.numel(), generator=torch.Generator().manual_seed(0)
    )
    telemetry = Telemetry(*(torch.rand(4), torch.rand(4), torch.rand(4, len(inner.run.layers))))
    changed = rollout.changed(changes)
    before = rollout.parameters
    with torch.no_grad():
        together = [changed(e, telemetry) for e in (0, 1)]
        for place, change in enumerate(changes):
            twin = LearnedPolicy(MetaNetwork(hidden=3, embedding=2))
            torch.nn.utils.vector_to_parameters(before + change, twin.network.parameters())
            mine = slice(2 * place, 2 * place + 2)
            seen = Telemetry(
                telemetry.loss[mine], telemetry.loss_trend[mine], telemetry.weight_error[mine]
            )
            alone = PolicyRollout(twin, inner.run, 2)
            for epoch in (0, 1):
                torch.testing.assert_close(together[epoch][mine], alone(epoch, seen))
    assert torch.equal(rollout.parameters, before)


def test_clipping_scales_large_members_and_drops_what_is_not_finite():
    gradient = torch.tensor([[3.0, 4.0], [0.3, 0.4], [math.nan, 1.0], [1.0, 1.0]])
    estimate = ParameterEstimate(gradient, torch.tensor([1.0, 1.0, 1.0, math.inf]))
    clipped = estimate.clipped(1.0).gradient
    torch.testing.assert_close(clipped[0], torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(clipped[1], torch.tensor([0.3, 0.4]))
    assert bool((clipped[2:] == 0).all())


def test_parameters_of_another_size_are_refused():
    estimate = ParameterEstimate(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match="3 parameters were perturbed, got 4"):
        estimate.parameter_gradient([torch.zeros(2, 2)])


def test_perturbations_depend_on_both_seeds_and_on_nothing_else():
    like = torch.zeros(4)
    assert torch.equal(perturbations(3, like, 1, 2), perturbations(3, like + 1, 1, 2))
    assert not torch.equal(perturbations(3, like, 1, 2), perturbations(3, like, 1, 3))
    assert not torch.equal(perturbations(3, like, 1, 2), perturbations(3, like, 2, 2))


def test_the_trainer_takes_steps_with_it(tmp_path):
    preset = PRESETS["quick"]
    mix = dataclasses.replace(
        preset.trainer.mix, architectures=(("digits", "mlp", (6,), (3,)),), horizons=(2,),
        total_steps=(4, 5), members=2, tasks=1, fine_tuning=0.0,
    )  # fmt: skip
    config = dataclasses.replace(preset.trainer, mix=mix, validation=(SMALL,), validate_every=2)
    torch.manual_seed(0)
    policy = LearnedPolicy(MetaNetwork(), preset.base, preset.domain)
    before = policy.network.out.weight.detach().clone()
    estimator = ParameterEvolution(pairs=2)
    trainer = MetaTrainer(policy, config, tmp_path, {"digits": DIGITS}, estimator)
    trainer.run(2)
    assert not torch.equal(policy.network.out.weight, before)
    assert trainer.log[1]["dropped"] == 0
    assert math.isfinite(trainer.log[2]["validation_error"])


@pytest.mark.parametrize("wrong", [{"pairs": 0}, {"std": 0.0}, {"std": math.inf}])
def test_arguments_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        ParameterEvolution(**wrong)
