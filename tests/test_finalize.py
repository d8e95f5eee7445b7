"""Calibration of activations, re-estimated batch norm, and the finished hard network."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import learnsched as ls
from learnsched.layers import quantized_layers
from learnsched.scales import AbsoluteMean, Fixed, LeastSquares, Maximum, PowerOfTwo

pytestmark = pytest.mark.filterwarnings("ignore:no batch norm precedes")

LEVELS = {
    "ternary": ls.ternary(),
    "binary": ls.binary(),
    "signed4": ls.signed(4),
    "power_of_two3": ls.power_of_two(3),
}


def network(weight=None, activation=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(64, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3),
    )  # fmt: skip
    return ls.quantize_(model, weight or ls.ternary(), activation or ls.unsigned(2), **options)


def batches(count=4, size=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 2, 4, 4, generator=generator) for _ in range(count)]


def state_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same_state(model, state):
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def inputs_of(model, module, data):
    """What reaches a module, batch norms on batch statistics and dropout off."""
    twin, seen = copy.deepcopy(model), []
    twin.get_submodule(module).register_forward_pre_hook(lambda _, x: seen.append(x[0].detach()))
    twin.eval()
    for child in twin.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.train()
    for x in data:
        twin(x)
    return seen


def squared_error(x, scale, levels):
    return float((x - levels.quantize(x / scale) * scale).square().sum())


@pytest.mark.parametrize("activation", [ls.unsigned(2), ls.unsigned(3), ls.signed(3)])
def test_calibration_finds_the_scale_of_least_squared_error(activation):
    model = network(activation=activation)
    data = batches(1, 64)
    ls.calibrate_(model, data)
    for name in ("2", "6"):
        # The first scale is in force by the time that the second is fitted.
        x = inputs_of(model, name, data)[0]
        x = x.clamp(min=0) if activation.values[0] >= 0 else x
        most = float(x.abs().max())
        least = min(squared_error(x, most * i / 2000, activation) for i in range(20, 2400))
        scale = model.get_submodule(name).scale
        assert squared_error(x, scale, activation) <= 1.003 * least


def test_a_long_activation_is_calibrated_on_a_sample_of_it():
    model = ls.quantize_(
        nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (-1, 1)), nn.ReLU()), None, ls.unsigned(2)
    )
    x = torch.randn(2**19, generator=torch.Generator().manual_seed(0))
    ls.calibrate_(model, [x])
    found = model[2].scale.item()
    ls.calibrate_(model, [x])
    assert model[2].scale.item() == found
    torch.testing.assert_close(
        found, ls.LeastSquares("tensor")(x.clamp(min=0), ls.unsigned(2)).item(), rtol=0.01, atol=0
    )


def test_an_activation_that_is_called_by_keyword_is_calibrated():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x):
            return self.relu(input=x)

    x = torch.randn(64, 8)
    models = [ls.quantize_(m, None, ls.unsigned(2)) for m in (Named(), nn.Sequential(nn.ReLU()))]
    scales = [next(ls.calibrate_(m, [x]).buffers()) for m in models]
    assert models[0].relu.scale == models[1][0].scale
    assert len(scales) == 2


def test_calibration_takes_the_mean_over_batches():
    model = network(activation_scale=AbsoluteMean("tensor"))
    data = batches(3)
    expected = torch.stack([x.clamp(min=0).mean() for x in inputs_of(model, "2", data)]).mean()
    ls.calibrate_(model, data)
    torch.testing.assert_close(model[2].scale, expected)


def test_calibration_fits_what_a_smooth_activation_puts_out():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.PReLU())
    rule = AbsoluteMean("tensor")
    ls.quantize_(model, activation=ls.signed(3), activation_scale=rule)
    x = torch.randn(50, 4)
    ls.calibrate_(model, [x])
    y = nn.functional.gelu(model[0](x))
    torch.testing.assert_close(model[1].scale, y.abs().mean().detach())
    z = nn.functional.prelu(model[2](model[1](model[0](x))), model[3].weight)
    torch.testing.assert_close(model[3].scale, z.abs().mean().detach())


@pytest.mark.parametrize(
    "kind", [nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Hardswish, nn.ReLU], ids=lambda kind: kind.__name__
)
def test_calibration_finds_the_same_scales_of_activations_in_place(kind):
    def calibrated(inplace):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(8, 8), kind(inplace=inplace), nn.Linear(8, 8), kind(inplace=inplace)
        )
        ls.quantize_(model, ls.ternary(), ls.signed(4))
        ls.calibrate_(model, [3 * torch.randn(40, 8)])
        return [float(model[i].scale) for i in (1, 3)]

    assert calibrated(True) == calibrated(False)


def test_calibration_leaves_batch_norm_flags_hooks_and_gradients_alone():
    model = network().train()
    model[1].eval()
    model[5].running_mean.fill_(0.3)
    before = state_of(model)
    flags = [m.training for m in model.modules()]
    assert ls.calibrate_(model, batches()) is model
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"2.scale", "6.scale"}
    assert [m.training for m in model.modules()] == flags
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("as_list", [True, False])
def test_data_loaders_give_tuples(as_list):
    data = torch.cat(batches())
    labels = torch.zeros(len(data))
    loader = DataLoader(TensorDataset(data, labels), batch_size=16)
    one, two = network(), network()
    ls.calibrate_(one, [list(b) for b in loader] if as_list else loader)
    ls.calibrate_(two, (x for x in data.split(16)))
    assert_same_state(one, two.state_dict())


@pytest.mark.parametrize("rule", [Maximum, LeastSquares, PowerOfTwo, AbsoluteMean])
def test_an_activation_has_one_scale_whatever_the_rule_takes_for_channels(rule):
    x = torch.zeros(32, 4)
    x[0] = torch.tensor([3.0, 2.0, 0.0, 1.0])
    models = [
        ls.quantize_(
            nn.Sequential(nn.Identity(), nn.ReLU()),
            None,
            ls.unsigned(2),
            activation_scale=rule(per),
        )
        for per in ("channel", "tensor")
    ]
    found = [float(ls.calibrate_(model, [x])[1].scale) for model in models]
    assert found[0] == found[1]
    if rule is Maximum:
        assert found[0] == 1.0


def test_fixed_scales_are_kept_by_calibration():
    model = ls.calibrate_(network(activation_scale=Fixed(0.25)), batches())
    assert float(model[2].scale) == float(model[6].scale) == 0.25


CALLS = {
    "calibrate_": ls.calibrate_,
    "reestimate_batch_norm_": ls.reestimate_batch_norm_,
    "finalize_": ls.finalize_,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        ([], ValueError, "there are no batches"),
        (iter(()), ValueError, "there are no batches"),
        ([[]], TypeError, "a batch must be a tensor, .* got list"),
        ([{"x": torch.zeros(1)}], TypeError, "got dict"),
        ([("x", 1)], TypeError, "got str"),
        (torch.zeros(4, 2, 4, 4), TypeError, r"pass a list of batches, \[x\]"),
        (TensorDataset(torch.zeros(4, 2, 4, 4)), TypeError, r"DataLoader\(dataset, batch_size\)"),
        (3, TypeError, "a data loader, got 3"),
    ],
)
def test_wrong_batches_are_refused_before_anything_changes(call, data, kind, message):
    model = network()
    before = state_of(model)
    with pytest.raises(kind, match=message):
        call(model, data)
    assert_same_state(model, before)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("last", ["text", torch.zeros(1, 2), torch.full((4, 2, 4, 4), torch.nan)])
def test_a_failure_at_a_later_batch_puts_everything_back(call, last):
    model = network().train()
    if call is not ls.calibrate_ and isinstance(last, torch.Tensor):
        last = torch.zeros(1, 2, 4, 4)  # a last batch of one example has no variance
    before, flags = state_of(model), [m.training for m in model.modules()]
    momenta = [model[1].momentum, model[5].momentum]
    with pytest.raises((TypeError, RuntimeError, ValueError)):
        call(model, [*batches(), last])
    assert_same_state(model, before)
    assert [m.training for m in model.modules()] == flags
    assert [model[1].momentum, model[5].momentum] == momenta


def test_activations_that_are_not_finite_are_named():
    with pytest.raises(ValueError, match="activation after 0 is not finite"):
        ls.calibrate_(network(), [torch.full((4, 2, 4, 4), torch.inf)])


@pytest.mark.parametrize("call", [ls.calibrate_, ls.finalize_, lambda m, _: ls.integer_weights(m)])
def test_a_float_model_is_refused(call):
    with pytest.raises(ValueError, match="no quantized layers"):
        call(nn.Linear(2, 2), [torch.zeros(1, 2)])


@pytest.mark.parametrize("momentum", [0.1, 0.9, None])
def test_batch_norm_statistics_become_the_plain_mean_of_the_batches(momentum):
    model = network()
    data = batches(5)
    for index in (1, 5):
        model[index].momentum = momentum
        model[index].running_mean.fill_(99)
    flags = [m.training for m in model.modules()]
    assert ls.reestimate_batch_norm_(model, data) is model
    for name, dims in (("1", (0, 2, 3)), ("5", (0,))):
        seen = inputs_of(model, name, data)
        norm = model.get_submodule(name)
        torch.testing.assert_close(
            norm.running_mean, torch.stack([x.mean(dims) for x in seen]).mean(0)
        )
        torch.testing.assert_close(
            norm.running_var, torch.stack([x.var(dims) for x in seen]).mean(0)
        )
        assert norm.momentum == momentum
        assert norm.num_batches_tracked == 5
    assert [m.training for m in model.modules()] == flags


def test_batch_norm_without_statistics_stays_without():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.ReLU())
    ls.quantize_(model, ls.ternary(), ls.unsigned(2))
    x = torch.randn(8, 4)
    ls.finalize_(ls.calibrate_(model, [x]), [x])
    assert model[1].running_mean is None


@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_finalize_puts_every_weight_on_its_level_set_to_the_bit(levels, dtype):
    model = network(levels).to(dtype)
    assert ls.finalize_(model, [x.to(dtype) for x in batches()]) is model
    codes = ls.integer_weights(model)
    assert list(codes) == ["0", "4", "8"]
    for name, found in codes.items():
        weight = model.get_submodule(name).weight
        assert found.codes.dtype == torch.int64
        assert found.values == levels.values
        assert (found.scale > 0).all()
        values = torch.tensor(levels.values, dtype=dtype)[found.codes]
        assert torch.equal(values * found.scale, weight)
        assert torch.equal(model.get_submodule(name).weight_quantizer(weight), weight)
        if levels.name.startswith("power"):
            with pytest.raises(ValueError, match="are not integers; use codes and values"):
                _ = found.integers
        else:
            assert found.integers.dtype == torch.int64
            assert torch.equal(found.integers * found.scale, weight)


@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("rule", [ls.AbsoluteMean, ls.Maximum, ls.PowerOfTwo, ls.LeastSquares])
def test_finalize_works_with_every_scale_rule(rule, per):
    model = ls.finalize_(network(ls.signed(3), weight_scale=rule(per)))
    for name, found in ls.integer_weights(model).items():
        assert len(found.integers.unique()) > 1
        assert torch.equal(found.integers * found.scale, model.get_submodule(name).weight)


def test_finalize_keeps_levels_that_training_ended_with():
    model = network()
    hard = {n: model.get_submodule(n).weight_quantizer.project(model.get_submodule(n).weight)
            for n in ("0", "4", "8")}  # fmt: skip
    ls.finalize_(model)
    assert all(torch.equal(model.get_submodule(n).weight, hard[n]) for n in hard)


def test_finalize_removes_the_noise_and_reestimates_batch_norm():
    model = network()
    data = batches()
    for layer in quantized_layers(model):
        for quantizer in layer.quantizers:
            for name in ("forward_std", "forward_mean", "backward_mean"):
                getattr(quantizer, name).fill_(0.4)
    flags = [m.training for m in model.modules()]
    ls.finalize_(model, data)
    for layer in quantized_layers(model):
        for quantizer in layer.quantizers:
            assert quantizer.forward_std == quantizer.forward_mean == quantizer.backward_mean == 0
            assert quantizer.backward_std > 0
    seen = inputs_of(model, "5", data)
    torch.testing.assert_close(
        model[5].running_mean, torch.stack([x.mean(0) for x in seen]).mean(0)
    )
    assert [m.training for m in model.modules()] == flags
    activations = inputs_of(model, "8", data)[0] / model[6].scale
    torch.testing.assert_close(activations, activations.round())


def test_finalize_without_a_loader_keeps_the_statistics():
    model = network()
    model[1].running_mean.fill_(0.7)
    before = copy.deepcopy(model[1].state_dict())
    ls.finalize_(model)
    assert all(torch.equal(v, before[k]) for k, v in model[1].state_dict().items())


def test_finalize_is_idempotent():
    model = ls.finalize_(network(ls.signed(4)), batches())
    before = state_of(model)
    ls.finalize_(model, batches())
    assert_same_state(model, before)


def test_finalize_after_a_step_too_many_restores_the_levels():
    model = ls.finalize_(network())
    before = ls.integer_weights(model)
    with torch.no_grad():
        model[4].weight.mul_(0.9)
    with pytest.raises(RuntimeError, match=r"weights of 4 have left .* call finalize_ again"):
        ls.integer_weights(model)
    ls.finalize_(model)
    assert torch.equal(ls.integer_weights(model)["4"].codes, before["4"].codes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rule", [None, Fixed(0.1), ls.PowerOfTwo()])
@pytest.mark.parametrize("scheduled", [False, True])
def test_weights_that_are_not_finite_are_refused(bad, rule, scheduled):
    model = network(weight_scale=rule)
    with torch.no_grad():
        model[4].weight[1, 2] = bad
    if scheduled:  # freezing must not hide what has happened
        scheduler = ls.QuantizationScheduler(model, ls.policies.StraightThrough(), 2)
        scheduler.step()
        scheduler.step()
    before = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"weight of 4 is not finite.*diverged"):
        ls.finalize_(model, batches())
    if not scheduled:
        assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("levels", [ls.signed(4), ls.power_of_two(3), ls.LevelSet((-0.7, 0.1, 1))])
def test_a_model_may_change_its_dtype_while_half_of_it_is_frozen(dtype, levels):
    model = network(levels)
    ls.QuantizationScheduler(model, ls.policies.IncrementalQuantization((0.5, 1.0)), 4)
    model.to(dtype)
    ls.finalize_(model, [x.to(dtype) for x in batches()])
    assert ls.integer_weights(model)["0"].scale.dtype == dtype
    model.to(torch.float32)
    ls.finalize_(model)
    ls.integer_weights(model)


def test_integer_weights_have_the_names_of_the_model_that_is_passed():
    gan = nn.ModuleDict({"G": nn.Sequential(nn.Linear(4, 4)), "D": nn.Sequential(nn.Linear(4, 4))})
    ls.finalize_(ls.quantize_(gan, ls.ternary()))
    wrapped = AveragedModel(gan)
    for model, names in (
        (gan, ["G.0", "D.0"]), (gan["G"], ["0"]), (wrapped, ["module.G.0", "module.D.0"])
    ):  # fmt: skip
        assert list(ls.integer_weights(model)) == names
        assert set(names) <= dict(model.named_modules()).keys()


def test_integer_weights_before_finalize_are_refused():
    model = network()
    with pytest.raises(RuntimeError, match=r"0 has free weights; call learnsched\.finalize_"):
        ls.integer_weights(model)
    ls.QuantizationScheduler(model, ls.policies.IncrementalQuantization((0.5, 1.0)), 4)
    with pytest.raises(RuntimeError, match="0 has free weights"):
        ls.integer_weights(model)


def test_layers_kept_real_are_not_in_the_codes():
    model = network(skip=("first", "last"))
    first = model[0].weight.detach().clone()
    ls.finalize_(model, batches())
    assert list(ls.integer_weights(model)) == ["4"]
    assert torch.equal(model[0].weight, first)


def test_a_finished_network_keeps_its_outputs_through_its_state_dict():
    model = ls.finalize_(network(ls.binary()), batches()).eval()
    twin = network(ls.binary()).eval()
    twin.load_state_dict(model.state_dict())
    x = batches(1)[0]
    assert torch.equal(twin(x), model(x))
    assert torch.equal(ls.integer_weights(twin)["0"].codes, ls.integer_weights(model)["0"].codes)


def test_a_checkpoint_that_is_assigned_keeps_what_is_frozen():
    state = ls.finalize_(network(), batches()).state_dict()
    twin = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):  # into a free model, then into a frozen one
            twin.load_state_dict(state, assign=True)
    assert len(ls.integer_weights(twin)) == 3
    with pytest.warns(UserWarning, match="a new parameter took the place of frozen weights"):
        twin[0].weight = nn.Parameter(torch.randn_like(twin[0].weight))


@pytest.mark.parametrize("levels", [ls.unsigned(2), ls.unsigned(8), ls.binary(), ls.ternary()])
@pytest.mark.parametrize(
    ("act", "ceiling"), [(nn.ReLU6(), 6.0), (nn.Hardtanh(0, 0.5), 0.5), (nn.Hardtanh(-1, 1), 1.0)]
)
def test_no_level_lies_above_what_the_activation_lets_through(act, ceiling, levels):
    model = ls.quantize_(nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), act), activation=levels)
    x = 100 * torch.randn(64, 2)
    with torch.no_grad():
        model[1].weight.fill_(50.0)
        assert float(model.eval()(x).max()) <= ceiling * (1 + 1e-6)  # with the initial scale
        calibrated = ls.calibrate_(model, [x])(x).max()
    assert 0.8 * ceiling <= float(calibrated) <= ceiling * (1 + 1e-6)


def test_an_activation_that_only_clips_below_has_no_ceiling():
    model = ls.quantize_(nn.Sequential(nn.Linear(2, 4), nn.ReLU()), activation=ls.unsigned(2))
    ls.calibrate_(model, [1000 * torch.rand(64, 2)])
    assert float(model[1].scale) > 10


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_scales_that_no_network_can_have_are_named(value):
    model = network()
    with torch.no_grad():
        ls.learn_scales_(model)[0].fill_(value)
    with pytest.raises(RuntimeError, match=f"after 0 has become {value:g}.*positive and finite"):
        ls.finalize_(model)


@pytest.mark.parametrize("value", [math.inf, math.nan, -math.inf])
def test_weight_scales_that_no_network_can_have_are_named(value):
    model = network()
    with torch.no_grad():
        ls.learn_weight_scales_(model)[0][0] = value
    with pytest.raises(RuntimeError, match="a scale of the weight of 0 is not positive and finite"):
        ls.finalize_(model)


class TwoInputs(nn.Module):
    """A network whose batches are dictionaries."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, *, x, shift):
        return self.net(x + shift)


