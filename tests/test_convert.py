"""quantize_: what it changes, what it keeps, what it refuses."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

import learnsched as ls
from learnsched.activation_quantizer import ActivationQuantizer
from learnsched.layers import quantized_layers
from learnsched.modules import QuantizedLinear
from learnsched.scales import AbsoluteMean, Fixed, Maximum

pytestmark = pytest.mark.filterwarnings("ignore:no batch norm precedes")


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)
    )


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU6(),
        nn.Unflatten(2, (2, 3)), nn.Conv2d(4, 5, 2), nn.BatchNorm2d(5), nn.Hardtanh(0, 4),
        nn.Flatten(), nn.Linear(10, 3),
    )  # fmt: skip


class Reversed(nn.Module):
    """Registered from the output to the input; one ReLU for both layers."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.relu = nn.ReLU()
        self.middle = nn.Linear(6, 6)
        self.stem = nn.Linear(8, 6)

    def forward(self, x):
        return self.head(self.relu(self.middle(self.relu(self.stem(x)))))


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"block": mlp(), "act": nn.ReLU()})
        self.heads = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])

    def forward(self, x):
        x = self.body["act"](self.body["block"](x))
        return self.heads[0](x) + self.heads[1](x)


def names(model):
    return [layer.info.name for layer in quantized_layers(model)]


def snapshot(model):
    """Everything that a refused call must not change."""
    return (
        [(n, id(m), type(m), m.training, len(m._forward_pre_hooks)) for n, m in
         model.named_modules()],
        {k: v.clone() for k, v in model.state_dict().items()},
    )  # fmt: skip


def assert_unchanged(model, before):
    modules, state = snapshot(model)
    assert modules == before[0]
    assert state.keys() == before[1].keys()
    assert all(torch.equal(v, before[1][k]) for k, v in state.items())


@pytest.mark.parametrize("make", [mlp, cnn, Reversed, Nested])
@pytest.mark.parametrize("training", [True, False])
def test_parameters_keep_identity_value_and_name(make, training):
    model = make().train(training)
    before = dict(model.named_parameters())
    values = {n: p.detach().clone() for n, p in before.items()}
    result = ls.quantize_(model, ls.ternary(), ls.unsigned(2))
    after = dict(model.named_parameters())
    assert result is model
    assert list(after) == list(before)
    assert all(after[n] is before[n] and torch.equal(after[n], values[n]) for n in after)
    assert all(m.training is training for m in model.modules())


@pytest.mark.parametrize("make", [mlp, cnn, Reversed, Nested])
def test_a_float_checkpoint_loads_strictly(make):
    model = ls.quantize_(make(), ls.ternary(), ls.unsigned(2))
    torch.manual_seed(1)
    checkpoint = {k: torch.rand_like(v.float()) for k, v in make().state_dict().items()}
    scale = quantized_layers(model)[0].activations[0].scale.clone()
    model.load_state_dict(checkpoint, strict=True)
    assert all(torch.equal(p, checkpoint[n]) for n, p in model.named_parameters())
    assert quantized_layers(model)[0].activations[0].scale == scale


def test_a_fused_batch_norm_counts_although_the_weights_were_frozen():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    ls.finalize_(ls.quantize_(model, ls.ternary(), ls.unsigned(2))).eval()
    with torch.no_grad():
        model[1].running_var.mul_(4.0)
        model[1].weight.mul_(torch.tensor([-1.0, 1.0, 2.0, 3.0]))
    conv, norm = model[0], model[1]
    conv.weight = conv.weight  # the same one, as when weights are tied again
    with pytest.warns(UserWarning, match="a new parameter took the place of frozen weights"):
        fused = fuse_conv_bn_eval(conv, norm)
    assert bool((conv.weight_quantizer.membership == 1).all())
    x = torch.randn(3, 2, 6, 6)
    # Another scale a channel is all that fusing brings to ternary weights.
    expected = norm(nn.functional.conv2d(x, conv.weight.sign(), conv.bias))
    codes = nn.functional.conv2d(x, fused.weight_quantizer(fused.weight).sign())
    shown = [torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] for a, b in
             zip(expected.movedim(1, 0), codes.movedim(1, 0), strict=True)]  # fmt: skip
    torch.testing.assert_close(torch.stack(shown), torch.ones(4))


@pytest.mark.parametrize("finalized", [True, False])
def test_a_float_checkpoint_frees_what_was_frozen(finalized):
    model = ls.quantize_(mlp(), ls.ternary(), ls.unsigned(2))
    scheduler = ls.QuantizationScheduler(model, ls.policies.IncrementalQuantization((0.5, 1)), 4)
    if finalized:
        ls.finalize_(model)
    checkpoint, x = mlp(seed=1).state_dict(), torch.randn(5, 8)
    with pytest.warns(UserWarning, match="float checkpoint was loaded into a model with frozen"):
        model.load_state_dict(checkpoint)
    assert torch.equal(model[0].weight, checkpoint["0.weight"])
    fresh = ls.quantize_(mlp(seed=1), ls.ternary(), ls.unsigned(2))
    for one, other in zip(quantized_layers(model), quantized_layers(fresh), strict=True):
        for mine, theirs in zip(one.quantizers, other.quantizers, strict=True):
            theirs.noise = mine.noise
            for name in ("forward_std", "backward_std"):
                getattr(mine, name).fill_(0.5)
                getattr(theirs, name).fill_(0.5)
    assert torch.equal(model.eval()(x), fresh.eval()(x))
    if not finalized:  # and the schedule goes on
        for _ in range(4):
            scheduler.step()
        assert all(len(w.unique()) <= 3 for w in ls.finalize_(model)[0].weight)


def test_what_is_missing_or_unknown_in_a_checkpoint_is_still_found():
    model = ls.quantize_(mlp(), ls.ternary(), ls.unsigned(2))
    state = model.state_dict()
    del state["0.weight_quantizer.held"]
    state["2.colour"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"(?s)held.*colour"):
        model.load_state_dict(state)
    float_state = mlp().state_dict()
    del float_state["3.bias"]
    with pytest.raises(RuntimeError, match=r"3\.bias"):
        model.load_state_dict(float_state)


