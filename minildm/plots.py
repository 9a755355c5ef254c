"""Every figure of the notebooks; the only module that imports matplotlib.

Each function returns a figure that shows itself, once, as the last line of a notebook cell (use
`display(fig)` elsewhere), and carries an `alt_text` for those who cannot see it; `save` writes
both into a PNG. No figure is registered with pyplot, so none stays open. Colours are those of
Okabe and Ito (2008), which nearly everybody can tell apart.
"""

import base64
import io
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from einops import repeat
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from minildm.files import atomic_write
from minildm.schedule import NoiseSchedule
from minildm.types import Record

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


# Pictures: sheets, laid out in pixels.


def image_grid(
    x: Tensor, titles: Names = None, *, columns: int = 8, scale: float = 1.1, title: Text = None
) -> NotebookFigure:
    """Pictures (N, 3, H, W), uint8 or in [-1, 1], row by row; `titles`, one each, stand below.

    scale: a picture's wanted width in inches. Pictures are enlarged by a whole factor, so that
    a pixel stays a sharp square; only those that are too large are reduced.
    """
    _same_number("titles", titles, x)
    rows, notes = _rows(_pictures(x, scale), columns), _rows(titles or (), columns)
    return _sheet(rows, f"{len(x)} pictures in rows of {columns}", title, notes=notes)


def class_grid(
    x: Tensor, rows: Sequence[str], *, scale: float = 1.0, title: Text = None
) -> NotebookFigure:
    """One row of K pictures for each name: x (R K, 3, H, W), the first K belong to `rows[0]`."""
    if not rows or len(x) % len(rows):
        raise ValueError(f"x: {len(x)} pictures are no equal share for {len(rows)} rows")
    k = len(x) // len(rows)
    return _sheet(_rows(_pictures(x, scale), k), f"{k} pictures of each", title, rows)


def pairs(
    x: Tensor,
    x_rec: Tensor,
    *,
    labels: tuple[str, str] = ("original", "reconstruction"),
    psnr: Numbers | None = None,
    columns: int = 8,
    title: Text = None,
) -> NotebookFigure:
    """Each picture above its reconstruction, both (N, 3, H, W); `psnr` (N,) in dB stands below."""
    if x.shape != x_rec.shape:
        raise ValueError(f"x {tuple(x.shape)} and x_rec {tuple(x_rec.shape)} must be alike")
    _same_number("psnr", psnr, x)
    above, below = (_rows(_pictures(part, 1.1), columns) for part in (x, x_rec))
    said = [] if psnr is None else [f"{float(p):.1f} dB" for p in psnr]
    notes = [note for row in _rows(said, columns) for note in ((), row)]
    rows = [row for pair in zip(above, below, strict=True) for row in pair]
    return _sheet(rows, f"{len(x)} pictures in pairs", title, labels * len(above), notes)


def trajectory(
    images: Tensor, times: Numbers, *, z0_images: Any = None, columns: int = 7, title: Text = None
) -> NotebookFigure:
    """States of a sampling, decoded: (S, 3, H, W), or (S, B, 3, H, W) for B samples at once.

    times: the t of each of the S states. z0_images: the predicted clean pictures, shaped alike,
    or None. At most `columns` states are shown, evenly spread, the first and the last among them.
    """
    _same_number("times", times, images)
    if z0_images is not None and z0_images.shape != images.shape:
        raise ValueError(f"z0_images {tuple(z0_images.shape)} must be as images {images.shape}")
    shown = np.linspace(0, len(times) - 1, min(columns, len(times))).round().astype(int)
    kinds = {"zₜ decoded": images} | ({} if z0_images is None else {"ẑ₀ decoded": z0_images})
    states = [v[shown] if v.ndim == 5 else v[shown, None] for v in kinds.values()]
    samples = states[0].shape[1]
    rows = [_pictures(v[:, b], 1.0) for b in range(samples) for v in states]
    heads = [f"t = {int(times[i])}" for i in shown]
    return _sheet(rows, f"{samples} sampling(s)", title, [*kinds] * samples, heads=heads)


