"""What cannot be exported is an error that names the layer and the way out."""

import importlib.util

import numpy as np
import pytest
import torch
from export_networks import finalized, mlp, random_network
from torch import nn
from torch.nn import functional as F

import learnsched as ls
from learnsched.export import ExportError, QuantizedInput
from learnsched.export.trace import trace

pytest.importorskip("onnx")

ALL = (ls.export_onnx, ls.export_qonnx, ls.export_ternary)
X = torch.linspace(-2, 2, 4 * 64).reshape(4, 1, 8, 8)


def body(*layers):
    """Layers between a convolution and a linear layer, finalized."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *layers)
    size = net.eval()(X).flatten(1).shape[1]
    return nn.Sequential(net, nn.Flatten(), nn.Linear(size, 3))


def refused(net, match, exporters=ALL, x=X, tmp_path=None):
    for export in exporters:
        target = tmp_path / export.__name__
        with pytest.raises(ExportError, match=match):
            export(net, x, target)
        assert not target.exists()
    assert not list(tmp_path.iterdir())


def test_not_quantized(tmp_path):
    for export in ALL:
        with pytest.raises(ValueError, match=r"call learnsched\.quantize_ first"):
            export(mlp(), X, tmp_path / "net")


def test_not_finalized(tmp_path):
    net = ls.quantize_(nn.Sequential(QuantizedInput(0.1), mlp()), ls.ternary(), ls.unsigned(2))
    refused(net, r"1\.1 has free weights; call learnsched.finalize_", tmp_path=tmp_path)
    net = finalized(mlp(), X)
    with torch.no_grad():
        net[1][1].weight.add_(0.1)
    refused(net, r"1\.1 have left their level set.*finalize_ again", tmp_path=tmp_path)
    net = finalized(mlp(), X)
    net[1][3].forward_std.fill_(0.1)
    refused(net, r"1\.3 has noise; call learnsched.finalize_", tmp_path=tmp_path)


def test_wrapped_models(tmp_path):
    net = finalized(mlp(), X)
    refused(
        torch.compile(net, backend="eager"),
        r"torch\.compile; .*model\._orig_mod",
        tmp_path=tmp_path,
    )
    refused(nn.DataParallel(net), r"DataParallel; export what is inside", tmp_path=tmp_path)
    average = torch.optim.swa_utils.AveragedModel(net)
    refused(average, r"AveragedModel; .*model\.module", tmp_path=tmp_path)


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        ((nn.LayerNorm([4, 8, 8]), nn.ReLU()), r"1\.0\.1: LayerNorm has no integer counterpart"),
        ((nn.GroupNorm(2, 4), nn.ReLU()), r"1\.0\.1: GroupNorm"),
        ((nn.BatchNorm2d(4), nn.GELU()), r"1\.0\.2: GELU does not rise everywhere.*use ReLU"),
        ((nn.BatchNorm2d(4), nn.LeakyReLU(-0.1)), r"1\.0\.2: LeakyReLU does not rise"),
        ((nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(3, ceil_mode=True)), r"1\.0\.3: its windows"),
        (
            (nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2, padding=1, count_include_pad=False)),
            r"1\.0\.3: its windows are not all of one size",
        ),
        ((nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(3)), r"1\.0\.3: \(8, 8\) does not divide"),
        ((nn.BatchNorm2d(4), nn.ReLU(), nn.Softmax(1)), r"1\.0\.3: Softmax"),
        (
            (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU()),
            r"1\.0\.1: padding_mode='reflect' cannot be exported; use 'zeros'",
        ),
        (
            (nn.Conv2d(4, 4, 2, padding="same"), nn.ReLU()),
            r"1\.0\.1: padding='same' of an even kernel is lopsided; use padding=0 after a ZeroPad2d",
        ),
        (
            (nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()),
            r"1\.0\.1 keeps no running statistics.*track_running_stats=True",
        ),
        ((nn.BatchNorm2d(4), nn.ReLU(), nn.ConstantPad2d(1, 0.5)), r"1\.0\.3 pads with .* value 0\.5"),
        ((nn.BatchNorm2d(4), nn.ReLU(), nn.ReflectionPad2d(1)), r"1\.0\.3: ReflectionPad2d"),
        ((nn.BatchNorm2d(4), nn.ReLU(), nn.PixelShuffle(2)), r"1\.0\.3: PixelShuffle has no integer"),
        (
            (nn.BatchNorm2d(4), nn.ReLU(), nn.Upsample(scale_factor=2, mode="bilinear")),
            r"1\.0\.3 upsamples \(8, 8\) to \(16, 16\) with mode 'bilinear'; only whole factors",
        ),
        (
            (nn.BatchNorm2d(4), nn.ReLU(), nn.Upsample(size=(12, 8))),
            r"1\.0\.3 upsamples \(8, 8\) to \(12, 8\).*only whole factors",
        ),
        (
            (nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ZeroPad2d(1), nn.ReLU()),
            r"1\.0\.4 pads what has a bias; pad after the activation",
        ),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:no batch norm precedes")
def test_operations_without_counterpart(layers, match, tmp_path):
    refused(finalized(body(*layers), X), match, tmp_path=tmp_path)


class Forward(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.how = forward

    def forward(self, x):
        return self.how(self, self.act(self.norm(self.conv(x))))


@pytest.mark.parametrize(
    ("forward", "match"),
    [
        (lambda self, y: y if y.sum() > 0 else -y, "cannot be traced.*values of tensors"),
        (lambda self, y: y * y, r"mul in 1: the call of mul has no .* two activations"),
        (lambda self, y: y - 0.5, r"sub in 1: the call of sub .* outside of the model"),
        (lambda self, y: y[:, :2], r"getitem.* has no integer counterpart.*layers of their own"),
        (lambda self, y: torch.cat(y.chunk(2, 1), 1), r"chunk.* has no integer counterpart"),
        (lambda self, y: torch.cat([y, y], 2), "concatenates along dimension 2; only channels"),
        (lambda self, y: torch.cat([y, y]), "concatenates along dimension 0; only channels"),
        (lambda self, y: F.pad(y, (1, 1, 1, 1), "reflect"), "pads with mode 'reflect'"),
        (lambda self, y: F.pad(y, (0, 0, 0, 0, 1, 1)), "only zeros around the spatial"),
        (lambda self, y: F.pad(y, (0, -1)), "only zeros around the spatial"),
        (lambda self, y: y.permute(0, 2, 3, 1), "the call of permute has no integer counterpart"),
        (lambda self, y: y.flatten(1).softmax(1), r"softmax.* At the end of the network, leave it out"),
        (lambda self, y: torch.sigmoid(y), r"sigmoid.* has no integer counterpart"),
        (lambda self, y: (y, y), "must put out one tensor"),
        (lambda self, y: self.act(y + y.mean((2, 3), keepdim=True)), "adds tensors of different shapes"),
        (lambda self, y: y.reshape(1, -1), "changes the batch dimension"),
        (lambda self, y: F.dropout(y, 0.5), "dropout"),
        (lambda self, y: F.avg_pool2d(y, 3, 1, 1, False, False), "windows are not all of one size"),
        (lambda self, y: F.avg_pool2d(y, 2, 2, 0, False, True, 3), "divisor_override cannot be"),
        (lambda self, y: F.max_pool2d(y, 2, 2, 0, 1, True), "windows are not all of one size"),
        (lambda self, y: F.max_pool2d(y, 2, return_indices=True)[0], "_with_indices has no integer"),
        (lambda self, y: F.adaptive_max_pool2d(y, 2, True)[0], "_with_indices has no integer"),
    ],
)  # fmt: skip
def test_forwards_that_cannot_be_followed(forward, match, tmp_path):
    refused(finalized(Forward(forward), X), match, tmp_path=tmp_path)


def test_attention(tmp_path):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.codes = QuantizedInput(0.04)
            self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(64, 3)

        def forward(self, x):
            x = self.codes(x.squeeze(1))
            return self.head(self.mix(x, x, x, need_weights=False)[0].flatten(1))

    net = ls.finalize_(ls.quantize_(Attention(), ls.ternary()))
    refused(net, r"mix: MultiheadAttention .* export the layers around it apart", tmp_path=tmp_path)
    net = ls.finalize_(ls.quantize_(ls.attention_to_linears_(Attention()), ls.ternary()))
    refused(net, r"mix: ProjectedAttention .* export the layers around it apart", tmp_path=tmp_path)


def test_volumes(tmp_path):
    net = nn.Sequential(
        QuantizedInput(0.04),
        nn.Unflatten(1, (1, 1)),
        nn.Conv3d(1, 2, 1),
        nn.Flatten(),
        nn.Linear(128, 3),
    )
    ls.finalize_(ls.quantize_(net, ls.ternary()))
    refused(net, r"^2: (Quantized)?Conv3d has no integer counterpart", tmp_path=tmp_path)


def test_linear_layers_along_the_last_of_several_dimensions(tmp_path):
    net = nn.Sequential(QuantizedInput(0.04), nn.Linear(8, 4), nn.Flatten(), nn.Linear(32, 3))
    ls.finalize_(ls.quantize_(net, ls.ternary()))
    match = r"^1 takes inputs of 2 dimensions here.*got 4; flatten .* convolution of kernel size 1"
    refused(net, match, tmp_path=tmp_path)


def test_two_inputs(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, a, b):
            return self.linear(a)

    net = ls.finalize_(ls.quantize_(Two(), ls.ternary()))
    with pytest.raises(ExportError, match="takes 2 inputs"):
        trace(net, torch.zeros(1, 4))


def test_numbers(tmp_path):
    net, x = random_network("mlp", seed=40)
    refused(net.double(), r"call model.float\(\) first", x=x, tmp_path=tmp_path)
    net, x = random_network("mlp", seed=40)
    net[1][2].running_var[0] = float("nan")
    refused(net, r"1\.2\.running_var is not finite", x=x, tmp_path=tmp_path)


@pytest.mark.parametrize(
    "x", [torch.zeros(64), torch.zeros(0, 1, 8, 8), "x", torch.zeros(1, 64).long()]
)
def test_example_inputs(x, tmp_path):
    net, _ = random_network("mlp", seed=41)
    refused(net, "example_input must be", x=x, tmp_path=tmp_path)


def test_example_without_batch_dimension(tmp_path):
    net, _ = random_network("cnn2d", seed=42)
    refused(net, "dimension must be the batch", x=torch.zeros(1, 8, 8), tmp_path=tmp_path)


def test_real_layers_in_the_ternary_format(tmp_path):
    def make(**arguments):
        net = nn.Sequential(QuantizedInput(0.1), mlp())
        ls.quantize_(net, ls.ternary(), ls.unsigned(2), example_input=X, **arguments)
        return ls.finalize_(net)

    def refuse(net, match):
        refused(net, match, (ls.export_ternary,), tmp_path=tmp_path)

    refuse(make(skip=["first"]), r"1\.1 cannot be .*its weight is real; leave it out of skip=")
    refuse(make(skip=["last"]), r"1\.7 cannot be .*its weight is real")
    real = {"1.3": None}
    refuse(
        make(overrides=real),
        r"1\.2 computes with real numbers.*activation comes right after",
    )
    net = ls.finalize_(ls.quantize_(mlp(), ls.ternary(), ls.unsigned(2)))
    refuse(net, r"^1 cannot be .*its input is real; put learnsched.export.QuantizedInput in front")
    for ahead in (nn.AvgPool2d(1), nn.MaxPool2d(1), nn.ZeroPad2d(0), nn.Upsample(scale_factor=1)):
        net = nn.Sequential(
            nn.Flatten(2), nn.Unflatten(2, (8, 8)), ahead, QuantizedInput(0.1), mlp()
        )
        ls.finalize_(ls.quantize_(net, ls.ternary(), ls.unsigned(2), example_input=X))
        refuse(net, "^2 comes before the input is quantized; put .*QuantizedInput ahead of it")
    for late in (
        (nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.ReLU()),
        (nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)),
    ):
        match = r"computes with real numbers.*Put pools and concatenations behind the activation"
        refuse(finalized(body(*late), X), match)
    net = nn.Sequential(QuantizedInput(0.1), mlp())
    net = ls.finalize_(ls.quantize_(net, ls.power_of_two(3), ls.unsigned(2)))
    refuse(net, r"1\.1 has power_of_two3 weights, which are no trits; quantize it with ternary\(\)")


def test_means_of_sums_that_float32_may_miss(tmp_path):
    net = nn.Sequential(
        QuantizedInput(0.01, ls.signed(8)), nn.Conv2d(1, 2, 9, bias=False), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 2),
    )  # fmt: skip
    x = torch.zeros(1, 1, 40, 40)
    ls.finalize_(ls.quantize_(net, ls.ternary(), ls.unsigned(2), example_input=x))
    refused(net, r"^2: its sums reach \d+.*pool after the activation", x=x, tmp_path=tmp_path)


def test_levels_that_are_no_integers(tmp_path):
    odd = ls.LevelSet((-1.0, 0.3, 1.0))
    net = finalized(mlp(), X, activation=odd)
    refused(net, r"1\.3: the levels .* are not whole multiples of one step", tmp_path=tmp_path)
    net = finalized(mlp(), X, weight=odd)
    refused(net, r"its levels .* are not whole multiples", (ls.export_ternary,), tmp_path=tmp_path)


def test_opsets(tmp_path):
    net, x = random_network("mlp", seed=43)
    with pytest.raises(ValueError, match=r"opset must be 25 .* or 21 .*, got 20"):
        ls.export_onnx(net, x, tmp_path / "net.onnx", opset=20)


def test_packages_that_are_not_installed(tmp_path, monkeypatch):
    net, x = random_network("mlp", seed=44)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for export in (ls.export_onnx, ls.export_qonnx):
        with pytest.raises(
            ImportError, match=r"onnx is not installed; pip install 'learnsched\[export\]'"
        ):
            export(net, x, tmp_path / "net")
    ls.export_ternary(net, x, tmp_path / "net")  # needs none


def test_a_failed_export_leaves_the_old_file(tmp_path):
    pytest.importorskip("onnx")
    net, x = random_network("mlp", seed=45)
    path = tmp_path / "net.onnx"
    ls.export_onnx(net, x, path)
    before = path.read_bytes()
    net[1][2].running_var[0] = float("nan")
    with pytest.raises(ExportError):
        ls.export_onnx(net, x, path)
    assert path.read_bytes() == before


def test_quantized_input_refuses_scales():
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive and finite"):
            QuantizedInput(scale)
    wrong = {"must hold numbers to fit": torch.zeros(0, 4), "in x is 0,": torch.zeros(2, 4)}
    for message, x in {**wrong, "in x is nan": torch.tensor([float("nan")])}.items():
        with pytest.raises(ValueError, match=message):
            QuantizedInput.fit(x)
    for make in (lambda: QuantizedInput(0.1, 8), lambda: QuantizedInput.fit(torch.ones(3), 8)):
        with pytest.raises(TypeError, match=r"must be a LevelSet such as .*, got int"):
            make()
    net = QuantizedInput.fit(torch.tensor([-3.0, 1.0]), ls.unsigned(8))
    assert np.isclose(net.scale.item(), 3 / 255)


def relu_in_place(self, x):
    F.relu(x, inplace=True)
    return x


def added_in_place(self, x):
    x.add_(torch.relu(x))
    return x


def kept(self, x):
    before = x
    x += torch.relu(x)
    return x + before


@pytest.mark.parametrize("change", [relu_in_place, added_in_place, kept])
@pytest.mark.parametrize("quantized", [False, True])
def test_changes_in_place_that_a_trace_does_not_show_are_refused(change, quantized, tmp_path):
    class Changing(Forward):
        def forward(self, x):
            y = change(self, self.norm(self.conv(x)))
            return self.act(y) if quantized else y

    net = finalized(Changing(None), torch.cat([X, -X]))
    if quantized and change is relu_in_place:  # the quantized ReLU does the same again
        ls.export_onnx(net, X, tmp_path / "net.onnx")
        return
    match = "changes a tensor in place that is used again"
    refused(net, match, ALL if quantized else ALL[:2], tmp_path=tmp_path)


def test_a_hook_that_changes_what_a_layer_puts_out_is_refused(tmp_path):
    net = finalized(Forward(lambda self, y: y), X)
    net[1].conv.register_forward_hook(lambda module, inputs, output: 3 * output)
    refused(net, "or a hook changes what a layer puts out", tmp_path=tmp_path)


class ChangedInPlace(nn.Module):
    """Adds to a tensor that goes by two names, which a trace does not show; of zeros nobody sees it."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.relu = nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU()
        self.b = nn.Linear(8, 4, bias=False)

    def forward(self, x):
        h = self.relu(self.norm(self.a(x)))
        g = h
        h += g
        return self.b(h + g)


def test_a_constant_example_does_not_hide_what_a_trace_does_not_show(tmp_path):
    torch.manual_seed(0)
    net = ls.quantize_(ChangedInPlace(), ls.ternary(), ls.unsigned(2))
    ls.finalize_(net).eval()
    for export in ALL:
        with pytest.raises(ExportError):
            export(net, torch.zeros(2, 8), tmp_path / "net")
