"""Pictures side by side: sheets, laid out in pixels."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from matplotlib.colors import hsv_to_rgb
from torch import Tensor

from minildm.plots.style import DPI, FRAME, GAP, LINE, Names, NotebookFigure, Numbers, Text, styled


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
    x: Tensor,
    rows: Sequence[str],
    *,
    heads: Names = None,
    scale: float = 1.0,
    title: Text = None,
) -> NotebookFigure:
    """One row of K pictures for each name: x (R K, 3, H, W), the first K belong to `rows[0]`.

    heads: a name for each of the K columns.
    """
    if not rows or len(x) % len(rows):
        raise ValueError(f"x: {len(x)} pictures are no equal share for {len(rows)} rows")
    k = len(x) // len(rows)
    if heads is not None and len(heads) != k:
        raise ValueError(f"heads: {len(heads)} given for {k} columns")
    pictures = _rows(_pictures(x, scale), k)
    return _sheet(pictures, f"{k} pictures of each", title, rows, heads=heads or ())


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


@styled
def word_maps(
    x: Tensor, words: Sequence[str], maps: Tensor, *, columns: int = 7, title: Text = None
) -> NotebookFigure:
    """A picture (3, H, W), then once for each word, lit where the word is looked at.

    maps: (K, h, w), one a word, not negative, enlarged to the picture. Each counts in its own
    mean over the picture, so that a word that is looked at everywhere alike is of one tone; its
    largest multiple stands beside the word. All share one scale: dark 0, bright the largest of
    all, 2 at least.
    """
    _same_number("words", words, maps)
    if x.ndim != 3 or maps.ndim != 3 or not len(words):
        raise ValueError(
            f"x must be (3, H, W) and maps (K, h, w), K >= 1, got {tuple(x.shape)} and "
            f"{tuple(maps.shape)}"
        )
    if not maps.isfinite().all() or maps.min() < 0:
        raise ValueError("maps must be finite and not negative")
    x, maps = x.detach().float().cpu()[None], maps.detach().float().cpu()
    if float(x.max()) > 20:  # uint8
        x = x / 127.5 - 1
    lit = maps / maps.mean(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    most = lit.amax(dim=(1, 2))  # (K,)
    lit = lit / max(2.0, float(most.max()))
    lit = F.interpolate(lit[:, None], x.shape[-2:], mode="bicubic").clamp(0, 1)[:, 0]
    colors = torch.from_numpy(plt.cm.inferno(lit.numpy())[..., :3]).float() * 2 - 1
    grey = x.mean(dim=1, keepdim=True)
    overlays = 0.3 * grey + 0.7 * rearrange(colors, "k h w rgb -> k rgb h w")
    notes = ["the picture", *(f"{word} ×{m:.1f}" for word, m in zip(words, most, strict=True))]
    rows = _rows(_pictures(torch.cat([x, overlays]), 1.1), columns)
    return _sheet(rows, "where each word is looked at", title, notes=_rows(notes, columns))


def label_pictures(maps: Tensor, muted: int = 0) -> Tensor:
    """Maps of labels (N, H, W) int64 as pictures (N, 3, H, W) uint8, a colour for each label.

    A label has the same colour in all maps; the first `muted`, for grounds, are pale.
    """
    if maps.ndim != 3 or not maps.numel() or maps.is_floating_point() or maps.min() < 0:
        raise ValueError(f"maps must be (N, H, W) of labels >= 0, got {tuple(maps.shape)}")
    label = np.arange(int(maps.max()) + 1)
    hue = label * 0.618034 % 1  # of the golden ratio: neighbours are far apart
    value = np.where(label < muted, 0.95, 0.45 + 0.4 * (label // 3 % 2))
    colors = hsv_to_rgb(np.stack([hue, np.where(label < muted, 0.22, 0.9), value], axis=-1))
    pictures = torch.from_numpy((255 * colors).round().astype(np.uint8))[maps.cpu()]
    return rearrange(pictures, "n h w rgb -> n rgb h w")


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
