"""The learned policy: its outputs, its base curve, its state and its domain."""

import json
import math
import warnings
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from learnsched.convert import quantize_
from learnsched.layers import quantized_layers
from learnsched.levels import ternary
from learnsched.meta.rollout import following_rollout
from learnsched.meta.tasks import BITS
from learnsched.policies import BaseCurve, BaseCurves, Case, Domain, LearnedPolicy, MetaNetwork
from learnsched.policies.learned import leaky_clamp
from learnsched.pretrained import load_pretrained
from learnsched.schedule import FIELDS, LayerInfo, RunInfo, Telemetry, plan
from learnsched.scheduler import QuantizationScheduler

STDS = [FIELDS.index(f) for f in FIELDS if f.endswith("forward_std")]
BACKWARD = [FIELDS.index(f) for f in FIELDS if f.endswith("backward_std")]
FRACTION = FIELDS.index("fraction")


def run_of(layers, horizon, steps=20, **options):
    infos = tuple(
        LayerInfo(f"layer{i}", 8 * (i + 1), 3 if i else 0, 4 if i % 2 else 0) for i in range(layers)
    )
    return RunInfo(infos, horizon, steps, **options)


def trained(seed=0, spread=1.0, hidden=6, embedding=5, **options):
    """A policy whose every parameter is random."""
    generator = torch.Generator().manual_seed(seed)
    policy = LearnedPolicy(MetaNetwork(hidden, embedding), **options)
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return policy


def telemetry_of(epoch, layers, members=()):
    generator = torch.Generator().manual_seed(epoch)
    loss, trend = torch.rand((2, *members), generator=generator) + 0.2
    return Telemetry(loss, trend, torch.rand((*members, layers), generator=generator))


def rollout(policy, run, members=(), shown=telemetry_of):
    state, rows = policy.initial_state(run, members), []
    for epoch in range(run.horizon):
        shape = shown(epoch, len(run.layers), members)
        row, state = policy.tensors(run, epoch, shape, state)
        rows.append(row)
    return torch.stack(rows)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    layers=st.integers(1, 6),
    horizon=st.integers(1, 25),
    forward=st.floats(0, 1, width=32),
    hard_from=st.floats(0.05, 1),
    backward=st.floats(0.0625, 4, width=32),
    freeze_from=st.floats(0, 0.95),
    seed=st.integers(0, 5),
)
def test_a_fresh_network_is_the_base_curve(
    layers, horizon, forward, hard_from, backward, freeze_from, seed
):
    torch.manual_seed(seed)
    base = BaseCurve(
        forward, forward / 2, hard_from, hard_from / 2, 1.5, backward, 2 * backward, backward / 2, 1.0,
        freeze_from,
    )  # fmt: skip
    found = plan(LearnedPolicy(MetaNetwork(5, 4), base), run_of(layers, horizon), hardened=False)
    columns = [f for f in FIELDS if not f.endswith("mean")]
    for epoch in range(horizon):
        u = 1.0 if horizon == 1 else epoch / (horizon - 1)
        of_weight_std = forward * max(0.0, 1 - u / hard_from) ** 1.5
        of_activation_std = forward / 2 * max(0.0, 1 - 2 * u / hard_from) ** 1.5
        fraction = min(1.0, max(0.0, (u - freeze_from) / (1 - freeze_from)))
        of_weight = backward * 2**u
        of_activation = (backward / 2) ** (1 - u)
        expected = [of_weight_std, of_weight, of_activation_std, of_activation, fraction]
        for column, value in zip(columns, expected, strict=True):
            assert found[column][epoch].tolist() == pytest.approx(
                [value] * layers, rel=1e-6, abs=1e-7
            )
    assert not found["weight_forward_mean"].any()
    assert not found["activation_forward_mean"].any()


@pytest.mark.parametrize(("fan_in", "frozen"), [(5, True), (7, True), (8, False)])
@pytest.mark.parametrize("of", ["curve", "fresh network"])
def test_a_first_layer_of_few_inputs_can_be_frozen_at_once(fan_in, frozen, of):
    layers = tuple(LayerInfo(str(i), n, 3, 4) for i, n in enumerate((fan_in, 3, 3)))
    run = RunInfo(layers, 9, 10, fine_tuning=True)
    free, base = (BaseCurve(freeze_from=0.5, frozen_fan_in=n) for n in (0.0, 7.0))
    usual = plan(free, run).table
    found = plan(base if of == "curve" else LearnedPolicy(MetaNetwork(), base), run)
    expected = torch.ones(9) if frozen else usual[:, 0, FRACTION].float()
    assert found["fraction"][:, 0].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert found["fraction"][:, 1:].flatten().tolist() == pytest.approx(
        usual[:, 1:, FRACTION].flatten().tolist(), abs=1e-6
    )


