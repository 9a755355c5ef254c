"""Metrics against closed forms, an independent library, and simulated truth."""

import math

import pytest
import torch
from torch import Tensor, nn

from minildm import plots
from minildm.judge import Judge, JudgeConfig
from minildm.metrics import (
    Measured,
    accuracy,
    extract,
    frechet_distance,
    kernel_distance,
    kid,
    mean_interval,
    proportion_interval,
    proxy_fid,
    psnr,
    ssim,
)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Pooled(nn.Module):
    """Features that need no weights file: (B, 3, H, W) -> (B, 12), means of four quarters."""

    num_features = 12

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


# Pairs of pictures.


def test_psnr_of_a_constant_error() -> None:
    x = torch.zeros(3, 3, 8, 8)
    error = torch.tensor([0.2, 0.02, 2 * 10 ** (-37 / 20)]).view(3, 1, 1, 1)
    assert psnr(x, x + error).tolist() == pytest.approx([20.0, 40.0, 37.0], abs=1e-4)
    assert psnr(x, x).tolist() == [math.inf] * 3


def test_psnr_clamps_and_takes_each_picture_alone() -> None:
    x = torch.stack([torch.ones(3, 8, 8), torch.zeros(3, 8, 8)])
    assert psnr(x, 1.5 * x).tolist() == [math.inf] * 2
    x_rec = x - torch.tensor([2.0, 0.2]).view(2, 1, 1, 1)
    assert psnr(x, x_rec).tolist() == pytest.approx([0.0, 20.0], abs=1e-4)


def test_ssim_is_one_for_equal_pictures_and_falls_with_noise() -> None:
    x = draws(3, 3, 24, 32).float().clamp(-1, 1)
    assert ssim(x, x).tolist() == pytest.approx([1.0] * 3, abs=1e-6)
    noisy = [ssim(x, x + s * draws(3, 3, 24, 32, seed=1).float()).mean() for s in (0.1, 0.4, 1.0)]
    assert 1 > noisy[0] > noisy[1] > noisy[2] > 0
    assert ssim(x[:1], x[:1]).shape == (1,)


def test_ssim_of_two_flat_pictures_is_the_formulas_first_factor() -> None:
    x, x_rec = torch.full((1, 3, 16, 16), -0.5), torch.full((1, 3, 16, 16), 0.5)
    a, b, c1 = 0.25, 0.75, 0.01**2
    assert float(ssim(x, x_rec)) == pytest.approx((2 * a * b + c1) / (a**2 + b**2 + c1), abs=1e-3)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_pairs_that_do_not_fit_are_refused(metric: object) -> None:
    x = torch.zeros(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"\(2, 3, 16, 16\) and \(1, 3, 16, 16\)"):
        metric(x, x[:1])
    with pytest.raises(ValueError, match=r"B >= 1"):
        metric(x[:0], x[:0])
    with pytest.raises(ValueError, match=r"x_rec must be finite"):
        metric(x, x * math.nan)
    with pytest.raises(ValueError, match=r"x must be .*uint8"):
        metric(x.byte(), x)


def test_ssim_refuses_pictures_smaller_than_its_window() -> None:
    with pytest.raises(ValueError, match="11 pixels"):
        ssim(torch.zeros(1, 3, 16, 8), torch.zeros(1, 3, 16, 8))


# Distances between sets.


def exact_moments(n: int, mean: Tensor, root: Tensor, seed: int) -> Tensor:
    """(n, D) whose sample mean and covariance are `mean` and root root^T, to rounding."""
    x = draws(n, len(mean), seed=seed)
    x = x - x.mean(0)
    white = torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1)))
    return x @ white.T @ root.T + mean


def test_frechet_distance_of_gaussians_by_hand() -> None:
    # Commuting covariances: |mu - nu|^2 + sum of (s - t)^2 over the standard deviations.
    mu, nu = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([1.0, 0.0, 3.5]).double()
    s, t = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 2.0, 0.0]).double()
    a = exact_moments(50, mu, s.diag(), 1)
    b = exact_moments(70, nu, t.diag(), 2)
    expected = 4 + 0.25 + 4 + 0 + 0.25
    assert float(frechet_distance(a, b)) == pytest.approx(expected, abs=1e-9)
    turn = torch.linalg.qr(draws(3, 3, seed=3)).Q  # a rotation changes nothing
    assert float(frechet_distance(a @ turn, b @ turn)) == pytest.approx(expected, abs=1e-9)
    assert float(frechet_distance(a, a)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("n", "m"), [(200, 150), (10, 150), (9, 8)])
def test_frechet_distance_by_the_root_of_the_product(n: int, m: int) -> None:
    a, b = draws(n, 12) @ draws(12, 12, seed=1), draws(m, 12, seed=2) + 1
    eigenvalues = torch.linalg.eigvals(a.T.cov() @ b.T.cov())
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace()
    expected -= 2 * eigenvalues.sqrt().real.sum()
    # The eigenvalues that should be 0 leave their rounding errors' roots in the sum.
    assert float(frechet_distance(a, b)) == pytest.approx(float(expected), rel=1e-5)


