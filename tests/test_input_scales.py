"""XNOR-Net's input scales against the paper's formula, written with loops."""

import pytest
import torch
from torch import nn

import learnsched as ls
from learnsched.benchmarks.input_scales import InputScaled, scale_inputs_


def test_of_a_convolution_they_are_the_mean_magnitude_of_each_window():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, (3, 2), stride=2, padding=1, bias=False)
    x = torch.randn(2, 3, 6, 5)
    found = InputScaled(nn.Identity(), layer).magnitude(x)
    padded = torch.zeros(2, 3, 8, 7)
    padded[:, :, 1:-1, 1:-1] = x
    assert found.shape == (2, 1, 3, 3)
    for example in range(2):
        for row in range(3):
            for column in range(3):
                window = padded[example, :, 2 * row : 2 * row + 3, 2 * column : 2 * column + 2]
                assert float(found[example, 0, row, column]) == pytest.approx(
                    float(window.abs().mean()), rel=1e-5
                )


@pytest.mark.parametrize("bias", [True, False])
def test_the_output_is_the_scaled_product_of_signs_and_the_bias(bias):
    torch.manual_seed(0)
    layer = nn.Linear(5, 3, bias=bias)

    class Sign(nn.Module):
        def forward(self, x):
            return x.sign()

    x = torch.randn(4, 5)
    found = InputScaled(Sign(), layer)(x)
    for example in range(4):
        product = layer.weight @ x[example].sign() * x[example].abs().mean()
        expected = product + layer.bias if bias else product
        torch.testing.assert_close(found[example], expected)


def test_a_converted_network_is_trained_and_keeps_its_layers():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(1, 4, 3, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
    )
    ls.quantize_(net, ls.binary(), ls.binary())
    names = [layer.info for layer in ls.layers.quantized_layers(net)]
    scale_inputs_(net)
    assert [layer.info for layer in ls.layers.quantized_layers(net)] == names
    net(torch.randn(6, 1, 8)).square().sum().backward()
    assert all(bool((p.grad != 0).any()) for p in net.parameters())


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match=r"chain of layers.*got a QuantizedLinear"):
        scale_inputs_(ls.quantize_(nn.Linear(4, 2), ls.binary()))
    pooled = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(4, 4, 1))
    ls.quantize_(pooled, ls.binary(), ls.binary())
    with pytest.raises(ValueError, match="MaxPool1d, stands between"):
        scale_inputs_(pooled)
