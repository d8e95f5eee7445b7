"""The report's numbers, against ones computed by hand from a small file of records."""

import itertools
import json

import numpy as np
import pytest
from scipy import stats

from learnsched.benchmarks import report
from learnsched.benchmarks.records import read
from learnsched.benchmarks.report_tables import knobs, network_table
from learnsched.benchmarks.statistics import (
    against_best,
    at_equal_rates,
    best,
    best_validated,
    by_cell,
    compare,
    gap_closed,
    importances,
    interval,
    overall_gap_closed,
    search_curve,
    share_to_match,
)

# Cell -> method -> (role, test accuracies); the numbers are round so that the truth is obvious.
TESTS = {
    "one": {
        "STE": ("hand-coded", [0.70, 0.72]),
        "ANA": ("hand-coded", [0.74, 0.76]),
        "learned": ("learned", [0.78, 0.80]),
        "relaxed": ("relaxed", [0.84, 0.86]),
        "float": ("float", [0.90, 0.90]),
    },
    "two": {
        "STE": ("hand-coded", [0.60, 0.62]),
        "ANA": ("hand-coded", [0.50, 0.52]),
        "learned": ("learned", [0.60, 0.60]),
        "relaxed": ("relaxed", [0.61, 0.61]),
        "float": ("float", [0.80, 0.80]),
    },
    "three": {
        "STE": ("hand-coded", [0.30, 0.32]),
        "learned": ("learned", [0.40, 0.44]),
        "relaxed": ("relaxed", [0.50, 0.52]),
    },
}
SHORTER = {
    "one": {"0.25": [0.70, 0.70], "0.5": [0.75, 0.75]},
    "two": {"0.5": [0.5, 0.5]},
    "three": {},
}


def record(cell, method):
    role, test = TESTS[cell][method]
    trials = [
        {"learning_rate": 0.01 * (1 + i), "std": 0.1 * (i % 4), "validation": 0.2 * (i % 4)}
        for i in range(16)
    ]
    real = {"step": None, "low": 0.0, "high": 0.5, "log": False}
    space = {n: {"name": "FloatDistribution", "attributes": real} for n in ("learning_rate", "std")}
    return {
        "cell": cell,
        "description": f"{'digits' if cell == 'one' else 'mnist1d'} network of {cell}",
        "bits": "ternary/2-bit",
        "method": method,
        "role": role,
        "version": "",
        "learning_rate": 0.01,
        "parameters": {"std": 0.3} if role == "hand-coded" else {},
        "validation": 0.5 + 0.1 * (method == "STE"),
        "test": test,
        "shorter": SHORTER[cell] if role == "learned" else {},
        "trials": trials,
        "space": space,
        "budget": {"rounds": 2, "trials": 8, "trial_runs": 1, "runs": 2},
        "cpu_seconds": 36.0,
        "environment": {k: k for k in ("processor", "python", "torch", "date", "commit")},
    }


@pytest.fixture
def records():
    return [record(cell, method) for cell, methods in TESTS.items() for method in methods]


@pytest.fixture
def cells(records):
    return by_cell(records)


def test_margins_are_averaged_by_data_set(cells):
    # 4 points on digits; -1 and 11 on MNIST-1D.
    assert report.by_data(against_best(cells, "learned"), cells) == (
        "Mean margin by data set (cells): digits +4.0 (1), mnist1d +5.0 (2)."
    )


def test_the_best_hand_coded_is_chosen_cell_by_cell(cells):
    assert [best(rows)["method"] for rows in cells.values()] == ["ANA", "STE", "STE"]
    assert best({}) is None
    assert [best_validated(rows)["method"] for rows in cells.values()] == ["STE"] * 3


def test_margins_wins_and_tests(cells):
    found = against_best(cells, "learned")
    assert found.margins == pytest.approx({"one": 0.04, "two": -0.01, "three": 0.11})
    # one seed as the other in "one"; .10 and .12 in "three", where t of one degree of freedom is 12.7
    assert (found.wins, found.clear_wins, found.clear_losses) == (2, 1, 0)
    # signed ranks of (4, -1, 11): the negative has rank 1; of 8 sign patterns 4 are as extreme
    assert found.p_signed_rank == pytest.approx(4 / 8)
    assert found.p_sign == pytest.approx(1.0)
    assert found.interval.mean == pytest.approx(0.14 / 3)


def test_a_hand_coded_method_is_compared_with_the_best_of_the_others(cells):
    found = against_best(cells, "ANA")
    assert found.margins == pytest.approx({"one": 0.04, "two": -0.10})


def test_gap_closed(cells):
    assert gap_closed(cells["one"]) == pytest.approx(0.04 / 0.10)
    assert gap_closed(cells["two"]) is None  # the relaxed network is not ahead
    assert gap_closed(cells["three"]) == pytest.approx(0.11 / 0.20)
    assert overall_gap_closed(cells) == pytest.approx((0.04 - 0.01 + 0.11) / (0.10 + 0.0 + 0.20))


def test_epochs_to_match(cells):
    assert share_to_match(cells["one"]) == 0.5
    assert share_to_match(cells["two"]) == np.inf
    assert share_to_match(cells["three"]) is None


def test_intervals_cover_the_mean_of_a_known_distribution():
    rng = np.random.default_rng(1)
    found = [interval(rng.normal(0.5, 0.1, 30)) for _ in range(100)]
    assert 86 <= sum(i.low <= 0.5 <= i.high for i in found) <= 100
    # in large samples, the normal interval
    values = rng.normal(0.5, 0.1, 2000)
    half = stats.norm.ppf(0.975) * values.std(ddof=1) / np.sqrt(len(values))
    wide = interval(values)
    assert wide.high - wide.mean == pytest.approx(half, rel=0.1)
    with pytest.raises(ValueError, match="at least one value"):
        interval([])


