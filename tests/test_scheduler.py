"""QuantizationScheduler: when settings apply, what stays frozen, resuming, and refusals."""

import copy
import dataclasses
import io
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import learnsched as ls
from learnsched import policies
from learnsched.layers import quantized_layers
from learnsched.schedule import Setting

pytestmark = pytest.mark.filterwarnings("ignore:no batch norm precedes")

PARTITIONS = ("magnitude", "random", "redraw", "settled")


def network(layers=2, weight=None, activation=None):
    torch.manual_seed(0)
    modules = []
    for index in range(layers):
        modules += [nn.Linear(8 if index == 0 else 6, 6), nn.BatchNorm1d(6), nn.ReLU()]
    model = nn.Sequential(*modules)
    return ls.quantize_(model, weight or ls.ternary(), activation or ls.unsigned(2))


def learned(seed=3, spread=0.7, **options):
    """A policy whose network is not fresh."""
    torch.manual_seed(seed)
    policy = policies.LearnedPolicy(policies.MetaNetwork(6, 5), **options)
    with torch.no_grad():
        for parameter in policy.network.out.parameters():
            parameter.normal_(std=spread)
    return policy


@dataclasses.dataclass(frozen=True)
class Scripted:
    """Gives the settings of a list, one an epoch, to every layer; keeps what it was shown."""

    rows: tuple
    count: int | None = None
    noise: str = "normal"
    partition: str = "settled"
    metrics: tuple = ()
    seen: list = dataclasses.field(default_factory=list, repr=False)

    def begin(self, run):
        return {"epoch": torch.zeros(())}

    def settings(self, run, epoch, telemetry, state):
        self.seen.append((run, epoch, telemetry))
        row = self.rows[min(epoch, len(self.rows) - 1)]
        return [row] * (self.count or len(run.layers)), {"epoch": state["epoch"] + 1}


def fractions(*values):
    return Scripted(tuple(Setting(fraction=v) for v in values))


EVERY_POLICY = {
    "straight_through": lambda: policies.StraightThrough(),
    "annealing": lambda: policies.AdditiveNoiseAnnealing(std=0.4, mean=-0.5, end=1.0),
    "same_start": lambda: policies.AdditiveNoiseAnnealing(interval="same_start", progressive=True),
    "incremental": lambda: policies.IncrementalQuantization(2),
    "redraw": lambda: policies.IncrementalQuantization(4, partition="redraw"),
    "random": lambda: policies.IncrementalQuantization(3, partition="random", start=0.3),
    "relaxed": lambda: policies.Relaxed(),
    "relaxed_quantization": lambda: policies.RelaxedQuantization(),
    "piecewise_affine": lambda: policies.PiecewiseAffine(),
    "grid": lambda: policies.annealing_grid()["mode, static mean, static std"],
    "fresh": lambda: policies.LearnedPolicy(policies.MetaNetwork(4, 4)),
    "learned": learned,
    "open_loop": lambda: learned(open_loop=True),
}


def train(model, optimizer, scheduler, epochs, seed=0, loss_of=None, steps=2):
    """A few steps an epoch on random data that depends on the epoch alone."""
    for _ in range(epochs):
        generator = torch.Generator().manual_seed(seed + scheduler.epoch)
        for _ in range(steps):
            x = torch.randn(16, 8, generator=generator)
            y = torch.randn(16, 6, generator=generator)
            loss = (model(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step({"train_loss": loss})


def state_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same_state(model, state):
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def noise_in(model):
    layer = quantized_layers(model)[0]
    weight, act = layer.quantizers
    return tuple(
        float(getattr(q, name))
        for q in (weight, act)
        for name in ("forward_std", "backward_std", "forward_mean")
    )


def test_the_policy_chooses_the_forward_value_and_shifts_both_noises():
    model = network()
    policy = policies.AdditiveNoiseAnnealing(mode="random", mean=0.5, end=1.0)
    ls.QuantizationScheduler(model, policy, 3)
    for quantizer in (q for layer in quantized_layers(model) for q in layer.quantizers):
        assert quantizer.mode == "random"
        assert quantizer.forward_mean == quantizer.backward_mean == 0.5
    ls.QuantizationScheduler(model, policies.StraightThrough(), 3)
    assert {q.mode for layer in quantized_layers(model) for q in layer.quantizers} == {
        "expectation"
    }


def test_an_unknown_forward_value_is_refused():
    class Odd(Scripted):
        mode = "median"

    policy = Odd((Setting(),))
    with pytest.raises(ValueError, match="unknown mode 'median'; choose one of expectation"):
        ls.QuantizationScheduler(network(), policy, 3)


def test_the_constructor_applies_epoch_0_and_step_the_next():
    rows = [Setting(0.25, 0.5, 0.75, 1.5, 0.25, -0.5, 0.125), Setting(0.5, 2.0, 0.0, 0.25, 0.5)]
    model = network()
    scheduler = ls.QuantizationScheduler(model, Scripted(tuple(rows), noise="logistic"), 3)
    assert scheduler.epochs == 3
    assert scheduler.epoch == 0
    assert scheduler.get_last_setting() == (rows[0], rows[0])
    assert noise_in(model) == (0.25, 0.5, -0.5, 0.75, 1.5, 0.125)
    weight = model[0].weight_quantizer
    assert weight.noise.name == model[2].noise.name == "logistic"
    assert int(weight.membership.sum()) == 12
    scheduler.step()
    assert scheduler.get_last_setting() == (rows[1], rows[1])
    assert noise_in(model) == (0.5, 2.0, 0.0, 0.0, 0.25, 0.0)
    assert int(weight.membership.sum()) == 24
    scheduler.step()
    assert scheduler.get_last_setting()[0].is_terminal
    assert int(weight.membership.sum()) == 48


@pytest.mark.parametrize("horizon", [1, 2, 5])
@pytest.mark.parametrize("name", EVERY_POLICY)
def test_a_whole_run_ends_hard_and_on_the_levels(name, horizon):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    policy = EVERY_POLICY[name]()
    scheduler = ls.QuantizationScheduler(model, policy, horizon, steps_per_epoch=2)
    train(model, optimizer, scheduler, horizon - 1)
    last = scheduler.get_last_setting()
    assert all(s.weight_forward_std == s.activation_forward_std == 0 for s in last)
    assert all(s.fraction == (1 if horizon > 1 else 0) for s in last)
    train(model, optimizer, scheduler, 1)
    assert all(s.is_terminal for s in scheduler.get_last_setting())
    assert scheduler.epoch == horizon == scheduler.history.schedule.horizon
    assert len(scheduler.history.metrics) == horizon
    ls.integer_weights(model)
    before = state_of(model)
    ls.finalize_(model)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert not changed


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    name=st.sampled_from(sorted(EVERY_POLICY)),
    horizon=st.integers(1, 12),
    layers=st.integers(1, 4),
    losses=st.lists(st.floats(1e-6, 1e6), min_size=12, max_size=12),
)
def test_terminal_conditions_hold_for_every_policy(name, horizon, layers, losses):
    model = network(layers)
    scheduler = ls.QuantizationScheduler(model, EVERY_POLICY[name](), horizon, steps_per_epoch=7)
    for loss in losses[:horizon]:
        before = scheduler.get_last_setting()
        scheduler.step({"train_loss": loss})
        after = scheduler.get_last_setting()
        assert all(b.fraction <= a.fraction for b, a in zip(before, after, strict=True))
    table = scheduler.history.schedule
    for field in ("weight_forward_std", "activation_forward_std"):
        assert not table[field][-1].any()
        assert not table[field.replace("std", "mean")][-1].any()
    assert (table["fraction"][-1] == (1 if horizon > 1 else 0)).all()
    assert (table["fraction"].diff(dim=0) >= 0).all()
    assert all(s.is_terminal for s in scheduler.get_last_setting())
    assert all((layer.weight.weight_quantizer.membership == 1).all()
               for layer in quantized_layers(model))  # fmt: skip


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.3),
}


