"""Pretrained schedules: artefacts of data only, checked before anything is made of them.

An artefact is two files beside each other: ``NAME.safetensors`` with the meta-network's tensors, and
``NAME.json``, its card: how it was made, what it reached, its feature schema, and the SHA-256 of the
tensors' file.
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
