"""Learned scales and noise: their gradients, checkpoints, training, and populations."""

import copy
import math
import warnings
from dataclasses import replace

import pytest
import torch
from small_task import SMALL
from torch import nn

import learnsched as ls
from learnsched.data import load
from learnsched.layers import quantized_layers
from learnsched.meta.rollout import run_forward, table_rollout
from learnsched.policies import RelaxedQuantization
from learnsched.schedule import plan


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.PReLU(), nn.Linear(5, 3)
    )


def quantized(**options):
    return ls.quantize_(network(), ls.ternary(), ls.unsigned(2), **options)


def finite_difference(total, parameter):
    with torch.no_grad():
        values = []
        for change in (1e-6, -1e-6):
            parameter.add_(change)
            values.append(float(total()))
            parameter.sub_(change)
    return (values[0] - values[1]) / 2e-6


def trained_population(prepare, horizon):
    """What two members and the first alone have learned, by the end of the parameter's name."""
    task = replace(SMALL, horizon=horizon, learning_rates=(0.01, 0.03))
    found = []
    for members in (2, 1):
        few = replace(task, learning_rates=task.learning_rates[:members])
        inner = few.build(load("digits"), prepare=prepare)
        table = plan(RelaxedQuantization(), inner.run).table.float().unsqueeze(1)
        with torch.no_grad():
            rollout = table_rollout(table.expand(-1, members, -1, -1))
            state, _, losses = run_forward(inner, rollout)
        assert bool(torch.stack(losses).isfinite().all())
        names = [name for name, _ in inner.population.named_parameters()]
        found.append(dict(zip(names, state.tensors, strict=False)))
    return found


def check_that_each_member_learned_its_own(prepare, horizon, ending, shapes):
    both, alone = trained_population(prepare, horizon)
    learned = [name for name in both if name.endswith(ending)]
    assert [tuple(both[name].shape) for name in learned] == shapes
    for name in learned:
        assert both[name].isfinite().all()
        assert (both[name][0] != both[name][1]).any()
        torch.testing.assert_close(both[name][:1], alone[name])


def train(model):
    """Three epochs of five steps under relaxed quantization, then hard; returns the data."""
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    scheduler = ls.QuantizationScheduler(
        model, ls.policies.RelaxedQuantization(), epochs=3, optimizer=optimizer
    )
    x = torch.randn(64, 8)
    for _ in range(3):
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
            optimizer.step()
        scheduler.step()
    ls.finalize_(model, [x])
    return x


@pytest.mark.parametrize("std", [0.15, 0.6])
def test_the_gradient_is_that_of_finite_differences(std):
    model = ls.quantize_(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), None, ls.unsigned(2)).double()
    [scale] = ls.learn_scales_(model)
    [activation] = quantized_layers(model)[0].activations
    for buffer in (activation.forward_std, activation.backward_std):
        buffer.fill_(std)  # the same noise both ways: the gradient is the value's derivative
    x = torch.randn(200, generator=torch.Generator().manual_seed(1), dtype=torch.double)

    def total():
        return (activation(x) ** 2).sum()

    (found,) = torch.autograd.grad(total(), scale)
    assert float(found) == pytest.approx(finite_difference(total, scale), rel=1e-6)


def test_of_a_hard_quantizer_it_is_the_rounding_error_and_the_outermost_level():
    model = ls.quantize_(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), None, ls.unsigned(2))
    [scale] = ls.learn_scales_(model)
    [activation] = quantized_layers(model)[0].activations
    activation.noise = ls.annealed.noise_shape("uniform")
    activation.backward_std.fill_(1 / 12**0.5)  # one step wide: the clipped identity
    with torch.no_grad():
        scale.fill_(0.5)
    x = torch.tensor([0.6, 1.3, 4.0])
    (found,) = torch.autograd.grad(activation(x).sum(), scale)
    # levels minus entries inside, level 3 beyond (LSQ, equation 3)
    assert float(found) == pytest.approx((1 - 1.2) + (3 - 2.6) + 3, abs=1e-5)


def test_parameters_are_one_for_each_activation_and_the_second_call_finds_the_same():
    model = quantized()
    learned = ls.learn_scales_(model)
    assert len(learned) == 2
    assert all(a is b for a, b in zip(learned, ls.learn_scales_(model), strict=True))
    assert {id(p) for p in learned} <= {id(p) for p in model.parameters()}


def test_without_quantized_activations_there_is_nothing_to_learn():
    with pytest.raises(ValueError, match="no quantized activations"):
        ls.learn_scales_(ls.quantize_(network(), ls.ternary()))


def test_checkpoints_keep_their_names_and_float_ones_still_load():
    model, plain = quantized(), quantized()
    ls.learn_scales_(model)
    bounds = {"2.lowest_scale", "4.lowest_scale"}
    assert model.state_dict().keys() - bounds == plain.state_dict().keys()
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())
    model.load_state_dict(network(1).state_dict())
    copied = copy.deepcopy(model)
    assert len(ls.learn_scales_(copied)) == 2