def test_a_watched_optimizer_of_another_model_is_warned_of():
    model = ls.quantize_(nn.Sequential(nn.Linear(4, 2)), ls.ternary())
    other = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)
    scheduler = ls.QuantizationScheduler(model, ls.policies.StraightThrough(), epochs=2)
    with pytest.warns(UserWarning, match="holds no parameter of this model") as caught:
        scheduler.watch(other)
    assert caught[0].filename == __file__


def test_a_schedule_that_is_never_stepped_is_warned_of_once():
    model = ls.quantize_(nn.Sequential(nn.Linear(4, 2)), ls.ternary())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ls.QuantizationScheduler(
        model, ls.policies.StraightThrough(), epochs=9, steps_per_epoch=5, optimizer=optimizer
    )
    told = []
    for _ in range(40):
        model(torch.randn(3, 4)).sum().backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        told += caught
    [warning] = told
    assert "call scheduler.step() after every epoch" in str(warning.message)
    assert warning.filename == __file__


def test_an_optimizer_of_another_model_is_warned_of():
    model = ls.quantize_(nn.Sequential(nn.Linear(4, 2)), ls.ternary())
    other = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="holds no parameter of this model") as caught:
        ls.QuantizationScheduler(model, ls.policies.StraightThrough(), 3, optimizer=other)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = torch.optim.SGD([model[0].bias], lr=0.1)
        ls.QuantizationScheduler(model, ls.policies.StraightThrough(), 3, optimizer=own)


def test_an_optimizer_of_modules_that_were_replaced_is_warned_of():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    stale = torch.optim.SGD(model.parameters(), lr=0.1)
    model[1] = nn.Linear(4, 3)
    ls.quantize_(model, ls.ternary())
    policy = ls.policies.StraightThrough()
    with pytest.warns(UserWarning, match=r"lacks \['1.weight', '1.bias'\]") as caught:
        ls.QuantizationScheduler(model, policy, 3, optimizer=stale)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # One of two models, and one of a part that is frozen in none.
        both = torch.optim.SGD([*model.parameters(), *nn.Linear(4, 1).parameters()], lr=0.1)
        ls.QuantizationScheduler(model, policy, 3, optimizer=both)


@pytest.mark.parametrize("given_optimizer", [True, False])
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_frozen_weights_keep_every_bit(kind, partition, given_optimizer):
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    policy = dataclasses.replace(fractions(0.0, 0.4, 0.4, 0.7, 1.0), partition=partition)
    scheduler = ls.QuantizationScheduler(
        model, policy, 5, optimizer=optimizer if given_optimizer else None
    )
    train(model, optimizer, scheduler, 1)  # momentum builds up before anything is frozen
    previous = None
    while scheduler.epoch < 5:
        layers = [m for m in model if isinstance(m, nn.Linear)]
        masks = [m.weight_quantizer.membership > 0 for m in layers]
        held = [m.weight.detach().clone() for m in layers]
        scales = [m.weight_quantizer.held_scale.clone() for m in layers]
        if previous is not None and partition != "redraw":
            for mask, value, (old_mask, old_value, old_scale, started), scale in zip(
                masks, held, previous, scales, strict=True
            ):
                assert mask[old_mask].all()
                assert torch.equal(value[old_mask], old_value[old_mask])
                assert torch.equal(scale[started], old_scale[started])
        for _ in range(3):
            model(torch.randn(16, 8)).square().sum().backward()
            optimizer.step()
            for layer, mask, value in zip(layers, masks, held, strict=True):
                effective = layer.weight_quantizer(layer.weight)
                assert torch.equal(effective[mask], value[mask])
                if given_optimizer:
                    assert torch.equal(layer.weight[mask], value[mask])
                if not mask.all():
                    assert not torch.equal(layer.weight[~mask], value[~mask])
        previous = [
            (mask, value, scale, m.weight_quantizer.scale_held > 0)
            for mask, value, scale, m in zip(masks, held, scales, layers, strict=True)
        ]
        scheduler.step()
        for layer in layers:  # the parameter follows at step() at the latest
            frozen = layer.weight_quantizer.membership > 0
            assert torch.equal(layer.weight[frozen], layer.weight_quantizer.held[frozen])


def test_redraw_releases_weights():
    model = network()
    policy = dataclasses.replace(fractions(0.5), partition="redraw")
    scheduler = ls.QuantizationScheduler(model, policy, 4)
    first = model[0].weight_quantizer.membership.clone()
    scheduler.step()
    second = model[0].weight_quantizer.membership
    assert first.sum() == second.sum() == 24
    assert not torch.equal(first, second)


@pytest.mark.parametrize("partition", ["random", "redraw"])
def test_random_partitions_depend_on_the_seed_alone(partition):
    policy = dataclasses.replace(fractions(0.5), partition=partition)

    def membership(seed, disturb=False):
        model = network()
        if disturb:
            torch.manual_seed(77)
        ls.QuantizationScheduler(model, policy, 3, seed=seed)
        return model[0].weight_quantizer.membership, model[3].weight_quantizer.membership

    one, again, other = membership(1), membership(1, disturb=True), membership(2)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], other[0])
    assert not torch.equal(one[0][:, :6], one[1])


@pytest.mark.parametrize("horizon", [1, 3])
def test_a_step_past_the_horizon_is_refused_and_changes_nothing(horizon):
    model = network()
    scheduler = ls.QuantizationScheduler(model, policies.StraightThrough(), horizon)
    for _ in range(horizon):
        scheduler.step()
    before, state = state_of(model), scheduler.state_dict()
    with pytest.raises(RuntimeError, match=f"{horizon + 1} times for a horizon of {horizon}"):
        scheduler.step()
    assert_same_state(model, before)
    assert_equal(scheduler.state_dict(), state)


