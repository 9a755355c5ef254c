"""Evaluation in one call: each number against the function that gives it alone, or by hand."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from minildm import Autoencoder, AutoencoderConfig
from minildm.intervals import Evaluation, Measured, jackknife_interval, median_interval
from minildm.metrics import (
    evaluate_first_stage,
    evaluate_pictures,
    extract,
    kid,
    mean_interval,
    nearest_neighbours,
    precision_recall,
    proxy_fid,
    psnr,
    reconstruct,
    ssim,
)

SIDE = 16


class Pooled(nn.Module):
    """(B, 3, H, W) -> (B, 12), means of four quarters; counts its pictures."""

    name = "means"

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


class Difference(nn.Module):
    """Stands for a perceptual distance: the mean absolute difference."""

    name = "L1"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - y).abs().mean(dim=(1, 2, 3))


def uniform(n: int, seed: int = 0, side: int = SIDE) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def mixed(n: int, seed: int) -> Tensor:
    """Pictures of which each has its own brightness."""
    return (0.4 * uniform(n, seed) + 0.6 * uniform(n, seed + 100)[..., :1, :1]).clamp(-1, 1)


def vq(size: int = 8) -> Autoencoder:
    torch.manual_seed(0)
    config = AutoencoderConfig(
        regularizer="vq",
        codebook_size=size,
        z_channels=2,
        width=8,
        width_mult=(1, 2),
        res_blocks=1,
        groups=4,
        mid_attn=False,
    )
    return Autoencoder(config)


def networks() -> dict[str, nn.Module]:
    return {"features": Pooled(), "perceptual": Difference()}


# Pictures.


def test_each_number_is_what_its_own_function_gives() -> None:
    real, fake = mixed(40, 0), mixed(30, 1)
    net = Pooled()
    found = evaluate_pictures(real, fake, features=net)
    assert list(found) == ["proxy_fid", "kid", "precision", "recall"]
    assert net.seen == 70  # once each, for all of them
    assert found["proxy_fid"] == proxy_fid(real, fake, net)
    assert found["kid"] == kid(real, fake, net)
    shares = precision_recall(extract(real, net), extract(fake, net))
    assert found["precision"].value == shares.precision and found["precision"].n == 30
    assert found["recall"].value == shares.recall and found["recall"].n == 40
    for name in ("precision", "recall"):
        assert 0 <= found[name].low <= found[name].value <= found[name].high <= 1
    assert found.settings["features"] == "means" and found.settings["groups"] == 10


def test_inceptions_distance_is_called_fid() -> None:
    net = Pooled()
    net.name = "Inception"
    x = mixed(24, 0)
    assert next(iter(evaluate_pictures(x, mixed(24, 1), features=net))) == "fid"
    paired = evaluate_pictures(x, x, paired=True, features=net, perceptual=Difference())
    assert "r_fid" in paired and "fid" not in paired


def test_pairs_add_what_compares_two_pictures_and_bytes_are_pictures_too() -> None:
    x = (mixed(70, 0) * 100 + 127).byte()
    x_rec = ((x / 127.5 - 1) + 0.1 * uniform(70, 9)).clamp(-1, 1)
    found = evaluate_pictures(x, x_rec, paired=True, **networks())
    floats = x / 127.5 - 1
    assert found["psnr"] == mean_interval(psnr(floats, x_rec))
    assert found["ssim"].value == pytest.approx(float(ssim(floats, x_rec).mean()), abs=1e-6)
    expected = mean_interval(Difference()(floats, x_rec))
    assert found["perceptual"] == pytest.approx(expected, rel=1e-5)
    assert found.settings["perceptual"] == "L1"
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    again = evaluate_pictures(x[order], x_rec[order], paired=True, **networks())
    assert [m.value for m in again.values()] == pytest.approx(
        [m.value for m in found.values()], rel=1e-6, abs=1e-9
    )


def test_a_copy_is_perfect_and_its_psnr_infinite_without_an_interval() -> None:
    x = mixed(24, 0)
    found = evaluate_pictures(x, x, paired=True, **networks())
    assert found["psnr"].value == math.inf and math.isnan(found["psnr"].low)
    assert found["ssim"].value == pytest.approx(1) and found["perceptual"].value == 0
    assert found["precision"].value == found["recall"].value == 1
    assert found["proxy_r_fid"].value == pytest.approx(0, abs=1e-9)
    assert found["kid"].value == pytest.approx(0, abs=1e-12)
    assert found["kid"].high < 1e-9  # groups are left out as pairs: nothing scatters


def test_the_same_seed_gives_the_same_intervals_and_none_where_none_are_asked() -> None:
    real, fake = mixed(40, 0), mixed(40, 1)
    one, two, other = (evaluate_pictures(real, fake, features=Pooled(), seed=s) for s in (0, 0, 1))
    assert dict(one) == dict(two)
    assert one["kid"].low != other["kid"].low
    assert one["kid"].value == pytest.approx(other["kid"].value, abs=1e-12)
    bare = evaluate_pictures(real, fake, features=Pooled(), groups=0)
    assert all(math.isnan(m.low) for m in bare.values())


def test_copies_of_training_pictures_are_told_from_new_ones() -> None:
    train, real, new = mixed(200, 0), mixed(60, 1), mixed(60, 2)
    copies = (train[:60] + 0.01 * uniform(60, 3)).clamp(-1, 1)
    net = Pooled()
    honest, copied = (
        evaluate_pictures(real, fake, train=train, features=net) for fake in (new, copies)
    )
    share = honest["nearer_to_train"]
    assert share.low < 0.5 < share.high  # drawn as the data are
    assert copied["nearer_to_train"].value > 0.95
    distances = nearest_neighbours(new, train, features=net).distances[:, 0]
    assert honest["train_distance"] == median_interval(distances)
    assert copied["train_distance"].high < honest["train_distance"].low
    spared = evaluate_pictures(real, new, train=extract(train, net), features=net)
    assert dict(spared) == dict(honest)


def test_nearest_neighbours_find_the_copied_picture() -> None:
    train = (mixed(50, 0) * 127 + 127).byte()
    fake = train[[7, 31]] / 127.5 - 1
    by_pixels = nearest_neighbours(fake, train, 2, features="pixels")
    assert by_pixels.indices[:, 0].tolist() == [7, 31]
    assert by_pixels.distances[:, 0].max() < 1e-6
    i = int(by_pixels.indices[0, 1])
    root = (fake[0] - (train[i] / 127.5 - 1)).square().mean().sqrt()
    assert float(by_pixels.distances[0, 1]) == pytest.approx(float(root), rel=1e-5)
    assert nearest_neighbours(fake, train, features=Pooled()).indices.flatten().tolist() == [7, 31]
    with pytest.raises(ValueError, match="'colours' must be 'pixels'"):
        nearest_neighbours(fake, train, features="colours")
    with pytest.raises(ValueError, match=r"\(2, 3, 16, 16\) and \(50, 3, 8, 8\)"):
        nearest_neighbours(fake, train[..., :8, :8])


def test_pictures_that_do_not_serve_are_refused() -> None:
    x = mixed(24, 0)
    for bad, said in (
        (x[:, :1], r"fake must be pictures \(N, 3, H, W\), got \(24, 1, 16, 16\)"),
        (x[..., :8], r"alike.*\(24, 3, 16, 16\) and \(24, 3, 16, 8\)"),
        (x * math.nan, "fake .*not finite"),
        (x * 2, r"fake must lie in \[-1, 1\]"),
        (x.long(), "fake must be uint8 or float"),
        (x[:12], "24 real and 12 fake"),
        (x[:0], "24 real and 0 fake"),
    ):
        with pytest.raises(ValueError, match=said):
            evaluate_pictures(x, bad, features=Pooled())
    with pytest.raises(ValueError, match="equally many: 24 real, 22 fake"):
        evaluate_pictures(x, x[:22], paired=True, **networks())
    with pytest.raises(ValueError, match=r"k=21 must lie in 1\.\.20"):
        evaluate_pictures(x, x, k=21, features=Pooled())
    with pytest.raises(ValueError, match=r"train must be pictures \(N, 3, 16, 16\)"):
        evaluate_pictures(x, x, train=x[..., :8], features=Pooled())


# First stages.


def test_a_kl_stage_is_measured_at_its_mean(autoencoder: Autoencoder) -> None:
    x = mixed(70, 0)
    found = evaluate_first_stage(autoencoder.train(), x, **networks())
    assert autoencoder.training
    x_rec = reconstruct(autoencoder.eval(), x)
    with torch.no_grad():
        whole = autoencoder.decode(autoencoder.encode(x, sample=False)).clamp(-1, 1)
    assert torch.allclose(x_rec, whole, atol=1e-5)
    assert found["psnr"].value == pytest.approx(float(psnr(x, x_rec).mean()), rel=1e-6)
    assert {"proxy_r_fid", "kid", "ssim", "precision", "recall"} < found.keys()
    assert found["compression"].value == 3 * 2**2 / 2  # f = 2, c = 2
    assert not {"code_usage", "perplexity", "bits_per_pixel"} & found.keys()


def test_the_codes_of_a_vq_stage_are_counted_over_the_whole_set() -> None:
    model, x = vq().eval(), mixed(70, 0)
    found = evaluate_first_stage(model, (x * 127.5 + 127.5).byte(), **networks())
    with torch.no_grad():
        pixels = (x * 127.5 + 127.5).byte() / 127.5 - 1
        indices = model.code_indices(model.encode(pixels))
    share = indices.flatten().bincount(minlength=8).double() / indices.numel()
    used = share[share > 0]
    assert 1 < len(used) < 8  # the test would say little otherwise
    assert found["code_usage"].value == len(used) / 8
    assert found["perplexity"].value == pytest.approx(float((-used * used.log()).sum().exp()))
    assert found["perplexity"].low <= found["perplexity"].value <= found["perplexity"].high
    assert found["bits_per_pixel"].value == 3 / 4  # log2(8) bits for 2 x 2 pixels
    assert found["compression"].value == 6
    bare = evaluate_first_stage(model, x, groups=0, **networks())
    assert bare["perplexity"].value == pytest.approx(found["perplexity"].value, rel=1e-2)
    assert math.isnan(bare["perplexity"].low)


def test_all_codes_used_alike_have_the_perplexity_k() -> None:
    model = vq(4).eval()

    def in_turn(z: Tensor) -> Tensor:
        return (torch.arange(z[:, 0].numel()) % 4).view_as(z[:, 0])

    model.code_indices = in_turn
    found = evaluate_first_stage(model, mixed(20, 0), **networks())
    assert found["code_usage"].value == 1 and found["perplexity"].value == pytest.approx(4)
    assert found["perplexity"].high == pytest.approx(4)


def test_pixel_space_is_exact() -> None:
    model = Autoencoder(AutoencoderConfig(regularizer="identity", z_channels=3))
    found = evaluate_first_stage(model, mixed(20, 0), **networks())
    assert found["psnr"].value == math.inf and found["compression"].value == 1
    assert found["proxy_r_fid"].value == pytest.approx(0, abs=1e-9)
    saved = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert saved["measured"]["psnr"] == {"value": "inf", "low": None, "high": None, "n": 20}


def test_a_first_stage_refuses_what_it_cannot_measure(autoencoder: Autoencoder) -> None:
    with pytest.raises(ValueError, match="19 real"):
        evaluate_first_stage(autoencoder, mixed(19, 0), **networks())
    with pytest.raises(ValueError, match=r"x must be pictures"):
        evaluate_first_stage(autoencoder, mixed(20, 0)[0], **networks())
    with pytest.raises(ValueError, match="multiples of f=2"):
        evaluate_first_stage(autoencoder, mixed(20, 0)[..., :15], **networks())


# Results and their intervals.


def results() -> Evaluation:
    measured = {
        "psnr": Measured(27.123, 26.91, 27.34, 812),
        "kid": Measured(math.inf, math.nan, math.nan, 9),
    }
    return Evaluation(measured, {"features": "means", "seed": 0})


def test_results_pass_through_json() -> None:
    found = results()
    text = json.dumps(found.as_dict(), allow_nan=False)
    back = Evaluation.from_dict(json.loads(text))
    assert list(back) == ["psnr", "kid"] and back["psnr"] == found["psnr"]
    assert back["kid"].value == math.inf and math.isnan(back["kid"].high)
    assert back.settings == found.settings and back.as_dict() == found.as_dict()


def test_results_show_as_lines_and_as_a_table() -> None:
    found = results()
    assert str(found) == "psnr  27.1 [26.9, 27.3] (N=812)\nkid   inf (N=9)"
    assert found.table().splitlines() == [
        "| | value | 95 % interval | N |",
        "|---|--:|:-:|--:|",
        "| psnr ↑ | 27.1 | [26.9, 27.3] | 812 |",
        "| kid ↓ | inf | - | 9 |",
        "",
        "features: means",
    ]
    assert found._repr_markdown_() == found.table()
    assert "90 %" in Evaluation(found.measured, {"confidence": 0.9}).table()
    assert len(found) == 2 and "psnr" in found and replace(found, measured={}) == {}


def test_the_medians_interval_lies_between_the_binomials_ranks() -> None:
    from scipy.stats import binom

    for n in (6, 20, 101, 1000):
        rank = int(binom.ppf(0.025, n, 0.5))  # the largest with P(fewer than rank below) <= 2.5 %
        values = torch.arange(1, n + 1).double()
        found = median_interval(values[torch.randperm(n)])
        assert found == ((n + 1) / 2, rank, n + 1 - rank, n)
    assert math.isnan(median_interval(torch.arange(5)).low)
    with pytest.raises(ValueError, match="finite"):
        median_interval(torch.tensor([1.0, math.nan]))


def test_the_medians_interval_holds_it_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.empty(2000, 40).exponential_(generator=generator)
    found = [median_interval(row) for row in values]
    assert 0.945 < sum(m.low <= math.log(2) <= m.high for m in found) / 2000 < 0.985


def test_the_jackknife_of_a_mean_is_students_interval_of_the_groups_means() -> None:
    values = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lot = torch.arange(50) % 10
    parts = [values.mean(), *(values[lot != i].mean() for i in range(10))]
    found = jackknife_interval(torch.stack(parts), 50)
    of_groups = mean_interval(torch.stack([values[lot == i].mean() for i in range(10)]))
    assert found[:3] == pytest.approx(of_groups[:3], abs=1e-12) and found.n == 50
    cut = jackknife_interval(torch.stack(parts), 50, bounds=(0.49, 0.51))
    assert cut.low == max(0.49, found.low) and cut.high == min(0.51, found.high)