FOLLOWING = BaseCurve(loss_power=0.5, weight_hard_from=1.0, activation_hard_from=1.0)


@pytest.mark.parametrize(
    ("policy", "follows"),
    [
        (FOLLOWING, True),
        (BaseCurves.everywhere(FOLLOWING), True),
        (LearnedPolicy(MetaNetwork(), FOLLOWING), True),
        (LearnedPolicy(MetaNetwork(), FOLLOWING, open_loop=True), False),
        (replace(FOLLOWING, loss_power=0.0), False),
        (replace(FOLLOWING, loss_from=140.0), True),
    ],
    ids=["curve", "curves", "network", "open loop", "power 0", "long enough"],
)
def test_forward_noise_follows_the_loss(policy, follows):
    run = run_of(3, 7)
    assert policy.metrics == (("train_loss",) if follows else ())
    state = policy.begin(run)
    losses, gains = (1.0, 0.81, 0.25, 2.0, math.nan, 0.0), (1.0, 0.9, 0.5, 1.0, 1.0, 0.0)
    for epoch, (loss, gain) in enumerate(zip(losses, gains, strict=True)):
        telemetry = Telemetry(torch.tensor(loss), torch.tensor(1.0), torch.full((3,), 0.5))
        with warnings.catch_warnings(action="ignore"):
            found, state = policy.settings(run, epoch, telemetry, state)
        expected = torch.tensor(plan(FOLLOWING, run).table[epoch].tolist())
        expected[:, STDS] *= gain if follows else 1.0
        torch.testing.assert_close(torch.tensor([astuple(row) for row in found]), expected)


@pytest.mark.parametrize("network", [True, False])
@pytest.mark.parametrize("steps", [20, None])
def test_short_runs_and_those_of_unknown_length_do_not_follow_the_loss(steps, network):
    curve, run = replace(FOLLOWING, loss_from=141.0), run_of(3, 7, steps)
    policy = LearnedPolicy(MetaNetwork(), curve) if network else curve
    low = Telemetry(torch.tensor(0.1), torch.tensor(1.0), torch.full((3,), 0.5))
    found, _ = policy.settings(run, 3, low, policy.begin(run))
    torch.testing.assert_close(
        torch.tensor([astuple(row) for row in found]), plan(curve, run).table[3].float()
    )


def test_members_follow_their_own_loss():
    table = torch.rand(2, 3, 4, len(FIELDS), generator=torch.Generator().manual_seed(0))
    rollout = following_rollout(table, torch.tensor([0.5, 2.0, 0.0]))
    loss = torch.tensor([0.25, 0.5, 0.1])
    found = rollout(1, Telemetry(loss, torch.ones(3), torch.ones(3, 4)))
    expected = table[1].clone()
    expected[..., STDS] *= torch.tensor([0.5, 0.25, 1.0]).view(3, 1, 1)
    torch.testing.assert_close(found, expected)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.3, 1.0, 10.0, 1000.0]),
    layers=st.integers(1, 5),
    horizon=st.integers(1, 12),
)
def test_outputs_stay_in_their_ranges_whatever_the_network(seed, spread, layers, horizon):
    policy = trained(seed, spread)
    found = rollout(policy, run_of(layers, horizon)).detach()
    assert found.shape == (horizon, layers, len(FIELDS))
    assert found.isfinite().all()
    assert ((found[..., STDS] >= 0) & (found[..., STDS] <= 1)).all()
    run = run_of(layers, horizon)
    rows = torch.tensor([BaseCurve().at(run.progress(epoch)) for epoch in range(horizon)])
    ratio = found[..., BACKWARD] / rows[:, None, [1, 3]]
    assert ((ratio >= 1 / 6.001) & (ratio <= 6.001)).all()
    fraction = found[..., FRACTION]
    assert ((fraction >= 0) & (fraction <= 1)).all()
    assert (fraction.diff(dim=0) >= 0).all()


