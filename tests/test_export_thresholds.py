"""Each cause of a disagreement on its own: the fold of batch norm, ties, rounding, order of sums."""

import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from export_networks import (
    assert_same,
    assert_same_everywhere,
    random_network,
    reference_codes,
)
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import nn

import learnsched as ls
from learnsched.export import ExportError, QuantizedInput, align_
from learnsched.export import graph as g
from learnsched.export.check import pytorch_codes
from learnsched.export.reference import integers
from learnsched.export.thresholds import affine, fit_line, search
from learnsched.export.trace import trace

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("qonnx")

# The search.


@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**31),
)  # fmt: skip
def test_search_equals_exhaustive_search(channels, rows, steps, seed):
    rng = np.random.default_rng(seed)
    low = rng.integers(-30, 5, channels)
    high = low + rng.integers(0, 40, channels)
    edges = np.sort(rng.integers(-40, 50, (channels, rows, steps)), axis=2)

    def code(n):
        return (n[..., None] >= edges[:, :, None, :]).sum(3)

    found = search(code, low, high, rows, steps)
    for c in range(channels):
        numbers = np.arange(low[c], high[c] + 1)
        for r in range(rows):
            codes = (numbers[:, None] >= edges[c, r]).sum(1)
            for k in range(steps):
                reached = numbers[codes >= k + 1]
                assert found[c, r, k] == (reached[0] if len(reached) else high[c] + 1)


def node(thresholds, low, high, sign=1):
    thresholds = np.array(thresholds)[None, None]
    return g.Threshold(
        name="t", inputs=("x",), shape=(1,), sign=np.array([sign]), thresholds=thresholds,
        low=np.array([low]), high=np.array([high]), row_low=0, slopes=None,
        levels=g.IntegerLevels(tuple(range(thresholds.shape[2] + 1)), 1.0, "unsigned"),
    )  # fmt: skip


@given(
    st.floats(0.01, 40), st.floats(-60, 60), st.integers(1, 7), st.sampled_from([-1, 1]),
)  # fmt: skip
def test_the_line_decides_as_the_thresholds_that_a_line_made(d, c, steps, sign):
    edges = np.ceil(c + d * np.arange(steps)).astype(int)
    low, high = -50, 50
    edges = np.clip(edges, low, high + 1)
    found = affine(node(edges, low, high, sign))
    assume(d > 0.2 or found is not None)  # a hundred thresholds in one gap leave no room
    assert found is not None
    factors, offset = found
    signed = np.arange(low, high + 1)
    total = (signed * sign).astype(np.float32) * factors[0] + offset
    codes = np.clip(np.rint(total), 0, steps)
    assert np.array_equal(codes, (signed[:, None] >= edges).sum(1))
    # No sum of integers lies near a half, so that the rule for halves does not matter.
    inside = np.clip(total, -1, steps + 1)
    assert (np.abs(inside - np.clip(np.floor(inside) + 0.5, 0.5, steps - 0.5)) > 1e-5).all()


def test_the_line_lies_in_the_middle_of_its_room():
    d, c = fit_line(np.array([[1, 4, 7]]), np.array([-20]), np.array([20]))
    np.testing.assert_allclose([d[0], c[0]], [3, 0.5], atol=1e-6)


def test_no_line_fits_a_bent_activation():
    assert affine(node([0, 1, 40], -50, 50)) is None


def test_constant_channels():
    for edges, code in (([-5, -5, 6], 2), ([6, 6, 6], 0), ([-5, -5, -5], 3)):
        factors, offset = affine(node(edges, -5, 5))
        assert np.rint(np.arange(-5, 6) * factors[0] + offset).tolist() == [code] * 11


# The fold: every integer that an accumulator can take, against PyTorch's modules themselves.


