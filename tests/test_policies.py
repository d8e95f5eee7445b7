"""Hand-coded policies against their formulas, written here a second time."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

import learnsched as ls
from learnsched import policies
from learnsched.learning_rate import learning_rate_factor, warm_cosine
from learnsched.noise import NOISES
from learnsched.policies.incremental import IDENTITY_STD, PUBLISHED_FRACTIONS
from learnsched.schedule import LayerInfo, RunInfo, Setting, plan


def run_of(layers, horizon):
    infos = tuple(LayerInfo(f"layer{i}", 10, 3, 4) for i in range(layers))
    return RunInfo(infos, horizon)


def table(policy, layers, horizon, field="weight_forward_std"):
    return plan(policy, run_of(layers, horizon), hardened=False)[field]


# Design, section 2: P epochs a period, L layers, decay over [t0, t1] epochs of P L.
INTERVALS = {
    "same_start": lambda i, n, p: (0, p * (i + 1)),
    "same_end": lambda i, n, p: (p * (n - 1 - i), p * n),
    "partition": lambda i, n, p: (p * i, p * (i + 1)),
    "overlapped": lambda i, n, p: (0, p * n),
}


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_annealing_follows_the_published_grid(interval, progressive, power):
    layers, period, std, mean = 4, 6, 0.35, -0.5
    policy = policies.AdditiveNoiseAnnealing(
        std, 1.0, interval, power=power, progressive=progressive, mean=mean
    )
    epochs = layers * period
    forward = table(policy, layers, epochs + 1)
    shift = table(policy, layers, epochs + 1, "activation_forward_mean")
    for layer in range(layers):
        t0, t1 = INTERVALS[interval](layer, layers, period)
        alpha = power * (layers - layer if progressive else 1)
        for t in range(epochs + 1):
            left = 1 if t <= t0 else 0 if t >= t1 else (t1 - t) / (t1 - t0)
            assert float(forward[t, layer]) == pytest.approx(std * left**alpha, abs=1e-9)
            assert float(shift[t, layer]) == pytest.approx(mean * left ** (alpha / 2), abs=1e-6)


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("end", [0.2, 0.5, 1.0])
def test_every_layer_is_exactly_hard_from_the_end_on(interval, end):
    forward = table(policies.AdditiveNoiseAnnealing(0.4, end, interval), 3, 11)
    last = round(end * 10)
    assert not forward[last:].any()
    assert forward[last - 1].max() > 0
    assert (forward.diff(dim=0) <= 0).all()


def test_the_backward_noise_is_constant_and_defaults_to_the_initial_forward_noise():
    policy = policies.AdditiveNoiseAnnealing(std=0.4)
    assert (table(policy, 2, 5, "weight_backward_std") == 0.4).all()
    assert (table(policy, 2, 5, "activation_backward_std") == 0.4).all()
    policy = dataclasses.replace(policy, backward_std=0.9)
    assert (table(policy, 2, 5, "weight_backward_std") == 0.9).all()
    assert (table(policy, 2, 5, "activation_backward_std") == 0.9).all()
    policy = dataclasses.replace(policy, activation_backward_std=0.2)
    assert (table(policy, 2, 5, "weight_backward_std") == 0.9).all()
    assert (table(policy, 2, 5, "activation_backward_std") == 0.2).all()


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    interval=st.sampled_from(sorted(INTERVALS)),
    end=st.floats(0.01, 1),
    power=st.floats(0.1, 5),
    layers=st.integers(1, 6),
    horizon=st.integers(1, 30),
    progressive=st.booleans(),
)
def test_annealing_never_rises_and_ends_hard(interval, end, power, layers, horizon, progressive):
    policy = policies.AdditiveNoiseAnnealing(
        0.4, end, interval, power=power, progressive=progressive, mean=0.3
    )
    for field in ("weight_forward_std", "weight_forward_mean"):
        forward = table(policy, layers, horizon, field)
        assert (forward.diff(dim=0) <= 0).all()
        assert not forward[-1].any()
        assert forward.max() <= 0.4


def test_layers_near_the_input_sharpen_faster():
    for interval in ("same_start", "partition"):
        forward = table(policies.AdditiveNoiseAnnealing(0.4, interval=interval), 5, 41)
        assert (forward.diff(dim=1) >= 0).all()
    forward = table(policies.AdditiveNoiseAnnealing(0.4, progressive=True), 5, 41)
    assert (forward.diff(dim=1) >= 0).all()


NUMBERS = (-0.1, math.nan, math.inf)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *((lambda x=x: policies.AdditiveNoiseAnnealing(std=x), "std") for x in NUMBERS),
        *((lambda x=x: policies.AdditiveNoiseAnnealing(backward_std=x), "std") for x in NUMBERS),
        *((lambda x=x: policies.AdditiveNoiseAnnealing(activation_backward_std=x), "std")
          for x in NUMBERS),
        *((lambda x=x: policies.AdditiveNoiseAnnealing(power=x), "power must be positive")
          for x in (0.0, *NUMBERS)),
        *((lambda x=x: policies.AdditiveNoiseAnnealing(end=x), r"end is a share .* \(0, 1\]")
          for x in (0.0, 1.5, *NUMBERS)),
        (lambda: policies.AdditiveNoiseAnnealing(mean=math.nan), "mean must be finite"),
        (lambda: policies.AdditiveNoiseAnnealing(interval="late"), "same_start, same_end"),
        (lambda: policies.AdditiveNoiseAnnealing(noise="pink"), "unknown noise 'pink'"),
        *((lambda x=x: policies.StraightThrough(x), "weight_backward_std") for x in NUMBERS),
        *((lambda x=x: policies.StraightThrough(0.5, x), "activation_backward_std")
          for x in NUMBERS),
        (lambda: policies.StraightThrough(noise="pink"), "unknown noise"),
        *((lambda x=x: policies.Relaxed(x), "std must be positive") for x in (0.0, *NUMBERS)),
        (lambda: policies.Relaxed(noise="pink"), "unknown noise"),
        *((lambda x=x: policies.IncrementalQuantization(x), "2, 3, 4 and 5 bits, not")
          for x in (0, 1, 6, True)),
        (lambda: policies.IncrementalQuantization(()), "last fraction must be 1"),
        (lambda: policies.IncrementalQuantization((0.5, 0.9)), "last fraction must be 1"),
        (lambda: policies.IncrementalQuantization((0.5, 0.4, 1.0)), "may not decrease"),
        (lambda: policies.IncrementalQuantization((-0.5, 1.0)), r"lie in \[0, 1\]"),
        (lambda: policies.IncrementalQuantization((0.5, 1.5)), r"lie in \[0, 1\]"),
        (lambda: policies.IncrementalQuantization((math.nan, 1.0)), r"lie in \[0, 1\]"),
        (lambda: policies.IncrementalQuantization(2, "biggest"), "magnitude, random, redraw"),
        *((lambda x=x: policies.IncrementalQuantization(2, start=x), r"\[0, 1\), got")
          for x in (1.0, *NUMBERS)),
        *((lambda x=x: policies.IncrementalQuantization(2, activation_backward_std=x), "std")
          for x in NUMBERS),
        (lambda: policies.IncrementalQuantization(2, noise="pink"), "unknown noise"),
        (lambda: policies.AdditiveNoiseAnnealing(mode="median"), "expectation, mode, random"),
        (lambda: policies.AdditiveNoiseAnnealing(annealed="backward"), "forward, both, neither"),
        *((lambda x=x: policies.StraightThrough(weight_backward_end=x), "finite|positive|at least")
          for x in (0.0, *NUMBERS)),
        *((lambda x=x: policies.StraightThrough(activation_backward_end=x), "finite|positive|at least")
          for x in (0.0, *NUMBERS)),
        (lambda: policies.StraightThrough(0.0, weight_backward_end=1.0), "geometrically is positive"),
        *((lambda x=x: policies.StraightThrough(weight_sample_std=x), "std") for x in NUMBERS),
        *((lambda x=x: policies.RelaxedQuantization(x), "std must be positive")
          for x in (0.0, *NUMBERS)),
        *((lambda x=x: policies.RelaxedQuantization(0.5, x), "std_end must be positive")
          for x in (0.0, *NUMBERS)),
        *((lambda x=x: policies.RelaxedQuantization(end=x), r"\(0, 1\]") for x in (0.0, *NUMBERS)),
        (lambda: policies.RelaxedQuantization(mode="median"), "unknown mode"),
        (lambda: policies.RelaxedQuantization(noise="pink"), "unknown noise"),
        *((lambda x=x: policies.PiecewiseAffine(start=x), "0 <= start") for x in (1.0, *NUMBERS)),
        *((lambda x=x: policies.PiecewiseAffine(end=x), "start < end") for x in (0.0, 1.1, *NUMBERS)),
        *((lambda x=x: policies.PiecewiseAffine(steepness=x), "steepness") for x in (0.0, *NUMBERS)),
        *((lambda x=x: policies.PiecewiseAffine(weight_backward_std=x), "std") for x in NUMBERS),
        (lambda: policies.annealing_grid("pink"), "unknown noise"),
        (lambda: policies.annealing_grid(end=0.0), r"\(0, 1\]"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Zhou et al. 2017, section 3.3 and table 4, as the design quotes them.
PAPER = {
    5: [0.5, 0.75, 0.875, 1],
    4: [0.3, 0.5, 0.8, 0.9, 0.95, 1],
    3: [0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 1],
    2: [0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975, 1],
}


@pytest.mark.parametrize("bits", PAPER)
@pytest.mark.parametrize("longer", [1, 2, 5, 7])
def test_inq_takes_the_papers_fractions_one_after_the_other(bits, longer):
    assert list(PUBLISHED_FRACTIONS[bits]) == PAPER[bits]
    policy = policies.IncrementalQuantization(bits)
    found = table(policy, 2, len(PAPER[bits]) * longer, "fraction")
    expected = [f for f in PAPER[bits] for _ in range(longer)]
    assert found.tolist() == [[f, f] for f in expected]


@settings(deadline=None, derandomize=True)
@given(bits=st.sampled_from(sorted(PAPER)), horizon=st.integers(1, 60))
def test_inq_fits_any_horizon(bits, horizon):
    found = table(policies.IncrementalQuantization(bits), 1, horizon, "fraction").flatten().tolist()
    phases = len(PAPER[bits])
    assert found == [PAPER[bits][epoch * phases // horizon] for epoch in range(horizon)]
    hard = plan(policies.IncrementalQuantization(bits), run_of(1, horizon))["fraction"]
    assert hard[-1].item() == (1 if horizon > 1 else 0)
    if horizon >= phases:
        assert set(found) == set(PAPER[bits])


@pytest.mark.parametrize(
    ("start", "horizon", "expected"),
    [
        (0.5, 8, [0, 0, 0, 0, 0.5, 0.75, 0.875, 1]),
        (0.2, 10, [0, 0, 0.5, 0.5, 0.75, 0.75, 0.875, 0.875, 1, 1]),
        (0.0, 4, [0.5, 0.75, 0.875, 1]),
        (0.9, 4, [0, 0, 0, 0]),
    ],
)
def test_inq_may_start_late(start, horizon, expected):
    found = table(policies.IncrementalQuantization(5, start=start), 1, horizon, "fraction")
    assert found.flatten().tolist() == expected


def test_annealing_takes_numbers_alone():
    with pytest.raises(TypeError, match="std must be a number, got 'normal'"):
        policies.AdditiveNoiseAnnealing("normal")
    for name in ("backward_std", "activation_backward_std"):
        with pytest.raises(TypeError, match=f"{name} must be a number, got '0.5'"):
            policies.AdditiveNoiseAnnealing(**{name: "0.5"})
    assert policies.AdditiveNoiseAnnealing(np.float32(0.5)).std == 0.5


def test_inq_takes_bits_of_numpy():
    bits = np.int64(3)
    assert policies.IncrementalQuantization(bits).cumulative == PUBLISHED_FRACTIONS[3]
    with pytest.raises(ValueError, match="fractions for 2, 3, 4 and 5 bits, not 6"):
        policies.IncrementalQuantization(np.int64(6))


def test_inq_takes_fractions_of_your_own():
    found = table(policies.IncrementalQuantization((0.0, 0.1, 0.1, 1.0)), 1, 4, "fraction")
    assert found.flatten().tolist() == [0.0, 0.1, 0.1, 1.0]


@pytest.mark.parametrize(
    "levels",
    [ls.ternary(), ls.binary(), ls.signed(4), ls.unsigned(2), ls.power_of_two(3)],
    ids=lambda levels: levels.name,
)
def test_uniform_noise_one_step_wide_is_the_identity_inside_the_range(levels):
    policy = policies.IncrementalQuantization(2)
    setting = policy.settings(run_of(1, 4), 0, None, None)[0][0]
    assert policy.noise == "uniform"
    x = torch.linspace(levels.values[0], levels.values[-1], 500, dtype=torch.float64)
    inside = x[1:-1].clone().requires_grad_()
    y = ls.annealed_quantize(
        torch.cat([x[:1], inside, x[-1:]]),
        levels,
        forward_std=setting.weight_forward_std * levels.step,
        backward_std=setting.weight_backward_std * levels.step,
        noise=policy.noise,
    )
    torch.testing.assert_close(y.detach(), x)
    (slope,) = torch.autograd.grad(y.sum(), inside)
    torch.testing.assert_close(slope, torch.ones_like(slope))


def test_free_weights_of_inq_stay_real_inside_the_range():
    torch.manual_seed(0)
    model = ls.quantize_(torch.nn.Linear(6, 4).double(), ls.signed(3), weight_scale=ls.Maximum())
    weight = model.weight.detach().clone()
    ls.QuantizationScheduler(model, policies.IncrementalQuantization((0.25, 1.0)), 4)
    free = model.weight_quantizer.membership == 0
    effective = model.weight_quantizer(model.weight).detach()
    torch.testing.assert_close(effective[free], weight[free])
    assert not torch.allclose(effective[~free], weight[~free])


def test_identity_std_is_that_of_a_uniform_variable_of_width_1():
    sample = torch.rand(10**6, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    assert float(sample.std()) == pytest.approx(IDENTITY_STD, rel=0.01)


@pytest.mark.parametrize("levels", [ls.ternary(), ls.signed(3), ls.unsigned(2)])
def test_weights_that_start_on_a_level_have_a_gradient(levels):
    x = torch.tensor(levels.values, requires_grad=True)
    std = IDENTITY_STD * levels.step
    y = ls.annealed_quantize(x, levels, forward_std=std, backward_std=std, noise="uniform")
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert (slope > 0.999).all()
    torch.testing.assert_close(y.detach(), x.detach())


@pytest.mark.parametrize(
    "policy",
    [
        policies.AdditiveNoiseAnnealing,
        policies.IncrementalQuantization,
        policies.PiecewiseAffine,
        policies.Relaxed,
        policies.RelaxedQuantization,
        policies.StraightThrough,
    ],
)
def test_unknown_partitions_are_refused(policy):
    with pytest.raises(ValueError, match="partition"):
        policy(partition="nonsense")


@pytest.mark.parametrize("noise", NOISES)
def test_straight_through_is_hard_with_constant_backward_noise(noise):
    policy = policies.StraightThrough(0.6, 0.9, noise=noise)
    found = plan(policy, run_of(3, 5))
    assert not found["weight_forward_std"].any()
    assert not found["activation_forward_std"].any()
    assert (found["weight_backward_std"] == 0.6).all()
    assert (found["activation_backward_std"] == 0.9).all()
    assert found["fraction"].tolist() == [[0] * 3] * 4 + [[1] * 3]
    assert (
        plan(policies.StraightThrough(0.6), run_of(1, 2))["activation_backward_std"] == 0.6
    ).all()


@pytest.mark.filterwarnings("ignore:no batch norm")
def test_the_straight_through_sign_is_the_clipped_identity():
    model = ls.quantize_(nn.Sequential(nn.ReLU()), activation=ls.binary())
    policy = policies.StraightThrough(1 / math.sqrt(12), noise="uniform")
    ls.QuantizationScheduler(model, policy, epochs=2)
    model[0].scale.fill_(1.0)
    x = torch.tensor([-1.5, -0.9, 0.3, 0.99, 1.2], requires_grad=True)
    y = model(x)
    assert y.tolist() == [-1, -1, 1, 1, 1]
    y.sum().backward()
    assert x.grad.tolist() == pytest.approx([0, 1, 1, 1, 0])


def test_relaxed_is_constant_until_the_terminal_condition():
    found = plan(policies.Relaxed(0.3), run_of(2, 4), hardened=False)
    assert set(found.table.unique().tolist()) == {0.0, 0.3}
    assert found.settings(3)[0] == Setting(0.3, 0.3, 0.3, 0.3)


def share(low=0.0, high=1.0, **options):
    return st.floats(low, high, **options)


STD = st.floats(0.01, 4)
NOISE = st.sampled_from(sorted(NOISES))
MODE = st.sampled_from(["expectation", "mode", "random"])
MADE = {
    "AdditiveNoiseAnnealing": st.builds(
        policies.AdditiveNoiseAnnealing, std=STD, end=share(0.01), interval=st.sampled_from(
            sorted(INTERVALS)), power=st.floats(0.1, 5), progressive=st.booleans(),
        mean=st.floats(-1, 1), backward_std=st.none() | STD, noise=NOISE, mode=MODE,
        annealed=st.sampled_from(["forward", "both", "neither"]),
    ),
    "BaseCurve": st.builds(policies.BaseCurve, power=st.floats(0.1, 5), freeze_from=share(0, 0.9)),
    "BaseCurves": st.builds(
        policies.BaseCurves.everywhere, st.builds(policies.BaseCurve, power=st.floats(0.1, 5))),
    "IncrementalQuantization": st.builds(
        policies.IncrementalQuantization, st.sampled_from([2, 3, 4, 5, (0.1, 1.0)]),
        start=share(0, 0.99),
    ),
    "LearnedPolicy": st.builds(
        policies.LearnedPolicy, st.builds(policies.MetaNetwork, st.just(4), st.just(4))),
    "PiecewiseAffine": st.builds(
        policies.PiecewiseAffine, share(0, 0.5), share(0.51), steepness=st.floats(0.1, 90)),
    "Relaxed": st.builds(policies.Relaxed, STD),
    "RelaxedQuantization": st.builds(
        policies.RelaxedQuantization, STD, STD, end=share(0.01), mode=MODE, noise=NOISE),
    "StraightThrough": st.builds(
        policies.StraightThrough, STD, st.none() | STD, weight_backward_end=st.none() | STD,
        activation_backward_end=st.none() | STD, weight_sample_std=share(),
    ),
}  # fmt: skip


def test_every_policy_of_the_registry_is_tested():
    kinds = {n for n in policies.__all__ if hasattr(getattr(policies, n), "settings")}
    assert kinds == set(MADE)


@pytest.mark.parametrize("name", MADE)
@settings(deadline=None, max_examples=40, derandomize=True)
@given(data=st.data(), layers=st.integers(1, 4), horizon=st.integers(1, 15))
def test_terminal_conditions_hold_for_every_policy(name, data, layers, horizon):
    policy = data.draw(MADE[name])
    found = plan(policy, run_of(layers, horizon))
    assert found.table.shape[:2] == (horizon, layers)
    assert bool(found.table.isfinite().all())
    for field in ("weight", "activation"):
        assert not found[f"{field}_forward_std"][-1].any()
        assert not found[f"{field}_forward_mean"][-1].any()
        assert (found[f"{field}_backward_std"] >= 0).all()
    assert (found["fraction"].diff(dim=0) >= 0).all()
    assert (found["fraction"][-1] == (1 if horizon > 1 else 0)).all()


def test_straight_through_noise_may_move_geometrically():
    policy = policies.StraightThrough(4.0, 0.5, weight_backward_end=0.25)
    found = plan(policy, run_of(2, 5))
    assert found["weight_backward_std"][:, 0].tolist() == pytest.approx([4, 2, 1, 0.5, 0.25])
    assert (found["activation_backward_std"] == 0.5).all()
    both = plan(policies.StraightThrough(4.0, weight_backward_end=0.25), run_of(1, 5))
    assert torch.equal(both["activation_backward_std"], both["weight_backward_std"])
    own = plan(policies.StraightThrough(1.0, activation_backward_end=4.0), run_of(1, 3))
    assert own["activation_backward_std"].flatten().tolist() == pytest.approx([1, 2, 4])
    assert (own["weight_backward_std"] == 1).all()


def test_stochastic_binarization_draws_with_the_hard_sigmoid():
    policy = policies.StraightThrough(weight_sample_std=IDENTITY_STD, noise="uniform")
    assert (policy.mode, policies.StraightThrough().mode) == ("random", "expectation")
    x = torch.tensor([-1.5, -0.6, 0.0, 0.5, 1.0], dtype=torch.double)
    std = policy.settings(run_of(1, 3), 0, None, None)[0][0].weight_forward_std * ls.binary().step
    drawn = ls.annealed_quantize(
        x.expand(20_000, 5), ls.binary(), forward_std=std, backward_std=1.0, noise="uniform",
        mode="random", generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    hard_sigmoid = ((x + 1) / 2).clamp(0, 1)
    torch.testing.assert_close((drawn > 0).double().mean(0), hard_sigmoid, atol=0.015, rtol=0)


# The published noise of each shape, one step wide in its own parameter.
HALF_WIDTH_OR_PARAMETER = {
    "uniform": lambda std: NOISES["uniform"].half_width * std,
    "triangular": lambda std: NOISES["triangular"].half_width * std,
    "normal": lambda std: std,
    "logistic": lambda std: math.sqrt(3) / math.pi * std,
}


PUBLISHED_NOISE = {
    "uniform": 0.5,
    "triangular": 0.5,
    "normal": 0.5 / 1.959964,
    "logistic": 1 / (2 * math.log(39)),
}


def _grid_by_brute_force():
    """Names of the experiment's members, from all combinations by what the paper leaves out."""
    names = set()
    for mode in ("expectation", "mode", "random"):
        for mean in ("static mean", "dynamic mean"):
            for std in ("static std", "dynamic std"):
                for interval in INTERVALS:
                    for power in ("homogeneous", "progressive"):
                        if mode == "expectation" and std == "static std":
                            continue  # never hard
                        moving = "dynamic" in mean or "dynamic" in std
                        decay = f", {interval}, {power}" if moving else ""
                        names.add(f"{mode}, {mean}, {std}{decay}")
    return names


