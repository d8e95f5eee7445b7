"""Learned schedules compared on validation tasks with fresh seeds."""

import numpy as np

from learnsched.benchmarks import selection
from learnsched.data import load
from learnsched.meta.inner import InnerLoop
from learnsched.meta.presets import PRESETS
from learnsched.meta.tasks import Task
from learnsched.meta.validation import hard_errors
from learnsched.policies import BaseCurve, LearnedPolicy, MetaNetwork
from learnsched.schedule import FIELDS, plan

TASKS = PRESETS["standard"].trainer.validation
TASK = Task(
    family="mlp", data="digits", width=6, depth=2, horizon=3, steps=4, batch=16, bits="ternary/2-bit",
    learning_rates=(0.02, 0.04, 0.06), fine_tuning=False, seed=5,
)  # fmt: skip


def record(task, seed, policy, errors):
    return {"task": task, "seed": seed, "policy": policy, "errors": errors}


def test_fresh_seeds_are_nobody_elses():
    known = {task.seed for preset in PRESETS.values() for task in preset.trainer.validation}
    drawn = [task.seed for seed in range(20) for task in selection.fresh(TASKS, seed)]
    assert len(set(drawn)) == len(drawn)
    assert not known & set(drawn)


def test_gains_are_paired_and_averaged_over_all_runs():
    rows = selection.table(
        [
            record("a", 0, selection.BASE, [0.5, 0.3]),
            record("a", 0, "one", [0.4, 0.2]),
            record("a", 1, selection.BASE, [0.5, 0.5]),
            record("a", 1, "one", [0.4, 0.4]),
            record("b", 0, selection.BASE, [0.2, 0.2]),
            record("b", 0, "one", [0.2, 0.2]),
        ]
    ).splitlines()
    assert [part.strip() for part in rows[2].split("|")[1:-1]] == [
        "a",
        "55.0",
        "+10.0 [+10.0, +10.0]",
    ]
    assert [part.strip() for part in rows[3].split("|")[1:-1]] == ["b", "80.0", "+0.0 [+0.0, +0.0]"]
    name, base, gain = (part.strip() for part in rows[4].split("|")[1:-1])
    assert (name, base) == ("all runs", "63.3")
    assert gain.startswith("+6.7 ")


def test_noise_is_shared_or_not_as_asked():
    policies = selection.candidates(["default"], ["as-made", "shared-noise", "own-noise"])
    assert [policy.shared_noise for policy in list(policies.values())[1:]] == [True, True, False]


def test_further_puts_out_more_and_leaves_the_artefact_alone():
    policies = list(selection.candidates(["default"], ["as-made", "further"]).values())
    run = TASK.build(load("digits")).run
    base, made, further = (plan(policy, run)["weight_backward_std"].log() for policy in policies)
    moved = (made - base).abs() > 1e-3
    assert bool(moved.any())
    assert bool(((further - base)[moved].abs() > (made - base)[moved].abs()).all())
    again = list(selection.candidates(["default"], ["as-made"]).values())[1]
    assert repr(again) == repr(policies[1])


def test_the_first_candidate_adds_nothing_to_the_base_curve():
    base = selection.candidates(["default"], ["as-made"])[selection.BASE]
    run = TASK.build(load("digits")).run
    np.testing.assert_allclose(plan(base, run).table, plan(base.base, run).table, atol=1e-6)


def test_errors_are_those_of_a_hard_network(monkeypatch):
    """At the last epoch no noise is left, whatever the policy says."""
    soft = LearnedPolicy(MetaNetwork(), BaseCurve(weight_forward_std=0.5, weight_hard_from=1.0))
    seen = []
    whole = InnerLoop.accuracy
    monkeypatch.setattr(
        InnerLoop,
        "accuracy",
        lambda self, state, settings, x, y: (
            seen.append(settings.clone()) or whole(self, state, settings, x, y)
        ),
    )
    errors = hard_errors(soft, TASK, load("digits"))
    assert errors.shape == (3,)
    (settings,) = seen
    forward = [
        i
        for i, name in enumerate(FIELDS)
        if name.startswith(("weight_forward", "activation_forward"))
    ]
    assert bool((settings[..., forward] == 0).all())