def decided(net, x):
    """Codes by the thresholds and by PyTorch for every integer, of the first threshold node."""
    graph = trace(net, x)
    thresholds = next(n for n in graph if isinstance(n, g.Threshold))
    product = graph[thresholds.inputs[0]]
    numbers = np.arange(product.low.min(), product.high.max() + 1)
    signed = numbers[:, None] * thresholds.sign
    mine = (signed[..., None] >= thresholds.thresholds[:, 0]).sum(2)
    linear, norm, act = net[1], net[2], net[3]
    scale = (
        ls.integer_weights(net)["1"].scale.double().flatten().numpy() * net[0].scale.double().item()
    )
    real = numbers[:, None] * scale
    if linear.bias is not None:
        real = real + linear.bias.detach().double().numpy()
    with torch.no_grad():
        z = norm(torch.from_numpy(real.astype(np.float32)))
        theirs = act.levels.codes(act.ahead(z) / act.scale).numpy()
    reachable = (numbers[:, None] >= product.low) & (numbers[:, None] <= product.high)
    return mine, theirs, reachable, thresholds


def one_layer(inputs=6, outputs=8, activation=None, bias=False, act=None, eps=1e-5, scale=0.25):
    net = nn.Sequential(
        QuantizedInput(scale, ls.unsigned(2)),
        nn.Linear(inputs, outputs, bias=bias), nn.BatchNorm1d(outputs, eps=eps), act or nn.ReLU(),
        nn.Linear(outputs, 3),
    )  # fmt: skip
    ls.quantize_(net, ls.ternary(), activation or ls.unsigned(2))
    return ls.finalize_(net).eval()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [ls.unsigned(2), ls.ternary(), ls.binary(), ls.unsigned(4)])
def test_fold_of_batch_norm_for_every_integer(activation, bias):
    torch.manual_seed(0)
    net = one_layer(40, 64, activation, bias)
    with torch.no_grad():
        for p in (net[2].weight, net[2].bias, net[2].running_mean):
            p.normal_()
        net[2].running_var.uniform_(0.1, 4)
        net[2].weight[:4] = 0
    mine, theirs, reachable, thresholds = decided(net, torch.rand(2, 40))
    assert (mine == theirs)[reachable].all()
    assert (thresholds.sign[net[2].weight.detach().numpy() < 0] == -1).all()
    assert set(thresholds.sign) == {-1, 1}


@pytest.mark.parametrize(
    "act", [nn.LeakyReLU(0.3), nn.PReLU(), nn.ELU(), nn.CELU(), nn.SELU(), nn.Softplus()]
)
def test_fold_of_activations_for_every_integer(act):
    torch.manual_seed(1)
    net = one_layer(40, 64, ls.signed(3), act=act)
    with torch.no_grad():
        net[2].weight.normal_()
        net[2].bias.normal_()
    mine, theirs, reachable, _ = decided(net, torch.rand(2, 40))
    assert (mine == theirs)[reachable].all()


# Ties: sums that land on thresholds exactly, where float32 rounds nothing.


def exact_layer(factor):
    """Accumulators 0 to 12 become quarters of themselves, the thresholds 0.5, 1.5 and 2.5."""
    net = one_layer(4, 2, eps=0.0)
    with torch.no_grad():
        net[1].weight_quantizer.held.fill_(1)
        net[1].weight_quantizer.held_scale.fill_(1)
        net[1].weight.fill_(1)
        net[2].weight.fill_(factor)
        net[2].bias.fill_(3.0 if factor < 0 else 0.0)
        net[3].scale.fill_(1)
    grid = torch.cartesian_prod(*[torch.arange(4.0)] * 4) * 0.25
    return net, grid


