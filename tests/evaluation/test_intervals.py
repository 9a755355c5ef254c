"""Intervals against scipy, published tables and simulated truth."""

import json
import math

import pytest
import torch
from helpers import randn

from minildm.evaluation.following import share
from minildm.evaluation.intervals import (
    Evaluation,
    Measured,
    jackknife,
    mean_interval,
    proportion_interval,
    random_groups,
)


@pytest.mark.parametrize(  # Newcombe (1998), Statistics in Medicine 17, Table I, method 3
    ("r", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)],
)
def test_wilsons_interval_against_newcombes_table(r: int, n: int, low: float, high: float) -> None:
    found = proportion_interval(r, n)
    assert found.value == r / n and found.n == n
    assert (found.low, found.high) == pytest.approx((low, high), abs=6e-5)


def test_intervals_contain_the_truth_as_often_as_they_say() -> None:
    """400 simulations of each; values of one cluster share most of their error."""
    draw = torch.Generator().manual_seed(0)
    clusters, hits = torch.arange(40).repeat_interleave(6), torch.zeros(6)
    for _ in range(400):
        shared = torch.randn(40, 1, generator=draw)
        values = (shared + 0.3 * torch.randn(40, 6, generator=draw)).flatten()
        skewed = torch.empty(40).exponential_(generator=draw)
        right = torch.rand(40, 6, generator=draw) < 0.3
        alike = torch.rand(40, 6, generator=draw) < 2 / 3
        clustered = torch.where(alike, right[:, :1], right).flatten()
        found = (
            (mean_interval(shared[:, 0]), 0.0),
            (mean_interval(values, clusters), 0.0),
            (proportion_interval(int(right.sum()), 240), 0.3),
            (jackknife(torch.mean, skewed), 1.0),
            (share(clustered, clusters), 0.3),
            (proportion_interval(int(clustered.sum()), 240), 0.3),  # as if independent: too narrow
        )
        hits += torch.tensor([m.low <= truth <= m.high for m, truth in found])
    assert ((hits[:5] / 400 > 0.91) & (hits[:5] / 400 < 0.985)).all() and hits[5] / 400 < 0.85


def test_the_jackknife_of_a_mean_is_students_interval_of_the_groups_means() -> None:
    values, group = randn(50, dtype=torch.float64), torch.arange(50) % 10
    found = jackknife(torch.mean, values, groups=[group])
    of_groups = mean_interval(torch.stack([values[group == i].mean() for i in range(10)]))
    assert found[:3] == pytest.approx(of_groups[:3], abs=1e-12) and found.n == 50
    cut = jackknife(torch.mean, values, groups=[group], bounds=(-0.01, 0.01))
    assert cut.low == max(-0.01, found.low) and cut.high == min(0.01, found.high)
    assert jackknife(torch.mean, values) == jackknife(torch.mean, values)


def test_random_groups_have_equal_sizes_and_keep_clusters_together() -> None:
    draw = torch.Generator().manual_seed(0)
    assert random_groups(23, 5, draw).bincount().tolist() == [5, 5, 5, 4, 4]
    clusters = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3])
    group = random_groups(10, 3, draw, clusters)
    assert set(group.tolist()) == {0, 1, 2}
    assert all(len(group[clusters == c].unique()) == 1 for c in clusters.unique())


def test_an_interval_requires_two_values_and_clusters() -> None:
    for values, clusters in (([1.0], None), ([1.0, 2.0], torch.zeros(2))):
        with pytest.raises(ValueError, match="an interval requires two"):
            mean_interval(values, clusters)


def test_a_measured_value_prints_with_its_interval_and_n() -> None:
    assert str(Measured(27.123, 26.91, 27.34, 812)) == "27.1 [26.9, 27.3] (N=812)"
    assert str(Measured(163.4, 151.2, 175.6, 1000)) == "163 [151, 176] (N=1,000)"
    assert str(Measured(-0.2, -48.0, 48.0, 500)) == "0 [-48, 48] (N=500)"
    assert str(Measured(12.3456, n=9)) == "12.35 (N=9)"


def test_an_evaluation_passes_through_json_and_shows_a_table() -> None:
    measured = {"psnr": Measured(27.123, 26.91, 27.34, 812), "kid": Measured(math.inf, n=9)}
    found = Evaluation(measured, features="means", seed=0)
    back = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert Measured(**back["measured"]["psnr"]) == found["psnr"]
    assert back["measured"]["kid"] == {"value": "inf", "low": "nan", "high": "nan", "n": 9}
    assert back["settings"] == found.settings
    rows = str(found).splitlines()[2:]
    assert rows == ["| psnr ↑ | 27.1 [26.9, 27.3] (N=812) |", "| kid ↓ | inf (N=9) |"]
