"""The price of meta-training, counted by hand on small inputs."""

import pytest

from learnsched.benchmarks.payback import price, search_runs, text, unroll_factor

GRADIENT = [
    {
        "steps": 150,
        "estimators": [
            {"estimator": "unrolled, damped by ½", "seconds": 8.0},
            {"estimator": "evolution, 8 pairs", "seconds": 34.0},
        ],
    }
]


def test_the_price_counts_every_run():
    curves = {"environment": {}, "ternary/2-bit": {"runs": 100}, "binary/binary": {"runs": 20}}
    trainer = {
        "mix": {"tasks": 4, "members": 8},
        "validation": [{"learning_rates": [0.01] * 3}, {"learning_rates": [0.02] * 2}],
    }
    log = [{"step": 0, "validation_error": 0.5}, {"step": 1}, {"step": 2, "validation_error": 0.4}]
    config = {
        "trainer": trainer,
        "estimator": "Guarded(unrolled=Unrolled(), ...pairs=3)",
    }
    cost = price(curves, [(config, log)], GRADIENT)
    assert (cost.curves, cost.unrolled, cost.validation) == (120, 2 * 4 * 8, 2 * 5)
    # 34 s for 17 runs side by side are 2 s a run.
    twice = price(curves, [(config, log)] * 2, GRADIENT)
    assert (twice.curves, twice.unrolled, twice.validation) == (120, 2 * 64, 20)
    assert cost.factor == 4.0
    assert cost.total == 120 + 4 * 64 + 10
    evolution = {"trainer": trainer, "estimator": "EvolutionStrategies(pairs=3, std=0.1)"}
    hybrid = {
        "trainer": trainer,
        "estimator": "Hybrid(unrolled=Unrolled(), ...pairs=6)",
    }
    for other, unrolled, perturbed in ((evolution, 0, 7 * 64), (hybrid, 64, 13 * 64)):
        found = price(curves, [(other, log)], GRADIENT)
        assert (found.unrolled, found.perturbed) == (unrolled, perturbed)
        assert found.total == 120 + 4 * unrolled + perturbed + 10
    assert "Paid after 13 networks." in text(cost, everything=36.0, ours=6.0)  # 386 / 30


def test_without_a_measured_factor_it_says_what_to_run():
    with pytest.raises(ValueError, match=r"benchmarks\.gradient --steps 150"):
        unroll_factor([{**GRADIENT[0], "steps": 50}])


def test_runs_of_a_search_are_trials_times_runs_a_trial_over_cells_with_some():
    def record(cell, method, role, trials):
        return {
            "cell": cell, "method": method, "role": role, "trials": [{}] * trials,
            "budget": {"trial_runs": 2},
        }  # fmt: skip

    records = [
        record("a", "one", "hand-coded", 3),
        record("a", "two", "hand-coded", 2),
        record("a", "default", "learned", 1),
        record("b", "one", "hand-coded", 4),
    ]
    assert search_runs(records, "hand-coded") == (10 + 8) / 2
    assert search_runs(records, "learned") == 2
