"""Figures: the right pixels and numbers in the right places, readable text, a PNG with its alt."""

import base64
import io
import itertools
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from helpers import randn
from PIL import Image

from minildm.evaluation.intervals import Measured
from minildm.teaching import plots
from minildm.training.loop import Record

X = randn(6, 3, 16, 16).clamp(-1, 1)
POINTS = 2 * X[:, :2, :1, :1]  # (6, 2, 1, 1)
MEASURED = {name: Measured(0.5 + i / 10, 0.4, 0.95, 1200) for i, name in enumerate("ab")}
LONG = "a caption of several words"


def records(n: int, every: int = 1, **terms: float) -> list[Record]:
    """As with log_every=every: term / i at the i-th record."""
    return [
        Record(every * i, 8 * every * i, 0.5 * i, 1e-3, {k: v / i for k, v in terms.items()})
        for i in range(1, n + 1)
    ]


EVERY = {
    "image_grid": lambda: plots.image_grid(X, [LONG, "a" * 40, *"abcd"], columns=4, title=LONG),
    "class_grid": lambda: plots.class_grid(X, ["food-fruit", LONG], heads="abc", title=3 * LONG),
    "rows": lambda: plots.image_grid(X, [""] * 3 + ["20.0 dB"] * 3, rows=["original", LONG]),
    "latent_maps": lambda: plots.latent_maps(randn(2, 3, 4, 5), rows=["a", "b"]),
    "word_maps": lambda: plots.word_maps(X[0], ["a", "red", "apple"], X.abs()[:3, 0]),
    "loss_curves": lambda: plots.loss_curves({"ae": records(50, loss=1.0, rec_loss=0.5)}),
    "bars": lambda: plots.bars({"samples": MEASURED, LONG: MEASURED}, chance=0.1),
    "curves": lambda: plots.curves(
        {"a": {f"{LONG} {i}": ([1, 2], [3, 4]) for i in range(6)}, "b": {"c": ([1], [2])}},
        xlabel="f",
        ylabel=["dB", "nats"],
    ),
    "clouds": lambda: plots.clouds({"data": POINTS}, backdrop=POINTS / 2),
}


def texts(fig: plots.NotebookFigure) -> list[plt.Text]:
    """All that is written in a figure, without tick labels beyond the ends of an axis."""
    found = [text for legend in fig.legends for text in legend.get_texts()]
    for ax in fig.axes:
        found += [ax.title, ax._left_title, ax.xaxis.label, ax.yaxis.label, *ax.texts]
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            found += [label for tick in ticks for label in (tick.label1, tick.label2)]
    return [text for text in found if text.get_visible() and text.get_text().strip()]


@pytest.mark.parametrize("name", EVERY)
def test_every_figure_is_saved_with_its_alt_and_its_texts_do_not_overlap(
    name: str, tmp_path: Path
) -> None:
    before = dict(plt.rcParams)
    fig = EVERY[name]()
    plots.save(fig, tmp_path / "deep" / name)
    with Image.open(tmp_path / "deep" / f"{name}.png") as image:
        assert image.info["Description"] == fig.alt and len(fig.alt) >= 20
        assert 100 < image.width < 1400 and 50 < image.height < 1400
    assert plt.get_fignums() == [] and dict(plt.rcParams) == before
    boxes = {text: text.get_window_extent().padded(-1) for text in texts(fig)}
    for a, b in itertools.combinations(boxes, 2):
        assert not boxes[a].overlaps(boxes[b]), (a.get_text(), b.get_text())


def canvas(fig: plots.NotebookFigure) -> np.ndarray:
    """The images of a sheet, before it is drawn: (H, W, 3) uint8."""
    return fig.axes[0].images[0].get_array()


@pytest.mark.parametrize(("side", "k"), [(16, 4), (37, 2)])
def test_images_are_sharp_squares_in_the_png(side: int, k: int) -> None:
    x = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
    fig = plots.image_grid(x, ["a", "b", "c"], columns=2, scale=k * side / plots.DPI)
    data, metadata = fig._repr_mimebundle_()
    assert metadata == {"image/png": {"alt": fig.alt}}
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB"))
    for image in x.permute(0, 2, 3, 1).numpy().repeat(k, 1).repeat(k, 2):
        windows = np.lib.stride_tricks.sliding_window_view(drawn, image.shape)[:, :, 0]
        corners = np.argwhere((windows[..., 0, 0, :] == image[0, 0]).all(-1))
        assert sum(np.array_equal(windows[tuple(at)], image) for at in corners) == 1


