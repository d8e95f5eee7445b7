"""The command line of ``meta_train.py``: what it refuses, and what it says at the start."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from learnsched.meta.presets import PRESETS

PROGRAM = Path(__file__).parents[1] / "meta_train.py"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "foo"], "--device must be cpu or cuda, got 'foo'"),
        (["--device", "meta"], "--device must be cpu or cuda, got 'meta'"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--seed", "9" * 23], f"--seed must lie between -2**63 and 2**63 - 1, got {'9' * 23}"),
    ],
)
def test_bad_options_are_an_error_of_one_line_and_leave_no_folder(
    options, message, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    monkeypatch.setattr("sys.argv", [str(PROGRAM), "--out", str(folder), *options])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    assert exit.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not folder.exists()


def started(folder, monkeypatch, *options):
    """The program as a module, about to train in a folder on a small mix of its preset."""
    program = runpy.run_path(str(PROGRAM))
    monkeypatch.setattr("sys.argv", [str(PROGRAM), "--out", str(folder), "--no-report", *options])
    quick = PRESETS["quick"]
    mix = replace(
        quick.trainer.mix, architectures=(("digits", "mlp", (4,), (2,)),), horizons=(2,),
        total_steps=(4, 4), members=2, tasks=1,
    )  # fmt: skip
    trainer = replace(quick.trainer, mix=mix, validation=())
    monkeypatch.setitem(PRESETS, "quick", replace(quick, trainer=trainer))
    return program["main"]


def test_a_run_is_not_resumed_for_fewer_steps_than_it_has_taken(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    started(folder, monkeypatch, "--steps", "2")()
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(
        SystemExit, match=r"has taken 2 outer steps; --steps .* is 1; give 2 or more"
    ):
        started(folder, monkeypatch, "--steps", "1", "--resume")()
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_what_changes_of_an_artefact_is_said(tmp_path, monkeypatch, capsys):
    started(tmp_path / "run", monkeypatch, "--steps", "1", "--from", "default")()
    said = capsys.readouterr().err
    assert "the network of default and these changes" in said
    assert "\n  moved_start: False -> True\n" in said
    assert "\n  domain.horizon: [6, 20] -> [2, 2]\n" in said
    assert "shared_noise" not in said  # it is the same
    source = tmp_path / "run" / "schedule.safetensors"
    started(tmp_path / "again", monkeypatch, "--steps", "1", "--from", str(source))()
    assert "these changes" not in capsys.readouterr().err
