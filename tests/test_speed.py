"""The speed benchmark at a size that takes no time: what it measures, not how fast it is."""

import itertools
import json

import pytest

from learnsched.benchmarks import speed
from learnsched.benchmarks.speed_networks import cnn, mlp, resnet


def test_alternatives_take_turns_warm_and_the_first_round_does_not_count():
    calls = []
    seconds = speed.take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "a", "b", "b"] * 4
    assert [len(v) for v in seconds.values()] == [3, 3]


def test_ratios_are_medians_of_the_ratios_within_a_round():
    seconds = {"reference": [1.0, 10.0, 2.0], "other": [3.0, 10.0, 8.0]}
    assert speed.ratios(seconds, "reference") == {"reference": 1.0, "other": 3.0}


@pytest.mark.filterwarnings("ignore:no batch norm precedes")
def test_every_section_gives_numbers_and_can_be_drawn(tmp_path):
    small = [mlp(width=8, depth=2, batch=4), cnn((4, 8), batch=2), resnet(batch=2)]
    result = {
        "operations": speed.operations(1000, seed=0, rounds=1),
        "steps": speed.steps(seed=0, rounds=1, networks=small),
        "scheduler": speed.scheduler(seed=0, rounds=1),
        "scaling": speed.scaling(seed=0, rounds=1, sizes=(100, 1000)),
        "levels": speed.levels_scaling(seed=0, rounds=1, elements=50_000),
        "memory": speed.memory(1000),
    }
    tables = [rows for name, rows in result.items() if name != "scheduler"]
    for row in [*itertools.chain(*tables), result["scheduler"]]:
        numbers = [v for v in row.values() if not isinstance(v, str)]
        assert numbers
        assert all(v >= 0 for v in numbers)  # a clock may not move in a microsecond
    names = {row["operation"] for row in result["operations"]}
    assert {"ReLU", "fake_quantize", "hard ternary", "normal unsigned8"} <= names
    assert {row["network"] for row in result["steps"]} == {network.name for network in small}
    assert speed.bandwidth(1000, rounds=2) > 0
    speed.plot(json.loads(json.dumps(result)), tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def test_quantizers_keep_x_and_a_few_numbers_for_backward():
    saved = {r["operation"]: r["bytes saved an element"] for r in speed.memory(10_000)}
    for name in ("hard ternary", "normal unsigned2", "uniform unsigned8", "logistic ternary"):
        assert 4 <= saved[name] < 4.01
