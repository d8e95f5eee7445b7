"""Scale rules against closed forms and exhaustive search."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats

from learnsched.levels import LevelSet, binary, power_of_two, signed, ternary, unsigned
from learnsched.scales import (
    AbsoluteMean,
    FanIn,
    Fixed,
    LeastSquares,
    Maximum,
    PowerOfTwo,
    ScaleRule,
    default_weight_rule,
    unit_normal_scale,
)

RULES = (AbsoluteMean, Maximum, PowerOfTwo, LeastSquares)


def weights(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def squared_error(x, scale, levels):
    """Error of hard quantization, with numpy's own staircase."""
    codes = np.searchsorted(levels.thresholds, x / scale, side="right")
    return float(((x - scale * np.asarray(levels.values)[codes]) ** 2).sum())


def test_absolute_mean_closed_form():
    x = weights(3, 4, 5)
    channels = AbsoluteMean()(x, ternary())
    assert channels.shape == (3, 1, 1)
    np.testing.assert_allclose(channels.flatten(), np.abs(x.numpy()).mean((1, 2)), rtol=1e-14)
    whole = AbsoluteMean("tensor")(x, ternary())
    np.testing.assert_allclose(whole.item(), np.abs(x.numpy()).mean(), rtol=1e-14)


@pytest.mark.parametrize("levels", [ternary(), unsigned(3), signed(4, narrow=False)])
def test_maximum_puts_the_largest_magnitude_on_the_outermost_level(levels):
    x = weights(3, 10)
    outermost = max(abs(q) for q in levels.values)
    channels = Maximum()(x, levels)
    np.testing.assert_allclose((x / channels).abs().amax(1), outermost, rtol=1e-14)
    whole = Maximum("tensor")(x, levels)
    assert float((x / whole).abs().max()) == pytest.approx(outermost, rel=1e-14)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("spread", [1e-3, 0.2, 1.0, 37.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_power_of_two_puts_the_outermost_level_at_inqs_n1(bits, spread, dtype):
    x = weights(200, seed=bits, dtype=dtype) * spread
    n1 = math.floor(math.log2(4 * float(x.abs().max()) / 3))
    levels = power_of_two(bits)
    assert PowerOfTwo()(x, levels).item() * levels.values[-1] == 2.0**n1


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_power_of_two_scale_and_level_set_of_the_maximum_quantize_alike(bits):
    x = weights(500, seed=bits)
    unit = power_of_two(bits)
    scale = PowerOfTwo()(x, unit)
    direct = power_of_two(bits, max_abs=float(x.abs().max())).quantize(x)
    assert torch.equal(unit.quantize(x / scale) * scale, direct)


@pytest.mark.parametrize("exponent", [-39, -10, -1, 0, 3, 20, 100])
def test_power_of_two_is_exact_at_the_edge_and_just_below(exponent):
    edge = torch.tensor([0.75 * 2.0**exponent])
    below = torch.nextafter(edge, torch.zeros(1))
    assert PowerOfTwo()(edge, ternary()).item() == 2.0**exponent
    assert PowerOfTwo()(below, ternary()).item() == 2.0 ** (exponent - 1)


def test_power_of_two_per_channel():
    x = torch.tensor([[0.7, 0.1], [-6.1, 2.0]])
    assert PowerOfTwo("channel")(x, ternary()).tolist() == [[0.5], [8.0]]


@pytest.mark.parametrize(
    "levels",
    [binary(), ternary(), unsigned(2), signed(3), signed(4), power_of_two(4), unsigned(5)],
    ids=lambda levels: levels.name,
)
@pytest.mark.parametrize("seed", [0, 1])
def test_least_squares_is_as_good_as_exhaustive_search(levels, seed):
    x = weights(400, seed=seed)
    x = x.relu() if levels.values[0] >= 0 else x
    ours = squared_error(x.numpy(), LeastSquares("tensor")(x, levels).item(), levels)
    widest = float(x.abs().max()) / max(levels.values)
    grid = np.geomspace(0.03 * widest, 2 * widest, 4000)
    assert ours <= 1.02 * min(squared_error(x.numpy(), s, levels) for s in grid)


def test_least_squares_of_binary_levels_is_the_absolute_mean():
    x = weights(5, 30)
    torch.testing.assert_close(LeastSquares()(x, binary()), AbsoluteMean()(x, binary()))


@pytest.mark.parametrize("scale", [1e-3, 0.3, 50.0])
def test_least_squares_finds_a_scale_without_error(scale):
    levels = signed(3)
    x = scale * torch.tensor(levels.values, dtype=torch.float64)
    assert LeastSquares("tensor")(x, levels).item() == pytest.approx(scale, rel=1e-12)


def test_least_squares_treats_channels_separately():
    x = weights(3, 50) * torch.tensor([[0.1], [1.0], [20.0]], dtype=torch.float64)
    rows = torch.cat([LeastSquares("tensor")(row, ternary()) for row in x.split(1)])
    torch.testing.assert_close(LeastSquares()(x, ternary()), rows)


def test_many_candidates_are_better_than_two():
    x = weights(300)
    few, many = (
        squared_error(x.numpy(), LeastSquares("tensor", n)(x, signed(4)).item(), signed(4))
        for n in (2, 200)
    )
    assert many <= few


def test_gradient_flows_through_mean_and_maximum_only():
    for rule in (AbsoluteMean(), Maximum()):
        x = weights(2, 5).requires_grad_()
        (grad,) = torch.autograd.grad(rule(x, ternary()).sum(), x)
        assert torch.autograd.gradcheck(lambda v, rule=rule: rule(v, ternary()), (x,))
        assert grad.abs().sum() > 0
    for rule in (PowerOfTwo(), LeastSquares()):
        assert not rule(weights(2, 5).requires_grad_(), ternary()).requires_grad


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_scale_broadcasts_and_is_positive_even_for_zeros(rule, per):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x = torch.zeros(4, 3, 2, dtype=dtype)
        x[1] = weights(3, 2).to(dtype)
        scale = rule(per)(x, signed(3))
        assert scale.shape == ((1, 1, 1) if per == "tensor" else (4, 1, 1))
        assert scale.dtype == dtype
        assert (scale > 0).all()
        assert (x / scale).isfinite().all()


@pytest.mark.parametrize("rule", RULES)
def test_vectors_and_scalars_have_one_scale(rule):
    assert rule("channel")(weights(6), ternary()).shape == (1,)
    assert rule("channel")(torch.tensor(0.7), ternary()).numel() == 1


@pytest.mark.parametrize("rule", [*(rule("channel") for rule in RULES), Fixed(2.0)])
def test_rules_follow_the_protocol(rule):
    x = weights(3, 20)
    scale = rule(x, signed(3))
    assert isinstance(rule, ScaleRule) and isinstance(scale, torch.Tensor)
    assert torch.broadcast_shapes(scale.shape, x.shape) == x.shape and bool((scale > 0).all())


@pytest.mark.parametrize("rule", RULES[:3])
@pytest.mark.parametrize("factor", [0.25, 8.0])
def test_scale_follows_the_tensor(rule, factor):
    x = weights(3, 20)
    torch.testing.assert_close(rule()(factor * x, ternary()), factor * rule()(x, ternary()))


def test_fixed_is_the_given_value_in_the_tensors_dtype():
    scale = Fixed(0.25)(torch.zeros(3, dtype=torch.bfloat16), ternary())
    assert scale.item() == 0.25
    assert scale.dtype == torch.bfloat16
    assert scale.shape == ()


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_fixed_refuses_what_is_not_positive(value):
    with pytest.raises(ValueError, match="positive and finite"):
        Fixed(value)


@pytest.mark.parametrize("rule", RULES)
def test_unknown_grouping_is_refused(rule):
    with pytest.raises(ValueError, match="grouping 'row'; choose one of tensor, channel"):
        rule("row")


def test_least_squares_needs_two_candidates():
    with pytest.raises(ValueError, match="at least 2"):
        LeastSquares(candidates=1)


@pytest.mark.parametrize(
    ("levels", "rule"),
    [
        (ternary(), AbsoluteMean()),
        (binary(), AbsoluteMean()),
        (power_of_two(2), PowerOfTwo()),
        (power_of_two(5), PowerOfTwo()),
        (signed(4), LeastSquares(candidates=12)),
        (LevelSet((0.0, 1.0, 3.0, 4.0)), LeastSquares(candidates=12)),
    ],
)
def test_default_rule_of_each_level_set(levels, rule):
    assert default_weight_rule(levels) == rule


def normal_error(scale, levels):
    """Squared error of quantizing a standard normal (or its positive part) by quadrature."""
    edges = [-np.inf, *(scale * t for t in levels.thresholds), np.inf]
    if levels.values[0] >= 0:
        edges[0] = 0.0  # the negative part becomes 0, which is a level
    return sum(
        integrate.quad(lambda v, q=q: (v - scale * q) ** 2 * stats.norm.pdf(v), low, high)[0]
        for q, low, high in zip(levels.values, edges[:-1], edges[1:], strict=True)
    )


@pytest.mark.parametrize("levels", [unsigned(2), ternary(), binary()], ids=lambda s: s.name)
def test_unit_normal_scale_minimises_the_error_on_a_normal_variable(levels):
    best = optimize.minimize_scalar(
        normal_error, bounds=(0.2, 2.0), args=(levels,), method="bounded"
    ).x
    assert unit_normal_scale(levels) == pytest.approx(best, rel=2e-3)


def test_unit_normal_scale_of_known_quantizers():
    # Max 1960, table II: uniform quantizers of 2, 3 and 7 levels; unsigned(2) is half of the last
    assert unit_normal_scale(binary()) == pytest.approx(math.sqrt(2 / math.pi), abs=1e-3)
    assert unit_normal_scale(ternary()) == pytest.approx(1.2240, abs=2e-3)
    assert unit_normal_scale(signed(3)) == pytest.approx(0.6508, abs=2e-3)
    assert unit_normal_scale(unsigned(2)) == pytest.approx(0.6508, abs=2e-3)


@pytest.mark.parametrize("shape", [(3, 4), (5, 2, 3), (5, 2, 3, 3)])
def test_the_scale_by_fan_in_is_of_the_shape_alone(shape):
    inputs = torch.Size(shape[1:]).numel()
    for x in (torch.zeros(shape), torch.ones(shape)):
        scale = FanIn()(x, binary())
        assert scale.shape == (1,) * len(shape)
        assert scale.item() == pytest.approx(inputs**-0.5)


def test_least_squares_do_not_overflow_in_half_precision():
    x = 20 * torch.randn(200, 400, generator=torch.Generator().manual_seed(0))
    for per in ("tensor", "channel"):
        rule = LeastSquares(per)
        half = rule(x.half(), signed(3))
        assert half.dtype == torch.float16
        torch.testing.assert_close(half.float(), rule(x, signed(3)), rtol=0.03, atol=0)
