"""Activation functions that a model calls itself become modules, and nothing else changes."""

import copy
import inspect
import pickle
import random
from dataclasses import dataclass

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from learnsched.activation_calls import activations_to_modules_
from learnsched.activation_quantizer import ActivationQuantizer
from learnsched.convert import quantize_
from learnsched.export.trace import trace
from learnsched.finalize import finalize_
from learnsched.layers import quantized_layers
from learnsched.levels import ternary, unsigned

X = torch.linspace(-3, 3, 4 * 3 * 8 * 8).sin().view(4, 3, 8, 8)


class Block(nn.Module):
    """A residual block as in many repositories, with an empty shortcut."""

    def __init__(self, inputs, width, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layers = nn.Sequential(Block(4, 4), Block(4, 8, 2))
        self.unused = nn.Linear(3, 3)
        self.linear = nn.Linear(8, 5)

    def features(self, x):
        return self.layers(F.relu(self.bn1(self.conv1(x))))

    def forward(self, x):
        out = F.avg_pool2d(self.features(x), 4)
        out = F.dropout(out.view(out.size(0), -1), 0.3, training=self.training)
        return self.linear(out)


class Of(nn.Module):
    """A linear layer, then what is asked about."""

    def __init__(self, function):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.slope = nn.Parameter(torch.tensor([0.1]))
        self.register_buffer("factor", torch.tensor(2.0))
        self.function = function

    def forward(self, x, extra=None):
        return self.function(self, self.fc(x), extra)


def outputs(model, x, training):
    torch.manual_seed(1)
    return copy.deepcopy(model).train(training)(x)


def gradients(model, x):
    own = copy.deepcopy(model)
    own(x).square().sum().backward()
    return [p.grad for p in own.parameters() if p.grad is not None]


@pytest.mark.parametrize("training", [False, True])
def test_a_residual_network_computes_what_it_did_with_the_same_parameters(training):
    model = Net()
    before, parameters = outputs(model, X, training), dict(model.named_parameters())
    state = copy.deepcopy(model.state_dict())
    assert activations_to_modules_(model, X) is model
    assert isinstance(model, Net) and type(model).__name__ == "Net"
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    assert torch.equal(outputs(model, X, training), before)
    assert model.training and model.relu_0.training
    assert isinstance(model.dropout_0, nn.Dropout) and model.dropout_0.p == 0.3
    assert [type(m) for m in model.layers[0].children()][-2:] == [nn.ReLU, nn.ReLU]


def test_what_was_a_function_is_quantized_exported_copied_and_compiled():
    model = activations_to_modules_(Net(), X)
    quantize_(model, ternary(), unsigned(2), overrides={"unused": None}, example_input=X)
    names = [layer.info.name for layer in quantized_layers(model) if layer.activations]
    assert names == [
        "conv1",
        "layers.0.conv1",
        "layers.0.conv2",
        "layers.1.conv1",
        "layers.1.shortcut.0",
    ]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(outputs(compiled, X, False), outputs(model, X, False))
    finalize_(model, [X])
    traced = [type(node).__name__ for node in trace(model.eval(), X)]
    assert traced.count("Quantize") + traced.count("Threshold") == 5


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_go_on_with_modules(again):
    model = activations_to_modules_(Net(), X)
    quantize_(model, ternary(), unsigned(2), overrides={"unused": None}, example_input=X)
    other = again(again(model))
    assert isinstance(other, Net) and other.relu_0 is not model.relu_0
    assert torch.equal(outputs(other, X, True), outputs(model, X, True))
    other.relu_0.scale.mul_(2)
    assert not torch.equal(outputs(other, X, True), outputs(model, X, True))


CALLS = {
    "relu": (lambda self, x, _: F.relu(x), nn.ReLU()),
    "torch": (lambda self, x, _: torch.relu(x), nn.ReLU()),
    "method": (lambda self, x, _: x.relu(), nn.ReLU()),
    "in place": (lambda self, x, _: F.relu(x, inplace=True), nn.ReLU()),
    "by name": (lambda self, x, _: F.relu(input=x), nn.ReLU()),
    "relu6": (lambda self, x, _: F.relu6(9 * x), nn.ReLU6()),
    "hardtanh": (lambda self, x, _: F.hardtanh(x, -0.5, max_val=0.7), nn.Hardtanh(-0.5, 0.7)),
    "leaky_relu": (lambda self, x, _: F.leaky_relu(x, 0.2), nn.LeakyReLU(0.2)),
    "elu": (lambda self, x, _: F.elu(x, alpha=0.4), nn.ELU(0.4)),
    "celu": (lambda self, x, _: F.celu(x, 0.7), nn.CELU(0.7)),
    "torch celu": (lambda self, x, _: torch.celu(x, 0.7), nn.CELU(0.7)),
    "selu": (lambda self, x, _: F.selu(x), nn.SELU()),
    "torch selu": (lambda self, x, _: torch.selu(x), nn.SELU()),
    "gelu": (lambda self, x, _: F.gelu(x, approximate="tanh"), nn.GELU("tanh")),
    "silu": (lambda self, x, _: F.silu(x), nn.SiLU()),
    "softplus": (lambda self, x, _: F.softplus(x, 2.0), nn.Softplus(2.0)),
}


@pytest.mark.parametrize("function, module", CALLS.values(), ids=CALLS)
def test_a_function_becomes_its_module_with_its_arguments(function, module):
    model, x = Of(function), torch.randn(5, 8)
    before, slopes = outputs(model, x, True), gradients(model, x)
    activations_to_modules_(model, x)
    [added] = [child for name, child in model.named_children() if name != "fc"]
    assert repr(added) == repr(module)
    assert torch.equal(outputs(model, x, True), before)
    assert all(map(torch.equal, gradients(model, x), slopes))


def test_a_part_alone_is_changed_and_quantized_in_the_whole():
    part = Of(lambda self, x, _: F.relu(self.fc(x)))
    model, x = Of(lambda self, x, _: self.part(F.relu(x @ torch.eye(8)))), torch.randn(5, 8)
    model.part = part
    with pytest.raises(ValueError, match=r"forward of the model itself \(Of\)"):
        activations_to_modules_(model, x)
    activations_to_modules_(model.part, x)
    quantize_(model, ternary(), unsigned(2), example_input=x)
    assert [layer.info.name for layer in quantized_layers(model)] == ["fc", "part.fc"]
    assert isinstance(part.relu_0, ActivationQuantizer)


def test_calls_get_modules_of_their_own_and_names_that_are_free():
    model = Of(lambda self, x, _: F.relu(self.relu_0(x) - 1) + torch.relu(x))
    model.relu_0 = nn.ReLU()
    activations_to_modules_(model, torch.randn(5, 8))
    assert [name for name, _ in model.named_children()] == ["fc", "relu_0", "relu_1", "relu_2"]


def test_inputs_by_name_and_dropout_that_always_drops():
    model = Of(lambda self, x, _: F.relu(F.dropout(x, 0.5)))
    activations_to_modules_(model, {"x": torch.randn(5, 8)})
    assert [name for name, _ in model.named_children()] == ["fc", "relu_0"]
    assert bool((outputs(model, torch.ones(50, 8), False) == 0).any())


class Asking(nn.Module):
    """Decides by the flag of a child, and of one further in."""

    def __init__(self, function):
        super().__init__()
        self.fc, self.function = nn.Linear(8, 8), function
        self.body = nn.Sequential(nn.BatchNorm1d(8))

    def forward(self, x):
        return self.function(self, self.body(F.relu(self.fc(x))))


def modes(model):
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "child", [lambda m: m.body, lambda m: m.body[0]], ids=["child", "grandchild"]
)
def test_dropout_that_follows_the_flag_of_a_child_becomes_a_module(child, training):
    model, x = Asking(lambda self, x: F.dropout(x, 0.5, child(self).training)), torch.randn(5, 8)
    model.train(training).fc.train(not training)
    usual, expected = modes(model), [outputs(model, x, mode) for mode in (True, False)]
    activations_to_modules_(model, x)
    assert [n for n, _ in model.named_children()][2:] == ["relu_0", "dropout_0"]
    assert modes(model) == [*usual, training, training]
    assert all(map(torch.equal, [outputs(model, x, mode) for mode in (True, False)], expected))


