"""The folder of a run of meta-training: its configuration, its log and its checkpoint.

Whole at any time: the checkpoint is written last, each file in one step.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from learnsched.choices import whole_number
from learnsched.differences import differences
from learnsched.digest import digest
from learnsched.files import write, write_text
from learnsched.json_numbers import as_json, from_json
from learnsched.meta.tasks import Task
from learnsched.policies.domain import LATER_RANGES
from learnsched.policies.learned import LATER_CHOICES

_CONFIG, _LOG, _CHECKPOINT = "config.json", "log.jsonl", "checkpoint.safetensors"


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Say which run the folder belongs to, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / _CONFIG, json.dumps(config, indent=1, default=operator.index))


def is_begun(folder: Path) -> bool:
    """Whether the folder holds a run, or a part of one, of whatever configuration.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> begun = is_begun(folder)
        >>> write_config(folder, {"seed": 0})
        >>> begun, is_begun(folder)
        (False, True)
    """
    return any((folder / part).exists() for part in (_CONFIG, _CHECKPOINT))


def has_run(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the folder holds this run.

    Raises:
        FileExistsError: it holds another one; the message names what differs.
        FileNotFoundError: it holds a checkpoint without its configuration.
        ValueError: the configuration there is damaged.
    """
    path = folder / _CONFIG
    if path.exists():
        _check_config(path, json.loads(json.dumps(config, default=operator.index)))
        return True
    if (folder / _CHECKPOINT).exists():
        raise FileNotFoundError(
            f"{folder / _CHECKPOINT} is there and its configuration {path} is not, without which nobody "
            "knows which run it belongs to; put it back, or choose another folder"
        )
    return False


def _check_config(path: Path, config: dict[str, Any]) -> None:
    """Refuse a folder whose run is another one."""
    try:
        stored = json.loads(path.read_text())
        # The run may have begun before policies had all their choices and ranges, and tasks all
        # their fields. Its mix, which tells the ranges, is checked anyway.
        stored["policy"] = dict.fromkeys(LATER_CHOICES, False) | stored["policy"]
        ranges = {name: config["policy"]["domain"][name] for name in LATER_RANGES}
        stored["policy"]["domain"] = ranges | stored["policy"]["domain"]
        later = {f.name: f.default for f in fields(Task) if f.default is not MISSING}
        tasks = stored["trainer"]["validation"]
        stored["trainer"]["validation"] = [later | task for task in tasks]
        stored = {part: config[part] for part in ("data", "start")} | stored
        stored["data"] = {
            name: {"validation": config["data"].get(name, {}).get("validation")} | sizes
            for name, sizes in stored["data"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); choose another folder") from error
    found = ", ".join(key for key, _, _ in differences(stored, config))
    if found:
        raise FileExistsError(
            f"{path.parent} holds a run of another configuration: {path} differs in {found}; "
            "choose another folder, or the same preset, seed and options as before"
        )


def save_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]
) -> None:
    """Write what :func:`load_checkpoint` reads, and the log, which is one of the scalars."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    told = {"trainer": json.dumps(scalars), "digest": digest(contiguous)}
    data = save(contiguous, metadata=told)
    # The checkpoint comes last: once the last one is there, so is the whole log.
    lines = "".join(json.dumps(as_json(e), allow_nan=False) + "\n" for e in scalars["log"])
    write_text(folder / _LOG, lines)
    write(folder / _CHECKPOINT, lambda temporary: temporary.write_bytes(data))


def load_checkpoint(
    folder: Path, like: Mapping[str, Tensor], names: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and scalars of the folder's checkpoint, or None if it has none yet.

    Args:
        folder: of the run.
        like: tensors of the names and shapes that are expected.
        names: of the scalars.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    path = folder / _CHECKPOINT
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata()
            stored, written = json.loads(told["trainer"]), told.get("digest")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        scalars = {name: stored[name] for name in names}
        _check_scalars(scalars)
        if _shapes(tensors) != _shapes(like):
            raise ValueError("its tensors are not those of this network")
        if written not in (None, digest(tensors)):
            raise ValueError("its tensors are not what was written")
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); remove it to start this run again"
        ) from error
    return tensors, scalars


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a run's ``log.jsonl``, as :attr:`MetaTrainer.log` has them.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is no JSON.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "log.jsonl"
        >>> _ = path.write_text('{"step": 1, "outer_loss": "nan"}\\n')
        >>> read_log(path)
        [{'step': 1, 'outer_loss': nan}]
    """
    entries = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [from_json(entry) for entry in entries]


def _check_scalars(scalars: Mapping[str, Any]) -> None:
    """Refuse what no run writes beside its tensors.

    Raises:
        TypeError, ValueError: a number is none or out of its range, or the log is no list of entries.
    """
    for name in ("step", "best_step"):
        whole_number(name, scalars[name], least=0)
    for name in ("seconds", "best_error", "typical_norm"):
        if not isinstance(scalars[name], float | int) or scalars[name] < 0:
            raise ValueError(f"{name} must be a number of at least 0, got {scalars[name]!r}")
    log = scalars["log"]
    if not (isinstance(log, list) and all(isinstance(entry, dict) for entry in log)):
        raise ValueError(f"log must be a list of entries, got {log!r}")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
