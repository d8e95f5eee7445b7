"""Reading and writing artefacts, and the registry of those that come with the package."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from learnsched.files import replacing
from learnsched.policies.learned import FEATURE_SCHEMA, LearnedPolicy

FORMAT_VERSION = 1

_HERE = Path(__file__).parent

# A meta-network has a few thousand parameters; anything much larger is not one.
_MOST_BYTES = 4_000_000
_MOST_UNITS = 1024


class ArtefactError(ValueError):
    """An artefact is missing, damaged, altered, or of another schema or version."""


def list_pretrained() -> list[str]:
    """Names that :func:`load_pretrained` knows.

    Example:
        >>> "default" in list_pretrained()
        True
    """
    return sorted(path.stem for path in _HERE.glob("[!.]*.safetensors"))


def load_pretrained(name_or_path: str | Path) -> LearnedPolicy:
    """A frozen learned policy, ready for ``QuantizationScheduler``.

    Args:
        name_or_path: a name of :func:`list_pretrained`, or the path of a ``.safetensors`` file with
            its card beside it, as ``meta_train.py`` writes them.

    Returns:
        the policy; its parameters do not require gradients.

    Raises:
        ArtefactError: a file is missing, truncated or altered, or of another schema or version.

    Example:
        >>> policy = load_pretrained("default")
        >>> policy.metrics
        ('train_loss',)
    """
    path = _path(name_or_path)
    card = _read_card(path)
    data = _read_bytes(path)
    digest = hashlib.sha256(data).hexdigest()
    if card.get("sha256") != digest:
        raise ArtefactError(
            f"{path} is not the file that its card describes (SHA-256 {digest[:12]}…, the card says "
            f"{str(card.get('sha256'))[:12]}…): it is damaged or was altered; get both files anew"
        )
    try:
        tensors = load(data)
        policy = _policy(card["config"])
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtefactError(f"{path} does not hold a learned policy: {error!r}") from error
    _fill(policy, tensors, path)
    return policy


def pretrained_card(name_or_path: str | Path) -> dict[str, Any]:
    """The card of an artefact: how it was made, what it reached, its limits.

    Raises:
        ArtefactError: there is no such card, or it is of another schema or version.
    """
    return _read_card(_path(name_or_path))


def save_artefact(policy: LearnedPolicy, path: str | Path, card: Mapping[str, Any]) -> Path:
    """Write a policy and its card.

    Args:
        policy: what to save.
        path: ends in ``.safetensors``; the card goes beside it.
        card: JSON data to keep with it; format, schema, configuration and SHA-256 are added.

    Returns:
        the path of the tensors' file.

    Raises:
        ValueError: the path does not end in ``.safetensors``.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"an artefact is saved under a name ending in .safetensors, got {path}")
    tensors = {n: t.detach().cpu().contiguous() for n, t in policy.network.state_dict().items()}
    data = save(tensors)
    own = {
        "format": FORMAT_VERSION,
        "feature_schema": FEATURE_SCHEMA,
        "sha256": hashlib.sha256(data).hexdigest(),
        "config": policy.config(),
    }
    # What describes the file comes last again: the card may be that of another artefact.
    text = json.dumps({**own, **card, **own}, indent=2) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as tensor_file, replacing(path.with_suffix(".json")) as card_file:
        tensor_file.write_bytes(data)
        card_file.write_text(text, encoding="utf-8")
    return path


def _path(name_or_path: str | Path) -> Path:
    if isinstance(name_or_path, str) and name_or_path in list_pretrained():
        return _HERE / f"{name_or_path}.safetensors"
    path = Path(name_or_path)
    if path.suffix != ".safetensors" or not path.is_file():
        raise ArtefactError(
            f"there is no pretrained schedule {str(name_or_path)!r}; give one of "
            f"{list_pretrained()} or the path of a .safetensors file"
        )
    return path


def _read_bytes(path: Path) -> bytes:
    if path.stat().st_size > _MOST_BYTES:
        raise ArtefactError(f"{path} is larger than {_MOST_BYTES} bytes: not a learned policy")
    return path.read_bytes()


def _read_card(path: Path) -> dict[str, Any]:
    where = path.with_suffix(".json")
    if not where.is_file():
        raise ArtefactError(f"the card {where} is missing; it belongs beside {path.name}")
    try:
        card = json.loads(_read_bytes(where).decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ArtefactError(f"{where} is not a card: {error}") from error
    if not isinstance(card, dict):
        raise ArtefactError(f"{where} is not a card: it holds a {type(card).__name__}")
    for key, expected in (("format", FORMAT_VERSION), ("feature_schema", FEATURE_SCHEMA)):
        if card.get(key) != expected:
            raise ArtefactError(
                f"{where} has {key} {card.get(key)!r}, this version of learnsched reads {expected}; "
                "install the version that made it, or train it again"
            )
    return card


def _policy(config: Any) -> LearnedPolicy:
    for units in (config["hidden"], config["embedding"]):
        if not isinstance(units, int) or not 1 <= units <= _MOST_UNITS:
            raise ValueError(f"a meta-network has 1 to {_MOST_UNITS} units, not {units!r}")
    numbers = [*config["base"].values(), *(n for r in config["domain"].values() for n in r)]
    if not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
        raise ValueError("the base curve and the domain are made of finite numbers")
    return LearnedPolicy.from_config(config)


def _fill(policy: LearnedPolicy, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    expected = policy.network.state_dict()
    if tensors.keys() != expected.keys():
        raise ArtefactError(f"{path} has tensors {sorted(tensors)}, expected {sorted(expected)}")
    for name, tensor in tensors.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            raise ArtefactError(
                f"{name} in {path} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"expected {wanted.dtype} {tuple(wanted.shape)}"
            )
        if not bool(tensor.isfinite().all()):
            raise ArtefactError(f"{name} in {path} is not finite")
    policy.network.load_state_dict(dict(tensors))
    policy.network.requires_grad_(False)
