"""Every figure of the notebooks; the only module that imports matplotlib.

Each function returns a figure that shows itself, once, as the last line of a notebook cell (use
`display(fig)` elsewhere), and carries an `alt_text` for those who cannot see it; `save` writes
both into a PNG. No figure is registered with pyplot, so none stays open. Colours are those of
Okabe and Ito (2008), which nearly everybody can tell apart.
"""

from minildm.plots.boxes import boxed
from minildm.plots.charts import bars, curves, loss_against_t, loss_curves, schedule_curves
from minildm.plots.points import arrows, clouds, paths
from minildm.plots.sheets import (
    class_grid,
    image_grid,
    label_pictures,
    latent_maps,
    pairs,
    trajectory,
    word_maps,
)
from minildm.plots.style import BLUE, DPI, FRAME, GAP, LINE, PALETTE, RED, NotebookFigure, save

__all__ = [
    "BLUE",
    "DPI",
    "FRAME",
    "GAP",
    "LINE",
    "PALETTE",
    "RED",
    "NotebookFigure",
    "arrows",
    "bars",
    "boxed",
    "class_grid",
    "clouds",
    "curves",
    "image_grid",
    "label_pictures",
    "latent_maps",
    "loss_against_t",
    "loss_curves",
    "pairs",
    "paths",
    "save",
    "schedule_curves",
    "trajectory",
    "word_maps",
]
