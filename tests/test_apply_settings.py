"""Settings on the layers of a model: random orders, and what a scheduler's state brings along."""

import itertools

import pytest
import torch
from torch import nn

import learnsched as ls
from learnsched import policies
from learnsched.apply_settings import freeze_
from learnsched.layers import quantized_layers
from learnsched.schedule import Setting

pytestmark = pytest.mark.filterwarnings("ignore:no batch norm precedes")


def network():
    """Three layers of equal shape and equal weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    with torch.no_grad():
        for index in (2, 4):
            model[index].weight.copy_(model[0].weight)
    return ls.quantize_(model, ls.ternary(), ls.unsigned(2))


def drawn(seed, count):
    """Which ``count`` weights of a layer a generator of this seed takes."""
    order = torch.rand(6, 6, generator=torch.Generator().manual_seed(seed)).flatten()
    first = sorted(range(36), key=lambda i: -float(order[i]))[:count]
    return {divmod(i, 6) for i in first}


@pytest.mark.parametrize("partition", ["random", "redraw"])
@pytest.mark.parametrize("seed", [0, 7, 2**63 - 2])
def test_layers_of_equal_shape_draw_orders_of_their_own(partition, seed):
    layers = quantized_layers(network())
    freeze_(layers, [Setting(fraction=0.5)] * 3, partition, seed)
    marks = [layer.weight.weight_quantizer.membership for layer in layers]
    frozen = [{tuple(place) for place in mark.nonzero().tolist()} for mark in marks]
    assert frozen == [drawn((seed + index) % 2**63, 18) for index in range(3)]
    for one, other in itertools.combinations(frozen, 2):
        assert one != other


def noise_in(model):
    names = ("forward_std", "backward_std", "forward_mean", "backward_mean")
    return [
        [[float(getattr(quantizer, name)) for name in names] for quantizer in layer.quantizers]
        for layer in quantized_layers(model)
    ]


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_schedulers_state_alone_brings_the_noise_of_its_epoch(epochs):
    def made():
        model = network()
        policy = policies.AdditiveNoiseAnnealing(
            std=0.5, mean=-0.25, end=1.0, progressive=True, backward_std=0.75
        )
        return model, ls.QuantizationScheduler(model, policy, 5, steps_per_epoch=2)

    (first, scheduler), (second, resumed) = made(), made()
    for _ in range(epochs):
        scheduler.step()
    assert noise_in(second) != noise_in(first)
    resumed.load_state_dict(scheduler.state_dict())
    expected = []
    for setting, layer in zip(scheduler.get_last_setting(), quantized_layers(second), strict=True):
        s = setting
        weight = [s.weight_forward_std, s.weight_backward_std, *[s.weight_forward_mean] * 2]
        after = [
            s.activation_forward_std, s.activation_backward_std, *[s.activation_forward_mean] * 2
        ]  # fmt: skip
        expected.append([weight, *[after] * len(layer.activations)])
    assert len({str(rows[0]) for rows in expected}) == 3  # each layer has a setting of its own
    for found, truth in zip(noise_in(second), expected, strict=True):
        assert found == [pytest.approx(row, abs=1e-7) for row in truth]
    assert noise_in(second) == noise_in(first)