def test_importance_is_that_of_cells_with_all_parameters(records):
    narrow = next(r for r in records if (r["cell"], r["method"]) == ("three", "STE"))
    whole = knobs(by_cell([r for r in records if r is not narrow]))
    narrow["space"] = {"learning_rate": narrow["space"]["learning_rate"]}
    assert set(whole["STE"]) == {"learning_rate", "std"}
    assert knobs(by_cell(records)) == whole


def test_a_parameter_whose_range_differs_between_cells_is_explained_too(records):
    rows = [r for r in records if r["method"] == "STE"]
    space = rows[0]["space"]["std"]
    attributes = {**space["attributes"], "low": space["attributes"]["low"] / 5}
    rows[0]["space"] = {**rows[0]["space"], "std": {**space, "attributes": attributes}}
    assert next(iter(importances(rows))) == "std"


def test_importance_goes_to_the_parameter_that_decides(records):
    shares = importances([r for r in records if r["method"] == "STE"])
    assert next(iter(shares)) == "std"
    assert shares["std"] > 0.8
    assert sum(shares.values()) == pytest.approx(1)


def test_seeds_must_pair(cells):
    rows = cells["one"]
    short = {**rows["STE"], "test": [0.7]}
    with pytest.raises(ValueError, match="learned and STE have 2 and 1 seeds in one"):
        compare({"one": (rows["learned"], short)})
    with pytest.raises(ValueError, match="at least one cell"):
        compare({})


def test_rates_that_both_have_tried_pair(cells):
    learned, start = (dict(cells["one"]["learned"]) for _ in range(2))
    learned["trials"] = [
        {"learning_rate": r, "validation": v} for r, v in ((0.1, 0.5), (0.3, 0.9), (0.2, 0.6))
    ]
    start |= {"method": "start", "role": "start", "test": [0.77, 0.77]}
    start["trials"] = [
        {"learning_rate": r, "validation": v} for r, v in ((0.2, 0.5), (0.4, 0.9), (0.1, 0.7))
    ]
    assert at_equal_rates(learned, start) == pytest.approx([-0.2, 0.1])
    two = dict.fromkeys(("learned", "start"), start)  # the network is not applied
    table = network_table({"one": {"learned": learned, "start": start}, "two": two}, "learned")
    assert table.splitlines()[2:] == [
        "| one | 2 | -5.0 [-195.6, +185.6] | +2.0 [-10.7, +14.7] |",
        "| mean |  | -5.0 [-5.0, -5.0] | +2.0 [+2.0, +2.0] |",
    ]
    start["trials"] = [{"learning_rate": 0.7, "validation": 0.5}]
    with pytest.raises(ValueError, match="no learning rate in common in one; compare methods"):
        at_equal_rates(learned, start)


def test_the_report_of_a_file(records, tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    report.main([str(path), "--into", str(tmp_path / "out")])
    text = (tmp_path / "out" / "methods.md").read_text()
    assert "3 cells, 5 methods, 13 records; 2 seeds each; 0.13 CPU hours" in text
    assert "ahead in 2 of 3 cells (interval above 0 in 1, below 0 in 0)" in text
    assert "mean margin +4.7" in text
    assert "ratio of sums: 47 %" in text
    assert "the hand-coded method of best validation accuracy: ahead in 2 of 3 cells" in text
    assert "| ANA | 2 | -5.0 [-68.5, +58.5] | 1.5 | 1 | 2 of 2 | 36 |" in text
    assert "- three: ANA, float" in text  # what is missing
    row = next(line for line in text.splitlines() if line.startswith("| one | ANA"))
    assert (
        "| 75.0 [62.3, 87.7] | 79.0 [66.3, 91.7] | +4.0 [+4.0, +4.0] | 85.0 | 90.0 | 40 % | 0.5 |"
        in row
    )
    for figure in ("margins", "ranking", "epochs", "parameters"):
        assert (tmp_path / "out" / f"methods_{figure}.png").stat().st_size > 1000
    assert read(tmp_path / "out" / "methods.jsonl") == read(path)


def test_without_records_it_says_so(tmp_path):
    with pytest.raises(SystemExit, match="no records"):
        report.main([str(tmp_path)])
    with pytest.raises(ValueError, match="no records"):
        report.page([], {})


def test_what_a_search_gets_is_the_mean_over_all_draws_of_methods():
    rng = np.random.default_rng(0)
    rows = {
        f"method {i}": {
            "method": f"method {i}", "role": "hand-coded",
            "validation": float(v), "test": [float(t), float(t)],
        }
        for i, (v, t) in enumerate(zip(rng.random(5), rng.random(5), strict=True))
    }  # fmt: skip
    rows["learned"] = {
        "method": "learned",
        "role": "learned",
        "validation": 0.9,
        "test": [0.5, 0.5],
    }
    curve = search_curve({"cell": rows})
    assert list(curve) == [1, 2, 3, 4, 5]
    rivals = [r for r in rows.values() if r["role"] == "hand-coded"]
    for m in curve:
        kept = [
            max(drawn, key=lambda r: r["validation"])["test"][0]
            for drawn in itertools.combinations(rivals, m)
        ]
        assert curve[m].mean == pytest.approx(np.mean(kept) - 0.5)
