"""The methods of the comparison: published numbers, ranges, and that each trains by the same trainer."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from learnsched import Fixed, ternary, unsigned
from learnsched.benchmarks import spaces
from learnsched.benchmarks.methods import (
    TWN_LEVELS,
    Method,
    hand_coded,
    learned,
    parametric,
    rivals,
    start_of,
    upper_bound,
)
from learnsched.benchmarks.training import train
from learnsched.choose import LayerConfig
from learnsched.data import load
from learnsched.meta.rollout import run_forward, table_rollout
from learnsched.meta.tasks import BITS, Task
from learnsched.policies import (
    AdditiveNoiseAnnealing,
    BaseCurve,
    BaseCurves,
    IncrementalQuantization,
    LearnedPolicy,
    MetaNetwork,
    Relaxed,
    StraightThrough,
    annealing_grid,
)
from learnsched.policies.annealing_grid import PUBLISHED_MEAN, PUBLISHED_STD
from learnsched.policies.incremental import IDENTITY_STD
from learnsched.scales import Maximum
from learnsched.schedule import FIELDS, LayerInfo, Policy, RunInfo, Telemetry, plan

RUN = RunInfo((LayerInfo("a", 10, 3, 4), LayerInfo("b", 10, 3, 0)), 11)
TINY = Task(
    family="cnn1d",
    data="mnist1d",
    width=4,
    depth=3,
    horizon=3,
    steps=2,
    batch=16,
    bits="ternary/2-bit",
    learning_rates=(0.01, 0.01),
    fine_tuning=False,
    seed=5,
    runs=2,
)

# The network without quantization as a point of the methods' space: under uniform noise one step wide,
# weights inside the range of their levels pass unchanged, and a level set of 0 and 1 is a ReLU that ends
# at its scale, which is far out here.
FLOAT = Method(
    "float", "uniform", "settled", lambda trial: Relaxed(IDENTITY_STD, "uniform"), hardened=False,
    levels=lambda c: LayerConfig(ternary(), unsigned(1), Maximum("tensor"), Fixed(64.0)),
)  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return load("mnist1d")


class Draw:
    """A trial that takes what it is told, or else a point inside, and refuses what is out of range."""

    def __init__(self, place=0.5, **values):
        self.place, self.values = place, values

    def suggest_float(self, name, low, high, *, log=False):
        value = self.values.get(name)
        if value is None:
            u = self.place
            value = low * (high / low) ** u if log else low + (high - low) * u
        assert low <= value <= high, f"{name}={value} is not in [{low}, {high}]"
        return value

    def suggest_categorical(self, name, choices):
        value = self.values.get(name, choices[round(self.place * (len(choices) - 1))])
        assert value in choices, f"{name}={value!r} is not one of {choices}"
        return value


def method(name, bits="ternary/2-bit"):
    [found] = [m for m in hand_coded(bits) if m.name == name]
    return found


EVERY = [(bits, m.name) for bits in BITS for m in hand_coded(bits)]


@pytest.mark.parametrize(("bits", "name"), EVERY, ids=[f"{b}-{n}" for b, n in EVERY])
def test_every_method_trains_by_the_same_trainer(bits, name, data):
    chosen = method(name, bits)
    policies = [chosen.suggest(Draw(0.3)), chosen.suggest(Draw(0.7))]
    split = replace(data.validation, x=data.validation.x[:200], y=data.validation.y[:200])
    task = replace(TINY, bits=bits)
    accuracy = train(chosen, task, data, [0.01, 0.02], policies, 2, split)
    assert accuracy.shape == (2, 2)
    assert bool(((accuracy >= 0) & (accuracy <= 1)).all())
    assert torch.equal(accuracy, train(chosen, task, data, [0.01, 0.02], policies, 2, split))


@pytest.mark.parametrize("bits", BITS)
def test_methods_of_a_cell(bits):
    methods = hand_coded(bits)
    names = [m.name for m in methods]
    assert len(set(names)) == len(names) >= 20
    assert {m.name for m in rivals()} <= set(names)
    for m in methods:
        assert bits in m.bits
        assert "arXiv:" in m.source
        for place in (0.0, 0.5, 1.0):
            policy = m.suggest(Draw(place))
            assert isinstance(policy, Policy)
            assert (policy.noise, getattr(policy, "mode", "expectation")) == (m.noise, m.mode)
            if isinstance(policy, IncrementalQuantization):
                assert policy.partition == m.partition
            hash(policy)
    assert ("TWN" in names) == ("INQ" in names) == bits.startswith("ternary")
    assert ("BinaryConnect" in names) == bits.startswith("binary")
    assert ("XNOR-Net" in names) == (bits == "binary/binary")


@pytest.mark.parametrize("bits", ["ternary/real", "binary/real"])
def test_nothing_of_activations_is_searched_where_they_are_real(bits):
    class Named(Draw):
        def suggest_float(self, name, low, high, *, log=False):
            assert not name.startswith("activation_")
            return super().suggest_float(name, low, high, log=log)

    for m in (*hand_coded(bits), parametric(bits)):
        assert m.suggest(Named(0.5)).settings(RUN, 0, None, None)[0]


def test_unknown_bits_are_refused():
    with pytest.raises(ValueError, match="unknown bits '3-bit'; choose one of ternary/2-bit"):
        hand_coded("3-bit")


CLIPPED = {"weight_backward_std": IDENTITY_STD, "activation_backward_std": IDENTITY_STD}
PUBLISHED = {
    "BinaryConnect": CLIPPED,
    "BinaryConnect, stochastic": CLIPPED,
    "BWN": CLIPPED,
    "XNOR-Net": CLIPPED,
    "TWN": CLIPPED,
    "STE, uniform": CLIPPED,
    "INQ": {"start": 0.0, "activation_backward_std": IDENTITY_STD},
    "INQ, random": {"start": 0.0},
    "RPR": {"start": 0.0, "fractions": "rpr"},
    "ANA 2019": {"std": IDENTITY_STD, "end": 1.0},
    "RQ": {"std": math.pi / (3 * math.sqrt(3)), "end": 1.0},
    "PARQ": {"start_factor": 0.0, "end": 1.0, "steepness": 10.0},
    "ANA 2022, mode": {"std_factor": 0.5, "end": 0.7, "annealed": "neither"},
    **{
        f"ANA 2022, {noise}": {"std_factor": std / spaces.ONE_STEP[noise], "end": 0.7}
        for noise, std in PUBLISHED_STD.items()
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_setting_lies_in_the_ranges(name):
    [bits] = [b for b in ("ternary/2-bit", "binary/binary", "binary/2-bit")
              if name in {m.name for m in hand_coded(b)}][:1]  # fmt: skip
    drawn = Draw(**PUBLISHED[name])
    assert isinstance(method(name, bits).suggest(drawn), Policy)


@pytest.mark.parametrize("std", [0.3, 3.0])
@pytest.mark.parametrize("bits", BITS)
def test_backward_noise_of_what_is_known_to_be_strong_lies_in_the_ranges(bits, std):
    for m in (*hand_coded(bits), parametric(bits)):
        if m.name.startswith(("ANA 2022", "RQ")):
            continue  # one noise forward and backward, as published
        policy = m.suggest(
            Draw(weight_backward_std=std, activation_backward_std=std, backward_std=std)
        )
        setting = policy.settings(RUN, 0, None, None)[0][0]
        if BITS[bits][1] is not None:
            assert setting.activation_backward_std == pytest.approx(std)
        elif not m.name.startswith(("INQ", "RPR", "ANA")):  # whose weights pass it unchanged
            assert setting.weight_backward_std == pytest.approx(std)


@pytest.mark.parametrize("bits", spaces.SIGNED_ACTIVATIONS)
def test_every_method_may_give_signed_activations_narrow_backward_noise(bits):
    for m in (*hand_coded(bits), parametric(bits)):
        if m.name.startswith(("ANA 2022", "RQ")):
            continue  # one noise forward and backward, as published
        policy = m.suggest(Draw(activation_backward_std=0.06, backward_std=0.3))
        assert policy.settings(RUN, 0, None, None)[0][0].activation_backward_std == 0.06, m.name


@pytest.mark.parametrize("end", [0.3, 1.0])
def test_the_network_may_be_hard_from_early_or_late(end):
    for m in hand_coded():
        if m.name.startswith(("ANA", "RQ", "PARQ")):
            assert m.suggest(Draw(end=end)).end == end


@pytest.mark.parametrize("noise", PUBLISHED_STD)
@pytest.mark.parametrize("mode", ["expectation", "mode", "random"])
def test_the_search_of_2022_reaches_every_member_of_the_grid(noise, mode):
    for name, policy in annealing_grid(noise).items():
        if policy.mode == mode:
            draw = Draw(std_factor=policy.std / spaces.ONE_STEP[noise], end=0.7,
                        interval=policy.interval, mean=policy.mean,
                        progressive=policy.progressive, annealed=policy.annealed)  # fmt: skip
            found = spaces.annealing_2022(noise, mode)(draw)
            assert found.std == pytest.approx(policy.std)
            assert replace(found, std=policy.std) == policy, name


def test_the_codes_of_twn_are_those_of_its_equation():
    generator = torch.Generator().manual_seed(0)
    for weight in (torch.randn(40, 30, generator=generator), torch.rand(40, 30) ** 3 - 0.2):
        config = method("TWN").config("ternary/2-bit")
        assert config.activation == BITS["ternary/2-bit"][1]
        scaled = weight / config.weight_scale(weight, config.weight)
        delta = 0.7 * weight.abs().mean()
        expected = torch.where(weight.abs() >= delta, weight.sign(), 0.0)
        assert torch.equal(config.weight.quantize(scaled).sign(), expected)


def test_the_levels_of_twn_are_the_mean_beyond_the_threshold_of_normal_weights():
    weight = torch.randn(10**6, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    size = weight.abs()
    beyond = size[size > 0.7 * size.mean()].mean()
    assert TWN_LEVELS.values[2] * size.mean() == pytest.approx(float(beyond), rel=3e-3)


def test_binary_methods_differ_in_their_scales():
    weight = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0))
    xnor = method("XNOR-Net", "binary/binary").config("binary/binary")
    scale = xnor.weight_scale(weight, xnor.weight)
    assert scale.flatten().tolist() == pytest.approx([w.abs().mean().item() for w in weight])
    connect = method("BinaryConnect", "binary/binary").config("binary/binary")
    for other in (weight, 10 * weight):
        constant = connect.weight_scale(other, connect.weight)
        assert constant.flatten().tolist() == pytest.approx([1 / math.sqrt(12)])


def test_inq_brings_its_powers_of_two():
    config = method("INQ").config("ternary/2-bit")
    weight = torch.tensor([[0.8, -0.3], [0.1, 0.2]])
    scale = config.weight_scale(weight, config.weight)
    n1 = math.floor(math.log2(4 * 0.8 / 3))
    assert (scale * config.weight.quantize(weight / scale)).unique().tolist() == [0.0, 2.0**n1]


def test_restarts_reach_the_learning_rate(data):
    task = replace(TINY, horizon=4, steps=5)
    inner = task.build(data)
    policies = [IncrementalQuantization(5), IncrementalQuantization(5, start=0.5)]
    rates = method("INQ").rates(policies, inner.run)
    assert rates.shape == (20, 2)
    cosine = [0.5 * (1 + math.cos(math.pi * k / 5)) for k in range(5)]
    assert rates[:, 0].tolist() == pytest.approx(4 * cosine)
    assert rates[10, 1] == 1
    usual = inner._rate(7, [torch.zeros(2, 1)])[0].flatten().tolist()
    assert usual == pytest.approx([0.01 * 0.5 * (1 + math.cos(math.pi * 7 / 20))] * 2)
    inner.rates = rates
    given = inner._rate(7, [torch.zeros(2, 1)])[0].flatten()
    assert torch.equal(given, 0.01 * rates[7])
    assert torch.equal(inner.repeated(2).rates, rates.repeat(1, 2))


def test_a_method_without_a_rate_of_its_own_has_the_cosine_to_the_bit(data):
    inner = replace(TINY, horizon=4, steps=5).build(data)
    usual = [inner._rate(step, [torch.zeros(2, 1)])[0] for step in range(20)]
    inner.rates = method("STE, moving").rates([StraightThrough()] * 2, inner.run)
    assert all(map(torch.equal, usual, [inner._rate(s, [torch.zeros(2, 1)])[0] for s in range(20)]))


def test_a_curve_brings_its_warm_up_whoever_trains_with_it(data):
    inner = replace(TINY, horizon=4, steps=5).build(data)
    curve = BaseCurve(warm_until=0.2)
    expected = [k / 4 for k in range(4)]
    expected += [0.5 * (1 + math.cos(math.pi * (k - 4) / 16)) for k in range(4, 20)]
    by_curve = Method("curve", "normal", "settled").rates([curve, BaseCurve()], inner.run)
    assert by_curve[:, 0].tolist() == pytest.approx(expected)
    assert by_curve[0, 1] == 1
    policy = LearnedPolicy(MetaNetwork(), curve)
    for rates in (
        learned(policy).rates([], inner.run),
        start_of(policy).rates([], inner.run),
        method("STE, moving, warm-up").rates([StraightThrough()], inner.run),
    ):
        assert rates.flatten().tolist() == pytest.approx(expected)
    inner.rates = rates
    assert torch.equal(inner.repeated(3).rates, rates)
    assert inner._rate(2, [torch.zeros(2, 1)])[0].flatten().tolist() == pytest.approx([0.005] * 2)


@pytest.mark.parametrize("wrap", [lambda curve: curve, BaseCurves.everywhere], ids=["one", "many"])
def test_a_curve_that_follows_the_loss_does_so_whoever_trains_with_it(wrap, data):
    inner = replace(TINY, horizon=4, steps=5).build(data)
    policy = wrap(BaseCurve(loss_power=1.0))
    rollout = Method("curve", "normal", "settled").rollout(inner, [policy] * 2)
    seen = Telemetry.initial(torch.rand(2, len(inner.run.layers)))
    seen = replace(seen, loss=torch.tensor([1.0, 0.25]))
    std = rollout(1, seen)[..., FIELDS.index("weight_forward_std")]
    assert bool((std[0] > 0).all())
    assert torch.allclose(std[1], std[0] / 4)


def test_the_float_network_is_the_network_without_quantization(data):
    float_task = replace(TINY, family="cnn1d", depth=4)
    chosen = FLOAT
    inner = float_task.build(data, noise=chosen.noise, config=chosen.config("binary/binary"))
    policy = chosen.suggest(Draw())
    settings = plan(policy, inner.run, hardened=False).table.float()[-1].expand(2, -1, -1)
    assert not plan(policy, inner.run, hardened=False)["fraction"].any()
    x = data.validation.x[:64]
    found = inner.logits(inner.initial(), settings, x.expand(2, *x.shape))
    for member, model in enumerate(float_task.floats(data)[0]):
        torch.testing.assert_close(found[member], model.train()(x), rtol=1e-3, atol=1e-4)


def test_the_float_network_trains_as_the_network_without_quantization(data):
    task = replace(TINY, horizon=2, steps=10, learning_rates=(0.02,), runs=1)
    chosen = FLOAT
    inner = task.build(data, noise=chosen.noise, config=chosen.config(task.bits), eps=1e-8)
    table = plan(chosen.suggest(Draw()), inner.run, hardened=False).table.float().unsqueeze(1)
    with torch.no_grad():
        _, _, losses = run_forward(inner, table_rollout(table), hardened=False)
    [model] = task.floats(data)[0]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    expected = []
    for order in inner.batches.order[:, :, 0]:
        for index in order:
            loss = torch.nn.functional.cross_entropy(
                model(data.train.x[index]), data.train.y[index]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            expected.append(loss.item())
    found = [loss.item() for loss in losses]
    assert found == pytest.approx([sum(expected[:10]) / 10, sum(expected[10:]) / 10], rel=1e-2)


def test_sampled_values_differ_between_steps_and_repeat_with_the_seed(data):
    inner = TINY.build(data, noise="uniform", mode="random")
    setting = plan(StraightThrough(noise="uniform", weight_sample_std=0.3), inner.run).table[0]
    x = data.validation.x[:16].expand(2, 16, -1)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(inner.logits(inner.initial(), setting.float().expand(2, -1, -1), x))
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2])


def test_the_mean_shifts_the_noise_of_value_and_gradient(data):
    inner = TINY.build(data)
    settings = torch.zeros(2, 3, len(FIELDS))
    settings[..., FIELDS.index("weight_forward_mean")] = 0.25
    buffers = inner.population.noise_buffers(settings)
    shifts = {name: set(value.tolist()) for name, value in buffers.items() if "mean" in name}
    assert {n for n in shifts if "backward" in n}
    for name, values in shifts.items():
        assert values == ({0.25} if "weight_quantizer" in name else {0.0})


def test_a_redrawn_partition_releases_what_it_froze(data):
    task = replace(TINY, horizon=4)
    inner = task.build(data, noise="uniform", partition="redraw", membership_width=0.0)
    policy = IncrementalQuantization((0.5, 0.5, 0.75, 1.0), partition="redraw")
    table = plan(policy, inner.run).table.float().unsqueeze(1).expand(-1, 2, -1, -1)
    with torch.no_grad():
        states = []
        run_forward(inner, table_rollout(table), visit=states.append)
    count = len(list(inner.population.parameters()))
    shares, members = [], []
    for state in states[1:]:
        membership, _, _, scale_held = state.tensors[3 * count :][4:8]  # of the second layer
        shares.append(membership.flatten(1).mean(1).tolist())
        members.append(membership)
        assert bool(scale_held.all()) == (shares[-1] == [1.0, 1.0])
    assert shares == [[0.5] * 2, [0.5] * 2, [0.75] * 2, [1.0] * 2]
    assert bool((members[0] > members[1]).any())


def test_a_scale_rule_of_activations_is_given_standard_normal_ones(data):
    config = LayerConfig(ternary(), unsigned(2), activation_scale=Fixed(0.75))
    inner = TINY.build(data, config=config)
    buffers = dict(inner.population.named_buffers())
    scales = [b for name, b in buffers.items() if name.endswith("__scale")]
    assert scales
    assert all((scale == 0.75).all() for scale in scales)


def test_the_upper_bound_is_not_hardened():
    assert not upper_bound().hardened
    assert isinstance(upper_bound().suggest(Draw()), Relaxed)


def test_a_method_needs_no_more_than_its_name_noise_and_partition():
    plain = Method("curve", "normal", "settled")
    assert plain.config("ternary/2-bit") == LayerConfig(*BITS["ternary/2-bit"])
    assert plain.bits == tuple(BITS)
    assert plain.mode == AdditiveNoiseAnnealing().mode == "expectation"
    assert PUBLISHED_MEAN == 0.5


def test_a_policy_that_follows_telemetry_is_not_compared_as_if_nothing_happened():
    @dataclass(frozen=True)
    class Following(StraightThrough):
        metrics: tuple[str, ...] = ("train_loss",)

    task = Task(
        family="mlp", data="digits", width=4, depth=2, horizon=2, steps=2, batch=16,
        bits="ternary/2-bit", learning_rates=(0.01,), fine_tuning=False, seed=0,
    )  # fmt: skip
    method = Method("mine", "normal", "settled", suggest=lambda trial: Following())
    with pytest.raises(ValueError, match=r"mine follows train_loss.*leave metrics empty"):
        train(method, task, load("digits"), [0.01], [Following()], 1, load("digits").validation)