@pytest.mark.parametrize("make", [mlp, cnn, Nested])
def test_a_quantized_state_round_trips_through_a_file(make):
    x = torch.randn(4, 1, 8) if make is cnn else torch.randn(4, 8)
    model = ls.quantize_(make(), ls.ternary(), ls.unsigned(2))
    policy = ls.policies.IncrementalQuantization((0.4, 1.0))
    ls.QuantizationScheduler(model, policy, epochs=4)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = ls.quantize_(make(), ls.ternary(), ls.unsigned(2))
    twin.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for layer in quantized_layers(twin):
        for quantizer in layer.quantizers:
            quantizer.noise = quantized_layers(model)[0].quantizers[0].noise
    assert torch.equal(model.eval()(x), twin.eval()(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_equal_and_independent(duplicate):
    model = ls.quantize_(mlp(), ls.ternary(), ls.unsigned(2)).eval()
    ls.QuantizationScheduler(model, ls.policies.AdditiveNoiseAnnealing(noise="logistic"), epochs=3)
    twin = duplicate(model)
    x = torch.randn(4, 8)
    assert torch.equal(model(x), twin(x))
    assert names(twin) == names(model)
    assert repr(ls.report(twin)) == repr(ls.report(model))
    before = model(x)
    ls.finalize_(twin)
    assert torch.equal(model(x), before)


def test_a_whole_model_survives_torch_save():
    model = ls.quantize_(mlp(), ls.ternary(), ls.unsigned(2)).eval()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    x = torch.randn(4, 8)
    assert torch.equal(model(x), twin(x))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_an_optimizer_made_before_trains_the_quantized_model(kind):
    model = mlp()
    optimizer = kind(model.parameters(), lr=0.1)
    ls.quantize_(model, ls.ternary(), ls.unsigned(2))
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(16, 8)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


ACTIVATIONS = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(-2, 2), nn.LeakyReLU(), nn.PReLU(6),
    nn.RReLU(), nn.ELU(), nn.CELU(), nn.SELU(), nn.GELU(), nn.SiLU(), nn.Mish(),
    nn.Hardswish(), nn.Softplus(),
]  # fmt: skip


@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda a: type(a).__name__)
def test_every_relu_like_module_is_quantized(act):
    model = nn.Sequential(nn.Linear(8, 6), act)
    float_state, x = copy.deepcopy(model.state_dict()), torch.randn(40, 8)
    levels = ls.unsigned(2)
    parameters = dict(model.named_parameters())
    ls.quantize_(model, activation=levels).eval()
    reference = copy.deepcopy(act).eval()(model[0](x))
    scale = model[1].scale
    assert torch.equal(model(x), levels.quantize(reference / scale) * scale)
    assert dict(model.named_parameters()) == parameters
    model.load_state_dict(float_state, strict=True)


def test_an_activation_without_batch_norm_is_warned_of():
    with pytest.warns(UserWarning, match=r"no batch norm precedes \['4'\].*calibrate_") as caught:
        ls.quantize_(mlp(), ls.ternary(), ls.unsigned(2))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ls.quantize_(cnn(), ls.ternary(), ls.unsigned(2))
        ls.quantize_(mlp(), ls.ternary())


@pytest.mark.parametrize(
    ("scale", "shift", "far"), [(0.1, 0, True), (0.9, 0.3, False), (1, 5, True)]
)
def test_batch_norms_that_have_learned_another_scale_are_warned_of(scale, shift, far):
    model = cnn()
    with torch.no_grad():
        model[1].weight.fill_(scale)
        model[1].bias.fill_(shift)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ls.quantize_(model, ls.ternary(), ls.unsigned(2))
    said = [str(w.message) for w in caught]
    size = math.sqrt(scale**2 + shift**2)
    expected = [f"['2 ({size:.2g})'] put out values of that root mean square"] if far else []
    assert len(said) == len(expected) and all(e in s for e, s in zip(expected, said, strict=True))


def test_a_layer_that_is_left_real_at_the_end_leaves_the_output_real():
    def network():
        return nn.Sequential(mlp(), nn.BatchNorm1d(3), nn.Softplus())

    x = torch.randn(4, 8)
    whole = ls.quantize_(network(), ls.ternary(), ls.unsigned(2), example_input=x)
    assert isinstance(whole[2], ActivationQuantizer)
    model = network()
    ls.quantize_(model, ls.ternary(), ls.unsigned(2), skip=("last",), example_input=x)
    assert type(model[2]) is nn.Softplus and type(model[0][5]) is nn.Linear
    assert isinstance(model[0][4], ActivationQuantizer)


def decoder():
    return nn.TransformerDecoderLayer(8, 2, 16, batch_first=True, activation=nn.ReLU())


def test_copies_of_a_decoder_layer_compute_what_it_does():
    torch.manual_seed(0)
    x, layer = torch.randn(3, 5, 8), decoder()
    ls.quantize_(layer, ls.ternary(), ls.unsigned(2), example_input=(x, x))
    assert isinstance(layer.activation, ActivationQuantizer)
    ls.finalize_(layer).eval()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x, x), layer(x, x))


def test_a_module_that_an_attribute_hides_is_refused():
    model = nn.TransformerDecoder(decoder(), 2)  # whose copies compute F.relu
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"\['layers.0.activation', 'layers.1.activation'\] are mod"
    ):
        ls.quantize_(model, ls.ternary(), ls.unsigned(2))
    assert_unchanged(model, before)
    for layer in model.layers:
        del vars(layer)["activation"]
    ls.quantize_(model, ls.ternary(), ls.unsigned(2))
    assert all(isinstance(layer.activation, ActivationQuantizer) for layer in model.layers)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got None"):
        ls.quantize_(None, ls.ternary())
    with pytest.raises(TypeError, match="given by its name or path, got None"):
        ls.load_pretrained(None)


def test_two_parameters_in_one_memory_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data = model[0].weight.data
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"weight of 0 lies in the same memory as \['1.weight'\]"):
        ls.quantize_(model, ls.ternary())
    assert_unchanged(model, before)


def test_a_warning_turned_into_an_error_leaves_the_model_alone():
    model = mlp()
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            ls.quantize_(model, ls.ternary(), ls.unsigned(2))
    assert_unchanged(model, before)


def test_after_a_batch_norm_the_scale_suits_a_standard_normal():
    model = ls.quantize_(mlp(), activation=ls.unsigned(2))
    x = torch.randn(200_000).clamp(min=0)

    def error(scale):
        return float((x - ls.unsigned(2).quantize(x / scale) * scale).square().mean())

    best = min((0.4 + 0.01 * i for i in range(60)), key=error)
    assert float(model[2].scale) == pytest.approx(best, abs=0.03)


def test_a_shared_relu_stays_one_module_in_every_place():
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu, nn.ModuleList([relu]))
    ls.quantize_(model, ls.ternary(), ls.unsigned(2))
    assert isinstance(model[1], ActivationQuantizer)
    assert model[1] is model[3] is model[4][0]
    assert not any(isinstance(m, nn.ReLU) for m in model.modules())


def test_a_relu_that_a_forward_uses_twice_belongs_to_its_first_layer():
    model = ls.quantize_(Reversed(), ls.ternary(), ls.unsigned(2), example_input=torch.zeros(1, 8))
    layers = quantized_layers(model)
    assert [layer.info.name for layer in layers] == ["stem", "middle", "head"]
    assert layers[0].activations == (model.relu,)
    assert [layer.activations for layer in layers[1:]] == [(), ()]
    assert [layer.info.activation_levels for layer in layers] == [4, 0, 0]


