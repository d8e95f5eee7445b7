"""What is said of networks that are drawn at random, where nobody searches."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from learnsched.benchmarks import curve_tasks, learning_rates
from learnsched.benchmarks import methods as field
from learnsched.benchmarks.cells import GRIDS
from learnsched.benchmarks.random_networks import (
    COUNTS,
    FURTHER_COUNTS,
    OTHER_COUNTS,
    OTHER_KINDS,
    OTHER_NETWORKS,
    SHORTER,
    TABLES,
    TABLES_COUNTS,
    by_group,
    cells,
    draw,
    main,
    margins,
    measured,
    shortened,
    tables,
)
from learnsched.benchmarks.regimes import Regime, drawn
from learnsched.benchmarks.tuned_once import ADVISED, practice
from learnsched.meta.presets import PRESETS
from learnsched.pretrained import load_pretrained

NETWORKS = cells(seed=0)
START = "learned, before meta-training"


def test_networks_are_new_and_half_of_their_data():
    tasks = [cell.task for cell in NETWORKS]
    assert Counter(map(Regime.of, tasks)) == COUNTS
    assert len({cell.name for cell in NETWORKS}) == len(NETWORKS)
    of_rates = drawn(learning_rates.MIX, learning_rates.COUNTS, 770_000)
    assert not {task.seed for task in tasks} & {task.seed for task in of_rates}
    known = {(c.task.data, c.task.family, c.task.width) for c in GRIDS["medium"].cells}
    assert not {(task.data, task.family, task.width) for task in tasks} & known
    new = [task for task in tasks if task.data == "fashion_mnist"]
    assert 0.4 < len(new) / len(tasks) < 0.6
    seen = {kind[0] for preset in PRESETS.values() for kind in preset.trainer.mix.architectures}
    assert "fashion_mnist" not in seen


def test_other_kinds_are_in_no_meta_training_and_in_the_tuning_of_no_method():
    tasks = [cell.task for cell in cells(0, OTHER_KINDS, OTHER_COUNTS)]
    assert Counter(map(Regime.of, tasks)) == OTHER_COUNTS
    kinds = {(task.data, task.family) for task in tasks}
    assert len(kinds) == 3
    seen = {kind[:2] for preset in PRESETS.values() for kind in preset.trainer.mix.architectures}
    seen |= {kind[:2] for kind in learning_rates.MIX.architectures}
    tuned_on = {(t.data, t.family) for t in practice(Regime("ternary/2-bit", fine_tuning=False))}
    assert not kinds & (seen | tuned_on)


def test_other_networks_are_of_families_that_nothing_was_made_or_tuned_on():
    tasks = [cell.task for cell in cells(0, OTHER_NETWORKS, FURTHER_COUNTS)]
    assert Counter(map(Regime.of, tasks)) == FURTHER_COUNTS
    families = {task.family for task in tasks}
    assert families == {"transformer", "separable", "cnn2d_group"}
    seen = {kind[1] for preset in PRESETS.values() for kind in preset.trainer.mix.architectures}
    seen |= {kind[1] for kind in learning_rates.MIX.architectures}
    seen |= {t.family for t in practice(Regime("ternary/2-bit", fine_tuning=False))}
    assert not families & seen


def test_fewer_epochs_are_those_of_the_same_network():
    cell = NETWORKS[0]
    assert cell.task.horizon == 30
    assert [shortened(cell, share).task.horizon for share in SHORTER.values()] == [23, 15]
    assert shortened(cell, 1.0) == cell


def record(cell, method, *accuracies, stage="advised"):
    return {"stage": stage, "cell": cell.name, "method": method, "test": list(accuracies)}


def rows(markdown):
    return {
        line.split(" | ")[0].strip("| "): [part.strip() for part in line.strip("|").split("|")[1:]]
        for line in markdown.splitlines()
        if line.startswith("|")
    }


# One from Fashion-MNIST and one from elsewhere, both with 2-bit activations, from scratch.
FASHION, OTHER = (
    next(
        cell
        for cell in NETWORKS
        if (cell.task.data == "fashion_mnist") is fashion
        and Regime.of(cell.task) == Regime("ternary/2-bit", False)
    )
    for fashion in (True, False)
)
RECORDS = [
    record(FASHION, "learned", 0.80, 0.82),
    record(OTHER, "learned", 0.50, 0.50),
    record(FASHION, START, 0.80, 0.80),
    record(OTHER, START, 0.52, 0.52),
    record(FASHION, "strong", 0.79, 0.81),
    record(OTHER, "strong", 0.49, 0.51),
    record(FASHION, "weak", 0.60, 0.60),
    record(OTHER, "weak", 0.55, 0.55),
    record(FASHION, "learned, half of the epochs", 0.80, 0.80),
    record(OTHER, "learned, half of the epochs", 0.45, 0.45),
]
RECIPES = [
    {"stage": "recipe", "regime": "ternary/2-bit", "method": method, "validation": validation}
    for method, validation in (("strong", 0.5), ("weak", 0.6))
]


def test_groups_pair_the_networks_that_they_have():
    found = rows(by_group(RECORDS, [FASHION, OTHER], START))
    assert found["Fashion-MNIST"] == ["1", "81.0", "+1.0 [+1.0, +1.0]", "1", "0", "0"]
    assert found["MNIST-1D and digits"] == ["1", "50.0", "-2.0 [-2.0, -2.0]", "0", "0", "1"]
    assert found["ternary/2-bit"][:2] == ["2", "65.5"] and found["ternary/2-bit"][3] == "1"
    assert "binary/binary" not in found


def test_fewer_epochs_are_compared_with_the_rivals_whole_runs():
    text = tables(RECORDS, RECIPES, [FASHION, OTHER])
    whole, half = text.split("learned, half of the epochs:")
    assert "ahead of strong by" in whole and "ahead of weak by" not in whole
    assert rows(whole.split("\n\n")[1])["the best where tuned"][2].startswith("+8.0 [")  # of weak
    shorter = rows(half)
    assert shorter["strong"][2].startswith("-2.5 [")
    assert START not in shorter and "learned" not in shorter


def test_tables_are_those_of_the_data_of_vectors_of_which_two_no_search_has_seen():
    tasks = [cell.task for cell in cells(0, TABLES, TABLES_COUNTS)]
    searched = {(task.data, task.seed) for task in curve_tasks.vectors("ternary/2-bit")}
    assert {task.family for task in tasks} == {"mlp"} and len(tasks) == 18
    assert {task.data for task in tasks} - {data for data, _ in searched} == {"teacher", "quadrics"}
    assert not {task.seed for task in tasks} & {seed for _, seed in searched}


def test_margins_are_those_of_whole_runs_the_hardest_rival_first():
    found = margins(RECORDS, ADVISED)
    assert list(found) == [START, "strong", "weak"]
    assert found[START] == pytest.approx({FASHION.name: 0.01, OTHER.name: -0.02})
    assert found["weak"] == pytest.approx({FASHION.name: 0.21, OTHER.name: -0.05})


def test_margins_are_drawn(tmp_path):
    draw(RECORDS, tmp_path / "margins.png", ADVISED)
    assert (tmp_path / "margins.png").read_bytes().startswith(b"\x89PNG")


def test_recipes_and_rates_that_are_shipped_are_those_of_every_network():
    figures = Path(__file__).parent.parent / "figures"
    recipes = json.loads((figures / "tuned_once.json").read_text())["records"]
    known = {r["regime"] for r in recipes if r["stage"] == "recipe"}
    assert {str(Regime.of(cell.task)) for cell in NETWORKS} <= known


@pytest.mark.slow
def test_a_network_has_an_accuracy_at_every_rate():
    cell = min(NETWORKS, key=lambda cell: cell.task.horizon * cell.task.steps)
    method = field.learned(load_pretrained("default"))
    found = measured(method, cell, {"test": 0.01, "advised": 0.03}, None)
    assert [r["learning_rate"] for r in found] == [0.01, 0.03]
    assert np.shape([r["test"] for r in found]) == (2, 3)
    again = measured(method, cell, {"test": 0.01, "advised": 0.03}, None)
    assert found == again


@pytest.mark.slow
def test_an_interrupted_campaign_goes_on(tmp_path, capsys):
    path = tmp_path / "records.json"
    main(["--quick", "--json", str(path)])
    whole, text = json.loads(path.read_text()), capsys.readouterr().out
    path.write_text(json.dumps({**whole, "records": whole["records"][:4]}))
    main(["--quick", "--json", str(path)])
    assert json.loads(path.read_text())["records"] == whole["records"]
    assert capsys.readouterr().out.splitlines()[-20:] == text.splitlines()[-20:]
