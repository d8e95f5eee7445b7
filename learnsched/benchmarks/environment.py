"""Results as files, with what they were made with: versions, machine, date and commit."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from learnsched.files import write_text


def describe() -> dict[str, str | int]:
    """Versions, machine, date and commit, as JSON data."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "higher": _version("higher"),
        "numpy": _version("numpy"),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
    }


def write_results(path: Path | None, content: Mapping[str, Any]) -> None:
    """Write results and their ``environment``, unless they bring one; without a path, nothing."""
    if path is not None:
        whole = {"environment": describe()} | dict(content)
        write_text(path, json.dumps(whole, indent=1) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, such as a run's log; empty lines are none.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "log.jsonl"
        >>> _ = path.write_text('{"step": 1}\\n{"step": 2}\\n')
        >>> read_lines(path)
        [{'step': 1}, {'step': 2}]
    """
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def _version(package: str) -> str:
    """Of an installed package; empty if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """The commit of the checkout, with a mark if its code was changed; empty outside a checkout.

    Results are no code: those that a program writes as it goes do not put a mark on its next ones.
    """
    code = [":/learnsched", ":/meta_train.py", ":/setup.cfg"]
    try:
        commit = _git("describe", "--always", "--abbrev=12")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", *code)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{commit}-dirty" if changed else commit


def _git(*arguments: str) -> str:
    result = subprocess.run(
        ["git", *arguments],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), "")
