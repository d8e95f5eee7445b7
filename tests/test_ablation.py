"""Each variant of the ablation lacks what its name says, and nothing else."""

import pytest
import torch
from small_task import SMALL

from learnsched.benchmarks.ablation import variants
from learnsched.data import load
from learnsched.pretrained import load_pretrained
from learnsched.schedule import FIELDS, FRACTION, Telemetry

INNER = SMALL.build(load("digits"))
MEMBERS, LAYERS = len(SMALL.learning_rates), SMALL.depth
METHODS = {method.name: method for method in variants(load_pretrained("default"))}


def told(loss=1.0, apart=0.0):
    """Telemetry of all members; the error of layers is the farther apart the deeper they are."""
    layers = (0.1 + apart * torch.arange(LAYERS)).expand(MEMBERS, LAYERS)
    return Telemetry(torch.full((MEMBERS,), loss), torch.full((MEMBERS,), loss - 1), layers)


def settings(name, **telemetry):
    """The settings of the epoch in the middle, shape (members, layers, fields)."""
    rollout = METHODS[name].rollout(INNER, [])
    rollout(0, told())
    return rollout(1, told(**telemetry)).detach()


def differing(first, second):
    return {FIELDS[column] for column in (first != second).any(0).any(0).nonzero().flatten()}


def test_what_is_taken_out_is_all_that_differs():
    whole = settings("learned", loss=0.6)
    assert not settings("without early freezing", loss=0.6)[..., FRACTION].any()
    forward = {"weight_forward_std", "activation_forward_std"}
    assert differing(whole, settings("without forward noise", loss=0.6)) == forward
    backward = {"weight_backward_std", "activation_backward_std"}
    assert differing(whole, settings("with constant backward noise", loss=0.6)) == backward


def test_backward_noise_stays_where_its_geometric_mean_was():
    rollout, whole = (
        METHODS[name].rollout(INNER, []) for name in ("with constant backward noise", "learned")
    )
    rest = told()
    column = FIELDS.index("weight_backward_std")
    constant = [rollout(epoch, rest)[..., column].detach() for epoch in range(SMALL.horizon)]
    assert all(torch.equal(epoch, constant[0]) for epoch in constant)
    moving = torch.stack(
        [whole(epoch, rest)[..., column].detach() for epoch in range(SMALL.horizon)]
    )
    assert moving.min() < constant[0].min() and constant[0].max() < moving.max()


def test_without_telemetry_nothing_that_happens_matters():
    blind = [settings("without telemetry", loss=loss, apart=loss) for loss in (0.2, 0.9)]
    assert torch.equal(*blind)
    assert not torch.equal(*(settings("learned", loss=loss) for loss in (0.2, 0.9)))


@pytest.mark.parametrize("name", ["learned", "without inputs of the layers"])
def test_only_a_network_that_sees_its_layers_tells_them_apart(name):
    network = METHODS[name].learned.network
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4, network.embed.in_features, generator=generator)
    out, state = network(features, torch.zeros(4, network.hidden))
    alike = torch.equal(out, out[:1].expand_as(out)) and torch.equal(
        state, state[:1].expand_as(state)
    )
    assert alike == (name != "learned")
