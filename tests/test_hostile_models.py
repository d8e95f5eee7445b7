"""Models and data that nobody writes on purpose: a clear refusal, or a run that ends on its levels."""

import copy
import io
import math
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

import learnsched as ls
from learnsched import policies
from learnsched.layers import quantized_layers

pytestmark = pytest.mark.filterwarnings(
    "ignore:no batch norm precedes",
    "ignore:outside of what the schedule",
    "ignore:the metric 'train_loss' is nan",
    "ignore:Complex modules are a new feature",
)

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def learned():
    return ls.load_pretrained("default")


def run(model, x=X, epochs=3, *, policy=None, weight=None, activation=True, loss=None, steps=2):
    """Quantize, train and finish; the levels that each layer uses."""
    ls.quantize_(model, weight or ls.ternary(), ls.unsigned(2) if activation else None)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    scheduler = ls.QuantizationScheduler(model, policy or learned(), epochs, optimizer=optimizer)
    for epoch in range(epochs):
        for _ in range(steps):
            value = model(x).square().mean()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        shown = value if loss is None else loss[epoch]
        scheduler.step({"train_loss": shown})
    ls.finalize_(model, [x])
    assert scheduler.history.schedule.table.isfinite().all()
    return {k: set(v.codes.unique().tolist()) for k, v in ls.integer_weights(model).items()}


# -- losses

LOSSES = {
    "NaN throughout": ([math.nan] * 4, True),
    "NaN at first": ([math.nan, 1.0, 0.5, 0.4], True),
    "infinite once": ([1.0, math.inf, 0.5, 0.4], True),
    "minus infinity": ([1.0, -math.inf, 0.5, 0.4], True),
    "zero": ([0.0] * 4, False),
    "negative": ([-1.0, -2.0, -3.0, -4.0], False),
    "through zero": ([1.0, 0.0, -1.0, 1.0], False),
    "of every size": ([1e-300, 1e300, 1e-300, 1e300], False),
}


@pytest.mark.parametrize(("losses", "warned"), LOSSES.values(), ids=LOSSES)
def test_no_loss_upsets_the_policy(losses, warned):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run(mlp(), epochs=4, loss=losses)
    assert any("the policy is shown no change" in str(w.message) for w in seen) == warned


def test_a_run_that_diverged_is_named_when_it_is_finished():
    with pytest.raises(RuntimeError, match=r"weight of 0 is not finite.*lower the learning rate"):
        run(mlp(), torch.full((16, 8), math.nan), loss=[1.0] * 3)
    huge = nn.Sequential(nn.Linear(8, 4))
    nn.init.constant_(huge[0].weight, 1e30)
    with (
        pytest.warns(UserWarning, match="'train_loss' is nan"),
        pytest.raises(RuntimeError, match="training has diverged"),
    ):
        run(huge, activation=False)


# -- data


@pytest.mark.parametrize("value", [0.0, 1.0, -1e6, 1e-30])
def test_constant_inputs_train_and_end_on_the_levels(value):
    run(mlp(), torch.full((16, 8), value))


def test_integer_inputs_reach_an_embedding_and_are_refused_by_a_linear_layer():
    tokens = torch.randint(0, 10, (16,))
    model = nn.Sequential(nn.Embedding(10, 8), *mlp())
    run(model, tokens)
    calibrated = ls.quantize_(
        nn.Sequential(nn.Embedding(10, 8), *mlp()), ls.ternary(), ls.unsigned(2)
    )
    ls.calibrate_(calibrated, [tokens])
    model = ls.quantize_(mlp(), ls.ternary(), ls.unsigned(2))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="dtype"):
        ls.calibrate_(model, [torch.ones(16, 8, dtype=torch.int64)])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


EMPTY = {
    "a list": ([], "there are no batches"),
    "a loader": (
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(0, 8))),
        "there are no batches",
    ),
    "a used-up iterator": (iter(()), "there are no batches"),
    "a first batch": ([torch.zeros(0, 8)], r"a batch is empty: its shape is \(0, 8\)"),
    "a later batch": ([X, torch.zeros(0, 8)], "a batch is empty"),
}


