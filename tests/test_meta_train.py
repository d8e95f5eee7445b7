"""The command line of ``meta_train.py``, as far as it is refused."""

import runpy
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "meta_train.py"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "foo"], "--device must be cpu or cuda, got 'foo'"),
        (["--device", "meta"], "--device must be cpu or cuda, got 'meta'"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
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