@pytest.mark.parametrize("noise", NOISES)
def test_the_grid_has_66_policies_for_each_shape_of_noise(noise):
    grid = policies.annealing_grid(noise)
    assert set(grid) == _grid_by_brute_force()
    assert len(set(grid.values())) == len(grid) == 66
    for policy in grid.values():
        assert policy.noise == noise
        assert HALF_WIDTH_OR_PARAMETER[noise](policy.std) == pytest.approx(PUBLISHED_NOISE[noise])


@pytest.mark.parametrize(
    "name",
    [
        "expectation, static mean, dynamic std, partition, homogeneous",
        "expectation, dynamic mean, dynamic std, same_start, progressive",
        "mode, dynamic mean, static std, overlapped, progressive",
        "random, dynamic mean, dynamic std, same_end, homogeneous",
        "random, static mean, static std",
    ],
)
def test_members_of_the_grid_follow_the_formula(name):
    layers, period = 3, 7
    policy = policies.annealing_grid("normal", end=1.0)[name]
    mode, mean, std, *decay = name.split(", ")
    assert policy.mode == mode
    epochs = layers * period
    first = 0.5 / stats.norm.ppf(0.975)
    found = plan(policy, run_of(layers, epochs + 1), hardened=False)
    for layer in range(layers):
        t0, t1 = INTERVALS[decay[0] if decay else "overlapped"](layer, layers, period)
        p = layers - layer if "progressive" in decay else 1
        for t in range(epochs + 1):
            left = 1 if t <= t0 else 0 if t >= t1 else (t1 - t) / (t1 - t0)
            expected_std = first * (left ** (2 * p) if std == "dynamic std" else 1.0)
            expected_mean = 0.5 * left**p if mean == "dynamic mean" else 0.0
            row = found.table[t, layer].tolist()
            stds, means = row[:4], row[5:]
            assert stds == pytest.approx([expected_std] * 4, abs=1e-9)
            assert means == pytest.approx([expected_mean] * 2, abs=1e-6)


