"""Every layer's codes are PyTorch's, to the bit, in every runtime."""

import numpy as np
import pytest
import torch
from export_networks import (
    FAMILIES,
    assert_same,
    assert_same_everywhere,
    finalized,
    random_network,
    randomize_batch_norms,
    reference_codes,
)
from export_runtimes import run_onnx
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import learnsched as ls
from learnsched.export import align_
from learnsched.export.check import pytorch_codes
from learnsched.export.reference import integers, run

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("qonnx")

ACTIVATIONS = {"unsigned2": ls.unsigned(2), "ternary": ls.ternary(), "binary": ls.binary()}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_random_networks_with_negative_and_zero_factors(family, activation, tmp_path):
    net, x = random_network(family, seed=0, activation=ACTIVATIONS[activation])
    found = assert_same_everywhere(net, x, tmp_path)
    assert len(np.unique(found["output"])) > 5


@pytest.mark.parametrize("family", FAMILIES)
def test_binary_weights(family, tmp_path):
    net, x = random_network(family, seed=1, weight=ls.binary(), activation=ls.binary())
    assert_same_everywhere(net, x, tmp_path)


@pytest.mark.parametrize(
    "levels", [ls.unsigned(1), ls.unsigned(3), ls.signed(2, narrow=False), ls.signed(4)],
    ids=lambda levels: levels.name,
)  # fmt: skip
def test_other_activation_levels(levels, tmp_path):
    net, x = random_network("cnn2d", seed=2, activation=levels)
    assert_same_everywhere(net, x, tmp_path)


@pytest.mark.parametrize(
    "activation", [nn.LeakyReLU(0.1), nn.PReLU(), nn.PReLU(24), nn.ELU(), nn.SELU(), nn.ReLU6()],
    ids=lambda module: type(module).__name__,
)  # fmt: skip
def test_activations_that_bend(activation, tmp_path):
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 24), nn.BatchNorm1d(24), activation, nn.Linear(24, 10)
    )
    x = torch.randn(60, 1, 8, 8)
    net = finalized(net, x, activation=ls.signed(3))
    assert_same_everywhere(net, x, tmp_path)


def test_eight_bit_activations_inside(tmp_path):
    net, x = random_network("mlp", seed=4, activation=ls.unsigned(8))
    assert_same_everywhere(net, x, tmp_path)


def test_power_of_two_weights_in_onnx_and_qonnx(tmp_path):
    from export_runtimes import run_qonnx

    net, x = random_network("cnn1d", seed=5, weight=ls.power_of_two(3))
    graph, expected = reference_codes(net, x)
    ls.export_onnx(net, x, tmp_path / "net.onnx")
    assert_same(graph, expected, run_onnx(tmp_path / "net.onnx", x.numpy(), layers=True))
    ls.export_qonnx(net, x, tmp_path / "net.qonnx")
    assert_same(graph, expected, run_qonnx(tmp_path / "net.qonnx", x.numpy()))


