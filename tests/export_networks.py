"""Small networks, and every layer's codes in every runtime, for the tests of export."""

import numpy as np
import torch
from export_runtimes import run_onnx, run_qonnx
from torch import nn

import learnsched as ls
from learnsched.export import QuantizedInput
from learnsched.export.check import pytorch_codes
from learnsched.export.reference import run
from learnsched.export.trace import trace

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


class Block(nn.Module):
    """A residual block, with a convolution on the shortcut where the shape changes."""

    def __init__(self, inputs, outputs, stride, activation=nn.ReLU):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.act1 = activation()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.act2 = activation()

    def forward(self, x):
        y = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        return self.act2(y + self.shortcut(x))


def mlp(inputs=64, width=24, classes=10):
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Linear(width, classes),
    )  # fmt: skip


def cnn1d(length=40, width=8, classes=10):
    return nn.Sequential(
        nn.Unflatten(1, (1, length)),
        nn.Conv1d(1, width, 5, 2, 2, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Conv1d(width, width, 3, 1, 1), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Flatten(), nn.Linear(width * ((length + 1) // 2), classes),
    )  # fmt: skip


def cnn2d(side=8, width=8, classes=10):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, 1, 1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.Flatten(), nn.Linear(2 * width * (side // 2) ** 2, classes),
    )  # fmt: skip


def residual(side=8, width=8, classes=10):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        Block(width, width, 1), Block(width, 2 * width, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, classes),
    )  # fmt: skip


FAMILIES = {
    "mlp": (mlp, (1, 8, 8)),
    "cnn1d": (cnn1d, (40,)),
    "cnn2d": (cnn2d, (1, 8, 8)),
    "residual": (residual, (1, 8, 8)),
}


def randomize_batch_norms(net, generator):
    """Factors and offsets of both signs and 0, as training does not leave them."""
    for module in net.modules():
        if isinstance(module, BATCH_NORMS):
            with torch.no_grad():
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator))
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator))
                module.weight[0] = 0
                module.weight[1] = -module.weight[1].abs()


def finalized(net, x, weight=None, activation=None, scale=0.04):
    """The network behind an input quantizer, quantized and finalized on ``x``."""
    net = nn.Sequential(QuantizedInput(scale), net)
    ls.quantize_(net, weight or ls.ternary(), activation or ls.unsigned(2), example_input=x[:2])
    ls.finalize_(net, [x])
    return net.eval()


def random_network(family, seed, weight=None, activation=None, samples=60):
    """A finalized network of a family with random batch norms, and inputs."""
    build, shape = FAMILIES[family]
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = build()
    randomize_batch_norms(net, generator)
    x = torch.randn(samples, *shape, generator=generator)
    return finalized(net, x, weight, activation), x


def reference_codes(net, x):
    """The graph and PyTorch's codes of every layer."""
    graph = trace(net, x[:2])
    expected = pytorch_codes(net, graph, x)
    assert graph.output.name in expected and len(expected) > 1
    return graph, expected


def assert_same(graph, expected, found):
    """Every layer's codes are PyTorch's, and the accumulators behind the output too."""
    for name, codes in expected.items():
        mine = found[graph[name].inputs[0] if name == graph.output.name else name]
        assert mine.shape == codes.shape, name
        assert (mine == codes).all(), f"{name}: {(mine != codes).sum()} of {codes.size} differ"


def assert_same_everywhere(net, x, tmp_path, qonnx_batch=None):
    """PyTorch, the integer reference from its folder, ONNX Runtime at both opsets, QONNX."""
    batch = qonnx_batch or len(x)
    paths = {opset: tmp_path / f"{opset}.onnx" for opset in (25, 21)}
    ls.export_ternary(net, x[:16], tmp_path / "ternary")
    ls.export_qonnx(net, x[:batch], tmp_path / "net.qonnx")
    for opset, path in paths.items():
        ls.export_onnx(net, x[:16], path, opset=opset)
    reference = ls.integer_reference(tmp_path / "ternary")
    for part in x.split(batch):  # every layer of ten thousand images would not fit in memory
        graph, expected = reference_codes(net, part)
        inputs = part.numpy()
        found = run(reference.graph, inputs)
        assert_same(graph, expected, found)
        outputs = found["output"]
        for path in paths.values():
            assert_same(graph, expected, run_onnx(path, inputs, layers=True))
            # Without the inner outputs the runtime may fuse what it likes.
            assert np.array_equal(run_onnx(path, inputs)["output"], outputs)
        assert_same(graph, expected, run_qonnx(tmp_path / "net.qonnx", inputs))
        y = net(part).detach().numpy()
        np.testing.assert_allclose(outputs, y, rtol=1e-4, atol=1e-4)
    return found
