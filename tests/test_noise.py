"""The noise shapes against scipy.stats."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from learnsched.noise import NOISES, noise_shape

SCIPY = {
    "uniform": stats.uniform(-math.sqrt(3), 2 * math.sqrt(3)),
    "triangular": stats.triang(0.5, -math.sqrt(6), 2 * math.sqrt(6)),
    "normal": stats.norm(),
    "logistic": stats.logistic(scale=math.sqrt(3) / math.pi),
}
GRID = np.linspace(-12, 12, 2001)
SAMPLES = 100_000


def draw(name, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return NOISES[name].sample(torch.empty(SAMPLES, dtype=dtype), generator)


def curvature(name, z):
    return NOISES[name].derivatives(z)[1]


def test_scipy_references_have_mean_0_and_std_1():
    assert set(SCIPY) == set(NOISES)
    for reference in SCIPY.values():
        assert reference.mean() == pytest.approx(0, abs=1e-12)
        assert reference.std() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("name", SCIPY)
def test_cdf_equals_scipy(name):
    ours = NOISES[name].cdf(torch.from_numpy(GRID)).numpy()
    np.testing.assert_allclose(ours, SCIPY[name].cdf(GRID), atol=1e-14)


@pytest.mark.parametrize("name", SCIPY)
def test_density_equals_scipy(name):
    ours = NOISES[name].density(torch.from_numpy(GRID)).numpy()
    np.testing.assert_allclose(ours, SCIPY[name].pdf(GRID), atol=1e-14)


@pytest.mark.parametrize("name", SCIPY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_are_kept_and_accurate(name, dtype):
    z = torch.linspace(-5, 5, 81).to(dtype)
    tolerance = 4 * torch.finfo(dtype).eps
    assert curvature(name, z).dtype == dtype
    for function, reference in ((NOISES[name].cdf, "cdf"), (NOISES[name].density, "pdf")):
        ours = function(z)
        assert ours.dtype == dtype
        truth = getattr(SCIPY[name], reference)(z.double().numpy())
        np.testing.assert_allclose(ours.double().numpy(), truth, atol=tolerance)


@pytest.mark.parametrize("name", SCIPY)
def test_curvature_equals_finite_differences_of_the_density(name):
    z, step = GRID + 1e-4, 1e-6  # off the kinks
    ours = curvature(name, torch.from_numpy(z)).numpy()
    truth = (SCIPY[name].pdf(z + step) - SCIPY[name].pdf(z - step)) / (2 * step)
    np.testing.assert_allclose(ours, truth, atol=1e-8)


@pytest.mark.parametrize("name", ["uniform", "triangular"])
def test_curvature_is_0_at_kinks_and_jumps(name):
    width = NOISES[name].half_width
    z = torch.tensor([-width, 0.0, width], dtype=torch.float64)
    assert curvature(name, z).tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", SCIPY)
def test_far_tails_are_exactly_0_and_1_and_never_nan(name):
    z = torch.tensor([-math.inf, -1e6, 1e6, math.inf], dtype=torch.float32)
    assert NOISES[name].cdf(z).tolist() == [0, 0, 1, 1]
    assert NOISES[name].density(z).tolist() == [0, 0, 0, 0]
    assert curvature(name, z[1:3]).tolist() == [0, 0]


@pytest.mark.parametrize("name", SCIPY)
def test_sample_moments(name):
    sample = draw(name)
    fourth = float(SCIPY[name].stats(moments="k")) + 3
    assert float(sample.mean()) == pytest.approx(0, abs=4 / math.sqrt(SAMPLES))
    spread = math.sqrt((fourth - 1) / SAMPLES)
    assert float(sample.square().mean()) == pytest.approx(1, abs=4 * spread)


@pytest.mark.parametrize("name", SCIPY)
def test_samples_pass_a_kolmogorov_smirnov_test(name):
    assert stats.kstest(draw(name, seed=1).numpy(), SCIPY[name].cdf).pvalue > 1e-3


@pytest.mark.parametrize("name", SCIPY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_are_finite_and_of_the_given_shape_and_dtype(name, dtype):
    like = torch.empty(1000, 3, dtype=dtype)
    sample = NOISES[name].sample(like, torch.Generator().manual_seed(0))
    assert sample.shape == like.shape
    assert sample.dtype == dtype
    assert sample.isfinite().all()


@pytest.mark.parametrize("name", SCIPY)
def test_equal_seeds_give_equal_samples(name):
    assert torch.equal(draw(name, seed=3), draw(name, seed=3))
    assert not torch.equal(draw(name, seed=3), draw(name, seed=4))


@pytest.mark.parametrize("name", SCIPY)
def test_half_width_is_the_end_of_the_support(name):
    assert NOISES[name].half_width == pytest.approx(SCIPY[name].support()[1], rel=1e-15)
    assert draw(name).abs().max() <= NOISES[name].half_width


@pytest.mark.parametrize("name", SCIPY)
def test_noise_shape_finds_each_shape_by_name(name):
    assert noise_shape(name) is NOISES[name]
    assert noise_shape(name).name == name


def test_unknown_noise_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="logistic, normal, triangular, uniform"):
        noise_shape("gaussian")
