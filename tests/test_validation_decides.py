"""Whatever is chosen, tuned or compared to choose is measured on validation data, test data are last."""

from types import SimpleNamespace

import pytest
import torch

from learnsched.benchmarks import (
    curve_search,
    curve_variants,
    learning_rates,
    methods,
    rate_choice,
    training,
    tuned_once,
    weight_noise,
)
from learnsched.benchmarks.search import Budget
from learnsched.meta.tasks import task_of
from learnsched.policies import BaseCurve
from learnsched.pretrained import load_pretrained

TASK = task_of(
    ("digits", "mlp", 4, 2, 2, 2),
    batch=16,
    bits="ternary/2-bit",
    learning_rates=(),
    fine_tuning=False,
    seed=0,
)
DATA = SimpleNamespace(train="train", validation="validation", test="test")
BUDGET = Budget(rounds=1, trials=3, trial_runs=2, runs=4)
[METHOD] = (m for m in methods.hand_coded() if m.name == "straight-through")


class Trained:
    """Stands for training: best at the rate .02, and notes on which data it was asked."""

    def __init__(self):
        self.splits = []

    def __call__(self, method, task, data, rates, policies, runs, split):
        self.splits.append(split)
        accuracy = torch.tensor([0.9 - abs(rate - 0.02) for rate in rates], dtype=torch.double)
        return accuracy.unsqueeze(1).expand(-1, runs) + 0.001 * torch.arange(runs)


def tune(found):
    training.tune(METHOD, TASK, DATA, BUDGET, seed=0)


def tune_once(found):
    tuned_once.tuned(METHOD, [TASK, TASK], BUDGET, seed=0)


def advise(found):
    learned = load_pretrained("default")
    record = learning_rates.measured(TASK, learned, (0.01, 0.02, 0.03), runs=2)
    assert learning_rates.advised([record]) == 0.02


def compare_curves(found):
    curve_search.at_best_rate(TASK, DATA, [BaseCurve()], (0.01, 0.02), 2)


@pytest.mark.parametrize("choose", [tune, tune_once, advise, compare_curves])
def test_what_is_chosen_is_measured_on_validation_data(monkeypatch, choose):
    found = Trained()
    for module in (training, tuned_once, learning_rates, curve_search):
        monkeypatch.setattr(module, "train", found)
    for module in (tuned_once, learning_rates):
        monkeypatch.setattr(module, "load", lambda name: DATA)
    run = SimpleNamespace(layers=(SimpleNamespace(fan_in=4),))
    monkeypatch.setattr(type(TASK), "run_of", lambda task, data: run)
    choose(found)
    assert found.splits and set(found.splits) == {"validation"}


def test_a_rate_is_chosen_on_validation_data_and_reported_on_test_data(monkeypatch):
    found = Trained()
    monkeypatch.setattr(rate_choice, "load", lambda name: DATA)
    record = rate_choice.measure(
        TASK, "some", lambda *given: found(METHOD, *given), None, (0.01, 0.02, 0.03), BUDGET
    )
    assert found.splits == ["validation", "test"]
    assert record["learning_rate"] == 0.02
    assert record["test"] == pytest.approx([0.9, 0.901, 0.902, 0.903])


def test_a_curve_has_the_accuracies_of_its_best_rate(monkeypatch):
    monkeypatch.setattr(curve_search, "train", Trained())
    found = curve_search.at_best_rate(TASK, DATA, [BaseCurve()] * 2, (0.01, 0.02, 0.05), 2)
    assert found.tolist() == [pytest.approx([0.9, 0.901])] * 2


def test_what_a_variant_gains_is_counted_from_the_first():
    record = {
        "task": "some, ternary/real",
        "bits": "ternary/real",
        "fine_tuning": False,
        "accuracies": [[0.5, 0.5], [0.4, 0.4], [0.7, 0.7]],
    }
    assert curve_variants.gains(record).round(3).tolist() == [[-0.1, -0.1], [0.2, 0.2]]
    rows = weight_noise.SWEEP.table([record]).splitlines()
    assert "| 50.0 | -10.0 [" in rows[2] and "| +20.0 [" in rows[2]
    assert rows[-1] == "| ternary/real, from scratch, mean |  | -10.0 | +20.0 |"


def test_a_sweep_compares_each_of_its_values():
    curves = weight_noise.SWEEP.variants(BaseCurve(weight_forward_std=0.5))
    assert [round(curve.weight_forward_std, 2) for curve in curves] == [0.5, 0.43, 0.57]
