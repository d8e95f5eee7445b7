"""What is advised where nobody searches for a learning rate."""

import math
from collections import Counter

import pytest

from learnsched.benchmarks.cells import GRIDS
from learnsched.benchmarks.learning_rates import (
    COUNTS,
    MIX,
    RATES,
    advised,
    by_kind,
    losses,
    measured,
    table,
)
from learnsched.benchmarks.regimes import Regime, drawn
from learnsched.pretrained import load_pretrained


def record(bits, fine_tuning, *accuracies, **known):
    rates = [0.01 * 2**k for k in range(len(accuracies))]
    numbers = {
        "task": "digits mlp 4×8",
        "steps": 100,
        "batch": 32,
        "depth": 4,
        "fan_in": 60.0,
    } | known
    validation = [[a, a] for a in accuracies]
    return {
        "bits": bits,
        "fine_tuning": fine_tuning,
        "rates": rates,
        "validation": validation,
    } | numbers


def test_the_advised_rate_is_best_over_networks_not_over_each():
    # Two networks with sharp maxima at the ends, one flat: their mean is highest in the middle.
    records = [
        record("ternary/2-bit", False, 0.9, 0.8, 0.1),
        record("ternary/2-bit", False, 0.1, 0.8, 0.9),
        record("ternary/2-bit", False, 0.5, 0.5, 0.5),
    ]
    assert advised(records) == 0.02
    # Means .5, .7, .5, smoothed with weights ¼, ½, ¼ and ends repeated: .55, .6, .55.
    assert losses(records) == pytest.approx([0.05, 0.0, 0.05])


def test_every_kind_has_its_row_and_every_half():
    records = [
        record("ternary/2-bit", False, 0.9, 0.8, 0.1, steps=100),
        record("binary/binary", True, 0.1, 0.8, 0.9, steps=500, task="digits cnn2d 4×8"),
    ]
    rows = {
        line.split(" | ")[0].strip("| "): line.split(" | ")[-1].strip("| ")
        for line in table(records).splitlines()
    }
    assert rows["ternary/2-bit"] == rows["runs of at most 300 steps"] == "0.01"
    assert rows["binary/binary, fine-tuned"] == rows["runs of more than 300 steps"] == "0.04"
    assert rows["mlp networks"] == "0.01" and rows["cnn2d networks"] == "0.04"
    assert "batches of more than 32" not in rows


def test_networks_are_drawn_anew_for_each_kind_and_are_not_those_of_the_grid():
    shapes = {(t.data, t.family, t.width) for t in (cell.task for cell in GRIDS["full"].cells)}
    tasks = drawn(MIX, COUNTS, seed=0)
    assert len({task.seed for task in tasks}) == len(tasks) == sum(COUNTS.values())
    assert not shapes & {(task.data, task.family, task.width) for task in tasks}
    assert Counter(map(Regime.of, tasks)) == COUNTS
    assert [Regime.of(task) for task in tasks[: len(COUNTS)]] == list(COUNTS)


def test_networks_hang_on_the_seed_and_not_on_how_many_there_are():
    kind = Regime("ternary/real", True)
    assert drawn(MIX, {kind: 3}, seed=0) == drawn(MIX, {kind: 5}, seed=0)[:3]
    assert drawn(MIX, {kind: 3}, seed=0) != drawn(MIX, {kind: 3}, seed=1)


@pytest.mark.slow
def test_a_network_is_trained_at_every_rate():
    kind = Regime("ternary/2-bit", False)
    task = min(drawn(MIX, {kind: 20}, seed=0), key=lambda task: task.horizon * task.steps)
    found = measured(task, load_pretrained("default"), RATES[::4], runs=2)
    assert [len(runs) for runs in found["validation"]] == [2, 2]
    assert found["depth"] == task.depth and found["steps"] == task.horizon * task.steps
    assert all(0 <= a <= 1 and math.isfinite(a) for runs in found["validation"] for a in runs)
    assert by_kind([found]).keys() == {("ternary/2-bit", False)}
