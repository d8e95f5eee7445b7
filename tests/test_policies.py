"""Hand-coded policies against their formulas, written here a second time."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import learnsched as ls
from learnsched import policies
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


def test_the_straight_through_sign_is_the_clipped_identity():
    x = torch.tensor([-1.5, -0.9, 0.3, 0.99, 1.2], requires_grad=True)
    std = 1 / math.sqrt(3) / 2 * ls.binary().step  # the docstring's 1 / sqrt(3), in units of x
    y = ls.annealed_quantize(x, ls.binary(), forward_std=0.0, backward_std=std, noise="uniform")
    y.sum().backward()
    assert x.grad.tolist() == pytest.approx([0, 1, 1, 1, 0])


def test_relaxed_is_constant_until_the_terminal_condition():
    found = plan(policies.Relaxed(0.3), run_of(2, 4), hardened=False)
    assert set(found.table.unique().tolist()) == {0.0, 0.3}
    assert found.settings(3)[0] == Setting(0.3, 0.3, 0.3, 0.3)