def assert_equal(one, other):
    """Nested states, tensors to the bit, NaN equal to NaN."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other or (one != one and other != other)


@pytest.mark.parametrize(
    ("metrics", "kind", "message"),
    [
        (None, KeyError, "LearnedPolicy needs the metric 'train_loss'"),
        ({}, KeyError, "train_loss"),
        ({"loss": 1.0}, KeyError, r"step\(metrics={'train_loss': value}\)"),
        ({"train_loss": "high"}, TypeError, "'train_loss' must be a number, got 'high'"),
        ({"train_loss": None}, TypeError, "must be a number, got None"),
        ({"train_loss": torch.zeros(2)}, TypeError, "must be a number"),
        ({"train_loss": 1.0, "accuracy": [0.5]}, TypeError, "'accuracy' must be a number"),
        (0.5, TypeError, r'by name, as {"train_loss": loss}, got 0\.5'),
        (torch.tensor(0.5), TypeError, "by name"),
    ],
)
def test_wrong_metrics_are_refused_and_change_nothing(metrics, kind, message):
    model = network()
    scheduler = ls.QuantizationScheduler(model, learned(), 4, steps_per_epoch=3)
    before, state = state_of(model), scheduler.state_dict()
    with pytest.raises(kind, match=message):
        scheduler.step(metrics)
    assert_same_state(model, before)
    assert_equal(scheduler.state_dict(), state)
    scheduler.step({"train_loss": 1.0})


def test_metrics_may_be_tensors_with_a_graph_and_are_kept_as_numbers():
    scheduler = ls.QuantizationScheduler(network(), policies.StraightThrough(), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step({"train_loss": torch.tensor(0.5, requires_grad=True), "epoch": 1})
    assert scheduler.history.metrics == [{"train_loss": 0.5, "epoch": 1.0}]
    assert type(scheduler.history.metrics[0]["epoch"]) is float


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_metric_that_is_not_finite_warns_and_counts_as_no_change(bad, at):
    def run(value):
        scheduler = ls.QuantizationScheduler(network(), learned(), 5, steps_per_epoch=3)
        for epoch, loss in enumerate((2.0, 1.5, 1.25, 1.0)):
            loss = value if epoch == at else loss
            if math.isfinite(loss):
                scheduler.step({"train_loss": loss})
            else:
                with pytest.warns(
                    UserWarning, match=r"'train_loss' is -?(nan|inf).*no change"
                ) as w:
                    scheduler.step({"train_loss": loss})
                assert w[0].filename == __file__
        return scheduler.history

    found = run(bad)
    assert bool(found.schedule.table.isfinite().all())
    if at:  # as if the loss before had been reported again
        assert torch.equal(found.schedule.table, run((2.0, 1.5, 1.25)[at - 1]).schedule.table)


@pytest.mark.filterwarnings("ignore:the metric")
def test_telemetry_is_relative_to_the_first_loss_and_the_one_before():
    model = network()
    policy = dataclasses.replace(fractions(0.0), metrics=("train_loss",))
    scheduler = ls.QuantizationScheduler(model, policy, 8)
    for loss in (4.0, 2.0, math.nan, 3.0, 0.0):
        scheduler.step({"train_loss": loss})
    shown = [(float(t.loss), float(t.loss_trend)) for _, _, t in policy.seen]
    assert shown == [(1, 1), (1, 1), (0.5, 0.5), (0.5, 1), (0.75, 1.5), (0, 0)]
    errors = [layer.weight.weight_quantizer.error(layer.weight.weight)
              for layer in quantized_layers(model)]  # fmt: skip
    assert torch.equal(policy.seen[-1][2].weight_error, torch.stack(errors).detach())


def test_a_first_loss_of_nan_or_0_leaves_the_telemetry_finite():
    policy = fractions(0.0)
    scheduler = ls.QuantizationScheduler(network(), policy, 6)
    for loss in (math.nan, 0.0, 2.0, 1.0):
        scheduler.step({"train_loss": loss})
    assert [float(t.loss) for _, _, t in policy.seen] == [1, 1, 1, 1, 1]
    assert [float(t.loss_trend) for _, _, t in policy.seen] == [1, 1, 1, 1, 0.5]


def test_weight_errors_shown_do_not_depend_on_who_restores_frozen_weights():
    def errors(given_optimizer):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.3)
        policy = fractions(0.5, 0.5, 0.8)
        scheduler = ls.QuantizationScheduler(
            model, policy, 4, optimizer=optimizer if given_optimizer else None
        )
        train(model, optimizer, scheduler, 3)
        return torch.stack([t.weight_error for _, _, t in policy.seen])

    assert torch.equal(errors(True), errors(False))


def test_steps_are_counted_in_the_first_epoch():
    model, policy = network(), fractions(0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = ls.QuantizationScheduler(model, policy, 4)
    ls.calibrate_(model, [torch.randn(4, 8)])  # in evaluation, so not counted
    train(model, optimizer, scheduler, 1, steps=5)
    train(model, optimizer, scheduler, 2, steps=2)
    assert [run.steps_per_epoch for run, _, _ in policy.seen] == [None, 5, 5, 5]
    assert scheduler.state_dict()["steps_per_epoch"] == 5
    assert not model._forward_pre_hooks


def test_with_the_optimizer_given_its_steps_count_and_not_the_forward_passes():
    model, policy = network(), fractions(0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = ls.QuantizationScheduler(model, policy, 3, optimizer=optimizer)
    for i in range(12):
        model(torch.randn(4, 8)).square().mean().backward()
        if i % 4 == 3:  # gradients are accumulated over four passes
            optimizer.step()
            optimizer.zero_grad()
    scheduler.step()
    assert policy.seen[-1][0].steps_per_epoch == 3


def test_an_optimizer_may_come_later():
    model = network()
    scheduler = ls.QuantizationScheduler(model, fractions(0, 0.5, 1), epochs=3)
    model(torch.randn(4, 8))  # counted as long as there is no optimizer
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scheduler.watch(optimizer)
    train(model, optimizer, scheduler, 2)
    assert scheduler.state_dict()["steps_per_epoch"] == 2
    weight, quantizer = model[0].weight, model[0].weight_quantizer
    frozen = quantizer.membership > 0
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert torch.equal(weight[frozen], quantizer.held[frozen])
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, got 3"):
        scheduler.watch(3)


@pytest.mark.parametrize(("told", "taken", "wrong"), [(12, 3, True), (3, 9, True), (9, 8, False)])
def test_an_epoch_of_other_steps_than_was_said_is_warned_of_once(told, taken, wrong):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = ls.QuantizationScheduler(
        model, fractions(0, 0.5, 1), 3, steps_per_epoch=told, optimizer=optimizer
    )
    for epoch in range(2):
        for _ in range(taken):
            model(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scheduler.step()
        said = [str(w.message) for w in caught if "steps_per_epoch is" in str(w.message)]
        assert len(said) == (wrong and epoch == 0)
        if said:
            assert f"took {taken} optimizer steps, steps_per_epoch is {told}" in said[0]


def test_an_optimizer_in_a_wrapper_that_passes_hooks_by_is_found():
    class Wrapped(torch.optim.Optimizer):
        """As Accelerate's: made without the constructor of its base."""

        def __init__(self, optimizer):
            self.optimizer = optimizer

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = ls.QuantizationScheduler(
        model, fractions(0.5, 0.5, 1), 3, optimizer=Wrapped(optimizer)
    )
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    assert scheduler.state_dict()["counted"] == 1
    noise = model[0].weight_quantizer.noise
    with pytest.raises(TypeError, match="must be a torch"):
        ls.QuantizationScheduler(
            network(), fractions(0.5, 1), 2, optimizer=Wrapped(torch.nn.Linear(1, 1))
        )
    assert model[0].weight_quantizer.noise is noise


def test_two_optimizers_that_step_side_by_side_count_once():
    model, policy = network(), fractions(0.0)
    weights = torch.optim.SGD([model[0].weight], lr=0.1)
    others = torch.optim.SGD([model[0].bias], lr=0.1)
    scheduler = ls.QuantizationScheduler(model, policy, 3, optimizer=weights)
    scheduler.watch(others)
    for _ in range(4):
        model(torch.randn(4, 8)).square().mean().backward()
        weights.step()
        others.step()
    scheduler.step()
    assert policy.seen[-1][0].steps_per_epoch == 4


