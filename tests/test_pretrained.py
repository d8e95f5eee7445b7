"""Artefacts: what is saved comes back, and anything else is refused before it is used."""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

import learnsched as ls
from learnsched.meta.presets import TABLES
from learnsched.policies import BaseCurve, Domain, LearnedPolicy, MetaNetwork
from learnsched.pretrained import artefact
from learnsched.pretrained.embed_card import embed_card, main
from learnsched.schedule import LayerInfo, RunInfo, plan

RUN = RunInfo((LayerInfo("a", 9, 3, 4), LayerInfo("b", 20, 3, 0)), 6, 20)


def trained(open_loop=False):
    torch.manual_seed(0)
    network = MetaNetwork(5, 4)
    with torch.no_grad():
        network.out.weight.normal_()
        network.out.bias.normal_()
    base, domain = BaseCurve(0.25, 0.25, 0.5), Domain(horizon=(2, 30), fan_in=(5, 600))
    return LearnedPolicy(network, base, domain, open_loop=open_loop)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("artefact") / "policy.safetensors"
    return ls.save_artefact(trained(), path, {"reached": {"digits": 0.9}})


@pytest.fixture
def path(made, tmp_path):
    """A pair of files to spoil."""
    for suffix in (".safetensors", ".json"):
        shutil.copy(made.with_suffix(suffix), tmp_path)
    return tmp_path / made.name