def test_a_linear_under_two_names_is_quantized_once():
    linear = nn.Linear(5, 5)
    model = nn.Sequential(linear, nn.ReLU(), linear)
    state = copy.deepcopy(model.state_dict())
    ls.quantize_(model, ls.ternary(), ls.unsigned(2))
    assert type(model[0]) is QuantizedLinear
    assert model[0] is model[2] is linear
    assert names(model) == ["0"]
    model.load_state_dict(state, strict=True)
    ls.finalize_(model)
    assert list(ls.integer_weights(model)) == ["0"]


@pytest.mark.parametrize("other", ["embedding", "linear"])
def test_a_weight_that_is_not_quantized_wherever_it_is_used_is_refused(other):
    model = nn.ModuleDict({"first": nn.Embedding(6, 4), "last": nn.Linear(4, 6)})
    if other == "linear":
        model["first"] = nn.Linear(4, 6)
    model["last"].weight = model["first"].weight
    before = snapshot(model)
    overrides = {"first": None} if other == "linear" else {}
    with pytest.raises(ValueError, match=r"last shares its weight with \['first'\].*overrides"):
        ls.quantize_(model, ls.ternary(), overrides=overrides)
    assert_unchanged(model, before)


def test_the_root_may_be_the_layer():
    linear = ls.quantize_(nn.Linear(4, 3), ls.ternary(), skip=())
    assert type(linear) is QuantizedLinear
    assert names(linear) == [""]
    assert linear(torch.randn(2, 4)).shape == (2, 3)
    ls.QuantizationScheduler(linear, ls.policies.StraightThrough(), 1).step()
    ls.finalize_(linear, [torch.randn(2, 4)])
    assert list(ls.integer_weights(linear)) == [""]


def test_the_root_cannot_be_the_activation():
    with pytest.raises(ValueError, match="no activation is left"):
        ls.quantize_(nn.ReLU(), activation=ls.unsigned(2))


def test_without_an_example_the_order_is_that_of_registration():
    model = ls.quantize_(Reversed(), ls.ternary(), skip=("first",))
    assert names(model) == ["middle", "stem"]


@pytest.mark.parametrize(
    ("skip", "expected"),
    [
        (("first",), ["middle", "head"]),
        (("last",), ["stem", "middle"]),
        (["last", "first"], ["middle"]),
    ],
)
def test_first_and_last_are_found_by_execution(skip, expected):
    model = ls.quantize_(Reversed(), ls.ternary(), skip=skip, example_input=torch.zeros(2, 8))
    assert names(model) == expected


class NormalizedLinear(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, nn.functional.normalize(self.weight))


@pytest.mark.parametrize("end", ["first", "last"])
def test_an_end_that_stays_real_in_any_case_is_an_end(end):
    layers = [NormalizedLinear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)]
    model = nn.Sequential(*(layers if end == "first" else layers[::-1]))
    with pytest.warns(UserWarning, match="NormalizedLinear.*stay real"):
        ls.quantize_(model, ls.ternary(), skip=(end,), example_input=torch.zeros(2, 8))
    assert [type(m).__name__ for m in model if isinstance(m, nn.Linear)].count("Linear") == 0