def test_steps_counted_before_an_interruption_inside_the_first_epoch_count():
    def steps(model, scheduler, count):
        for _ in range(count):
            model(torch.randn(4, 8))

    model, policy = network(), fractions(0.0)
    scheduler = ls.QuantizationScheduler(model, policy, 3)
    steps(model, scheduler, 3)
    resumed = ls.QuantizationScheduler(model, policy, 3)
    resumed.load_state_dict(scheduler.state_dict())
    steps(model, resumed, 2)
    resumed.step()
    assert policy.seen[-1][0].steps_per_epoch == 5


def test_steps_counted_before_an_interruption_count_where_the_optimizer_is_watched_afterwards():
    def steps(model, optimizer, count):
        for _ in range(count):
            model(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()

    model, policy = network(), fractions(0.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = ls.QuantizationScheduler(model, policy, 3)
    scheduler.watch(optimizer)
    steps(model, optimizer, 7)
    resumed = ls.QuantizationScheduler(model, policy, 3)
    resumed.load_state_dict(scheduler.state_dict())
    resumed.watch(optimizer)
    steps(model, optimizer, 3)
    resumed.step()
    assert policy.seen[-1][0].steps_per_epoch == 10


@pytest.mark.parametrize("value", ["0.5", 10**400])
def test_a_metric_is_a_number_of_a_float_s_range(value):
    scheduler = ls.QuantizationScheduler(network(), fractions(0.0), 3)
    with pytest.raises(TypeError, match="the metric 'x' must be a number"):
        scheduler.step({"x": value})
    assert scheduler.epoch == 0


@pytest.mark.parametrize("part", ["settings", "metrics", "epoch", "seed", "policy_state"])
def test_a_state_with_a_part_missing_is_refused_and_changes_nothing(part):
    model = network()
    scheduler = ls.QuantizationScheduler(model, fractions(0.0, 0.5, 1.0), 3)
    spoilt = scheduler.state_dict()
    scheduler.step({"train_loss": 1.0})
    before, state = state_of(model), scheduler.state_dict()
    del spoilt[part]
    with pytest.raises(ValueError, match=f"no whole state of a scheduler.*{part}"):
        scheduler.load_state_dict(spoilt)
    assert_same_state(model, before)
    assert_equal(scheduler.state_dict(), state)


@pytest.mark.parametrize(
    "spoilt",
    [
        {"metrics": [{"train_loss": "x"}]}, {"metrics": [1.0]},
        {"epoch": 99}, {"epoch": None}, {"epoch": 0.5}, {"epoch": 2}, {"seed": None}, {"metrics": []},
        {"settings": torch.zeros(0, 2, 7)}, {"settings": torch.zeros(2, 3, 7)},
        {"settings": torch.zeros(2, 2, 7) - 1}, {"policy_state": None}, {"policy_state": {"hidden": 0}},
        {"steps_per_epoch": "x"}, {"steps_per_epoch": 0},
    ],
    ids=str,
)  # fmt: skip
def test_a_spoilt_state_is_refused_and_changes_nothing(spoilt):
    model = network()
    scheduler = ls.QuantizationScheduler(model, learned(), 4, steps_per_epoch=3)
    scheduler.step({"train_loss": 1.0})
    before, state = state_of(model), scheduler.state_dict()
    with pytest.raises(ValueError, match="no whole state of a scheduler"):
        scheduler.load_state_dict({**state, **spoilt})
    assert_same_state(model, before)
    assert_equal(scheduler.state_dict(), state)
    scheduler.step({"train_loss": 1.0})


def test_a_run_that_goes_on_with_other_steps_per_epoch_keeps_them_with_a_warning():
    first = ls.QuantizationScheduler(network(), learned(), 10, steps_per_epoch=10)
    first.step({"train_loss": 1.0})
    second = ls.QuantizationScheduler(network(), learned(), 10, steps_per_epoch=40)
    before = second.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning that is an error changes nothing
        with pytest.raises(UserWarning):
            second.load_state_dict(first.state_dict())
    assert_equal(second.state_dict(), before)
    with pytest.warns(UserWarning, match="an epoch has 40 steps now, and had 10 when"):
        second.load_state_dict(first.state_dict())
    assert second.state_dict()["steps_per_epoch"] == 40
    assert second.learning_rate_factor(200) == pytest.approx(0.5)


def test_a_learned_schedule_warns_of_losses_below_zero():
    scheduler = ls.QuantizationScheduler(network(), learned(), 4, steps_per_epoch=3)
    with pytest.warns(UserWarning, match="Pass a positive loss"):
        for loss in (-1.0, -2.0):
            scheduler.step({"train_loss": loss})


@pytest.mark.parametrize("weight", [None, ls.ternary()])
def test_a_step_after_finalize_is_refused_and_changes_nothing(weight):
    layers = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU()
    model = ls.quantize_(nn.Sequential(*layers), weight, ls.unsigned(2))
    scheduler = ls.QuantizationScheduler(model, policies.AdditiveNoiseAnnealing(), 4)
    scheduler.step()
    ls.finalize_(model)
    before, state = state_of(model), scheduler.state_dict()
    with pytest.raises(
        RuntimeError, match=r"after 1 of 4 epochs the model is not .*finalize_ was called"
    ):
        scheduler.step()
    assert_same_state(model, before)
    assert_equal(scheduler.state_dict(), state)


def test_a_fraction_below_one_that_is_all_of_a_small_weight_is_no_finalize():
    model = ls.quantize_(nn.Sequential(nn.Linear(10, 1)), ls.ternary())
    rows = tuple(Setting(fraction=fraction) for fraction in (0.0, 0.96, 0.98, 1.0))
    scheduler = ls.QuantizationScheduler(model, Scripted(rows), epochs=4)
    for _ in range(4):
        scheduler.step()
    assert bool((model[0].weight_quantizer.membership == 1).all())


def test_the_fraction_of_a_layer_without_a_weight_says_nothing_of_finalize():
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU())
    ls.quantize_(
        model,
        ls.ternary(),
        ls.unsigned(2),
        overrides={"2": None, "3": ls.LayerConfig(activation=ls.unsigned(2))},
    )

    @dataclasses.dataclass(frozen=True)
    class Apart:
        noise: str = "normal"
        partition: str = "settled"
        metrics: tuple = ()

        def begin(self, run):
            return None

        def settings(self, run, epoch, telemetry, state):
            return [
                Setting(fraction=1.0 if layer.weight_levels else 0.1 * epoch)
                for layer in run.layers
            ], None

    scheduler = ls.QuantizationScheduler(model, Apart(), epochs=5)
    for _ in range(5):
        scheduler.step()
    assert scheduler.epoch == 5


def test_a_step_after_finalize_is_refused_where_there_never_was_noise():
    model = network()
    scheduler = ls.QuantizationScheduler(model, policies.StraightThrough(), 6)
    scheduler.step()
    ls.finalize_(model)
    with pytest.raises(
        RuntimeError, match=r"after 1 of 6 epochs the model is not .*finalize_ was called"
    ):
        scheduler.step()


def test_a_weight_that_is_shared_later_is_named():
    model = ls.quantize_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ls.ternary())
    model[1].weight = model[0].weight
    for call in (
        lambda: ls.QuantizationScheduler(model, policies.StraightThrough(), 4),
        lambda: ls.finalize_(model),
    ):
        with pytest.raises(ValueError, match="0 and 1 have shared a weight since quantize_"):
            call()


