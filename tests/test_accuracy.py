"""The accuracy benchmark: a quick grid runs, stops, goes on, and is shared without doing work twice."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from learnsched import load_pretrained, quantize_, ternary, unsigned
from learnsched.benchmarks import accuracy
from learnsched.benchmarks.accuracy import entries, is_done, main, matching, measure
from learnsched.benchmarks.cells import GRIDS, Cell
from learnsched.benchmarks.records import LEARNED, START, claim, read, unpack
from learnsched.benchmarks.search import Budget, search
from learnsched.data import DataSet, Split
from learnsched.meta.population import Population
from learnsched.meta.presets import PRESETS
from learnsched.policies import BaseCurve, BaseCurves, Case, LearnedPolicy, MetaNetwork

QUICK = GRIDS["quick"]
CELL = QUICK.cells[0]
WORDS = ["straight-through", "inq, settled", "float", "learned"]


def start(folder, *arguments):
    command = [sys.executable, "-m", "learnsched.benchmarks.accuracy", "--quick"]
    return subprocess.Popen([*command, "--out", str(folder), "--methods", *WORDS, *arguments])


def results(folder):
    return {r["method"]: (r["test"], r["trials"], r["learning_rate"]) for r in read(folder)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    main(["--quick", "--out", str(folder), "--methods", *WORDS, "--json", str(folder / "all.json")])
    return folder


def test_a_quick_grid_writes_a_record_of_each_method(whole):
    found = {r["method"]: r for r in read(whole)}
    assert set(found) == {"straight-through", "INQ, settled", "float", "learned"}
    for record in found.values():
        assert len(record["test"]) == QUICK.budget.runs
        assert len(record["trials"]) == QUICK.budget.rounds * QUICK.budget.trials
        assert record["validation"] == max(t["validation"] for t in record["trials"])
        assert all(0 <= a <= 1 for a in record["test"])
    assert found["float"]["role"] == "float"
    assert set(found["learned"]["shorter"]) == {"0.25", "0.5", "0.75"}
    assert json.loads((whole / "all.json").read_text())["environment"]["torch"]


def test_records_made_before_are_not_made_again(whole, tmp_path, monkeypatch):
    lines = tmp_path / "known.jsonl"
    lines.write_text("".join(json.dumps(r) + "\n" for r in read(whole)))
    monkeypatch.setattr(accuracy, "measure", lambda *_: pytest.fail("was made again"))
    folder = tmp_path / "folder"
    main(["--quick", "--out", str(folder), "--methods", *WORDS, "--known", str(lines)])
    assert read(folder) == read(whole)
    changed = [{**r, "validation": -1.0} for r in read(whole)]
    unpack(changed, folder)
    assert read(folder) == read(whole), "what the folder has is kept"
    with pytest.raises(SystemExit, match="neither a folder nor a file"):
        main(["--quick", "--known", str(tmp_path / "none")])


def test_records_of_another_budget_or_seed_are_made_again(whole):
    [method] = matching(entries(CELL.task, None), ["straight-through"])
    assert is_done(whole, CELL, method, QUICK.budget, seed=0)
    assert not is_done(whole, CELL, method, QUICK.budget, seed=1)
    assert not is_done(whole, CELL, method, replace(QUICK.budget, runs=3), seed=0)
    assert not is_done(whole, CELL, replace(method, version="2"), QUICK.budget, seed=0)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_results(whole, tmp_path):
    process = start(tmp_path)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "records").glob("*/*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {r["method"] for r in read(tmp_path)}
    assert 0 < len(before) < 4
    assert start(tmp_path).wait() == 0
    assert results(tmp_path) == results(whole)


@pytest.mark.slow
def test_shards_do_the_whole_between_them(whole, tmp_path):
    first = start(tmp_path, "--shard", "1/2")
    second = start(tmp_path, "--shard", "2/2")
    assert first.wait() == second.wait() == 0
    assert results(tmp_path) == results(whole)


@pytest.mark.slow
def test_two_processes_share_the_work(whole, tmp_path):
    both = [start(tmp_path), start(tmp_path)]
    assert [process.wait() for process in both] == [0, 0]
    assert results(tmp_path) == results(whole)


def test_an_interrupted_search_goes_on_with_the_same_trials(tmp_path):
    budget = Budget(rounds=3, trials=2, trial_runs=1, runs=1)
    calls = []

    def evaluate(rates, _):
        calls.append(rates)
        return [-rate for rate in rates]

    expected = search(None, evaluate, budget, seed=3)
    assert len(calls) == 3

    def interrupted(rates, policies):
        if len(calls) == 5:
            raise KeyboardInterrupt
        return evaluate(rates, policies)

    with pytest.raises(KeyboardInterrupt):
        search(None, interrupted, budget, 3, tmp_path / "a.log")
    found = search(None, evaluate, budget, 3, tmp_path / "a.log")
    assert len(calls) == 6  # two rounds before the cut, one after
    assert found.trials == expected.trials
    assert found.learning_rate == min(t["learning_rate"] for t in expected.trials)


def _hold(path, ready):
    with claim(path) as mine:
        ready.put(mine)
        time.sleep(60)


def test_a_claim_ends_with_its_process(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Queue()
    holder = context.Process(target=_hold, args=(tmp_path / "job", ready))
    holder.start()
    assert ready.get(timeout=60)
    with claim(tmp_path / "job") as mine:
        assert not mine
    holder.kill()
    holder.join()
    with claim(tmp_path / "job") as mine:
        assert mine


def test_a_new_base_curve_makes_a_new_version_only_where_it_applies():
    def versions(base, bits, fine_tuning=False):  # of the start, then of the learned policy
        policy = LearnedPolicy(MetaNetwork(2, 2), base)
        policy.network.load_state_dict(network.state_dict())
        task = replace(CELL.task, bits=bits, fine_tuning=fine_tuning)
        return [e.version for e in entries(task, policy) if e.role in (START, LEARNED)]

    network = MetaNetwork(2, 2)
    cases = (Case(3, 4, False, BaseCurve(power=1.0)), Case(3, 3, False, BaseCurve(power=2.0)))
    old = BaseCurves(cases)
    tuned = BaseCurves((*cases, Case(3, 3, True, BaseCurve(power=0.5))))
    real = BaseCurves((*cases, Case(3, 0, False, BaseCurve(power=0.5))))
    for new, changed in (
        (tuned, {("ternary/ternary", True)}),
        (real, {("ternary/real", False), ("ternary/real", True)}),
    ):
        for bits in ("ternary/2-bit", "ternary/ternary", "ternary/real"):
            for regime in (False, True):
                pairs = zip(versions(old, bits, regime), versions(new, bits, regime), strict=True)
                assert [a != b for a, b in pairs] == [(bits, regime) in changed] * 2, bits
    start, learned = versions(old, "ternary/2-bit")
    with torch.no_grad():
        network.out.bias.add_(1)
    assert versions(old, "ternary/2-bit")[0] == start
    assert versions(old, "ternary/2-bit")[1] != learned


def test_another_version_of_a_method_is_measured_again(tmp_path):
    [entry] = matching(entries(CELL.task, None), ["float"])
    made = []
    for version in ("a", "a", "b"):
        job = [(CELL, replace(entry, version=version))]
        accuracy.run(job, QUICK.budget, tmp_path, progress=made.append)
    assert [r["version"] for r in made] == ["a", "b"]


def test_test_data_do_not_decide(tmp_path):
    """The same choice is made whatever the test labels are."""
    [entry] = matching(entries(CELL.task, None), ["straight-through"])
    data = CELL.data()
    other = DataSet(
        data.name,
        data.train,
        data.validation,
        Split(data.test.x, data.test.y.flip(0)),
        data.classes,
    )
    first, second = (measure(CELL, entry, d, QUICK.budget, seed=0) for d in (data, other))
    assert first["test"] != second["test"]
    assert first["trials"] == second["trials"]
    assert first["parameters"] == second["parameters"]


def test_words_choose_roles_names_and_parts_of_names():
    found = entries(replace(CELL.task, bits="ternary/2-bit"), load_pretrained("default"))
    assert [e.name for e in matching(found, ["INQ"])] == ["INQ"]
    assert len(matching(found, ["inq,"])) > 2
    assert {e.role for e in matching(found, ["hand-coded"])} == {"hand-coded"}
    assert matching(found, ["nothing like it"]) == []
    assert matching(found, None) == found


def test_cells_are_not_those_of_meta_training():
    seen = {
        (data, family, width, depth)
        for preset in PRESETS.values()
        for data, family, widths, depths in preset.trainer.mix.architectures
        for width in widths
        for depth in depths
    }
    cells = GRIDS["small"].cells
    assert len(cells) >= 10
    assert sum(c.task.data == "fashion_mnist" for c in cells) >= 4
    assert len({c.name for c in GRIDS["full"].cells}) == len(GRIDS["full"].cells)
    for cell in GRIDS["full"].cells:
        task = cell.task
        assert (task.data, task.family, task.width, task.depth) not in seen
        assert not any(task.width == width for _, family, width, _ in seen if family == task.family)
    assert "fashion_mnist" not in {data for data, *_ in seen}


def test_float_networks_are_those_that_are_quantized():
    for tuned in (False, True):
        task = replace(CELL.task, fine_tuning=tuned, learning_rates=(0.1, 0.2, 0.1, 0.2), runs=2)
        data = CELL.data()
        models, order = task.floats(data)
        inner = task.build(data)
        for model in models:
            quantize_(model, ternary(), unsigned(2), example_input=data.train.x[:1])
        expected = dict(Population(models).named_parameters())
        found = dict(inner.population.named_parameters())
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in found)
        assert torch.equal(inner.batches.order[:, :, :2].movedim(2, 0), order)


def test_unknown_cells_are_named():
    with pytest.raises(ValueError, match="no cell 'nowhere'; the grid has quick"):
        QUICK.chosen(["nowhere"])
    assert QUICK.chosen(["quick"]) == (CELL,)
    assert isinstance(CELL, Cell)
