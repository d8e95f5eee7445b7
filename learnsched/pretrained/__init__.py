"""Pretrained schedules: artefacts of data only, checked before anything is made of them.

An artefact is one file, ``NAME.safetensors``: the meta-network's tensors, and in its header the card:
how it was made, what it reached, its configuration and feature schema, and the SHA-256 of the tensors.
The card has a SHA-256 of its own. ``NAME.json`` beside it is a copy of the card for people, which
loading does not read. After editing it, ``python -m learnsched.pretrained.embed_card NAME.safetensors``
puts it in.
"""

from learnsched.pretrained.artefact import (
    ArtefactError,
    list_pretrained,
    load_pretrained,
    pretrained_card,
    save_artefact,
)

__all__ = [
    "ArtefactError",
    "list_pretrained",
    "load_pretrained",
    "pretrained_card",
    "save_artefact",
]
