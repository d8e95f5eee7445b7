"""Reading and writing artefacts, and the registry of those that come with the package."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from learnsched.digest import digest
from learnsched.files import write, write_text
from learnsched.policies.features import FEATURE_SCHEMA
from learnsched.policies.learned import LATER_CHOICES, LearnedPolicy, completed

FORMAT_VERSION = 2

_HERE = Path(__file__).parent

# A meta-network has a few thousand parameters; anything much larger is not one.
_MOST_BYTES = 4_000_000
_MOST_UNITS = 256
_MOST_CASES = 64


class ArtefactError(ValueError):
    """An artefact is missing, damaged, altered, or of another schema or version.

    Example:
        >>> try:
        ...     load_pretrained("no such name")
        ... except ArtefactError as error:
        ...     print(str(error)[:54])
        there is no pretrained schedule 'no such name'; give o
    """


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
        name_or_path: a name of :func:`list_pretrained`, or the path of a ``.safetensors`` file, as
            ``meta_train.py`` writes it.

    Returns:
        the policy; its parameters do not require gradients.

    Raises:
        ArtefactError: the file is missing, damaged or altered, or of another schema or version.
        OSError: it is there and cannot be read.
        TypeError: it is neither a name nor a path.

    Example:
        >>> policy = load_pretrained("default")
        >>> policy.metrics
        ('train_loss',)
    """
    path = _path(name_or_path)
    card, tensors = _read(path)
    return policy_of(card, tensors, path)


def pretrained_card(name_or_path: str | Path) -> dict[str, Any]:
    """The card of an artefact: how it was made, what it reached, its limits.

    Raises:
        ArtefactError: the file is missing, damaged or altered, or of another schema or version.

    Example:
        >>> pretrained_card("default")["config"]["open_loop"]
        False
    """
    return _read(_path(name_or_path))[0]