class Paired(nn.Module):
    """A bilinear stem: of such layers no quantized kind is known."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Bilinear(4, 4, 8)
        self.rest = nn.Sequential(nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x):
        return self.rest(self.stem(x, x))


def test_a_bilinear_stem_and_a_recurrent_head_are_ends():
    stem = Paired()
    with pytest.warns(UserWarning, match="Bilinear.*stay real"):
        ls.quantize_(
            stem, ls.ternary(), skip=("first",), overrides={"stem": None},
            example_input=torch.zeros(1, 4),
        )  # fmt: skip
    assert names(stem) == ["rest.1", "rest.3"]
    head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.GRU(8, 2))
    ls.quantize_(head, ls.ternary(), skip=("last",), example_input=torch.zeros(5, 8))
    assert names(head) == ["0", "2"]


def test_overrides_are_a_mapping():
    with pytest.raises(TypeError, match=r"got \['0'\]"):
        ls.quantize_(nn.Sequential(nn.Linear(8, 4)), ls.ternary(), overrides=["0"])


def test_a_model_that_is_quantized_in_inference_mode_can_be_trained():
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    with torch.inference_mode():
        ls.quantize_(model, ls.ternary(), ls.unsigned(2), example_input=torch.zeros(2, 8))
    scheduler = ls.QuantizationScheduler(model, ls.policies.StraightThrough(), epochs=2)
    model(torch.randn(6, 8)).square().mean().backward()
    scheduler.step()
    assert scheduler.get_last_setting()[0].fraction == 1


def test_the_last_layer_is_one_that_is_executed():
    class WithSpare(Reversed):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(6, 3)

    model = ls.quantize_(WithSpare(), ls.ternary(), skip=("last",), example_input=torch.zeros(1, 8))
    assert names(model) == ["stem", "middle", "spare"]


def test_a_layer_that_the_example_does_not_reach_is_warned_of():
    class Functional(Reversed):
        def forward(self, x):
            x = F.linear(self.relu(self.stem(x)), self.middle.weight, self.middle.bias)
            return self.head(self.relu(x))

    with pytest.warns(UserWarning, match=r"did not reach \['middle'\].*F\.linear") as caught:
        ls.quantize_(Functional(), ls.ternary(), example_input=torch.zeros(1, 8))
    assert caught[0].filename == __file__


def test_functions_of_a_branch_of_training_are_said_not_to_be_looked_for():
    class Auxiliary(Reversed):
        def forward(self, x):
            x = self.relu(self.stem(x))
            return F.relu(self.middle(x)) if self.training else x

    for activation, words in (
        (ls.unsigned(2), "functions were not looked for"),
        (None, "heads, is"),
    ):
        with pytest.warns(UserWarning, match=f"branch taken in training alone.*{words}"):
            ls.quantize_(Auxiliary(), ls.ternary(), activation, example_input=torch.zeros(1, 8))


def test_several_inputs_are_given_as_a_tuple():
    class Two(Reversed):
        def forward(self, x, y):
            return super().forward(x + y)

    x = torch.zeros(1, 8)
    assert names(ls.quantize_(Two(), ls.ternary(), example_input=(x, x)))[0] == "stem"


def test_an_activation_may_follow_a_real_weight_or_none():
    model = nn.Sequential(nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    ls.quantize_(model, ls.ternary(), ls.unsigned(2), skip=("first",))
    infos = [layer.info for layer in quantized_layers(model)]
    assert [(i.name, i.fan_in, i.weight_levels, i.activation_levels) for i in infos] == [
        ("0", 0, 0, 4),
        ("1", 0, 0, 4),
        ("3", 4, 3, 0),
    ]


def test_several_activations_after_one_weight_share_its_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(), nn.GELU(), nn.Linear(4, 2))
    ls.quantize_(model, ls.ternary(), ls.unsigned(2))
    first, last = quantized_layers(model)
    assert first.activations == (model[1], model[3])
    assert last.activations == ()


def test_fan_in_of_convolutions_counts_the_kernel_and_the_group():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Conv1d(3, 2, 5))
    ls.quantize_(model, ls.binary())
    assert [layer.info.fan_in for layer in quantized_layers(model)] == [18, 15]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"heads.*": None}, ["body.block.0", "body.block.3", "body.block.5"]),
        ({"*block*": None}, ["heads.0", "heads.1"]),
        ({"heads.1": ls.LayerConfig(ls.binary()), "*": None}, ["heads.1"]),
        ({"*": None, "heads.1": ls.LayerConfig(ls.binary())}, None),
    ],
)
def test_overrides_match_patterns_and_the_first_decides(overrides, expected):
    model = Nested()
    if expected is None:
        with pytest.raises(ValueError, match="no weight is left to quantize"):
            ls.quantize_(model, ls.ternary(), overrides=overrides)
        return
    ls.quantize_(model, ls.ternary(), overrides=overrides)
    assert names(model) == expected


def test_an_override_wins_over_skip_and_alone_suffices():
    config = ls.LayerConfig(ls.signed(4), weight_scale=Maximum())
    model = ls.quantize_(mlp(), ls.ternary(), skip=("first", "last"), overrides={"0": config})
    assert names(model) == ["0", "3"]
    assert model[0].weight_quantizer.levels.name == "signed4"
    assert model[0].weight_quantizer.rule == Maximum()
    assert names(ls.quantize_(mlp(), overrides={"3": config})) == ["3"]


def test_an_override_of_a_weight_holds_for_the_activations_after_it():
    config = ls.LayerConfig(ls.binary(), ls.unsigned(4), activation_scale=Fixed(0.1))
    model = ls.quantize_(mlp(), ls.ternary(), ls.unsigned(2), overrides={"0": config})
    assert model[2].levels.name == "unsigned4"
    assert model[2].rule == Fixed(0.1)
    assert model[4].levels.name == "unsigned2"


def test_an_override_of_an_activation_leaves_its_weight_alone():
    overrides = {"2": None, "4": ls.LayerConfig(activation=ls.unsigned(3))}
    model = ls.quantize_(mlp(), ls.ternary(), ls.unsigned(2), overrides=overrides)
    assert type(model[2]) is nn.ReLU
    assert model[4].levels.name == "unsigned3"
    assert names(model) == ["0", "3", "5"]


def test_none_keeps_a_weight_real_and_its_activation_quantized():
    model = ls.quantize_(mlp(), ls.ternary(), ls.unsigned(2), overrides={"0": None})
    assert type(model[0]) is nn.Linear
    assert isinstance(model[2], ActivationQuantizer)


class Capped(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(max=1)


def broken(x):
    raise ArithmeticError("broken forward")


def with_weight_norm():
    model = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model[3])
    return model


REFUSED = [
    (mlp, {"weight": "ternary"}, TypeError, r"ternary\(\).*got str"),
    (mlp, {"weight": ls.ternary}, TypeError, "got function"),
    (mlp, {"activation": 2}, TypeError, "got int"),
    (mlp, {"overrides": {"0": ls.ternary()}}, TypeError, "LayerConfig or None, got LevelSet"),
    (mlp, {"overrides": {"0": ls.LayerConfig(2)}}, TypeError, "got int"),
    (mlp, {"weight": ls.ternary(), "weight_scale": AbsoluteMean}, TypeError, "scale rule"),
    (mlp, {"weight": ls.ternary(), "activation_scale": 0.5}, TypeError, r"LeastSquares.*got 0\.5"),
    (mlp, {}, ValueError, "nothing to do"),
    (mlp, {"overrides": {"0": None}}, ValueError, "nothing to do"),
    (mlp, {"weight": ls.ternary(), "skip": "first"}, ValueError, "sequence of 'first' and 'last'"),
    (mlp, {"weight": ls.ternary(), "skip": ("second",)}, ValueError, "sequence of 'first'"),
    (mlp, {"weight": ls.ternary(), "overrides": {"head.*": None}}, ValueError,
     r"no module matches \['head\.\*'\].*\['0', '2', '3', '4', '5'\]"),
    (mlp, {"weight": ls.ternary(), "overrides": {"1": None}}, ValueError,
     r"no module matches \['1'\]"),
    (lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
     {"weight": ls.ternary(), "skip": ("first", "last")}, ValueError, "no weight is left"),
    (lambda: nn.Sequential(nn.LayerNorm(4)), {"weight": ls.ternary()}, ValueError,
     "no weight is left"),
    (lambda: nn.Sequential(nn.Linear(4, 4)),
     {"weight": ls.ternary(), "activation": ls.unsigned(2)}, ValueError, r"F\.relu.*use nn\.ReLU"),
    (lambda: nn.Sequential(nn.LazyLinear(4)), {"weight": ls.ternary()}, ValueError, "lazy"),
    (lambda: nn.Linear(4, 4, device="meta"), {"weight": ls.ternary()}, ValueError, "to_empty"),
    (lambda: nn.Sequential(Capped(4, 4)), {"weight": ls.ternary()}, ValueError,
     "no weight is left"),
    (mlp, {"weight": ls.LevelSet((-1.0, 0.0, 1.0), (-1.2, 1.2))}, ValueError, "their own cells"),
    (mlp, {"overrides": {"0": ls.LayerConfig(ls.LevelSet((0.0, 1.0), (1.0,)))}}, ValueError,
     "frozen weights would fall to other levels"),
    (with_weight_norm, {"weight": ls.ternary()}, ValueError,
     "weight of 3 is computed from others.*overrides={'3': None}"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "options", "kind", "message"), REFUSED)
def test_a_refused_call_says_why_and_changes_nothing(make, options, kind, message):
    model = make()
    if any(nn.parameter.is_lazy(p) or p.is_meta for p in model.parameters()):  # nothing to compare
        with pytest.raises(kind, match=message):
            ls.quantize_(model, **options)
        return
    before = snapshot(model)
    with pytest.raises(kind, match=message):
        ls.quantize_(model, **options)
    assert_unchanged(model, before)


@pytest.mark.parametrize("training", [True, False])
def test_a_forward_that_fails_on_the_example_changes_nothing(training):
    model = mlp().train(training)
    model[1].eval()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ls.quantize_(model, ls.ternary(), example_input=torch.zeros(2, 5))
    assert_unchanged(model, before)


def test_the_example_moves_neither_statistics_nor_flags_nor_gradients():
    model = mlp()
    model[1].eval()
    statistics = copy.deepcopy(model[1].state_dict())
    ls.quantize_(model, ls.ternary(), example_input=torch.randn(4, 8))
    assert all(torch.equal(v, statistics[k]) for k, v in model[1].state_dict().items())
    assert [m.training for m in model] == [True, False, True, True, True, True]
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_a_rule_that_fails_changes_nothing():
    def rule(x, levels):
        if x.shape == (6, 6):
            raise ArithmeticError("no scale")
        return x.abs().mean()

    model = mlp()
    before = snapshot(model)
    with pytest.raises(ArithmeticError, match="no scale"):
        ls.quantize_(model, ls.ternary(), ls.unsigned(2), weight_scale=rule)
    assert_unchanged(model, before)


def test_a_second_call_is_refused():
    model = ls.quantize_(mlp(), ls.ternary(), ls.unsigned(2))
    before = snapshot(model)
    with pytest.raises(ValueError, match="quantized already"):
        ls.quantize_(model, ls.ternary())
    with pytest.raises(ValueError, match="quantized already"):
        ls.quantize_(nn.Sequential(model, nn.Linear(3, 3)), ls.ternary())
    assert_unchanged(model, before)


def test_models_quantized_apart_are_told_from_one_model():
    joined = nn.Sequential(*(ls.quantize_(mlp(), ls.ternary()) for _ in range(2)))
    with pytest.raises(ValueError, match="in different calls"):
        ls.QuantizationScheduler(joined, ls.policies.StraightThrough(), 2)


def test_a_float_model_has_no_quantized_layers():
    with pytest.raises(ValueError, match=r"call learnsched\.quantize_ first"):
        quantized_layers(mlp())


def test_report_is_a_table_of_what_is_quantized_and_what_is_not():
    model = ls.quantize_(mlp(), ls.ternary(), ls.unsigned(2), skip=("last",), overrides={"4": None})
    assert repr(ls.report(model)).splitlines() == [
        "module  kind        levels     scale",
        "0       Linear      ternary    AbsoluteMean",
        f"2       activation  unsigned2  {model[2].scale.item():.4g}",
        "3       Linear      ternary    AbsoluteMean",
        "4       ReLU        real",
        "5       Linear      real",
    ]


def test_report_names_the_activation_and_not_what_it_wraps():
    model = ls.quantize_(nn.Sequential(nn.Linear(3, 3), nn.GELU()), activation=ls.unsigned(2))
    assert [row[:2] for row in ls.report(model).rows] == [("0", "Linear"), ("1", "activation")]


def test_report_shows_what_quantize_does_not_know():
    model = nn.Sequential(
        nn.Bilinear(1, 2, 3), nn.Tanh(), nn.Hardswish(), nn.Embedding(4, 3), nn.LSTM(3, 3),
        nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 3),
    )  # fmt: skip
    rows = ls.report(ls.quantize_(model, ls.ternary(), overrides={"4": None})).rows
    kinds = ["Bilinear", "Tanh", "Hardswish", "Embedding", "LSTM"]
    assert rows[:-1] == tuple((str(i), kind, "real", "") for i, kind in enumerate(kinds))
    assert rows[-1][:3] == ("7", "Linear", "ternary")


def test_hooks_on_activations_that_are_replaced_are_warned_of():
    model = mlp()
    model[2].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"\['2'\] have hooks.*after quantize_"):
        ls.quantize_(model, ls.ternary(), ls.unsigned(2))


def test_hooks_on_weight_layers_survive():
    model, seen = mlp(), []
    model[3].register_forward_hook(lambda *_: seen.append("forward"))
    model[3].register_forward_pre_hook(lambda *_: seen.append("before"))
    model[3].register_full_backward_hook(lambda *_: seen.append("backward"))
    ls.quantize_(model, ls.ternary(), ls.unsigned(2))
    model(torch.randn(4, 8)).sum().backward()
    assert seen == ["before", "forward", "backward"]


def test_references_to_weight_layers_stay_valid():
    model = mlp()
    layer = model[3]
    ls.quantize_(model, ls.ternary())
    assert model[3] is layer
    assert isinstance(layer, nn.Linear)


def test_functional_activations_leave_a_weight_only_model_usable():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(F.relu(self.first(x)))

    with pytest.raises(ValueError, match=r"F\.relu"):
        ls.quantize_(Functional(), ls.ternary(), ls.unsigned(2))
    assert names(ls.quantize_(Functional(), ls.ternary())) == ["first", "last"]


def test_an_activation_called_as_a_function_beside_modules_is_warned_of():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.relu, self.last = nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4)
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return F.relu(self.last(self.relu(self.norm(self.first(x))))).relu()

    x = torch.zeros(2, 8)
    with pytest.warns(UserWarning, match=r"calls relu as functions, whose results stay real"):
        ls.quantize_(Mixed(), ls.ternary(), ls.unsigned(2), example_input=x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ls.quantize_(Mixed(), ls.ternary(), example_input=x)  # activations were not asked for


def test_a_weight_that_the_model_uses_itself_too_is_warned_of():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.code = nn.Linear(8, 4, bias=False)

        def forward(self, x):
            code = self.code(x.to(self.code.weight.dtype))  # its dtype alone is no use
            return F.linear(code, self.code.weight.t()), self.code.weight.shape

    with pytest.warns(
        UserWarning, match=r"weights of \['code'\] outside of their modules"
    ) as caught:
        ls.quantize_(Tied(), ls.ternary(), example_input=torch.zeros(2, 8))
    assert caught[0].filename == __file__


def test_an_in_place_activation_whose_result_is_not_used_is_warned_of():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
            self.norm2 = nn.BatchNorm1d(4)
            self.relu, self.relu6 = nn.ReLU(inplace=True), nn.ReLU6(inplace=True)

        def forward(self, x):
            x = self.norm(self.first(x))
            self.relu(x)
            return {"logits": [self.relu6(self.norm2(self.last(x))) + 0]}

    class Returned(Block):
        def forward(self, x):
            x = self.relu(self.norm(self.first(x)))
            x = torch.cat([self.relu(x), x], dim=0)  # shared, and inside a list
            return {"logits": [self.relu6(self.norm2(self.last(x))) + 0]}

    x = torch.randn(2, 8)
    model = Block().eval()
    expected = copy.deepcopy(model)(x)["logits"][0]
    with pytest.warns(UserWarning, match=r"calls \['relu'\] for what they do to their input"):
        ls.quantize_(copy.deepcopy(model), ls.ternary(), ls.unsigned(2), example_input=x)
    torch.testing.assert_close(model(x)["logits"][0], expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ls.quantize_(Block(), ls.ternary(), example_input=x)  # activations were not asked for
        ls.quantize_(Returned(), ls.ternary(), ls.unsigned(2), example_input=x)


def test_attention_stays_real_as_a_whole_and_is_reported():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "out": nn.Linear(4, 4)})
    twin = copy.deepcopy(model)
    with pytest.warns(
        UserWarning, match=r"\['attention'\] stay real.*attention_to_linears_"
    ) as caught:
        ls.quantize_(model, ls.ternary())
    assert len(caught) == 1
    assert names(model) == ["out"]
    assert ("attention.out_proj", "NonDynamicallyQuantizableLinear", "real", "") in ls.report(
        model
    ).rows
    x = torch.randn(3, 2, 4)
    attention = model["attention"](x, x, x)[0]
    assert torch.equal(attention, twin["attention"](x, x, x)[0])


def test_subclasses_stay_real_with_a_warning():
    class Softened(nn.ReLU):
        def forward(self, x):
            return super().forward(x) - 0.1

    model = nn.Sequential(nn.Linear(4, 4), Softened(), Capped(4, 4), nn.ReLU())
    with pytest.warns(UserWarning, match=r"1 \(Softened\)', '2 \(Capped\).* stay real"):
        ls.quantize_(model, ls.ternary(), ls.unsigned(2))
    assert [type(m).__name__ for m in model] == [
        "QuantizedLinear", "Softened", "Capped", "ActivationQuantizer",
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*stay real")
@pytest.mark.parametrize("stacked", [False, True])
def test_the_fused_transformer_layer_does_not_bypass_the_quantizers(stacked):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, activation=nn.ReLU(), batch_first=True
    )
    if stacked:
        model = nn.TransformerEncoder(model, 2)
    ls.quantize_(model, ls.ternary(), ls.unsigned(2))
    x = torch.randn(2, 5, 8)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    trained = model(x, src_key_padding_mask=padding)
    with torch.no_grad():
        fused = model.eval()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(fused, trained)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_models_of_any_dtype_are_quantized_in_it(dtype):
    model = ls.quantize_(mlp().to(dtype), ls.ternary(), ls.unsigned(2))
    assert {b.dtype for b in model.buffers() if b.is_floating_point()} == {dtype}
    scheduler = ls.QuantizationScheduler(model, ls.policies.AdditiveNoiseAnnealing(), 2)
    y = model(torch.randn(8, 8, dtype=dtype))
    y.sum().backward()
    assert y.dtype == dtype
    assert all(p.grad.isfinite().all() for p in model.parameters())
    scheduler.step()
    ls.finalize_(model)


def test_a_model_without_floating_parameters_can_have_activations():
    model = ls.quantize_(nn.Sequential(nn.Identity(), nn.ReLU()), activation=ls.unsigned(1))
    assert model(torch.tensor([-1.0, 5.0])).tolist() == [0.0, float(model[1].scale)]


def test_a_frozen_parameter_stays_without_gradient():
    model = mlp()
    model[0].weight.requires_grad_(False)
    ls.quantize_(model, ls.ternary())
    model(torch.randn(4, 8)).sum().backward()
    assert model[0].weight.grad is None
    assert model[3].weight.grad is not None


def test_functional_calls_see_the_buffers():
    model = ls.quantize_(mlp(), ls.ternary(), ls.unsigned(2)).eval()
    x = torch.randn(4, 8)
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    soft = state | {"0.weight_quantizer.forward_std": torch.tensor(0.5)}
    called = torch.func.functional_call(model, soft, (x,))
    assert not torch.equal(called, model(x))
    model[0].weight_quantizer.forward_std.fill_(0.5)
    assert torch.equal(called, model(x))


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU6()], ids=repr)
def test_signed_levels_quantize_what_a_relu_puts_out(act):
    model = nn.Sequential(nn.Linear(8, 6), act)
    x, levels = torch.randn(40, 8), ls.signed(8)
    ls.calibrate_(ls.quantize_(model, activation=levels), [x])
    scale, inside = model[1].scale, model[0](x)
    assert torch.equal(model(x), levels.quantize(act(inside) / scale) * scale)
    assert (model(x) - act(inside)).abs().max() < scale


@pytest.mark.parametrize("levels", [ls.binary(), ls.ternary()], ids=lambda levels: levels.name)
def test_signs_take_the_place_of_a_relu(levels):
    model = ls.quantize_(nn.Sequential(nn.Linear(8, 6), nn.ReLU()), activation=levels)
    assert bool((model(torch.randn(40, 8)) < 0).any())


def test_the_input_of_an_in_place_activation_that_is_used_again_is_warned_of():
    class Skip(nn.Module):
        def __init__(self, inplace):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(8, 2)
            self.inner = nn.Sequential(nn.ReLU(inplace=inplace), nn.Linear(4, 4))

        def forward(self, x):
            before = self.norm(self.first(x))
            return self.last(torch.cat([self.inner(before), before], dim=1))

    x = torch.randn(4, 8)
    with pytest.warns(UserWarning, match=r"uses the input of \['inner\.0'\] again") as caught:
        ls.quantize_(Skip(inplace=True), ls.ternary(), ls.unsigned(2), example_input=x)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ls.quantize_(Skip(inplace=False), ls.ternary(), ls.unsigned(2), example_input=x)
        ls.quantize_(Skip(inplace=True), ls.ternary(), example_input=x)


def test_modules_that_a_model_keeps_in_a_list_too_are_warned_of():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.norm, self.fc2 = nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
            self.relu = nn.ReLU()
            self.layers = [self.fc1, self.norm, self.relu, self.fc2]

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model = Listed()
    with pytest.warns(UserWarning, match=r"does not call the quantizers of \['relu'\]") as caught:
        ls.quantize_(model, ls.ternary(), ls.unsigned(2), example_input=torch.randn(2, 8))
    assert caught[0].filename == __file__
    assert all(module.training for module in model.modules())


def test_a_forward_of_the_modules_own_is_refused():
    model = mlp()
    model[3].forward = lambda x, layer=model[3]: F.linear(x, layer.weight)
    with pytest.raises(ValueError, match="the forward of 3 was replaced on the module itself"):
        ls.quantize_(model, ls.ternary())
    assert type(model[0]) is nn.Linear
    ls.quantize_(model, ls.ternary(), overrides={"3": None})
    assert names(model) == ["0", "5"]


def test_an_override_of_weights_that_matches_activations_alone_is_warned_of():
    binary = ls.LayerConfig(weight=ls.binary())
    with pytest.warns(UserWarning, match="override '2' has a level set for weights") as caught:
        ls.quantize_(mlp(), ls.ternary(), ls.unsigned(2), overrides={"2": binary})
    assert caught[0].filename == __file__
    model = ls.quantize_(mlp(), ls.ternary(), ls.unsigned(2), overrides={"[34]": binary})
    assert isinstance(model[2], ActivationQuantizer)
    assert isinstance(model[4], nn.ReLU)  # one pattern of a layer and what follows it


def test_an_example_input_may_have_names():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(4, 2), nn.Linear(8, 4)

        def forward(self, *, pixels, scale=1.0):
            return self.last(self.first(pixels * scale))

    x = {"pixels": torch.randn(2, 8), "scale": torch.tensor(2.0)}
    model = ls.quantize_(Named(), ls.ternary(), example_input=x)
    assert names(model) == ["first", "last"]


@pytest.mark.parametrize(
    "other",
    [(ls.ternary(), ls.unsigned(4)), (ls.signed(4), ls.unsigned(2)), (ls.binary(), ls.unsigned(2))],
)
def test_the_state_of_another_level_set_is_refused(other):
    saved = ls.quantize_(mlp(1), ls.ternary(), ls.unsigned(2)).state_dict()
    model = ls.quantize_(mlp(), *other)
    with pytest.raises(ValueError, match="this state was saved with the levels"):
        model.load_state_dict(saved)


def test_a_state_that_does_not_tell_its_level_set_is_loaded():
    saved = ls.quantize_(mlp(1), ls.ternary(), ls.unsigned(2)).state_dict()
    older = {key: value for key, value in saved.items() if not key.endswith("_extra_state")}
    assert len(older) < len(saved)
    model = ls.quantize_(mlp(), ls.ternary(), ls.unsigned(2))
    model.load_state_dict(older)
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())


def test_layers_of_a_kind_that_is_not_quantized_are_named():
    model = nn.Sequential(nn.Bilinear(1, 2, 3), nn.Flatten(), nn.Linear(16, 2))
    with pytest.warns(UserWarning, match=r"\['0 \(Bilinear\)'\] stay real") as caught:
        ls.quantize_(model, ls.ternary())
    assert caught[0].filename == __file__


class Transposed(nn.Module):
    """A layer of one's own, with a matrix that is not called weight."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.randn(8, 8))
        self.place, self.norm = nn.Parameter(torch.randn(1, 5, 8)), nn.BatchNorm1d(8)

    def forward(self, x):
        return self.norm(x @ self.W)


