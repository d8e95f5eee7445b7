"""Quantized weights and activations as modules."""

import contextlib
import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import learnsched as ls
from learnsched.activation_quantizer import ActivationQuantizer, PReLUQuantizer
from learnsched.annealed import annealed_quantize
from learnsched.modules import QuantizedConv1d, QuantizedConv2d, QuantizedLinear
from learnsched.noise import NOISES, noise_shape
from learnsched.quantizer import NOISE_BUFFERS
from learnsched.scales import AbsoluteMean, Fixed, LeastSquares, Maximum, default_weight_rule
from learnsched.weight_quantizer import WeightQuantizer

LEVELS = {
    "ternary": ls.ternary(),
    "binary": ls.binary(),
    "signed4": ls.signed(4),
    "power_of_two3": ls.power_of_two(3),
}


def weights(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def quantizer_of(weight, levels=None, rule=None):
    levels = levels or ls.ternary()
    return WeightQuantizer(levels, rule or default_weight_rule(levels), weight)


def activation(levels=None, scale=0.5, before=None):
    levels = levels or ls.unsigned(2)
    return ActivationQuantizer(levels, scale, LeastSquares("tensor"), before, torch.zeros(()))


def test_samples_are_drawn_in_training_alone():
    quantizer, x = activation(), weights(2000)
    quantizer.mode = "random"
    quantizer.forward_std.fill_(0.5)
    assert not torch.equal(quantizer(x), quantizer(x))
    quantizer.eval()
    likely = annealed_quantize(
        x / 0.5, ls.unsigned(2), forward_std=0.5, backward_std=1.0, mode="mode"
    )
    assert torch.equal(quantizer(x), likely * 0.5)


@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("shape", [(6, 8), (4, 3, 5), (4, 2, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_hard_weight_is_level_times_scale_to_the_bit(levels, shape, dtype):
    weight = weights(*shape, dtype=dtype)
    quantizer = quantizer_of(weight, levels)
    scale = quantizer.scale(weight)
    codes = levels.codes(weight / scale)
    expected = torch.tensor(levels.values, dtype=dtype)[codes] * scale
    assert torch.equal(quantizer(weight), expected)
    assert quantizer(weight).dtype == dtype


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
def test_the_forward_pass_computes_the_expectation(levels, noise):
    weight = weights(5, 7, dtype=torch.float64)
    quantizer = quantizer_of(weight, levels)
    quantizer.noise = noise_shape(noise)
    quantizer.forward_std.fill_(0.4)
    quantizer.forward_mean.fill_(-0.1)
    scale = quantizer.scale(weight)
    edges = [torch.ones_like(weight)]
    for threshold in levels.thresholds:
        z = (weight / scale - 0.1 * levels.step - threshold) / (0.4 * levels.step)
        edges.append(noise_shape(noise).cdf(z))
    reached = torch.stack([*edges, torch.zeros_like(weight)])
    probability = reached[:-1] - reached[1:]
    expected = torch.tensordot(torch.tensor(levels.values).double(), probability, 1)
    torch.testing.assert_close(quantizer(weight), expected * scale)


@pytest.mark.parametrize("x", [-2.0, -0.2, 0.1, 0.26, 3.0])
def test_activations_compute_the_expectation_in_units_of_their_scale(x):
    quantizer = activation(scale=0.5)
    quantizer.forward_std.fill_(0.3)
    x = torch.tensor(x)
    y = annealed_quantize(x / 0.5, ls.unsigned(2), forward_std=0.3, backward_std=1.0) * 0.5
    torch.testing.assert_close(quantizer(x), y)


def test_the_gradient_is_that_of_the_backward_noise_and_of_the_scale():
    weight = weights(4, 6, dtype=torch.float64).requires_grad_()
    quantizer = quantizer_of(weight)
    quantizer.noise = noise_shape("normal")
    quantizer.backward_std.fill_(0.7)
    mix = weights(4, 6, seed=1, dtype=torch.float64)
    (grad,) = torch.autograd.grad((quantizer(weight) * mix).sum(), weight)
    scale = AbsoluteMean()(weight, ls.ternary())
    y = annealed_quantize(weight / scale, ls.ternary(), forward_std=0.0, backward_std=0.7) * scale
    (expected,) = torch.autograd.grad((y * mix).sum(), weight)
    torch.testing.assert_close(grad, expected)
    assert grad.abs().min() > 0


@pytest.mark.parametrize("rule", [AbsoluteMean("channel"), AbsoluteMean("tensor"), Fixed(0.3)])
def test_the_scale_is_fixed_at_the_first_projection_of_its_channel(rule):
    weight = weights(3, 8).sign()
    weight[0] = torch.tensor([3.0, -3.0, 3.0] + 5 * [0.1])  # magnitude takes these three first
    quantizer = quantizer_of(weight, rule=rule)
    before = quantizer.scale(weight).clone()
    quantizer.freeze_(weight, 3 / 24, "magnitude")
    assert quantizer.membership[0].sum() == 3
    moved = weight + 0.5
    after = quantizer.scale(moved)
    whole = before.numel() == 1
    held = torch.ones_like(before) if whole else torch.tensor([[1.0], [0.0], [0.0]])
    assert torch.equal(quantizer.scale_held, held)
    assert torch.equal(after[held > 0], before[held > 0])
    free = rule(moved, ls.ternary())
    assert torch.equal(after[held == 0], free[held == 0])
    quantizer.freeze_(moved, 1.0, "magnitude")
    final = quantizer.scale(moved)
    assert torch.equal(final[held > 0], before[held > 0])
    assert torch.equal(final[held == 0], free[held == 0])
    assert set((moved / final).round(decimals=5).unique().tolist()) <= {-1.0, 0.0, 1.0}


@pytest.mark.parametrize("partition", ["magnitude", "random", "settled"])
def test_freezing_projects_and_keeps_what_was_frozen(partition):
    generator = torch.Generator().manual_seed(0)
    weight = weights(5, 20)
    quantizer = quantizer_of(weight)
    kept = torch.zeros(5, 20, dtype=torch.bool)
    values = torch.zeros(5, 20)
    for fraction in (0.0, 0.2, 0.2, 0.55, 1.0):
        quantizer.freeze_(weight, fraction, partition, generator)
        frozen = quantizer.membership > 0
        assert int(frozen.sum()) == round(100 * fraction)
        assert (frozen | ~kept).all()
        assert torch.equal(weight[kept], values[kept])
        assert torch.equal(quantizer(weight)[frozen], weight[frozen])
        kept, values = frozen, weight.clone()
        weight += 0.3 * torch.randn(weight.shape, generator=generator)


def test_redraw_releases_and_only_the_end_holds_the_scale():
    weight = weights(4, 25)
    quantizer = quantizer_of(weight)
    quantizer.freeze_(weight, 0.5, "redraw", torch.Generator().manual_seed(0))
    first = quantizer.membership.clone()
    quantizer.freeze_(weight, 0.5, "redraw", torch.Generator().manual_seed(1))
    second = quantizer.membership
    assert second.sum() == first.sum() == 50
    assert ((first > 0) & (second == 0)).any()
    assert not quantizer.scale_held.any()
    quantizer.freeze_(weight, 1.0, "redraw", torch.Generator().manual_seed(2))
    assert quantizer.scale_held.all()
    scale = quantizer.scale(weight)
    assert torch.equal(ls.ternary().quantize(weight / scale) * scale, weight)


@pytest.mark.parametrize(
    ("fraction", "partition", "message"),
    [
        (0.3, "magnitude", "10 of 20 weights are frozen"),
        (1.2, "magnitude", r"\[0, 1\]"),
        (float("nan"), "redraw", r"\[0, 1\]"),
        (0.9, "biggest", "unknown partition 'biggest'"),
    ],
)
def test_a_refused_fraction_leaves_everything_as_it_was(fraction, partition, message):
    weight = weights(4, 5)
    quantizer = quantizer_of(weight)
    quantizer.freeze_(weight, 0.5, "magnitude")
    before = copy.deepcopy(quantizer.state_dict()), weight.clone()
    with pytest.raises(ValueError, match=message):
        quantizer.freeze_(weight, fraction, partition)
    assert torch.equal(weight, before[1])
    assert all(torch.equal(v, before[0][k]) for k, v in quantizer.state_dict().items())


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    fraction=st.floats(0, 1),
    name=st.sampled_from(sorted(LEVELS)),
    partition=st.sampled_from(["magnitude", "random", "redraw", "settled"]),
    seed=st.integers(0, 99),
)
def test_frozen_weights_lie_on_a_level_and_free_ones_do_not_move(fraction, name, partition, seed):
    weight = weights(3, 7, seed=seed)
    before, levels = weight.clone(), LEVELS[name]
    quantizer = quantizer_of(weight, levels)
    scale = quantizer.scale(weight)
    quantizer.freeze_(weight, fraction, partition, torch.Generator().manual_seed(seed))
    frozen = quantizer.membership > 0
    hard = levels.quantize(before / scale) * scale
    assert torch.equal(weight, torch.where(frozen, hard, before))
    assert torch.equal(quantizer.project(weight)[frozen], hard[frozen])


def test_error_is_relative_and_blind_to_what_an_optimizer_does_to_frozen_weights():
    weight = weights(4, 6)
    quantizer = quantizer_of(weight)
    hard = quantizer.project(weight)
    expected = float((weight - hard).norm() / weight.norm())
    assert float(quantizer.error(weight)) == pytest.approx(expected, rel=1e-6)
    assert float(quantizer.error(weight * 1000)) == pytest.approx(expected, rel=1e-5)
    quantizer.freeze_(weight, 0.5, "settled")
    at_rest = quantizer.error(weight)
    assert torch.equal(quantizer.error(weight * (1 - 0.1 * quantizer.membership)), at_rest)
    quantizer.freeze_(weight, 1.0, "settled")
    assert float(quantizer.error(weight + 1)) == 0


@pytest.mark.parametrize("rule", [AbsoluteMean(), Maximum(), LeastSquares(), Fixed(0.2)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_freezing_does_not_give_a_level_to_what_is_not_finite(rule, bad):
    weight = weights(3, 4)
    weight[1, 2] = bad
    quantizer = quantizer_of(weight, rule=rule)
    quantizer.freeze_(weight, 1.0, "settled")
    assert not weight[1, 2].isfinite()


def test_a_channel_of_zeros_stays_finite():
    weight = weights(3, 4)
    weight[1] = 0
    for levels in LEVELS.values():
        quantizer = quantizer_of(weight, levels)
        assert quantizer(weight).isfinite().all()


@pytest.mark.parametrize(
    ("plain", "quantized", "x"),
    [
        (nn.Linear(6, 4), QuantizedLinear, weights(2, 6)),
        (nn.Conv1d(4, 6, 3, stride=2, groups=2), QuantizedConv1d, weights(2, 4, 9)),
        (nn.Conv2d(2, 3, 3, padding="same", bias=False), QuantizedConv2d, weights(2, 2, 5, 5)),
        (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), QuantizedConv2d,
         weights(2, 2, 5, 5)),
    ],
)  # fmt: skip
def test_layers_compute_with_their_quantized_weight(plain, quantized, x):
    reference = copy.deepcopy(plain)
    model = ls.quantize_(copy.deepcopy(plain), ls.ternary())
    assert type(model) is quantized
    with torch.no_grad():
        reference.weight.copy_(model.weight_quantizer(model.weight))
    assert torch.equal(model(x), reference(x))


def test_what_precedes_a_staircase_is_computed_first():
    gelu = activation(before=nn.GELU())
    x = weights(50)
    assert torch.equal(gelu(x), activation()(F.gelu(x)))


@pytest.mark.parametrize(
    ("levels", "ends"),
    [
        (ls.signed(3), (0.0, 1.0)), (ls.signed(3), (-2.0, 0.5)), (ls.signed(3), (-0.25, 1.0)),
        (ls.signed(3), (-1.0, 1.0)), (ls.unsigned(2), (0.0, 1.0)), (ls.unsigned(2), (0.25, 1.0)),
        (ls.unsigned(2), (-1.0, 1.0)),
    ],
)  # fmt: skip
def test_a_hardtanh_is_quantized_as_it_clips(levels, ends):
    clip = nn.Hardtanh(*ends)
    quantizer = ls.quantize_(nn.Sequential(nn.Identity(), clip), None, levels)[1]
    x = torch.linspace(-3, 3, 61)
    scale = float(quantizer.scale)
    expected = torch.tensor(
        [
            min((scale * q for q in levels.values), key=lambda v: abs(v - c))
            for c in clip(x).tolist()
        ]
    )
    far = torch.stack([(clip(x) / scale - t).abs() for t in levels.thresholds]).amin(0) > 1e-4
    torch.testing.assert_close(quantizer(x)[far], expected[far])


def test_a_prelu_keeps_its_slope_and_learns_it():
    prelu = nn.PReLU(init=0.3)
    like = torch.zeros(())
    quantizer = PReLUQuantizer(ls.signed(3), 0.5, LeastSquares("tensor"), prelu, like)
    assert quantizer.weight is prelu.weight
    x = weights(50)
    assert torch.equal(quantizer(x), activation(ls.signed(3))(prelu(x)))
    quantizer(x).sum().backward()
    assert prelu.weight.grad.abs() > 0


@pytest.mark.parametrize("noise", NOISES)
def test_quantizers_survive_pickle_and_deepcopy_with_their_noise(noise):
    weight = weights(3, 4)
    quantizer = quantizer_of(weight)
    quantizer.noise = noise_shape(noise)
    quantizer.forward_std.fill_(0.3)
    for twin in (pickle.loads(pickle.dumps(quantizer)), copy.deepcopy(quantizer)):
        assert twin.noise == noise_shape(noise)
        assert torch.equal(twin(weight), quantizer(weight))
    assert quantizer.noise == noise_shape(noise)


def test_noise_and_memberships_are_buffers_and_start_hard_and_free():
    quantizer = quantizer_of(weights(3, 4))
    buffers = dict(quantizer.named_buffers())
    assert {*NOISE_BUFFERS, "membership", "held", "held_scale", "scale_held"} == set(buffers)
    assert buffers["forward_std"] == buffers["forward_mean"] == 0
    assert not buffers["membership"].any()
    assert set(dict(activation().named_buffers())) == {*NOISE_BUFFERS, "scale"}


def test_extra_repr_names_levels_and_noise():
    assert "levels=ternary, noise=normal" in repr(quantizer_of(weights(2, 2)))


def accumulate(model, batches, once):
    for parameter in model.parameters():
        parameter.grad = None
    with ls.quantize_once(model) if once else contextlib.nullcontext():
        for x in batches:
            model(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


def two_layers(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    return ls.quantize_(model, ls.ternary(), ls.unsigned(2)).to(dtype)


def test_quantize_once_gives_the_gradients_of_every_micro_batch():
    model = two_layers()
    for module in model.modules():
        if isinstance(module, WeightQuantizer):
            module.forward_std.fill_(0.3)
    batches = weights(4, 8, 6, dtype=torch.float64)
    for ours, truth in zip(
        accumulate(model, batches, True), accumulate(model, batches, False), strict=True
    ):
        torch.testing.assert_close(ours, truth)


def test_quantize_once_quantizes_each_weight_once(monkeypatch):
    model, calls = two_layers(), []
    monkeypatch.setattr(
        WeightQuantizer, "scale", lambda self, w: calls.append(1) or self.rule(w, self.levels)
    )
    accumulate(model, weights(4, 8, 6, dtype=torch.float64), True)
    assert len(calls) == 2
    model(weights(8, 6, dtype=torch.float64))
    assert len(calls) == 4


def test_quantize_once_needs_quantized_weights():
    with pytest.raises(ValueError, match="no quantized weights"), ls.quantize_once(nn.Linear(2, 2)):
        pass


def test_a_weight_that_changes_inside_quantize_once_is_refused_and_the_context_ends():
    model = two_layers()
    x = weights(8, 6, dtype=torch.float64)

    def step_inside():
        with ls.quantize_once(model):
            model(x)
            with torch.no_grad():
                model[0].weight.add_(1)
            model(x)

    with pytest.raises(RuntimeError, match="the weight of 0 changed inside quantize_once"):
        step_inside()
    assert model[0].weight_quantizer.shared is None


def test_an_optimizer_that_steps_inside_quantize_once_is_refused():
    model, x = two_layers(), weights(8, 6, dtype=torch.float64)
    other = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step_inside():
        with ls.quantize_once(model):
            model(x).square().mean().backward()
            other.step()
            optimizer.step()

    with pytest.raises(RuntimeError, match="took a step inside quantize_once; leave the context"):
        step_inside()
    before = model[0].weight.clone()
    with ls.quantize_once(model):
        model(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


def test_an_optimizer_of_learned_scales_is_refused_inside_quantize_once_too():
    model, x = two_layers(), weights(8, 6, dtype=torch.float64)
    optimizer = torch.optim.SGD(ls.learn_weight_scales_(model), lr=0.1)
    with pytest.raises(RuntimeError, match="took a step inside"), ls.quantize_once(model):
        model(x).square().mean().backward()
        optimizer.step()


def test_quantize_once_holds_samples_of_weights_that_are_not_trained():
    model, x = two_layers(), weights(8, 6, dtype=torch.float64)
    model.requires_grad_(False)
    ls.QuantizationScheduler(model, ls.policies.StraightThrough(weight_sample_std=0.7), 3)
    with ls.quantize_once(model):
        assert torch.equal(model(x), model(x))
    assert not torch.equal(model(x), model(x))


def test_quantize_once_goes_with_reentrant_checkpoints():
    model, batches = two_layers(), weights(3, 8, 6, dtype=torch.float64)
    model.eval()
    truth = accumulate(model, batches, False)
    model.zero_grad()
    with ls.quantize_once(model):
        for x in batches:
            x = x.clone().requires_grad_()
            checkpoint(model, x, use_reentrant=True).square().mean().backward()
    for parameter, expected in zip(model.parameters(), truth, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


def test_restoring_frozen_weights_mends_even_what_is_not_a_number():
    weight = nn.Parameter(weights(4, 5))
    quantizer = quantizer_of(weight.detach())
    quantizer.freeze_(weight, 0.5, "settled")
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    quantizer.restore_(weight)
    frozen = quantizer.membership > 0
    assert torch.equal(weight[frozen], before[frozen])
    assert weight[~frozen].isnan().all()


def test_quantize_once_within_itself_keeps_every_gradient():
    model, batches = two_layers(), weights(4, 8, 6, dtype=torch.float64)
    truth = accumulate(model, batches, False)
    model.zero_grad()
    with ls.quantize_once(model):
        for x in batches:
            with ls.quantize_once(model):
                model(x).square().mean().backward()
    for parameter, gradient in zip(model.parameters(), truth, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert model[0].weight_quantizer.shared is None


@pytest.mark.parametrize("shape", [(), (1,), (6,), (1, 6), (4, 1), (4, 6)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_any_scale_that_broadcasts_is_trained_frozen_and_finalized(shape, transposed):
    def rule(x, levels):
        return torch.full((*shape, *[1] * (transposed and len(shape) > 1)), 0.5)

    layer = nn.ConvTranspose1d(6, 4, 1) if transposed else nn.Linear(6, 4)
    if transposed and shape == (6,):
        pytest.skip("the last dimension is that of the kernel")
    ls.quantize_(layer, ls.ternary(), weight_scale=rule)
    layer(torch.randn(2, 6, 1) if transposed else torch.randn(2, 6)).sum().backward()
    quantizer = layer.weight_quantizer
    quantizer.freeze_(layer.weight, 0.5, "settled")
    assert quantizer.membership.sum() == 12
    ls.finalize_(layer)
    assert set(layer.weight.unique().tolist()) <= {-0.5, 0.0, 0.5}


def test_an_activation_takes_its_input_by_the_name_that_torch_gives_it():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.PReLU())
    ls.quantize_(net, activation=ls.unsigned(2))
    x = torch.randn(5, 3)
    for module in net[1:]:
        assert torch.equal(module(input=x), module(x))


def test_a_finished_network_is_spared_the_search_for_a_scale():
    calls = []

    def rule(x, levels):
        calls.append(1)
        return LeastSquares()(x, levels)

    layer = ls.quantize_(nn.Linear(8, 4), ls.signed(4), weight_scale=rule)
    x = torch.randn(3, 8)
    ls.finalize_(layer).eval()
    expected, calls[:] = layer(x), []
    assert torch.equal(layer(x), expected)
    assert not calls
    assert torch.equal(layer.train()(x), expected)


def test_an_activation_of_whole_numbers_counts_in_those_of_its_scale():
    net = ls.quantize_(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), ls.ternary(), ls.unsigned(2))
    whole = torch.tensor([0, 1, 3])
    assert torch.equal(net[1](whole), net[1](whole.float()))
    assert net[1](whole).dtype == torch.float32
