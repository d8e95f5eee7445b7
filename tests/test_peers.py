"""Peers train the same networks to weights on their level sets; skipped where they are missing."""

from dataclasses import replace

import pytest
import torch

from learnsched.benchmarks import plain
from learnsched.benchmarks.cells import GRIDS

CELL = GRIDS["quick"].cells[0]


def distinct(weight):
    """The most values that a channel of a weight has."""
    return max(len(row.unique()) for row in weight.detach().flatten(1))


def trained(prepare, policy, **changes):
    """The network of the quick cell, its task changed, after training."""
    kept = []

    def keeping(model, policy, task):
        made = prepare(model, policy, task)
        kept.append(made[0])
        return made

    data, task = CELL.data(), replace(CELL.task, **changes)
    accuracy = plain.train(keeping, task, data, [0.01], [policy], 1, data.validation)
    assert accuracy.shape == (1, 1)
    return kept[0], float(accuracy)


@pytest.mark.parametrize(
    ("bits", "most"), [("ternary/2-bit", 3), ("binary/binary", 2), ("ternary/real", 3)]
)
def test_parq_ends_on_its_levels(bits, most):
    pytest.importorskip("torchao")
    peers = pytest.importorskip("learnsched.benchmarks.peers")
    model, accuracy = trained(peers.prepare_parq, peers.Parq(0.0, 0.7, 10.0, 0.7), bits=bits)
    weights = [p for p in model.parameters() if p.dim() > 1]
    assert [distinct(w) <= most for w in weights] == [True] * 3
    assert accuracy > 0.2


class Lowest:
    """A trial that suggests the lowest value of every range."""

    def suggest_float(self, name, low, high, *, log=False):
        return low


@pytest.mark.parametrize(("bits", "lowest"), [("ternary/2-bit", 0.2), ("ternary/ternary", 0.04)])
def test_parq_may_narrow_the_gradient_of_activations_as_every_method(bits, lowest):
    pytest.importorskip("torchao")
    pytest.importorskip("brevitas")
    peers = pytest.importorskip("learnsched.benchmarks.peers")
    [parq] = [entry for entry in peers.entries(bits) if entry.name == "PARQ (torchao)"]
    assert parq.suggest(Lowest()).activation_backward_std == pytest.approx(lowest)


@pytest.mark.parametrize("scaling", ["constant", "largest"])
@pytest.mark.parametrize(
    ("bits", "most"),
    [("ternary/2-bit", 3), ("ternary/ternary", 3), ("binary/binary", 2), ("ternary/real", 3)],
)
def test_brevitas_layers_are_on_their_levels(bits, most, scaling):
    qnn = pytest.importorskip("brevitas.nn")
    peers = pytest.importorskip("learnsched.benchmarks.peers")
    model, accuracy = trained(peers.prepare_brevitas, peers.Brevitas(scaling, 1.0), bits=bits)
    layers = [m for m in model.modules() if isinstance(m, qnn.QuantLinear)]
    assert len(layers) == 3
    assert all(distinct(layer.quant_weight().value) <= most for layer in layers)
    levels = {"2-bit": 4, "ternary": 3, "binary": 2, "real": 0}[bits.split("/")[1]]
    activations = [m for m in model.modules() if isinstance(m, qnn.QuantReLU | qnn.QuantIdentity)]
    assert len(activations) == (2 if levels else 0)
    for activation in activations:
        out = activation(torch.randn(1000))
        assert len(getattr(out, "value", out).unique()) <= levels
    assert accuracy > 0.12


def test_float_ends_stay_real_in_peers():
    pytest.importorskip("torchao")
    qnn = pytest.importorskip("brevitas.nn")
    peers = pytest.importorskip("learnsched.benchmarks.peers")
    model, _ = trained(peers.prepare_parq, peers.Parq(0.0, 0.7, 10.0, 0.7), float_ends=True)
    weights = [p for p in model.parameters() if p.dim() > 1]
    assert [distinct(w) <= 3 for w in weights] == [False, True, False]
    model, _ = trained(peers.prepare_brevitas, peers.Brevitas("constant", 1.0), float_ends=True)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert [isinstance(layer, qnn.QuantLinear) for layer in layers] == [False, True, False]


def test_members_of_plain_training_do_not_depend_on_each_other():
    data = CELL.data()
    both = plain.train(plain.adam, CELL.task, data, [0.01, 0.02], [None] * 2, 2, data.validation)
    alone = plain.train(plain.adam, CELL.task, data, [0.02], [None], 2, data.validation)
    assert both.shape == (2, 2)
    assert torch.equal(both[1:], alone)
    assert float(both.mean()) > 0.5