def test_both_distances_agree_with_torchmetrics() -> None:
    from torchmetrics.image import FrechetInceptionDistance, KernelInceptionDistance

    real, fake = draws(60, 3, 16, 16).float(), draws(60, 3, 16, 16, seed=1).float() * 1.3 + 0.2
    fid = FrechetInceptionDistance(feature=Pooled())
    with pytest.warns(UserWarning, match="save all extracted features in buffer"):
        mmd = KernelInceptionDistance(feature=Pooled(), subsets=1, subset_size=60)
    for metric in (fid, mmd):
        metric.update(real, real=True)
        metric.update(fake, real=False)
    ours = proxy_fid(real, fake, Pooled())
    assert ours.n == 60 and ours.value == pytest.approx(float(fid.compute()), rel=1e-4)
    assert kid(real, fake, Pooled()).value == pytest.approx(float(mmd.compute()[0]), rel=1e-3)


def test_kernel_distance_by_two_loops_and_without_bias() -> None:
    a, b = draws(5, 3), draws(4, 3, seed=1) + 0.5

    def k(u: Tensor, v: Tensor) -> float:
        return float((u @ v / 3 + 1) ** 3)

    aa = sum(k(a[i], a[j]) for i in range(5) for j in range(5) if i != j) / 20
    bb = sum(k(b[i], b[j]) for i in range(4) for j in range(4) if i != j) / 12
    ab = sum(k(u, v) for u in a for v in b) / 20
    assert float(kernel_distance(a, b)) == pytest.approx(aa + bb - 2 * ab, abs=1e-12)
    same = [
        float(kernel_distance(draws(20, 3, seed=i), draws(20, 3, seed=-i))) for i in range(1, 300)
    ]
    assert mean_interval(same, 0.999).low < 0 < mean_interval(same, 0.999).high


def test_the_jackknife_knows_how_far_the_distance_scatters() -> None:
    def sets(seed: int) -> tuple[Tensor, Tensor]:
        return draws(100, 4, seed=2 * seed), 1.2 * draws(100, 4, seed=2 * seed + 1) + 0.5

    for metric in (proxy_fid, kid):
        found = [metric(*sets(seed)) for seed in range(150)]
        values = torch.tensor([m.value for m in found])
        half = torch.tensor([(m.high - m.low) / 2 for m in found]) / 2.262  # t of 9 degrees
        assert 0.75 < float(half.square().mean().sqrt() / values.std()) < 1.35
        inside = [m.low < float(values.mean()) < m.high for m in found]
        assert 0.88 <= sum(inside) / 150 <= 1


def test_the_interval_is_the_same_every_time_and_can_be_left_out() -> None:
    a, b = draws(40, 4), draws(30, 4, seed=1)
    state = torch.random.get_rng_state()
    assert proxy_fid(a, b) == proxy_fid(a, b)
    assert torch.equal(torch.random.get_rng_state(), state)
    bare = kid(a, b, groups=0)
    assert bare.n == 30 and math.isnan(bare.low) and math.isnan(bare.high)
    assert bare.value == pytest.approx(kid(a, b).value, abs=1e-12)


def test_proxy_fid_on_pictures_ranks_damage_and_takes_uint8() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (48, 3, 8, 8), generator=generator, dtype=torch.uint8)
    x = nn.functional.interpolate(x.float(), (32, 32), mode="bilinear").byte()
    real, fake = x[:24], x[24:]
    as_floats = fake / 127.5 - 1
    clean = proxy_fid(real, fake)
    assert clean.value == pytest.approx(proxy_fid(real, as_floats).value, rel=1e-3)
    noise = torch.randn(as_floats.shape, generator=generator)
    values = [proxy_fid(real, (as_floats + s * noise).clamp(-1, 1)).value for s in (0.2, 0.8)]
    assert clean.value < values[0] < values[1]


def test_extract_does_not_depend_on_the_batches() -> None:
    x, net = draws(7, 3, 16, 16).float(), Pooled()
    assert torch.allclose(extract(x, net, batch_size=3), net(x), atol=1e-6)
    assert not extract(x, net).requires_grad


@pytest.mark.parametrize("metric", [proxy_fid, kid])
def test_sets_that_do_not_fit_are_refused(metric: object) -> None:
    x, net = torch.zeros(30, 3, 16, 16), Pooled()
    with pytest.raises(ValueError, match=r"alike.*\(30, 3, 16, 16\) and \(30, 3, 8, 8\)"):
        metric(x, x[..., :8, :8], net)
    with pytest.raises(ValueError, match="30 real and 12 fake"):
        metric(x, x[:12], net)
    with pytest.raises(ValueError, match="groups=1"):
        metric(x, x, net, groups=1)
    with pytest.raises(ValueError, match="1 fake"):
        metric(x, x[:1], net, groups=0)
    with pytest.raises(ValueError, match="finite"):
        metric(x, x * math.nan, net)
    with pytest.raises(ValueError, match="features must be finite"):
        metric(torch.zeros(30, 4), torch.full((30, 4), math.nan))
    with pytest.raises(ValueError, match=r"\(N, D\)"):
        metric(torch.zeros(30), torch.zeros(30))
    with pytest.raises(ValueError, match="confidence=95"):
        metric(x, x, net, confidence=95)


