"""Problems that meta-training never saw: their data, and that networks fit them."""

from __future__ import annotations

import itertools

import pytest
import torch

from learnsched.benchmarks.problems import PROBLEMS, intersection_over_union

OFFLINE = [name for name in PROBLEMS if not name.startswith("denoising")]


@pytest.mark.parametrize("name", OFFLINE)
def test_a_network_takes_the_data_and_its_output_fits_loss_and_score(name):
    problem = PROBLEMS[name]
    for split in problem.data():
        x, y = split.x[:8], split.y[:8]
        output = problem.network()(x)
        loss = problem.loss(output, y)
        loss.backward()
        assert torch.isfinite(loss)
        assert problem.score(output.detach(), y) <= 1


@pytest.mark.parametrize("name", OFFLINE)
def test_data_are_the_same_at_each_call_and_no_sample_is_in_two_splits(name):
    first, again = PROBLEMS[name].data(), PROBLEMS[name].data()
    assert all(
        torch.equal(a.x, b.x) and torch.equal(a.y, b.y) for a, b in zip(first, again, strict=True)
    )
    seen = [{tuple(row) for row in split.x.flatten(1).tolist()} for split in first]
    # The manual of another Python may say the same sentence twice.
    limit = 5 if name.startswith("text") else 0
    assert all(len(a & b) <= limit for a, b in itertools.combinations(seen, 2))


def test_causal_convolutions_do_not_see_what_comes_after():
    problem = PROBLEMS["text, causal convolutions"]
    net = problem.network().eval()
    x = problem.data()[1].x[:2]
    changed = x.clone()
    changed[:, 20:] = 0
    assert torch.equal(net(x)[..., :20], net(changed)[..., :20])


def test_the_intersection_over_union_counts_every_class_that_is_there_or_chosen():
    target = torch.tensor([[0, 0], [1, 1]])
    chosen = torch.tensor([[0, 1], [1, 2]])
    scores = torch.nn.functional.one_hot(chosen, 3).movedim(-1, 0)[None].float()
    # Class 0: 1 of 2; class 1: 1 of 3; class 2: 0 of 1.
    assert intersection_over_union(scores, target[None]) == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)
