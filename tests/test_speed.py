"""The speed benchmark at a size that takes no time: what it measures, not how fast it is."""

import itertools
import json

import pytest

from learnsched.benchmarks import speed


def test_alternatives_take_turns_and_the_first_round_does_not_count():
    calls = []
    seconds = speed.take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 4
    assert [len(v) for v in seconds.values()] == [3, 3]


def test_ratios_are_medians_of_the_ratios_within_a_round():
    seconds = {"reference": [1.0, 10.0, 2.0], "other": [3.0, 10.0, 8.0]}
    assert speed.ratios(seconds, "reference") == {"reference": 1.0, "other": 3.0}


@pytest.mark.filterwarnings("ignore:no batch norm precedes")
def test_every_section_gives_positive_numbers_and_can_be_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "_NETWORKS", dict(itertools.islice(speed._NETWORKS.items(), 1)))
    result = {
        "operations": speed.operations(1000, seed=0, rounds=1),
        "steps": speed.steps(seed=0, rounds=1),
        "scheduler": speed.scheduler(seed=0, rounds=1),
        "scaling": speed.scaling(seed=0, rounds=1, sizes=(100, 1000)),
    }
    for row in [*result["operations"], *result["steps"], *result["scaling"], result["scheduler"]]:
        numbers = [v for v in row.values() if not isinstance(v, str)]
        assert numbers
        assert all(v >= 0 for v in numbers)  # a clock may not move in a microsecond
    names = {row["operation"] for row in result["operations"]}
    assert {"ReLU", "fake_quantize", "hard ternary", "normal unsigned8"} <= names
    speed.plot(json.loads(json.dumps(result)), tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 10_000
