"""Points of the plane: data small enough to see a distribution whole."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from minildm.plots.style import PALETTE, RED, NotebookFigure, styled


@styled
def clouds(
    panels: Mapping[str, Tensor],
    *,
    groups: Tensor | None = None,
    backdrop: Tensor | None = None,
    columns: int = 4,
    reach: float = 3.0,
) -> NotebookFigure:
    """A panel for each named cloud of points, (N, 2) or (N, 2, 1, 1), all on the same axes.

    groups: (N,) int, a colour each, for all panels. backdrop: points drawn grey beneath all.
    reach: the plane is shown from -reach to reach.
    """
    fig, axes = _plane(panels, columns, reach, backdrop)
    for ax, (title, cloud) in zip(axes, panels.items(), strict=True):
        x = _xy(cloud, title, 2)
        color = PALETTE[0]
        if groups is not None:
            if groups.shape != (len(x),):
                raise ValueError(f"groups must be ({len(x)},) as {title}, got {groups.shape}")
            color = [PALETTE[int(g) % len(PALETTE)] for g in groups]
        ax.scatter(x[:, 0], x[:, 1], s=3, c=color, linewidths=0, zorder=2)
    said = [f"{name} (N={len(cloud):,})" for name, cloud in panels.items()]
    fig.alt_text = f"Points in the plane: {', '.join(said)}."
    return fig


@styled
def arrows(
    panels: Mapping[str, tuple[Tensor, Tensor]],
    *,
    backdrop: Tensor | None = None,
    columns: int = 3,
    reach: float = 3.0,
) -> NotebookFigure:
    """A panel for each named field: where arrows start and where they end, (N, 2[, 1, 1]) each."""
    fig, axes = _plane(panels, columns, reach, backdrop)
    for ax, (title, (start, end)) in zip(axes, panels.items(), strict=True):
        start, end = _xy(start, title, 2), _xy(end, title, 2)
        if start.shape != end.shape:
            raise ValueError(f"{title}: {len(start)} arrows start, {len(end)} end")
        step = (end - start).T
        options = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.005}
        ax.quiver(*start.T, *step, color=RED, zorder=2, **options)
    fig.alt_text = f"Arrows in the plane: {', '.join(panels)}."
    return fig


@styled
def paths(
    panels: Mapping[str, Tensor],
    *,
    backdrop: Tensor | None = None,
    columns: int = 3,
    reach: float = 3.0,
) -> NotebookFigure:
    """A panel for each named set of N paths of S points, (S, N, 2) or (S, N, 2, 1, 1).

    A path begins at its small circle and ends at its dot.
    """
    fig, axes = _plane(panels, columns, reach, backdrop)
    for ax, (title, states) in zip(axes, panels.items(), strict=True):
        x = _xy(states, title, 3)
        for n in range(x.shape[1]):
            color = PALETTE[n % 7]  # the eighth, yellow, is too light for a line
            ax.plot(x[:, n, 0], x[:, n, 1], color=color, lw=0.8, zorder=2)
            ax.plot(*x[0, n], "o", color=color, ms=4, mfc="white", zorder=3)
            ax.plot(*x[-1, n], "o", color=color, ms=4, zorder=3)
    said = [f"{name}, {len(states)} points each" for name, states in panels.items()]
    fig.alt_text = f"Paths in the plane: {'; '.join(said)}."
    return fig


def _xy(points: Tensor, name: str, axes: int) -> np.ndarray:
    """(..., 2) or (..., 2, 1, 1) with `axes` axes before the trailing ones -> (..., 2)."""
    flat = points.flatten(axes - 1) if points.ndim == axes + 2 else points
    if flat.ndim != axes or flat.shape[-1] != 2 or not flat.numel() or not flat.isfinite().all():
        want = "(S, N, 2)" if axes == 3 else "(N, 2)"
        raise ValueError(f"{name} must be {want}, finite and not empty, got {tuple(points.shape)}")
    return flat.detach().float().cpu().numpy()


def _plane(
    panels: Mapping[str, object], columns: int, reach: float, backdrop: Tensor | None
) -> tuple[NotebookFigure, list[Axes]]:
    if not panels or columns < 1 or not reach > 0:
        raise ValueError(f"need panels, columns >= 1 and reach > 0, got {columns}, {reach}")
    columns = min(columns, len(panels))
    lines = -(-len(panels) // columns)
    side = min(2.9, 9.2 / columns)
    fig = NotebookFigure((side * columns, (side + 0.1) * lines), layout="constrained")
    axes = [fig.add_subplot(lines, columns, i + 1, aspect="equal") for i in range(len(panels))]
    for i, (ax, title) in enumerate(zip(axes, panels, strict=True)):
        ax.set(xlim=(-reach, reach), ylim=(-reach, reach), title=title)
        ax.tick_params(labelleft=i % columns == 0, length=0, labelsize=8)
        if backdrop is not None:
            x = _xy(backdrop, "backdrop", 2)
            ax.scatter(x[:, 0], x[:, 1], s=3, c="#9a9a9a", linewidths=0, zorder=1)
    return fig, axes