def test_the_dynamic_mean_makes_the_staircase_take_its_upper_level_at_a_threshold():
    """Spallanzani et al. 2022: the std vanishes faster than the mean."""
    policy = policies.annealing_grid("normal", end=1.0)[
        "expectation, dynamic mean, dynamic std, overlapped, homogeneous"
    ]
    values = []
    for s in plan(policy, run_of(1, 51), hardened=False):
        values.append(
            ls.annealed_quantize(
                torch.zeros(1), ls.binary(), forward_std=s[0].weight_forward_std, backward_std=1.0,
                forward_mean=s[0].weight_forward_mean,
            ).item()
        )  # fmt: skip
    assert min(np.diff(values)) > -1e-6  # up to rounding
    assert values[0] == pytest.approx(0.95) and values[-1] == values[-2] == 1


def test_relaxed_quantization_narrows_geometrically():
    policy = policies.RelaxedQuantization(1.6, 0.1, end=0.8)
    found = plan(policy, run_of(2, 6))
    assert found["weight_forward_std"][:, 1].tolist() == pytest.approx([1.6, 0.8, 0.4, 0.2, 0, 0])
    backward = [1.6, 0.8, 0.4, 0.2, 0.1, 0.1]
    assert found["activation_backward_std"][:, 0].tolist() == pytest.approx(backward)
    assert policies.RelaxedQuantization().noise == "logistic"
    scale = math.sqrt(3) / math.pi * policies.RelaxedQuantization().std
    assert scale == pytest.approx(1 / 3)


