"""Every benchmark runs in its quick form and writes what it promises."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

from learnsched.benchmarks import (
    ablation,
    curve_search,
    environment,
    full_size,
    gradient,
    held_out,
    stability,
    transfer,
)
from learnsched.benchmarks.campaign import recorded
from learnsched.benchmarks.comparison import summary, table
from learnsched.benchmarks.held_out import QUICK_TASKS, compare
from learnsched.benchmarks.methods import hand_coded
from learnsched.benchmarks.rate_choice import choose
from learnsched.benchmarks.room import tables
from learnsched.benchmarks.search import Budget
from learnsched.benchmarks.transfer import gains, margins
from learnsched.data import load
from learnsched.meta.presets import PRESETS
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
        "full_size",
        "ablation",
        "population",
        "outer_steps",
        "room",
        "stability",
        "first_layer",
        "follow_loss",
        "warm_up",
        "activation_width",
        "weight_noise",
        "selection",
        "without_batch_norm",
        "other_problems",
        "tuned_once",
        "learning_rates",
        "random_networks",
    ],
)
def test_a_quick_run_writes_its_rows(name, tmp_path):
    path = tmp_path / "rows.json"
    printed = run(name, "--quick", "--json", str(path))
    stored = json.loads(path.read_text())
    # The search of curves keeps its rows under the name of what it searched for.
    by_name = stored.get("ternary/2-bit", {}).get("verified")
    rows = stored.get("rows") or stored.get("records") or by_name
    assert rows
    assert stored["environment"]["torch"]
    assert len(printed.splitlines()) >= len(rows)


def test_results_name_no_version_of_a_package_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(environment.metadata, "version", missing)
    environment.write_results(tmp_path / "rows.json", {"rows": [1]})
    stored = json.loads((tmp_path / "rows.json").read_text())
    assert stored["environment"]["higher"] == "" and stored["rows"] == [1]


@pytest.mark.parametrize("program", [held_out, transfer, ablation])
def test_programs_refuse_files_of_other_settings(program, tmp_path):
    path = tmp_path / "rows.json"
    text = json.dumps({"seed": 7, "quick": True, "records": []})
    path.write_text(text)
    with pytest.raises(ValueError, match="holds records of another"):
        program.main(["--json", str(path)])
    assert path.read_text() == text


def test_a_search_of_curves_with_another_seed_is_refused(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"ternary/2-bit": {"seed": 0, "runs": 8, "rounds": []}}))
    with pytest.raises(ValueError, match="of 8 runs with seed 0, not of 8 with 5"):
        curve_search.main(["--quick", "--seed", "5", "--json", str(path)])


@pytest.mark.parametrize(
    ("peak", "listed"),
    [
        (4.0, [1.0, 2.0, 4.0, 8.0]),  # inside
        (0.25, [0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0]),
        (32.0, [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]),
        (1000.0, [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]),  # three extensions, no more
    ],
)
def test_a_list_of_rates_goes_on_where_its_best_is_at_an_end(peak, listed):
    asked = []

    def score(rates):
        asked.extend(rates)
        return [-abs(math.log2(rate / peak)) for rate in rates]

    choice = choose((1.0, 2.0, 4.0, 8.0), score, extensions=3)
    assert choice.rates == listed and sorted(asked) == listed
    assert choice.validation == [-abs(math.log2(rate / peak)) for rate in listed]
    assert choice.best == min(listed, key=lambda rate: abs(math.log2(rate / peak)))


def test_a_list_of_rates_stays_as_it_is_without_extensions():
    choice = choose((1.0, 2.0), lambda rates: [-rate for rate in rates])
    assert choice == ([1.0, 2.0], [-1.0, -2.0], 1.0)


def missing(name):
    raise environment.metadata.PackageNotFoundError(name)


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
    torch.testing.assert_close(tables(base, torch.zeros(3, 5, 4)), base.expand(3, -1, -1, -1))
    moved = tables(base, 3 * torch.randn(20, 5, 4, generator=torch.Generator().manual_seed(0)))
    fraction = moved[..., FIELDS.index("fraction")]
    assert float(moved.min()) == 0
    assert float(fraction.max()) <= 1
    assert bool((fraction.diff(dim=-2) >= 0).all())
    backward = moved[..., FIELDS.index("weight_backward_std")]
    assert bool((backward > 0).all())


def test_the_logs_of_meta_training_become_a_row_and_lines_for_each_run(tmp_path):
    def entry(step, error, largest):
        norms = {"norm_median": 0.5 * step, "norm_largest": largest, "dropped": step == 2}
        return {"step": step, "validation_error": error, **norms}

    start = {"step": 0, "validation_error": 0.25}
    for name, last in (("plain-0", 0.4), ("stabilised-0", 0.2), ("stabilised-1", 0.3)):
        (tmp_path / name).mkdir()
        log = [start, entry(1, 0.22, 3.0), entry(2, last, 4e5)]
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in log))
    rows = stability.stored(tmp_path)
    assert [(r["variant"], r["seed"]) for r in rows] == [
        ("stabilised", 0), ("stabilised", 1), ("plain", 0),
    ]  # fmt: skip
    lines = stability.table(rows).splitlines()
    assert lines[-1] == "| plain | 0 | 2 | 25.0 | 22.0 | 40.0 | 0.5, 0.5 | 4e+05 | 1 |"
    figure = stability.plot(rows, {"errors": {"ANA": [0.3, 0.2], "STE": [0.4, 0.4]}})
    error, norm = figure.axes
    assert [line.get_ydata()[0] for line in error.lines] == [25.0, 25.0, 25.0, 25.0]
    assert error.lines[-1].get_label() == "ANA, tuned in each task"
    assert len(norm.lines) == 3


def test_a_larger_reference_replaces_a_smaller_one(tmp_path, monkeypatch):
    made = []

    def measure(data, cell, *, seeds, pairs, seed, device):
        made.append((cell.steps, pairs))
        reference = {"pairs": pairs, "seconds": 0.0, "agreement": [0.5], "norms": [1.0]}
        return {
            **asdict(cell), "reference": {**reference, "agreement_of_mean": 0.5}, "estimators": [],
        }  # fmt: skip

    monkeypatch.setattr(gradient, "measure", measure)
    path = tmp_path / "gradient.json"
    for steps, pairs in (("20 40", "4"), ("20", "8"), ("20 40", "4")):
        grid = f"--noise normal --optimizer adam --width 8 --steps {steps}".split()
        monkeypatch.setattr(sys, "argv", ["gradient", *grid, "--pairs", pairs, "--json", str(path)])
        gradient.main()
    assert made == [(20, 4), (40, 4), (20, 8)]
    rows = json.loads(path.read_text())["rows"]
    assert [(row["steps"], row["reference"]["pairs"]) for row in rows] == [(20, 8), (40, 4)]


def test_gradients_are_taken_where_meta_training_starts():
    cell = gradient.Cell(gradient.START, "normal", "adam", steps=20, width=6)
    run = cell.task(1, 0).build(load("mnist1d")).run
    start = plan(PRESETS["standard"].base, run).table
    assert torch.equal(plan(cell.learned_policy(), run).table.float(), start.float())
    plain = replace(cell, policy=gradient.PLAIN).learned_policy()
    assert not torch.equal(plan(plain, run).table.float(), start.float())


def test_gains_are_paired_over_the_learning_rates():
    records = [
        {"cell": "a", "method": "new", "validation": [0.52, 0.64, 0.56]},
        {"cell": "a", "method": "old", "validation": [0.50, 0.60, 0.50]},
        {"cell": "b", "method": "new", "validation": [0.1, 0.2, 0.3]},
    ]
    # 2, 4 and 6 points: their standard deviation is 2, the standard error 2 / √3.
    assert gains(records, "new", "old").splitlines() == [
        "| task | new − old |", "| --- | --- |", "| a | +4.0 ± 1.2 |",
    ]  # fmt: skip


def test_margins_are_to_the_best_of_what_was_tuned():
    tests = {("a", "new"): 0.6, ("a", "old"): 0.5, ("a", "one"): 0.55, ("a", "two"): 0.4,
             ("b", "new"): 0.2, ("b", "old"): 0.1, ("b", "one"): 0.1, ("b", "two"): 0.3}  # fmt: skip
    records = [{"cell": c, "method": m, "test": [t, t]} for (c, m), t in tests.items()]
    records.append(
        {"cell": "c", "method": "new", "test": [0.9, 0.9]}
    )  # the others are still to come
    assert margins(records, "new", "old").splitlines()[2:] == [
        "| a | one | +5.0 | +10.0 |", "| b | two | -10.0 | +10.0 |",
        "| all: ahead in 1 of 2, 2 of 2 |  | -2.5 | +10.0 |",
    ]  # fmt: skip
    for record in records[:4]:
        record["cell"] = "a, ternary/2-bit"
    assert margins(records, "new", "old").splitlines()[-1:] == [
        "| 2-bit activations: ahead in 1 of 1, 1 of 1 |  | +5.0 | +10.0 |",
    ]


def test_the_gap_is_that_of_the_relaxed_network_to_the_best_by_hand():
    def record(method, *test):
        found = {"rates": [0.1], "validation": [0.5], "learning_rate": 0.1}
        return {"method": method, "test": list(test), **found}

    records = [
        record("learned", 0.8, 0.8), record("STE, moving", 0.7, 0.7),
        record("ANA, normal", 0.78, 0.78), record("a peer", 0.99, 0.99),
    ]  # fmt: skip
    assert "gap" not in full_size.table(records)
    text = full_size.table([*records, record("relaxed (never hard)", 0.88, 0.88)])
    assert text.splitlines()[-1] == "gap closed, from ANA, normal: 20 %"


def test_a_commit_is_marked_where_code_was_changed_and_not_where_results_were(
    tmp_path, monkeypatch
):
    package = tmp_path / "learnsched" / "benchmarks"
    package.mkdir(parents=True)
    results = tmp_path / "results.json"
    for path in (package / "code.py", results):
        path.write_text("1")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(environment, "__file__", str(package / "environment.py"))
    commit = environment.describe()["commit"]
    assert len(commit) == 12
    results.write_text("2")
    assert environment.describe()["commit"] == commit
    (package / "code.py").write_text("2")
    assert environment.describe()["commit"] == f"{commit}-dirty"


def test_a_file_of_other_settings_is_not_gone_on_with(tmp_path):
    path = tmp_path / "rows.json"

    def run(jobs, **content):
        return recorded(
            path, jobs, lambda job: [{"job": job}], lambda record: record["job"], **content
        )

    run({1: 1}, seed=0, quick=True)
    assert len(run({1: 1, 2: 2}, seed=0, quick=True)) == 2
    before = path.read_text()
    for content, named in (
        ({"seed": 1, "quick": True}, "another seed than 1"),
        ({"seed": 0, "quick": False}, "another quick than False"),
    ):
        with pytest.raises(ValueError, match=named):
            run({3: 3}, **content)
    assert path.read_text() == before
