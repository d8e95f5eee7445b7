"""Level sets against formulas and staircases written out by hand."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learnsched.levels import LevelSet, binary, power_of_two, signed, ternary, unsigned

# unsigned(5), unsigned(8), signed(8) and power_of_two(5) have fewer or more than 16 thresholds
SETS = {
    "ternary": ternary(),
    "binary": binary(),
    "unsigned2": unsigned(2),
    "unsigned5": unsigned(5),
    "unsigned8": unsigned(8),
    "signed4": signed(4),
    "signed8full": signed(8, narrow=False),
    "power3": power_of_two(3, max_abs=0.9),
    "power5": power_of_two(5, max_abs=3.0),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def staircase(x, levels):
    """Code of one number, in exact arithmetic."""
    return sum(Fraction(x) >= Fraction(t) for t in levels.thresholds)


def inq_value(w, n1, n2):
    """Equation 4 of Zhou et al. 2017 for one weight."""
    magnitudes = [0.0] + [2.0**n for n in range(n2, n1 + 1)]
    for alpha, beta in pairwise(magnitudes):
        if (alpha + beta) / 2 <= abs(w) < 3 * beta / 2:
            return math.copysign(beta, w)
    return 0.0


@pytest.mark.parametrize(
    ("levels", "values", "thresholds"),
    [
        (ternary(), (-1, 0, 1), (-0.5, 0.5)),
        (binary(), (-1, 1), (0,)),
        (unsigned(1), (0, 1), (0.5,)),
        (unsigned(2), (0, 1, 2, 3), (0.5, 1.5, 2.5)),
        (signed(2), (-1, 0, 1), (-0.5, 0.5)),
        (signed(3), (-3, -2, -1, 0, 1, 2, 3), (-2.5, -1.5, -0.5, 0.5, 1.5, 2.5)),
        (signed(2, narrow=False), (-2, -1, 0, 1), (-1.5, -0.5, 0.5)),
        (power_of_two(2, max_abs=0.8), (-1, 0, 1), (-0.5, 0.5)),
        (power_of_two(3, max_abs=0.8), (-1, -0.5, 0, 0.5, 1), (-0.75, -0.25, 0.25, 0.75)),
    ],
)
def test_values_and_thresholds_of_the_named_sets(levels, values, thresholds):
    assert levels.values == values
    assert levels.thresholds == thresholds


@pytest.mark.parametrize("bits", range(1, 9))
def test_unsigned_holds_every_code_of_its_bits(bits):
    assert unsigned(bits).values == tuple(range(2**bits))
    assert unsigned(bits).bits == bits


@pytest.mark.parametrize("bits", range(2, 9))
def test_signed_spans_twos_complement(bits):
    half = 2 ** (bits - 1)
    assert signed(bits).values == tuple(range(-half + 1, half))
    assert signed(bits, narrow=False).values == tuple(range(-half, half))
    assert signed(bits).bits == bits


@pytest.mark.parametrize(
    ("levels", "bits"), [(ternary(), 2), (binary(), 1), (power_of_two(4), 4), (unsigned(8), 8)]
)
def test_bits_that_hold_a_code(levels, bits):
    assert levels.bits == bits


def test_gaps_and_smallest_step_of_uneven_levels():
    levels = LevelSet((-2.0, -0.5, 0.0, 4.0))
    assert levels.gaps == (1.5, 0.5, 4.0)
    assert levels.step == 0.5
    assert levels.thresholds == (-1.25, -0.25, 2.0)


def test_given_thresholds_are_kept_and_used():
    levels = LevelSet((0.0, 1.0, 2.0), thresholds=(0.9, 1.1))
    assert levels.quantize(torch.tensor([0.8, 0.95, 1.2])).tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", SETS)
def test_named_sets_stay_what_they_are_under_any_scale(name):
    levels = SETS[name]
    assert levels.is_idempotent
    scale = torch.logspace(-3, 3, 501).unsqueeze(1)
    once = torch.tensor(levels.values) * scale
    assert torch.equal(levels.quantize(once / scale) * scale, once)


def test_levels_on_or_beyond_their_thresholds_do_not():
    assert not LevelSet((-1.0, 0.0, 1.0), (-1.0, 1.0)).is_idempotent
    assert not LevelSet((-1.0, 0.0, 1.0), (-1.2, 1.2)).is_idempotent
    assert not LevelSet((0.0, 1.0, 2.0), (0.5, 2.5)).is_idempotent
    assert LevelSet((-1.0, 0.0, 1.0), (-0.7, 0.9)).is_idempotent


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_level_is_its_own_quantization(name, dtype):
    levels = SETS[name]
    values = torch.tensor(levels.values, dtype=dtype)
    assert torch.equal(levels.quantize(values), values)
    assert levels.codes(values).tolist() == list(range(len(levels.values)))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threshold_takes_the_upper_level_and_its_predecessor_the_lower(name, dtype):
    levels = SETS[name]
    at = torch.tensor(levels.thresholds, dtype=dtype)
    below = torch.nextafter(at, torch.tensor(-math.inf, dtype=dtype))
    count = len(levels.thresholds)
    assert levels.codes(at).tolist() == list(range(1, count + 1))
    assert levels.codes(below).tolist() == list(range(count))


@pytest.mark.parametrize("name", SETS)
@settings(deadline=None, max_examples=30, derandomize=True)
@given(data=st.data())
def test_codes_and_quantize_agree_with_exact_arithmetic(name, data):
    levels = SETS[name]
    dtype = data.draw(st.sampled_from(DTYPES))
    number = st.one_of(
        st.floats(-300, 300, width=32),
        st.sampled_from(levels.thresholds),
        st.sampled_from(levels.values),
        st.sampled_from([-0.0, 1e-45, -1e-45, 1e-38, -1e-38, 3e38, -3e38]),
    )
    x = torch.tensor(data.draw(st.lists(number, min_size=1, max_size=20)), dtype=dtype)
    x = x.clamp(-1e38, 1e38)
    codes = levels.codes(x)
    assert codes.dtype == torch.int64
    assert codes.tolist() == [staircase(v, levels) for v in x.tolist()]
    quantized = levels.quantize(x)
    assert quantized.dtype == dtype
    assert torch.equal(quantized, torch.tensor(levels.values, dtype=dtype)[codes])


@pytest.mark.parametrize("name", ["unsigned2", "unsigned8"])
def test_shape_is_kept_and_infinities_saturate(name):
    levels = SETS[name]
    x = torch.tensor([[-math.inf, 0.7], [1.2, math.inf], [0.0, -1.0]]).t()  # not contiguous
    q = levels.quantize(x)
    assert q.shape == x.shape
    assert q.tolist() == [[0, 1, 0], [1, levels.values[-1], 0]]


@pytest.mark.parametrize("name", ["ternary", "unsigned8"])
def test_quantize_under_vmap_equals_row_by_row(name):
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)) * 3
    rows = torch.stack([SETS[name].quantize(row) for row in x])
    assert torch.equal(torch.func.vmap(SETS[name].quantize)(x), rows)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("spread", [0.03, 0.7, 1.0, 40.0])
def test_power_of_two_is_the_inq_papers_rule(bits, spread):
    generator = torch.Generator().manual_seed(bits)
    w = torch.randn(500, generator=generator, dtype=torch.float64) * spread
    largest = float(w.abs().max())
    n1 = math.floor(math.log2(4 * largest / 3))
    n2 = n1 + 1 - 2 ** (bits - 1) // 2
    levels = power_of_two(bits, max_abs=largest)
    assert levels.quantize(w).tolist() == [inq_value(v, n1, n2) for v in w.tolist()]
    assert len(levels.values) == 2 * (n1 - n2 + 1) + 1 <= 2**bits
    assert levels.bits == bits


@settings(deadline=None, max_examples=100, derandomize=True)
@given(max_abs=st.floats(1e-290, 1e290), bits=st.integers(2, 5))
def test_power_of_two_top_level_brackets_the_maximum_exactly(max_abs, bits):
    top = Fraction(power_of_two(bits, max_abs).values[-1])
    assert Fraction(3, 4) * top <= Fraction(max_abs) < Fraction(3, 2) * top


@pytest.mark.parametrize("exponent", [-300, -20, -1, 0, 1, 7, 40, 300])
def test_power_of_two_just_below_the_edge_is_not_rounded_up(exponent):
    edge = 0.75 * 2.0**exponent
    assert power_of_two(3, edge).values[-1] == 2.0**exponent
    assert power_of_two(3, math.nextafter(edge, 0)).values[-1] == 2.0 ** (exponent - 1)


@pytest.mark.parametrize(
    ("values", "thresholds", "message"),
    [
        ((1.0,), (), "at least two levels"),
        ((), (), "at least two levels"),
        ((0.0, 0.0), (), "increase strictly"),
        ((1.0, 0.0), (), "increase strictly"),
        ((0.0, math.nan), (), "finite"),
        ((0.0, math.inf), (), "finite"),
        ((0.0, 1.0), (0.2, 0.4), "need 1 thresholds, got 2"),
        ((0.0, 1.0, 2.0), (0.2,), "need 2 thresholds, got 1"),
        ((0.0, 1.0, 2.0), (0.5, 0.4), "thresholds of a level set must increase"),
        ((0.0, 1.0), (math.nan,), "thresholds of a level set must be finite"),
    ],
)
def test_malformed_level_sets_are_refused(values, thresholds, message):
    with pytest.raises(ValueError, match=message):
        LevelSet(values, thresholds)


@pytest.mark.parametrize(
    ("make", "bits"),
    [
        (unsigned, 0),
        (unsigned, 9),
        (unsigned, 2.0),
        (unsigned, True),
        (signed, 1),
        (signed, 9),
        (power_of_two, 1),
        (power_of_two, 6),
        (power_of_two, "4"),
    ],
)
def test_bits_out_of_range_are_refused(make, bits):
    with pytest.raises(ValueError, match=r"bits of .* must be a whole number from"):
        make(bits)


def test_bits_may_be_numpys():
    assert unsigned(np.int64(2)) == unsigned(2)


@pytest.mark.parametrize("max_abs", [0.0, -1.0, math.nan, math.inf])
def test_power_of_two_needs_a_positive_finite_maximum(max_abs):
    with pytest.raises(ValueError, match="positive, finite max_abs"):
        power_of_two(3, max_abs=max_abs)


@pytest.mark.parametrize("levels", [ternary(), unsigned(2), unsigned(8), signed(8)])
def test_nan_takes_the_lowest_level(levels):
    x = torch.tensor([math.nan, math.inf, -math.inf])
    assert levels.codes(x).tolist() == [0, len(levels.values) - 1, 0]
    assert levels.quantize(x).tolist() == [levels.values[0], levels.values[-1], levels.values[0]]


@pytest.mark.parametrize("levels", [ternary(), unsigned(2), LevelSet((-0.7, 0.1, 1.1))])
def test_whole_numbers_are_no_numbers_to_quantize(levels):
    with pytest.raises(TypeError, match="floating-point numbers are quantized"):
        levels.quantize(torch.tensor([0, 1, 3]))
    assert levels.codes(torch.tensor([0, 1, 3])).dtype == torch.int64
