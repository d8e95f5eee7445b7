"""Networks as PyTorch users write them: their codes in every runtime, to the bit."""

import numpy as np
import pytest
import torch
from export_networks import (
    assert_same_everywhere,
    finalized,
    randomize_batch_norms,
    reference_codes,
)
from export_runtimes import run_onnx, run_qonnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import learnsched as ls
from learnsched.export import ExportError, QuantizedInput, align_
from learnsched.export import graph as g
from learnsched.export.inspect import inspect
from learnsched.export.reference import propagate
from learnsched.export.trace import trace

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("qonnx")


def conv(inputs, outputs, kernel=3, stride=1, padding=1, **arguments):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False, **arguments),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """Down, up by a transposed convolution and by repetition, and joined with what came before."""

    def __init__(self):
        super().__init__()
        self.down1, self.down2, self.down3 = conv(1, 4), conv(4, 6, stride=2), conv(6, 8, stride=2)
        self.up2 = nn.ConvTranspose2d(8, 6, 2, 2)
        self.norm2, self.act2 = nn.BatchNorm2d(6), nn.ReLU()
        self.up1, self.join1 = nn.Upsample(scale_factor=2), conv(12, 4)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        a = self.down1(x)
        b = self.down2(a)
        c = self.act2(self.norm2(self.up2(self.down3(b), output_size=b.shape[2:])))
        d = self.join1(self.up1(torch.cat([b, c], dim=1)))
        return self.head(torch.cat((a, d), 1))


class Inception(nn.Module):
    """Branches of several kernels, joined, and joined once more with themselves."""

    def __init__(self):
        super().__init__()
        self.stem, self.pool = conv(1, 4), nn.MaxPool2d(3, 1, 1)
        self.a, self.b, self.c = conv(4, 2, 1, padding=0), conv(4, 3), conv(4, 2, 5, padding=2)
        self.after, self.head = conv(11, 4, groups=1), nn.Linear(16, 3)

    def forward(self, x):
        x = self.stem(x)
        y = torch.cat([self.a(x), self.b(x), self.c(x), self.pool(x)], -3)
        y = F.adaptive_max_pool2d(self.after(y), (2, 2))
        return self.head(torch.flatten(y, 1))