class WithHead(nn.Module):
    """With a head for training alone."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.act = nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU()
        self.aux, self.aux_act = nn.BatchNorm1d(4), nn.ReLU()

    def forward(self, x):
        h = self.act(self.norm(self.body(x)))
        return (h, self.aux_act(self.aux(h))) if self.training else h


def test_there_is_nothing_to_calibrate_where_activations_are_real():
    model = ls.quantize_(nn.Sequential(nn.Linear(8, 4)), ls.ternary())
    with pytest.raises(ValueError, match="no quantized activations whose scale could be fitted"):
        ls.calibrate_(model, [torch.randn(4, 8)])


def test_what_the_batches_do_not_reach_is_kept_and_named():
    model = ls.quantize_(WithHead(), ls.ternary(), ls.unsigned(2))
    for _ in range(5):
        model(3 * torch.randn(32, 8) + 5)
    kept, other = copy.deepcopy(model.aux.state_dict()), model.norm.running_mean.clone()
    scale = model.aux_act.scale.clone()
    with pytest.warns(UserWarning, match="do not reach activations after"):
        ls.calibrate_(model, [torch.randn(32, 8)])
    assert torch.equal(model.aux_act.scale, scale)
    with pytest.warns(UserWarning, match=r"do not reach \['aux'\].*keep their statistics"):
        ls.finalize_(model, [torch.randn(32, 8)])
    assert not torch.equal(model.norm.running_mean, other)
    for name, value in model.aux.state_dict().items():
        assert torch.equal(value, kept[name]), name


class Sum(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, shift):
        return self.net(x + shift)


def test_a_model_of_two_inputs_asks_for_forward():
    pairs = [(x, torch.ones(1)) for x in batches()]
    model = Sum(network())
    with pytest.raises(TypeError, match=r"'shift': of a batch the first entry.*model\(\*batch\)"):
        ls.calibrate_(model, pairs)
    ls.calibrate_(model, pairs, forward=lambda model, batch: model(*batch))
    one = network()
    ls.calibrate_(one, [x + 1 for x in batches()])
    assert_same_state(model.net, state_of(one))


def test_batches_of_any_kind_are_run_by_forward():
    one, two = network(), TwoInputs(network())
    dictionaries = [{"x": x, "shift": torch.ones(1)} for x in batches()]
    shifted = [x + 1 for x in batches()]

    def run(model, batch):
        return model(**batch)

    for fit in (ls.calibrate_, ls.finalize_, ls.reestimate_batch_norm_):
        fit(one, shifted)
        fit(two, dictionaries, forward=run)
        assert_same_state(two.net, state_of(one))
        before = state_of(two)
        with pytest.raises(TypeError, match=r"got dict; for other batches pass forward"):
            fit(two, dictionaries)
        with pytest.raises(ValueError, match="there are no batches"):
            fit(two, [], forward=run)
        with pytest.raises(RuntimeError):
            fit(two, [*dictionaries, {"x": torch.ones(2, 3), "shift": 0}], forward=run)
        assert_same_state(two, before)


def test_a_batch_that_is_too_small_for_its_statistics_is_named():
    model = ls.quantize_(nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU()), ls.ternary())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="drop_last=True"):
        ls.finalize_(model, [torch.randn(4, 8), torch.randn(1, 8)])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_plain_layers_compute_the_same_and_load_where_the_float_model_does():
    torch.manual_seed(0)

    def build():
        return nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 2, 2),
            nn.Flatten(),
            nn.Linear(98, 3),
        )

    model, x = build(), torch.randn(6, 1, 8, 8)
    with pytest.raises(ValueError, match="no quantized layers"):
        ls.remove_quantizers_(model)
    ls.quantize_(model, ls.ternary(), ls.unsigned(2))
    with pytest.raises(RuntimeError, match=r"call learnsched\.finalize_"):
        ls.remove_quantizers_(model)
    ls.finalize_(model, [x]).eval()
    expected = model(x)
    weights = {
        name: found.integers * found.scale for name, found in ls.integer_weights(model).items()
    }
    assert ls.remove_quantizers_(model) is model
    assert torch.equal(model(x), expected)
    assert [type(m) for m in (model[0], model[3], model[5])] == [
        nn.Conv2d,
        nn.ConvTranspose2d,
        nn.Linear,
    ]
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(name).weight, weight)
    fresh = build()
    assert fresh.load_state_dict(model.state_dict(), strict=False).missing_keys == []
    assert not [k for k in model.state_dict() if "weight_quantizer" in k]
    again = ls.quantize_(build(), activation=ls.unsigned(2)).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), expected)


def test_quantizers_are_not_removed_from_activations_that_have_noise():
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    ls.quantize_(model, activation=ls.unsigned(2))
    scheduler = ls.QuantizationScheduler(model, ls.policies.AdditiveNoiseAnnealing(), 3)
    assert scheduler.get_last_setting()[0].activation_forward_std > 0
    with pytest.raises(RuntimeError, match=r"2 has noise; call learnsched\.finalize_"):
        ls.remove_quantizers_(model)
    assert not model[2].is_left_over


def test_a_model_whose_quantizers_are_removed_is_neither_trained_nor_exported(tmp_path):
    model, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(4, 8)
    ls.finalize_(ls.quantize_(model, ls.ternary(), ls.unsigned(2))).eval()
    ls.remove_quantizers_(model)
    for use in (
        lambda: ls.export_onnx(model, x, tmp_path / "net.onnx"),
        lambda: ls.finalize_(model),
        lambda: ls.QuantizationScheduler(model, ls.policies.StraightThrough(), 3),
    ):
        with pytest.raises(ValueError, match="remove_quantizers_ has finished this model"):
            use()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["0.bias", "1.weight", "1.bias"])
def test_parameters_that_are_not_finite_are_named_though_no_weight_is_quantized_there(name):
    model = network()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = math.nan
    state = state_of(model)
    with pytest.raises(RuntimeError, match=f"^{name} is not finite"):
        ls.finalize_(model, batches())
    torch.testing.assert_close(state_of(model), state, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_data_that_would_spoil_batch_norms_are_refused_and_nothing_changes(value):
    model, data = network(), batches()
    data[2][1, 1, 0] = value
    for spoil in (ls.finalize_, ls.reestimate_batch_norm_):
        state = state_of(model)
        with pytest.raises(ValueError, match="statistics that are not finite"):
            spoil(model, data)
        assert_same_state(model, state)


def test_batches_count_by_their_size():
    x = torch.randn(37, 3, 5, generator=torch.Generator().manual_seed(0)) * 2 + 1
    whole, parts = (nn.BatchNorm1d(3) for _ in range(2))
    ls.reestimate_batch_norm_(whole, [x])
    ls.reestimate_batch_norm_(parts, x.split(16))  # 16, 16 and 5
    torch.testing.assert_close(parts.running_mean, whole.running_mean)
    means = [part.transpose(0, 1).flatten(1).var(1, correction=1) for part in x.split(16)]
    sizes = torch.tensor([16.0, 16.0, 5.0])
    expected = (torch.stack(means) * sizes.view(-1, 1)).sum(0) / 37
    torch.testing.assert_close(parts.running_var, expected)
    assert parts.momentum == 0.1 and not parts._forward_pre_hooks


def test_batches_of_one_size_give_torchs_cumulative_mean_to_the_bit():
    data = batches(count=7)
    model, reference = network(), network()
    ls.reestimate_batch_norm_(model, data)
    for norm in (reference[1], reference[5]):
        norm.reset_running_stats()
        norm.momentum = None
    reference.eval()
    for norm in (reference[1], reference[5]):
        norm.train()
    with torch.no_grad():
        for x in data:
            reference(x)
    assert_same_state(model, state_of(reference))


@pytest.mark.parametrize(
    "run",
    [
        ls.finalize_,
        ls.report,
        ls.learn_scales_,
        lambda model: ls.quantize_(model, ls.ternary()),
        lambda model: ls.QuantizationScheduler(model, ls.policies.StraightThrough(), epochs=2),
    ],
)
def test_what_is_no_module_is_refused(run):
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got 3"):
        run(3)


def trained(freeze=False, prepare=lambda x: x, loss_of=None):
    """A network after a whole run, its batch norms frozen or not, on batches that the loop prepares."""
    model = network()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    ls.reestimate_batch_norm_(model, batches())  # as a float network has them
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    scheduler = ls.QuantizationScheduler(
        model, ls.policies.StraightThrough(), epochs=3, steps_per_epoch=20, optimizer=optimizer
    )
    for epoch in range(3):
        model.train()
        for norm in norms if freeze else ():
            norm.eval()
        for batch in batches(20, seed=epoch):
            optimizer.zero_grad()
            model(prepare(batch)).square().mean().backward()
            optimizer.step()
        scheduler.step()
    return model, norms


def told_in_finalizing(model, *given, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ls.finalize_(model, *given, **options)
    return [str(w.message) for w in caught]


def test_frozen_batch_norms_keep_their_statistics():
    model, norms = trained(freeze=True)
    before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    assert told_in_finalizing(model, batches()) == []
    for norm, (mean, variance) in zip(norms, before, strict=True):
        assert torch.equal(norm.running_mean, mean) and torch.equal(norm.running_var, variance)
        assert not norm.training


def test_norms_of_a_frozen_block_keep_their_statistics():
    block = nn.Sequential(nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6)), nn.ReLU())
    model = nn.Sequential(block, nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()).train()
    ls.quantize_(model, ls.ternary(), ls.unsigned(2))
    block.eval()
    ls.finalize_(model, [torch.randn(16, 8)])
    assert torch.equal(block[0][1].running_mean, torch.zeros(6))
    assert not torch.equal(model[2].running_mean, torch.zeros(6))


def test_weights_of_a_model_without_quantizers_stay_on_their_levels():
    model, _ = trained()
    ls.remove_quantizers_(ls.finalize_(model))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    [batch] = batches(1)
    model(batch).square().mean().backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    kinds = (nn.Linear, nn.Conv2d)
    levels = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, kinds)}
    assert levels and moved.isdisjoint(levels) and moved


def test_a_refused_float_checkpoint_frees_nothing():
    model, _ = trained()
    quantizer = next(m for m in model.modules() if hasattr(m, "weight_quantizer")).weight_quantizer
    assert bool(quantizer.membership.all())
    state = {n: p for n, p in model.state_dict().items() if "quantizer" not in n}
    wrong = {n: torch.zeros(1, 1) if n.endswith("weight") else p for n, p in state.items()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(wrong, strict=False)
    assert bool(quantizer.membership.all())
    with pytest.warns(UserWarning, match="a float checkpoint was loaded"):
        model.load_state_dict(state, strict=False)
    assert not bool(quantizer.membership.any())


def test_statistics_of_other_data_than_those_of_training_are_warned_of():
    def scaled(x):
        return 3 * x - 1

    model, _ = trained(prepare=scaled)
    twin, third = copy.deepcopy(model), copy.deepcopy(model)
    [note] = told_in_finalizing(model, batches())
    assert "batch norms ['1'" in note and "forward=" in note
    assert told_in_finalizing(twin, [scaled(x) for x in batches()]) == []
    forward = lambda model, x: model(scaled(x))  # noqa: E731
    assert told_in_finalizing(third, batches(), forward=forward) == []


def test_frozen_batch_norms_of_a_model_in_evaluation_are_warned_of():
    model, norms = trained(freeze=True)
    for norm in norms:
        norm.num_batches_tracked += 1000  # of the float network's training
        norm.running_mean += 3  # as weights that train on may have it
    [note] = told_in_finalizing(model.eval(), batches())
    assert "call finalize_(model) without a loader" in note


def test_in_the_middle_of_a_run_statistics_may_move():
    model = network()
    ls.QuantizationScheduler(model, ls.policies.StraightThrough(), epochs=3)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_mean += 3
    assert told_in_finalizing(model, batches()) == []
