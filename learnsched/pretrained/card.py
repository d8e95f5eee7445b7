"""The model card of an artefact, for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_TITLES = {
    "made": "How it was made",
    "held_out": "Test accuracy on held-out tasks",
    "config": "Configuration",
}
_OWN = ("format", "feature_schema", "sha256", "name", "limits")


def render_card(card: Mapping[str, Any]) -> str:
    """A card as Markdown: what it is, its limits, then every other entry as a list.

    Args:
        card: as :func:`learnsched.pretrained_card` gives it.

    Example:
        >>> print(render_card({"name": "mine", "limits": "Digits only.", "made": {"seed": 0}}))
        # mine
        <BLANKLINE>
        A learned schedule for training 1- and 2-bit networks with learnsched.
        <BLANKLINE>
        **Limits.** Digits only.
        <BLANKLINE>
        ## How it was made
        <BLANKLINE>
        - seed: 0
    """
    lines = [
        f"# {card.get('name', 'unnamed')}",
        "",
        "A learned schedule for training 1- and 2-bit networks with learnsched.",
        "",
        f"**Limits.** {card.get('limits', 'Not stated; see the task mix and the domain below.')}",
    ]
    for key, value in card.items():
        if key not in _OWN:
            lines += ["", f"## {_TITLES.get(key, key.replace('_', ' ').capitalize())}", ""]
            lines += _items(value) if isinstance(value, Mapping) else [_text(value)]
    if "sha256" in card:
        lines += ["", "## File", ""]
        lines += _items({key: card[key] for key in _OWN[:3] if key in card})
    # A card comes from anywhere: it may not steer the terminal that shows it.
    return "\n".join("".join(c if c.isprintable() else " " for c in line) for line in lines)


def _items(values: Mapping[str, Any], indent: str = "") -> list[str]:
    lines = []
    for key, value in values.items():
        name = key.replace("_", " ")
        if isinstance(value, Mapping):
            lines += [f"{indent}- {name}:", *_items(value, indent + "  ")]
        else:
            lines.append(f"{indent}- {name}: {_text(value)}")
    return lines


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
