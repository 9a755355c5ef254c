"""Figures: pixels where they belong, a text for each, nothing left open, clear refusals."""

import base64
import io
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from minildm import plots
from minildm.schedule import NoiseSchedule
from minildm.types import Record


def pixels(fig: Figure) -> np.ndarray:
    """The figure as drawn: (H, W, 3) uint8."""
    data, _ = fig._repr_mimebundle_()
    png = base64.b64decode(data["image/png"])
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def history(n: int, **terms: float) -> list[Record]:
    return [
        Record(i, 8 * i, 0.5 * i, 1e-3, {k: v / i for k, v in terms.items()})
        for i in range(1, n + 1)
    ]


X = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
X2 = 2 * X[:, :2, :1, :1]  # points of the plane
T_ALL = torch.arange(100)
EVERY = {
    "image_grid": lambda: plots.image_grid(X, [f"a long caption {i}" for i in range(6)], columns=4),
    "class_grid": lambda: plots.class_grid(X, ["food-fruit", "animal-mammal"], title="Classes"),
    "pairs": lambda: plots.pairs(X, 0.5 * X, psnr=[20.0] * 6, columns=4),
    "loss_curves": lambda: plots.loss_curves({"ae": history(50, loss=1.0, reg_loss=900.0)}),
    "trajectory": lambda: plots.trajectory(X[:, None], [9, 7, 5, 3, 1, 0], z0_images=X[:, None]),
    "schedule_curves": lambda: plots.schedule_curves(NoiseSchedule.scaled_linear(50)),
    "bars": lambda: plots.bars({"fruit": 0.8, "cars": 0.4}, {"fruit": (0.7, 0.9)}, chance=0.1),
    "loss_against_t": lambda: plots.loss_against_t(T_ALL, 1.0 / (1 + T_ALL), 100),
    "latent_maps": lambda: plots.latent_maps(torch.randn(2, 3, 4, 5), rows=["a", "b"]),
    "word_maps": lambda: plots.word_maps(X[0], ["a", "red", "apple"], X.abs()[:3, 0]),
    "curves": lambda: plots.curves({"a": {"KL": ([1, 2], [3, 4])}}, xlabel="f", ylabel="dB"),
    "clouds": lambda: plots.clouds({"data": X2}, groups=torch.arange(6), backdrop=X2 / 2),
    "arrows": lambda: plots.arrows({"t = 3": (X2, 0 * X2), "t = 5": (X2, X2 / 2)}),
    "paths": lambda: plots.paths({"ddim": torch.stack([X2, X2 / 2, 0 * X2])}, backdrop=X2),
}


@pytest.mark.parametrize("name", EVERY)
def test_every_figure_saves_with_its_text_and_leaves_nothing_open(
    name: str, tmp_path: Path
) -> None:
    before = dict(plt.rcParams)
    fig = EVERY[name]()
    path = plots.save(fig, tmp_path / "deep" / f"{name}.png")
    with Image.open(path) as picture:
        assert picture.info["Description"] == fig.alt_text
        assert 100 < picture.width < 1300 and 50 < picture.height < 1300
    assert len(fig.alt_text) > 20
    assert plt.get_fignums() == []
    assert dict(plt.rcParams) == before
    assert [file.name for file in path.parent.iterdir()] == [f"{name}.png"]


