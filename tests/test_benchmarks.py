"""Every benchmark runs in its quick form and writes what it promises."""

import json
import subprocess
import sys

import pytest
import torch

from learnsched.benchmarks.held_out import QUICK_TASKS, compare, summary, table
from learnsched.benchmarks.methods import hand_coded
from learnsched.benchmarks.room import tables
from learnsched.benchmarks.search import Budget
from learnsched.policies import BaseCurve
from learnsched.schedule import FIELDS, LayerInfo, RunInfo, plan


def run(name, *arguments):
    command = [sys.executable, "-m", f"learnsched.benchmarks.{name}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "gradient",
        "unroll",
        "curve_search",
        "transfer",
        "ablation",
        "population",
        "outer_steps",
        "room",
    ],
)
def test_a_quick_run_writes_its_rows(name, tmp_path):
    path = tmp_path / "rows.json"
    printed = run(name, "--quick", "--json", str(path))
    stored = json.loads(path.read_text())
    rows = stored.get("rows") or stored.get("records") or stored["verified"]
    assert rows
    assert stored["environment"]["torch"]
    assert len(printed.splitlines()) >= len(rows)


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on_where_it_stopped(tmp_path):
    task = QUICK_TASKS
    budget = Budget(rounds=1, trials=2, trial_runs=1, runs=2)
    methods = hand_coded()[:2]
    whole = compare(methods, task, budget)
    made = []
    parts = compare(methods, task, budget, progress=made.append, done=whole[:1])
    assert [r["method"] for r in made] == [methods[1].name]
    assert [r["test"] for r in parts] == [r["test"] for r in whole]
    assert set(summary(whole)["other seeds"]) == {m.name for m in methods}
    assert methods[0].name in table(whole)


def test_a_schedule_made_for_one_task_starts_at_the_base_and_stays_in_its_ranges():
    run = RunInfo((LayerInfo("a", 9, 3, 4), LayerInfo("b", 9, 3, 4)), horizon=7)
    base = plan(BaseCurve(), run).table.float()
    torch.testing.assert_close(tables(base, torch.zeros(3, 5, 4, 2)), base.expand(3, -1, -1, -1))
    moved = tables(base, 3 * torch.randn(20, 5, 4, 2, generator=torch.Generator().manual_seed(0)))
    fraction = moved[..., FIELDS.index("fraction")]
    assert float(moved.min()) == 0
    assert float(fraction.max()) <= 1
    assert bool((fraction.diff(dim=-2) >= 0).all())
    backward = moved[..., FIELDS.index("weight_backward_std")]
    assert bool((backward > 0).all())
