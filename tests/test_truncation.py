"""Truncated unrolls against one graph that is cut by hand."""

import dataclasses

import pytest
import torch
from small_task import SMALL

from learnsched.data import load
from learnsched.meta.rollout import table_rollout, terminal_settings
from learnsched.meta.unrolled import Unrolled
from learnsched.schedule import FIELDS

TASK = dataclasses.replace(SMALL, horizon=5, steps=2)


def setup():
    inner = TASK.build(load("digits"))
    generator = torch.Generator().manual_seed(0)
    table = 0.4 + 0.4 * torch.rand(5, 2, 3, len(FIELDS), generator=generator)
    table[..., FIELDS.index("fraction")] = torch.linspace(0, 1, 5).view(-1, 1, 1)
    table[..., -2:] = 0
    return inner, table


def cut(state):
    leaves = tuple(t.detach().requires_grad_() for t in state.tensors)
    return dataclasses.replace(state, tensors=leaves)


def cut_graph(inner, table, ends):
    """The sum of hardened losses after the epochs ``ends``, in one graph with the state detached."""
    last = inner.run.horizon - 1
    rows = [terminal_settings(row, inner.run, e) for e, row in enumerate(table)]
    leaf = torch.stack(rows).requires_grad_()
    state, total = cut(inner.initial()), 0.0
    for epoch, settings in enumerate(leaf):
        state, _ = inner.epoch(state, settings, epoch, track=True)
        if epoch in ends:
            hard = terminal_settings(settings.detach(), inner.run, last)
            total = total + inner.outer_loss(state, settings if epoch == last else hard).sum()
            state = cut(state)
    (gradient,) = torch.autograd.grad(total, leaf)
    return gradient


@pytest.mark.parametrize(("window", "ends"), [(1, (0, 1, 2, 3, 4)), (2, (0, 2, 4)), (3, (1, 4))])
def test_windows_give_the_gradient_of_a_graph_cut_at_their_ends(window, ends):
    inner, table = setup()
    estimate = Unrolled(truncation=window)(inner, table_rollout(table))
    reference = cut_graph(inner, table, ends)
    torch.testing.assert_close(estimate.gradient, reference, rtol=1e-3, atol=1e-6)
    assert bool((estimate.gradient[: ends[0] + 1] != 0).any())


def test_a_window_as_long_as_the_run_changes_nothing():
    inner, table = setup()
    whole = Unrolled()(inner, table_rollout(table))
    for window in (5, 9):
        cut = Unrolled(truncation=window)(inner, table_rollout(table))
        assert torch.equal(cut.gradient, whole.gradient)
        assert torch.equal(cut.loss, whole.loss)
    shorter = Unrolled(truncation=2)(inner, table_rollout(table))
    assert not torch.allclose(shorter.gradient, whole.gradient)
    assert torch.equal(shorter.loss, whole.loss)


def test_a_window_of_no_epochs_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Unrolled(truncation=0)