def test_extreme_telemetry_cannot_break_the_outputs():
    def shown(epoch, layers, members):
        bad = [0.0, math.inf, math.nan, -1.0, 1e30][epoch % 5]
        return Telemetry(torch.tensor(bad), torch.tensor(bad), torch.full((layers,), bad))

    assert rollout(trained(), run_of(3, 10), shown=shown).isfinite().all()


def test_a_forward_std_of_exactly_0_is_reached_early_and_left_again():
    policy, run = LearnedPolicy(MetaNetwork(4, 4), BaseCurve(0.3, 0.3, 1.0, 1.0)), run_of(2, 9)
    state, shown = policy.initial_state(run), telemetry_of(0, 2)
    found = []
    for epoch in range(8):
        with torch.no_grad():
            policy.network.out.bias[0] = -2.0 if epoch in (2, 3, 4) else 0.0
        (setting, _), state = policy.settings(run, epoch, shown, state)
        found.append(setting.weight_forward_std)
        on_its_own = setting.activation_forward_std
        assert on_its_own == pytest.approx(0.3 * (1 - epoch / 8))
    assert [f == 0 for f in found] == [False, False, True, True, True, False, False, False]


def test_a_forward_std_at_0_still_learns():
    policy, run = LearnedPolicy(MetaNetwork(4, 4)), run_of(2, 9)
    with torch.no_grad():
        policy.network.out.bias[0] = -1.0
    row, _ = policy.tensors(run, 0, telemetry_of(0, 2), policy.initial_state(run))
    assert not row[:, STDS[0]].any()
    (grad,) = torch.autograd.grad(row[:, STDS[0]].sum(), policy.network.out.bias)
    assert grad[0] == pytest.approx(0.3 * 2 * (1 - math.tanh(1) ** 2), rel=1e-5)


@pytest.mark.parametrize(
    ("x", "value", "slope"),
    [(-0.5, 0.0, 0.3), (0.0, 0.0, 0.3), (0.4, 0.4, 1.0), (1.0, 1.0, 0.3), (1.5, 1.0, 0.3)],
)
def test_leaky_clamp_leaks_its_gradient(x, value, slope):
    x = torch.tensor(x, requires_grad=True)
    y = leaky_clamp(x)
    assert float(y.detach()) == pytest.approx(value)
    y.backward()
    assert float(x.grad) == pytest.approx(slope)


def test_gradients_reach_the_whole_network_through_time():
    policy = trained(spread=0.5)
    table = rollout(policy, run_of(3, 4))
    table[-1, :, BACKWARD].sum().backward()
    for name, parameter in policy.network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0, name


def test_settings_are_the_tensors_as_numbers():
    policy, run = trained(), run_of(3, 4)
    state, shown = policy.initial_state(run), telemetry_of(1, 3)
    table, after = policy.tensors(run, 1, shown, state)
    found, also = policy.settings(run, 1, shown, state)
    assert [[getattr(s, f) for f in FIELDS] for s in found] == table.double().tolist()
    assert after.keys() == also.keys()
    assert all(torch.equal(after[k], also[k]) for k in after)
    assert not any(t.requires_grad for t in also.values())


def test_an_open_loop_ignores_telemetry_and_a_closed_one_does_not():
    run = run_of(3, 5)

    def other(epoch, layers, members):
        return telemetry_of(epoch + 100, layers, members)

    for open_loop in (True, False):
        policy = trained(open_loop=open_loop)
        same = torch.equal(rollout(policy, run), rollout(policy, run, shown=other))
        assert same is open_loop
        assert policy.metrics == (() if open_loop else ("train_loss",))


def test_shared_noise_is_the_same_in_all_layers_and_fractions_are_not():
    run = run_of(3, 5)
    apart, shared = (rollout(trained(shared_noise=s), run) for s in (False, True))
    noise = [i for i, name in enumerate(FIELDS) if name.endswith("std")]
    fraction = FIELDS.index("fraction")
    assert (shared[..., noise] == shared[..., :1, noise]).all()
    assert not (apart[..., noise] == apart[..., :1, noise]).all()
    assert not (shared[..., fraction] == shared[..., :1, fraction]).all()
    # Backward noise is a factor on the base curve, whose mean over layers is geometric.
    backward = FIELDS.index("weight_backward_std")
    first = apart[0, ..., backward].log().mean(-1).exp()
    torch.testing.assert_close(shared[0, ..., 0, backward], first)


