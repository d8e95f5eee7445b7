"""Intervals of means against tables of Student's distribution, and by how often they hold the mean."""

import numpy as np
import pytest

from learnsched.intervals import confidence_interval, interval

# 97.5 % quantiles by degrees of freedom, from printed tables.
QUANTILES = {1: 12.706, 2: 4.303, 5: 2.571, 23: 2.069}


@pytest.mark.parametrize(("freedom", "quantile"), QUANTILES.items())
def test_ends_are_those_of_printed_tables(freedom, quantile):
    values = np.random.default_rng(0).normal(0.5, 0.1, freedom + 1)
    error = np.sqrt(((values - values.mean()) ** 2).sum() / freedom / (freedom + 1))
    low, high = confidence_interval(values)
    assert low == pytest.approx(values.mean() - quantile * error, rel=1e-3)
    assert high == pytest.approx(values.mean() + quantile * error, rel=1e-3)


@pytest.mark.parametrize("runs", [3, 6, 17])
def test_nineteen_intervals_of_twenty_hold_the_mean(runs):
    drawn = np.random.default_rng(1).normal(0.8, 0.02, (2000, runs))
    ends = np.array([confidence_interval(values) for values in drawn])
    covered = ((ends[:, 0] <= 0.8) & (ends[:, 1] >= 0.8)).mean()
    assert abs(covered - 0.95) < 0.02  # four standard errors


def test_one_run_or_equal_ones_have_no_length():
    assert confidence_interval([0.3]) == confidence_interval([0.3, 0.3]) == (0.3, 0.3)
    assert interval([0.3]).text() == "30.0 [30.0, 30.0]"
    with pytest.raises(ValueError, match="at least one value"):
        interval([])
