"""The README's way from training to a runtime runs as it stands."""

import re
from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.slow
def test_the_whole_way(tmp_path, monkeypatch, capsys):
    section = README.read_text(encoding="utf-8").split("## Export\n")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    accuracies = [float(line.rsplit(": ")[1].rstrip("%")) for line in lines]
    assert len(accuracies) == 3 and len(set(accuracies)) == 1
    assert accuracies[0] > 90
