"""Put the card beside an artefact into it, after it was edited by hand.

    python -m learnsched.pretrained.embed_card PATH.safetensors

The tensors stay as they are, and must be those that ``PATH.json`` describes; what else stands there, the
policy's configuration included, becomes the artefact's card.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from learnsched.digest import digest
from learnsched.policies.features import FEATURE_SCHEMA
from learnsched.pretrained.artefact import (
    ArtefactError,
    parse_card,
    parse_tensors,
    policy_of,
    read_limited,
    save_artefact,
)


def embed_card(path: str | Path) -> Path:
    """Write an artefact anew with the card that lies beside it.

    Args:
        path: of the ``.safetensors`` file.

    Returns:
        the path.

    Raises:
        ArtefactError: a file is damaged, the tensors are not those that the card describes, or they
            are of another feature schema.
        OSError: a file is missing or cannot be written.
    """
    path = Path(path)
    where = path.with_suffix(".json")
    card = parse_card(read_limited(where), where)
    if card.get("feature_schema") != FEATURE_SCHEMA:
        raise ArtefactError(f"{path} is of another feature schema; train it again")
    tensors = parse_tensors(read_limited(path), path)
    if card.get("sha256") != digest(tensors):
        raise ArtefactError(f"{path} does not hold the tensors that {where.name} describes")
    return save_artefact(policy_of(card, tensors, path), path, card)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m learnsched.pretrained.embed_card",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", type=Path, help="the .safetensors file")
    options = parser.parse_args(arguments)
    try:
        print(f"wrote {embed_card(options.path)}")
    except (ArtefactError, OSError, ValueError) as error:
        sys.exit(f"embed_card: {error}")


if __name__ == "__main__":
    main()