def test_a_weight_that_is_parametrized_later_is_named():
    model = network()
    scheduler = ls.QuantizationScheduler(model, learned(), 4, steps_per_epoch=3)
    torch.nn.utils.parametrizations.weight_norm(model[0])
    for call in (
        lambda: ls.finalize_(model),
        lambda: ls.QuantizationScheduler(model, learned(), 4, steps_per_epoch=3),
    ):
        with pytest.raises(ValueError, match=r"weight of 0 is no parameter any more.*weight_norm"):
            call()
    assert scheduler.epoch == 0


def test_given_steps_are_not_counted_again():
    model, policy = network(), fractions(0.0)
    scheduler = ls.QuantizationScheduler(model, policy, 3, steps_per_epoch=40)
    model(torch.randn(4, 8))
    scheduler.step()
    assert [run.steps_per_epoch for run, _, _ in policy.seen] == [40, 40]


def test_accumulated_gradients_freeze_as_whole_batches_do():
    x = torch.randn(32, 8)

    def weights(parts):
        torch.manual_seed(0)
        model = ls.quantize_(nn.Sequential(nn.Linear(8, 6), nn.ReLU()), ls.ternary())
        optimizer = torch.optim.Adam(model.double().parameters(), lr=0.05)
        scheduler = ls.QuantizationScheduler(model, policies.IncrementalQuantization(5), 4)
        for _ in range(4):
            optimizer.zero_grad()
            for part in x.double().split(32 // parts):
                (model(part).square().sum() / 32).backward()
            optimizer.step()
            scheduler.step()
        return model[0].weight.detach()

    torch.testing.assert_close(weights(1), weights(4))


@pytest.mark.parametrize("name", EVERY_POLICY)
@pytest.mark.parametrize("cut", [0, 2, 5])
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(name, cut):
    horizon = 5

    def start():
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        scheduler = ls.QuantizationScheduler(model, EVERY_POLICY[name](), horizon, seed=4)
        return model, optimizer, scheduler

    whole = start()
    train(*whole, horizon)
    part = start()
    train(*part, cut)
    file = io.BytesIO()
    torch.save([p.state_dict() for p in part], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    torch.manual_seed(123)
    again = start()
    for target, state in zip(again, states, strict=True):
        target.load_state_dict(state)
    assert again[2].get_last_setting() == part[2].get_last_setting()
    assert_same_state(again[0], part[0].state_dict())
    train(*again, horizon - cut)
    assert_same_state(again[0], whole[0].state_dict())
    assert_equal(again[2].state_dict(), whole[2].state_dict())
    assert again[2].history.settings == whole[2].history.settings
    assert again[2].history.metrics == whole[2].history.metrics
    assert again[2].get_last_setting() == whole[2].get_last_setting()


def primitive(value):
    if isinstance(value, dict):
        return all(primitive(k) and primitive(v) for k, v in value.items())
    if isinstance(value, list):
        return all(map(primitive, value))
    return value is None or type(value) in (bool, int, float, str, torch.Tensor)


@pytest.mark.parametrize("name", EVERY_POLICY)
def test_the_state_holds_tensors_and_primitives_only(name):
    scheduler = ls.QuantizationScheduler(network(), EVERY_POLICY[name](), 3)
    scheduler.step({"train_loss": torch.tensor(1.0)})
    assert primitive(scheduler.state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ls.QuantizationScheduler(network(), policies.StraightThrough(), 4), "epochs 3"),
        (lambda: ls.QuantizationScheduler(network(3), policies.StraightThrough(), 3), "layers"),
        (lambda: ls.QuantizationScheduler(network(), policies.Relaxed(), 3), "policy .*Relaxed"),
        (lambda: ls.QuantizationScheduler(network(), policies.StraightThrough(0.5), 3), "policy"),
        (lambda: ls.QuantizationScheduler(network(), learned(), 3), "policy"),
        (
            lambda: ls.QuantizationScheduler(
                network(), policies.StraightThrough(), 3, fine_tuning=True
            ),
            "fine_tuning False",
        ),
    ],
)
def test_the_state_of_another_run_is_refused_and_changes_nothing(make, message):
    state = ls.QuantizationScheduler(network(), policies.StraightThrough(), 3).state_dict()
    scheduler = make()
    before = scheduler.state_dict()
    with pytest.raises(ValueError, match=rf"{message}.*same model, policy and epochs"):
        scheduler.load_state_dict(state)
    assert_equal(scheduler.state_dict(), before)


@pytest.mark.parametrize("levels", [(ls.signed(3), ls.unsigned(2)), (ls.ternary(), ls.unsigned(3))])
def test_the_state_of_other_level_sets_is_refused(levels):
    def scheduler(*levels):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
        return ls.QuantizationScheduler(ls.quantize_(model, *levels), policies.StraightThrough(), 3)

    state = scheduler(ls.ternary(), ls.unsigned(2)).state_dict()
    with pytest.raises(ValueError, match=r"this state has levels .*ternary"):
        scheduler(*levels).load_state_dict(state)


def test_the_state_under_another_scale_rule_is_refused_unless_it_is_too_old_to_tell():
    def root_mean_square(weight, levels):
        return weight.square().mean().sqrt().reshape([1] * weight.dim())

    def scheduler(rule):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
        ls.quantize_(model, ls.ternary(), ls.unsigned(2), weight_scale=rule)
        return ls.QuantizationScheduler(model, policies.StraightThrough(), 3)

    for rule, other in ((ls.LeastSquares(), ls.Maximum()), (root_mean_square, ls.AbsoluteMean())):
        state = scheduler(rule).state_dict()
        scheduler(rule).load_state_dict(state)
        with pytest.raises(ValueError, match=r"this state has scales .*make the scheduler with"):
            scheduler(other).load_state_dict(state)
        del state["scales"]
        scheduler(other).load_state_dict(state)


def test_the_learning_rate_follows_the_policy_in_an_ordinary_lambda_scheduler():
    curve = policies.BaseCurve(warm_until=0.25)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    scheduler = ls.QuantizationScheduler(model, curve, 4, steps_per_epoch=2, optimizer=optimizer)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, scheduler.learning_rate_factor)
    seen = []
    for _ in range(9):  # one past the end stays there
        seen.append(decay.get_last_lr()[0])
        optimizer.step()
        decay.step()
    cosine = [1 + math.cos(math.pi * k / 6) for k in range(7)]
    assert seen == pytest.approx([0.0, 1.0, *cosine], abs=1e-12)
    plain = ls.QuantizationScheduler(network(), policies.StraightThrough(), 4, steps_per_epoch=2)
    assert plain.learning_rate_factor(4) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="counted from 0, got -1"):
        plain.learning_rate_factor(-1)


def test_a_learning_rate_needs_the_number_of_steps():
    scheduler = ls.QuantizationScheduler(network(), policies.StraightThrough(), 4)
    with pytest.raises(ValueError, match="give the scheduler steps_per_epoch"):
        scheduler.learning_rate_factor(0)