# Intervals.


def test_students_interval_against_tables() -> None:
    # Two-sided quantiles of Student's t from the usual table, at n - 1 = 1, 4, 30, 1000.
    for n, confidence, t in (
        (2, 0.95, 12.706),
        (5, 0.95, 2.776),
        (31, 0.99, 2.750),
        (1001, 0.9, 1.646),
    ):
        values = torch.linspace(0, 1, n).double()
        found = mean_interval(values, confidence)
        half = t * float(values.std()) / math.sqrt(n)
        assert found.value == pytest.approx(0.5) and found.n == n
        assert found.high - found.value == pytest.approx(half, rel=3e-4)
        assert found.value - found.low == pytest.approx(half, rel=3e-4)


def test_wilsons_interval_against_known_values() -> None:
    # Newcombe (1998), Statistics in Medicine 17, Table I, method 3.
    for r, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = proportion_interval(r, n)
        assert found.value == r / n and found.n == n
        assert (found.low, found.high) == pytest.approx((low, high), abs=6e-5)
    assert proportion_interval(20, 20).high == 1.0 and proportion_interval(20, 20).low < 0.9


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    runs = 2000
    sample = draws(runs, 6) * 3 + 7
    found = [mean_interval(row) for row in sample]
    assert 0.938 < sum(m.low < 7 < m.high for m in found) / runs < 0.962
    p = 0.3
    generator = torch.Generator().manual_seed(1)
    counts = (torch.rand(runs, 40, generator=generator) < p).sum(dim=1)
    wilson = [proportion_interval(int(count), 40) for count in counts]
    assert 0.93 < sum(m.low < p < m.high for m in wilson) / runs < 0.98


def test_wrong_arguments_of_intervals_are_named() -> None:
    with pytest.raises(ValueError, match=r"N >= 2, got \(1,\)"):
        mean_interval([1.0])
    with pytest.raises(ValueError, match=r"got \(2, 2\)"):
        mean_interval(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="1 of 3 are not finite"):
        mean_interval([1.0, math.nan, 2.0])
    with pytest.raises(ValueError, match="confidence=95"):
        mean_interval([1.0, 2.0], 95)
    for successes, n in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"{successes} of {n}"):
            proportion_interval(successes, n)


def test_a_measured_value_prints_with_its_interval_and_n() -> None:
    assert str(Measured(27.123, 26.91, 27.34, 812)) == "27.1 [26.9, 27.3] (N=812)"
    assert f"{Measured(0.8312, 0.79, 0.87, 64)}" == "0.83 [0.79, 0.87] (N=64)"
    assert str(Measured(163.4, 151.2, 175.6, 1000)) == "163 [151, 176] (N=1,000)"
    assert str(Measured(0.00123, 0.0009, 0.0016, 50)) == "0.0012 [0.0009, 0.0016] (N=50)"
    assert str(Measured(-0.2, -48.0, 48.0, 500)) == "0 [-48, 48] (N=500)"
    assert str(Measured(12.3456, math.nan, math.nan, 9)) == "12.35 (N=9)"


def test_bars_take_measured_values_with_and_without_an_interval() -> None:
    values = {"a": Measured(0.5, 0.4, 0.6, 64), "b": Measured(0.25, math.nan, math.nan, 9)}
    fig = plots.bars(values)
    fig._repr_mimebundle_()
    assert "a 0.50  (N=64), b 0.25  (N=9)" in fig.alt_text


# The judge.


def test_accuracy_counts_the_judges_hits_and_leaves_its_mode() -> None:
    torch.manual_seed(0)
    judge = Judge(JudgeConfig(labels=("a", "b"), groups=("c", "d", "e"), styles=("f",), width=8))
    x = draws(10, 3, 16, 16).float()
    judge.eval()
    answers = judge(x)["group"].argmax(dim=1)
    truth = torch.cat([answers[:7], (answers[7:] + 1) % 3])
    judge.train()
    assert accuracy(judge, x, truth) == proportion_interval(7, 10)
    assert judge.training
    assert accuracy(judge, x, torch.zeros(10).long(), "style").value == 1.0
    assert accuracy(judge, torch.zeros(4, 3, 16, 16).byte(), answers[:4]).n == 4
    with pytest.raises(ValueError, match="'size' is not known"):
        accuracy(judge, x, truth, "size")
    with pytest.raises(ValueError, match=r"\(10, 3, 16, 16\) and \(3,\)"):
        accuracy(judge, x, truth[:3])
    with pytest.raises(ValueError, match="finite"):
        accuracy(judge, x * math.nan, truth)
