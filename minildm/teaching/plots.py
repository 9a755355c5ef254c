"""Every figure of the notebooks; the only module that imports matplotlib.

Each function returns a NotebookFigure: as the last line of a cell it shows itself, with `alt` as
its alternative text, and `save` writes both to a PNG. Colours: Okabe and Ito (2008).
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from matplotlib import ticker
from torch import Tensor

from minildm.data.dataset import as_float
from minildm.files import atomic_write
from minildm.training.loop import Record

DPI, GAP, LINE = 120, 6, 16  # pixels: an inch, between images, a line of text
BLUE, RED = "#0072B2", "#D55E00"
PALETTE = (BLUE, "#E69F00", "#009E73", "#CC79A7", "#56B4E9", RED, "#000000", "#F0E442")
Names = Sequence[str]
styled = plt.style.context(Path(__file__).with_name("minildm.mplstyle"))  # as a decorator


class NotebookFigure(plt.Figure):
    """A figure that pyplot does not keep, with an alternative text `alt`; notebooks show it."""

    alt: str = ""

    @styled
    def encoded(self, kind: str = "png", **metadata: Any) -> bytes:
        """The figure as an image file, cropped to its contents."""
        file = io.BytesIO()
        self.savefig(file, format=kind, dpi=DPI, bbox_inches="tight", metadata=metadata or None)
        return file.getvalue()

    def _repr_mimebundle_(self, **_kwargs: Any) -> tuple[dict[str, str], dict[str, Any]]:
        png = base64.b64encode(self.encoded()).decode()
        return {"image/png": png}, {"image/png": {"alt": self.alt}}


def save(fig: NotebookFigure, path: str | Path) -> None:
    """Write the figure as .jpg, .webp, or, whatever the suffix, as .png with `fig.alt` in it."""
    kind, metadata = Path(path).suffix.lower(), {}
    if kind not in (".jpg", ".webp"):
        kind, metadata = ".png", {"Description": fig.alt, "Software": None}
    with atomic_write(Path(path).with_suffix(kind)) as file:
        file.write(fig.encoded(kind[1:], **metadata))


def save_page(folder: Path, title: str, top: str, figures: Mapping[str, NotebookFigure]) -> None:
    """Save figures under their names, and an index.html: the HTML `top`, then the figures."""
    images = ""
    for name, figure in figures.items():
        save(figure, folder / name)
        images += f'<p><img src="{name}.png" alt="{html.escape(figure.alt)}"></p>\n'
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>body {{ font: 16px/1.5 system-ui; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
img {{ max-width: 100% }} td, th {{ padding: .2rem .8rem; text-align: left }}</style>
<h1>{html.escape(title)}</h1>
{top}
{images}
</html>
"""
    with atomic_write(folder / "index.html") as file:
        file.write(page.encode())


