"""Layers that compute with real numbers, in the formats that can hold them."""

import copy

import numpy as np
import pytest
import torch
from export_networks import FAMILIES, cnn2d, mlp, randomize_batch_norms
from export_runtimes import run_onnx, run_qonnx
from torch import nn

import learnsched as ls
from learnsched.export import ExportError, QuantizedInput, align_
from learnsched.export import graph as g
from learnsched.export.check import pytorch_codes
from learnsched.export.reference import propagate
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


ENDS = [("first",), ("last",), ("first", "last")]


@pytest.mark.parametrize("skip", ENDS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_codes_between_real_ends_are_exact(family, skip, tmp_path):
    """Real first layers decide codes up to the order of their sums; integers all that follows."""
    build, shape = FAMILIES[family]
    x = torch.randn(60, *shape, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(2)
    net = nn.Sequential(QuantizedInput(0.04), build())
    randomize_batch_norms(net, torch.Generator().manual_seed(2))
    ls.quantize_(net, ls.ternary(), ls.unsigned(2), example_input=x, skip=skip)
    ls.finalize_(net, [x]).eval()
    align_(net, x)
    graph = trace(net, x)
    expected = pytorch_codes(net, graph, x)
    seeds = [n.name for n in graph if isinstance(n, g.Quantize)]
    for found in both(net, x, tmp_path):
        assert np.array_equal(found["0"], expected["0"])
        for name in seeds[1:]:
            # Codes of a real layer differ where its sums lie on a threshold, as float32 rounds them.
            step = graph[name]
            real = found[step.inputs[0]] / step.scale
            near = np.abs(real[..., None] - np.array(step.thresholds)).min(-1)
            wrong = found[name] != expected[name]
            assert wrong.mean() < 0.001 and (near[wrong] < 1e-4).all()
        exact = propagate(graph, {name: found[name].astype(np.int32) for name in seeds})
        compared = 0
        for node in graph:
            if isinstance(node, g.Product | g.Threshold) and node.name in exact:
                assert np.array_equal(found[node.name], exact[node.name]), node.name
                compared += 1
        assert compared >= 2
        y = net(x).detach().numpy()
        agree = (found[graph.output.name].argmax(1) == y.argmax(1)).mean()
        assert agree > 0.98
    with pytest.raises(ExportError, match=r"cannot be written as integers: its weight is real"):
        ls.export_ternary(net, x, tmp_path / "net")


def test_codes_that_a_real_first_layer_leads_to_are_compared(tmp_path):
    """Near ties behind a real layer are refused as they are in a network of integers."""
    torch.manual_seed(5)
    net = nn.Sequential(
        nn.Linear(16, 512), nn.BatchNorm1d(512), nn.ReLU(),
        nn.Linear(512, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 3),
    )  # fmt: skip
    x = torch.randn(400, 16)
    ls.quantize_(net, ls.ternary(), ls.unsigned(2), skip=("first", "last"), example_input=x)
    ls.finalize_(net, [x]).eval()
    graph = trace(net, x)
    codes = {"2": pytorch_codes(net, graph, x)["2"].astype(np.int32)}
    sums = propagate(graph, codes)["3"]
    scale = ls.integer_weights(net)["3"].scale.double().flatten() * net[2].scale.double()
    common = [np.bincount(s - s.min()).argmax() + s.min() for s in sums.T]
    with torch.no_grad():
        tie = net[4]((torch.tensor(np.array(common)) * scale).float()[None])[0]
        net[4].bias.add_(0.5 * net[5].scale - tie)
    for export in (ls.export_onnx, ls.export_qonnx):
        with pytest.raises(ExportError, match=r"^5: \d+ of 25600 codes .*align_"):
            export(net, x, tmp_path / "net")
    align_(net, x[:2])
    graph = trace(net, x)
    for found in both(net, x, tmp_path):
        exact = propagate(graph, {"2": found["2"].astype(np.int32)})
        assert np.array_equal(found["3"], exact["3"]) and np.array_equal(found["5"], exact["5"])


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
    keep |= dict.fromkeys(("5", "8", "10", "12", "14"))
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


class Branches(nn.Module):
    """A real value that two layers take, one of them behind a dropout."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)
        self.relu, self.drop = nn.ReLU(), nn.Dropout(0.3)

    def forward(self, x):
        x = self.relu(self.a(x))
        return self.b(x) + self.c(self.drop(x))


IDENTITIES = {
    "dropout": lambda: nn.Sequential(
        nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 8)
    ),
    "identity": lambda: nn.Sequential(
        nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Identity(), nn.Linear(16, 8)
    ),
    "at the end": lambda: nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.3)),
    "flatten": lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8)),
    "branches": Branches,
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_what_leaves_its_input_as_it_is(name, tmp_path):
    torch.manual_seed(0)
    x = on_a_grid(64, 16)
    net = IDENTITIES[name]()
    ls.quantize_(net, ls.ternary())
    ls.finalize_(net, [x]).eval()
    y = net(x).detach().numpy()
    for found in both(net, x, tmp_path):
        np.testing.assert_allclose(found["output"], y, atol=2e-5)


def test_thresholds_move_ahead_of_a_dropout():
    x = on_a_grid(64, 16)
    layers = [
        QuantizedInput.fit(x),
        nn.Linear(16, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, 4),
    ]
    torch.manual_seed(0)
    plain = ls.quantize_(nn.Sequential(*layers), ls.ternary(), ls.unsigned(2))
    ls.finalize_(plain, [x]).eval()
    dropout = nn.Sequential(*plain[:3], nn.Dropout(0.3), *plain[3:])
    dropout = ls.finalize_(copy.deepcopy(dropout)).eval()
    before = plain[2].bias.clone()
    align_(plain, x)
    align_(dropout, x)
    assert not torch.equal(plain[2].bias, before)
    assert torch.equal(plain[2].bias, dropout[2].bias)


@pytest.mark.parametrize("name", ["one", "zero", "last", "whole0", "bits2"])
def test_layers_may_have_any_name(name, tmp_path):
    torch.manual_seed(0)
    x = on_a_grid(64, 16)
    net = nn.Sequential()
    net.add_module("ends", nn.Linear(16, 16))
    net.add_module("relu", nn.ReLU())
    net.add_module(name, nn.Linear(16, 8))
    levels = ls.LevelSet((0, 1, 4)) if name == "last" else ls.unsigned(2)
    ls.quantize_(net, ls.ternary(), levels)
    ls.calibrate_(net, [x])
    ls.finalize_(net, [x]).eval()
    for found in both(net, x, tmp_path):
        np.testing.assert_allclose(found["output"], net(x).detach().numpy(), atol=2e-5)
