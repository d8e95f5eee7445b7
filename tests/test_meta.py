"""The inner loop, its gradient and the trainer, against references written differently."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import small_task
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import learnsched as ls
from learnsched.choose import LayerConfig
from learnsched.data import DataSet, Split, load, reduced
from learnsched.meta import processes
from learnsched.meta.estimators import clip_factors
from learnsched.meta.evolution import EvolutionStrategies
from learnsched.meta.networks import FAMILIES, Family, mlp
from learnsched.meta.presets import PRESETS
from learnsched.meta.rollout import PolicyRollout, run_forward, table_rollout, terminal_settings
from learnsched.meta.run_folder import read_log
from learnsched.meta.trainer import MetaTrainer
from learnsched.meta.unrolled import Unrolled
from learnsched.policies import LearnedPolicy, MetaNetwork
from learnsched.schedule import BACKWARD_STDS, FIELDS

DIGITS = load("digits")
SMALL = dataclasses.replace(small_task.SMALL, horizon=2, steps=3)


def as_double(inner):
    inner.population.double()
    b = inner.batches
    inner.batches = dataclasses.replace(b, x=b.x.double(), x_held_out=b.x_held_out.double())
    inner.learning_rate = inner.learning_rate.double()
    return inner


def wide_settings(inner):
    generator = torch.Generator().manual_seed(0)
    run, members = inner.run, inner.population.members
    table = torch.rand(
        run.horizon, members, len(run.layers), 7, generator=generator, dtype=torch.float64
    )
    table = 0.6 + 0.4 * table
    table[..., 4] = torch.linspace(0.3, 0.6, run.horizon, dtype=torch.float64).view(-1, 1, 1)
    table[..., 5:] = 0
    return table


def smooth_loss(inner, table):
    state = inner.initial()
    for epoch in range(inner.run.horizon):
        state, _ = inner.epoch(state, table[epoch], epoch, track=False)
    with torch.no_grad():
        return inner.outer_loss(state, table[-1])


def smooth_gradient(inner, table):
    """One graph over the whole run, no recomputation."""
    table = table.clone().requires_grad_()
    state = inner.initial()
    state = dataclasses.replace(state, tensors=tuple(t.requires_grad_() for t in state.tensors))
    for epoch in range(inner.run.horizon):
        state, _ = inner.epoch(state, table[epoch], epoch, track=True)
    (gradient,) = torch.autograd.grad(inner.outer_loss(state, table[-1]).sum(), table)
    return gradient


def test_the_unrolled_gradient_equals_central_finite_differences():
    # The backward noise equals the forward noise, so that autograd's gradient of the outer loss in
    # the state is the derivative of its value.
    inner = as_double(SMALL.build(DIGITS))
    table = wide_settings(inner)
    table[..., 4] = 0  # a projection is hard: its gradient is a surrogate
    table[..., 1], table[..., 3] = table[..., 0], table[..., 2]

    def tied(base):
        full = base.clone()
        full[..., 1], full[..., 3] = base[..., 0], base[..., 2]
        return full

    full = smooth_gradient(inner, table)
    gradient = full.clone()
    gradient[..., 0] += full[..., 1]
    gradient[..., 2] += full[..., 3]
    for epoch, layer, field in ((0, 0, 0), (0, 1, 2), (1, 2, 0), (1, 0, 2)):
        change = torch.zeros_like(table)
        change[epoch, :, layer, field] = 1e-5
        up, down = (smooth_loss(inner, tied(table + s * change)) for s in (1, -1))
        difference = (up - down) / 2e-5
        torch.testing.assert_close(
            gradient[epoch, :, layer, field], difference, rtol=1e-4, atol=1e-7
        )


def test_recomputed_epochs_give_the_gradient_of_the_full_graph():
    inner = as_double(SMALL.build(DIGITS))
    table = wide_settings(inner)
    estimate = Unrolled()(inner, table_rollout(table))
    hard = torch.stack([terminal_settings(row, inner.run, e) for e, row in enumerate(table)])
    torch.testing.assert_close(
        estimate.gradient, smooth_gradient(inner, hard), rtol=1e-9, atol=1e-12
    )
    assert estimate.gradient.abs().max() > 0


def test_a_population_trains_as_its_members_do_one_by_one():
    both = as_double(SMALL.build(DIGITS))
    table = wide_settings(both)
    state, _, losses = run_forward(both, table_rollout(table))
    for member, rate in enumerate(SMALL.learning_rates):
        pair = dataclasses.replace(SMALL, learning_rates=(rate, rate), runs=2).build(DIGITS)
        alone = as_double(pair)
        own = table[:, member : member + 1].expand(-1, 2, -1, -1)
        single, _, single_losses = run_forward(alone, table_rollout(own))
        torch.testing.assert_close(losses[-1][member], single_losses[-1][member])
        for ours, theirs in zip(state.tensors, single.tensors, strict=True):
            torch.testing.assert_close(ours[member], theirs[member])


def test_the_state_at_the_end_is_frozen_on_the_level_set():
    inner = SMALL.build(DIGITS, membership_width=0.0)
    policy = LearnedPolicy(MetaNetwork())
    with torch.no_grad():
        state, table, _ = run_forward(inner, PolicyRollout(policy, inner.run, 2))
    count = len(list(inner.population.parameters()))
    membership, held, scale, _ = state.tensors[3 * count :][:4]
    assert bool((membership == 1).all())
    codes = held / scale
    assert set(codes.round(decimals=5).unique().tolist()) <= {-1.0, 0.0, 1.0}
    accuracy = inner.accuracy(state, table[-1], DIGITS.validation.x, DIGITS.validation.y)
    assert accuracy.shape == (2,)
    assert bool(((accuracy >= 0) & (accuracy <= 1)).all())


def test_a_channel_keeps_its_scale_from_its_first_frozen_weight_on_and_the_others_theirs_move():
    inner = SMALL.build(DIGITS, membership_width=0.0)
    table = wide_settings(inner).float()
    table[..., 4] = 0.004  # two of 384 weights in the first layer
    with torch.no_grad():
        states = []
        run_forward(inner, table_rollout(table), hardened=False, visit=states.append)
    count = len(list(inner.population.parameters()))
    carried = [state.tensors[3 * count :][:4] for state in states[1:]]
    membership, _, scale, scale_held = carried[-1]
    frozen = membership.amax(dim=2, keepdim=True) > 0
    assert int(membership.sum()) == 2 * 2
    assert torch.equal(scale_held > 0, frozen)
    moved = carried[0][2] != scale
    assert torch.equal(moved, ~frozen)


def test_fine_tuning_starts_from_a_trained_network():
    scratch = dataclasses.replace(SMALL, steps=40, learning_rates=(0.01, 0.01)).build(DIGITS)
    tuned = dataclasses.replace(
        SMALL, steps=40, learning_rates=(0.01, 0.01), fine_tuning=True
    ).build(DIGITS)
    settings = torch.zeros(2, 3, 7)
    settings[..., [1, 3]] = 1.0
    losses = [i.outer_loss(i.initial(), settings).mean() for i in (scratch, tuned)]
    assert losses[1] < losses[0] - 0.3


def test_tasks_of_a_step_are_the_same_for_the_same_seed_and_differ_between_steps():
    mix = PRESETS["standard"].trainer.mix
    assert mix.sample(0, 3) == mix.sample(0, 3)
    assert mix.sample(0, 3) != mix.sample(0, 4)
    assert mix.sample(0, 3) != mix.sample(1, 3)


def test_meta_training_runs_under_the_learning_rate_of_the_base_curve(tmp_path):
    trainer, seen = small_trainer(tmp_path), []
    estimator = trainer.estimator

    def watching(inner, rollout):
        seen.append(inner)
        return estimator(inner, rollout)

    trainer.estimator = watching
    trainer.run(steps=1)
    for inner in seen:
        curve = trainer.policy.base.nearest(inner.run)
        total = inner.run.horizon * inner.run.steps_per_epoch
        expected = [curve.learning_rate_factor(inner.run, step / total) for step in range(total)]
        assert inner.rates.flatten().tolist() == pytest.approx(expected)
        assert curve.warm_until == (0.0 if inner.run.fine_tuning else 0.2)
    assert seen


def small_trainer(folder, data=None, network=None, families=FAMILIES, family="mlp", **changes):
    preset = PRESETS["quick"]
    mix = dataclasses.replace(
        preset.trainer.mix,
        architectures=(("digits", family, (6,), (3,)),),
        horizons=(3,),
        total_steps=(6, 9),
        members=2,
    )
    changes = {"validation": (SMALL,), "validate_every": 2} | changes
    config = dataclasses.replace(preset.trainer, mix=mix, **changes)
    torch.manual_seed(0)
    policy = LearnedPolicy(network or MetaNetwork(), preset.base, preset.domain)
    return MetaTrainer(policy, config, folder, data or {"digits": DIGITS}, families=families)


def test_whole_numbers_of_numpy_are_whole_numbers(tmp_path):
    plain = small_trainer(tmp_path / "plain")
    mix = dataclasses.replace(plain.config.mix, members=np.int64(2), horizons=(np.int64(3),))
    config = dataclasses.replace(plain.config, mix=mix)
    made = MetaTrainer(plain.policy, config, tmp_path / "numpy", {"digits": DIGITS})
    made.run(1)
    written = [tmp_path / name / "config.json" for name in ("plain", "numpy")]
    plain.run(1)
    assert written[0].read_text() == written[1].read_text()


def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(tmp_path):
    whole = small_trainer(tmp_path / "whole")
    whole.run(4)
    small_trainer(tmp_path / "parts").run(1)
    parts = small_trainer(tmp_path / "parts")
    assert parts.step == 1
    parts.run(4)
    for a, b in zip(
        whole.policy.network.parameters(), parts.policy.network.parameters(), strict=True
    ):
        assert torch.equal(a, b)
    timeless = [
        [{k: v for k, v in e.items() if k != "seconds"} for e in t.log] for t in (whole, parts)
    ]
    assert timeless[0] == timeless[1]
    assert whole.best_error == parts.best_error
    lines = (tmp_path / "parts" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3, 4]


def without_seconds(trainer):
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in trainer.log]


def assert_same_run(one, other):
    for a, b in zip(
        one.policy.network.parameters(), other.policy.network.parameters(), strict=True
    ):
        assert torch.equal(a, b)
    assert without_seconds(one) == without_seconds(other)
    assert (one.step, one.best_step, one.best_error) == (
        other.step, other.best_step, other.best_error,
    )  # fmt: skip


@pytest.mark.parametrize("load", ["load_best", "load_last"])
def test_a_run_goes_on_from_its_raw_parameters_after_others_were_given_out(load, tmp_path):
    whole, parts = (small_trainer(tmp_path / name) for name in ("whole", "parts"))
    whole.run(4)
    parts.run(2)
    raw = [p.clone() for p in parts.policy.network.parameters()]
    getattr(parts, load)()
    assert not all(map(torch.equal, raw, parts.policy.network.parameters()))
    parts.run(4)
    assert_same_run(parts, whole)
    again = small_trainer(tmp_path / "parts")
    assert_same_run(again, whole)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_run_that_was_interrupted_in_validation_goes_on_as_if_it_was_not(call, tmp_path):
    whole, parts = (small_trainer(tmp_path / name) for name in ("whole", "parts"))
    whole.run(4)
    task_error, calls = parts._task_error, iter(range(1, 9))

    def interrupted(task):
        if next(calls) == call:
            raise KeyboardInterrupt
        return task_error(task)

    parts._task_error = interrupted
    with pytest.raises(KeyboardInterrupt):
        parts.run(4)
    parts.run(4)
    assert_same_run(parts, whole)


def test_a_start_that_is_never_beaten_is_kept(tmp_path):
    trainer = small_trainer(tmp_path, learning_rate=3.0)
    start = {n: p.detach().clone() for n, p in trainer.policy.network.named_parameters()}
    errors = iter([0.4, 0.6, 0.5])
    trainer._task_error = lambda task: torch.tensor(next(errors), dtype=torch.float64)
    trainer.run(4)
    assert (trainer.best_step, trainer.best_error) == (0, 0.4)
    assert [e.get("validation_error") for e in trainer.log] == pytest.approx(
        [0.4, None, 0.6, None, 0.5]
    )
    trainer.load_best()
    for name, parameter in trainer.policy.network.named_parameters():
        assert torch.equal(parameter, start[name])


def test_without_validation_tasks_the_last_average_is_kept(tmp_path):
    trainer = small_trainer(tmp_path, validation=(), validate_every=1)
    trainer.run(2)
    assert ["validation_error" in entry for entry in trainer.log] == [False, False]
    trainer.load_best()
    for name, parameter in trainer.policy.network.named_parameters():
        assert torch.equal(parameter, trainer._average[name])


def test_a_folder_of_another_configuration_is_refused_and_what_differs_is_named(tmp_path):
    small_trainer(tmp_path)
    named = r"config\.json differs in trainer\.seed, trainer\.learning_rate;"
    with pytest.raises(FileExistsError, match=named):
        small_trainer(tmp_path, learning_rate=0.5, seed=7)


class Own:
    """An estimator whose repr is an address."""

    def __call__(self, inner, rollout):
        return Unrolled()(inner, rollout)


@pytest.mark.parametrize("estimator", [Own(), lambda inner, rollout: None])
def test_an_estimator_that_a_resumed_run_would_not_know_is_refused(estimator, tmp_path):
    made = small_trainer(tmp_path / "made")
    with pytest.raises(TypeError, match=r"repr is .* a resumed run would not know it"):
        MetaTrainer(made.policy, made.config, tmp_path / "own", {"digits": DIGITS}, estimator)
    assert not (tmp_path / "own").exists()


def test_a_checkpoint_without_its_configuration_is_refused_and_left_alone(tmp_path):
    small_trainer(tmp_path).run(1)
    (tmp_path / "config.json").unlink()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileNotFoundError, match=r"checkpoint\.safetensors is there and .*config"):
        small_trainer(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_begun_before_tasks_had_all_their_fields_goes_on(tmp_path):
    small_trainer(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for task in config["trainer"]["validation"]:
        assert task.pop("optimizer") == "adam"
        assert task.pop("float_ends") is False
    path.write_text(json.dumps(config))
    assert small_trainer(tmp_path).step == 0


def test_a_run_begun_before_domains_told_levels_of_weights_goes_on(tmp_path):
    small_trainer(tmp_path).run(1)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config["policy"]["domain"].pop("weight_levels") == [3, 3]
    path.write_text(json.dumps(config))
    assert small_trainer(tmp_path).step == 1


def respoiled(path, *, tensors=lambda t: t, scalars=lambda s: s):
    with safe_open(path, framework="pt") as file:
        stored = json.loads(file.metadata()["trainer"])
        values = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors(values), path, metadata={"trainer": json.dumps(scalars(stored))})


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "a tensor less": lambda path: respoiled(path, tensors=lambda t: dict(list(t.items())[1:])),
    "other shapes": lambda path: respoiled(
        path, tensors=lambda t: {name: value[None].clone() for name, value in t.items()}
    ),
    "a scalar less": lambda path: respoiled(
        path, scalars=lambda s: {k: v for k, v in s.items() if k != "step"}
    ),
    "no scalars": lambda path: respoiled(path, scalars=lambda s: []),
    **{
        f"{name}: {value}": lambda path, name=name, value=value: respoiled(
            path, scalars=lambda s: s | {name: value}
        )
        for name, value in (
            ("log", None), ("log", [1]), ("step", "three"), ("step", -4), ("best_error", None),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_refused(name, tmp_path):
    small_trainer(tmp_path).run(1)
    DAMAGE[name](tmp_path / "checkpoint.safetensors")
    torch.manual_seed(0)
    network = MetaNetwork()
    kept = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is damaged"):
        small_trainer(tmp_path, network=network)
    assert all(torch.equal(kept[key], value) for key, value in network.state_dict().items())


def test_a_frozen_policy_is_refused_before_anything_is_written(tmp_path):
    network = MetaNetwork().requires_grad_(False)
    with pytest.raises(ValueError, match="network are frozen, as those of load_pretrained"):
        small_trainer(tmp_path / "run", network=network)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_run_leaves_the_network_without_gradients(tmp_path):
    small_trainer(tmp_path)
    network = MetaNetwork()
    with pytest.raises(FileExistsError):
        small_trainer(tmp_path, network=network, validate_every=3)
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"policy": 1, "trainer": 2}'])
def test_a_damaged_configuration_is_refused(text, tmp_path):
    small_trainer(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        small_trainer(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"bits": "ternary"}, "unknown bits 'ternary'; choose one of ternary/2-bit"),
        ({"optimizer": "lion"}, "unknown optimizer 'lion'"),
        ({"depth": 1}, "depth must be a whole number of at least 2, got 1"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"steps": 2.5}, "steps must be a whole number of at least 1, got 2.5"),
        ({"learning_rates": (0.01, -0.01)}, "learning rates must be positive"),
        ({"learning_rates": (float("nan"),)}, "learning rates must be positive"),
    ],
)
def test_impossible_tasks_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize("change", [{"noise": "pink"}, {"partition": "best"}, {"mode": "mean"}])
def test_unknown_ways_to_build_a_task_are_refused(change):
    (kind,) = change
    with pytest.raises(ValueError, match=f"unknown (noise|{kind})"):
        SMALL.build(DIGITS, **change)


def test_an_epoch_with_its_graph_computes_what_it_does_without():
    inner = SMALL.build(DIGITS)
    settings = torch.zeros(inner.population.members, len(inner.population.layers), len(FIELDS))
    settings[..., list(BACKWARD_STDS)] = 0.5
    plain, losses = inner.epoch(inner.initial(), settings, 0, track=False)
    tracked, same = inner.epoch(inner.initial(), settings.clone().requires_grad_(), 0, track=True)
    assert torch.equal(losses, same)
    assert all(map(torch.equal, plain.tensors, tracked.tensors))


def test_runs_that_sample_are_not_differentiated():
    inner = SMALL.build(DIGITS, mode="random")
    rollout = PolicyRollout(LearnedPolicy(MetaNetwork()), inner.run, inner.population.members)
    with pytest.raises(ValueError, match='mode "random" are not differentiated'):
        Unrolled()(inner, rollout)
    assert EvolutionStrategies(pairs=1)(inner, rollout).loss.isfinite().all()


def test_a_scale_rule_that_drops_dimensions_is_refused():
    def largest(x, levels):
        return x.abs().max() / levels.values[-1]

    config = LayerConfig(ls.ternary(), ls.unsigned(2), weight_scale=largest)
    with pytest.raises(ValueError, match="as many dimensions as their weight"):
        SMALL.build(DIGITS, config=config)
    config = LayerConfig(
        ls.ternary(), ls.unsigned(2), weight_scale=lambda x, levels: largest(x, levels).view(1, 1)
    )
    assert SMALL.build(DIGITS, config=config).population.members == len(SMALL.learning_rates)


def test_a_network_that_has_no_say_with_the_levels_of_the_mix_is_refused(tmp_path):
    preset = PRESETS["quick"]
    mix = dataclasses.replace(preset.trainer.mix, bits=(("binary/binary", 1.0),))
    config = dataclasses.replace(preset.trainer, mix=mix)
    policy = LearnedPolicy(MetaNetwork(), preset.base, preset.domain)
    with pytest.raises(ValueError, match="no say with binary/binary, which the mix draws"):
        MetaTrainer(policy, config, tmp_path / "run", config.load_data())
    assert not (tmp_path / "run").exists()


def test_a_bit_that_has_flipped_in_a_checkpoint_is_noticed(tmp_path):
    small_trainer(tmp_path).run(1)
    path = tmp_path / "checkpoint.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="its tensors are not what was written"):
        small_trainer(tmp_path)


def test_a_checkpoint_of_before_digests_is_taken_up(tmp_path):
    small_trainer(tmp_path).run(1)
    respoiled(tmp_path / "checkpoint.safetensors")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config["data"]["digits"].pop("validation") == len(DIGITS.validation)
    path.write_text(json.dumps(config))
    assert small_trainer(tmp_path).step == 1


def test_no_more_seeds_are_drawn_than_there_are_members():
    task = dataclasses.replace(SMALL, learning_rates=(0.01,), runs=3, fine_tuning=True)
    assert task.build(DIGITS).population.members == 1


def test_a_task_without_members_is_not_built():
    with pytest.raises(ValueError, match="has no members"):
        dataclasses.replace(SMALL, learning_rates=()).build(DIGITS)


@pytest.mark.parametrize("name", ["architectures", "horizons", "batches", "bits"])
def test_a_mix_needs_something_to_draw_from(name):
    with pytest.raises(ValueError, match=f"{name} is empty"):
        dataclasses.replace(PRESETS["quick"].trainer.mix, **{name: ()})


def with_architecture(**changes):
    architecture = {"data": "digits", "family": "mlp", "widths": (6,), "depths": (3,)} | changes
    return {"architectures": (tuple(architecture.values()),)}


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (with_architecture(widths=()), ValueError, "widths is empty"),
        (
            with_architecture(widths=(6, 0)),
            ValueError,
            "widths must be a whole number of at least 1",
        ),
        (with_architecture(widths=6), TypeError, "widths must be a tuple of whole numbers"),
        (with_architecture(depths=(3.0,)), ValueError, "depths must be a whole number .* got 3.0"),
        ({"horizons": (0,)}, ValueError, "horizons must be a whole number of at least 1"),
        ({"batches": (32, -1)}, ValueError, "batches must be a whole number of at least 1"),
        ({"members": 2.5}, ValueError, "members must be a whole number"),
        ({"bits": (("ternary/2-bit", 0.0),)}, ValueError, "weight of ternary/2-bit must be pos"),
        ({"bits": (("ternary/2-bit", float("nan")),)}, ValueError, "must be positive"),
    ],
)
def test_a_mix_refuses_at_once_what_no_task_can_be_made_of(change, error, match):
    with pytest.raises(error, match=match):
        dataclasses.replace(PRESETS["quick"].trainer.mix, **change)


class Towers(torch.nn.Module):
    """No sequence of layers: two branches that are added."""

    def __init__(self, shape, width, depth, classes):
        super().__init__()
        self.first, self.second = (mlp(math.prod(shape), width, depth - 1, width) for _ in "ab")
        self.last = torch.nn.Sequential(
            torch.nn.BatchNorm1d(width), torch.nn.ReLU(), torch.nn.Linear(width, classes)
        )

    def forward(self, x):
        return self.last(self.first(x) + self.second(x))


OWN = {**FAMILIES, "towers": Family(Towers, ("channels", 8, 8), least=3, more=2)}


def test_an_own_family_is_trained_and_validated(tmp_path):
    validation = (dataclasses.replace(SMALL, family="towers"),)
    options = {"family": "towers", "families": OWN, "validation": validation, "validate_every": 1}
    trainer = small_trainer(tmp_path, **options)
    trainer.run(1)
    assert math.isfinite(trainer.log[1]["outer_loss"]) and not trainer.log[1]["dropped"]
    assert 0 < trainer.log[1]["validation_error"] < 1
    inner = validation[0].build(DIGITS, families=OWN)
    assert len(inner.run.layers) == 5  # two of each tower, and the last
    with pytest.raises(ValueError, match="unknown family 'towers'"):
        validation[0].build(DIGITS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "towers"}, "unknown family 'towers'"),
        ({"validation": (dataclasses.replace(SMALL, family="towers"),)}, "unknown family 'towers'"),
        (
            {
                "families": OWN,
                "validation": (dataclasses.replace(SMALL, family="towers", depth=4),),
            },
            r"family towers has 3, 5, 7, \.\.\. weight layers, got depth 4",
        ),
    ],
)
def test_families_that_the_trainer_lacks_are_refused_before_there_is_a_folder(
    tmp_path, options, message
):
    with pytest.raises(ValueError, match=message):
        small_trainer(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("shape", [(2, 8, 8), (2, 8, 4), (64,), (1, 1, 8, 8)])
def test_an_own_family_says_what_inputs_it_takes(shape):
    split = Split(torch.zeros(20, *shape), torch.arange(20) % 2)
    data = DataSet("mine", split, split, split, classes=2)
    task = dataclasses.replace(SMALL, family="towers", data="mine")
    if shape == (2, 8, 8):
        assert task.build(data, families=OWN).population.members == len(SMALL.learning_rates)
        return
    with pytest.raises(
        ValueError, match=r"towers takes .* shape \('channels', 8, 8\), those of mine"
    ):
        task.build(data, families=OWN)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mix_takes_the_depths_of_which_networks_can_be_built(family):
    data = load("mnist1d") if family.startswith("cnn1d") else DIGITS
    for depth in range(1, 9):

        def mix(depth=depth):
            change = with_architecture(data=data.name, family=family, depths=(depth,))
            return dataclasses.replace(PRESETS["quick"].trainer.mix, **change)

        def build(depth=depth):
            dataclasses.replace(SMALL, family=family, width=4, depth=depth).build(data)

        made = [not raises_value_error(action) for action in (mix, build)]
        assert made[0] == made[1], depth


def raises_value_error(action):
    try:
        action()
    except ValueError:
        return True
    return False


def test_the_domain_of_a_preset_has_the_steps_of_its_runs():
    quick = PRESETS["quick"]
    mix = dataclasses.replace(quick.trainer.mix, horizons=(30,), total_steps=(10, 10))
    preset = dataclasses.replace(quick, trainer=dataclasses.replace(quick.trainer, mix=mix))
    drawn = {task.horizon * task.steps for step in range(5) for task in mix.sample(0, step)}
    assert drawn == {60}
    assert preset.domain.steps == (60, 60)
    for shipped in PRESETS.values():
        assert shipped.domain.steps == shipped.trainer.mix.total_steps


def test_gradients_that_are_not_finite_are_dropped_and_counted(tmp_path):
    trainer = small_trainer(tmp_path)

    def broken(inner, rollout):
        estimate = Unrolled()(inner, rollout)
        gradient = estimate.gradient.clone()
        gradient[:, 0] = float("nan")
        return dataclasses.replace(estimate, gradient=gradient)

    trainer.estimator = broken
    trainer.run(1)
    assert trainer.log[1]["dropped"] == 2  # one member of each of two tasks
    assert all(bool(p.isfinite().all()) for p in trainer.policy.network.parameters())


def test_the_log_is_json_and_reads_as_it_was_where_nothing_is_finite(tmp_path):
    trainer = small_trainer(tmp_path, validation=())

    def broken(inner, rollout):
        estimate = Unrolled()(inner, rollout)
        return dataclasses.replace(estimate, gradient=torch.full_like(estimate.gradient, torch.nan))

    def refuse(word):
        raise ValueError(f"{word} is no JSON")

    trainer.run(1)  # from here on there is momentum
    before = [p.detach().clone() for p in trainer.policy.network.parameters()]
    trainer.estimator = broken
    trainer.run(2)
    after = list(trainer.policy.network.parameters())
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    (_, line) = (tmp_path / "log.jsonl").read_text().splitlines()
    entry = json.loads(line, parse_constant=refuse)
    assert (entry["outer_loss"], entry["norm_largest"]) == ("nan", "inf")
    assert repr(read_log(tmp_path / "log.jsonl")) == repr(trainer.log)
    assert repr(small_trainer(tmp_path, validation=()).log) == repr(trainer.log)


def test_a_run_is_not_resumed_on_data_of_other_sizes(tmp_path):
    small_trainer(tmp_path).run(1)
    smaller = reduced(DIGITS, 100, 50, 50)
    with pytest.raises(FileExistsError, match="another configuration"):
        small_trainer(tmp_path, data={"digits": smaller})
    with pytest.raises(KeyError, match=r"data lacks digits.*it has mine"):
        small_trainer(tmp_path / "other", data={"mine": smaller})


@pytest.mark.parametrize(
    ("family", "shape", "dtype"),
    [
        ("cnn1d", (1, 40), torch.float32),
        ("cnn2d", (3, 8, 8), torch.float32),
        ("residual", (1, 8, 6), torch.float32),
        ("mlp", (40,), torch.float64),
    ],
)
def test_data_that_a_family_cannot_take_are_refused(family, shape, dtype):
    split = Split(torch.zeros(20, *shape, dtype=dtype), torch.arange(20) % 2)
    data = DataSet("mine", split, split, split, classes=2)
    with pytest.raises(ValueError, match=f"{family} takes inputs of torch.float32"):
        dataclasses.replace(SMALL, family=family, data="mine").build(data)


@pytest.mark.parametrize(
    "change",
    [
        {"validate_every": 0},
        {"validate_every": 0.5},
        {"learning_rate": -1.0},
        {"learning_rate": math.inf},
        {"average": 1.0},
        {"clip": 0.0},
        {"clip": math.nan},
        {"betas": (0.9, 1.0)},
    ],
)
def test_a_trainer_s_numbers_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=r"are positive|validate_every must be a whole number"):
        dataclasses.replace(PRESETS["quick"].trainer, **change)


def test_an_infinite_clip_leaves_gradients_as_they_are():
    assert dataclasses.replace(PRESETS["quick"].trainer, clip=math.inf).clip == math.inf
    assert clip_factors(torch.tensor([0.0, 7.0]), math.inf).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "change", [{"members": 0}, {"alike": 0}, {"fine_tuning": 7.0}, {"total_steps": (60, 20)}]
)
def test_a_mix_s_numbers_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=r"at least 1|a probability|positive number up"):
        dataclasses.replace(PRESETS["quick"].trainer.mix, **change)


def test_the_last_parameters_outlive_the_process(tmp_path):
    whole = small_trainer(tmp_path)
    whole.run(2)
    whole.load_last()
    last = {n: p.clone() for n, p in whole.policy.network.named_parameters()}
    again = small_trainer(tmp_path)
    again.run(2)  # nothing is left to do
    again.load_last()
    assert all(torch.equal(p, last[n]) for n, p in again.policy.network.named_parameters())
    assert any(bool(p.any()) for n, p in last.items() if n.startswith("out"))


@pytest.mark.parametrize(
    "name, local, count, own",
    [
        ("cuda", "5", 4, "cuda:1"), ("cuda", None, 4, "cuda"), ("cuda", "1", 0, "cuda"),
        ("cpu", "1", 4, "cpu"),
    ],
)  # fmt: skip
def test_each_process_of_a_machine_takes_a_gpu_of_its_own(monkeypatch, name, local, count, own):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    assert processes.own_device(name) == own


def test_a_run_that_began_with_another_network_is_refused(tmp_path):
    small_trainer(tmp_path).run(1)
    config = json.loads((tmp_path / "config.json").read_text())
    other = ls.load_pretrained("default").network.requires_grad_(True)
    with pytest.raises(FileExistsError, match="another configuration"):
        small_trainer(tmp_path, network=other)
    # Runs that do not say what they began with go on.
    del config["start"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert small_trainer(tmp_path, network=other).step == 1