def test_matrices_of_layers_of_ones_own_are_warned_of():
    model = nn.Sequential(Transposed(), nn.Linear(8, 4), nn.LayerNorm((4,)))
    with pytest.warns(UserWarning, match=r"\['0\.W \(Transposed\)'\] stay real") as caught:
        ls.quantize_(model, ls.ternary())
    assert len(caught) == 1
    assert ls.report(model).rows[0][:3] == ("0", "Transposed", "real")


@pytest.mark.filterwarnings("error")
def test_positions_of_a_model_that_has_layers_are_no_matrices():
    class Placed(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.place = (nn.Parameter(torch.zeros(1, n, 8)) for n in (1, 5))
            self.table = nn.Parameter(torch.zeros(5, 8))
            self.out = nn.Linear(8, 8)

        def forward(self, x):
            return self.out(x + self.place + self.table) + self.token

    ls.quantize_(Placed(), ls.ternary(), example_input=torch.zeros(2, 5, 8))


def test_parts_quantized_in_different_calls_are_refused_where_only_one_has_weights():
    encoder = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    decoder = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))
    decoder.extend([nn.BatchNorm1d(8), nn.ReLU()])
    model = nn.Sequential(encoder, decoder)
    ls.quantize_(model[0], ls.ternary())
    ls.quantize_(model[1], activation=ls.unsigned(2))
    with pytest.raises(ValueError, match="were quantized in different calls"):
        ls.finalize_(model)


class SharedReLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.norm, self.relu = nn.BatchNorm1d(4), nn.ReLU()

    def forward(self, x):
        for layer in (self.first, self.second):
            x = self.relu(self.norm(layer(x)))
        return self.last(x)


def quantized_sharing(**overrides):
    return ls.quantize_(
        SharedReLU(),
        ls.ternary(),
        ls.unsigned(2),
        overrides=overrides,
        example_input=torch.randn(3, 4),
    )


def test_a_shared_activation_that_should_be_two_is_warned_of():
    with pytest.warns(UserWarning, match="stays unsigned2 behind second"):
        quantized_sharing(second=ls.LayerConfig(ls.binary(), ls.unsigned(4)))


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"second": ls.LayerConfig(ls.binary(), ls.unsigned(2))},
        {
            "second": ls.LayerConfig(ls.binary(), ls.unsigned(4)),
            "relu": ls.LayerConfig(None, ls.unsigned(3)),
        },
    ],
    ids=["no overrides", "the same levels", "its own override"],
)
def test_a_shared_activation_that_is_one_is_not(overrides):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized_sharing(**overrides)


class EndsWith(nn.Module):
    """A block and a head of one's own."""

    def __init__(self, head):
        super().__init__()
        self.hidden, self.norm, self.relu = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()
        self.out, self.head = nn.Linear(4, 4), head

    def forward(self, x):
        return {"y": self.head(self.out(self.relu(self.norm(self.hidden(x)))))}