@pytest.mark.parametrize("offset", [0.05, 0.4, -0.3])
def test_what_is_added_to_the_fraction_moves_the_start_of_freezing(offset):
    base = BaseCurve(freeze_from=0.5)
    network = MetaNetwork(hidden=4, embedding=3)
    network.out.bias.data[4] = math.atanh(offset)
    run = run_of(2, 21)
    progress = torch.tensor([run.progress(epoch) for epoch in range(21)])
    line = (progress - 0.5) / 0.5
    for moved, expected in (
        (True, (line + offset).clamp(0, 1)),
        (False, (line.clamp(min=0) + offset).clamp(0, 1)),
    ):
        policy = LearnedPolicy(network, base, moved_start=moved)
        found = rollout(policy, run)[..., FIELDS.index("fraction")]
        torch.testing.assert_close(found, expected.unsqueeze(1).expand(21, 2))


def test_the_curve_itself_freezes_nothing_before_its_start():
    run = run_of(2, 8)
    base = BaseCurve(freeze_from=0.5)
    plain, moved = (LearnedPolicy(MetaNetwork(), base, moved_start=m) for m in (False, True))
    assert torch.equal(rollout(plain, run), rollout(moved, run))
    assert (plan(base, run)["fraction"] >= 0).all()


def test_stacked_members_equal_separate_runs():
    policy, run = trained(), run_of(4, 5)
    stacked = rollout(policy, run, (3,))
    for member in range(3):

        def shown(epoch, layers, _, member=member):
            both = telemetry_of(epoch, layers, (3,))
            return Telemetry(both.loss[member], both.loss_trend[member], both.weight_error[member])

        torch.testing.assert_close(stacked[:, member], rollout(policy, run, shown=shown))


def test_two_levels_of_members_work_as_one():
    policy, run = trained(), run_of(2, 3)
    flat = rollout(policy, run, (6,))

    def shown(epoch, layers, members):
        one = telemetry_of(epoch, layers, (6,))
        return Telemetry(
            one.loss.view(2, 3), one.loss_trend.view(2, 3), one.weight_error.view(2, 3, layers)
        )

    torch.testing.assert_close(rollout(policy, run, (2, 3), shown).flatten(1, 2), flat)


def test_layers_are_told_apart_by_what_they_are_and_not_by_their_place_in_memory():
    network = trained().network
    features = torch.randn(5, network.embed.in_features)
    state = torch.randn(5, network.hidden)
    order = torch.tensor([3, 0, 4, 1, 2])
    raw, after = network(features, state)
    permuted, permuted_after = network(features[order], state[order])
    torch.testing.assert_close(permuted, raw[order])
    torch.testing.assert_close(permuted_after, after[order])
    other, _ = network(torch.cat([features[:4], features[4:] + 5]), state)
    assert not torch.allclose(other[:4], raw[:4])  # every layer sees the others


def test_a_policy_sees_the_clock_the_depth_and_the_regime():
    policy = trained(open_loop=True)
    reference = rollout(policy, run_of(3, 6, 20))
    for other in (run_of(3, 6, 40), run_of(3, 6, 20, fine_tuning=True)):
        assert not torch.equal(rollout(policy, other), reference)
    assert not torch.equal(rollout(policy, run_of(4, 6, 20))[:, :3], reference)
    assert not torch.equal(rollout(policy, run_of(3, 7, 20))[:6], reference)


DOMAIN = Domain(horizon=(6, 20), steps=(100, 400), depth=(3, 5), fan_in=(5, 600))


def layers_of(*fan_ins):
    return tuple(LayerInfo(str(i), f, 3, 4) for i, f in enumerate(fan_ins))