class DenseNet(nn.Module):
    """Every layer reads the outputs of all before it, through batch norms of joined accumulators."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1, bias=False)
        self.norm1, self.act1 = nn.BatchNorm2d(4), nn.ReLU()
        self.norm2, self.act2 = nn.BatchNorm2d(7), nn.ReLU()
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        x = self.a(x)
        y = self.b(self.act1(self.norm1(x)))
        y = self.act2(self.norm2(torch.cat([x, y], 1)))
        return self.head(y.mean((2, 3)))


class Padded(nn.Module):
    """Zeros on one side only, by module and by function, and a kernel of even size."""

    def __init__(self):
        super().__init__()
        self.a, self.pad = conv(1, 8, 3, 2, 0), nn.ZeroPad2d((0, 1, 2, 0))
        self.b = conv(8, 12, 2, 1, 0, groups=2)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = self.a(F.pad(x, [0, 1, 0, 1]))
        x = self.b(F.pad(self.pad(x), (1, 0)))
        x = F.interpolate(x, scale_factor=(2, 3), mode="nearest")
        return self.head(x.mean([-2, -1]))


class MobileNet(nn.Module):
    """Depthwise and pointwise convolutions, and a residual around them."""

    def __init__(self):
        super().__init__()
        self.stem = conv(1, 6, stride=2)
        self.expand, self.depth = conv(6, 12, 1, padding=0), conv(12, 12, groups=12)
        self.project, self.norm = nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.act, self.drop = nn.ReLU6(), nn.Dropout2d(0.2)
        self.head = nn.Conv2d(6, 3, 1)

    def forward(self, x):
        x = self.stem(x)
        x = self.act(self.drop(self.norm(self.project(self.depth(self.expand(x))))) + x)
        return F.adaptive_avg_pool2d(self.head(x), 1).view(x.size(0), -1)


class Decoder(nn.Module):
    """Transposed convolutions in one dimension, grouped, dilated, with output padding."""

    def __init__(self):
        super().__init__()
        self.code = nn.Unflatten(1, (4, 16))
        self.a = nn.ConvTranspose1d(4, 4, 4, 2, 1)
        self.b = nn.ConvTranspose1d(4, 6, 3, 3, 2, output_padding=2, groups=2, dilation=2)
        self.norm1, self.act1 = nn.BatchNorm1d(4), nn.ReLU()
        self.norm2, self.act2 = nn.BatchNorm1d(6), nn.ReLU()
        self.pool, self.pad = nn.AdaptiveMaxPool1d(12), nn.ConstantPad1d((2, 1), 0.0)
        self.head = nn.ConvTranspose1d(6, 2, 1)

    def forward(self, x):
        x = self.act1(self.norm1(self.a(self.code(x.flatten(1)))))
        x = self.act2(self.norm2(self.b(x)))
        return self.head(self.pad(self.pool(x)))


@pytest.mark.parametrize("weight", [ls.ternary(), ls.binary()], ids=lambda levels: levels.name)
@pytest.mark.parametrize("build", [UNet, Inception, DenseNet, Padded, MobileNet, Decoder])
def test_architectures(build, weight, tmp_path):
    torch.manual_seed(30)
    net = build()
    randomize_batch_norms(net, torch.Generator().manual_seed(30))
    x = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(31))
    activation = ls.binary() if weight.name == "binary" and build is UNet else ls.unsigned(2)
    net = finalized(net, x, weight, activation)
    align_(net, x[:2])
    found = assert_same_everywhere(net, x, tmp_path)
    assert len(np.unique(found["output"])) > 5
    # Products are counted alike, whatever the format.
    reports = [inspect(tmp_path / name) for name in ("ternary", "25.onnx", "net.qonnx")]
    assert len({report.operations for report in reports}) == 1
    assert len({tuple(layer.zeros for layer in report.layers) for report in reports}) == 1


@st.composite
def transposed_convolutions(draw):
    """A transposed convolution of any legal setting, and integers to put in."""
    rank, groups = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    numbers = lambda least, most: tuple(draw(st.integers(least, most)) for _ in range(rank))  # noqa: E731
    kernel, stride, dilation = numbers(1, 4), numbers(1, 3), numbers(1, 3)
    extra = tuple(
        draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
    )
    padding, sizes = numbers(0, 5), numbers(1, 6)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    inputs, outputs = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    arguments = (kernel, stride, padding, extra, groups, False, dilation)
    kind = nn.ConvTranspose1d if rank == 1 else nn.ConvTranspose2d
    module = kind(inputs, outputs, *arguments)
    with torch.no_grad():
        module.weight.copy_(torch.randint(-1, 2, module.weight.shape, generator=generator))
    return module, torch.randint(-3, 4, (2, inputs, *sizes), generator=generator)


@settings(max_examples=200, deadline=None)
@given(transposed_convolutions())
def test_transposed_convolutions_of_integers_equal_pytorchs(case):
    module, x = case
    places = zip(
        x.shape[2:], module.kernel_size, module.stride, module.padding, module.dilation,
        module.output_padding, strict=True,
    )  # fmt: skip
    assume(all((n - 1) * s + d * (k - 1) + 1 + e > 2 * p for n, k, s, p, d, e in places))
    expected = module(x.float()).detach().numpy()
    weight = g.swap_channels(module.weight.detach().numpy(), module.groups).astype(np.int64)
    assert np.array_equal(g.swap_channels(weight, module.groups), module.weight.detach().numpy())
    low, high = np.zeros((2, len(weight)), np.int64)
    node = g.Product(
        name="y", inputs=("x",), shape=expected.shape[1:], weight=weight, low=low, high=high,
        levels=g.IntegerLevels((-1, 0, 1), 1.0, "ternary"),
        window=g.Window(
            stride=module.stride, padding=module.padding, dilation=module.dilation,
            groups=module.groups, transposed=True,
        ),
    )  # fmt: skip
    graph = g.Graph((g.Input(name="x", inputs=(), shape=tuple(x.shape[1:])), node))
    assert np.array_equal(propagate(graph, {"x": x.numpy().astype(np.int32)})["y"], expected)


def test_scales_of_grouped_transposed_convolutions(tmp_path):
    """In every group, channels of the same place share a scale; elsewhere each has its own."""
    torch.manual_seed(32)
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False))
    net = ls.finalize_(ls.quantize_(nn.Sequential(QuantizedInput(0.1), *net), ls.ternary()))
    x = torch.randn(5, 4, 3, 3)
    graph = trace(net, x)
    scale = ls.integer_weights(net)["1"].scale.flatten()
    assert scale.shape == (3,) and len(scale.unique()) == 3
    expected = scale.repeat(2).double().numpy() * net[0].scale.double().item()
    np.testing.assert_allclose(graph.output.scale, expected, rtol=1e-6)
    ls.export_ternary(net, x, tmp_path / "net")
    y = ls.integer_reference(tmp_path / "net")(x.numpy())
    np.testing.assert_allclose(y, net(x).detach().numpy(), atol=1e-5)


class Joined(nn.Module):
    """Two branches whose quantized activations are joined ahead of a convolution."""

    def __init__(self):
        super().__init__()
        self.codes = QuantizedInput(0.04)
        self.a, self.b, self.head = conv(1, 4), conv(1, 4), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = self.codes(x)
        return self.head(torch.cat([self.a(x), self.b(x)], 1))


def test_joined_channels_of_different_scales(tmp_path):
    torch.manual_seed(33)
    x = torch.randn(20, 1, 8, 8)
    net = ls.quantize_(Joined(), ls.ternary(), ls.unsigned(2))
    net.b[2].scale.mul_(1.5)
    ls.finalize_(net).eval()
    with pytest.raises(ExportError, match=r"^head .*different scales.*b\.scale\.copy_\(a\.scale\)"):
        ls.export_ternary(net, x, tmp_path / "net")
    ls.export_onnx(net, x, tmp_path / "net.onnx")
    ls.export_qonnx(net, x, tmp_path / "net.qonnx")
    expected = net(x).detach().numpy()
    for found in (
        run_onnx(tmp_path / "net.onnx", x.numpy(), layers=True),
        run_qonnx(tmp_path / "net.qonnx", x.numpy()),
    ):
        np.testing.assert_allclose(found["output"], expected, atol=1e-5)
    # The way out that the error names.
    net.b[2].scale.copy_(net.a[2].scale)
    align_(net, x[:2])
    assert_same_everywhere(net, x, tmp_path)


def test_batch_norm_after_the_last_layer_with_factors_of_any_sign_and_size(tmp_path):
    torch.manual_seed(34)
    x = torch.randn(30, 1, 8, 8)
    layers = [nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)]
    net = finalized(nn.Sequential(nn.Flatten(), *layers, nn.BatchNorm1d(4)), x)
    with torch.no_grad():
        net[1][5].weight.copy_(torch.tensor([1.0, -1.0, 0.0, 1e-9]))
        net[1][5].bias.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    graph, expected = reference_codes(net, x)
    assert graph.output.scale[1] < 0 and graph.output.scale[2] == 0
    # A factor of 0, or one that is lost beside its offset, says nothing of the sums.
    silent = np.ma.getmaskarray(expected[graph.output.name]).all(0)
    assert silent.tolist() == [False, False, True, True]
    assert_same_everywhere(net, x, tmp_path)


def test_codes_enter_behind_a_reshape(tmp_path):
    """A folder whose network flattens its input before it quantizes it."""
    torch.manual_seed(35)
    x = torch.randn(30, 1, 8, 8)
    net = nn.Sequential(nn.Flatten(), QuantizedInput(0.04), nn.Linear(64, 3))
    net = ls.finalize_(ls.quantize_(net, ls.ternary())).eval()
    found = assert_same_everywhere(net, x, tmp_path)
    reference = ls.integer_reference(tmp_path / "ternary")
    assert found["1"].shape == (30, 64)
    assert np.array_equal(reference(found["1"]), found["output"])
    with pytest.raises(
        ValueError, match=r"takes codes of shape \(samples, 64\), got \(30, 1, 8, 8\)"
    ):
        reference(found["1"].reshape(30, 1, 8, 8))