def notes(head, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x = torch.randn(3, 4)
        ls.quantize_(EndsWith(head), ls.ternary(), ls.unsigned(2), example_input=x, **options)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("head", [nn.ReLU(), nn.ReLU(inplace=True), nn.Softplus()], ids=repr)
def test_an_activation_that_is_the_output_is_warned_of(head):
    assert "puts out what ['head'] make, quantized: 4 different numbers" in notes(head)[-1]
    assert notes(head, skip=("last",)) == notes(head, overrides={"head": None}) == []


@pytest.mark.parametrize(
    "head",
    [
        lambda x: x.clamp(min=0),
        lambda x: x.clamp_min(0.0),
        lambda x: torch.clamp(x, 0, 6),
        lambda x: torch.clip(x, min=0),
        lambda x: torch.maximum(x, torch.zeros_like(x)),
        lambda x: F.threshold(x, 0, 0),
    ],
)
def test_a_relu_by_another_name_is_warned_of(head):
    [note] = notes(head)
    assert "whose results stay real; where these are activations, use nn.ReLU" in note


@pytest.mark.parametrize(
    "head",
    [
        lambda x: x.clamp(min=1e-6),
        lambda x: x.clamp(-1, 1),
        lambda x: x.clamp(max=0),
        lambda x: torch.maximum(x, 0.1 * x),
        lambda x: F.threshold(x, 0.1, 0),
        lambda x: F.threshold(x, threshold=0.1, value=0),
        nn.Softmax(-1),
    ],
)
def test_other_clamps_are_not(head):
    assert notes(head) == []


def test_one_activation_in_several_places_without_batch_norm_is_warned_of():
    model = SharedReLU()
    model.norm = nn.Identity()
    with pytest.warns(UserWarning, match=r"\['relu'\] are used several times each"):
        ls.quantize_(model, ls.ternary(), ls.unsigned(2), example_input=torch.randn(3, 4))


def test_a_loader_is_no_example_input():
    loader = torch.utils.data.DataLoader(torch.zeros(4, 4))
    with pytest.raises(TypeError, match=r"next\(iter\(loader\)\); got a DataLoader"):
        ls.quantize_(SharedReLU(), ls.ternary(), example_input=loader)


def test_lazy_batch_norms_without_parameters_are_refused():
    net = nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d(affine=False), nn.ReLU())
    with pytest.raises(ValueError, match="lazy modules"):
        ls.quantize_(net, ls.ternary(), ls.unsigned(2))


