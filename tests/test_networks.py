"""The families of networks: their depth is that of their name, and a population of them trains."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from learnsched.data import load, reduced
from learnsched.meta.networks import FAMILIES, residual, transformer, vgg
from learnsched.meta.rollout import run_forward, table_rollout
from learnsched.meta.tasks import Task
from learnsched.meta.transformer import HEADS, TransformerBlock
from learnsched.policies import StraightThrough
from learnsched.schedule import plan

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d)


def depth(model):
    return sum(isinstance(module, WEIGHTED) for module in model.modules())


@pytest.mark.parametrize(("maker", "depths"), [(residual, (5, 7, 9)), (vgg, (6, 8))])
@pytest.mark.parametrize("side", [8, 28])
def test_depth_and_shape(maker, depths, side):
    for count in depths:
        model = maker(side, 4, count, 10)
        assert depth(model) == count
        assert model(torch.randn(2, 1, side, side)).shape == (2, 10)


@pytest.mark.parametrize(("maker", "depths"), [(residual, (3, 4, 6)), (vgg, (4, 7))])
def test_other_depths_are_refused(maker, depths):
    for count in depths:
        with pytest.raises(ValueError, match=f"weight layers, got depth {count}"):
            maker(28, 4, count, 10)


def test_a_block_adds_its_input():
    block = residual(8, 3, 5, 10)[6]
    for parameter in block.branch[-1].parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(2, 3, 2, 2)
    assert torch.equal(block(x), x.relu())


@pytest.mark.parametrize(("family", "counts"), [("separable", (4, 8)), ("transformer", (6, 10))])
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (40,)])
def test_depth_and_shape_of_families(family, counts, shape):
    if not FAMILIES[family].takes(shape):
        assert (family, len(shape)) == ("separable", 1)
        return
    for count in counts:
        model = FAMILIES[family].make(shape, 8, count, 10)
        assert depth(model) == count
        assert model(torch.randn(2, *shape)).shape == (2, 10)
    with pytest.raises(ValueError, match="weight layers, got depth 7"):
        FAMILIES[family].make(shape, 8, 7, 10)


def test_a_transformer_of_odd_parts_is_refused():
    with pytest.raises(ValueError, match=r"42 is no multiple of 4.* input in tokens"):
        transformer((42,), 8, 6, 10)
    with pytest.raises(ValueError, match=r"6 is no multiple of 4.* width in heads"):
        transformer((40,), 6, 6, 10)


def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    block, x = TransformerBlock(8), torch.randn(3, 5, 8)
    attention = nn.MultiheadAttention(8, HEADS, batch_first=True)
    attention.load_state_dict(
        {
            "in_proj_weight": block.mix.weight,
            "in_proj_bias": block.mix.bias,
            "out_proj.weight": block.out.weight,
            "out_proj.bias": block.out.bias,
        }
    )
    normed = block.norm(x)
    mixed = x + attention(normed, normed, normed)[0]
    torch.testing.assert_close(block(x), mixed + block.feed(mixed))


@pytest.mark.parametrize(
    ("family", "count", "horizon"),
    [
        ("residual", 5, 4),
        ("vgg", 6, 4),
        ("cnn2d_group", 4, 4),
        ("separable", 4, 16),
        ("transformer", 6, 16),
    ],
)
def test_a_quantized_population_learns(family, count, horizon):
    data = reduced(load("digits"), 600, 100, 200)
    task = Task(
        family=family,
        data="digits",
        width=8,
        depth=count,
        horizon=horizon,
        steps=15,
        batch=32,
        bits="ternary/2-bit",
        learning_rates=(0.01, 0.02),
        fine_tuning=False,
        seed=1,
    )
    inner = task.build(data, membership_width=0.0)
    table = plan(StraightThrough(), inner.run).table.float()
    with torch.no_grad():
        state, settings, _ = run_forward(inner, table_rollout(torch.stack([table] * 2, dim=1)))
        accuracy = inner.accuracy(state, settings[-1], data.test.x, data.test.y)
    assert float(accuracy.min()) > 0.5


def test_reduced_data_are_stratified_parts_of_the_whole():
    whole = load("digits")
    small = reduced(whole, 200, 100, 10_000)
    assert small.train.y.bincount().min() >= 18
    assert torch.equal(small.test.x, whole.test.x)
    rows = {tuple(x.flatten().tolist()) for x in whole.train.x}
    assert all(tuple(x.flatten().tolist()) in rows for x in small.train.x)
    assert reduced(whole, 200, 100, 500).sha256 == reduced(whole, 200, 100, 500).sha256
    with pytest.raises(ValueError, match="at least 1, got 0, 1 and 1"):
        reduced(whole, 0, 1, 1)


def test_float_ends_keep_the_first_and_the_last_weights_real():
    task = Task(
        family="cnn1d",
        data="mnist1d",
        width=4,
        depth=4,
        horizon=2,
        steps=2,
        batch=8,
        bits="ternary/2-bit",
        learning_rates=(0.01,),
        fine_tuning=False,
        seed=0,
    )
    ends = replace(task, float_ends=True)
    layers = ends.build(load("mnist1d")).run.layers
    assert [layer.weight_levels for layer in layers] == [0, 3, 3]
    assert [layer.activation_levels for layer in layers] == [4, 4, 4]
    assert ends.name == task.name.replace("2-bit", "2-bit, float ends")
