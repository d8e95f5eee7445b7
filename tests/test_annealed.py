"""The annealed quantizer against scipy, finite differences, Monte Carlo and brute force."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.autograd import grad

from learnsched.annealed import (
    MODES,
    annealed_quantize,
    level_probabilities,
    quantize_unchecked,
)
from learnsched.levels import LevelSet, binary, power_of_two, signed, ternary, unsigned
from learnsched.noise import NOISES, noise_shape

SCIPY = {
    "uniform": stats.uniform(-math.sqrt(3), 2 * math.sqrt(3)),
    "triangular": stats.triang(0.5, -math.sqrt(6), 2 * math.sqrt(6)),
    "normal": stats.norm(),
    "logistic": stats.logistic(scale=math.sqrt(3) / math.pi),
}
UNEVEN = LevelSet((-2.0, -0.5, 0.0, 3.0), thresholds=(-1.0, -0.25, 1.0), name="uneven")
SETS = [ternary(), binary(), unsigned(2), power_of_two(4, max_abs=1.7), UNEVEN]
EXACT_SETS = [*SETS, unsigned(8), signed(4)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
PROPERTY = settings(deadline=None, max_examples=40, derandomize=True)
STEP = 1e-5

every_noise = pytest.mark.parametrize("noise", SCIPY)
every_mode = pytest.mark.parametrize("mode", MODES)
every_set = pytest.mark.parametrize("levels", SETS, ids=lambda levels: levels.name)
every_exact_set = pytest.mark.parametrize("levels", EXACT_SETS, ids=lambda levels: levels.name)


def expectation(x, levels, std, mean, noise):
    z = (np.asarray(x)[..., None] + mean - np.asarray(levels.thresholds)) / std
    return levels.values[0] + SCIPY[noise].cdf(z) @ np.asarray(levels.gaps)


def slope(x, levels, std, mean, noise):
    z = (np.asarray(x)[..., None] + mean - np.asarray(levels.thresholds)) / std
    return SCIPY[noise].pdf(z) @ np.asarray(levels.gaps) / std


def staircase(x, levels):
    codes = np.searchsorted(levels.thresholds, x, side="right")
    return np.asarray(levels.values)[codes]


def difference(function, at, step=STEP):
    """Central difference quotient."""
    return (function(at + step) - function(at - step)) / (2 * step)


def leaf(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def points(levels, noise="normal", *noise_levels):
    """Inputs across the levels, away from the kinks of the given (std, mean) pairs."""
    x = np.linspace(levels.values[0] - 1.3, levels.values[-1] + 1.1, 97)
    for std, mean in noise_levels:
        z = np.abs(x[:, None] + mean - np.asarray(levels.thresholds)) / std
        kinks = [0.0, NOISES[noise].half_width] if noise in ("uniform", "triangular") else []
        for kink in kinks:
            x = x[np.abs(z - kink).min(1) > 5e-3]
            z = np.abs(x[:, None] + mean - np.asarray(levels.thresholds)) / std
    assert len(x) > 20
    return leaf(x)


def quantize(x, levels=None, *, std=0.4, back=0.6, seed=0, **options):
    return annealed_quantize(
        x,
        levels or ternary(),
        forward_std=std,
        backward_std=back,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


# ---------------------------------------------------------------- values


@every_noise
@every_set
@pytest.mark.parametrize(("std", "mean"), [(0.05, 0.0), (0.4, -0.3), (2.0, 0.25)])
def test_expectation_equals_the_scipy_closed_form(levels, noise, std, mean):
    x = points(levels)
    y = quantize(x, levels, std=std, forward_mean=mean, noise=noise)
    truth = expectation(x.detach(), levels, std, mean, noise)
    np.testing.assert_allclose(y.detach().numpy(), truth, atol=1e-13)


def test_uniform_noise_one_step_wide_is_the_identity_between_the_outermost_levels():
    x = torch.linspace(-2, 6, 401, dtype=torch.float64, requires_grad=True)
    width = 0.5 / math.sqrt(3)
    y = quantize(x, unsigned(2), std=width, back=width, noise="uniform")
    torch.testing.assert_close(y, x.clamp(0, 3), rtol=0, atol=1e-14)
    smooth = (x - x.round()).abs() > 0.01
    (grad_x,) = grad(y.sum(), x)
    torch.testing.assert_close(grad_x[smooth], ((x > 0) & (x < 3)).double()[smooth])


@every_noise
@every_set
def test_expectation_equals_monte_carlo(levels, noise):
    x = np.array([-0.9, -0.5, 0.0, 0.3, 1.2])
    samples = SCIPY[noise].rvs((100_000, 1), random_state=np.random.default_rng(5))
    values = staircase(x + 0.1 + 0.5 * samples, levels)
    y = quantize(torch.from_numpy(x), levels, std=0.5, forward_mean=0.1, noise=noise)
    error = 5 * values.std(0) / math.sqrt(len(samples)) + 1e-4
    assert (np.abs(y.numpy() - values.mean(0)) < error).all()


@every_noise
@every_set
@pytest.mark.parametrize("as_tensor", [False, True])
def test_random_mode_has_the_frequencies_of_the_level_probabilities(levels, noise, as_tensor):
    count, std = 40_000, 0.5
    x = torch.tensor([-0.9, 0.0, 0.3, 1.2], dtype=torch.float64)
    y = quantize(
        x.expand(count, 4),
        levels,
        std=torch.tensor(std, dtype=torch.float64) if as_tensor else std,
        forward_mean=0.1,
        noise=noise,
        mode="random",
    )
    values = torch.tensor(levels.values, dtype=torch.float64)
    hits = (y[..., None] == values).sum(0)
    frequencies = hits / count
    probabilities = level_probabilities(x, levels, std, 0.1, noise)
    assert hits.sum(-1).tolist() == [count] * 4
    error = 5 * (probabilities * (1 - probabilities) / count).sqrt() + 1e-4
    assert ((frequencies - probabilities).abs() < error).all()
    mean = quantize(x, levels, std=std, forward_mean=0.1, noise=noise)
    spread = 5 * y.std(0) / math.sqrt(count) + 1e-3
    assert ((y.mean(0) - mean).abs() < spread).all()


@every_noise
def test_random_mode_is_reproducible_from_the_generator(noise):
    x = torch.zeros(1000)
    first = quantize(x, noise=noise, mode="random", seed=1)
    assert torch.equal(first, quantize(x, noise=noise, mode="random", seed=1))
    assert not torch.equal(first, quantize(x, noise=noise, mode="random", seed=2))


@every_noise
@every_set
@pytest.mark.parametrize(("std", "mean"), [(0.1, 0.0), (0.4, 0.2), (1.5, -0.4)])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_mode_is_the_most_probable_level_by_brute_force(levels, noise, std, mean, as_tensor):
    x = points(levels).detach()
    forward_std = torch.full_like(x, std) if as_tensor else std
    y = quantize(x, levels, std=forward_std, forward_mean=mean, noise=noise, mode="mode")
    edges = np.array([np.inf, *(-np.asarray(levels.thresholds)), -np.inf])
    above = SCIPY[noise].cdf((x.numpy()[:, None] + mean + edges) / std)
    probability = above[:, :-1] - above[:, 1:]
    chosen = probability[y.numpy()[:, None] == np.asarray(levels.values)]
    assert len(chosen) == len(x)
    assert (chosen >= probability.max(1) - 1e-12).all()


@every_noise
@every_set
def test_level_probabilities_equal_scipy(levels, noise):
    x = points(levels).detach()
    edges = np.array([np.inf, *(-np.asarray(levels.thresholds)), -np.inf])
    above = SCIPY[noise].cdf((x.numpy()[:, None] - 0.2 + edges) / 0.7)
    for std in (0.7, torch.tensor(0.7, dtype=torch.float64), torch.full_like(x, 0.7)):
        ours = level_probabilities(x, levels, std, -0.2, noise)
        np.testing.assert_allclose(ours, above[:, :-1] - above[:, 1:], atol=1e-13)


def test_level_probabilities_without_noise_are_the_hard_codes():
    x = points(UNEVEN).detach()
    codes = torch.nn.functional.one_hot(UNEVEN.codes(x), 4).double()
    assert torch.equal(level_probabilities(x, UNEVEN, 0.0), codes)
    assert torch.equal(level_probabilities(x, UNEVEN, torch.zeros(1).double()), codes)


# ---------------------------------------------------------------- the hard limit


def numbers(levels):
    return st.one_of(
        st.floats(-300, 300, width=32),
        st.sampled_from(levels.thresholds),
        st.sampled_from(levels.values),
        st.sampled_from([-0.0, 1e-45, -1e-45, 5e-324, -5e-324, 1e-38, -1e-38, 1e-20, -1e-20]),
    )


def same_level_in_three_forms(value, x):
    """A noise level as a number, as a tensor without dimensions and as one that broadcasts."""
    return value, torch.tensor(value, dtype=x.dtype), torch.full((1,), value, dtype=x.dtype)


@every_exact_set
@every_mode
@PROPERTY
@given(data=st.data())
def test_without_noise_the_value_is_the_staircase_to_the_bit(levels, mode, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    noise = data.draw(st.sampled_from(sorted(SCIPY)))
    x = torch.tensor(data.draw(st.lists(numbers(levels), min_size=1, max_size=20)), dtype=dtype)
    truth = torch.from_numpy(staircase(x.double().numpy(), levels)).to(dtype)
    for std in same_level_in_three_forms(0.0, x):
        y = quantize(x, levels, std=std, noise=noise, mode=mode)
        assert y.dtype == dtype
        assert torch.equal(y, truth)


@every_noise
@pytest.mark.parametrize("levels", EXACT_SETS, ids=lambda levels: levels.name)
def test_hard_quantizer_steps_exactly_at_its_thresholds(levels, noise):
    at = torch.tensor(levels.thresholds)
    below = torch.nextafter(at, torch.tensor(-math.inf))
    for std in (*same_level_in_three_forms(0.0, at), 1e-40, torch.tensor(1e-40)):
        for mode in ("expectation", "mode"):
            y = [quantize(x, levels, std=std, noise=noise, mode=mode).tolist() for x in (below, at)]
            assert y == [list(levels.values[:-1]), list(levels.values[1:])]


@every_mode
@pytest.mark.parametrize("mean", [-0.5, 0.25, 3.0])
def test_without_noise_the_mean_shifts_the_staircase(mode, mean):
    x = torch.linspace(-4, 4, 65)
    truth = torch.from_numpy(staircase(x.numpy() + mean, UNEVEN)).float()
    for std, m in zip(
        same_level_in_three_forms(0.0, x), same_level_in_three_forms(mean, x), strict=True
    ):
        assert torch.equal(quantize(x, UNEVEN, std=std, forward_mean=m, mode=mode), truth)


@every_noise
def test_expectation_converges_to_the_staircase(noise):
    x = points(UNEVEN, "uniform", (1.0, 0.0)).detach()  # off the thresholds
    hard = torch.from_numpy(staircase(x.numpy(), UNEVEN))
    errors = [
        float((quantize(x, UNEVEN, std=s, noise=noise) - hard).abs().max())
        for s in (1.0, 0.1, 0.01, 1e-3, 1e-5)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12


@every_noise
@every_mode
@PROPERTY
@given(
    dtype=st.sampled_from(DTYPES),
    std=st.floats(1e-3, 4),
    mean=st.floats(-1, 1),
    seed=st.integers(0, 99),
)
def test_number_scalar_tensor_and_broadcast_tensor_agree(noise, mode, dtype, std, mean, seed):
    x = (torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 2).to(dtype)
    std, mean = (float(torch.tensor(v, dtype=dtype)) for v in (std, mean))
    results = [
        quantize(x, unsigned(2), std=s, forward_mean=m, noise=noise, mode=mode, seed=seed)
        for s, m in zip(
            same_level_in_three_forms(std, x), same_level_in_three_forms(mean, x), strict=True
        )
    ]
    for result in results[1:]:
        if mode == "expectation":
            torch.testing.assert_close(result, results[0], rtol=0, atol=torch.finfo(dtype).eps * 6)
        else:  # whole levels, which may differ only where rounding decides a tie
            assert (result != results[0]).double().mean() <= (0.0 if dtype.itemsize > 2 else 0.1)


@every_noise
def test_per_channel_noise_equals_channel_by_channel(noise):
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    std = torch.tensor([[0.0], [0.3], [1.5]])
    rows = [quantize(r, std=float(s), back=0.5, noise=noise) for r, s in zip(x, std, strict=True)]
    torch.testing.assert_close(quantize(x, std=std, noise=noise), torch.stack(rows))


@every_mode
def test_noise_levels_of_another_dtype_do_not_change_the_result_dtype(mode):
    x = torch.linspace(-1, 1, 20).view(4, 5).bfloat16().requires_grad_()
    std = torch.full((4, 1), 0.5, requires_grad=True)
    y = quantize(x, std=std, back=std.detach(), forward_mean=torch.zeros(4, 1), mode=mode)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    if mode == "expectation":
        assert std.grad.dtype == torch.float32


# ---------------------------------------------------------------- properties


@every_exact_set
@PROPERTY
@given(data=st.data())
def test_expectation_is_monotone_and_inside_the_levels(levels, data):
    noise = data.draw(st.sampled_from(sorted(SCIPY)))
    dtype = data.draw(st.sampled_from(DTYPES))
    std = data.draw(st.one_of(st.just(0.0), st.floats(1e-6, 10)))
    mean = data.draw(st.floats(-1, 1))
    x = torch.tensor(data.draw(st.lists(numbers(levels), min_size=2, max_size=20)), dtype=dtype)
    x = x.sort().values
    for s, m in zip(
        same_level_in_three_forms(std, x), same_level_in_three_forms(mean, x), strict=True
    ):
        y = quantize(x, levels, std=s, forward_mean=m, noise=noise)
        assert ((y >= levels.values[0]) & (y <= levels.values[-1])).all()
        rounding = torch.finfo(dtype).eps * len(levels.values) * max(map(abs, levels.values))
        assert (y.double().diff() >= -rounding).all()


@every_exact_set
@PROPERTY
@given(data=st.data())
def test_probabilities_are_not_negative_and_sum_to_1(levels, data):
    noise = data.draw(st.sampled_from(sorted(SCIPY)))
    dtype = data.draw(st.sampled_from(DTYPES))
    std = data.draw(st.one_of(st.just(0.0), st.floats(1e-6, 10)))
    x = torch.tensor(data.draw(st.lists(numbers(levels), min_size=1, max_size=9)), dtype=dtype)
    p = level_probabilities(x, levels, std, data.draw(st.floats(-1, 1)), noise)
    assert p.shape == (*x.shape, len(levels.values))
    assert (p >= 0).all()
    rounding = torch.finfo(dtype).eps * len(levels.values)
    torch.testing.assert_close(
        p.double().sum(-1), torch.ones(len(x), dtype=torch.float64), rtol=0, atol=rounding
    )


@pytest.mark.parametrize("mode", ["mode", "random"])
@every_exact_set
@PROPERTY
@given(data=st.data())
def test_mode_and_random_stay_on_the_level_set(mode, levels, data):
    noise = data.draw(st.sampled_from(sorted(SCIPY)))
    dtype = data.draw(st.sampled_from(DTYPES))
    x = torch.tensor(data.draw(st.lists(numbers(levels), min_size=1, max_size=20)), dtype=dtype)
    y = quantize(x, levels, std=data.draw(st.floats(0, 5)), noise=noise, mode=mode)
    assert set(y.tolist()) <= set(levels.values)


# ---------------------------------------------------------------- first derivatives


@every_noise
@every_mode
@every_set
@pytest.mark.parametrize("std", [0.0, 0.3])
def test_gradient_to_x_is_the_backward_density_whatever_the_forward(noise, mode, levels, std):
    x = points(levels, noise, (0.7, 0.2))
    y = quantize(x, levels, std=std, back=0.7, backward_mean=0.2, noise=noise, mode=mode)
    weight = torch.linspace(-1, 2, len(x), dtype=torch.float64)
    (grad_x,) = grad(y, x, weight)
    truth = weight.numpy() * slope(x.detach(), levels, 0.7, 0.2, noise)
    np.testing.assert_allclose(grad_x.numpy(), truth, atol=1e-13)


@every_noise
@every_set
def test_gradient_to_x_is_the_derivative_of_the_expectation_when_the_noises_are_equal(
    noise, levels
):
    x = points(levels, noise, (0.6, -0.1))
    y = quantize(x, levels, std=0.6, forward_mean=-0.1, back=0.6, backward_mean=-0.1, noise=noise)
    (grad_x,) = grad(y.sum(), x)
    truth = difference(lambda v: expectation(v, levels, 0.6, -0.1, noise), x.detach().numpy())
    np.testing.assert_allclose(grad_x.numpy(), truth, atol=1e-8)


@every_noise
@every_set
def test_gradients_to_the_forward_noise_equal_finite_differences(noise, levels):
    at_std, at_mean = 0.45, 0.15
    x = points(levels, noise, (at_std, at_mean))
    std, mean = leaf(at_std), leaf(at_mean)
    y = quantize(x, levels, std=std, forward_mean=mean, noise=noise)
    weight = torch.linspace(-1, 2, len(x), dtype=torch.float64)
    grad_std, grad_mean = grad((weight * y).sum(), (std, mean))

    def value(s, m):
        return float(weight.numpy() @ expectation(x.detach(), levels, s, m, noise))

    assert grad_std.item() == pytest.approx(difference(lambda s: value(s, at_mean), at_std), 1e-7)
    assert grad_mean.item() == pytest.approx(difference(lambda m: value(at_std, m), at_mean), 1e-7)


@every_noise
def test_gradients_to_noise_per_entry_equal_finite_differences(noise):
    x = points(UNEVEN, noise, (0.45, 0.15)).detach()
    std, mean = torch.full_like(x, 0.45).requires_grad_(), torch.full_like(x, 0.15).requires_grad_()
    y = quantize(x, UNEVEN, std=std, forward_mean=mean, noise=noise)
    grad_std, grad_mean = grad(y.sum(), (std, mean))
    by_std = difference(lambda s: expectation(x, UNEVEN, s, 0.15, noise), 0.45)
    by_mean = difference(lambda m: expectation(x, UNEVEN, 0.45, m, noise), 0.15)
    np.testing.assert_allclose(grad_std.numpy(), by_std, atol=1e-8)
    np.testing.assert_allclose(grad_mean.numpy(), by_mean, atol=1e-8)


def test_gradient_to_broadcast_noise_is_summed_to_its_shape():
    x = leaf(np.linspace(-1, 1, 12).reshape(3, 4))
    wide = torch.full((3, 4), 0.5, dtype=torch.float64, requires_grad=True)
    (each,) = grad(quantize(x, std=wide).sum(), wide)
    for shape, total in (
        ((), each.sum()),
        ((3, 1), each.sum(1, keepdim=True)),
        ((4,), each.sum(0)),
    ):
        std = torch.full(shape, 0.5, dtype=torch.float64, requires_grad=True)
        (summed,) = grad(quantize(x, std=std).sum(), std)
        torch.testing.assert_close(summed, total)


@every_noise
@every_mode
def test_backward_noise_has_no_gradient_at_first_order(noise, mode):
    x, back, mean = points(ternary()), leaf(0.6), leaf(0.1)
    y = quantize(x, back=back, backward_mean=mean, noise=noise, mode=mode)
    grads = grad(y.sum(), (x, back, mean), allow_unused=True)
    assert grads[0].abs().sum() > 0
    assert grads[1:] == (None, None)


@every_noise
@pytest.mark.parametrize("mode", ["mode", "random"])
def test_piecewise_constant_modes_give_the_forward_noise_no_gradient(noise, mode):
    x, std, mean = points(ternary()), leaf(0.4), leaf(0.1)
    y = quantize(x, std=std, forward_mean=mean, noise=noise, mode=mode)
    assert grad(y.sum(), (std, mean), allow_unused=True) == (None, None)


# ---------------------------------------------------------------- second derivatives


@every_noise
@every_mode
@every_set
def test_double_backward_of_the_gradient_to_x_equals_finite_differences(noise, mode, levels):
    at_std, at_mean = 0.7, 0.2
    x, std, mean = points(levels, noise, (at_std, at_mean)), leaf(at_std), leaf(at_mean)
    y = quantize(x, levels, back=std, backward_mean=mean, noise=noise, mode=mode)
    outer = torch.linspace(-1, 2, len(x), dtype=torch.float64, requires_grad=True)
    (grad_x,) = grad(y, x, outer, create_graph=True)
    inner = torch.linspace(2, -1, len(x), dtype=torch.float64)
    second = grad((grad_x * inner).sum(), (x, std, mean, outer), materialize_grads=True)

    def first(v, s, m):
        return (inner * outer.detach()).numpy() * slope(v, levels, s, m, noise)

    at = x.detach().numpy()
    by_x = difference(lambda v: first(v, at_std, at_mean), at)
    by_std = difference(lambda s: first(at, s, at_mean).sum(), at_std)
    by_mean = difference(lambda m: first(at, at_std, m).sum(), at_mean)
    np.testing.assert_allclose(second[0].numpy(), by_x, atol=1e-7)
    assert second[1].item() == pytest.approx(by_std, abs=1e-6)
    assert second[2].item() == pytest.approx(by_mean, abs=1e-6)
    np.testing.assert_allclose(
        second[3].numpy(), inner.numpy() * slope(at, levels, at_std, at_mean, noise), atol=1e-12
    )


@every_noise
def test_double_backward_of_the_gradients_to_the_forward_noise_equals_finite_differences(noise):
    at_std, at_mean, step = 0.45, 0.15, 1e-4
    x = points(UNEVEN, noise, (at_std, at_mean))
    std, mean = leaf(at_std), leaf(at_mean)
    y = quantize(x, UNEVEN, std=std, forward_mean=mean, noise=noise)
    grad_std, grad_mean = grad(y.sum(), (std, mean), create_graph=True)
    std_row = grad(grad_std, (x, std, mean), retain_graph=True)
    mean_row = grad(grad_mean, (x, std, mean), materialize_grads=True)

    def value(v, s, m):
        return expectation(v, UNEVEN, s, m, noise)

    def by_std(v, s, m):
        return difference(lambda u: value(v, u, m), s, step)

    def by_mean(v, s, m):
        return difference(lambda u: value(v, s, u), m, step)

    at = x.detach().numpy()
    for row, first in ((std_row, by_std), (mean_row, by_mean)):
        by_x = difference(lambda v, f=first: f(v, at_std, at_mean), at, step)
        np.testing.assert_allclose(row[0].numpy(), by_x, atol=1e-5)
        truth = difference(lambda s, f=first: f(at, s, at_mean).sum(), at_std, step)
        assert row[1].item() == pytest.approx(truth, abs=1e-4)
        truth = difference(lambda m, f=first: f(at, at_std, m).sum(), at_mean, step)
        assert row[2].item() == pytest.approx(truth, abs=1e-4)


@every_noise
@every_mode
def test_gradgradcheck(noise, mode):
    x = leaf([[-0.83, -0.31, 0.12], [0.37, 0.71, 1.63]])
    noise_levels = (leaf(0.41), leaf([0.11, -0.07, 0.02]), leaf([[0.63], [0.52]]), leaf(-0.13))

    def function(v, std, mean, back, back_mean):
        options = {"forward_mean": mean, "backward_mean": back_mean, "noise": noise, "mode": mode}
        return quantize(v, std=std, back=back, **options)

    assert torch.autograd.gradgradcheck(function, (x, *noise_levels))


# ---------------------------------------------------------------- noise of exactly 0


@every_noise
@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-30, 1e-13])
def test_vanishing_noise_has_finite_gradients_of_both_orders(noise, mode, dtype, value):
    x = torch.tensor([-3.0, -0.5, 0.0, 0.3, 0.5, 100.0], dtype=dtype, requires_grad=True)
    leaves = [torch.tensor(v, dtype=dtype, requires_grad=True) for v in (value, 0.0, value, 0.0)]
    y = quantize(
        x,
        std=leaves[0],
        forward_mean=leaves[1],
        back=leaves[2],
        backward_mean=leaves[3],
        noise=noise,
        mode=mode,
    )
    first = grad(y.sum(), (x, *leaves), create_graph=True, materialize_grads=True)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in first)
    total = sum(g.square().sum() + g.sum() for g in first)
    second = grad(total, (x, *leaves), materialize_grads=True)
    assert all(g.isfinite().all() for g in second)


@every_noise
def test_zero_and_positive_noise_may_stand_side_by_side(noise):
    x = leaf([0.5, 0.4, 0.5, 0.4])
    std = leaf([0.0, 0.0, 0.5, 0.5])
    y = quantize(x, std=std, back=std, noise=noise)
    first = grad(y.sum(), (x, std), create_graph=True)
    second = grad(sum(g.square().sum() for g in first), (x, std), materialize_grads=True)
    alone = leaf([0.5, 0.5])
    expected = grad(quantize(x[2:], std=alone, back=alone, noise=noise).sum(), (x, alone))
    assert y[:2].tolist() == [1.0, 0.0]
    assert first[0][:2].tolist() == first[1][:2].tolist() == [0.0, 0.0]
    torch.testing.assert_close(first[0][2:], expected[0][2:])
    torch.testing.assert_close(first[1][2:], expected[1])
    assert all(g.isfinite().all() for g in second)


def test_a_number_0_as_backward_std_gives_no_gradient():
    x = points(ternary())
    (grad_x,) = grad(quantize(x, std=0.3, back=0.0).sum(), x)
    assert torch.equal(grad_x, torch.zeros_like(x))


# ---------------------------------------------------------------- transforms


def members(count=4, size=6):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, size, generator=generator, dtype=torch.float64) * 1.5
    std = torch.tensor([0.0, 0.2, 0.5, 1.3], dtype=torch.float64)
    back = torch.tensor([0.9, 0.6, 0.0, 0.4], dtype=torch.float64)
    return x, std, back


@every_noise
@pytest.mark.parametrize("mode", ["expectation", "mode"])
@pytest.mark.parametrize("levels", [ternary(), unsigned(5)], ids=lambda levels: levels.name)
def test_vmap_over_stacked_noise_equals_one_by_one(noise, mode, levels):
    x, std, back = members()

    def value(v, s, b):
        return quantize(v * 3, levels, std=s, back=b, noise=noise, mode=mode)

    def first(v, s, b):
        return torch.func.grad(lambda v, s: value(v, s, b).square().sum(), argnums=(0, 1))(v, s)

    def second(v, s, b):
        def norm(v, s, b):
            return sum(g.square().sum() for g in first(v, s, b))

        return torch.func.grad(norm, argnums=(0, 1, 2))(v, s, b)

    for function in (value, first, second):
        stacked = torch.func.vmap(function)(x, std, back)
        singles = [function(*member) for member in zip(x, std, back, strict=True)]
        if isinstance(stacked, tuple):
            for s, parts in zip(stacked, zip(*singles, strict=True), strict=True):
                torch.testing.assert_close(s, torch.stack(parts))
        else:
            torch.testing.assert_close(stacked, torch.stack(singles))


@every_noise
def test_autograd_twice_through_vmap_equals_one_by_one(noise):
    def derivatives(function):
        x, std, back = (t.clone().requires_grad_() for t in members())
        first = grad(function(x, std, back).square().sum(), (x, std), create_graph=True)
        norm = sum(g.square().sum() for g in first)
        return (*first, *grad(norm, (x, std, back)))

    def member(v, s, b):
        return quantize(v, std=s, back=b, noise=noise)

    def loop(x, std, back):
        return torch.stack([member(*parts) for parts in zip(x, std, back, strict=True)])

    for ours, truth in zip(derivatives(torch.func.vmap(member)), derivatives(loop), strict=True):
        torch.testing.assert_close(ours, truth)


def test_vmap_keeps_half_precision_and_the_level_set():
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    std = torch.zeros(3, dtype=torch.bfloat16)
    y = torch.func.vmap(lambda v, s: quantize(v, std=s, back=0.5))(x, std)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, ternary().quantize(x))


def test_vmap_of_random_mode_draws_for_each_member():
    x, std = torch.zeros(2, 500), torch.tensor([0.0, 1.0])

    def member(v, s):
        return annealed_quantize(v, ternary(), forward_std=s, backward_std=0.5, mode="random")

    torch.manual_seed(0)
    y = torch.func.vmap(member, randomness="different")(x, std)
    assert torch.equal(y[0], torch.zeros(500))
    assert set(y[1].tolist()) == {-1.0, 0.0, 1.0}


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("which", ["forward_std", "backward_std"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", [float, torch.tensor, lambda v: torch.tensor([1.0, v, 0.0])])
def test_std_must_be_at_least_0_and_finite(which, value, form):
    stds = {"forward_std": 0.5, "backward_std": 0.5, which: form(value)}
    with pytest.raises(ValueError, match=f"{which} must be at least 0"):
        annealed_quantize(torch.zeros(3), ternary(), **stds)


@pytest.mark.parametrize("which", ["forward_mean", "backward_mean"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("form", [float, torch.tensor, lambda v: torch.tensor([1.0, v, 0.0])])
def test_mean_must_be_finite(which, value, form):
    with pytest.raises(ValueError, match=f"{which} must be finite"):
        annealed_quantize(
            torch.zeros(3), ternary(), forward_std=0.5, backward_std=0.5, **{which: form(value)}
        )


def test_level_probabilities_check_their_mean():
    with pytest.raises(ValueError, match="mean must be finite"):
        level_probabilities(torch.zeros(3), ternary(), 0.5, math.nan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_levels_in_half_precision_are_those_of_the_numbers_it_holds(dtype):
    # Thresholds at .5 of what bfloat16 holds without fractions; only single precision tells sides apart.
    x = torch.arange(200, 256).to(dtype)
    levels = unsigned(8)
    codes = levels.codes(x)
    assert torch.equal(level_probabilities(x, levels, 0.0).argmax(-1), codes)
    assert torch.equal(codes, levels.codes(x.float()))
    uneven = LevelSet((0.0, 100.0, 101.0), (50.0, 100.25))
    at = torch.tensor([0.0, 100.0, 101.0], dtype=dtype)
    assert uneven.codes(at).tolist() == [0, 1, 2]
    assert uneven.quantize(at).tolist() == [0, 100, 101]
    soft = annealed_quantize(at, uneven, forward_std=0.0, backward_std=0.5)
    assert soft.tolist() == [0, 100, 101]


@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_level_probabilities_check_their_std(value):
    with pytest.raises(ValueError, match="std must be at least 0"):
        level_probabilities(torch.zeros(3), ternary(), value)


def test_unknown_noise_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"unknown noise 'gauss'.*normal"):
        quantize(torch.zeros(3), noise="gauss")


def test_unknown_mode_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"unknown mode 'mean'.*expectation"):
        quantize(torch.zeros(3), mode="mean")


@pytest.mark.parametrize(
    "x", [torch.zeros(3, dtype=torch.int64), torch.zeros(3).bool(), [0.5], 0.5]
)
def test_x_must_be_a_floating_point_tensor(x):
    with pytest.raises(TypeError, match="x must be a floating point tensor"):
        quantize(x)
    with pytest.raises(TypeError, match="x must be a floating point tensor"):
        level_probabilities(x, ternary(), 0.5)


@pytest.mark.parametrize("levels", [(-1.0, 0.0, 1.0), "ternary", ternary])
def test_levels_must_be_a_level_set(levels):
    with pytest.raises(TypeError, match="levels must be a LevelSet"):
        quantize(torch.zeros(3), levels)
    with pytest.raises(TypeError, match="levels must be a LevelSet"):
        level_probabilities(torch.zeros(3), levels, 0.5)


@every_noise
@every_exact_set
@pytest.mark.parametrize("std", [0.0, 0.4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_lies_infinitely_far_out_has_the_end_levels_and_no_gradient(noise, levels, std, dtype):
    x = torch.tensor([-math.inf, 0.3, math.inf], dtype=dtype, requires_grad=True)
    f_std, b_std = (torch.full((), s, dtype=dtype, requires_grad=True) for s in (std, 0.5))
    y = annealed_quantize(x, levels, forward_std=f_std, backward_std=b_std, noise=noise)
    ends = torch.tensor([levels.values[0], levels.values[-1]], dtype=dtype)
    assert torch.equal(y.detach()[::2], ends)
    of_x, of_std = grad(y.sum(), (x, f_std), create_graph=True)
    assert of_x[::2].abs().max() < 1e-20 and of_x.isfinite().all() and of_std.isfinite()
    seconds = grad(of_x.sum() + of_std, (x, f_std, b_std), materialize_grads=True)
    assert all(second.isfinite().all() for second in seconds)
    assert seconds[0][::2].abs().max() < 1e-20


@every_noise
@every_exact_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_levels_that_are_as_probable_as_each_other_give_the_upper_one(noise, levels, dtype):
    at = torch.tensor(levels.thresholds, dtype=dtype)
    std = 0.01 * min(levels.gaps)  # no third level has any part
    both = level_probabilities(at, levels, std, noise=noise)
    for index, row in enumerate(both):
        assert row[index] == row[index + 1] == 0.5
    for form in same_level_in_three_forms(std, at):
        y = quantize(at, levels, std=form, noise=noise, mode="mode")
        assert y.tolist() == torch.tensor(levels.values[1:], dtype=dtype).tolist()


@every_noise
@every_mode
@pytest.mark.parametrize("scale", [0.3, [[0.4], [2.5]]])
def test_under_a_scale_every_second_derivative_is_that_of_the_unscaled_quantizer(
    noise, mode, scale
):
    """``s E(x / s)``, whose means are in units of ``x / s``."""
    scale = torch.tensor(scale, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(5, 2, 3, generator=generator, dtype=torch.float64)

    def second(quantized):
        inside = leaf([[-0.83, -0.31, 0.12], [0.37, 0.71, 1.63]])
        noise_levels = (leaf(0.41), leaf([0.11, -0.07, 0.02]), leaf([[0.63], [0.52]]), leaf(-0.13))
        x = (inside * scale).detach().requires_grad_()
        y = quantized(x, *noise_levels)
        leaves = (x, *noise_levels)
        first = grad((y * mix[0]).sum(), leaves, create_graph=True, materialize_grads=True)
        total = sum((g * m.sum_to_size(g.shape)).sum() for g, m in zip(first, mix, strict=True))
        return [*first, *grad(total, leaves, materialize_grads=True)]

    def scaled(x, *numbers):
        made = torch.Generator().manual_seed(0)
        std, mean, back, back_mean = numbers
        fixed = noise_shape(noise), mode, made, scale
        return quantize_unchecked(x, ternary(), std, mean, back, back_mean, *fixed)

    def composed(x, std, mean, back, back_mean):
        options = {"forward_mean": mean, "backward_mean": back_mean, "noise": noise, "mode": mode}
        return scale * quantize(x / scale, std=std, back=back, **options)

    found = second(scaled)
    for ours, truth in zip(found, second(composed), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-12)
    if noise != "uniform":  # whose density is flat
        assert found[9].abs() > 1e-3  # to the backward mean
        assert mode != "expectation" or found[7].abs().max() > 1e-3  # to the forward mean