def test_weights_with_a_scale_each_are_warned_of():
    model = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match=r"each weight of \['0'\] has a scale of its own"):
        ls.quantize_(copy.deepcopy(model), ls.signed(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ls.quantize_(model, ls.signed(4), weight_scale=AbsoluteMean("tensor"))


def all_notes(model, **arguments):
    """What is warned of, as one text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ls.quantize_(model, ls.ternary(), **arguments)
    return "\n".join(str(warning.message) for warning in caught)


def test_parameters_that_a_model_multiplies_itself_are_named():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.table = nn.Linear(8, 2), nn.Embedding(5, 8)
            self.first = nn.Parameter(torch.randn(2, 8, 4))
            self.second = nn.Parameter(torch.randn(2, 4, 8))
            self.lists = nn.ParameterList([torch.randn(8, 8)])
            self.place = nn.Parameter(torch.randn(3, 8))

        def forward(self, x):
            x = x + self.place
            hidden = torch.einsum("bnd,edh->benh", x, self.first)
            each = torch.stack([hidden[:, e] @ self.second[e] for e in range(2)], -1)
            x = (each * self.router(x).softmax(-1).unsqueeze(2)).sum(-1) @ self.lists[0]
            return x @ self.table.weight.t()

    text = all_notes(Experts(), example_input=torch.randn(4, 3, 8))
    for name in ("first", "second", "lists.0", "table.weight"):
        assert f"'{name} (" in text
    assert "place" not in text
    assert "router" not in text


@pytest.mark.parametrize(
    ("gain", "warned"),
    [
        (lambda x: x, False),
        (lambda x: F.dropout(x.flatten(1), 0.5).view_as(x) + torch.ones_like(x), False),
        (lambda x: 0.05 * x, True),
        (lambda x: x / 20, True),
        (lambda x: x @ torch.eye(6), True),
    ],
)
def test_what_comes_between_a_batch_norm_and_an_activation_matters(gain, warned):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.act = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()

        def forward(self, x):
            return self.act(gain(self.norm(self.conv(x)))) + 0

    text = all_notes(Net(), activation=ls.unsigned(2), example_input=torch.randn(2, 1, 8, 8))
    assert ("no batch norm precedes ['act']" in text) == warned


def test_a_shared_activation_is_normalized_only_if_it_is_so_at_every_call():
    class Net(nn.Module):
        def __init__(self, again):
            super().__init__()
            self.first, self.norm, self.act = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()
            self.second, self.again, self.last = nn.Linear(8, 8), again, nn.Linear(8, 2)

        def forward(self, x):
            x = self.act(self.norm(self.first(x)))
            return self.last(self.act(self.again(self.second(x))))

    x = torch.randn(4, 8)
    assert "precedes ['act']" in all_notes(
        Net(nn.Identity()), activation=ls.unsigned(2), example_input=x
    )
    assert not all_notes(Net(nn.BatchNorm1d(8)), activation=ls.unsigned(2), example_input=x)


def test_every_head_is_a_last_layer():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.norm, self.act = nn.BatchNorm1d(8), nn.ReLU()
            self.a, self.b = nn.Linear(8, 3), nn.Linear(8, 2)

        def forward(self, x):
            x = self.act(self.norm(self.second(self.first(x))))
            return {"a": self.a(x), "b": [self.b(x)]}

    net = ls.quantize_(Heads(), ls.ternary(), skip=("last",), example_input=torch.randn(2, 8))
    assert [layer.info.name for layer in quantized_layers(net)] == ["first", "second"]


def test_a_batch_norm_that_starts_at_zero_in_a_sum_is_not_what_makes_its_size():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm, self.act = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()
            nn.init.zeros_(self.norm.weight)

        def forward(self, x):
            return self.act(self.norm(self.layer(x)) + x)

    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), Block(), nn.Linear(8, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ls.quantize_(net, ls.ternary(), ls.unsigned(2), example_input=torch.randn(4, 8))


class _Actor(nn.Module):
    """A policy and a value, by what a model does with the two heads."""

    def __init__(self, ends):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.policy, self.value, self.positive = nn.Linear(8, 4), nn.Linear(8, 4), nn.Softplus()
        self.scale, self.ends = nn.Parameter(torch.ones(1)), ends

    def forward(self, x):
        h = self.body(x)
        return self.ends(self, h, self.policy(h), self.value(h))


HEADS = {
    "softmax": lambda net, h, p, v: (p.log_softmax(-1), v.squeeze(-1)),
    "shape": lambda net, h, p, v: {"policy": p.reshape(-1, 2, 2).flatten(1), "value": v.T},
    "joined": lambda net, h, p, v: torch.cat([p, v], 1),
    "stacked": lambda net, h, p, v: torch.stack((p, v)),
    "scaled": lambda net, h, p, v: (p * net.scale, v),
    "in a collection": lambda net, h, p, v: [{"p": (p.exp(),)}, v.mean(1)],
    "with features": lambda net, h, p, v: (h.flatten(1), p.softmax(-1), v),
}


@pytest.mark.parametrize("ends", HEADS.values(), ids=HEADS)
def test_heads_are_last_layers_whatever_shape_or_softmax_follows(ends):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = ls.quantize_(
            _Actor(ends), ls.ternary(), skip=("last",), example_input=torch.randn(4, 8)
        )
    assert [layer.info.name for layer in quantized_layers(net)] == ["body.0"]


def test_the_activation_behind_a_head_stays_real_with_it():
    def ends(net, h, p, v):
        spread = net.positive(p)
        return net.value(h), spread.squeeze(0)

    net = _Actor(ends)
    ls.quantize_(net, ls.ternary(), ls.unsigned(2), skip=("last",), example_input=torch.randn(4, 8))
    assert isinstance(net.positive, nn.Softplus) and type(net.policy) is type(net.value)
    assert [layer.info.name for layer in quantized_layers(net)] == ["body.0"]


def test_layers_that_others_follow_are_no_heads():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 2)

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x).tanh()
            return self.norm(x), self.head(x)

    x = torch.randn(4, 8)
    net = ls.quantize_(Residual(), ls.ternary(), skip=("last",), example_input=x)
    assert [layer.info.name for layer in quantized_layers(net)] == [f"layers.{n}" for n in range(3)]
    # Without a head, the branch that was added last is one; those ahead of it are not.
    net = Residual()
    net.head = nn.Identity()
    ls.quantize_(net, ls.ternary(), skip=("last",), example_input=x)
    assert [layer.info.name for layer in quantized_layers(net)] == ["layers.0", "layers.1"]


def test_a_second_name_in_overrides_is_answered_with_the_first():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    net.head = net[2]
    with pytest.raises(ValueError, match=r"'head' is '2', by its first name"):
        ls.quantize_(net, ls.ternary(), overrides={"head": None})


def test_layers_of_other_kinds_are_named_where_nothing_is_left_to_quantize():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 4))

        def forward(self, x):
            return x @ self.weight

    with pytest.raises(ValueError, match=r"'0\.weight \(Conv1D\)'\] stay real"):
        ls.quantize_(nn.Sequential(Conv1D()), ls.ternary(), example_input=torch.randn(2, 8))


def test_weights_that_are_on_levels_already_get_a_word():
    net = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2))
    assert not all_notes(net)
    ls.remove_quantizers_(ls.finalize_(net))
    with pytest.warns(UserWarning, match=r"the weights of \['0'\] have no more different values"):
        ls.quantize_(net, ls.ternary())  # of the other layer there are too few to tell
    zeros = nn.Linear(64, 8)
    nn.init.zeros_(zeros.weight)
    assert not all_notes(nn.Sequential(zeros))
