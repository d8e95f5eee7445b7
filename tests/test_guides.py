"""The guides run, and what they print is true."""

import importlib
import json

import pytest

import learnsched as ls
from learnsched.history import History

pytestmark = pytest.mark.filterwarnings("ignore:outside of what the schedule")


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)  # the tests' own stays

    def guide(name):
        module = importlib.import_module(f"learnsched.guides.{name}")
        module.main(["--quick", "--out", str(tmp_path)])
        return capsys.readouterr().out

    return guide


def test_a_schedule_is_used_in_a_loop_that_is_interrupted(run, tmp_path):
    out = run("use_in_your_loop")
    lines = [line.split() for line in out.splitlines() if line.startswith("epoch")]
    assert [int(words[1]) for words in lines] == [1, 2, 3, 4, 5, 6]
    assert float(lines[-1][3]) < 0.5 * float(lines[0][3])
    assert float(out.split("hard network: ")[1].split()[0]) > 90
    assert History.load(tmp_path / "history.json").schedule.horizon == 6


def test_a_schedule_is_trained(run, tmp_path):
    out = run("train_your_own")
    assert out.count("step ") == 2
    path = tmp_path / "meta-2-0" / "schedule.safetensors"
    card = ls.pretrained_card(path)
    assert (card["name"], card["made"]["outer_steps"]) == ("mine", 2)
    assert card == json.loads(path.with_suffix(".json").read_text())
    assert (path.parent / "schedule.png").exists()
    assert "step 1" not in run("train_your_own")  # it is done already


def test_a_policy_a_level_set_and_a_task_are_added(run):
    out = run("add_your_own")
    assert float(out.split("levels: ")[1].split()[0]) > 90
    assert "weights on the levels [-2, -1, 0, 1, 2]" in out
    first, last = (float(word) for word in out.split() if word.startswith("0."))
    assert last < first
