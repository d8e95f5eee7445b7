"""Layers that compute with real numbers, in the formats that can hold them."""

import numpy as np
import pytest
import torch
from export_networks import cnn2d, mlp, randomize_batch_norms
from torch import nn

import learnsched as ls
from learnsched.export.check import pytorch_codes
from learnsched.export.runtimes import run_onnx, run_qonnx
from learnsched.export.trace import trace

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("qonnx")


def both(net, x, tmp_path):
    ls.export_onnx(net, x, tmp_path / "net.onnx")
    ls.export_qonnx(net, x, tmp_path / "net.qonnx")
    yield run_onnx(tmp_path / "net.onnx", x.numpy(), layers=True)
    yield run_qonnx(tmp_path / "net.qonnx", x.numpy())


def make(build, x, seed=0, **arguments):
    torch.manual_seed(seed)
    net = build()
    randomize_batch_norms(net, torch.Generator().manual_seed(seed))
    ls.quantize_(net, ls.ternary(), ls.unsigned(2), example_input=x, **arguments)
    return ls.finalize_(net, [x]).eval()


def on_a_grid(*shape):
    """Inputs of few bits, so that real first layers with such weights sum exactly."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-8, 9, shape, generator=generator) / 8


@pytest.mark.parametrize("build", [mlp, cnn2d])
@pytest.mark.parametrize("skip", [(), ("first",), ("last",), ("first", "last")], ids=str)
def test_real_ends(build, skip, tmp_path):
    x = on_a_grid(80, 1, 8, 8)
    net = make(build, x, skip=skip)
    graph = trace(net, x)
    expected = pytorch_codes(net, graph, x)
    y = net(x).detach().numpy()
    for found in both(net, x, tmp_path):
        for name in expected:
            if name != graph.output.name:
                # The first quantizer's input is real: float32 sums it in another order.
                same = (found[name] == expected[name]).mean()
                assert same > 0.999, name
        np.testing.assert_allclose(found[graph.output.name], y, atol=2e-2)


def test_real_first_layer_whose_sums_are_exact(tmp_path):
    """Where float32 rounds nothing in the first layer, all later codes agree to the bit."""
    x = on_a_grid(200, 1, 8, 8)
    net = make(cnn2d, x, skip=("first",))
    with torch.no_grad():
        net[0].weight.copy_((net[0].weight * 64).round() / 64)
        net[1].running_mean.zero_()
        net[1].running_var.fill_(1)
        net[1].eps = 0.0
        net[1].weight.copy_(2.0 ** torch.arange(-3, 5)[: len(net[1].weight)])
        net[1].bias.fill_(0.25)
        net[2].scale.fill_(0.5)
    graph = trace(net, x)
    expected = pytorch_codes(net, graph, x)
    for found in both(net, x, tmp_path):
        for name in expected:
            mine = found[graph[name].inputs[0] if name == graph.output.name else name]
            assert np.array_equal(mine, expected[name]), name


def test_real_layer_in_the_middle_and_real_activations(tmp_path):
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Linear(20, 16), nn.BatchNorm1d(16), nn.ReLU(),
        nn.Linear(16, 16), nn.BatchNorm1d(16), nn.LeakyReLU(0.1),
        nn.Linear(16, 16), nn.BatchNorm1d(16), nn.PReLU(16),
        nn.Linear(16, 16), nn.ELU(), nn.Linear(16, 16), nn.SELU(), nn.Linear(16, 16), nn.CELU(),
        nn.Linear(16, 5),
    )  # fmt: skip
    x = torch.randn(50, 20)
    keep = {name: None for name in ("3", "6")}
    keep |= {name: ls.LayerConfig(weight=ls.ternary()) for name in ("5", "8", "10", "12", "14")}
    ls.quantize_(net, ls.ternary(), ls.unsigned(2), overrides=keep, example_input=x)
    ls.finalize_(net, [x]).eval()
    y = net(x).detach().numpy()
    for found in both(net, x, tmp_path):
        np.testing.assert_allclose(found["15"], y, atol=2e-2)


def test_a_shortcut_around_a_real_activation(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.act = nn.Linear(8, 8), nn.ReLU()
            self.b = nn.Linear(8, 8)
            self.pool = nn.AvgPool1d(2)
            self.c = nn.Linear(4, 3)

        def forward(self, x):
            x = self.act(self.a(x))
            y = torch.relu(self.b(x)) + x
            return self.c(self.pool(y.unsqueeze(1)).flatten(1))

    torch.manual_seed(3)
    x = torch.randn(40, 8)
    net = Net()
    with pytest.warns(UserWarning):
        ls.quantize_(net, ls.ternary(), ls.unsigned(2), skip=["last"], example_input=x)
    ls.calibrate_(net, [x])
    ls.finalize_(net).eval()
    y = net(x).detach().numpy()
    for found in both(net, x, tmp_path):
        np.testing.assert_allclose(found["c"], y, atol=1e-4)
