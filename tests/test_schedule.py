"""Settings, schedules and plans."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as options
from hypothesis import strategies as st

from learnsched import policies
from learnsched.schedule import (
    FIELDS,
    LayerInfo,
    Policy,
    RunInfo,
    Schedule,
    Setting,
    Telemetry,
    plan,
    terminal,
)
from learnsched.telemetry import telemetry_of

LAYERS = (LayerInfo("a", 4, 3, 4), LayerInfo("b", 9, 3, 0))

stds = st.floats(0, 10)
any_setting = st.builds(Setting, stds, stds, stds, stds, st.floats(0, 1), st.floats(-2, 2))


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_of_a_setting_are_finite(name, bad):
    with pytest.raises(ValueError, match=f"{name} must be finite, got {bad}"):
        Setting(**{name: bad})


@pytest.mark.parametrize("name", [f for f in FIELDS if f.endswith("_std")])
def test_a_negative_std_is_refused(name):
    with pytest.raises(
        ValueError, match=rf"{name} must be at least 0, got -0\.1; 0 quantizes hard"
    ):
        Setting(**{name: -0.1})


@pytest.mark.parametrize("fraction", [-0.01, 1.01])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match=rf"fraction must lie in \[0, 1\], got {fraction}"):
        Setting(fraction=fraction)


def test_a_setting_is_hard_and_free_by_default_and_its_means_may_be_negative():
    setting = Setting()
    assert setting.weight_forward_std == setting.fraction == 0
    assert not setting.is_terminal
    assert Setting(weight_forward_mean=-0.5).weight_forward_mean == -0.5


@pytest.mark.parametrize("name", [f for f in FIELDS if "forward" in f] + ["fraction"])
def test_terminal_needs_every_condition(name):
    assert Setting(fraction=1.0).is_terminal
    assert not dataclasses.replace(Setting(fraction=1.0), **{name: 0.5}).is_terminal


@options(deadline=None, derandomize=True)
@given(any_setting, st.integers(1, 9), st.data())
def test_terminal_conditions_are_forced_in_the_last_epoch_alone(setting, horizon, data):
    run = RunInfo(LAYERS, horizon)
    epoch = data.draw(st.integers(0, horizon - 1))
    found = terminal(setting, run, epoch)
    if epoch < horizon - 1:
        assert found == setting
    else:
        assert found.is_terminal is (horizon > 1)
        assert found.fraction == (1 if horizon > 1 else 0)
        assert found.weight_backward_std == setting.weight_backward_std
        assert found.activation_backward_std == setting.activation_backward_std


@options(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(st.lists(any_setting, min_size=2, max_size=2), min_size=1, max_size=5))
def test_a_schedule_gives_back_its_settings_exactly(rows):
    for layer in range(2):  # fractions must not decrease
        for row, fraction in zip(rows, sorted(r[layer].fraction for r in rows), strict=True):
            row[layer] = dataclasses.replace(row[layer], fraction=fraction)
    schedule = Schedule.from_settings(rows, ["a", "b"])
    assert [list(row) for row in schedule] == rows
    assert schedule.settings(0) == tuple(rows[0])
    assert schedule.horizon == len(rows)
    for name in FIELDS:
        assert schedule[name].tolist() == [[getattr(s, name) for s in row] for row in rows]


def test_a_fraction_that_decreases_is_no_schedule():
    rows = [[Setting(fraction=0.5)], [Setting(fraction=0.4)]]
    with pytest.raises(ValueError, match="may not decrease"):
        Schedule.from_settings(rows, ["a"])


@pytest.mark.parametrize("shape", [(3, 7), (3, 1, 7), (3, 2, 6), (2, 3, 2, 7)])
def test_a_table_of_another_shape_is_no_schedule(shape):
    with pytest.raises(ValueError, match=r"of 2 layers has shape \(horizon, 2, 7\)"):
        Schedule(torch.zeros(shape), ("a", "b"))


def test_an_unknown_field_is_refused():
    with pytest.raises(KeyError, match=r"no field 'colour'; it has weight_forward_std, "):
        Schedule(torch.zeros(1, 2, 7), ("a", "b"))["colour"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((LAYERS, 0), "the horizon must be a whole number of at least 1, got 0"),
        (((), 3), "at least one quantized layer"),
        ((LAYERS, 3, 0), "steps_per_epoch must be a whole number of at least 1, got 0"),
    ],
)
def test_impossible_runs_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RunInfo(*arguments)


def test_progress_goes_from_0_to_1():
    run = RunInfo(LAYERS, 5)
    assert [run.progress(epoch) for epoch in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert RunInfo(LAYERS, 1).progress(0) == 1


@pytest.mark.parametrize("shape", [(3,), (2, 5, 3)])
def test_initial_telemetry_is_without_change(shape):
    error = torch.rand(shape)
    telemetry = Telemetry.initial(error)
    assert torch.equal(telemetry.loss, torch.ones(shape[:-1]))
    assert torch.equal(telemetry.loss_trend, telemetry.loss)
    assert telemetry.weight_error is error


def test_initial_telemetry_lies_where_the_errors_do():
    assert Telemetry.initial(torch.empty(3, device="meta")).loss.device.type == "meta"


def test_a_plan_is_hardened_unless_told_otherwise():
    run = RunInfo(LAYERS, 3)
    relaxed = policies.Relaxed(0.4)
    hard, soft = plan(relaxed, run), plan(relaxed, run, hardened=False)
    assert hard.layers == soft.layers == ("a", "b")
    assert hard["weight_forward_std"].tolist() == [[0.4, 0.4], [0.4, 0.4], [0, 0]]
    assert (soft["weight_forward_std"] == 0.4).all()
    assert soft["fraction"].max() == 0
    assert hard["fraction"].tolist() == [[0, 0], [0, 0], [1, 1]]


def test_a_plan_hands_the_policy_its_own_state():
    class Counting:
        noise, partition, metrics = "normal", "settled", ()

        def begin(self, run):
            return 1.0

        def settings(self, run, epoch, telemetry, state):
            return [Setting(state)] * len(run.layers), state / 2

    assert isinstance(Counting(), Policy)
    found = plan(Counting(), RunInfo(LAYERS[:1], 4))["weight_forward_std"]
    assert found.flatten().tolist() == [1, 0.5, 0.25, 0]


def test_what_lacks_a_part_of_the_protocol_is_no_policy():
    assert not isinstance(Setting(), Policy)
    assert all(isinstance(getattr(policies, name)(), Policy)
               for name in ("StraightThrough", "AdditiveNoiseAnnealing", "Relaxed",
                            "IncrementalQuantization"))  # fmt: skip


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.tensor, int])
def test_the_numbers_of_a_setting_are_plain(kind):
    setting = Setting(weight_forward_std=kind(0), fraction=kind(1))
    assert [type(n) for n in dataclasses.astuple(setting)] == [float] * len(FIELDS)
    assert setting == Setting(weight_forward_std=0.0, fraction=1.0)


@pytest.mark.parametrize("bad", ["0.3", None, [0.3], torch.zeros(2)])
def test_a_setting_takes_numbers_alone(bad):
    with pytest.raises(TypeError, match="fraction must be one number, got"):
        Setting(fraction=bad)


def test_a_schedule_is_planned_for_a_run():
    with pytest.raises(TypeError, match=r"planned for a RunInfo.*got 5"):
        plan(policies.StraightThrough(), 5)
    for policy in (policies.StraightThrough, None):
        with pytest.raises(TypeError, match=r"policy must have begin\(\) and settings\(\)"):
            plan(policy, RunInfo(LAYERS[:1], 4))


def test_schedules_and_telemetry_can_be_compared_and_kept_in_sets():
    run = RunInfo((LayerInfo("a", 3, 3, 4), LayerInfo("b", 3, 3, 4)), horizon=3)
    first, second = (plan(policies.StraightThrough(), run) for _ in range(2))
    assert first == first
    assert first != second
    assert len({first, second, Telemetry.initial(torch.rand(2))}) == 3


def test_what_a_scheduler_shows_is_compared_without_measuring_weights():
    losses = [{"train_loss": 1.0}]
    first, second = (telemetry_of(losses, ()) for _ in range(2))  # which could measure no weights
    assert first == first
    assert second in [first, second]
    assert len({first, second}) == 2