def save_artefact(policy: LearnedPolicy, path: str | Path, card: Mapping[str, Any]) -> Path:
    """Write a policy with its card, whole or not at all, and a copy of the card for people.

    Args:
        policy: what to save.
        path: ends in ``.safetensors``; the copy of the card goes beside it, ending in ``.json``.
        card: JSON data to keep with it; format, schema, configuration and SHA-256 are added.

    Returns:
        the path of the artefact.

    Raises:
        OSError: the folder cannot be written.
        TypeError: the card is not JSON data.
        ValueError: the path does not end in ``.safetensors``, a number of the card is not finite, or the
            artefact would be too large.
        ArtefactError: it could not be read again: the network is not finite, or not of float32.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "copy.safetensors"
        >>> path = save_artefact(load_pretrained("default"), path, {"limits": "those of default"})
        >>> pretrained_card(path)["limits"]
        'those of default'
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"an artefact is saved under a name ending in .safetensors, got {path}")
    tensors = {n: t.detach().cpu().contiguous() for n, t in policy.network.state_dict().items()}
    own = {
        "format": FORMAT_VERSION,
        "feature_schema": FEATURE_SCHEMA,
        "sha256": digest(tensors),
        "config": policy.config(),
    }
    # What describes the file comes last again: the card may be that of another artefact.
    text = json.dumps({**own, **card, **own}, indent=2, allow_nan=False) + "\n"
    policy_of(json.loads(text), tensors, path)  # nothing is written that could not be read
    # One entry: safetensors writes several in random order.
    data = save(tensors, metadata={"card": f"{_sha256(text)}\n{text}"})
    if len(data) > _MOST_BYTES:
        raise ValueError(f"an artefact has at most {_MOST_BYTES} bytes, this one {len(data)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, lambda temporary: temporary.write_bytes(data))
    write_text(path.with_suffix(".json"), text)
    return path


def policy_of(
    card: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], path: Path
) -> LearnedPolicy:
    """The policy that a card and tensors, read from ``path``, describe.

    Raises:
        ArtefactError: they do not describe one.
    """
    try:
        policy = _policy(card["config"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ArtefactError(f"{path} does not hold a learned policy: {error!r}") from error
    _fill(policy, tensors, path)
    return policy


def read_limited(path: Path) -> bytes:
    """The bytes of a file that is no larger than an artefact.

    Raises:
        ArtefactError: it is larger.
    """
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ArtefactError(f"{path} is larger than {_MOST_BYTES} bytes: not a learned policy")
    return data


def parse_tensors(data: bytes, path: Path) -> dict[str, torch.Tensor]:
    """The tensors in the bytes of a safetensors file.

    Raises:
        ArtefactError: they are not those of a safetensors file.
    """
    try:
        return load(data)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtefactError(f"{path} is not a safetensors file: {error!r}") from error


def parse_card(text: str | bytes, path: Path) -> dict[str, Any]:
    """A card's JSON, of whatever version.

    Raises:
        ArtefactError: it is no JSON object.
    """
    try:
        card = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"the card of {path} cannot be read: {error}") from error
    if not isinstance(card, dict):
        raise ArtefactError(f"the card of {path} is a {type(card).__name__}, not a JSON object")
    return card


def _path(name_or_path: str | Path) -> Path:
    if isinstance(name_or_path, str) and name_or_path in list_pretrained():
        return _HERE / f"{name_or_path}.safetensors"
    if not isinstance(name_or_path, str | os.PathLike):
        raise TypeError(f"an artefact is given by its name or path, got {name_or_path!r}")
    path = Path(name_or_path)
    there = os.path.isfile(path)  # not path.is_file(), which fails where a name is too long
    if path.suffix != ".safetensors" and there:
        raise ArtefactError(f"{path} is no artefact: their names end in .safetensors")
    if not there:
        raise ArtefactError(
            f"there is no pretrained schedule {str(name_or_path)!r}; give one of "
            f"{list_pretrained()} or the path of a .safetensors file"
        )
    return path


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Card and tensors of an artefact, each checked against its SHA-256."""
    data = read_limited(path)
    tensors = parse_tensors(data, path)
    entry = _metadata(data).get("card")
    if not isinstance(entry, str):
        raise ArtefactError(
            f"{path} holds no card: it is no artefact of learnsched, or one of format 1; train it again"
        )
    checksum, _, text = entry.partition("\n")
    if checksum != _sha256(text):
        raise ArtefactError(f"the card of {path} is damaged or was altered; get the file anew")
    card = parse_card(text, path)
    for key, expected in (("format", FORMAT_VERSION), ("feature_schema", FEATURE_SCHEMA)):
        if card.get(key) != expected:
            raise ArtefactError(
                f"{path} has {key} {card.get(key)!r}, this version of learnsched reads {expected}; "
                "install the version that made it, or train it again"
            )
    if card.get("sha256") != digest(tensors):
        raise ArtefactError(
            f"the tensors of {path} are not those that its card describes: the file is damaged or was "
            "altered; get it anew"
        )
    return card, tensors


def _metadata(data: bytes) -> dict[str, Any]:
    """The text in the header of a file that ``load`` has accepted."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata: dict[str, Any] = header.get("__metadata__") or {}
    return metadata


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _policy(config: Any) -> LearnedPolicy:
    for units in (config["hidden"], config["embedding"]):
        if type(units) is not int or not 1 <= units <= _MOST_UNITS:
            raise ValueError(f"a meta-network has 1 to {_MOST_UNITS} units, not {units!r}")
    for name in ("open_loop", *LATER_CHOICES):
        if type(choice := config.get(name, False)) is not bool:
            raise ValueError(f"{name} is true or false, not {choice!r}")
    if not 1 <= len(config["base"]) <= _MOST_CASES:
        raise ValueError(f"a policy has 1 to {_MOST_CASES} base curves, not {len(config['base'])}")
    if not all(type(case["fine_tuning"]) is bool for case in config["base"]):
        raise ValueError("fine_tuning is true or false")
    numbers = [
        *(n for case in config["base"] for n in case["curve"].values()),
        *(case[key] for case in config["base"] for key in ("weight_levels", "activation_levels")),
        *(n for seen in config["domain"].values() for n in seen),
    ]
    if not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
        raise ValueError("base curves and the domain are made of finite numbers")
    policy = LearnedPolicy.from_config(config)
    if policy.config() != completed(config):
        raise ValueError(f"the configuration is not whole, or has more in it: {config}")
    return policy


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
