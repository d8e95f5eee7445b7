"""The search for base curves: its regression and its maximum against known quadratics."""

import itertools
import math

import pytest
import torch

from learnsched.benchmarks.curve_search import BOXES, curves, fit, maximum, quadratic


def test_every_product_of_two_coordinates_appears_once():
    points = torch.tensor([[1.0, 0.5, 0.0]])  # z = 1, 0, -1
    products = [1.0, 0.0, -1.0, 0.0, 0.0, 1.0]  # z0z0, z0z1, z0z2, z1z1, z1z2, z2z2
    assert quadratic(points).tolist() == [[1.0, 0.0, -1.0, *products]]


def test_a_known_quadratic_is_found_whatever_is_added_to_each_group():
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(400, 3, generator=generator)
    true = torch.tensor([0.3, -0.2, 0.5, -1.0, 0.4, 0.1, -0.7, 0.2, -0.5]).double()
    groups = torch.arange(400) % 7
    values = quadratic(points) @ true + 10 * groups
    torch.testing.assert_close(fit(points, values, groups, ridge=1e-9), true)


@pytest.mark.parametrize("seed", range(4))
def test_the_maximum_is_that_of_a_fine_grid(seed):
    generator = torch.Generator().manual_seed(seed)
    coefficients = torch.randn(5, generator=generator).double()
    low, high = torch.tensor([0.1, 0.3]).double(), torch.tensor([0.9, 0.8]).double()
    axes = [torch.linspace(float(a), float(b), 201) for a, b in zip(low, high, strict=True)]
    grid = torch.tensor(list(itertools.product(*(axis.tolist() for axis in axes))))
    best = float((quadratic(grid) @ coefficients).max())
    point, value = maximum(coefficients, low, high, seed)
    assert bool(((low <= point) & (point <= high)).all())
    assert value == pytest.approx(best, abs=2e-3)


@pytest.mark.parametrize("bits", BOXES)
def test_corners_of_the_cube_are_the_ends_of_the_box(bits):
    box = BOXES[bits]
    found, rates = curves(torch.stack([torch.zeros(len(box)), torch.ones(len(box))]), box)
    for end, curve, rate in zip((0, 1), found, rates, strict=True):
        assert rate == pytest.approx(box["learning_rate"][end])
        for name in box.keys() - {"learning_rate"}:
            assert getattr(curve, name) == pytest.approx(box[name][end]), name
    [middle], [rate] = curves(torch.full((1, len(box)), 0.5), box)
    assert rate == pytest.approx(math.sqrt(0.012 * 0.05))
    assert middle.hard_tilt == pytest.approx(0.0)