def test_scales_are_trained_and_the_network_is_finalized():
    model = quantized()
    learned = ls.learn_scales_(model)
    before = [scale.item() for scale in learned]
    train(model)
    assert all(scale.item() != old for scale, old in zip(learned, before, strict=True))


def test_a_population_learns_a_scale_for_each_member():
    check_that_each_member_learned_its_own(ls.learn_scales_, 2, "scale", [(2,)] * 2)


def test_the_gradient_of_a_weight_scale_is_that_of_finite_differences():
    model = ls.quantize_(nn.Sequential(nn.Linear(40, 3)), ls.ternary()).double()
    [log_scale] = ls.learn_weight_scales_(model)
    quantizer, weight = model[0].weight_quantizer, model[0].weight
    for buffer in (quantizer.forward_std, quantizer.backward_std):
        buffer.fill_(0.3)

    def total():
        return (quantizer(weight) ** 3).sum()

    (found,) = torch.autograd.grad(total(), log_scale)
    for channel in range(3):
        one = log_scale.detach()[channel]
        assert float(found[channel]) == pytest.approx(finite_difference(total, one), rel=1e-5)


def test_weight_scales_start_as_the_rules_and_are_kept_from_the_first_frozen_weight():
    model, plain = quantized(), quantized()
    learned = ls.learn_weight_scales_(model)
    assert [tuple(p.shape) for p in learned] == [(6, 1), (5, 1), (3, 1)]
    assert all(a is b for a, b in zip(learned, ls.learn_weight_scales_(model), strict=True))
    x = torch.randn(16, 8)
    assert torch.equal(model(x), plain(x))
    quantizer, weight = model[0].weight_quantizer, model[0].weight
    with torch.no_grad():
        learned[0].fill_(0.5)
    assert torch.allclose(
        quantizer.scale(weight), plain[0].weight_quantizer.scale(weight) * torch.e**0.5
    )
    quantizer.freeze_(weight, 1.0, "magnitude")
    scale = quantizer.scale(weight).clone()
    with torch.no_grad():
        learned[0].fill_(0.9)
    assert torch.equal(quantizer.scale(weight), scale)


def test_without_quantized_weights_there_is_no_weight_scale_to_learn():
    with pytest.raises(ValueError, match="no quantized weights"):
        ls.learn_weight_scales_(ls.quantize_(network(), None, ls.unsigned(2)))


def test_models_of_learned_weight_scales_train_load_and_are_finalized():
    model = quantized()
    learned = ls.learn_weight_scales_(model)
    model.load_state_dict(network(1).state_dict())
    x = train(model)
    assert all(bool((p != 0).any()) for p in learned)
    other = quantized()
    with pytest.raises(RuntimeError, match="log_scale"):
        other.load_state_dict(model.state_dict())
    ls.learn_weight_scales_(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x), model.eval()(x))


def test_a_population_learns_a_weight_scale_for_each_member():
    shapes = [(2, channels, 1) for channels in (6, 6, 10)]
    check_that_each_member_learned_its_own(ls.learn_weight_scales_, 3, "log_scale", shapes)


@pytest.mark.parametrize("kind", ["weight", "activation"])
def test_the_gradient_of_the_noise_is_that_of_finite_differences(kind):
    model = ls.quantize_(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), ls.ternary(), ls.unsigned(2))
    ls.learn_noise_(model.double())
    [layer] = quantized_layers(model)
    quantizer = layer.quantizers[kind == "activation"]
    quantizer.forward_std.fill_(0.4)
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    x = layer.weight.weight if kind == "weight" else x

    def total():
        return (quantizer(x) ** 2).sum()

    (found,) = torch.autograd.grad(total(), quantizer.log_std)
    assert float(found) == pytest.approx(finite_difference(total, quantizer.log_std), rel=1e-6)


def test_learned_noise_multiplies_the_schedule_and_a_hard_quantizer_stays_hard():
    model = quantized()
    [*learned] = ls.learn_noise_(model)
    assert len(learned) == 5
    assert all(a is b for a, b in zip(learned, ls.learn_noise_(model), strict=True))
    quantizer = quantized_layers(model)[0].weight.weight_quantizer
    weight = quantized_layers(model)[0].weight.weight
    with torch.no_grad():
        for std, factor in ((0.2, 3.0), (0.6, 1.0)):
            quantizer.forward_std.fill_(std)
            quantizer.log_std.fill_(factor).log_()
            values = quantizer(weight)
            if std == 0.2:
                wide = values
        torch.testing.assert_close(values, wide)
        quantizer.forward_std.zero_()
        assert torch.equal(quantizer(weight), quantizer.project(weight))


def test_float_checkpoints_load_where_noise_is_learned_and_its_own_come_back():
    model = quantized()
    ls.learn_noise_(model)
    model.load_state_dict(network(1).state_dict())
    other = quantized()
    with pytest.raises(RuntimeError, match="log_std"):
        other.load_state_dict(model.state_dict())
    ls.learn_noise_(other)
    other.load_state_dict(model.state_dict())