@styled
def latent_maps(z: Tensor, *, rows: Names = None, title: Text = None) -> NotebookFigure:
    """Every channel of latents (B, c, h, w) as a grey map, 0 in the middle; a row each."""
    if z.ndim != 4 or not z.numel() or not z.isfinite().all():
        raise ValueError(f"z {tuple(z.shape)} must be (B, c, h, w), not empty, and finite")
    z, c = z.detach().float().cpu(), z.shape[1]
    limit = max(float(np.quantile(z.abs().numpy(), 0.995)), 1e-6)
    maps = repeat((z / limit).clamp(-1, 1), "b c h w -> (b c) rgb h w", rgb=3)
    heads = [f"channel {i + 1}" for i in range(c)]
    pictures = _rows(_pictures(maps, 1.1), c)
    fig = _sheet(pictures, f"{len(z)} latent(s) as grey maps", title, rows, heads=heads)
    width, height = fig.get_size_inches()
    fig.set_size_inches(width + 0.7, height)  # for the colour bar
    fig.axes[0].set_position((0, 0, width / (width + 0.7), 1))
    tall = min(0.86, 2.2 / height)
    cax = fig.add_axes(((width + 0.05) / (width + 0.7), 0.5 - tall / 2, 0.12 / (width + 0.7), tall))
    grey = plt.cm.ScalarMappable(plt.Normalize(-limit, limit), "gray")
    fig.colorbar(grey, cax=cax, label="latent value", extend="both")
    return fig


def _pictures(x: Tensor, scale: float) -> np.ndarray:
    """(N, 3, H, W) uint8 or in [-1, 1] -> (N, k H, k W, 3) uint8, about `scale` inches wide."""
    if x.ndim != 4 or x.shape[1] != 3 or not len(x):
        raise ValueError(f"pictures must be (N, 3, H, W) with N >= 1, got {tuple(x.shape)}")
    x = x.detach().cpu()
    if x.dtype != torch.uint8:
        if not x.isfinite().all() or x.abs().max() > 20:  # what overshoots 1 a little is clipped
            raise ValueError("pictures that are not uint8 must be finite and lie in [-1, 1]")
        x = ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    factor = scale * DPI / x.shape[-1]
    if factor < 0.75:
        size = [max(1, round(side * factor)) for side in x.shape[-2:]]
        x = F.interpolate(x.float(), size, mode="area").round().to(torch.uint8)
    k = max(1, round(factor))
    return repeat(x.numpy(), "n c h w -> n (h i) (w j) c", i=k, j=k)


def _rows(items: Any, columns: int) -> list[Any]:
    if columns < 1:
        raise ValueError(f"columns={columns} must be at least 1")
    return [items[i : i + columns] for i in range(0, len(items), columns)]


def _same_number(argument: str, given: Any, x: Any) -> None:
    if given is not None and len(given) != len(x):
        raise ValueError(f"{argument}: {len(given)} given for {len(x)} of the pictures")


@styled
def _sheet(
    rows: list[Any], what: str, title: Text, labels: Names = None, notes: Any = (), heads: Any = ()
) -> NotebookFigure:
    """Rows of pictures (K, H, W, 3) with labels at the left, notes below each, heads on top."""
    _same_number("row labels", labels, rows)
    h, w = rows[0].shape[1:3]
    names = dict.fromkeys([*(labels or ()), *heads, *(note for row in notes for note in row)])
    fig = NotebookFigure(dpi=DPI, facecolor="white")
    fig.alt_text = ": ".join(filter(None, [title, what, ", ".join(names)])) + "."
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    labels = [textwrap.fill(label, 18) for label in labels or [""] * len(rows)]
    texts = [ax.text(0, 0, label, ha="right", va="center") for label in labels]
    wide = math.ceil(max(text.get_window_extent().width for text in texts))
    left = wide + 3 * GAP if wide else GAP
    lefts = [left + i * (w + GAP) for i in range(max(map(len, rows)))]
    width = lefts[-1] + w + GAP
    wrap = textwrap.TextWrapper(max(5, int(w / 7.4)), max_lines=3, placeholder=" …")
    notes = [[wrap.fill(note) for note in row] for row in notes or [()] * len(rows)]
    room = [LINE * max((n.count("\n") + 1 for n in row if n), default=0) for row in notes]
    said = textwrap.wrap(title or "", max(12, int((width - left) / 10)))
    y = GAP + 21 * len(said) + (LINE + 4 if heads else 0)
    canvas = np.full((y + sum(room) + len(rows) * (h + GAP), width, 3), 255, np.uint8)
    fig.set_size_inches(width / DPI, len(canvas) / DPI)
    ax.text(left, GAP, "\n".join(said), va="top", fontsize=10, weight="bold")
    for x, head in zip(lefts, heads, strict=False):
        ax.text(x + w / 2, y - 5, head, ha="center", va="bottom", fontsize=8)
    for pictures, text, row, space in zip(rows, texts, notes, room, strict=True):
        text.set_position((left - 2 * GAP, y + h / 2))
        for x, picture in zip(lefts, pictures, strict=False):
            canvas[y - 1 : y + h + 1, x - 1 : x + w + 1] = FRAME
            canvas[y : y + h, x : x + w] = picture
        for x, note in zip(lefts, row, strict=False):
            ax.text(x + w / 2, y + h + 3, note, ha="center", va="top", fontsize=8, linespacing=1.1)
        y += h + GAP + space
    ax.imshow(canvas, interpolation="nearest", aspect="auto", extent=(0, width, len(canvas), 0))
    return fig