def test_the_same_figure_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (plots.save(plots.image_grid(X), tmp_path / f"{i}.png") for i in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_save_takes_another_text_and_figures_of_pyplot(tmp_path: Path) -> None:
    fig, ax = plt.subplots()
    ax.plot([1, 2])
    with pytest.raises(ValueError, match="alt is missing"):
        plots.save(fig, tmp_path / "line.png")
    path = plots.save(fig, tmp_path / "line.png", alt="A line rises; ẑ₀ too.")
    with Image.open(path) as picture:
        assert picture.info["Description"] == "A line rises; ẑ₀ too."
    assert plt.get_fignums() == []
    with pytest.raises(ValueError, match=r"line.jpg.*\.png"):
        plots.save(fig, tmp_path / "line.jpg", alt="x")


def test_a_notebook_shows_the_figure_with_its_text() -> None:
    fig = plots.image_grid(X, title="Six")
    data, metadata = fig._repr_mimebundle_()
    json.dumps([data, metadata])
    assert list(data) == ["image/png"]
    assert metadata["image/png"]["alt"] == "Six: 6 pictures in rows of 8."


@pytest.mark.parametrize("side", [16, 64, 256])
def test_pictures_are_shown_pixel_for_pixel(side: int) -> None:
    x = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
    drawn = pixels(plots.image_grid(x, scale=side / plots.DPI * 2 if side < 256 else 256 / 120))
    k = 2 if side < 256 else 1
    for i, picture in enumerate(x):
        left = plots.GAP + i * (k * side + plots.GAP)
        part = drawn[plots.GAP : plots.GAP + k * side, left : left + k * side]
        assert np.array_equal(part[::k, ::k], picture.permute(1, 2, 0).numpy())
        assert np.array_equal(part[1 % k :: k, 1 % k :: k], part[::k, ::k])


def test_values_map_to_black_grey_and_white_and_overshoot_is_clipped() -> None:
    x = torch.tensor([-1.3, -1.0, 0.0, 1.0, 1.3]).view(5, 1, 1, 1).expand(5, 3, 8, 8)
    drawn = pixels(plots.image_grid(x, scale=8 / plots.DPI))
    middle = [int(drawn[10, plots.GAP + i * (8 + plots.GAP) + 4, 0]) for i in range(5)]
    assert middle == [0, 0, 128, 255, 255]


def test_large_pictures_shrink_by_area() -> None:
    x = torch.zeros(1, 3, 400, 400, dtype=torch.uint8)
    x[..., ::2] = 200
    drawn = pixels(plots.image_grid(x, scale=100 / plots.DPI))
    part = drawn[plots.GAP : plots.GAP + 100, plots.GAP : plots.GAP + 100]
    assert part.shape == (100, 100, 3) and (part == 100).all()


def test_pairs_put_each_reconstruction_under_its_original() -> None:
    x = torch.full((5, 3, 16, 16), -1.0)
    fig = plots.pairs(x, -x, columns=3)
    column = pixels(fig)[:, -20 - 2 * (plots.GAP + 128), :]
    dark, bright = (column == 0).all(axis=1), (column == 255).all(axis=1)
    assert dark.sum() == 2 * 128 and dark[: plots.GAP + 10].any()
    assert bright.sum() >= 2 * 128
    assert "original, reconstruction" in fig.alt_text


def test_trajectory_keeps_the_first_and_the_last_state() -> None:
    times = list(range(99, -1, -1))
    fig = plots.trajectory(X[:1].expand(100, 3, 16, 16), times, columns=5)
    assert "t = 99, t = 74" in fig.alt_text and fig.alt_text.endswith("t = 0.")
    both = plots.trajectory(X[:2], torch.tensor([5, 0]), z0_images=X[:2])
    assert "zₜ decoded, ẑ₀ decoded" in both.alt_text


def test_columns_have_heads_and_rows_their_names() -> None:
    fig = plots.class_grid(X, ["apple", "dog"], heads=["noto", "blob", "fluent"])
    assert fig.alt_text == "3 pictures of each: apple, dog, noto, blob, fluent."
    place = {text.get_text(): text.get_position() for text in fig.axes[0].texts}
    xs = [place[name][0] for name in ("apple", "noto", "blob", "fluent")]
    assert xs == sorted(xs) and place["noto"][1] < place["apple"][1] < place["dog"][1]


def test_no_text_leaves_its_figure() -> None:
    long = ["a very long caption that needs lines " * 3, "W" * 40, ""]
    fig = plots.image_grid(X[:3], long, title="A title that is longer than three pictures " * 2)
    rows = plots.class_grid(X[:2], ["Wwwwwwwwwwwwwwwwww", "people-body and some more words"])
    for figure in (fig, rows, EVERY["bars"](), EVERY["trajectory"]()):
        pixels(figure)
        box = figure.get_tightbbox().bounds
        assert min(box[:2]) >= -0.01
        assert (np.add(box[:2], box[2:]) <= figure.get_size_inches() + 0.01).all()


def test_loss_curves_smooth_and_name_what_they_leave_out() -> None:
    records = history(40, loss=1.0, rec_loss=0.8, reg_loss=5000.0)
    fig = plots.loss_curves({"first": records, "second": history(3, loss=1.0)}, smooth=0.1)
    first, second = fig.axes
    lines = {line.get_label(): line for line in first.lines}
    assert "loss" in lines and "rec_loss" in lines and "reg_loss" not in lines
    assert "reg_loss" in first.get_title()
    mean = lines["loss"].get_ydata()
    assert mean[0] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert len(mean) == 37 and lines["loss"].get_xdata()[0] == 4
    assert first.get_yscale() == "log" and "320 pictures" in first.get_xlabel()
    assert "20 s" in first.get_xlabel() and len(second.lines) == 2
    only = plots.loss_curves({"a": records}, terms=["reg_loss"])
    assert "reg_loss from" in only.alt_text


def test_a_loss_that_is_not_positive_or_hardly_falls_gets_a_linear_axis() -> None:
    for losses in ([0.0, -1.0, -2.0], [0.45, 0.3, 0.21]):
        records = [Record(i, i, 1.0, 0.1, {"loss": loss}) for i, loss in enumerate(losses, 1)]
        assert plots.loss_curves({"a": records}).axes[0].get_yscale() == "linear"


def test_schedule_curves_mark_where_noise_overtakes_signal() -> None:
    schedule = NoiseSchedule.scaled_linear()
    fig = plots.schedule_curves(schedule)
    t = int((schedule.alphas_cumprod <= 0.5).nonzero()[0])
    assert f"equal at t = {t}" in fig.alt_text
    assert "noise stays below" in plots.schedule_curves(NoiseSchedule.scaled_linear(3)).alt_text


def test_bars_draw_intervals_and_counts_of_measured_values() -> None:
    values = {
        "samples": {"fruit": (0.5, 0.4, 0.6, 64), "cars": (0.25, 0.2, 0.3, 64)},
        "real": {"fruit": (0.9, 0.85, 0.95, 1200)},
    }
    fig = plots.bars(values, chance=1 / 9)
    (ax,) = fig.axes
    assert sorted(bar.get_width() for bar in ax.patches) == [0.25, 0.5, 0.9]
    assert [text.get_text() for text in ax.texts][-1] == "0.90  (N=1,200)"
    assert "samples fruit 0.50  (N=64)" in fig.alt_text and "chance" in str(
        [text.get_text() for text in fig.legends[0].get_texts()]
    )
    ends = [segment[:, 0] for line in ax.collections for segment in line.get_segments()]
    assert np.allclose(sorted(ends, key=lambda e: e[0])[0], [0.2, 0.3])


def test_loss_against_t_averages_inside_each_bin() -> None:
    t, loss = torch.tensor([0, 1, 2, 50, 99]), torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0])
    fig = plots.loss_against_t(t, loss, 100, bins=2)
    mean = next(line for line in fig.axes[0].lines if line.get_label() == "mean")
    assert mean.get_ydata().tolist() == [2.0, 6.0] and mean.get_xdata().tolist() == [25.0, 75.0]