def freezes(self, x):
    self.body[0].eval()
    return x


ASKING = {
    "a child": (lambda self, x: x + 1 if self.body.training else x, "other things in training"),
    "a grandchild": (
        lambda self, x: x + 1 if self.body[0].training else x,
        "other things in training",
    ),
    "writes": (freezes, r"writes to attributes, \['training'\]"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("function, words", ASKING.values(), ids=ASKING)
def test_what_depends_on_or_sets_the_flag_of_a_child_is_refused_in_either_mode(
    function, words, training
):
    model = Asking(function).train(training)
    model.fc.train(not training)
    usual = modes(model)
    with pytest.raises(ValueError, match=words):
        activations_to_modules_(model, torch.randn(5, 8))
    assert modes(model) == usual


DROPOUTS = {
    "dropout": nn.Dropout, "dropout1d": nn.Dropout1d, "dropout2d": nn.Dropout2d,
    "dropout3d": nn.Dropout3d,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:dropout2d. Received a 3-D")
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_is_in_place_where_it_was(name, inplace):
    def unused(self, x, _):
        x = F.relu(x) + 1
        shape = (50, 8, *{"dropout2d": (1, 1), "dropout3d": (1, 1, 1)}.get(name, (1,)))
        getattr(F, name)(x.view(shape), 0.3, self.training, inplace=inplace)
        return self.fc(x)

    model, x = Of(unused), torch.randn(50, 8)
    expected, evaluated = outputs(model, x, True), outputs(model, x, False)
    assert inplace != torch.equal(expected, evaluated)
    activations_to_modules_(model, x)
    [dropout] = [m for n, m in model.named_children() if n.startswith("dropout")]
    assert repr(dropout) == repr(DROPOUTS[name](0.3, inplace))
    assert torch.equal(outputs(model, x, True), expected)


def test_alpha_dropout_becomes_a_module():
    model = Of(lambda self, x, _: F.alpha_dropout(F.selu(x), 0.3, self.training))
    x = torch.randn(5, 8)
    expected = outputs(model, x, True)
    activations_to_modules_(model, x)
    assert repr(model.alpha_dropout_0) == repr(nn.AlphaDropout(0.3))
    assert torch.equal(outputs(model, x, True), expected)


def test_dropout_that_follows_an_argument_stays_a_function():
    model = Of(lambda self, x, drops: F.dropout(F.relu(x), 0.5, drops))
    x = torch.randn(5, 8)
    activations_to_modules_(model, {"x": x, "extra": False})
    assert [name for name, _ in model.named_children()] == ["fc", "relu_0"]
    assert bool((model(torch.ones(50, 8) * 9, True) == 0).any())
    assert torch.equal(model(x, False), F.relu(model.fc(x)))


def scaled_in_training(self, x, _):
    return F.relu(x) * (2 if self.training else 1)


def on_values(self, x, _):
    return F.relu(x) if x.sum() < 99 else x


def in_place(self, x, _):
    F.relu_(x)
    return x


def without_gradients(self, x, _):
    with torch.no_grad():
        shift = F.relu(x)
    return x + shift


def without_autocast(self, x, _):
    x = F.relu(x)
    with torch.autocast("cpu", enabled=False):
        return self.fc(x.float())


REFUSED = {
    "gradients": (without_gradients, "something else on the example input, or has other gradients"),
    "no function": (lambda self, x, _: x + 1, "calls no activation functions itself"),
    "values": (on_values, "cannot trace the forward of the model itself"),
    "training": (scaled_in_training, "other things in training than in evaluation"),
    "in place": (in_place, "something else on the example input"),
    "prelu": (
        lambda self, x, _: F.prelu(x, self.slope),
        "prelu with what a module cannot be given",
    ),
    "prelu, method": (
        lambda self, x, _: x.prelu(self.slope),
        "prelu with what a module cannot be given",
    ),
    # From the output in place of the input its gradients are rounded otherwise.
    "selu_": (lambda self, x, _: torch.selu_(x), "or has other gradients: .* a change in place"),
    "rrelu": (
        lambda self, x, _: torch.rrelu(x),
        "rrelu with what a module cannot be given",
    ),
    "slope": (
        lambda self, x, _: F.leaky_relu(x, x.size(0) / 99),
        "leaky_relu with what a module cannot be given",
    ),
    "alpha dropout in place": (
        lambda self, x, _: F.alpha_dropout(F.selu(x), 0.5, self.training, inplace=True),
        r"alpha_dropout in place.*use its result instead",
    ),
    "computed dropout": (
        lambda self, x, _: F.dropout(F.relu(x), x.size(0) / 99, self.training),
        "dropout with what a module cannot be given",
    ),
    "stochastic depth": (
        lambda self, x, _: x if self.training and torch.rand(()) < 0.2 else F.relu(x),
        "it reads a number from a tensor",
    ),
    "a number of a buffer": (
        lambda self, x, _: F.relu(x) * float(self.factor),
        "it reads a number from a tensor",
    ),
    "autocast": (without_autocast, r"something else on the example input.*torch\.autocast"),
    "python's random": (
        lambda self, x, _: x if self.training and random.random() < 0.2 else F.relu(x),
        "it draws random numbers",
    ),
    "constant": (
        lambda self, x, _: F.relu(x + torch.ones(8)),
        r"makes a tensor of its own.*activations_to_modules_\(model\.encoder, .*register_buffer",
    ),
    "tensor of the batch's size": (
        lambda self, x, _: F.relu(x + torch.zeros(x.shape[0], 8)),
        r"itself \(Of\), .*tensors from .*x\.new_zeros",
    ),
}


@pytest.mark.parametrize("function, words", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_refused_and_leaves_the_model_as_it_was(function, words):
    model, x = Of(function), torch.linspace(-2, 1, 40).view(5, 8)
    before, attributes = outputs(model, x, False), set(vars(model))
    with pytest.raises(ValueError, match=words):
        activations_to_modules_(model, x)
    assert type(model) is Of and model.training
    assert set(vars(model)) == attributes and [n for n, _ in model.named_children()] == ["fc"]
    assert torch.equal(outputs(model, x, False), before)


class InPlace(nn.Module):
    """Uses the input of an in-place function again; where all is 0, nobody sees it."""

    def __init__(self):
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=1, bias=False)

    def forward(self, x):
        h = self.n(self.a(x))
        return self.b(F.relu(h, inplace=True)) + h


@pytest.mark.parametrize("kind", ["alone", "in a tuple", "by name"])
def test_a_constant_example_does_not_hide_what_a_trace_forgets(kind):
    x = torch.zeros(1, 3, 8, 8)
    example = {"alone": x, "in a tuple": (x,), "by name": {"x": x}}[kind]
    with pytest.raises(ValueError, match="something else on the example input"):
        activations_to_modules_(InPlace(), example)


def test_a_constant_example_that_cannot_be_varied_is_refused():
    class OfCounts(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(3, 4)

        def forward(self, x):
            return F.relu(self.table(x.long()))

    with pytest.raises(ValueError, match=r"example input is constant.*give real data"):
        activations_to_modules_(OfCounts(), torch.zeros(50))


class Writing(nn.Module):
    """What a forward may write to, and objects that it may return."""

    def __init__(self, function):
        super().__init__()
        self.fc, self.function = nn.Linear(8, 8), function
        self.kept, self.features, self.seen, self.calls = torch.zeros(()), [], {}, 2

    def forward(self, x):
        return self.function(self, x)


def writes(self, x):
    self.kept = F.relu(self.fc(x))
    return self.kept


def writes_anew(self, x):
    self.last = F.relu(self.fc(x))
    return self.last


def appends(self, x):
    self.features.append(F.relu(self.fc(x)))
    return self.features[-1]


def stores(self, x):
    self.seen["x"] = F.relu(self.fc(x))
    return self.seen["x"]


def counts(self, x):
    self.calls += 1
    return F.relu(self.fc(x))


def writes_to_a_child(self, x):
    self.fc.last = F.relu(self.fc(x))
    return self.fc.last


WRITING = {
    writes: "kept", writes_anew: "last", appends: "features", stores: "seen", counts: "calls",
    writes_to_a_child: "last",
}  # fmt: skip


@pytest.mark.parametrize("function", WRITING, ids=lambda function: function.__name__)
def test_a_forward_that_writes_to_attributes_is_refused_and_they_are_as_they_were(function):
    model, x = Writing(function), torch.randn(5, 8)
    model(x)
    before = dict(vars(model)), list(model.features), dict(model.seen), dict(vars(model.fc))
    calls = model.calls
    with pytest.raises(ValueError, match=rf"it writes to attributes, \['{WRITING[function]}'\]"):
        activations_to_modules_(model, x)
    after = dict(vars(model)), list(model.features), dict(model.seen), dict(vars(model.fc))
    if function in (counts, appends):  # the example input was run, once
        assert model.calls == calls + (function is counts)
        assert not any(isinstance(feature, fx.Proxy) for feature in model.features)
    else:
        assert before[0].keys() == after[0].keys() and before[3].keys() == after[3].keys()
    kept = [model.kept, *model.features, *model.seen.values(), getattr(model, "last", x)]
    assert all(isinstance(value, torch.Tensor) for value in kept)
    assert model.training


@dataclass
class Output:
    logits: torch.Tensor


def overwritten(self, x):
    x = self.fc(x)
    F.relu(x, inplace=True)
    return self.fc(x)


RETURNED = {
    "dataclass": lambda self, x: Output(self.fc(x)),
    "distribution": lambda self, x: torch.distributions.Categorical(logits=self.fc(x)),
}


@pytest.mark.parametrize("function", RETURNED.values(), ids=RETURNED)
def test_what_is_returned_in_objects_is_compared(function):
    body = Writing(overwritten)
    model = nn.Sequential(body, Writing(function))
    with pytest.raises(ValueError, match="something else on the example input"):
        activations_to_modules_(model, torch.randn(5, 8))
    assert type(body) is Writing


def test_an_output_without_tensors_is_refused():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Writing(lambda self, x: F.relu(self.fc(x)))

        def forward(self, x):
            return self.body(x).sum().item()

    with pytest.raises(ValueError, match="holds no tensors that could be compared"):
        activations_to_modules_(Loss(), torch.randn(5, 8))


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.last = nn.Linear(8, 4)

    def once(self, x):
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.last(x)

    def forward(self, one, other):
        return self.once(one), self.once(other), F.relu(one + 1) - F.relu(one + 2)


def test_calls_of_one_place_get_one_module():
    one, other = torch.randn(5, 8), torch.randn(5, 8)
    model = activations_to_modules_(Siamese(), (one, other))
    assert [n for n, _ in model.named_children()][2:] == ["relu_0", "relu_1", "relu_2", "relu_3"]
    quantize_(model, ternary(), unsigned(2), example_input=(one, other))
    first, second, _ = model(one, one)
    assert torch.equal(first, second)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x, mask=None, double=False):
        x = F.relu(self.fc(x))
        if mask is not None:
            x = x * mask
        return 2 * x if double else x


def test_arguments_that_the_example_leaves_out_stay_at_their_defaults():
    model, x, mask = Masked(), torch.randn(5, 8), torch.rand(5, 8)
    expected, masked = model(x), model(x, mask)
    plain = activations_to_modules_(copy.deepcopy(model), x)
    assert torch.equal(plain(x), expected)
    assert inspect.signature(plain.forward) == inspect.signature(model.forward)
    for other in (plain, pickle.loads(pickle.dumps(plain))):
        assert torch.equal(other(x, mask=None, double=False), expected)
        for given in ({"mask": mask}, {"double": True}, {"double": mask}):
            with pytest.raises(ValueError, match=f"`{next(iter(given))}` was left at its default"):
                other(x, **given)
    compiled = torch.compile(plain, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, mask=None), expected)
    assert torch.equal(activations_to_modules_(model, {"x": x, "mask": mask})(x, mask), masked)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.stem, self.block, self.reentrant = nn.Conv2d(3, 4, 1), Block(4, 4), reentrant

    def forward(self, x):
        return checkpoint(self.block, self.stem(x), use_reentrant=self.reentrant)


def test_activations_that_are_checkpointed_become_modules():
    model = activations_to_modules_(Checkpointed(False), X)
    assert [n for n, _ in model.block.named_children()][-2:] == ["relu_0", "relu_1"]
    assert model.block.bn1.num_batches_tracked == 0 and model.block.bn1.training


def test_checkpoints_that_hide_gradients_or_would_be_forgotten_are_refused():
    class Outer(Checkpointed):
        def forward(self, x):
            return super().forward(F.relu(x))

    for model, words in (
        (Checkpointed(True), "cannot be taken .*use_reentrant=False"),
        (Outer(False), "forward of the model itself.*it checkpoints activations"),
    ):
        state = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=words):
            activations_to_modules_(model, X)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert model.block.training and type(model.block) is Block


def test_a_batch_norm_of_ones_own_that_rectifies_is_noticed():
    class Rectifying(nn.BatchNorm1d):
        def forward(self, x):
            return F.relu(super().forward(x))

    def net():
        return nn.Sequential(nn.Linear(8, 8), Rectifying(8), nn.Linear(8, 8), nn.ReLU())

    x = torch.randn(5, 8)
    with pytest.warns(UserWarning, match="calls relu as functions"):
        quantize_(net(), ternary(), unsigned(2), example_input=x)
    with pytest.raises(ValueError, match="cannot trace the forward of 1"):
        activations_to_modules_(net(), x)


def test_a_transformer_layer_takes_its_module_itself():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    with pytest.raises(ValueError, match=r"0 is a TransformerEncoderLayer.*activation=nn.ReLU\(\)"):
        activations_to_modules_(nn.Sequential(layer), torch.randn(5, 3, 8))


def test_a_replaced_forward_is_refused():
    model = Of(lambda self, x, _: F.relu(x))
    model.forward = model.forward
    with pytest.raises(ValueError, match="was replaced on the module itself"):
        activations_to_modules_(model, torch.randn(5, 8))