@pytest.mark.parametrize("call", [ls.calibrate_, ls.reestimate_batch_norm_])
@pytest.mark.parametrize(("data", "message"), EMPTY.values(), ids=EMPTY)
def test_what_holds_no_examples_is_refused_and_changes_nothing(call, data, message):
    model = ls.quantize_(mlp(), ls.ternary(), ls.unsigned(2))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        call(model, data)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_an_epoch_without_batches_is_a_nan_loss_and_an_unknown_number_of_steps():
    model = ls.quantize_(mlp(), ls.ternary(), ls.unsigned(2))
    scheduler = ls.QuantizationScheduler(model, learned(), 3)
    for _ in range(3):
        with pytest.warns(UserWarning, match="is nan"):
            scheduler.step({"train_loss": math.nan})
    assert scheduler.state_dict()["steps_per_epoch"] is None
    ls.integer_weights(ls.finalize_(model))


def test_activations_that_are_dead_keep_their_scale_with_a_warning():
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    nn.init.constant_(model[0].bias, -100)
    nn.init.constant_(model[2].bias, 1)
    ls.quantize_(model, ls.ternary(), ls.unsigned(2))
    guess = float(model[1].scale)
    with pytest.warns(UserWarning, match=r"activations after \['0'\] are 0 in all of these"):
        ls.calibrate_(model, [X])
    assert float(model[1].scale) == guess
    assert float(model[3].scale) == pytest.approx(1 / 3, rel=1.1)
    ls.calibrate_(model, [X, 1000 * X])  # alive in one batch
    assert float(model[1].scale) != guess


# -- weights


@pytest.mark.parametrize(
    "levels",
    [ls.ternary(), ls.binary(), ls.signed(2, narrow=False), ls.signed(4), ls.power_of_two(3)],
    ids=lambda levels: levels.name,
)
@pytest.mark.parametrize("trained", [True, False])
def test_weights_of_zero_have_a_level(levels, trained):
    model = mlp()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    if trained:
        run(model, weight=levels)
    else:
        ls.integer_weights(ls.finalize_(ls.quantize_(model, levels, ls.unsigned(2)), [X]))
    assert all(p.isfinite().all() for p in model.parameters())
    assert model(X).isfinite().all()


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-12, 1e12])
def test_weights_of_any_size_have_a_level(size):
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(size)
    reference = model[0].weight.detach().clone()
    ls.finalize_(ls.quantize_(model, ls.ternary()))
    assert model[0].weight.abs().max() <= 2 * reference.abs().max().clamp(min=1e-12)


@pytest.mark.parametrize("levels", [ls.ternary(), ls.binary(), ls.signed(4)], ids=lambda v: v.name)
def test_layers_of_one_element(levels):
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1), nn.ReLU(), nn.Linear(1, 1))
    run(model, X[:, :1], weight=levels)
    run(nn.Sequential(nn.Conv1d(1, 1, 1), nn.ReLU()), torch.ones(2, 1, 1), weight=levels)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("shape", [(8, 0), (0, 4)])
def test_layers_of_no_element_are_refused(shape):
    model = nn.Sequential(nn.Linear(*shape))
    with pytest.raises(ValueError, match=r"the weight of 0 is empty.*overrides"):
        ls.quantize_(model, ls.ternary())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_weights_that_are_not_real_numbers_are_refused(dtype):
    model = nn.Sequential(nn.Linear(8, 4).to(dtype))
    with pytest.raises(TypeError, match=f"weight of 0 is {dtype}, not one of .*float32"):
        ls.quantize_(model, ls.ternary())


def test_weights_that_do_not_train_are_quantized_all_the_same():
    model = mlp()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.detach().clone()
    run(model)
    scale = ls.AbsoluteMean()(before, ls.ternary())
    assert torch.equal(model[0].weight, ls.ternary().quantize(before / scale) * scale)


def test_a_block_used_three_times_is_scheduled_once():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())
    model = nn.Sequential(block, block, block, nn.Linear(8, 3))
    assert list(run(model)) == ["0.0", "3"]
    assert len(quantized_layers(model)) == 2


# -- sizes


def test_a_run_of_one_epoch_trains_hard_and_ends_on_the_levels():
    run(mlp(), epochs=1)