# Curves and bars.


def _chart(width: float, height: float, panels: int = 1) -> tuple[NotebookFigure, list[Axes]]:
    """A figure with panels of the given size in inches, two in a row."""
    columns, lines = min(panels, 2), -(-panels // 2)
    fig = NotebookFigure((width * columns, height * lines), dpi=DPI, layout="constrained")
    return fig, [fig.add_subplot(lines, columns, i + 1) for i in range(panels)]


def _log_y(ax: Axes) -> None:
    """A logarithmic axis with plain numbers: 0.2, 0.5, 1."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())


@styled
def loss_curves(
    histories: Mapping[str, Sequence[Record]], *, smooth: float = 0.05, terms: Names = None
) -> NotebookFigure:
    """A panel for each training: its records' terms against the step, raw (light) and smoothed.

    smooth: share of the steps in the running mean. terms: those to draw; by default all within
    a factor of 100 of `loss` (else of the first), and the panel names those left out.
    """
    if not histories or not all(histories.values()):
        raise ValueError(f"histories: no records of {[k for k, v in histories.items() if not v]}")
    if not 0 <= smooth <= 1:
        raise ValueError(f"smooth={smooth} must lie in [0, 1]")
    fig, axes = _chart(6.4 if len(histories) == 1 else 4.4, 3.0, len(histories))
    panels = zip(axes, histories.items(), strict=True)
    said = [_training(ax, name, records, smooth, terms) for ax, (name, records) in panels]
    fig.alt_text = f"Training curves. {'; '.join(said)}."
    return fig


def _training(ax: Axes, name: str, records: Sequence[Record], smooth: float, terms: Names) -> str:
    """Draw one panel of `loss_curves`; say what it shows."""
    curves = {k: np.array([r.terms[k] for r in records]) for k in records[0].terms}
    size = {key: np.median(np.abs(curve)) for key, curve in curves.items()}
    main = size.get("loss", next(iter(size.values())))
    alike = [key for key in curves if main / 100 <= size[key] <= main * 100]
    drawn = alike if terms is None else [key for key in terms if key in curves]
    if not drawn:
        raise ValueError(f"terms={terms}: {name} has {', '.join(curves)}")
    step, window, said = [r.step for r in records], max(1, round(smooth * len(records))), []
    for key, color in zip(drawn, PALETTE * len(drawn), strict=False):
        mean = np.convolve(curves[key], np.full(window, 1 / window), "valid")
        ax.plot(step, curves[key], color=color, alpha=0.25, lw=0.8)
        ax.plot(step[window - 1 :], mean, color=color, lw=1.7, label=key)
        said.append(f"{key} from {mean[0]:.3g} to {mean[-1]:.3g}")
    low, high = (f([f(curves[key]) for key in drawn]) for f in (min, max))
    if low > 0 and high > 5 * low:  # a smaller span would see a single label
        _log_y(ax)
    rest = [f"{key} ≈ {size[key]:.3g}" for key in curves if key not in drawn]
    ax.set_title(name + (f"\n(not drawn: {', '.join(rest)})" if rest else ""))
    seconds = records[-1].seconds
    took = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    ax.set(xlabel=f"step  ({took}, {records[-1].images:,} pictures seen)", ylabel="loss")
    ax.legend()
    return f"{name}: {', '.join(said)}"


@styled
def schedule_curves(schedule: NoiseSchedule) -> NotebookFigure:
    """The weights of signal and noise in z_t against t, and where they are equal."""
    t = torch.arange(schedule.T, device=schedule.alphas_cumprod.device)
    signal, noise = (s.flatten().cpu().numpy() for s in schedule.scales(t))
    fig, (ax,) = _chart(6.4, 2.8)
    ax.plot(signal, color=BLUE, lw=2, label=r"signal, $\sqrt{\bar\alpha_t}$")
    ax.plot(noise, color=RED, lw=2, ls="--", label=r"noise, $\sqrt{1 - \bar\alpha_t}$")
    over = np.flatnonzero(noise >= signal)
    said = f"equal at t = {over[0]}" if len(over) else "noise stays below"
    ax.plot(over[:1], noise[over[:1]], "o", color="black", ms=6, label=said)
    ax.set(xlabel="t", ylabel="weight in $z_t$", ylim=(0, 1.03), xlim=(0, schedule.T))
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    fig.alt_text = f"Signal falls from {signal[0]:.2f} to {signal[-1]:.2f} over t; {said}."
    return fig


@styled
def bars(
    values: Mapping[str, Any],
    low_high: Mapping[str, Any] | None = None,
    *,
    xlabel: str = "accuracy",
    chance: float | None = None,
    title: Text = None,
) -> NotebookFigure:
    """Horizontal bars, one a name; or groups of bars: {"samples": {name: value}, "real": {...}}.

    A value is a number, or a `metrics.Measured`, whose interval and N are drawn too; or
    `low_high`, shaped like `values`, gives (low, high). chance: a dotted line for comparison.
    """
    grouped = isinstance(next(iter(values.values()), None), Mapping)
    series, given = (values, low_high or {}) if grouped else ({"": values}, {"": low_high or {}})
    names = list(dict.fromkeys(name for content in series.values() for name in content))
    if not names:
        raise ValueError("values must hold at least one number")
    fig, (ax,) = _chart(6.8, 1.0 + len(names) * (0.16 + 0.17 * len(series)))
    thick, said = 0.8 / len(series), []
    for i, (kind, content) in enumerate(series.items()):
        y = [names.index(name) + (i + 0.5) * thick - 0.4 for name in content]
        rows = [_measure(v, given.get(kind, {}).get(name)) for name, v in content.items()]
        value, below, above, texts = zip(*rows, strict=True)
        color, black = PALETTE[i % len(PALETTE)], {"lw": 1.2}
        drawn = ax.barh(y, value, thick * 0.92, color=color, xerr=[below, above], error_kw=black)
        ax.bar_label(drawn, texts, padding=4, fontsize=7.5)
        drawn.set_label(kind or "_")
        said += [f"{kind} {name} {t}".strip() for name, t in zip(content, texts, strict=True)]
    if chance is not None:
        ax.axvline(chance, color="black", ls=":", lw=1.2, label=f"chance, {chance:.2g}")
    ax.set_yticks(range(len(names)), names)
    ax.grid(visible=False, axis="y")
    ax.margins(x=0.18)
    ax.set(xlabel=xlabel, ylim=(len(names) - 0.45, -0.55))
    if ax.get_legend_handles_labels()[1]:
        fig.legend(loc="outside lower center", ncols=4)
    ax.set_title(title or "", weight="bold", loc="left")
    fig.alt_text = f"{title or 'Bars'}: {xlabel}, {', '.join(said)}."
    return fig


def _measure(value: Any, low_high: Sequence[float] | None) -> tuple[float, float, float, str]:
    """(value, reach below, reach above, text) of a number or of a Measured."""
    low, high, note = *(low_high or (value, value)), ""
    if isinstance(value, tuple):
        value, low, high, note = *value[:3], f"  (N={value[3]:,})"
    text = f"{value:.2f}" if 0.1 <= value < 10 else f"{value:.3g}"
    return value, max(0, value - low), max(0, high - value), text + note  # NaN: no interval


@styled
def loss_against_t(
    t: Tensor, per_sample: Tensor, T: int, *, bins: int = 20, title: str = "loss against t"
) -> NotebookFigure:
    """Where in time the loss lies: t (N,) in 0..T-1, per_sample (N,) -> binned mean, quartiles."""
    if t.shape != per_sample.shape or t.ndim != 1 or not len(t) or t.min() < 0 or t.max() >= T:
        shapes = f"{tuple(t.shape)}, {tuple(per_sample.shape)}"
        raise ValueError(f"t and per_sample must be (N,), t in 0..{T - 1}, got {shapes}")
    bins = min(bins, T)
    which, loss = (t.cpu() * bins // T).numpy(), per_sample.detach().float().cpu().numpy()
    parts = {(b + 0.5) * T / bins: loss[which == b] for b in np.unique(which)}
    center, means = list(parts), np.array([part.mean() for part in parts.values()])
    low, high = np.array([np.quantile(part, (0.25, 0.75)) for part in parts.values()]).T
    fig, (ax,) = _chart(6.4, 2.9)
    ax.fill_between(center, low, high, color=BLUE, alpha=0.2, lw=0, label="middle half")
    ax.plot(center, means, "o-", color=BLUE, ms=4, lw=1.8, label="mean")
    if low.min() > 0 and means.max() > 10 * means.min():
        _log_y(ax)
    ax.set(xlabel="t", ylabel="loss", xlim=(0, T), title=f"{title} (N={len(t):,})")
    ax.legend()
    ends = f"{means[0]:.3g} near t = {center[0]:.0f}, {means[-1]:.3g} near {center[-1]:.0f}"
    fig.alt_text = f"{title}: {ends}; N={len(t)}."
    return fig