@pytest.mark.parametrize("kind", ["weight", "activation"])
def test_learned_noise_that_is_lost_is_said_and_refused(kind):
    model = ls.quantize_(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), ls.ternary(), ls.unsigned(2))
    ls.learn_noise_(model)
    scheduler = ls.QuantizationScheduler(model, ls.policies.StraightThrough(), epochs=3)
    [layer] = quantized_layers(model)
    with torch.no_grad():
        layer.quantizers[kind == "activation"].log_std.fill_(float("nan"))
    with pytest.warns(UserWarning, match=r"learned noise of \['0'\] is not finite"):
        scheduler.step()
    with pytest.raises(RuntimeError, match="learned noise of 0 is not finite"):
        ls.finalize_(model)


def test_a_population_learns_noise_for_each_member():
    check_that_each_member_learned_its_own(ls.learn_noise_, 3, "log_std", [(2,)] * 5)


def bounded_net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    net = ls.quantize_(net, ls.ternary(), ls.unsigned(2))
    return net, ls.learn_scales_(net)


def test_a_learned_scale_falls_to_a_32nd_of_its_start_and_can_rise_again():
    x = torch.randn(64, 8)
    net, [scale] = bounded_net()
    quantizer, start = net[2], scale.item()
    assert quantizer.lowest_scale.item() == pytest.approx(start / 32)
    at_bound, _ = bounded_net()
    with torch.no_grad():
        scale.fill_(-1.0)
        at_bound[2].scale.fill_(start / 32)
    outputs = [model(x).square().sum() for model in (net, at_bound)]
    assert outputs[0] == outputs[1]
    gradients = [
        torch.autograd.grad(output, model[2].scale)[0]
        for output, model in zip(outputs, (net, at_bound), strict=True)
    ]
    assert torch.equal(*gradients) and gradients[0] != 0

    policy = ls.policies.StraightThrough()
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    ls.QuantizationScheduler(net, policy, epochs=2, optimizer=optimizer)
    net(x).sum().backward()
    optimizer.step()
    assert scale.item() == quantizer.lowest_scale.item()


def test_finalize_leaves_a_scale_at_its_bound_and_refuses_what_is_no_number():
    x = torch.randn(64, 8)
    net, [scale] = bounded_net()
    with torch.no_grad():
        scale.fill_(-1.0)
    expected = net[2].lowest_scale.item()
    ls.finalize_(net, [x])
    assert scale.item() == expected
    net, [scale] = bounded_net()
    with torch.no_grad():
        scale.fill_(math.nan)
    with pytest.raises(RuntimeError, match="the activation after 0 has become nan, which must"):
        ls.finalize_(net, [x])


def test_bounds_of_learned_scales_are_kept_in_states_and_not_missed_in_older_ones():
    net, [scale] = bounded_net()
    with torch.no_grad():
        net[2].lowest_scale.fill_(0.125)
        scale.fill_(0.5)
    state = net.state_dict()
    other, [found] = bounded_net()
    other.load_state_dict(state)
    assert (found.item(), other[2].lowest_scale.item()) == (0.5, 0.125)
    older = {name: value for name, value in state.items() if "lowest_scale" not in name}
    other, [found] = bounded_net()
    other.load_state_dict(older)
    assert found.item() == 0.5 and other[2].lowest_scale.item() == 0.5 / 32
    fixed = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    fixed = ls.quantize_(fixed, ls.ternary(), ls.unsigned(2))
    fixed.load_state_dict(state)
    assert fixed[2].scale.item() == 0.5 and fixed[2].lowest_scale is None


def test_calibration_moves_the_bound_of_a_learned_scale():
    net, [scale] = bounded_net()
    ls.calibrate_(net, [100 * torch.randn(64, 8)])
    assert net[2].lowest_scale.item() == pytest.approx(scale.item() / 32)


@pytest.mark.parametrize("known", [False, True], ids=["unknown", "known"])
def test_learned_scales_that_no_optimizer_holds_are_warned_of(known):
    net = quantized(example_input=torch.randn(4, 8))
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    learned = [*ls.learn_scales_(net), *ls.learn_weight_scales_(net), *ls.learn_noise_(net)]
    if known:
        optimizer.add_param_group({"params": learned, "weight_decay": 0})
    scheduler = ls.QuantizationScheduler(
        net, ls.policies.StraightThrough(), epochs=2, optimizer=optimizer
    )
    net(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scheduler.step()
    told = [str(w.message) for w in caught]
    assert len(told) == (not known)
    for name in () if known else ("scale of 0", "log_scale of 0", "log_std of 5"):
        assert repr(name) in told[0]


@pytest.mark.parametrize("learn", [ls.learn_weight_scales_, ls.learn_noise_])
def test_a_state_with_more_that_was_learned_says_what_is_missing(learn):
    learned, plain = quantized(), quantized()
    learn(learned)
    with pytest.raises(RuntimeError, match=rf"call learnsched\.{learn.__name__}\(model\)"):
        plain.load_state_dict(learned.state_dict())
    learn(plain)
    plain.load_state_dict(learned.state_dict())