class Functional(nn.Module):
    """The same operations as functions, and the shapes taken from the input."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding="same", dilation=2)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU()
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.norm2 = nn.BatchNorm2d(8)
        self.act2 = nn.ReLU()
        self.head = nn.Linear(8, 10)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        x = self.act(self.norm(self.conv(x)))
        x = nn.functional.avg_pool2d(x, 2, 2, 0, False, False)
        x = self.dropout(self.act2(self.norm2(self.depthwise(x))))
        x = nn.functional.max_pool2d(input=x, kernel_size=2)
        x = x.mean((2, 3)).view(x.size(0), -1)
        return self.head(x)


def test_functions_groups_dilation_and_pools(tmp_path):
    torch.manual_seed(6)
    net = Functional()
    randomize_batch_norms(net, torch.Generator().manual_seed(6))
    x = torch.randn(60, 1, 8, 8)
    assert_same_everywhere(finalized(net, x), x, tmp_path)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1)])
def test_pools_of_accumulators(pool, tmp_path):
    torch.manual_seed(15)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), pool, nn.Identity(), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AvgPool2d(2, padding=1) if not isinstance(pool, nn.AdaptiveAvgPool2d) else nn.Dropout(),
        nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    )  # fmt: skip
    randomize_batch_norms(net, torch.Generator().manual_seed(15))
    x = torch.randn(60, 1, 8, 8)
    net = finalized(net, x)
    # PyTorch's mean of float32 numbers rounds more than once, so that near ties are likelier.
    align_(net, x[:2])
    assert_same_everywhere(net, x, tmp_path)


def test_no_batch_norm_but_biases(tmp_path):
    torch.manual_seed(7)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    x = torch.randn(60, 1, 8, 8)
    with pytest.warns(UserWarning, match="calibrate_"):
        net = finalized(net, x)
    ls.calibrate_(net, [x])
    assert_same_everywhere(net, x, tmp_path)


def test_batch_norm_after_the_last_layer(tmp_path):
    torch.manual_seed(8)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10))
    x = torch.randn(60, 1, 8, 8)
    net = nn.Sequential(ls.export.QuantizedInput(0.04), net)
    net = ls.finalize_(ls.quantize_(net, ls.ternary()), [x]).eval()
    ls.export_ternary(net, x, tmp_path / "ternary")
    y = ls.integer_reference(tmp_path / "ternary")(x.numpy())
    np.testing.assert_allclose(y, net(x).detach().numpy(), rtol=1e-4, atol=1e-5)


class Named(nn.Module):
    """Layers called input and output, and one whose result nobody reads."""

    def __init__(self):
        super().__init__()
        self.input = nn.Linear(64, 16)
        self.norm, self.act = nn.BatchNorm1d(16), nn.ReLU()
        self.output = nn.Linear(16, 5)
        self.unused = nn.Linear(16, 5)

    def forward(self, x):
        x = self.act(self.norm(self.input(x.flatten(1))))
        y = self.output(x)
        self.unused(x)
        return y


def test_layer_names_of_the_ends_and_dead_branches(tmp_path):
    torch.manual_seed(14)
    x = torch.randn(40, 1, 8, 8)
    net = finalized(Named(), x)
    assert_same_everywhere(net, x, tmp_path)
    named = Named()
    ls.quantize_(named, ls.ternary(), ls.unsigned(2), overrides={"output": None})
    ls.finalize_(named).eval()
    ls.export_onnx(named, x, tmp_path / "real.onnx")
    y = run_onnx(tmp_path / "real.onnx", x.numpy())["output"]
    np.testing.assert_allclose(y, named(x).detach().numpy(), atol=1e-2)


def test_batch_size_is_free_in_onnx(tmp_path):
    net, x = random_network("cnn2d", seed=9)
    ls.export_onnx(net, x[:3], tmp_path / "net.onnx")
    whole = run_onnx(tmp_path / "net.onnx", x.numpy())["output"]
    one = np.concatenate(
        [run_onnx(tmp_path / "net.onnx", x[i : i + 1].numpy())["output"] for i in range(5)]
    )
    assert np.array_equal(whole[:5], one)


def test_the_model_is_left_as_it_is(tmp_path):
    net, x = random_network("residual", seed=10)
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    ls.export_ternary(net, x, tmp_path / "ternary")
    ls.export_onnx(net, x, tmp_path / "net.onnx")
    assert all(module.training for module in net.modules() if not list(module.children()))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_exports_are_deterministic(tmp_path):
    net, x = random_network("residual", seed=11)
    for name in ("a", "b"):
        ls.export_onnx(net, x, tmp_path / f"{name}.onnx")
        ls.export_ternary(net, x, tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert (tmp_path / "a/manifest.json").read_bytes() == (
        tmp_path / "b/manifest.json"
    ).read_bytes()


def test_qonnx_tools_read_the_file_as_meant(tmp_path):
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.util.cleanup import cleanup_model
    from qonnx.util.inference_cost import inference_cost

    for family in ("mlp", "cnn2d"):
        net, x = random_network(family, seed=13, samples=10)
        path = tmp_path / "net.qonnx"
        ls.export_qonnx(net, x, path)
        graph, _ = reference_codes(net, x)
        # Cleaning up folds constants, and must leave the weights' Quant nodes alone.
        model = cleanup_model(ModelWrapper(str(path)))
        quants = [n for n in model.graph.node if n.op_type == "Quant"]
        assert len(quants) == len([n for n in graph if hasattr(n, "levels")])
        name = model.graph.output[0].name
        found = execute_onnx(model, {model.graph.input[0].name: x.numpy()})[name]
        assert np.array_equal(found, run(graph, x.numpy())["output"])
        cost = inference_cost(ModelWrapper(str(path)), discount_sparsity=False)["total_cost"]
        operations = sum(graph.operations(n) for n in graph if hasattr(n, "weight"))
        assert cost["op_mac_INT8_INT2"] + cost["op_mac_UINT2_INT2"] == len(x) * operations
        assert cost["mem_w_INT2"] == sum(n.weight.size for n in graph if hasattr(n, "weight"))


@st.composite
def architectures(draw):
    """A convolutional network of random shape, and its levels."""
    seed = draw(st.integers(0, 2**31))
    rank = draw(st.sampled_from([1, 2]))
    conv, norm = (nn.Conv1d, nn.BatchNorm1d) if rank == 1 else (nn.Conv2d, nn.BatchNorm2d)
    side = draw(st.integers(5, 9))
    channels, layers, length = 1, [], side
    torch.manual_seed(seed)
    for _ in range(draw(st.integers(1, 3))):
        width = draw(st.sampled_from([2, 4, 6]))
        kernel = draw(st.integers(1, 3))
        stride, padding = draw(st.integers(1, 2)), draw(st.integers(0, 1))
        groups = 2 if channels % 2 == 0 and draw(st.booleans()) else 1
        if length + 2 * padding < kernel:
            break
        bias = draw(st.booleans())
        act = nn.ReLU() if draw(st.booleans()) else nn.LeakyReLU(draw(st.sampled_from([0.0, 0.2])))
        layers += [conv(channels, width, kernel, stride, padding, groups=groups, bias=bias)]
        layers += [norm(width), act]
        channels, length = width, (length + 2 * padding - kernel) // stride + 1
    layers += [nn.Flatten(), nn.Linear(channels * length**rank, 3)]
    net = nn.Sequential(*layers)
    randomize_batch_norms(net, torch.Generator().manual_seed(seed))
    x = torch.randn(20, 1, *[side] * rank, generator=torch.Generator().manual_seed(seed))
    weight = draw(st.sampled_from([ls.ternary(), ls.binary()]))
    activation = draw(st.sampled_from([ls.unsigned(2), ls.ternary(), ls.binary(), ls.unsigned(1)]))
    return finalized(net, x, weight, activation, draw(st.sampled_from([0.02, 0.3]))), x


@settings(max_examples=40, deadline=None)
@given(architectures())
def test_random_architectures_in_the_integer_reference(case):
    net, x = case
    align_(net, x[:2])
    graph, expected = reference_codes(net, x)
    found = integers(graph, x.numpy())
    assert_same(graph, expected, {**found, graph.output.inputs[0]: found["output"]})


@settings(max_examples=10, deadline=None)
@given(architectures())
def test_random_architectures_in_every_runtime(tmp_path_factory, case):
    net, x = case
    align_(net, x[:2])
    assert_same_everywhere(net, x, tmp_path_factory.mktemp("random"))


def test_pytorch_codes_are_read_off_its_outputs():
    net, x = random_network("mlp", seed=12)
    graph, expected = reference_codes(net, x)
    module = net[1][3]
    scaled = module.scale * torch.from_numpy(expected[graph.modules["1.3"]]).float()
    assert torch.equal(net[:1](x), net[0].scale * torch.from_numpy(expected["0"]).float())
    inner = net[1][:4](net[0](x))
    assert torch.equal(inner, scaled)
    assert set(pytorch_codes(net, graph, x[:1])) == set(expected)