@pytest.mark.parametrize("factor", [1.0, -1.0])
def test_ties_take_the_upper_level(factor, tmp_path):
    net, x = exact_layer(factor)
    graph = trace(net, x)
    thresholds = next(n for n in graph if isinstance(n, g.Threshold))
    accumulator = np.arange(13)
    real = factor * accumulator / 4 + (3 if factor < 0 else 0)
    # By hand: x >= t takes the upper level, so that 0.5 is 1, 1.5 is 2 and 2.5 is 3. Rounding to even
    # would make 0.5 a 0 and 2.5 a 2; folding the sign after the ceiling would miss by one.
    by_hand = (real[:, None] >= np.array([0.5, 1.5, 2.5])).sum(1)
    signed = accumulator * thresholds.sign[0]
    assert np.array_equal((signed[:, None] >= thresholds.thresholds[0, 0]).sum(1), by_hand)
    assert by_hand[2] == (1 if factor > 0 else 3) and by_hand[10] == (3 if factor > 0 else 1)
    found = assert_same_everywhere(net, x, tmp_path)
    assert set(found["1"].flatten()) == set(range(13))
    assert np.array_equal(found["3"], by_hand[found["1"]])


def test_ties_of_the_input_take_the_upper_level(tmp_path):
    torch.manual_seed(2)
    net = nn.Sequential(QuantizedInput(0.25), nn.Linear(8, 4))
    net = ls.finalize_(ls.quantize_(net, ls.ternary())).eval()
    half = np.float32(0.5)
    below, above = np.nextafter(half, np.float32(0)), np.nextafter(half, np.float32(1))
    steps = np.array([half, -half, below, above, -below, -above, 1.5, 2.5], np.float32)
    many = np.arange(-130, 130, 0.5, dtype=np.float32).reshape(-1, 8)
    x = torch.from_numpy(np.concatenate([steps[None], many]) * np.float32(0.25))
    found = assert_same_everywhere(net, x, tmp_path)
    assert found["0"][0].tolist() == [1, 0, 0, 1, 0, -1, 2, 3]
    assert np.array_equal(found["0"][1:], np.clip(np.floor(many + 0.5), -127, 127))


def test_binary_activations_of_zero_are_one(tmp_path):
    net, x = exact_layer(1.0)
    twin = one_layer(4, 2, ls.binary(), eps=0.0)
    with torch.no_grad():
        for parameter, value in zip(twin[1].parameters(), net[1].parameters(), strict=True):
            parameter.copy_(value)
        twin[1].weight_quantizer.load_state_dict(net[1].weight_quantizer.state_dict())
        twin[2].bias.fill_(-1.0)
    found = assert_same_everywhere(twin, x, tmp_path)
    assert np.array_equal(found["3"], np.where(found["1"] >= 4, 1, -1))