def read(path):
    """Tensors and card."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return load(data), json.loads(header["__metadata__"]["card"].split("\n", 1)[1])


def vouch(path, tensors, card):
    """Write a file whose checksums are right, whatever it holds."""
    text = card if isinstance(card, str) else json.dumps(card)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    path.write_bytes(save(tensors, {"card": f"{checksum}\n{text}"}))


def rewrite(path, **changes):
    """Change the card; what is None is left out."""
    tensors, card = read(path)
    vouch(path, tensors, {k: v for k, v in {**card, **changes}.items() if v is not None})


@pytest.mark.parametrize("open_loop", [False, True])
def test_a_saved_policy_comes_back_to_the_bit(tmp_path, open_loop):
    policy = trained(open_loop)
    card = {"preset": "quick", "steps": 12, "notes": "größer"}
    path = ls.save_artefact(policy, str(tmp_path / "new" / "p.safetensors"), card)
    assert path == tmp_path / "new" / "p.safetensors"
    assert sorted(os.listdir(path.parent)) == ["p.json", "p.safetensors"]
    twin = ls.load_pretrained(path)
    assert twin.config() == policy.config()
    assert twin.metrics == policy.metrics
    state = policy.network.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in twin.network.state_dict().items())
    assert torch.equal(plan(twin, RUN).table, plan(policy, RUN).table)
    assert not any(p.requires_grad for p in twin.network.parameters())
    assert all(p.requires_grad for p in policy.network.parameters())
    found = ls.pretrained_card(str(path))
    assert card.items() <= found.items()
    assert found["sha256"] == artefact.digest(state)


def test_saving_is_reproducible_and_replaces(tmp_path):
    path = tmp_path / "p.safetensors"
    ls.save_artefact(trained(), path, {"run": 1})
    before = path.read_bytes()
    ls.save_artefact(trained(), path, {"run": 2})
    assert ls.pretrained_card(path)["run"] == 2
    ls.save_artefact(trained(), path, {"run": 1})
    assert path.read_bytes() == before


def test_the_card_of_another_artefact_may_be_handed_on(made, tmp_path):
    policy = trained()
    with torch.no_grad():
        policy.network.out.bias.add_(1)
    path = ls.save_artefact(policy, tmp_path / "p.safetensors", ls.pretrained_card(made))
    assert torch.equal(ls.load_pretrained(path).network.out.bias, policy.network.out.bias)
    assert ls.pretrained_card(path)["reached"] == {"digits": 0.9}


def test_a_loaded_policy_schedules_as_the_one_that_was_saved(made):
    def scheduled(policy):
        torch.manual_seed(0)
        layers = torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU()
        model = ls.quantize_(torch.nn.Sequential(*layers), ls.ternary(), ls.unsigned(2))
        scheduler = ls.QuantizationScheduler(model, policy, epochs=3)
        for loss in (1.0, 0.5, 0.4):
            scheduler.step({"train_loss": loss})
        ls.integer_weights(ls.finalize_(model))
        return scheduler.history.settings

    settings = scheduled(ls.load_pretrained(made))
    assert settings == scheduled(trained())
    assert settings != scheduled(ls.policies.StraightThrough())


def truncated(path):
    path.write_bytes(path.read_bytes()[:-20])


def flipped(at):
    def spoil(path):
        data = bytearray(path.read_bytes())
        data[at(data)] ^= 1
        path.write_bytes(data)

    return spoil


def with_tensors(change):
    def spoil(path):
        tensors, card = read(path)
        change(tensors)
        vouch(path, tensors, {**card, "sha256": artefact.digest(tensors)})

    return spoil


def huge(path):
    with path.open("ab") as file:
        file.truncate(10**8)


def with_bytes(data):
    return lambda path: path.write_bytes(data)


def with_card(text):
    return lambda path: vouch(path, read(path)[0], text)


def with_metadata(**metadata):
    return lambda path: path.write_bytes(save(read(path)[0], metadata))


def swapped(path):
    data = path.read_bytes()
    for a, b in ((b'"cell.bias_hh"', b'"CELL.BIAS"'), (b'"cell.bias_ih"', b'"cell.bias_hh"'),
                 (b'"CELL.BIAS"', b'"cell.bias_ih"')):  # fmt: skip
        data = data.replace(a, b)
    path.write_bytes(data)


def config(**changes):
    def spoil(path):
        found = read(path)[1]["config"]
        rewrite(path, config={k: v for k, v in {**found, **changes}.items() if v != ""})

    return spoil


def in_base(**changes):
    def damage(path):
        [case] = trained().config()["base"]
        config(base=[{**case, "curve": {**case["curve"], **changes}}])(path)

    return damage


def in_case(**changes):
    return lambda path: config(base=[{**trained().config()["base"][0], **changes}])(path)


class Harmful:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was run",))


SPOILED = {
    "truncated": (truncated, "is not a safetensors file"),
    "a flipped bit of a tensor": (
        flipped(lambda data: -3), "tensors of .* are not those that its card.*damaged or was altered"),
    "a flipped bit of the card": (
        flipped(lambda data: data.index(b"0.9")), "the card of .* is damaged or was altered"),
    "tensors that changed places": (swapped, "tensors of .* are not those that its card describes"),
    "empty": (with_bytes(b""), "is not a safetensors file"),
    "a pickle": (with_bytes(pickle.dumps(Harmful())), "is not a safetensors file"),
    "too large": (huge, "larger than 4000000 bytes"),
    "no header": (with_metadata(), "holds no card: .*train it again"),
    "no card": (with_metadata(note="0"), "holds no card"),
    "a card without hash": (with_metadata(card="{}"), "card of .* is damaged or was altered"),
    "a card with another hash": (
        with_metadata(card="0" * 64 + "\n{}"), "card of .* is damaged or was altered"),
    "a card that vouches for no tensors": (lambda p: rewrite(p, sha256=None), "are not those that"),
    "another schema": (lambda p: rewrite(p, feature_schema=99),
                       "has feature_schema 99, this version of learnsched reads 3; install"),
    "no schema": (lambda p: rewrite(p, feature_schema=None), "has feature_schema None"),
    "another format": (lambda p: rewrite(p, format=1), "has format 1, this version"),
    "an empty card": (with_card(""), "card of .* cannot be read"),
    "a truncated card": (with_card('{"format": 2, "feat'), "cannot be read"),
    "a card of a list": (with_card("[1]"), "is a list, not a JSON object"),
    "a deep card": (with_card("[" * 200_000), "cannot be read"),
    "an endless number": (with_card(f'{{"format": {"9" * 10_000}}}'), "cannot be read"),
    "no configuration": (lambda p: rewrite(p, config=None), "does not hold a learned policy"),
    "a listed configuration": (lambda p: rewrite(p, config=[1]), "does not hold"),
    "huge units": (config(hidden=10**9), "1 to 256 units, not 1000000000"),
    "no units": (config(embedding=0), "1 to 256 units, not 0"),
    "units in words": (config(hidden="six"), "1 to 256 units, not 'six'"),
    "units of truth": (config(hidden=True), "1 to 256 units, not True"),
    "other units": (config(hidden=6), r"expected torch\.float32 \(\d+"),
    "an open question": (config(open_loop="no"), "open_loop is true or false, not 'no'"),
    "an open choice": (config(shared_noise=1), "shared_noise is true or false, not 1"),
    "no base": (config(base=""), "does not hold a learned policy"),
    "no base curve": (config(base=[]), "1 to 64 base curves, not 0"),
    "too many base curves": (config(base=[{}] * 65), "1 to 64 base curves, not 65"),
    "a regime in words": (in_case(fine_tuning="no"), "fine_tuning is true or false"),
    "levels in words": (in_case(weight_levels="3"), "finite numbers"),
    "a single level": (in_case(activation_levels=1), "2 to 65536 levels"),
    "a base in words": (in_base(power="0.5"), "finite numbers"),
    "a base of truth": (in_base(power=True), "finite numbers"),
    "a base out of range": (in_base(power=0), r"power must lie in \(0, 1000\]"),
    "an unknown base": (in_base(colour=1), "colour"),
    "a base without end": (in_base(weight_backward_std=float("inf")), "finite numbers"),
    "a base beyond numbers": (in_base(weight_backward_std=10**400), "does not hold"),
    "a reversed domain": (config(domain={"depth": [5, 3]}), "depth must go from"),
    "a domain of one": (config(domain={"depth": [5]}), "does not hold a learned policy"),
    "a missing tensor": (with_tensors(lambda t: t.pop("out.bias")), r"expected \['cell"),
    "a tensor too many": (with_tensors(lambda t: t.update(x=torch.zeros(1))), "has tensors"),
    "a tensor with a path": (
        with_tensors(lambda t: t.update({"../../x": t.pop("out.bias")})), r"has tensors \['\.\./"),
    "another shape": (with_tensors(lambda t: t.update({"out.bias": torch.zeros(6)})),
                      r"out\.bias in .* is torch\.float32 \(6,\), expected torch\.float32 \(5,\)"),
    "another dtype": (with_tensors(lambda t: t.update({"out.bias": torch.zeros(5).double()})),
                      r"is torch\.float64"),
    "NaN": (with_tensors(lambda t: t["out.bias"].fill_(torch.nan)), r"out\.bias in .* not finite"),
    "infinity": (with_tensors(lambda t: t["out.bias"].fill_(torch.inf)), "not finite"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=SPOILED)
def test_a_spoiled_artefact_is_refused(path, spoil, message):
    spoil(path)
    with pytest.raises(ls.ArtefactError, match=message):
        ls.load_pretrained(path)


def test_an_artefact_error_is_a_value_error():
    assert issubclass(ls.ArtefactError, ValueError)


@pytest.mark.parametrize("call", [ls.load_pretrained, ls.pretrained_card])
@pytest.mark.parametrize(
    "name", ["no such name", "", "../default", "missing.safetensors", Path("missing.safetensors")]
)
def test_an_unknown_name_is_refused_with_the_choices(call, name):
    with pytest.raises(ls.ArtefactError, match=r"no pretrained schedule .*; give one of \["):
        call(name)


def test_a_folder_or_another_file_is_no_artefact(path):
    folder = path.parent / "folder.safetensors"
    folder.mkdir()
    for wrong in (folder, path.with_suffix(".json"), path.parent):
        with pytest.raises(ls.ArtefactError, match=r"no pretrained schedule|is no artefact"):
            ls.load_pretrained(wrong)


@pytest.mark.parametrize("name", ["policy", "policy.pt", "policy.json", "policy.safetensors.bak"])
def test_artefacts_have_one_ending(tmp_path, name):
    with pytest.raises(ValueError, match=r"ending in \.safetensors"):
        ls.save_artefact(trained(), tmp_path / name, {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("where", ["tensors", "disk", "json"])
def test_a_failed_save_leaves_nothing_half_written(path, monkeypatch, where, existing):
    if not existing:
        path = path.parent / "other" / "policy.safetensors"
        path.parent.mkdir()
    before = {p.name: p.read_bytes() for p in path.parent.iterdir() if p.is_file()}

    def fail(*_, **__):
        raise OSError("no space left on device")

    card = {"fine": 1}
    if where == "tensors":
        monkeypatch.setattr(Path, "write_bytes", fail)
    elif where == "disk":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        card = {"tensor": torch.zeros(1)}
    policy = trained()
    with torch.no_grad():
        policy.network.out.bias.add_(1)
    with pytest.raises((OSError, TypeError)):
        ls.save_artefact(policy, path, card)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in path.parent.iterdir() if p.is_file()} == before
    if existing:
        ls.load_pretrained(path)


def test_a_card_whose_numbers_are_not_finite_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        ls.save_artefact(trained(), tmp_path / "p.safetensors", {"error": float("nan")})
    assert not list(tmp_path.iterdir())


def test_names_are_those_of_the_folder(monkeypatch, made):
    folder = made.parent / "registry"
    folder.mkdir()
    monkeypatch.setattr(artefact, "_HERE", folder)
    assert ls.list_pretrained() == []
    for name in ("later", "early"):
        ls.save_artefact(trained(), folder / f"{name}.safetensors", {"name": name})
    (folder / ".early.safetensors.tmp.safetensors").write_bytes(b"")
    assert ls.list_pretrained() == ["early", "later"]
    assert ls.load_pretrained("early").config() == trained().config()
    assert ls.pretrained_card("later")["name"] == "later"


@pytest.mark.parametrize("name", ls.list_pretrained())
def test_every_artefact_of_the_package_loads_with_a_card_of_its_making(name):
    policy = ls.load_pretrained(name)
    found = plan(policy, RunInfo(RUN.layers, 12, 20))
    assert found.table.isfinite().all()
    assert all(s.is_terminal for s in found.settings(11))
    card = ls.pretrained_card(name)
    assert set(card) > {"format", "feature_schema", "sha256", "config"}
    copy = Path(artefact.__file__).with_name(f"{name}.json")
    assert json.loads(copy.read_text(encoding="utf-8")) == card, "run embed_card"


def test_the_card_beside_an_artefact_is_a_copy_that_nothing_reads(path):
    beside = path.with_suffix(".json")
    assert json.loads(beside.read_text()) == ls.pretrained_card(path)
    beside.write_text("{")
    assert ls.pretrained_card(path)["reached"] == {"digits": 0.9}
    beside.unlink()
    ls.load_pretrained(path)


def test_a_card_edited_by_hand_is_put_into_its_artefact(path):
    before = read(path)[0]
    beside = path.with_suffix(".json")
    card = json.loads(beside.read_text()) | {"limits": "none known"}
    beside.write_text(json.dumps(card))
    assert embed_card(path) == path
    assert ls.pretrained_card(path) == card
    assert all(torch.equal(v, before[k]) for k, v in read(path)[0].items())


REFUSED = {
    "other tensors": {"sha256": "0" * 64},
    "another schema": {"feature_schema": 2},
    "another size": {"config": trained().config() | {"hidden": 7}},
}


@pytest.mark.parametrize("changes", REFUSED.values(), ids=REFUSED)
def test_a_card_of_something_else_is_not_embedded(path, changes):
    before = path.read_bytes()
    beside = path.with_suffix(".json")
    beside.write_text(json.dumps(json.loads(beside.read_text()) | changes))
    with pytest.raises(SystemExit, match="embed_card: "):
        main([str(path)])
    assert path.read_bytes() == before
    beside.write_bytes(b"\xff{}")
    with pytest.raises(SystemExit, match=r"embed_card: the card of .* cannot be read"):
        main([str(path)])
    beside.unlink()
    with pytest.raises(SystemExit, match="No such file"):
        main([str(path)])


@pytest.mark.skipif(not ls.list_pretrained(), reason="no artefact has been trained yet")
def test_the_default_is_there():
    assert "default" in ls.list_pretrained()


def test_the_artefact_for_tables_is_its_curves_alone():
    policy = ls.load_pretrained("tables")
    assert policy.base == TABLES
    for dims, activations, fine_tuning in (
        (0, 4, False),
        (2, 4, True),
        (1, 3, False),
        (2, 0, False),
    ):
        layers = tuple(LayerInfo(name, 20, 3, activations, dims) for name in "abc")
        run = RunInfo(layers, 10, 20, fine_tuning)
        found, expected = plan(policy, run).table, plan(TABLES, run).table
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_artefacts_are_read_under_another_default_dtype():
    expected = ls.load_pretrained("default").network.state_dict()
    torch.set_default_dtype(torch.float64)
    try:
        found = ls.load_pretrained("default").network.state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_reading_an_artefact_draws_nothing_from_the_global_generator():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    ls.load_pretrained("default")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda network: network.double(), "float64"),
        (lambda n: n.out.bias.data.fill_(torch.nan), "finite"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(tmp_path, spoil, message):
    network = MetaNetwork()
    spoil(network)
    with pytest.raises(ls.ArtefactError, match=message):
        ls.save_artefact(LearnedPolicy(network), tmp_path / "a.safetensors", {})
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_name_is_no_artefact(tmp_path):
    (tmp_path / "schedule.json").write_text("{}")
    with pytest.raises(ls.ArtefactError, match=r"no artefact: their names end in \.safetensors"):
        ls.load_pretrained(tmp_path / "schedule.json")
