"""Pictures that belong together, crops of one photograph: intervals over clusters of them."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from minildm.intervals import lots, mean_interval
from minildm.metrics import evaluate_pictures


def test_equal_clusters_give_the_interval_of_their_means(randn: Any) -> None:
    values = randn(6, 5, dtype=torch.float64)
    clusters = torch.arange(6).repeat_interleave(5)
    found = mean_interval(values.flatten(), clusters=clusters)
    of_means = mean_interval(values.mean(1))
    assert found[:3] == pytest.approx(of_means[:3], rel=1e-12)
    assert found.n == 30
    shuffled = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    again = mean_interval(values.flatten()[shuffled], clusters=7 * clusters[shuffled] - 3)
    assert again[:3] == pytest.approx(found[:3], rel=1e-12)


def test_clusters_of_one_change_nothing(randn: Any) -> None:
    values = randn(20, dtype=torch.float64)
    plain = mean_interval(values)
    assert mean_interval(values, clusters=torch.arange(20)) == pytest.approx(plain, rel=1e-12)


def test_the_interval_over_clusters_holds_the_truth_as_often_as_it_says() -> None:
    """Eight values that share most of their error: Student's interval misses far too often."""
    draw = torch.Generator().manual_seed(0)
    clusters, hits = torch.arange(12).repeat_interleave(8), torch.zeros(2)
    for _ in range(400):
        shared = torch.randn(12, 1, generator=draw, dtype=torch.float64)
        values = (shared + 0.3 * torch.randn(12, 8, generator=draw, dtype=torch.float64)).flatten()
        for i, found in enumerate(
            (mean_interval(values), mean_interval(values, clusters=clusters))
        ):
            hits[i] += found.low <= 0 <= found.high
    naive, clustered = (hits / 400).tolist()
    assert naive < 0.7
    assert 0.92 <= clustered <= 0.98


def test_lots_keep_a_cluster_together() -> None:
    clusters = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3])
    lot = lots(10, 3, torch.Generator().manual_seed(0), clusters)
    assert set(lot.tolist()) == {0, 1, 2}
    for cluster in clusters.unique():
        assert len(lot[clusters == cluster].unique()) == 1


@pytest.mark.parametrize("clusters", [torch.zeros(5), torch.arange(4)])
def test_too_few_clusters_are_refused(clusters: Tensor, randn: Any) -> None:
    with pytest.raises(ValueError, match=r"clusters must be \(5,\) with 2 different ones"):
        mean_interval(randn(5), clusters=clusters)


def test_clusters_widen_the_intervals_of_an_evaluation(randn: Any) -> None:
    real = randn(40, 3, 32, 32).tanh()
    fake = (real + 0.2 * randn(40, 1, 1, 1, seed=1)).clamp(-1, 1)
    pairs = torch.arange(20).repeat_interleave(2)
    twice = torch.arange(40) // 2
    real, fake = real[twice], fake[twice]  # every picture is there twice
    plain = evaluate_pictures(real, fake, paired=True)
    found = evaluate_pictures(real, fake, paired=True, clusters=pairs)
    assert found.settings["clusters"] == 20
    for name in ("psnr", "ssim", "perceptual"):
        assert found[name].value == plain[name].value
        width, narrow = (m.high - m.low for m in (found[name], plain[name]))
        assert width == pytest.approx(narrow * math.sqrt(2), rel=0.06)  # t of 19, not of 39
    with pytest.raises(ValueError, match=r"clusters \(40,\) are for paired sets"):
        evaluate_pictures(real, fake, clusters=pairs)