def test_latent_maps_are_symmetric_about_grey() -> None:
    z = torch.zeros(1, 2, 4, 4)
    z[:, 0, 0, 0], z[:, 1] = 3.0, -3.0
    fig = plots.latent_maps(z)
    drawn = pixels(fig)
    assert tuple(drawn[60 + plots.GAP, plots.GAP + 100]) == (128, 128, 128)  # zero
    assert tuple(drawn[80, 2 * plots.GAP + 128 + 60]) == (0, 0, 0)  # the lowest
    assert len(fig.axes) == 2
    assert fig.axes[1].get_ylim() == pytest.approx((-3.0, 3.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.image_grid(torch.zeros(3, 8, 8)), r"\(N, 3, H, W\).*\(3, 8, 8\)"),
        (lambda: plots.image_grid(X[:0]), "N >= 1"),
        (lambda: plots.image_grid(X * 200), r"\[-1, 1\]"),
        (lambda: plots.image_grid(X * float("nan")), "finite"),
        (lambda: plots.image_grid(X, ["one"]), "titles: 1 given for 6"),
        (lambda: plots.image_grid(X, columns=0), "columns=0"),
        (lambda: plots.class_grid(X, ["a"] * 4), "6 pictures are no equal share for 4"),
        (lambda: plots.class_grid(X, ["a"], heads=["b"] * 5), "heads: 5 given for 6 columns"),
        (lambda: plots.pairs(X, X[:3]), "must be alike"),
        (lambda: plots.pairs(X, X, psnr=[1.0]), "psnr: 1 given for 6"),
        (lambda: plots.trajectory(X, [1, 2]), "times: 2 given for 6"),
        (lambda: plots.trajectory(X, [1] * 6, z0_images=X[:3]), "z0_images"),
        (lambda: plots.loss_curves({}), "histories"),
        (lambda: plots.loss_curves({"a": []}), "no records of .*a"),
        (lambda: plots.loss_curves({"a": history(2, loss=1.0)}, smooth=2), "smooth=2"),
        (lambda: plots.loss_curves({"a": history(2, loss=1.0)}, terms=["x"]), "a has loss"),
        (lambda: plots.bars({}), "at least one"),
        (lambda: plots.loss_against_t(T_ALL, T_ALL[:5], 100), r"\(100,\), \(5,\)"),
        (lambda: plots.loss_against_t(T_ALL, 1.0 * T_ALL, 50), r"0\.\.49"),
        (lambda: plots.latent_maps(torch.zeros(3, 4, 4)), r"\(3, 4, 4\)"),
    ],
)
def test_what_is_wrong_is_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_word_lights_the_place_it_is_looked_at() -> None:
    maps = torch.zeros(2, 4, 4)
    maps[0, 0, 0], maps[1, 3, 3] = 0.5, 0.25  # against its own mean each is as bright
    fig = plots.word_maps(torch.zeros(3, 16, 16), ["sky", "dog"], maps)
    drawn = pixels(fig).astype(float).mean(axis=2)
    assert "sky ×16.0" in fig.alt_text and "dog ×16.0" in fig.alt_text
    k = round(1.1 * plots.DPI / 16)
    w, h = drawn.shape[1], 16 * k
    left = [w - (3 - i) * (h + plots.GAP) for i in range(3)]
    sky, dog = (drawn[plots.GAP : plots.GAP + h, x : x + h] for x in left[1:])
    half = h // 2
    assert sky[:half, :half].mean() > 1.5 * sky[half:, half:].mean()
    assert dog[half:, half:].mean() > 1.5 * dog[:half, :half].mean()
    assert sky[:half, :half].mean() == pytest.approx(dog[half:, half:].mean(), rel=0.1)


def test_a_word_that_is_looked_at_everywhere_is_of_one_tone() -> None:
    flat = torch.stack([torch.full((4, 4), 0.04), torch.eye(4)])
    fig = plots.word_maps(torch.zeros(3, 16, 16), ["a", "dog"], flat)
    assert "a ×1.0" in fig.alt_text
    side = round(1.1 * plots.DPI / 16) * 16
    left = pixels(fig).shape[1] - 2 * (side + plots.GAP)
    tone = pixels(fig)[plots.GAP : plots.GAP + side, left : left + side]
    assert int(tone.std(axis=(0, 1)).max()) == 0


@pytest.mark.parametrize(
    ("words", "maps", "said"),
    [
        (["a"], torch.zeros(2, 4, 4), "words: 1 given for 2"),
        (["a"], -torch.ones(1, 4, 4), "finite and not negative"),
        ([], torch.zeros(0, 4, 4), "K >= 1"),
    ],
)
def test_maps_that_are_none_are_refused(words: list[str], maps: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plots.word_maps(X[0], words, maps)