@pytest.mark.parametrize("steepness", [0.5, 10.0, 60.0])
def test_the_slope_follows_the_normalized_sigmoid(steepness):
    policy = policies.PiecewiseAffine(0.2, 0.9, steepness)
    low, high = (1 / (1 + math.exp(sign * steepness / 2)) for sign in (1, -1))
    for progress in torch.linspace(0.2, 0.9, 30, dtype=torch.double)[:-1].tolist():
        f = (progress - 0.2) / 0.7
        expected = (1 / (1 + math.exp(steepness * (f - 0.5))) - low) / (high - low)
        assert policy.width(progress) == pytest.approx(expected, abs=1e-12)
    assert (policy.width(0.0), policy.width(0.9), policy.width(1.0)) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("levels", [ls.ternary(), ls.binary(), ls.signed(3)], ids=lambda q: q.name)
@pytest.mark.parametrize("progress", [0.0, 0.4, 0.5, 0.7])
def test_the_value_is_the_piecewise_affine_map(levels, progress):
    policy = policies.PiecewiseAffine(steepness=3.0)
    width = policy.width(progress)
    x = torch.linspace(-4, 4, 801, dtype=torch.double)
    found = ls.annealed_quantize(
        x, levels, forward_std=policy._setting(progress).weight_forward_std * levels.step,
        backward_std=1.0, noise=policy.noise,
    )  # fmt: skip
    expected = torch.full_like(x, levels.values[0])
    for lower, upper in zip(levels.values, levels.values[1:], strict=False):
        line = (lower + upper) / 2 + (x - (lower + upper) / 2) / width
        expected = torch.where(x >= lower, line.clamp(lower, upper), expected)
    expected = torch.where(x >= levels.values[-1], levels.values[-1], expected)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bits", PAPER)