@pytest.mark.parametrize("state", [{}, {"version": 99}, {"version": None, "epochs": 3}])
def test_something_else_than_a_state_is_refused(state):
    scheduler = ls.QuantizationScheduler(network(), policies.StraightThrough(), 3)
    with pytest.raises(ValueError, match="this state has version"):
        scheduler.load_state_dict(state)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (fractions(0.5, 0.25), r"fraction of 0 decrease from 0\.5 to 0\.25"),
        (dataclasses.replace(fractions(0.5, 0.25), partition="redraw"), "decrease"),
    ],
)
def test_a_fraction_that_decreases_is_refused_before_anything_changes(policy, message):
    model = network()
    scheduler = ls.QuantizationScheduler(model, policy, 4)
    before, state = state_of(model), scheduler.state_dict()
    with pytest.raises(ValueError, match=message):
        scheduler.step({"train_loss": 1.0})
    assert_same_state(model, before)
    assert_equal(scheduler.state_dict(), state)


class Returning(Scripted):
    """Gives back what it is told to."""

    def settings(self, run, epoch, telemetry, state):
        return self.rows


class Failing(Scripted):
    def settings(self, run, epoch, telemetry, state):
        raise ArithmeticError("no settings")


ROW = (Setting(0.25, fraction=0.5),)

REFUSED = [
    ({"policy": Scripted(ROW, count=3)}, ValueError, "3 settings for 2 layers"),
    ({"policy": Scripted(ROW, noise="pink")}, ValueError, "unknown noise 'pink'"),
    (
        {"policy": Scripted(ROW, partition="largest")},
        ValueError,
        "unknown partition 'largest'.*settled",
    ),
    ({"policy": Failing(ROW)}, ArithmeticError, "no settings"),
    *(
        (
            {"policy": Returning(given)},
            TypeError,
            r"settings\(\) of Returning must return one Setting",
        )
        for given in (
            [Setting()] * 2,
            [Setting()] * 3,
            None,
            (None, {}),
            ([None, None], {}),
            (3, {}),
        )
    ),
    ({"policy": Scripted(ROW, metrics="train_loss")}, TypeError, "tuple of names.*'train_loss'"),
    ({"policy": "default"}, TypeError, "got 'default'.*load_pretrained"),
    ({"policy": policies.StraightThrough}, TypeError, r"must have begin\(\) and settings\(\)"),
    ({"policy": None}, TypeError, "got None"),
    ({"epochs": 0}, ValueError, "at least 1, got 0"),
    ({"epochs": 2.0}, ValueError, r"whole number of at least 1, got 2\.0"),
    ({"epochs": True}, ValueError, "got True"),
    (
        {"steps_per_epoch": 0},
        ValueError,
        "steps_per_epoch must be a whole number of at least 1, got 0",
    ),
    ({"steps_per_epoch": 2.5}, ValueError, r"whole number of at least 1, got 2\.5"),
    ({"optimizer": "sgd"}, TypeError, r"must be a torch\.optim\.Optimizer, got 'sgd'"),
    ({"seed": 0.5}, TypeError, "float"),
]


@pytest.mark.parametrize(("options", "kind", "message"), REFUSED)
def test_a_refused_scheduler_leaves_the_model_alone(options, kind, message):
    model = network()
    before = state_of(model)
    policy = {"policy": Scripted(ROW, noise="uniform"), "epochs": 3}
    with pytest.raises(kind, match=message):
        ls.QuantizationScheduler(model, **(policy | options))
    assert_same_state(model, before)
    assert not model._forward_pre_hooks
    assert model[0].weight_quantizer.noise.name == "normal"


def test_a_policy_with_too_few_settings_later_on_is_refused_before_anything_changes():
    class Forgetful(Scripted):
        def settings(self, run, epoch, telemetry, state):
            rows, state = super().settings(run, epoch, telemetry, state)
            return rows[: 2 - epoch], state

    model = network()
    scheduler = ls.QuantizationScheduler(model, Forgetful(ROW), 4)
    before, state = state_of(model), scheduler.state_dict()
    with pytest.raises(ValueError, match="1 settings for 2 layers"):
        scheduler.step()
    assert_same_state(model, before)
    assert_equal(scheduler.state_dict(), state)


def test_a_float_model_is_refused():
    with pytest.raises(ValueError, match=r"call learnsched\.quantize_ first"):
        ls.QuantizationScheduler(nn.Linear(2, 2), policies.StraightThrough(), 2)


def test_a_model_that_is_frozen_already_is_refused_with_the_way_out():
    model = ls.finalize_(network())
    before = state_of(model)
    with pytest.raises(ValueError, match=r"48 of 48 weights of 0 are frozen.*To resume, make the"):
        ls.QuantizationScheduler(model, policies.StraightThrough(), 3)
    assert_same_state(model, before)


def test_activations_alone_can_be_scheduled():
    model = ls.quantize_(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), activation=ls.unsigned(2))
    scheduler = ls.QuantizationScheduler(model, policies.Relaxed(0.3), 2)
    assert float(model[1].forward_std) == pytest.approx(0.3)
    scheduler.step({"train_loss": 1.0})
    assert model[1].forward_std == 0
    scheduler.step({"train_loss": 1.0})
    ls.finalize_(model)
    assert ls.integer_weights(model) == {}


def test_each_layer_gets_its_own_setting():
    class PerLayer(Scripted):
        def settings(self, run, epoch, telemetry, state):
            rows = [Setting(0.1 * (i + 1), fraction=i / 4) for i in range(len(run.layers))]
            return rows, state

    model = network(3)
    ls.QuantizationScheduler(model, PerLayer(()), 3)
    found = [float(layer.weight.weight_quantizer.forward_std) for layer in quantized_layers(model)]
    assert found == pytest.approx([0.1, 0.2, 0.3])
    shares = [layer.weight.weight_quantizer.membership.mean() for layer in quantized_layers(model)]
    assert torch.stack(shares).tolist() == pytest.approx([0, 0.25, 0.5])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_model_can_be_copied_in_the_middle_of_the_first_epoch(duplicate):
    model = network()
    scheduler = ls.QuantizationScheduler(model, learned(), 3)
    model(torch.randn(4, 8))
    twin = duplicate(model)
    twin(torch.randn(4, 8))
    scheduler.step({"train_loss": 1.0})
    assert scheduler.state_dict()["steps_per_epoch"] == 1


