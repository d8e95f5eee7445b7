"""Activation functions that a model calls itself become modules, and nothing else changes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from learnsched.activation_calls import activations_to_modules_
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
        self.function = function

    def forward(self, x, extra=None):
        return self.function(self, self.fc(x), extra)


def outputs(model, x, training):
    torch.manual_seed(1)
    return copy.deepcopy(model).train(training)(x)


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
    "gelu": (lambda self, x, _: F.gelu(x, approximate="tanh"), nn.GELU("tanh")),
    "silu": (lambda self, x, _: F.silu(x), nn.SiLU()),
    "softplus": (lambda self, x, _: F.softplus(x, 2.0), nn.Softplus(2.0)),
}


@pytest.mark.parametrize("function, module", CALLS.values(), ids=CALLS)
def test_a_function_becomes_its_module_with_its_arguments(function, module):
    model, x = Of(function), torch.randn(5, 8)
    before = outputs(model, x, True)
    activations_to_modules_(model, x)
    [added] = [child for name, child in model.named_children() if name != "fc"]
    assert repr(added) == repr(module)
    assert torch.equal(outputs(model, x, True), before)


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


def scaled_in_training(self, x, _):
    return F.relu(x) * (2 if self.training else 1)


def on_values(self, x, _):
    return F.relu(x) if x.sum() < 99 else x


def on_an_argument(self, x, extra):
    return F.relu(x) if extra is None else F.relu(x + 1)


def in_place(self, x, _):
    F.relu_(x)
    return x


def without_gradients(self, x, _):
    with torch.no_grad():
        shift = F.relu(x)
    return x + shift


REFUSED = {
    "gradients": (without_gradients, "something else on the example input, or has other gradients"),
    "no function": (lambda self, x, _: x + 1, "calls no activation functions itself"),
    "values": (on_values, "cannot trace the forward of the model itself"),
    "training": (scaled_in_training, "other things in training than in evaluation"),
    "argument": (on_an_argument, "something else on the example input"),
    "in place": (in_place, "something else on the example input"),
    "prelu": (
        lambda self, x, _: F.prelu(x, self.slope),
        "prelu with what a module cannot be given",
    ),
    "slope": (
        lambda self, x, _: F.leaky_relu(x, x.size(0) / 99),
        "leaky_relu with what a module cannot be given",
    ),
    "constant": (lambda self, x, _: F.relu(x + torch.ones(8)), "makes a tensor of its own"),
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


def test_a_transformer_layer_takes_its_module_itself():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    with pytest.raises(ValueError, match=r"0 is a TransformerEncoderLayer.*activation=nn.ReLU\(\)"):
        activations_to_modules_(nn.Sequential(layer), torch.randn(5, 3, 8))


def test_a_replaced_forward_is_refused():
    model = Of(lambda self, x, _: F.relu(x))
    model.forward = model.forward
    with pytest.raises(ValueError, match="was replaced on the module itself"):
        activations_to_modules_(model, torch.randn(5, 8))