@pytest.mark.parametrize(
    ("run", "named"),
    [
        (RunInfo(layers_of(10, 20, 30), 10, 20), None),
        (RunInfo(layers_of(3, 20, 1200), 40, 20), None),  # a factor of two is let pass
        (RunInfo(layers_of(10, 20, 30), 41, 10), r"horizon \(epochs\) 41 \(seen 6 to 20\)"),
        (RunInfo(layers_of(10, 20, 30), 2, 100), r"horizon \(epochs\) 2"),
        (RunInfo(layers_of(10, 20, 30), 10, 81), r"optimizer steps 810 \(seen 100 to 400\)"),
        (RunInfo(layers_of(10, 20, 30), 10, None), None),
        (RunInfo(layers_of(10), 10, 20), r"depth \(layers\) 1 \(seen 3 to 5\)"),
        (RunInfo(layers_of(10, 20, 1201), 10, 20), r"fan-in 10 to 1201 \(seen 5 to 600\)"),
        (RunInfo(layers_of(2, 20, 30), 10, 20), r"fan-in 2 to 30"),
        (RunInfo(layers_of(0, 20, 0), 10, 20), None),  # activations alone have no fan-in
        (RunInfo(layers_of(0, 0, 0), 10, 20), None),
        (RunInfo(layers_of(10), 100, 20), r"horizon.*depth.*optimizer steps.*clipped"),
    ],
)
def test_a_run_outside_of_the_domain_is_named(run, named):
    policy = LearnedPolicy(MetaNetwork(4, 4), domain=DOMAIN)
    if named is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            policy.begin(run)
    else:
        with pytest.warns(UserWarning, match=named):
            policy.begin(run)


def weights_of(levels, activations=4):
    return RunInfo(
        (LayerInfo("a", 9, levels, activations), LayerInfo("b", 72, levels, activations),
         LayerInfo("c", 128, levels, 0)), 12, 20,
    )  # fmt: skip


