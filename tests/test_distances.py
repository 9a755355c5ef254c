"""Distances of sets of features: plain loops, closed forms, an independent library, intervals."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from minildm.distances import (
    ROWS,
    distance_without_bias,
    frechet_distance,
    frechet_distances,
    kernel_distance,
    kernel_distances,
    nearest,
    precision_recall,
    precision_recalls,
)
from minildm.intervals import jackknife_interval, lots


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, d, generator=generator, dtype=torch.float64) + shift


def two_lots(n: int, m: int, groups: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lots(n, groups, generator), lots(m, groups, generator)


# Without each group in turn.


@pytest.mark.parametrize("paired", [False, True])
def test_leaving_groups_out_at_once_equals_leaving_them_out_one_by_one(paired: bool) -> None:
    a, b = draws(31, 5), draws(31 if paired else 23, 5, seed=1) + 0.3
    in_a, in_b = two_lots(31, 23, 4)
    in_b = in_a if paired else in_b
    frechet = frechet_distances(a, b, (in_a, in_b))
    kernel = kernel_distances(a, b, (in_a, in_b), paired=paired)
    shares = precision_recalls(a, b, (in_a, in_b))
    assert len(frechet) == len(kernel) == len(shares.precision) == len(shares.recall) == 5
    for i in range(-1, 4):
        u, v = a[in_a != i], b[in_b != i]
        assert float(frechet[i + 1]) == pytest.approx(float(frechet_distance(u, v)), rel=1e-9)
        one = float(kernel_distance(u, v, paired=paired))
        assert float(kernel[i + 1]) == pytest.approx(one, abs=1e-9)
        alone = precision_recall(u, v)
        assert (shares.precision[i + 1], shares.recall[i + 1]) == alone


# Kernel distance of pairs.


def test_the_kernel_distance_of_pairs_by_loops_and_zero_for_equal_ones() -> None:
    a = draws(7, 3)
    b = a + 0.3 * draws(7, 3, seed=1)

    def k(u: Tensor, v: Tensor) -> float:
        return float((u @ v / 3 + 1) ** 3)

    expected = sum(  # Gretton et al. 2012, Eq. 4
        k(a[i], a[j]) + k(b[i], b[j]) - k(a[i], b[j]) - k(a[j], b[i])
        for i in range(7)
        for j in range(7)
        if i != j
    )
    assert float(kernel_distance(a, b, paired=True)) == pytest.approx(expected / 42, abs=1e-12)
    assert float(kernel_distance(a, a, paired=True)) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="7 and 6"):
        kernel_distance(a, b[:6], paired=True)


def test_the_kernel_distance_of_gaussians_in_closed_form_and_how_often_its_interval_holds() -> None:
    # One dimension: E k = E (x y + 1)^3 by the moments of independent normals.
    def expected(mu: float, s: float, nu: float, t: float) -> float:
        m = [1.0, mu, mu**2 + s**2, mu**3 + 3 * mu * s**2]
        w = [1.0, nu, nu**2 + t**2, nu**3 + 3 * nu * t**2]
        return sum(math.comb(3, i) * m[i] * w[i] for i in range(4))

    truth = expected(0, 1, 0, 1) + expected(0.5, 0.8, 0.5, 0.8) - 2 * expected(0, 1, 0.5, 0.8)
    found = []
    for seed in range(300):
        a, b = draws(200, 1, seed=2 * seed), 0.5 + 0.8 * draws(200, 1, seed=2 * seed + 1)
        found.append(jackknife_interval(kernel_distances(a, b, two_lots(200, 200, 10)), 200))
    values = torch.tensor([m.value for m in found])
    assert abs(float(values.mean()) - truth) < 3 * float(values.std()) / math.sqrt(300)
    assert 0.88 < sum(m.low <= truth <= m.high for m in found) / 300 < 0.99


# Precision and recall.


def by_loops(real: Tensor, fake: Tensor, k: int) -> tuple[float, float]:
    def inside(a: Tensor, of: Tensor) -> float:
        hits = 0
        for row in a:
            for center in of:
                others = sorted(float((center - other).norm()) for other in of)
                if float((row - center).norm()) <= others[k]:  # others[0] is the center itself
                    hits += 1
                    break
        return hits / len(a)

    return inside(fake, real), inside(real, fake)


@pytest.mark.parametrize(("n", "m", "k"), [(20, 14, 3), (9, 12, 1), (6, 6, 5)])
def test_precision_and_recall_by_plain_loops(n: int, m: int, k: int) -> None:
    real, fake = draws(n, 4), 1.3 * draws(m, 4, seed=1) + 0.4
    found = precision_recall(real, fake, k)
    assert (float(found.precision), float(found.recall)) == by_loops(real, fake, k)
    swapped = precision_recall(fake, real, k)
    assert (swapped.recall, swapped.precision) == found


def test_precision_and_recall_agree_with_torch_fidelity() -> None:
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, fake = draws(300, 64), 0.9 * draws(250, 64, seed=1) + 0.1
    theirs = prc_features_to_metric(
        fake, real, prc_neighborhood=3, prc_batch_size=100, save_cpu_ram=False, verbose=False
    )
    found = precision_recall(real, fake)
    assert 0.05 < found.recall < 0.95
    assert float(found.precision) == pytest.approx(theirs["precision"], abs=1e-6)
    assert float(found.recall) == pytest.approx(theirs["recall"], abs=1e-6)


def test_equal_sets_give_ones_and_distant_sets_zeros() -> None:
    a = draws(ROWS + 50, 6)  # more than a part
    assert precision_recall(a, a) == (1.0, 1.0)
    assert precision_recall(a, a + 100) == (0.0, 0.0)
    collapsed = a[:1].repeat(40, 1)  # a generator's only picture, which is a real one
    found = precision_recall(a[:100], collapsed)
    assert found.precision == 1.0 and found.recall == 0.01
    assert precision_recall(collapsed, collapsed) == (1.0, 1.0)


def test_order_scale_and_rotation_change_nothing() -> None:
    real, fake = draws(60, 5), draws(50, 5, seed=1) + 0.5
    expected = precision_recall(real, fake)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    turn = torch.linalg.qr(draws(5, 5, seed=3)).Q
    assert precision_recall(real[order], fake.flip(0)) == expected
    assert precision_recall(1000 * real @ turn + 7, 1000 * fake @ turn + 7) == expected


def test_precision_of_shifted_squares_is_near_their_overlap() -> None:
    """[0, 1]^2 against the same square 0.4 further on both axes: 0.6^2 of each is shared."""
    overlap = 0.36
    errors = []
    for n in (100, 1600):
        found = precision_recall(uniform(n, 2, 0), uniform(n, 2, 1, 0.4))
        errors.append(max(abs(float(share) - overlap) for share in found))
    assert errors[1] < min(0.05, errors[0])  # the balls shrink with N


def test_how_often_the_intervals_of_precision_and_recall_hold() -> None:
    """About the expectation at this N. They are somewhat wide: 95 % or more, never far less."""
    groups = two_lots(120, 120, 10)
    found = [
        precision_recalls(uniform(120, 2, 2 * i), uniform(120, 2, 2 * i + 1, 0.3), groups)
        for i in range(150)
    ]
    for name in ("precision", "recall"):
        measured = [jackknife_interval(getattr(f, name), 120) for f in found]
        mean = sum(m.value for m in measured) / len(measured)
        assert sum(m.low <= mean <= m.high for m in measured) / len(measured) >= 0.92
        spread = torch.tensor([m.value for m in measured]).std()
        half = torch.tensor([(m.high - m.low) / 2 for m in measured]).mean() / 2.262
        assert 0.9 < float(half / spread) < 1.7


@pytest.mark.parametrize("k", [0, 5, 6])
def test_neighbours_that_are_not_there_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k} .*5 pictures"):
        precision_recall(draws(5, 2), draws(9, 2), k)


# Nearest neighbours.


def test_nearest_rows_by_a_full_table_across_parts_and_for_bytes() -> None:
    a, b = draws(30, 8), draws(ROWS + 200, 8, seed=1)
    found = nearest(a, b, 3)
    expected = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").sort(dim=1)
    assert torch.equal(found.indices, expected.indices[:, :3])
    assert torch.allclose(found.distances, expected.values[:, :3], atol=1e-12)
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(0, 256, (50, 100), generator=generator, dtype=torch.uint8)
    itself = nearest(whole[10:20], whole)
    assert itself.indices.flatten().tolist() == list(range(10, 20))
    assert itself.distances.abs().max() == 0


def test_wrong_rows_are_named() -> None:
    a = draws(4, 3)
    for k in (0, 5):
        with pytest.raises(ValueError, match=rf"k={k} must lie in 1\.\.4"):
            nearest(a, a, k)
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(4, 2\)"):
        nearest(a, a[:, :2])


# The limit for many pictures.


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1)])
def test_the_limit_is_numpys_line_of_least_squares_in_one_over_n(order: tuple[int, ...]) -> None:
    counts = np.array([100, 200, 400, 1600])[list(order)]
    values = 3 + 500 / counts + np.array([0.3, -0.2, 0.5, -0.1])
    expected = np.polyfit(1 / counts, values, 1)[1]
    assert distance_without_bias(counts.tolist(), values.tolist()) == pytest.approx(expected)
    exact = distance_without_bias(counts.tolist(), (3 + 500 / counts).tolist())
    assert exact == pytest.approx(3, abs=1e-9)


def test_few_pictures_are_apart_by_what_theory_expects_and_the_limit_is_not() -> None:
    d, s, counts = 4, 1.0, [50, 100, 200]
    found = [
        torch.stack(
            [
                frechet_distance(draws(n, d, seed=i), s * draws(n, d, seed=i + 5000))
                for i in range(400)
            ]
        ).mean()
        for n in counts
    ]
    limit, c = d * (1 - s) ** 2, d * (1 + s**2) + s * d * (d + 1) / 2
    assert [float(v) for v in found] == pytest.approx([limit + c / n for n in counts], rel=0.06)
    assert distance_without_bias(counts, found) == pytest.approx(limit, abs=0.03)


@pytest.mark.parametrize(
    ("counts", "values"),
    [([100], [1.0]), ([100, 100], [1.0, 2.0]), ([1, 2], [1.0]), ([0, 2], [1.0] * 2)],
)
def test_the_limit_of_too_few_counts_is_refused(counts: list[int], values: list[float]) -> None:
    with pytest.raises(ValueError, match="counts="):
        distance_without_bias(counts, values)
