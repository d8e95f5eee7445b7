"""What all figures share: the look of a paper's figure in black and white, and safe writing."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from learnsched.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "os^Dv><P"
DASHES = ("-", "--", "-.", ":")


def paper_style() -> AbstractContextManager[None]:
    """A matplotlib context; the caller's settings return after it.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("figures need matplotlib; pip install 'learnsched[plot]'") from error
    return matplotlib.rc_context(
        {
            "font.family": ["STIXGeneral", "DejaVu Sans"],
            "font.size": 9,
            "axes.titlesize": 9,
            "figure.titlesize": 10,
            "xtick.labelsize": 8,
            "ytick.labelsize": 8,
            "legend.fontsize": 8,
            "legend.frameon": False,
            "legend.handlelength": 3.5,
            "axes.linewidth": 0.6,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "lines.linewidth": 1.0,
            "lines.markersize": 4,
            "lines.markeredgewidth": 0.8,
            "figure.dpi": 150,
            "savefig.dpi": 150,
            # names of layers and methods are no formulas
            "text.parse_math": False,
        }
    )


def save_figure(figure: Figure, path: str | os.PathLike[str] | None) -> None:
    """Write the whole file or nothing, in the format of its suffix (PNG without one).

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
    """
    if path is None:
        return
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder {target.parent} does not exist; make it first")
    with replacing(target) as partial:
        figure.savefig(partial, format=target.suffix[1:] or "png")
