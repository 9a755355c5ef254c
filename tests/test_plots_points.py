"""Figures of points in the plane: what is drawn where, and clear refusals."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from minildm import plots

CORNERS = torch.tensor([[-2.0, -1.0], [2.0, -1.0], [2.0, 1.0]])


def test_points_lie_where_they_belong_in_every_panel() -> None:
    panels = {"as pairs": CORNERS, "as latents": 0.5 * CORNERS.view(3, 2, 1, 1)}
    fig = plots.clouds(panels, backdrop=CORNERS, reach=2.5)
    for ax, cloud in zip(fig.axes, panels.values(), strict=True):
        grey, blue = ax.collections
        assert np.allclose(blue.get_offsets(), cloud.flatten(1))
        assert np.allclose(grey.get_offsets(), CORNERS)
        assert ax.get_xlim() == ax.get_ylim() == (-2.5, 2.5)
    assert [ax.get_title() for ax in fig.axes] == list(panels)
    assert "as latents (N=3)" in fig.alt_text


def test_each_group_has_its_colour() -> None:
    fig = plots.clouds({"a": CORNERS}, groups=torch.tensor([0, 5, 0]))
    first, second, third = fig.axes[0].collections[0].get_facecolors()[:, :3]
    assert np.allclose(first, third) and not np.allclose(first, second)


def test_arrows_reach_from_start_to_end() -> None:
    fig = plots.arrows({"t = 3": (CORNERS, CORNERS.flip(0))})
    (field,) = fig.axes[0].collections
    assert np.allclose(field.XY, CORNERS)
    assert np.allclose(np.stack([field.U, field.V], 1), CORNERS.flip(0) - CORNERS)
    assert (field.angles, field.scale_units, field.scale) == ("xy", "xy", 1)  # in the data's units


def test_paths_go_through_their_states() -> None:
    states = torch.stack([CORNERS, 0.5 * CORNERS, 0 * CORNERS]).view(3, 3, 2, 1, 1)
    fig = plots.paths({"ddim": states})
    lines = fig.axes[0].lines
    assert len(lines) == 9  # of each path the line, its start, its end
    for n in range(3):
        line, start, end = (part.get_xydata() for part in lines[3 * n : 3 * n + 3])
        assert np.allclose(line, states[:, n].flatten(1))
        assert np.allclose(start, line[:1]) and np.allclose(end, line[-1:])


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "no panel": (lambda: plots.clouds({}), "need panels"),
    "no column": (lambda: plots.paths({"a": CORNERS[None]}, columns=0), "columns >= 1"),
    "no reach": (lambda: plots.clouds({"a": CORNERS}, reach=0.0), "reach > 0"),
    "three coordinates": (lambda: plots.clouds({"a": CORNERS.T}), r"a must be \(N, 2\).*\(2, 3\)"),
    "a picture": (lambda: plots.clouds({"a": torch.zeros(2, 2, 4, 4)}), r"a must be \(N, 2\)"),
    "no point": (lambda: plots.clouds({"a": CORNERS[:0]}), "not empty"),
    "NaN": (lambda: plots.clouds({"a": CORNERS * torch.nan}), "finite"),
    "groups": (
        lambda: plots.clouds({"a": CORNERS}, groups=torch.zeros(2)),
        r"groups must be \(3,\) as a",
    ),
    "one end missing": (lambda: plots.arrows({"a": (CORNERS, CORNERS[:2])}), "3 arrows start"),
    "no states": (lambda: plots.paths({"a": CORNERS}), r"a must be \(S, N, 2\)"),
    "backdrop": (lambda: plots.clouds({"a": CORNERS}, backdrop=CORNERS[0]), "backdrop must be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_drawn_is_refused(case: str) -> None:
    draw, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        draw()


@pytest.mark.parametrize("n", [5, 200])
def test_a_starred_name_is_drawn_as_points_however_many(n: int) -> None:
    x = np.linspace(0, 1, n)
    fig = plots.curves({"": {"drawn*": (x, x), "line": (x, x)}}, xlabel="x", ylabel="y")
    drawn, line = (bar.lines[0] for bar in fig.axes[0].containers)
    assert drawn.get_markersize() > 0 and drawn.get_linewidth() == 0
    assert line.get_linewidth() > 0
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["drawn", "line"]


@pytest.mark.parametrize("log", ["", "x", "y", "xy"])
@pytest.mark.parametrize(("low", "high"), [(2275, 2565), (1100, 3300), (0.02, 3), (1e-9, 10)])
def test_both_axes_have_numbers_whatever_is_logarithmic(log: str, low: float, high: float) -> None:
    x, y = [250, 500, 1000, 2000], np.linspace(low, high, 4)
    for ticks in (None, x):
        fig = plots.curves({"": {"a": (x, y)}}, xlabel="x", ylabel="y", log=log, ticks=ticks)
        FigureCanvasAgg(fig).draw()
        (ax,) = fig.axes
        for axis, (least, most) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            drawn = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            seen = [t for t in drawn if least <= t.get_loc() <= most and t.label1.get_text()]
            assert 2 <= len(seen) <= 12, [t.label1.get_text() for t in seen]
        if "y" in log and low > 1000:
            assert "2000" in {t.label1.get_text() for t in seen} or low > 2000
            assert all(t.label1.get_text().isdigit() for t in seen)
        if ticks is not None:
            assert [t.get_text() for t in ax.get_xticklabels()] == ["250", "500", "1000", "2000"]
            assert len(ax.get_xticklabels(minor=True)) == 0


def test_bars_write_negative_numbers_as_they_write_positive_ones() -> None:
    fig = plots.bars({"a": -1667.4, "b": 561.8, "c": -0.5, "d": 1667.4}, xlabel="x")
    assert fig.alt_text.endswith("a -1,667, b 562, c -0.50, d 1,667.")


@pytest.mark.parametrize("ticks", [(2, 4), torch.tensor([2, 4]), ((2, 4), [20, 40, 80])])
def test_ticks_are_for_all_panels_or_one_a_panel(ticks: object) -> None:
    panels = {"steps": {"a": ([1, 4], [1, 2])}, "seconds": {"a": ([10, 80], [1, 2])}}
    fig = plots.curves(panels, xlabel="x", ylabel="y", log="x", ticks=ticks)
    found = [[text.get_text() for text in ax.get_xticklabels()] for ax in fig.axes]
    assert found == [["2", "4"], ["20", "40", "80"] if isinstance(ticks[1], list) else ["2", "4"]]


def test_a_logarithmic_x_axis_has_plain_numbers_that_do_not_touch() -> None:
    for x in ([250, 500, 1000, 2000], [2, 4, 9, 17, 30, 75], [0.32, 0.85], [1, 1e4]):
        fig = plots.curves({"": {"a": (x, x)}}, xlabel="x", ylabel="y", log="x")
        fig.canvas.draw()
        boxes = [t.get_window_extent() for t in fig.axes[0].get_xticklabels() if t.get_text()]
        inside = [box for box in boxes if fig.bbox.x0 <= box.x0 <= box.x1 <= fig.bbox.x1]
        assert len(inside) >= 2
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(sorted(inside, key=lambda b: b.x0)))
        assert not any("times" in t.get_text() for t in fig.axes[0].get_xticklabels(minor=True))


def test_a_legend_of_long_names_stays_inside() -> None:
    lines = {f"a name of some length, {i}": ([1, 2], [1, 2]) for i in range(6)}
    for fig in (
        plots.curves({"": lines}, xlabel="x", ylabel="y"),
        plots.curves({"a": lines, "b": lines}, xlabel="x", ylabel="y"),
        plots.bars({name: {"row": 1.0} for name in lines}),
    ):
        fig.canvas.draw()
        box = fig.legends[0].get_window_extent()
        assert len(fig.legends) == 1
        assert fig.bbox.x0 <= box.x0 < box.x1 <= fig.bbox.x1