@pytest.mark.parametrize("levels", [7, 16, 256])
def test_levels_of_weights_far_from_those_seen_are_named_and_clipped(levels):
    policy = trained(open_loop=True, domain=Domain(weight_levels=(3, 3)))
    with pytest.warns(UserWarning, match=rf"weight levels {levels} \(seen 3 to 3\).*clipped"):
        policy.begin(weights_of(levels))
    assert torch.equal(rollout(policy, weights_of(levels)), rollout(policy, weights_of(3)))
    real = replace(weights_of(levels), layers=(LayerInfo("a", 9, 0, 4),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.begin(real)  # nothing to clip


def test_the_shipped_schedule_has_seen_ternary_weights():
    policy = load_pretrained("default")
    assert policy.domain.weight_levels == (3, 3)
    with pytest.warns(UserWarning, match=r"weight levels 256 \(seen 3 to 3\)"):
        sixteen = plan(policy, weights_of(256)).table
    assert torch.equal(sixteen, plan(policy, weights_of(3)).table)


# Sums of all settings of the run below, from scratch and in fine-tuning, of the schedule that is
# shipped: a change of it should be meant.
SUMS = {
    "ternary/2-bit": (99.55006, 99.74893), "ternary/ternary": (92.49594, 92.49594),
    "binary/binary": (75.24713, 81.79258), "binary/2-bit": (97.82059, 98.01464),
    "ternary/real": (91.15744, 94.6464), "binary/real": (91.15744, 94.6464),
}  # fmt: skip


@pytest.mark.parametrize("bits", BITS)
def test_settings_for_the_level_sets_of_tasks_are_what_they_were(bits):
    weight, activation = BITS[bits]
    run = weights_of(len(weight.values), len(activation.values) if activation else 0)
    policy = load_pretrained("default")
    found = []
    for fine_tuning in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found.append(plan(policy, replace(run, fine_tuning=fine_tuning)).table.sum().item())
    assert found == pytest.approx(SUMS[bits], abs=1e-3)


@pytest.mark.filterwarnings("ignore:outside of what")
def test_inputs_beyond_the_domain_are_clipped_to_it():
    policy = trained(open_loop=True, domain=DOMAIN)
    at_edge = RunInfo(layers_of(600, 600, 600), 20, 20)
    beyond = RunInfo(layers_of(5000, 9000, 600), 20, 999)
    assert torch.equal(rollout(policy, at_edge), rollout(policy, beyond))


@pytest.mark.parametrize("levels", [2, 3, 16])
def test_beyond_the_levels_of_its_domain_the_policy_is_its_base_curve(levels):
    base = BaseCurve(0.25, 0.5, freeze_from=0.75)
    domain = replace(DOMAIN, activation_levels=(4, 4))
    policy = trained(base=base, domain=domain)
    fresh = LearnedPolicy(MetaNetwork(), base, domain)

    def run(count):
        # A layer whose activations stay real says nothing of their levels.
        layers = (
            LayerInfo("a", 10, 3, count),
            LayerInfo("b", 20, 3, count),
            LayerInfo("c", 9, 3, 0),
        )
        return RunInfo(layers, 6, 20)

    assert torch.equal(rollout(policy, run(levels)), rollout(fresh, run(levels)))
    assert not torch.equal(rollout(policy, run(4)), rollout(fresh, run(4)))


@pytest.mark.parametrize("choice", ["shared_noise", "moved_start"])
@pytest.mark.parametrize("chosen", [True, False])
@pytest.mark.parametrize("open_loop", [True, False])
def test_the_configuration_goes_through_json(open_loop, choice, chosen):
    base = BaseCurve(0.25, 0.5, freeze_from=0.75, hard_tilt=0.2)
    options = {"open_loop": open_loop, choice: chosen}
    policy = trained(hidden=7, embedding=3, base=base, domain=DOMAIN, **options)
    twin = LearnedPolicy.from_config(json.loads(json.dumps(policy.config())))
    assert twin.config() == policy.config()
    assert twin.base == BaseCurves.everywhere(base)
    assert twin.domain == DOMAIN
    assert (twin.open_loop, getattr(twin, choice)) == (open_loop, chosen)
    old = {k: v for k, v in policy.config().items() if k != choice}
    assert getattr(LearnedPolicy.from_config(old), choice) is False
    assert repr(twin) != repr(policy)  # of another network
    twin.network.load_state_dict(policy.network.state_dict())
    assert repr(twin) == repr(policy)
    run = run_of(3, 4)
    assert torch.equal(rollout(twin, run), rollout(policy, run))


@pytest.mark.parametrize(
    "numbers",
    [
        {"weight_forward_std": -0.1},
        {"activation_forward_std": 1.1},
        {"weight_hard_from": 0.0},
        {"activation_hard_from": 1.5},
        {"power": 0.0},
        {"hard_tilt": 1.5},
        {"weight_backward_tilt": math.nan},
        {"weight_backward_std": 0.0},
        {"activation_backward_std": math.inf},
        {"weight_backward_end": -1.0},
        {"activation_backward_end": 0.0},
        {"weight_backward_std": math.nan},
        {"freeze_from": 1.0},
        {"freeze_from": -0.5},
        {"frozen_fan_in": -1.0},
        {"frozen_fan_in": math.inf},
        {"frozen_fan_in": math.nan},
        {"warm_until": -0.1},
        {"warm_until": 1.0},
        {"warm_until": math.nan},
        {"loss_power": -0.5},
        {"loss_power": 5.0},
        {"loss_power": math.nan},
        {"loss_from": -1.0},
        {"loss_from": math.nan},
    ],
)
def test_impossible_base_curves_are_refused(numbers):
    (name,) = numbers
    with pytest.raises(ValueError, match=rf"{name} must lie in [\[(].*[\])], got"):
        BaseCurve(**numbers)


@pytest.mark.parametrize("seen", [(0, 5), (5, 4), (-1, 3), (1, math.inf), (math.nan, 3)])
def test_impossible_domains_are_refused(seen):
    with pytest.raises(ValueError, match="depth must go from a positive number up"):
        Domain(depth=seen)


def test_the_network_is_small():
    assert sum(p.numel() for p in MetaNetwork().parameters()) < 10_000


CURVES = BaseCurves((
    Case(3, 4, False, BaseCurve(power=0.5)), Case(3, 4, True, BaseCurve(power=0.6)),
    Case(3, 3, True, BaseCurve(power=0.7)), Case(2, 2, False, BaseCurve(power=0.8)),
    Case(2, 2, True, BaseCurve(power=0.9)),
))  # fmt: skip


@pytest.mark.parametrize(
    ("weight", "activation", "fine_tuning", "expected"),
    [
        (3, 4, False, 0.5),
        (3, 4, True, 0.6),
        (3, 3, False, 0.7),  # levels come before the regime
        (2, 2, False, 0.8),
        (2, 2, True, 0.9),
        (3, 256, True, 0.6),
        (2, 256, False, 0.5),
        (3, 2, True, 0.7),  # as near to 3 and 3 levels as to 2 and 2: the first
        (3, 2, False, 0.8),  # the same, but of this regime
        (0, 3, False, 0.7),
        (0, 0, True, 0.6),  # nothing is known: the regime decides
    ],
)
def test_a_run_gets_the_curve_of_the_nearest_case(weight, activation, fine_tuning, expected):
    layers = (
        LayerInfo("first", 9, weight, activation), LayerInfo("middle", 9, weight, activation),
        LayerInfo("last", 9, weight, 0),
    )  # fmt: skip
    run = RunInfo(layers, 4, 10, fine_tuning)
    assert CURVES.nearest(run).power == expected
    fresh = LearnedPolicy(MetaNetwork(4, 3), CURVES)
    alone = LearnedPolicy(MetaNetwork(4, 3), CURVES.nearest(run))
    assert torch.equal(rollout(fresh, run), rollout(alone, run))
    own = plan(CURVES, run)
    assert torch.equal(own.table, plan(CURVES.nearest(run), run).table)


@pytest.mark.parametrize(
    ("weight", "activation", "expected"),
    [(3, 0, 2.0), (2, 0, 2.0), (3, 256, 2.0), (3, 64, 2.0), (3, 16, 1.0), (3, 4, 1.0)],
)
def test_real_activations_have_a_case_of_their_own(weight, activation, expected):
    real = Case(3, 0, False, BaseCurve(power=2.0))
    curves = BaseCurves((Case(3, 4, False, BaseCurve(power=1.0)), real))
    run = RunInfo(
        (LayerInfo("first", 9, weight, activation), LayerInfo("last", 9, weight, 0)), 4, 10
    )
    assert curves.nearest(run).power == expected
    assert BaseCurves.from_config(json.loads(json.dumps(curves.config()))) == curves


@pytest.mark.parametrize(
    ("dims", "activation", "fine_tuning", "expected"),
    [
        ((1, 0), 3, False, 3.0),
        ((2, 2), 3, False, 2.0),
        ((0, 1), 3, False, 1.0),  # the first weight counts
        ((3, 1), 3, False, 1.0),
        ((None, 1), 3, False, 3.0),  # if it stays real, the first that is quantized
        ((None, None), 3, False, 1.0),
        ((1, 0), 3, True, 0.5),  # the regime comes before the dimensions
        ((1, 0), 4, False, 0.7),  # and the levels before the regime
    ],
)
def test_dimensions_of_the_first_weight_tell_cases_apart(dims, activation, fine_tuning, expected):
    curves = BaseCurves((
        Case(3, 4, False, BaseCurve(power=0.7)),
        Case(3, 3, False, BaseCurve(power=3.0), spatial_dims=1),
        Case(3, 3, False, BaseCurve(power=1.0)),
        Case(3, 3, False, BaseCurve(power=2.0), spatial_dims=2),
        Case(3, 3, True, BaseCurve(power=0.5)),
    ))  # fmt: skip
    layers = tuple(
        LayerInfo("real", 0, 0, activation) if d is None else LayerInfo(str(d), 9, 3, activation, d)
        for d in dims
    )
    assert curves.nearest(RunInfo(layers, 4, 10, fine_tuning)).power == expected
    assert BaseCurves.from_config(json.loads(json.dumps(curves.config()))) == curves
    named = ["spatial_dims" in case for case in curves.config()]
    assert named == [False, True, False, True, False]  # as artefacts without it have it


@pytest.mark.parametrize("dims", [-1, 4, 1.5])
def test_dimensions_that_no_weight_has_are_refused(dims):
    with pytest.raises(ValueError, match="slide along 0 to 3 dimensions"):
        Case(3, 3, False, BaseCurve(), dims)


def test_layers_tell_along_how_many_dimensions_their_weights_slide():
    model = nn.Sequential(
        nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2), nn.ReLU(), nn.Unflatten(2, (2, 3)), nn.Conv2d(2, 2, 1),
        nn.BatchNorm2d(2), nn.ReLU(), nn.ConvTranspose2d(2, 2, 2), nn.Flatten(), nn.Linear(24, 2),
    )  # fmt: skip
    quantize_(model, ternary(), ternary())
    assert [layer.info.spatial_dims for layer in quantized_layers(model)] == [1, 2, 2, 0]


def test_networks_whose_activations_are_all_real_are_another_domain():
    real = RunInfo((LayerInfo("first", 9, 3, 0), LayerInfo("last", 9, 3, 0)), 4, 10)
    ends = RunInfo((LayerInfo("first", 9, 3, 4), LayerInfo("last", 9, 3, 0)), 4, 10)
    two_bit = Domain(activation_levels=(4, 4))
    assert [two_bit.has_seen_levels(run) for run in (real, ends)] == [False, True]
    assert Domain(activation_levels=(4, 256)).has_seen_levels(real)
    policy = trained()
    policy.domain = two_bit
    base = LearnedPolicy(MetaNetwork(), policy.base)
    assert torch.equal(rollout(policy, real), rollout(base, real))
    assert not torch.equal(rollout(policy, ends), rollout(base, ends))


def test_base_curves_go_through_json_and_are_not_empty():
    assert BaseCurves.from_config(json.loads(json.dumps(CURVES.config()))) == CURVES
    with pytest.raises(ValueError, match="at least one case"):
        BaseCurves(())
    with pytest.raises(ValueError, match="2 to 65536 levels"):
        Case(3, 1, False, BaseCurve())


@pytest.mark.parametrize("ratio", [-0.5, 0.0, 6.0])
def test_a_loss_that_meta_training_has_not_seen_is_named_and_clipped(ratio):
    policy, run = trained(), run_of(2, 6)
    state = policy.initial_state(run)

    def settings_at(loss):
        telemetry = Telemetry(torch.tensor(loss), torch.tensor(1.0), torch.full((2,), 0.5))
        return policy.settings(run, 2, telemetry, state)[0]

    with pytest.warns(UserWarning, match="the training loss has fallen to zero or below, or has"):
        unusual = settings_at(ratio)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        usual = settings_at(3.0 if ratio > 1 else 1e-4)  # both clipped alike
    assert unusual == usual


def test_a_policy_without_telemetry_does_not_mind_the_loss():
    policy, run = trained(open_loop=True), run_of(2, 6)
    telemetry = Telemetry(torch.tensor(-9.0), torch.tensor(1.0), torch.full((2,), 0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.settings(run, 2, telemetry, policy.initial_state(run))


def test_nothing_is_said_to_be_clipped_where_the_network_is_not_used():
    layers = (LayerInfo("first", 9, 3, 0), LayerInfo("last", 9, 3, 0))
    policy = LearnedPolicy(MetaNetwork(), domain=Domain(horizon=(2, 4), activation_levels=(4, 4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.begin(RunInfo(layers, 900, 10))
    with pytest.warns(UserWarning, match="horizon"):
        policy.begin(RunInfo((LayerInfo("first", 9, 3, 4), layers[1]), 900, 10))


def test_a_first_layer_that_stays_real_is_not_frozen_by_its_fan_in():
    for smallest in (0.0, 7.0):
        assert BaseCurve(frozen_fan_in=smallest).at(0.0, 0.0, 0)[4] <= 0.0
    assert BaseCurve(frozen_fan_in=7.0).at(0.0, 0.0, 5)[4] == 1.0


def test_warnings_name_the_line_of_the_user():
    model = quantize_(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), ternary())
    policy = LearnedPolicy(MetaNetwork(), domain=Domain(horizon=(2, 4)))
    with pytest.warns(UserWarning) as told:
        scheduler = QuantizationScheduler(model, policy, epochs=20, steps_per_epoch=5)
        scheduler.step(metrics={"train_loss": 1.0})
        scheduler.step(metrics={"train_loss": 100.0})
    horizon, loss = (
        [w for w in told if words in str(w.message)] for words in ("horizon", "training loss")
    )
    assert [Path(w.filename).name for w in horizon + loss] == [Path(__file__).name] * 2


def test_what_a_policy_is_shown_of_its_own_outputs_carries_no_gradient():
    """As if the outputs of the epoch before were numbers; other state goes on in the graph."""
    policy, run = trained(spread=0.5), run_of(3, 6)
    parameters = list(policy.network.parameters())
    with torch.no_grad():
        numbers, state = [], policy.initial_state(run)
        for epoch in range(4):
            numbers.append(state["outputs"].clone())
            _, state = policy.tensors(run, epoch, telemetry_of(epoch, 3), state)

    def gradient(replayed):
        state = policy.initial_state(run)
        for epoch in range(4):
            if replayed:
                state = {**state, "outputs": numbers[epoch]}
            row, state = policy.tensors(run, epoch, telemetry_of(epoch, 3), state)
        assert state["hidden"].requires_grad and state["fraction"].requires_grad
        assert not state["outputs"].requires_grad
        return torch.autograd.grad(row[:, STDS + BACKWARD].sum(), parameters)

    for found, expected in zip(gradient(False), gradient(True), strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected)