def test_the_counter_of_steps_knows_nothing_of_the_scheduler():
    class Unfriendly(policies.StraightThrough):
        def __reduce__(self):
            raise TypeError("cannot be copied")

    model = network(activation=ls.unsigned(2))
    scheduler = ls.QuantizationScheduler(model, Unfriendly(), 3)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    x = torch.randn(4, 8)
    twin(x)
    parameters = dict(model.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(model.eval(), parameters, (x,)).sum()

    assert torch.func.grad(loss)(parameters)["0.weight"].any()
    model.train()(x)
    scheduler.step()
    assert scheduler.state_dict()["steps_per_epoch"] == 1


def test_ranks_that_would_differ_are_warned_of(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.warns(UserWarning, match="not wrapped in DistributedDataParallel yet"):
        ls.QuantizationScheduler(network(), learned(), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # without metrics all ranks have the same settings
        ls.QuantizationScheduler(network(), policies.StraightThrough(), 3)


def test_a_second_scheduler_takes_over_a_free_model():
    model = network()
    ls.QuantizationScheduler(model, policies.Relaxed(noise="uniform"), 2)
    scheduler = ls.QuantizationScheduler(model, policies.StraightThrough(), 2)
    assert model[0].weight_quantizer.noise.name == "normal"
    scheduler.step()
    scheduler.step()
    ls.integer_weights(model)


def test_a_scheduler_whose_place_another_took_is_silent_and_does_not_step():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    first = ls.QuantizationScheduler(
        model, policies.Relaxed(noise="uniform"), 2, steps_per_epoch=2, optimizer=optimizer
    )
    second = ls.QuantizationScheduler(
        model, policies.StraightThrough(), 9, steps_per_epoch=2, optimizer=optimizer
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(8):
            for _ in range(2):
                optimizer.zero_grad()
                model(torch.randn(8, 8)).sum().backward()
                optimizer.step()
            second.step()
    with pytest.raises(RuntimeError, match="another scheduler has been made for this model"):
        first.step()
    assert second.epoch == 8


def test_a_copy_of_model_and_scheduler_goes_on_by_itself():
    model = network()
    scheduler = ls.QuantizationScheduler(model, policies.StraightThrough(), 3)
    _, other = copy.deepcopy((model, scheduler))
    other.step()
    scheduler.step()
    pickled = pickle.loads(pickle.dumps(scheduler))
    pickled.step()
    assert other.epoch == 1 and pickled.epoch == 2 and scheduler.epoch == 1


@pytest.mark.parametrize("mode", ["expectation", "mode"])
def test_a_state_in_mid_run_tells_the_kind_of_noise_without_a_scheduler(mode):
    model, x = network(), torch.randn(32, 8)
    policy = policies.AdditiveNoiseAnnealing(noise="uniform", mode=mode)
    ls.QuantizationScheduler(model, policy, 4)
    fresh = network()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    older = {n: t[:-1] if n.endswith("_extra_state") else t for n, t in model.state_dict().items()}
    network().load_state_dict(older)


def test_uneven_levels_are_warned_of_where_noise_is_to_leave_weights_real():
    for policy in (policies.IncrementalQuantization(4), policies.PiecewiseAffine()):
        with pytest.warns(UserWarning, match=r"those of \['0', '3'\] are further apart elsewhere"):
            ls.QuantizationScheduler(network(weight=ls.power_of_two(4)), policy, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ls.QuantizationScheduler(network(weight=ls.power_of_two(3)), policy, 4)
            ls.QuantizationScheduler(
                network(weight=ls.power_of_two(4)), policies.AdditiveNoiseAnnealing(), 4
            )


def test_a_policy_may_replace_what_it_is_shown():
    class Replacing(policies.StraightThrough):
        def settings(self, run, epoch, telemetry, state):
            given = telemetry.weight_error + 1
            shown = dataclasses.replace(telemetry, weight_error=given)
            assert torch.equal(shown.weight_error, given) and shown.loss is telemetry.loss
            return super().settings(run, epoch, telemetry, state)

    ls.QuantizationScheduler(network(), Replacing(), 2).step()


def test_half_precision_models_are_scheduled_and_finished():
    model = network().to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = ls.QuantizationScheduler(
        model, policies.IncrementalQuantization(5), 4, optimizer=optimizer
    )
    for _ in range(4):
        model(torch.randn(8, 8).to(torch.bfloat16)).sum().backward()
        optimizer.step()
        scheduler.step()
    assert {s.fraction for s in scheduler.get_last_setting()} == {1.0}
    codes = ls.integer_weights(ls.finalize_(model))
    for name, found in codes.items():
        weight = model.get_submodule(name).weight
        assert weight.dtype == torch.bfloat16
        assert torch.equal(found.integers.to(weight.dtype) * found.scale, weight)


def test_history_is_a_schedule():
    scheduler = ls.QuantizationScheduler(network(), policies.IncrementalQuantization(5), 4)
    scheduler.step()
    table = scheduler.history.schedule
    assert table.layers == ("0", "3")
    assert table["fraction"].tolist() == [[0.5, 0.5], [0.75, 0.75]]
    assert scheduler.history.settings[0] == table.settings(0)


@pytest.mark.parametrize("open_loop", [True, False])
def test_weights_are_measured_only_for_policies_that_read_their_error(monkeypatch, open_loop):
    from learnsched.weight_quantizer import WeightQuantizer

    measured = []
    error = WeightQuantizer.error
    monkeypatch.setattr(
        WeightQuantizer, "error", lambda self, w: measured.append(1) or error(self, w)
    )
    for policy in (policies.StraightThrough(), learned(open_loop=open_loop)):
        measured.clear()
        scheduler = ls.QuantizationScheduler(network(), policy, epochs=2, steps_per_epoch=5)
        scheduler.step({"train_loss": 1.0})
    assert bool(measured) is not open_loop
    measured.clear()
    ls.QuantizationScheduler(network(), policies.StraightThrough(), epochs=2)
    assert not measured


def test_a_seed_of_any_size_will_do():
    model = ls.quantize_(nn.Sequential(nn.Linear(4, 4)), ls.ternary())
    policy = policies.IncrementalQuantization(2, partition="random")
    scheduler = ls.QuantizationScheduler(model, policy, epochs=2, seed=2**62 + 2**61)
    scheduler.step()
    assert scheduler.epoch == 1


def test_counts_may_be_numpys():
    scheduler = ls.QuantizationScheduler(
        network(), policies.StraightThrough(), epochs=np.int64(2), steps_per_epoch=np.int32(5)
    )
    state = scheduler.state_dict()
    assert type(state["epochs"]) is int
    assert type(state["steps_per_epoch"]) is int


def test_weights_that_are_not_finite_are_named_at_the_end_of_their_epoch():
    model = network()
    scheduler = ls.QuantizationScheduler(model, policies.StraightThrough(), epochs=3)
    with torch.no_grad():
        model[3].weight[0, 0] = math.nan
    with pytest.warns(UserWarning, match=r"weights of \['3'\] are not finite") as caught:
        scheduler.step()
    assert caught[0].filename == __file__


def test_a_state_is_a_snapshot_and_takes_the_type_of_the_schedulers_own():
    def made():
        return ls.QuantizationScheduler(network(), learned(), epochs=4, steps_per_epoch=2)

    scheduler = made()
    scheduler.step({"train_loss": 1.0})
    state = scheduler.state_dict()
    before = copy.deepcopy(state["policy_state"])
    other = made()
    other.load_state_dict({**state, "policy_state": {k: v.double() for k, v in before.items()}})
    for one in (scheduler, other):
        one.step({"train_loss": 0.5})
    assert_equal(state["policy_state"], before)
    assert scheduler.get_last_setting() == other.get_last_setting()
    broken = {**state, "policy_state": {k: v[:1] for k, v in before.items()}}
    with pytest.raises(ValueError, match="must have the shape"):
        made().load_state_dict(broken)


def test_the_state_of_another_network_of_the_same_shape_is_refused():
    states = [
        ls.QuantizationScheduler(network(), learned(seed), epochs=3, steps_per_epoch=2)
        for seed in (3, 4)
    ]
    with pytest.raises(ValueError, match="this state has policy"):
        states[0].load_state_dict(states[1].state_dict())


def test_a_scheduler_tells_where_it_is():
    scheduler = ls.QuantizationScheduler(network(), policies.StraightThrough(), epochs=3)
    scheduler.step()
    assert repr(scheduler) == "QuantizationScheduler(StraightThrough, epoch 1 of 3, 2 layers)"


def test_an_optimizer_of_two_models_goes_on_when_one_is_finished():
    one, two = network(), network()
    optimizer = torch.optim.SGD([*one.parameters(), *two.parameters()], lr=0.1)
    first = ls.QuantizationScheduler(one, ls.policies.StraightThrough(), 1, optimizer=optimizer)
    second = ls.QuantizationScheduler(two, fractions(0.5, 1.0), 2, optimizer=optimizer)
    optimizer.step()
    first.step()
    second.step()
    ls.finalize_(one)
    ls.remove_quantizers_(one)
    for parameter in two.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    layer = next(m for m in two.modules() if hasattr(m, "weight_quantizer"))
    frozen = layer.weight_quantizer.membership == 1
    assert frozen.any()
    assert torch.equal(layer.weight[frozen], layer.weight_quantizer.held[frozen])


def test_a_state_without_the_models_is_noticed_at_the_next_step():
    scheduler = ls.QuantizationScheduler(network(), fractions(0.25, 0.5, 1.0), 3)
    scheduler.step()
    other = ls.QuantizationScheduler(network(), fractions(0.25, 0.5, 1.0), 3)
    other.load_state_dict(scheduler.state_dict())
    with pytest.warns(UserWarning, match="fewer weights of .* are frozen than .* load the model's"):
        other.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()


class Wrapping(torch.optim.Optimizer):
    """As sharpness-aware minimization: the optimizer within takes the steps."""

    def __init__(self, parameters, lr):
        super().__init__(list(parameters), {"lr": lr})
        self.inner = torch.optim.SGD(self.param_groups, lr=lr)

    def second_step(self):
        self.inner.step()


def test_an_optimizer_that_takes_no_step_of_its_own_is_noticed():
    model = network()
    optimizer = Wrapping(model.parameters(), 0.1)
    scheduler = ls.QuantizationScheduler(model, fractions(0.25, 0.5, 1.0), 3, optimizer=optimizer)
    optimizer.second_step()
    with pytest.warns(UserWarning, match="took no step of its own .* the inner one"):
        scheduler.step()
    model = network()
    optimizer = Wrapping(model.parameters(), 0.1)
    inner = optimizer.inner
    scheduler = ls.QuantizationScheduler(model, fractions(0.25, 0.5, 1.0), 3, optimizer=inner)
    optimizer.second_step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()


class Collecting:
    """Changes the state that it is given, in place, as a policy should not, and then may fail."""

    noise, partition, metrics = "normal", "settled", ()

    def __init__(self, fails_in=None):
        self.fails_in = fails_in

    def __repr__(self):
        return "Collecting()"

    def begin(self, run):
        return {"mean": torch.ones(()), "seen": [torch.zeros(())]}

    def settings(self, run, epoch, telemetry, state):
        state["mean"].mul_(0.5)
        state["seen"].append(torch.full((), float(epoch)))
        return [Setting()] * (len(run.layers) - (epoch == self.fails_in)), state


def test_a_step_that_fails_leaves_the_policys_state():
    scheduler = ls.QuantizationScheduler(network(), Collecting(fails_in=2), 4)
    scheduler.step()
    before = scheduler.state_dict()
    with pytest.raises(ValueError, match="settings"):
        scheduler.step()
    after = scheduler.state_dict()["policy_state"]
    assert torch.equal(after["mean"], before["policy_state"]["mean"])
    assert len(after["seen"]) == len(before["policy_state"]["seen"]) == 3


def test_a_state_shares_nothing_with_its_scheduler():
    scheduler = ls.QuantizationScheduler(network(), Collecting(), 4)
    state = scheduler.state_dict()
    scheduler.step()
    assert len(state["policy_state"]["seen"]) == 2
    scheduler.load_state_dict(state)
    scheduler.step()
    assert len(state["policy_state"]["seen"]) == 2
    assert state["policy_state"]["mean"] == 0.5


def run_of_four_steps():
    """An optimizer, and the scheduler of three epochs of four of its steps."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = ls.QuantizationScheduler(
        model, policies.BaseCurve(), 3, steps_per_epoch=4, optimizer=optimizer
    )
    return optimizer, scheduler


@pytest.mark.parametrize("before", [True, False])
def test_a_learning_rate_that_steps_once_an_epoch_is_warned_of(before):
    optimizer, scheduler = run_of_four_steps()
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, scheduler.learning_rate_factor)
    for _ in range(4):
        optimizer.step()
    if before:
        decay.step()
    with pytest.warns(UserWarning, match=f"took {int(before)} steps in the first epoch") as caught:
        scheduler.step({"train_loss": 1.0})
    assert caught[0].filename == __file__


@pytest.mark.parametrize("used", [True, False])
def test_a_learning_rate_of_ones_own_or_one_that_steps_with_the_optimizer_is_not(used):
    optimizer, scheduler = run_of_four_steps()
    factor = scheduler.learning_rate_factor if used else lambda step: 1.0
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            optimizer.step()
            decay.step()
        scheduler.step({"train_loss": 1.0})


def test_two_optimizers_of_two_parts_take_turns():
    parts = [nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 2)) for _ in range(2)]
    model = ls.quantize_(nn.ModuleList(parts), ls.ternary())
    both = [torch.optim.SGD(half.parameters(), 0.1) for half in model]
    scheduler = ls.QuantizationScheduler(model, fractions(0.5, 1), 2, optimizer=both[0])
    scheduler.watch(both[1])
    x = torch.randn(4, 8)
    before = [half[0].weight.detach().clone() for half in model]
    losses = [half(x).square().mean() for half in model]
    for loss, optimizer in zip(losses, both, strict=True):
        optimizer.zero_grad()
        loss.backward()  # of the second part, after the first has moved
        optimizer.step()
    for half, old in zip(model, before, strict=True):
        frozen = half[0].weight_quantizer.membership > 0
        assert torch.equal(half[0].weight[frozen], half[0].weight_quantizer.held[frozen])
        assert not torch.equal(half[0].weight[~frozen], old[~frozen])


def test_a_model_in_another_epoch_than_its_scheduler_is_warned_of():
    def made():
        torch.manual_seed(0)
        model = ls.quantize_(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), ls.ternary())
        return model, ls.QuantizationScheduler(model, policies.AdditiveNoiseAnnealing(), 10)

    model, scheduler = made()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            scheduler.step()
        model.bfloat16()
        scheduler.step()
    again, other = made()
    again.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="in epoch 0 the model had other noise than its settings"):
        other.step()
    resumed, loaded = made()
    resumed.load_state_dict(model.state_dict())
    loaded.load_state_dict(scheduler.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.step()


@pytest.mark.parametrize("temperature", [None, 0.5])
def test_the_temperature_of_samples_travels_with_the_model(temperature):
    def made():
        torch.manual_seed(0)
        return ls.quantize_(nn.Sequential(nn.Linear(8, 4)), ls.ternary())

    model, again = made(), made()
    if temperature is not None:
        ls.sample_concrete_(model, temperature)
    else:
        ls.sample_concrete_(again, 2.0)
    again.load_state_dict(model.state_dict())
    assert again[0].weight_quantizer.temperature == temperature
    # States of before know no temperature, older ones no kind of noise.
    name = "0.weight_quantizer._extra_state"
    for length in (6, 5):
        older = model.state_dict()
        older[name] = older[name][:length]
        again.load_state_dict(older)
        assert again[0].weight_quantizer.temperature == temperature
