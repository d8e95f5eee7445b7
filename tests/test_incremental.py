"""Partitions and memberships of INQ against brute force."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learnsched.incremental import (
    PARTITIONS,
    any_per_channel,
    check_fraction,
    hard_membership,
    hold,
    priority,
    soft_membership,
)
from learnsched.levels import binary, signed, ternary, unsigned

FRACTIONS = (0.0, 0.2, 0.5, 0.5, 0.81, 1.0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def weights(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def share(value):
    return torch.tensor(value, dtype=torch.float64)


def test_magnitude_takes_the_largest_first():
    x = weights(4, 6)
    assert priority(x, ternary(), "magnitude").tolist() == [[abs(v) for v in r] for r in x.tolist()]


@pytest.mark.parametrize("levels", [binary(), ternary(), unsigned(2), signed(4)])
def test_settled_is_the_distance_to_the_nearest_threshold(levels):
    x = weights(40) * 3
    truth = [min(abs(v - t) for t in levels.thresholds) for v in x.tolist()]
    assert priority(x, levels, "settled").tolist() == truth


@pytest.mark.parametrize("partition", ["random", "redraw"])
def test_random_orders_are_reproducible_uniform_and_blind_to_the_weights(partition):
    x = weights(50, 100)
    first = priority(x, ternary(), partition, seeded(1))
    assert torch.equal(first, priority(x * 2 - 1, ternary(), partition, seeded(1)))
    assert not torch.equal(first, priority(x, ternary(), partition, seeded(2)))
    assert first.shape == x.shape
    assert float(first.mean()) == pytest.approx(0.5, abs=4 / math.sqrt(12 * x.numel()))
    assert abs(float(torch.corrcoef(torch.stack([first.flatten(), x.flatten()]))[0, 1])) < 0.06


def test_unknown_partition_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="magnitude, random, redraw, settled"):
        priority(weights(3), ternary(), "smallest")


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    size=st.integers(1, 30), fractions=st.lists(st.floats(0, 1), max_size=5), seed=st.integers(0, 9)
)
def test_hard_membership_counts_and_never_releases(size, fractions, seed):
    frozen = torch.zeros(size, dtype=torch.float64)
    for epoch, fraction in enumerate([*sorted(fractions), 1.0]):
        order = weights(size, seed=seed + epoch)
        membership = hard_membership(order, frozen, fraction, redraw=False)
        assert set(membership.tolist()) <= {0.0, 1.0}
        assert int(membership.sum()) == round(fraction * size)
        assert (membership >= frozen).all()
        newly = membership > frozen
        if newly.any() and (membership == 0).any():
            assert order[newly].min() >= order[membership == 0].max()
        frozen = membership


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 1.0])
def test_hard_membership_takes_the_first_of_each_partition(partition, fraction):
    order = priority(weights(4, 5), ternary(), partition, seeded(3))
    membership = hard_membership(order, torch.zeros_like(order), fraction, redraw=False)
    best = sorted(range(20), key=order.flatten().tolist().__getitem__, reverse=True)
    expected = set(best[: round(20 * fraction)])
    assert {i for i, m in enumerate(membership.flatten().tolist()) if m} == expected
    assert membership.shape == order.shape


def test_ties_are_taken_in_the_order_of_the_weights():
    order = torch.zeros(1000)
    membership = hard_membership(order, torch.zeros(1000), 0.3, redraw=False)
    assert membership.tolist() == [1.0] * 300 + [0.0] * 700


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    order=st.lists(
        st.sampled_from([0.0, 0.5, 1.0, 2.0, math.inf, math.nan]), min_size=1, max_size=20
    ),
    frozen=st.integers(0, 2**20 - 1),
    fraction=st.floats(0, 1),
)
def test_hard_membership_is_that_of_a_stable_sort(order, frozen, fraction):
    """The first of equal weights come first, and those that are not finite ahead of all."""
    before = [bool(frozen >> i & 1) for i in range(len(order))]
    count = max(round(fraction * len(order)), sum(before))
    rank = [math.inf if math.isnan(p) else p for p in order]
    free = [i for i in range(len(order)) if not before[i]]
    taken = sorted(free, key=lambda i: -rank[i])[: count - sum(before)]
    expected = [float(before[i] or i in taken) for i in range(len(order))]
    membership = hard_membership(
        torch.tensor(order), torch.tensor(before).float(), count / len(order), redraw=False
    )
    assert membership.tolist() == expected


def test_redraw_releases_what_was_frozen():
    frozen = torch.tensor([1.0, 1.0, 0.0, 0.0])
    order = torch.tensor([0.1, 0.2, 0.8, 0.9])
    assert hard_membership(order, frozen, 0.5, redraw=True).tolist() == [0, 0, 1, 1]
    assert hard_membership(order, frozen, 0.25, redraw=True).tolist() == [0, 0, 0, 1]
    assert hard_membership(order, frozen, 0.75, redraw=False).tolist() == [1, 1, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decreasing_fraction_is_refused_whatever_the_dtype(dtype):
    frozen = torch.zeros(10_001, dtype=dtype)
    frozen[:5001] = 1  # bfloat16 cannot hold this count
    order = weights(10_001).to(dtype)
    kept = hard_membership(order, frozen, 5001 / 10_001, redraw=False)
    assert torch.equal(kept, frozen)
    with pytest.raises(ValueError, match="5001 of 10001 weights are frozen"):
        hard_membership(order, frozen, 5000 / 10_001, redraw=False)


@pytest.mark.parametrize("fraction", [-0.01, 1.01, math.nan, math.inf])
def test_fractions_out_of_range_are_refused(fraction):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        check_fraction(fraction)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        hard_membership(weights(3), torch.zeros(3), fraction, redraw=True)


@pytest.mark.parametrize("size", [1, 7, 1000, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1e-3, 0.05, 0.5])
def test_soft_membership_is_exactly_0_at_0_and_exactly_1_at_1(size, dtype, width):
    order, free = weights(size).to(dtype), torch.zeros(size, dtype=dtype)
    assert torch.equal(soft_membership(order, free, free.new_tensor(0.0), width), free)
    assert torch.equal(soft_membership(order, free, free.new_tensor(1.0), width), free + 1)


@pytest.mark.parametrize("fraction", [0.0, 0.03, 0.3, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("width", [0.01, 0.05, 0.2])
def test_soft_membership_has_a_mean_within_half_a_width_of_the_fraction(fraction, width):
    order = weights(20, 50)
    membership = soft_membership(order, torch.zeros_like(order), share(fraction), width)
    assert float(membership.mean()) == pytest.approx(fraction, abs=width / 2 + 1e-6)
    assert membership.shape == order.shape
    assert ((membership >= 0) & (membership <= 1)).all()


def test_soft_membership_does_not_decrease_in_the_fraction_nor_in_the_order():
    order = weights(200)
    free = torch.zeros_like(order)
    grid = [soft_membership(order, free, share(f / 100), 0.1) for f in range(101)]
    table = torch.stack(grid)
    assert (table.diff(dim=0) >= 0).all()
    assert (table[:, order.argsort()].diff(dim=1) >= 0).all()


@pytest.mark.parametrize("fraction", [0.1, 0.43, 0.77])
def test_soft_membership_gradient_equals_finite_differences(fraction):
    order, free = weights(101), torch.zeros(101, dtype=torch.float64)
    mix = weights(101, seed=1)
    at = share(fraction).requires_grad_()
    (grad,) = torch.autograd.grad((soft_membership(order, free, at, 0.2) * mix).sum(), at)
    step = 1e-6
    up, down = (
        float((soft_membership(order, free, share(fraction + s), 0.2) * mix).sum())
        for s in (step, -step)
    )
    assert grad.item() == pytest.approx((up - down) / (2 * step), rel=1e-6)
    assert torch.autograd.gradgradcheck(lambda f: soft_membership(order, free, f, 0.2), (at,))


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.6, 1.0])
def test_soft_membership_tends_to_the_hard_one(fraction):
    order = weights(20)
    free = torch.zeros_like(order)
    hard = hard_membership(order, free, fraction, redraw=False)
    assert torch.equal(soft_membership(order, free, share(fraction), width=1e-4), hard)
    distances = [
        float((soft_membership(order, free, share(fraction), w) - hard).abs().sum())
        for w in (0.4, 0.2, 0.1, 0.01)
    ]
    assert distances == sorted(distances, reverse=True)


def test_soft_membership_never_releases_when_the_order_changes():
    frozen = torch.zeros(300, dtype=torch.float64)
    for epoch, fraction in enumerate(FRACTIONS):
        membership = soft_membership(weights(300, seed=epoch), frozen, share(fraction))
        assert (membership >= frozen).all()
        assert float(membership.mean()) == pytest.approx(fraction, abs=0.05)
        frozen = membership
    assert torch.equal(frozen, torch.ones_like(frozen))


def test_soft_membership_keeps_whole_members_at_the_head_of_a_new_order():
    frozen = hard_membership(weights(20), torch.zeros(20, dtype=torch.float64), 0.5, redraw=False)
    soft = soft_membership(weights(20, seed=1), frozen, share(0.5), width=1e-4)
    assert torch.equal(soft, frozen)


def test_soft_membership_takes_no_gradient_from_the_order():
    order = weights(10).requires_grad_()
    frozen = torch.zeros(10, dtype=torch.float64)
    fraction = share(0.5).requires_grad_()
    soft_membership(order, frozen, fraction, 0.5).sum().backward()
    assert order.grad is None
    assert fraction.grad.item() > 0


def test_hold_keeps_every_bit_of_old_members_and_takes_new_projections():
    held, projected = weights(1000), weights(1000, seed=1)
    frozen = (weights(1000, seed=2) > 0).double()
    membership = torch.maximum(frozen, (weights(1000, seed=3) > 0).double())
    result = hold(held, frozen, projected, membership)
    newly = (membership > 0) & (frozen == 0)
    assert torch.equal(result[frozen > 0], held[frozen > 0])
    assert torch.equal(result[newly], projected[newly])
    assert torch.equal(result[membership == 0], held[membership == 0])


def test_hold_keeps_partial_members_whose_membership_stays():
    held, projected = weights(50), weights(50, seed=1)
    part = torch.full_like(held, 0.3)
    assert torch.equal(hold(held, part, projected, part), held)


def test_hold_mixes_partial_members_by_the_share_each_projection_entered_with():
    held, frozen = torch.tensor([2.0]), torch.tensor([0.25])
    result = hold(held, frozen, torch.tensor([-1.0]), torch.tensor([0.75]))
    assert result.item() == pytest.approx((0.25 * 2.0 - 0.5 * 1.0) / 0.75)


def test_hold_has_finite_gradients_where_nothing_is_frozen():
    frozen = torch.zeros(3, dtype=torch.float64)
    membership = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    hold(weights(3), frozen, weights(3, seed=1), membership).sum().backward()
    assert membership.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 3, 1), (4, 3, 1), (1, 1, 1), (4, 3, 2), ()])
@pytest.mark.parametrize("part", [1.0, 0.5, 1e-6])
def test_a_weight_that_is_frozen_in_part_counts_for_its_channel(shape, part):
    membership = torch.zeros(4, 3, 2)
    membership[1, 2, 0] = membership[3, 2, 1] = part
    found = any_per_channel(membership, torch.ones(shape))
    assert found.shape == shape
    places = torch.arange(max(1, math.prod(shape))).view(shape).expand(4, 3, 2)
    shared = {int(places[i, j, k]) for i, j, k in membership.nonzero().tolist()}
    assert {i for i, marked in enumerate(found.flatten().tolist()) if marked} == shared
