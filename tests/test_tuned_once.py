"""What is said of recipes that were tuned once."""

from pathlib import Path

import numpy as np
import pytest

from learnsched.benchmarks.cells import GRIDS
from learnsched.benchmarks.learning_rates import RATES
from learnsched.benchmarks.methods import Method
from learnsched.benchmarks.search import Budget
from learnsched.benchmarks.spaces import straight_through
from learnsched.benchmarks.tuned_once import (
    ADVISED,
    Regime,
    advice,
    measured,
    practice,
    table,
    tuned,
    without_search,
)
from learnsched.meta.presets import PRESETS
from learnsched.meta.tasks import BITS

ROOT = Path(__file__).parent.parent
CELLS = GRIDS["medium"].chosen(["fashion-cnn", "fashion-mlp"])


def recipe(method, validation):
    regime = "ternary/2-bit"
    return {"stage": "recipe", "regime": regime, "method": method, "validation": validation}


def measured_in(cell, method, *accuracies):
    return {"stage": "test", "cell": cell, "method": method, "test": list(accuracies)}


RECORDS = [
    recipe("learned", 0.5),
    recipe("good in practice", 0.6),
    recipe("good in the cells", 0.4),
    measured_in("fashion-cnn", "learned", 0.80, 0.82),
    measured_in("fashion-mlp", "learned", 0.70, 0.72),
    measured_in("fashion-cnn", "good in practice", 0.75, 0.79),
    measured_in("fashion-mlp", "good in practice", 0.71, 0.77),
    measured_in("fashion-cnn", "good in the cells", 0.79, 0.81),
    measured_in("fashion-mlp", "good in the cells", 0.60, 0.60),
]


def test_rivals_are_chosen_where_they_were_tuned_and_in_each_cell():
    lines = [
        [part.strip() for part in line.strip("|").split("|")]
        for line in table(RECORDS, CELLS).splitlines()[2:]
    ]
    rows = {name: cells for name, *cells in lines}
    assert rows["learned"] == ["2", "76.0", "", "", "", ""]
    # Margins of the cells: (.04 + -.03) / 2.
    assert rows["good in practice"][1] == "75.5"
    assert rows["good in practice"][2].startswith("+0.5 [") and rows["good in practice"][3] == "1"
    assert rows["the best where tuned"] == rows["good in practice"]
    # .80 and .74, which has another name in each cell.
    assert rows["the best of each cell"][1] == "77.0"
    assert rows["the best of each cell"][2].startswith("-1.0 [")


def test_without_the_learned_schedule_there_are_levels_and_no_margins():
    rivals = [record for record in RECORDS if record["method"] != "learned"]
    rows = [line.strip("| ").split(" | ") for line in table(rivals, CELLS).splitlines()[2:]]
    assert [row[0] for row in rows][:2] == ["good in practice", "good in the cells"]
    assert rows[0][1:3] == ["2", "75.5"]


def test_methods_that_were_searched_are_drawn_at_random():
    def known(cell, method, role, validation, *accuracies):
        found = {"cell": cell, "method": method, "role": role, "validation": validation}
        return {**found, "test": list(accuracies)}

    searched = [
        known("fashion-cnn", "a", "hand-coded", 0.9, 0.78, 0.78),
        known("fashion-cnn", "b", "hand-coded", 0.8, 0.76, 0.76),
        known("fashion-mlp", "a", "hand-coded", 0.1, 0.60, 0.60),
        known("fashion-mlp", "b", "hand-coded", 0.2, 0.70, 0.70),
        known("fashion-cnn", "learned", "learned", 0.9, 0.82, 0.84),
        known("digits-cnn", "a", "hand-coded", 0.9, 0.1, 0.1),
    ]
    one, two, luckiest, own = without_search(RECORDS, searched).splitlines()[2:]
    drawn = np.mean([0.81 - 0.77, 0.71 - 0.65])
    kept = np.mean([0.81 - 0.78, 0.71 - 0.70])
    assert f"best of 1 hand-coded methods | +{100 * drawn:.1f} [" in one
    assert f"best of 2 hand-coded methods | +{100 * kept:.1f} [" in two
    assert f"nobody can know | +{100 * kept:.1f} [" in luckiest
    assert "learning rate searched | -2.0 [" in own


def test_the_advised_rate_has_a_column_and_a_table_of_its_own():
    advised = [
        {**measured_in("fashion-cnn", "learned", 0.9, 0.9), "stage": ADVISED},
        {**measured_in("fashion-cnn", "good in practice", 0.8, 0.9), "stage": ADVISED},
    ]
    searched = [
        {
            "cell": "fashion-cnn",
            "method": "a",
            "role": "hand-coded",
            "validation": 0.9,
            "test": [0.8, 0.8],
        }
    ]
    one = without_search([*RECORDS, *advised], searched).splitlines()[2]
    margins = [cell.split(" [")[0] for cell in one.strip("| ").split(" | ")[1:]]
    assert margins == ["+1.0", "+10.0"]
    rows = table([*RECORDS, *advised], CELLS, stage=ADVISED).splitlines()[2:]
    assert rows[0].startswith("| learned | 1 | 90.0 |")
    assert rows[1].startswith("| good in practice | 1 | 85.0 | +5.0 [")


def test_every_regime_of_the_grid_has_an_advised_rate():
    rates = advice(ROOT / "figures" / "learning_rates.json")
    assert {str(Regime.of(cell.task)) for cell in GRIDS["medium"].cells} <= rates.keys()
    assert all(RATES[0] < rate < RATES[-1] for rate in rates.values())


def test_nothing_is_said_of_cells_without_searches():
    assert len(without_search(RECORDS, []).splitlines()) == 2


def test_practice_has_no_seed_and_no_cell_of_what_is_tested():
    regimes = {Regime.of(cell.task) for cell in GRIDS["medium"].cells}
    shapes = {(t.data, t.family, t.width, t.depth) for t in (c.task for c in GRIDS["medium"].cells)}
    taken = {task.seed for preset in PRESETS.values() for task in preset.trainer.validation}
    for regime in regimes:
        tasks = practice(regime)
        assert {Regime.of(task) for task in tasks} == {regime}
        assert regime.bits in BITS
        assert not shapes & {(t.data, t.family, t.width, t.depth) for t in tasks}
        assert not taken & {task.seed for task in tasks}


@pytest.mark.slow
def test_a_recipe_trains_a_cell_as_it_was_found():
    method = Method("straight-through", "normal", "settled", straight_through)
    budget = Budget(rounds=1, trials=2, trial_runs=1, runs=2)
    found = tuned(method, practice(Regime("ternary/2-bit", False))[:1], budget, seed=0)
    assert found["validation"] == max(trial["validation"] for trial in found["trials"])
    [cell] = GRIDS["quick"].cells
    first, again = (measured(method, found, cell, runs=2) for _ in range(2))
    assert first == again and len(first["test"]) == 2