@pytest.mark.parametrize("start", [0.0, 0.3])
def test_the_learning_rate_restarts_when_the_fraction_rises(bits, start):
    policy = policies.IncrementalQuantization(bits, start=start)
    fractions = [0.0] if start else []
    edges = [0.0] if start else []
    for phase, fraction in enumerate(PAPER[bits]):
        edges.append(start + (1 - start) * phase / len(PAPER[bits]))
        fractions.append(fraction)
    for edge, following, fraction in zip(edges, [*edges[1:], 1.0], fractions, strict=True):
        assert policy._fraction(edge) == fraction
        assert policy.restarted(edge) == pytest.approx(1)
        assert policy.restarted((edge + following) / 2) == pytest.approx(0.5, abs=1e-6)
        assert policy.restarted(following - 1e-6) == pytest.approx(0, abs=1e-6)


def test_inq_restarts_the_learning_rate_where_asked():
    run = RunInfo((LayerInfo("fc", 10, 3, 4),), horizon=8, steps_per_epoch=4)
    plain, anew = (
        policies.IncrementalQuantization(5, restarts=restarts) for restarts in (False, True)
    )
    factors = [learning_rate_factor(anew, run, step / 32) for step in range(33)]
    starts = [step for step in range(32) if factors[step] == pytest.approx(1)]
    frozen = plan(anew, run)["fraction"].flatten().tolist()
    rises = [4 * epoch for epoch in range(8) if epoch == 0 or frozen[epoch] > frozen[epoch - 1]]
    assert starts == rises == [0, 8, 16, 24]
    assert factors[32] == 0
    assert learning_rate_factor(plain, run, 0.25) == warm_cosine(0.25)


@pytest.mark.parametrize("noise", NOISES)
def test_the_published_noise_lies_within_half_a_step_or_most_of_it(noise):
    policy = policies.annealing_grid(noise)["random, static mean, static std"]
    law = {
        "uniform": stats.uniform(-0.5, 1),
        "triangular": stats.triang(0.5, -0.5, 1),
        "normal": stats.norm(scale=0.5 / stats.norm.ppf(0.975)),
        "logistic": stats.logistic(scale=0.5 / stats.logistic.ppf(0.975)),
    }[noise]
    assert law.cdf(0.5) - law.cdf(-0.5) == pytest.approx(
        1 if math.isfinite(NOISES[noise].half_width) else 0.95
    )
    assert policy.std == pytest.approx(law.std())