@pytest.mark.slow
def test_a_run_of_a_thousand_epochs():
    for policy in (
        learned(),
        policies.IncrementalQuantization(),
        policies.AdditiveNoiseAnnealing(),
    ):
        run(mlp(), epochs=1000, steps=1, policy=policy)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [learned, policies.AdditiveNoiseAnnealing])
def test_a_network_of_three_hundred_layers(policy):
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()) for _ in range(300))
    assert len(run(nn.Sequential(*blocks), X[:, :4], policy=policy())) == 300


# -- any network, any policy, any horizon

WEIGHTS = [ls.ternary(), ls.binary(), ls.signed(3), ls.signed(8), ls.power_of_two(4)]
ACTIVATIONS = [ls.unsigned(1), ls.unsigned(2), ls.ternary(), ls.signed(4), None]
RULES = [None, ls.AbsoluteMean("tensor"), ls.Maximum(), ls.LeastSquares(), ls.PowerOfTwo()]


def fresh_meta_network(seed):
    torch.manual_seed(seed)
    policy = policies.LearnedPolicy(policies.MetaNetwork(5, 4))
    with torch.no_grad():
        for parameter in policy.network.out.parameters():
            parameter.normal_()
    return policy


POLICIES = st.one_of(
    st.builds(policies.StraightThrough, st.floats(0, 5)),
    st.builds(
        policies.AdditiveNoiseAnnealing,
        std=st.floats(0, 2), mean=st.floats(-1, 0), end=st.floats(0.1, 1),
        noise=st.sampled_from(["uniform", "triangular", "normal", "logistic"]),
    ),
    st.builds(
        policies.IncrementalQuantization,
        st.integers(2, 5),
        partition=st.sampled_from(["magnitude", "random", "redraw", "settled"]),
    ),
    st.builds(policies.Relaxed, st.floats(0.01, 3)),
    st.builds(fresh_meta_network, st.integers(0, 99)),
)  # fmt: skip


@st.composite
def networks(draw):
    """A chain of layers on (16, channels, 4, 4) or (16, features), and an input for it."""
    torch.manual_seed(draw(st.integers(0, 999)))
    channels = draw(st.sampled_from([2, 4]))
    flat = draw(st.booleans())
    x = torch.randn(8, channels) if flat else torch.randn(8, channels, 4, 4)
    modules = []
    for _ in range(draw(st.integers(1, 4))):
        out = draw(st.sampled_from([2, 4]))
        groups = draw(st.sampled_from([1, 2]))
        if flat:
            modules.append(nn.Linear(channels, out, bias=draw(st.booleans())))
        elif draw(st.booleans()):
            modules.append(nn.Conv2d(channels, out, 3, padding=1, groups=groups))
        else:
            modules.append(nn.ConvTranspose2d(channels, out, 3, padding=1, groups=groups))
        channels = out
        if draw(st.booleans()):
            modules.append(nn.BatchNorm1d(channels) if flat else nn.BatchNorm2d(channels))
        modules.append(draw(st.sampled_from([nn.ReLU, nn.Hardtanh, nn.PReLU, nn.GELU]))())
    return nn.Sequential(*modules), x


def on_levels(module):
    quantizer = module.weight_quantizer
    scale = quantizer.scale(module.weight.detach())
    values = module.weight.new_tensor(quantizer.levels.values)
    return bool((module.weight.unsqueeze(-1) == scale.unsqueeze(-1) * values).any(-1).all())


RUNS = {
    "made": networks(),
    "weight": st.sampled_from(WEIGHTS),
    "activation": st.sampled_from(ACTIVATIONS),
    "rule": st.sampled_from(RULES),
    "policy": POLICIES,
    "horizon": st.integers(1, 6),
    "cut": st.integers(0, 6),
    "given_optimizer": st.booleans(),
    "double": st.booleans(),
}


@settings(deadline=None, max_examples=12, derandomize=True, suppress_health_check=list(HealthCheck))
@given(**RUNS)
def test_any_run_resumes_to_the_bit_and_ends_on_its_level_sets(**run):
    check_run(**run)


@pytest.mark.slow
@settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(**RUNS)
def test_many_runs_resume_to_the_bit_and_end_on_their_level_sets(**run):
    check_run(**run)