def test_residual_sums_on_thresholds(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.codes = QuantizedInput(0.5, ls.unsigned(2))
            self.linear = nn.Linear(4, 4, bias=False)
            self.norm = nn.BatchNorm1d(4, eps=0.0)
            self.act = nn.ReLU()
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            x = self.codes(x)
            return self.head(self.act(self.norm(self.linear(x)) + x))

    net = Net()
    ls.finalize_(ls.quantize_(net, ls.ternary(), ls.unsigned(2))).eval()
    with torch.no_grad():
        quantizer = net.linear.weight_quantizer
        quantizer.held.copy_(torch.tensor([[1, 0, -1, 0]] * 4))
        quantizer.held_scale.fill_(0.5)
        quantizer.held.mul_(0.5)
        net.linear.weight.copy_(quantizer.held)
        net.norm.weight.copy_(torch.tensor([1.0, -1.0, 2.0, 0.0]))
        net.act.scale.fill_(0.5)
    x = torch.cartesian_prod(*[torch.arange(4.0)] * 4) * 0.5
    found = assert_same_everywhere(net, x, tmp_path)
    a, b = found["linear"], found["codes"]
    real = a * 0.25 * np.array([1.0, -1.0, 2.0, 0.0]) + b * 0.5
    on = np.isin(real / 0.5, [0.5, 1.5, 2.5])
    assert on.sum() > 100
    assert np.array_equal(found["act"], np.clip(np.floor(real / 0.5 + 0.5), 0, 3))


# Rounding: where float32 decides otherwise than algebra, the export follows PyTorch.


def exactly(value):
    return Fraction(value.item() if isinstance(value, torch.Tensor) else value)


def test_thresholds_follow_the_rounding_of_float32(tmp_path):
    torch.manual_seed(3)
    net = one_layer(40, 2048)
    norm, act = net[2], net[3]
    scale = ls.integer_weights(net)["1"].scale.flatten()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.running_mean.normal_()
        # The integer 5 lands on the threshold 0.5 as nearly as float32 can say.
        z = 5 * scale.double() * net[0].scale.double()
        shift = 0.5 * act.scale - (norm(z.float()[None])[0] - norm.bias)
        norm.bias.copy_(shift)
    mine, theirs, reachable, thresholds = decided(net, torch.rand(2, 40))
    assert (mine == theirs)[reachable].all()
    differs = 0
    for c in range(2048):
        # Algebra in fractions, but for a root taken in float64, far finer than what is compared.
        root = (exactly(norm.running_var[c]) + exactly(norm.eps)) ** Fraction(1, 2)
        factor = exactly(norm.weight[c]) / Fraction(root)
        real = exactly(scale[c]) * exactly(net[0].scale) * 5
        y = (real - exactly(norm.running_mean[c])) * factor + exactly(norm.bias[c])
        algebra = y >= exactly(act.scale) / 2
        differs += algebra != (thresholds.thresholds[c, 0, 0] <= 5)
    # If this were 0, the test would say nothing: thresholds from algebra would pass it too.
    assert differs > 50
    # The runtimes decide as PyTorch, not as algebra, on inputs whose sums are 5 in many channels.
    x = torch.randint(0, 4, (400, 40), generator=torch.Generator().manual_seed(3)) * 0.25
    assert (integers(trace(net, x), x.numpy())["1"] == 5).sum() > 10_000
    align_(net, x[:2])
    assert np.array_equal(trace(net, x)["3"].thresholds, thresholds.thresholds)
    assert_same_everywhere(net, x, tmp_path)


# Order of summation: what PyTorch itself does not decide the same way twice.


def near_ties(seed=4, inputs=512, outputs=64):
    """A network whose sums land on thresholds up to the rounding of a long float32 sum."""
    torch.manual_seed(seed)
    net = one_layer(inputs, outputs, scale=0.31)
    x = torch.rand(400, inputs)
    graph = trace(net, x[:2])
    sums = integers(graph, x.numpy())["1"]
    scale = ls.integer_weights(net)["1"].scale.double().flatten() * net[0].scale.double()
    common = torch.from_numpy(
        np.array([np.bincount(s - s.min()).argmax() + s.min() for s in sums.T])
    )
    with torch.no_grad():
        net[2].bias.copy_(0.5 * net[3].scale - net[2]((common * scale).float()[None])[0])
    return net, x


def test_sums_that_round_onto_thresholds_are_refused_and_aligned(tmp_path):
    net, x = near_ties()
    before, expected = reference_codes(net, x)
    found = integers(before, x.numpy())
    wrong = (found["3"] != expected["3"]).sum()
    assert wrong > 10  # PyTorch's own codes, decided by the order of its sums
    with pytest.raises(ExportError, match=r"3: \d+ of 25600 codes .*align_"):
        ls.export_ternary(net, x, tmp_path / "net")
    assert not (tmp_path / "net").exists()
    align_(net, x[:2])
    after = trace(net, x[:2])
    assert np.array_equal(after["3"].thresholds, before["3"].thresholds)
    assert_same_everywhere(net, x, tmp_path)
    for batch in (1, 7, 400):
        parts = [pytorch_codes(net, after, part)["3"] for part in x[:56].split(batch)]
        assert np.array_equal(np.concatenate(parts), found["3"][:56])


@pytest.mark.parametrize("family", ["mlp", "cnn1d", "cnn2d", "residual"])
def test_alignment_changes_no_decision(family):
    net, x = random_network(family, seed=20)
    before = trace(net, x[:2])
    codes = integers(before, x.numpy())
    align_(net, x[:2])
    after = trace(net, x[:2])
    for name in (n.name for n in before if isinstance(n, g.Threshold)):
        assert np.array_equal(before[name].thresholds, after[name].thresholds)
    again = integers(after, x.numpy())
    assert all(np.array_equal(codes[name], again[name]) for name in codes)
    graph, expected = reference_codes(net, x)
    found = integers(graph, x.numpy())
    assert_same(graph, expected, {**found, graph.output.inputs[0]: found["output"]})


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
@example(560)  # a channel whose greatest sum stays just below its threshold
def test_aligned_thresholds_keep_away_from_every_sum(seed):
    """In PyTorch's own numbers, no integer comes nearer to a threshold than float32 can tell."""
    torch.manual_seed(seed % 1000)
    net = one_layer(30, 16)
    with torch.no_grad():
        net[2].weight.normal_()
        net[2].bias.normal_()
    align_(net, torch.rand(2, 30))
    norm, act = net[2], net[3]
    scale = ls.integer_weights(net)["1"].scale.double().flatten() * net[0].scale.double()
    product = trace(net, torch.rand(2, 30))["1"]
    low, high = product.low.min(), product.high.max()
    numbers = torch.arange(low, high + 1).double()[:, None]
    reachable = (numbers >= torch.from_numpy(product.low)) & (
        numbers <= torch.from_numpy(product.high)
    )
    factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    z = (numbers * scale - norm.running_mean.double()) * factor + norm.bias.double()
    z = z / act.scale.double()
    distance = (z[..., None] - torch.tensor([0.5, 1.5, 2.5])).abs().amin(2)
    distance = distance.masked_fill(~reachable, torch.inf).amin(0)
    step = (scale * factor).abs() / act.scale.double()
    assert bool((distance >= 0.01 * step)[step > 1e-3].all())


def test_channels_that_float32_cannot_align_are_left_with_a_warning():
    """255 thresholds among thousands of sums: no offset keeps all of them apart."""
    net, x = random_network("cnn2d", 3, ls.signed(8), ls.unsigned(8), samples=24)
    before, bias = trace(net, x[:2]), net[1][1].bias.clone()
    with pytest.warns(UserWarning, match=r"1\.2: in \d of 8 channels the thresholds are closer"):
        align_(net, x[:2])
    after = trace(net, x[:2])
    for name in ("1.2", "1.6"):
        assert np.array_equal(before[name].thresholds, after[name].thresholds)
    assert (net[1][1].bias != bias).any() and (net[1][1].bias == bias).any()


def test_alignment_puts_the_model_back_when_it_is_interrupted(monkeypatch):
    def interrupt(model, example_input):
        assert any(not torch.equal(state[k], v) for k, v in model.state_dict().items())
        raise KeyboardInterrupt

    net, x = random_network("mlp", seed=21)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    monkeypatch.setattr("learnsched.export.align.trace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        align_(net, x[:2])
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())


# What the trace refuses to guess.


def test_sums_beyond_float32_are_refused():
    net = nn.Sequential(QuantizedInput(0.01, ls.signed(8)), nn.Linear(70_000, 2))
    ls.quantize_(net, ls.signed(8), weight_scale=ls.Maximum())
    ls.finalize_(net)
    with pytest.raises(ExportError, match=r"1: its sums reach \d+.*2\^24"):
        trace(net, torch.zeros(1, 70_000))


def test_a_block_that_is_called_twice_is_aligned_once(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.codes, self.fc = QuantizedInput(0.02), nn.Linear(8, 8)
            self.norm, self.act, self.head = nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)

        def forward(self, x):
            x = self.codes(x)
            for _ in range(2):
                x = self.act(self.norm(self.fc(x)))
            return self.head(x)

    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    net = ls.finalize_(ls.quantize_(Twice(), ls.ternary(), ls.unsigned(2)), [x]).eval()
    graph = trace(net, x[:2])
    with warnings.catch_warnings(record=True):  # of channels that cannot be moved for both calls
        align_(net, x[:2])
    after = trace(net, x[:2])
    for name in ("act", "act#2"):
        assert np.array_equal(after[name].thresholds, graph[name].thresholds)
    assert_same_everywhere(net, x, tmp_path)
