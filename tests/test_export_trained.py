"""The whole way: trained with the pretrained schedule, exported, the same in every runtime."""

import numpy as np
import pytest
import torch
from export_networks import assert_same_everywhere, cnn1d, cnn2d, mlp, residual
from torch import nn

import learnsched as ls
from learnsched.data import load
from learnsched.export import QuantizedInput, align_

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("qonnx")


def trained(net, data, epochs, steps, seed=0):
    """The network behind an input quantizer, trained under the default schedule and finalized."""
    torch.manual_seed(seed)
    net = nn.Sequential(QuantizedInput.fit(data.train.x), net)
    x = data.train.x
    ls.quantize_(net, ls.ternary(), ls.unsigned(2), example_input=x[:2])
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    scheduler = ls.QuantizationScheduler(
        net, ls.load_pretrained("default"), epochs, steps_per_epoch=steps, optimizer=optimizer
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        losses = []
        for _ in range(steps):
            chosen = torch.randint(len(x), (64,), generator=generator)
            loss = nn.functional.cross_entropy(net(x[chosen]), data.train.y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        scheduler.step({"train_loss": torch.stack(losses).mean()})
    batches = [x[i : i + 64] for i in range(0, 1024, 64)]
    return ls.finalize_(net, batches).eval()


def accuracy(outputs, y):
    return float((np.argmax(outputs, 1) == y.numpy()).mean())


def check(net, data, tmp_path, least, batch):
    """Codes agree everywhere on the whole test split, and so does the accuracy."""
    x, y = data.test.x, data.test.y
    with torch.no_grad():
        theirs = accuracy(torch.cat([net(part) for part in x.split(500)]).numpy(), y)
    align_(net, x[:2])
    with torch.no_grad():
        aligned = accuracy(torch.cat([net(part) for part in x.split(500)]).numpy(), y)
    assert_same_everywhere(net, x, tmp_path, qonnx_batch=batch)
    reference = ls.integer_reference(tmp_path / "ternary")
    mine = accuracy(np.concatenate([reference(part.numpy()) for part in x.split(500)]), y)
    assert mine == aligned
    # A sum within rounding of a threshold may have fallen on its other side before.
    assert abs(theirs - mine) < 2e-3
    assert mine > least
    return mine


@pytest.mark.parametrize(
    ("build", "least"),
    [(lambda: mlp(width=32), 0.6), (cnn2d, 0.6), (residual, 0.5)],
    ids=["mlp", "cnn2d", "residual"],
)
def test_digits(build, least, tmp_path):
    torch.manual_seed(0)
    data = load("digits")
    net = trained(build(), data, epochs=4, steps=20)
    check(net, data, tmp_path, least, batch=len(data.test))


@pytest.mark.slow
def test_mnist1d(tmp_path):
    torch.manual_seed(0)
    data = load("mnist1d")
    net = trained(cnn1d(width=16), data, epochs=20, steps=40)
    check(net, data, tmp_path, 0.5, batch=100)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "least"),
    [
        (lambda: mlp(784, 128), 0.75),
        (lambda: cnn2d(28, 8), 0.75),
        (lambda: residual(28, 8), 0.65),
    ],
    ids=["mlp", "cnn2d", "residual"],
)
def test_ten_thousand_images_of_fashion_mnist(build, least, tmp_path):
    try:
        data = load("fashion_mnist")
    except FileNotFoundError as error:
        pytest.skip(f"Fashion-MNIST is not installed: {error}")
    assert len(data.test) == 10_000
    torch.manual_seed(0)
    net = trained(build(), data, epochs=6, steps=80)
    check(net, data, tmp_path, least, batch=500)