def check_run(made, weight, activation, rule, policy, horizon, cut, given_optimizer, double):
    plain, x = made
    if double:
        plain, x = plain.double(), x.double()

    def start():
        model = ls.quantize_(copy.deepcopy(plain), weight, activation, weight_scale=rule)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        return model, optimizer, ls.QuantizationScheduler(
            model, policy, horizon, steps_per_epoch=1, seed=7,
            optimizer=optimizer if given_optimizer else None,
        )  # fmt: skip

    def train(model, optimizer, scheduler, epochs):
        for _ in range(epochs):
            loss = (model(x) - 1).square().mean().clamp(max=10)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step({"train_loss": loss})

    cut = min(cut, horizon)
    whole = start()
    train(*whole, horizon)
    first = start()
    train(*first, cut)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    second = start()
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*second, horizon - cut)
    for (name, a), b in zip(
        whole[0].state_dict().items(), second[0].state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name

    model = ls.finalize_(whole[0], [x])
    layers = [layer for layer in quantized_layers(model) if layer.weight is not None]
    assert all(on_levels(layer.weight) for layer in layers)
    # The forward pass is that of a plain network with levels times scale in it.
    hard = copy.deepcopy(plain).eval()
    hard.load_state_dict({k: v for k, v in model.state_dict().items() if k in hard.state_dict()})
    for name, found in ls.integer_weights(model).items():
        values = found.scale.new_tensor(found.values)
        hard.get_submodule(name).weight.data = values[found.codes] * found.scale
    model.eval()
    with torch.no_grad():
        signal = x
        for ours, theirs in zip(model, hard, strict=True):
            expected = theirs(signal)
            if hasattr(ours, "levels"):
                # Few levels take a ReLU's place; more of them quantize what it puts out.
                few = len(ours.levels.values) <= 3
                replaced = isinstance(theirs, (nn.Hardtanh, nn.ReLU) if few else nn.Hardtanh)
                ahead = signal if replaced else expected
                expected = ours.levels.quantize(ahead / ours.scale) * ours.scale
            signal = ours(signal)
            assert torch.equal(signal, expected)


def _frozen_in_mid_run():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    ls.quantize_(net, ls.ternary(), ls.unsigned(2))
    scheduler = ls.QuantizationScheduler(net, ls.policies.IncrementalQuantization(), 6)
    for _ in range(4):
        net(torch.randn(8, 20))
        scheduler.step()
    assert bool(net[3].weight_quantizer.membership.any())
    return net, scheduler


@pytest.mark.parametrize("parametrize", [prune.random_unstructured, parametrizations.weight_norm])
def test_weights_that_something_else_makes_in_mid_run_are_refused_at_the_next_step(parametrize):
    net, scheduler = _frozen_in_mid_run()
    options = {"amount": 0.5} if parametrize is prune.random_unstructured else {}
    parametrize(net[3], "weight", **options)
    with pytest.raises(ValueError, match=r"the weight of 3 is no parameter any more"):
        scheduler.step()
    assert scheduler.epoch == 4


def test_weights_that_are_drawn_anew_in_mid_run_are_free():
    net, _ = _frozen_in_mid_run()
    with pytest.warns(UserWarning, match="frozen weights were drawn anew: they are free now"):
        net[3].reset_parameters()
    quantizer = net[3].weight_quantizer
    assert not bool(quantizer.membership.any())
    assert torch.equal(net[3].weight, quantizer.project(net[3].weight)) is False


def test_a_weight_of_another_shape_cannot_take_a_quantized_one_s_place():
    net, _ = _frozen_in_mid_run()
    before = net[3].weight
    with pytest.raises(ValueError, match=r"one of \(2, 16\) cannot take its place"):
        net[3].weight = nn.Parameter(before[:2].detach())
    assert net[3].weight is before and bool(net[3].weight_quantizer.membership.any())


def test_what_is_learned_can_be_made_in_inference_mode():
    net = ls.quantize_(
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)),
        ls.ternary(),
        ls.unsigned(2),
    )
    with torch.inference_mode():
        learned = [*ls.learn_scales_(net), *ls.learn_weight_scales_(net), *ls.learn_noise_(net)]
    optimizer = torch.optim.Adam(learned, 0.1)
    net(torch.randn(16, 8)).square().sum().backward()
    optimizer.step()
    assert not any(parameter.is_inference() for parameter in learned)
    assert bool(learned[0] != net[2].lowest_scale * 32)
