"""What all figures share: the figure itself, its colours and type, how it is saved."""

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from minildm.files import atomic_write

DPI = 120
BLUE, RED = "#0072B2", "#D55E00"
PALETTE = (BLUE, "#E69F00", "#009E73", "#CC79A7", "#56B4E9", RED, "#000000", "#F0E442")
FRAME = 214  # grey of the line round a picture: most are drawn on white
GAP, LINE = 6, 16  # pixels: between pictures; a line's height
STYLE: dict[Any, Any] = {"font.size": 9.0, "axes.titlesize": 10.0, "legend.frameon": False}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"axes.grid": True, "axes.axisbelow": True, "grid.color": "#e4e4e4"}
styled = plt.rc_context(STYLE)  # as a decorator: the user's own settings are left alone
Names, Numbers, Text = Sequence[str] | None, Sequence[float] | Tensor, str | None


class NotebookFigure(Figure):
    """A Figure apart from pyplot, with an `alt_text`; notebooks show it, with that text."""

    alt_text: str = ""

    def _repr_mimebundle_(self, **_kwargs: Any) -> tuple[dict[str, str], dict[str, Any]]:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=DPI)
        picture = base64.b64encode(file.getvalue()).decode()
        return {"image/png": picture}, {"image/png": {"alt": self.alt_text}}


def save(fig: Figure, path: str | os.PathLike[str], alt: Text = None) -> Path:
    """Write a PNG, atomically, with `alt` (else `fig.alt_text`) as its Description; close `fig`.

    Raises ValueError where the path does not end in .png, or there is no text at all.
    """
    path, alt = Path(path), alt or getattr(fig, "alt_text", "")
    if path.suffix.lower() != ".png":
        raise ValueError(f"path={str(path)!r} must end in .png")
    if not alt:
        raise ValueError("alt is missing: say in a sentence what the figure shows")
    with atomic_write(path) as file:
        fig.savefig(file, format="png", dpi=DPI, metadata={"Description": alt, "Software": None})
    plt.close(fig)
    return path


def chart(width: float, height: float, panels: int = 1) -> tuple[NotebookFigure, list[Axes]]:
    """A figure with panels of the given size in inches, two in a row."""
    columns, lines = min(panels, 2), -(-panels // 2)
    fig = NotebookFigure((width * columns, height * lines), dpi=DPI, layout="constrained")
    return fig, [fig.add_subplot(lines, columns, i + 1) for i in range(panels)]


def log_axis(ax: Axes, which: str) -> None:
    """Make "x" or "y" logarithmic with plain numbers, when all is drawn: 0.2, 0.5, 1."""
    ax.set(**{f"{which}scale": "log"})
    axis, (low, high) = getattr(ax, f"{which}axis"), getattr(ax, f"get_{which}lim")()
    if high < 10 * low:  # 1, 2, 5 would be one number, or none
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    elif high < 1000 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def legend_below(fig: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """A legend under all panels, in as many columns, at most four, as the figure is wide for."""
    for columns in range(4, 0, -1):
        legend = fig.legend(handles, labels, loc="outside lower center", ncols=columns)
        if columns == 1 or legend.get_window_extent().width <= fig.bbox.width:
            return
        legend.remove()