def test_values_map_to_black_grey_and_white_and_large_images_shrink_by_area() -> None:
    x = torch.tensor([-1.3, -1.0, 0.0, 1.0, 1.3]).view(5, 1, 1, 1).expand(5, 3, 8, 8)
    row = canvas(plots.image_grid(x, scale=8 / plots.DPI))[4, 4 :: 8 + 2 + plots.GAP, 0]
    assert row.tolist() == [0, 0, 128, 255, 255]
    x = torch.zeros(1, 3, 400, 400, dtype=torch.uint8)
    x[..., ::2] = 200
    assert (canvas(plots.image_grid(x, scale=100 / plots.DPI)) == 100).all(-1).sum() == 100 * 100
    fig = plots.latent_maps(torch.tensor([3.0, 0.0, -3.0]).view(1, 3, 1, 1))  # grey at zero
    assert canvas(fig)[60, 60::140, 0].tolist() == [255, 128, 0]


def test_rows_and_columns_are_named_where_they_are() -> None:
    fig = plots.class_grid(X, ["apple", "dog"], heads=["noto", "blob", "fluent"])
    (ax,), (height, width, _) = fig.axes, canvas(fig).shape
    assert [t.get_text() for t in ax.get_yticklabels()] == ["apple", "dog"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["noto", "blob", "fluent"]
    assert np.allclose(ax.get_yticks() / height, [1 / 4, 3 / 4], atol=0.02)
    assert np.allclose(ax.get_xticks() / width, [1 / 6, 3 / 6, 5 / 6], atol=0.02)


def test_a_word_lights_the_place_of_its_attention() -> None:
    maps = torch.full((3, 4, 4), 0.04)  # the last word: everywhere alike
    maps[:2] = 0
    maps[0, 0, 0], maps[1, 3, 3] = 0.5, 0.25  # relative to its own mean each is as bright
    fig = plots.word_maps(torch.zeros(3, 16, 16), ["sky", "dog", "a"], maps)
    assert "sky ×16.0, dog ×16.0, a ×1.0" in fig.alt
    drawn = canvas(fig).astype(float).mean(2)
    sky, dog, even = (drawn[1:129, 1 + i * (130 + plots.GAP) :][:, :128] for i in (1, 2, 3))
    assert sky[:64, :64].mean() > 1.5 * sky[64:, 64:].mean() and even.std() < 1e-6
    assert dog[64:, 64:].mean() == pytest.approx(sky[:64, :64].mean(), rel=0.1)


def test_loss_curves_are_running_means_over_records_at_their_steps() -> None:
    fig = plots.loss_curves({"a": records(40, 10, loss=1.0, reg_loss=9e3)})
    (line,) = (bar[0] for bar in fig.axes[0].containers)
    assert line.get_xdata().tolist() == list(range(20, 401, 10))  # log_every = 10, means of 2
    assert line.get_ydata()[-1] == pytest.approx((1 / 39 + 1 / 40) / 2)
    assert fig.axes[0].get_yscale() == "log" and "3,200 images, 20 s" in fig.axes[0].get_title()
    fig = plots.loss_curves({"a": records(9, kl=-1.0, mse=2.0), "b": records(9, mse=2.0)})
    assert [len(ax.containers) for ax in fig.axes] == [2, 1]


def test_bars_have_the_values_their_intervals_and_counts() -> None:
    fig = plots.bars(dict.fromkeys("xy", MEASURED))
    assert [bar.get_width() for bar in fig.axes[0].patches] == [0.5, 0.6] * 2
    reached = [s[:, 0].tolist() for c in fig.axes[0].collections for s in c.get_segments()]
    assert np.allclose(reached, [[0.4, 0.95]] * 4)
    assert "b 0.6  (N=1,200)" in fig.alt


@pytest.mark.parametrize("log", ["", "xy"])
@pytest.mark.parametrize(("low", "high"), [(2275, 2565), (0.02, 3), (1e-9, 10)])
def test_axes_have_readable_numbers_at_every_range(log: str, low: float, high: float) -> None:
    line = ([250, 500, 1000, 2000], np.linspace(low, high, 4))
    fig = plots.curves({"": {"a": line}}, xlabel="x", ylabel="y", log=log)
    fig.encoded()
    written = [text.get_text() for text in texts(fig)]
    assert 6 <= len(written) <= 26 and not any("times" in text for text in written)


def test_points_and_arrows_are_where_they_belong() -> None:
    xy, end = POINTS.flatten(1), POINTS.flip(0)
    grey, blue = plots.clouds({"a": POINTS}, backdrop=xy / 2).axes[0].collections
    assert np.allclose(blue.get_offsets(), xy) and np.allclose(grey.get_offsets(), xy / 2)
    (ax,) = plots.clouds({"a": (POINTS, end)}).axes
    field = ax.collections[-1]
    assert np.allclose(np.stack([field.U, field.V], 1), xy.flip(0) - xy)
    assert np.allclose(field.XY, xy) and ax.get_xlim() == (-3.0, 3.0)