@styled
def image_grid(
    x: Tensor,
    titles: Names = (),
    *,
    columns: int = 8,
    scale: float = 1.1,
    title: str = "",
    rows: Names = (),
    heads: Names = (),
) -> NotebookFigure:
    """Images (N, 3, H, W), uint8 or in [-1, 1], row by row; `titles`, one each, stand below.

    scale: an image's width in inches, about: images are enlarged by a whole factor, so that a
    pixel stays a sharp square; only larger ones are reduced. rows, heads: names of the rows, at
    the left, which then say how many columns there are, and of the columns.
    """
    columns = len(x) // len(rows) if rows else min(columns, len(x))
    x, factor = as_float(x.detach().cpu()).clamp(-1, 1), scale * DPI / x.shape[-1]
    if factor < 0.75:
        size = [max(1, round(side * factor)) for side in x.shape[-2:]]
        x = F.interpolate(x, size, mode="area")
    x = ((x + 1) * 127.5).round().byte()
    x = x.repeat_interleave(k := max(1, round(factor)), -1).repeat_interleave(k, -2)
    cells = F.pad(x, (1, 1, 1, 1), value=214)  # a grey frame
    h, w = cells.shape[-2:]
    notes = [fill(t, max(5, int(w / 7.4)), max_lines=3, placeholder=" …") for t in titles]
    room = LINE * max((note.count("\n") + 1 for note in notes), default=0)
    down, right, missing = h + room + GAP, w + GAP, -len(cells) % columns
    cells = F.pad(cells, (0, GAP, 0, room + GAP, 0, 0, 0, missing), value=255)
    grid = rearrange(cells, "(n k) c h w -> (n h) (k w) c", k=columns).numpy()
    height, width = grid.shape[:2]
    fig = NotebookFigure((width / DPI, height / DPI), dpi=DPI)
    ax, extent = fig.add_axes((0, 0, 1, 1), frameon=False), (0, width, height, 0)
    ax.imshow(grid, interpolation="nearest", aspect="auto", extent=extent)
    ax.set_yticks([i * down + h / 2 for i in range(len(rows))], [fill(row, 18) for row in rows])
    ax.set_xticks([i * right + w / 2 for i in range(len(heads))], [fill(t, 18) for t in heads])
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    ax.grid(visible=False)
    ax.set_title(fill(title, max(12, width // 9)), loc="left", weight="bold")
    for i, note in enumerate(notes):
        x, y = i % columns * right + w / 2, i // columns * down + h + 3
        ax.text(x, y, note, ha="center", va="top", fontsize=8, linespacing=1.1)
    names = ", ".join(dict.fromkeys(filter(None, [*rows, *heads, *titles])))
    what = f"{len(cells) - missing} images, {columns} in a row"
    fig.alt = ": ".join(filter(None, [title, what, names])) + "."
    return fig


def class_grid(x: Tensor, rows: Names, *, scale: float = 1.0, **options: Any) -> NotebookFigure:
    """A row of K images for each name: x (R K, 3, H, W); options: those of `image_grid`."""
    return image_grid(x, rows=rows, scale=scale, **options)


def latent_maps(z: Tensor, *, rows: Names = ()) -> NotebookFigure:
    """Every channel of latents (B, c, h, w) as a grey map with 0 in the middle; a row each."""
    z, c = z.detach().float().cpu(), z.shape[1]
    limit = max(float(np.quantile(z.abs().numpy(), 0.995)), 1e-6)
    maps = repeat(z / limit, "b c h w -> (b c) rgb h w", rgb=3)
    heads = [f"channel {i + 1}" for i in range(c)]
    title = f"black {-limit:.2g}, white {limit:.2g}"
    return image_grid(maps, columns=c, rows=rows, heads=heads, title=title)


def word_maps(x: Tensor, words: Names, maps: Tensor, *, title: str = "") -> NotebookFigure:
    """An image (3, H, W), then once for each word, bright where the word gets attention.

    maps: (K, h, w), not negative. Each is divided by its mean, so that even attention is a single
    tone; the largest multiple stands after the word. One scale serves all, from 0 to at least 2.
    """
    lit = maps / maps.mean(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    most = lit.amax(dim=(1, 2)).tolist()
    lit = F.interpolate(lit[:, None] / max(2.0, *most), x.shape[-2:], mode="bicubic")[:, 0]
    colors = torch.from_numpy(plt.cm.inferno(lit.numpy())[..., :3]).float() * 2 - 1
    x = as_float(x.detach().cpu())[None]
    overlays = 0.3 * x.mean(dim=1, keepdim=True) + 0.7 * rearrange(colors, "k h w c -> k c h w")
    notes = ["the image", *(f"{word} ×{m:.1f}" for word, m in zip(words, most, strict=True))]
    return image_grid(torch.cat([x, overlays]), notes, columns=7, title=title)


def curves(
    panels: Mapping[str, Mapping[str, Sequence[Any]]],
    *,
    xlabel: str | Sequence[str],
    ylabel: str | Sequence[str],
    log: str = "",
    ticks: Sequence[float] = (),
) -> NotebookFigure:
    """A panel for each title, with named lines: {"emoji": {"WebP": (x, y)}}.

    A line is (x, y), each (N,), or (x, y, low, high) with intervals. A name has one colour and
    mark in all panels; a name that ends in "*" is drawn as points only. xlabel, ylabel: one for
    all panels, or one a panel. log: "x", "y" or "xy". ticks: the numbers on x.
    """
    fig = _panels(panels, 2, (6.4, 3.2) if len(panels) == 1 else (4.6, 3.2))
    xlabels, ylabels = (np.broadcast_to(label, len(panels)) for label in (xlabel, ylabel))
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    for i, (ax, lines) in enumerate(zip(fig.axes, panels.values(), strict=True)):
        ax.set(xlabel=xlabels[i], ylabel=ylabels[i])
        fig.alt += f" {ylabels[i]} against {xlabels[i]}:"
        for name, line in lines.items():
            x, y, *ends = (np.asarray(part, dtype=float) for part in line)
            reach = np.nan_to_num([y - ends[0], ends[1] - y]).clip(min=0) if ends else None
            k, points, label = names.index(name), name.endswith("*"), name.rstrip(" *")
            style = {"marker": "os^Dv*xP"[k % 8] if points or len(x) < 40 else "", "ms": 4}
            style |= {"lw": 0 if points else 1.7, "elinewidth": 1.2, "capsize": 2.5}
            ax.errorbar(x, y, reach, color=f"C{k}", label=label, **style)
            fig.alt += f" {label} from {y[0]:.3g} at {x[0]:.3g} to {y[-1]:.3g} at {x[-1]:.3g};"
        for which in log:  # with ordinary numbers (0.2, 0.5, 1), now that all is drawn
            ax.set(**{f"{which}scale": "log"})
            axis = getattr(ax, f"{which}axis")
            low, high = sorted(axis.get_view_interval())
            steps = ticker.LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,))
            few = ticker.MaxNLocator(5, steps=[1, 2, 5, 10])  # in a decade: 1, 2, 5 are too few
            axis.set_major_locator(few if high < 10 * low else steps)
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(ticker.NullFormatter())
        if len(ticks):
            ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            ax.xaxis.set_minor_locator(ticker.NullLocator())
    if len(names) > 1:
        _legend_below(fig)
    return fig


def loss_curves(histories: Mapping[str, Sequence[Record]], *, terms: Names = ()) -> NotebookFigure:
    """A panel for each training: its records' terms against the step, means of a twentieth each.

    terms: by default `loss`, or all where there is none.
    """
    panels = {}
    for name, records in histories.items():
        shown = terms or (["loss"] if "loss" in records[0].terms else records[0].terms)
        title = f"{name} ({records[-1].images:,} images, {records[-1].seconds:.0f} s)"
        k, steps = max(1, round(0.05 * len(records))), [r.step for r in records]
        for key in shown:
            means = np.convolve([r.terms[key] for r in records], [1 / k] * k, "valid")
            panels.setdefault(title, {})[key] = (steps[k - 1 :], means)
    low = min(np.min(y) for lines in panels.values() for _, y in lines.values())
    return curves(panels, xlabel="step", ylabel="loss", log="y" if low > 0 else "")


def bars(
    values: Mapping[str, Any], *, xlabel: str = "accuracy", chance: float | None = None
) -> NotebookFigure:
    """Horizontal bars, one a name; or groups of bars: {"samples": {name: value}, "real": {...}}.

    A value is a number, or a Measured with its interval, and N unless that is 0. chance: a dotted
    line for comparison.
    """
    series = values if isinstance(next(iter(values.values())), Mapping) else {"": values}
    names = list(dict.fromkeys(name for content in series.values() for name in content))
    fig = _panels([""], 1, (6.8, 1.0 + len(names) * (0.16 + 0.17 * len(series))))
    ax, thick = fig.axes[0], 0.8 / len(series)
    for i, (kind, content) in enumerate(series.items()):
        found = [v if isinstance(v, tuple) else (v, v, v, 0) for v in content.values()]
        value, low, high, count = np.array(found, dtype=float).T
        texts = [f"{v:.3g}" if abs(v) < 1000 else f"{v:,.0f}" for v in value]
        texts = [t + (f"  (N={n:,.0f})" if n else "") for t, n in zip(texts, count, strict=True)]
        y = [names.index(name) + (i + 0.5) * thick - 0.4 for name in content]
        reach = np.nan_to_num([value - low, high - value]).clip(min=0)  # NaN: no interval
        drawn = ax.barh(y, value, thick * 0.92, xerr=reach, label=kind or "_")
        ax.bar_label(drawn, texts, padding=4, fontsize=7.5)  # xmargin below leaves room for them
        said = map(" ".join, zip(content, texts, strict=True))
        fig.alt += f" {kind} {xlabel}: {', '.join(said)}."
    if chance is not None:
        ax.axvline(chance, color="black", ls=":", lw=1.2, label=f"chance, {chance:.2g}")
    ax.set(xlabel=xlabel, yticks=range(len(names)), yticklabels=names)
    ax.set(ylim=(len(names) - 0.45, -0.55), xmargin=0.3 if ax.dataLim.x0 < 0 else 0.18)
    ax.grid(visible=False, axis="y")
    _legend_below(fig)
    return fig


@styled
def _panels(titles: Names, columns: int, size: tuple[float, float]) -> NotebookFigure:
    """A figure with an axes of that size, in inches, for each title."""
    columns = min(columns, len(titles))
    lines = -(-len(titles) // columns)
    fig = NotebookFigure((size[0] * columns, size[1] * lines), dpi=DPI, layout="constrained")
    for i, title in enumerate(titles):
        fig.add_subplot(lines, columns, i + 1, title=title)
    fig.alt = f"{', '.join(filter(None, titles)) or 'A chart'}."
    return fig


def _legend_below(fig: NotebookFigure) -> None:
    """One legend under all panels, in as many columns, at most four, as fit the figure."""
    found = [zip(*ax.get_legend_handles_labels(), strict=True) for ax in fig.axes]
    keys = {label: handle for some in found for handle, label in some}
    if keys:
        longest = max(map(len, keys)) + 6  # letters, 13 an inch
        columns = min(4, max(1, int(13 * fig.get_figwidth() / longest)))
        fig.legend(keys.values(), keys, loc="outside lower center", ncols=columns, frameon=False)


def clouds(panels: Mapping[str, Any], *, backdrop: Any = ()) -> NotebookFigure:
    """A panel for each cloud of points (N, 2[, 1, 1]), or of arrows, a tuple (starts, ends).

    backdrop: points in grey. The plane is shown from -3 to 3.
    """
    columns = 2 if len(panels) == 4 else min(4, len(panels))
    fig = _panels(list(panels), columns, (9.2 / max(3, columns), 9.5 / max(3, columns)))
    fig.alt = f"Points in the plane: {', '.join(panels)}."
    for ax, cloud in zip(fig.axes, panels.values(), strict=True):
        ax.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
        ax.scatter(*torch.as_tensor(backdrop).reshape(-1, 2).T, s=3, c="#9a9a9a", linewidths=0)
        if isinstance(cloud, tuple):
            start, end = (points.reshape(-1, 2).T for points in cloud)
            ax.quiver(*start, *(end - start), color=RED, angles="xy", scale_units="xy", scale=1)
        else:
            ax.scatter(*cloud.reshape(-1, 2).T, s=3, c=BLUE, linewidths=0)
    return fig
