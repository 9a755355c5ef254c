"""Curves and bars."""

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator
from torch import Tensor

from minildm.plots.style import (
    BLUE,
    PALETTE,
    RED,
    Names,
    NotebookFigure,
    Numbers,
    Text,
    chart,
    legend_below,
    log_axis,
    styled,
)
from minildm.schedule import NoiseSchedule
from minildm.types import Record

MARKS = "os^Dv*xP"


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
    fig, axes = chart(6.4 if len(histories) == 1 else 4.4, 3.0, len(histories))
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
        log_axis(ax, "y")
    rest = [f"{key} ≈ {size[key]:.3g}" for key in curves if key not in drawn]
    ax.set_title(name + (f"\n{fill('(not drawn: ' + ', '.join(rest) + ')', 48)}" if rest else ""))
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
    fig, (ax,) = chart(6.4, 2.8)
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
    fig, (ax,) = chart(6.8, 1.0 + len(names) * (0.16 + 0.17 * len(series)))
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
    handles, kinds = ax.get_legend_handles_labels()
    if kinds:
        legend_below(fig, handles, kinds)
    ax.set_title(title or "", weight="bold", loc="left")
    fig.alt_text = f"{title or 'Bars'}: {xlabel}, {', '.join(said)}."
    return fig


def _measure(value: Any, low_high: Sequence[float] | None) -> tuple[float, float, float, str]:
    """(value, reach below, reach above, text) of a number or of a Measured."""
    low, high, note = *(low_high or (value, value)), ""
    if isinstance(value, tuple):
        value, low, high, note = *value[:3], f"  (N={value[3]:,})"
    text = f"{value:.2f}" if 0.1 <= abs(value) < 10 else f"{value:.3g}"
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else text
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
    fig, (ax,) = chart(6.4, 2.9)
    ax.fill_between(center, low, high, color=BLUE, alpha=0.2, lw=0, label="middle half")
    ax.plot(center, means, "o-", color=BLUE, ms=4, lw=1.8, label="mean")
    if low.min() > 0 and means.max() > 10 * means.min():
        log_axis(ax, "y")
    ax.set(xlabel="t", ylabel="loss", xlim=(0, T), title=f"{title} (N={len(t):,})")
    ax.legend()
    ends = f"{means[0]:.3g} near t = {center[0]:.0f}, {means[-1]:.3g} near {center[-1]:.0f}"
    fig.alt_text = f"{title}: {ends}; N={len(t)}."
    return fig


Line = Sequence[Any]  # (x, y), or (x, y, low, high), each (N,)


@styled
def curves(
    panels: Mapping[str, Mapping[str, Line]],
    *,
    xlabel: str | Sequence[str],
    ylabel: str | Sequence[str],
    log: str = "",
    spans: Mapping[str, tuple[float, float]] | None = None,
    ticks: Numbers | Sequence[Numbers] | None = None,
) -> NotebookFigure:
    """A panel for each title, with named lines of points: {"emoji": {"WebP": (x, y)}}.

    A line is (x, y), each (N,), or (x, y, low, high), whose intervals are drawn as bars. A name
    has one colour and one mark in all panels; one that ends in "*" is drawn as points alone,
    without the star. xlabel, ylabel: one for all, or one a panel. log: "x", "y" or "xy". spans:
    stretches of x that are shaded and named. ticks: where x has labels, for all or one a panel.
    """
    if not panels or not all(panels.values()):
        raise ValueError(f"panels: no lines in {[k for k, v in panels.items() if not v] or 'it'}")
    fig, axes = chart(4.6 if len(panels) > 1 else 6.4, 3.1, len(panels))
    under, labels = (
        [given] * len(panels) if isinstance(given, str) else given for given in (xlabel, ylabel)
    )
    marked = ticks if ticks is not None and np.ndim(ticks[0]) else [ticks] * len(panels)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    said = []
    parts = zip(axes, panels.items(), under, labels, marked, strict=True)
    for ax, (title, lines), x, label, at in parts:
        for name, line in lines.items():
            said.append(f"{title} {name} {_line(ax, name, line, names.index(name))}")
        ax.set(xlabel=x, ylabel=label, title=title)
        for which in log:
            log_axis(ax, which)
        if at is not None:
            ax.set_xticks(at, [f"{tick:g}" for tick in at])
            ax.xaxis.set_minor_locator(NullLocator())  # the y axis keeps its own
        _shade(ax, spans or {})
    if len(names) > 1:
        handles = {
            t: h for ax in axes for h, t in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        legend_below(fig, list(handles.values()), list(handles))
    against = " and ".join(dict.fromkeys(under))
    fig.alt_text = f"{', '.join(dict.fromkeys(labels))} against {against}. {'; '.join(said)}."
    return fig


def _line(ax: Axes, name: str, line: Line, number: int) -> str:
    """Draw one line of `curves`; say where it begins and ends."""
    x, y, *interval = (np.asarray(part, dtype=float) for part in line)
    if x.ndim != 1 or any(part.shape != x.shape for part in (y, *interval)) or not len(x):
        shapes = ", ".join(str(part.shape) for part in (x, y, *interval))
        raise ValueError(f"{name}: x, y and the interval's ends must be (N,), N >= 1, got {shapes}")
    style = {"color": PALETTE[number % len(PALETTE)], "marker": MARKS[number % len(MARKS)]}
    style |= {"ms": 5 if len(x) < 40 else 0, "lw": 1.7}
    if name.endswith("*"):
        style |= {"ms": 5 if len(x) < 40 else 3, "lw": 0}
    reach = None
    if interval:
        reach = np.nan_to_num([y - interval[0], interval[1] - y]).clip(min=0)
    ax.errorbar(x, y, reach, label=name.rstrip("*"), capsize=2.5, elinewidth=1.2, **style)
    return f"from {y[0]:.3g} at {x[0]:.3g} to {y[-1]:.3g} at {x[-1]:.3g}"


def _shade(ax: Axes, spans: Mapping[str, tuple[float, float]]) -> None:
    """Each span's name at its left edge, one below the other, as some are narrow."""
    for i, (name, (low, high)) in enumerate(spans.items()):
        ax.axvspan(low, high, color=PALETTE[(i + 2) % len(PALETTE)], alpha=0.14, lw=0)
        place, reach = ("data", "axes fraction"), (3, -3 - 11 * i)
        ax.annotate(name, (low, 1.0), reach, place, "offset points", va="top", fontsize=8)
