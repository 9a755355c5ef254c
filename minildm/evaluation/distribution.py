"""Two sets of images, as features (N, D) and (M, D) of `extract_features`; or all in one call.

Fréchet and kernel distance, precision and recall, nearest neighbours, in float64 on the CPU.
`groups`: of the jackknife behind an interval, see `jackknife`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from minildm.compression.autoencoder import Autoencoder
from minildm.compression.perceptual import perceptual_distance
from minildm.compression.quantizer import code_usage
from minildm.evaluation.features import extract_features, frechet_features
from minildm.evaluation.image_metrics import compare_pairs, reconstructions
from minildm.evaluation.intervals import (
    Evaluation,
    Measured,
    exactly,
    jackknife,
    median_interval,
    random_groups,
)

ROWS = 1024  # of a table of distances computed at a time
ROUNDING = 1e-12  # squared distances below this share of the squared lengths are 0

Groups = int | Sequence[Tensor]
Tables = tuple[Tensor, Tensor, Tensor]  # of pairs: within a (N, N), within b (M, M), between (N, M)


def frechet_distance(a: Tensor, b: Tensor) -> Tensor:
    """|mu_a - mu_b|^2 + Tr(A + B - 2 (A B)^(1/2)), the sets' means and covariances: scalar.

    Heusel et al. 2017. With A = Ra^T Ra and B = Rb^T Rb the last trace is the sum of the singular
    values of Ra Rb^T, which requires no root of a matrix.
    """
    roots, means = [], []
    for x in (a.cpu().double(), b.cpu().double()):
        means.append(x.mean(0))
        roots.append(torch.linalg.qr((x - means[-1]) / math.sqrt(len(x) - 1), mode="r").R)
    trace = roots[0].square().sum() + roots[1].square().sum()
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return ((means[0] - means[1]).square().sum() + trace - 2 * cross).clamp(min=0)


def proxy_fid(real: Tensor, fake: Tensor, *, groups: Groups = 10) -> Measured:
    """`frechet_distance` with its interval; a proxy for FID on features other than Inception's.

    Compare values only at one N, image size and reference set: it falls as N grows (Chong &
    Forsyth 2020).
    """
    return jackknife(frechet_distance, real, fake, groups=groups, bounds=(0.0, math.inf))


def distance_without_bias(counts: Sequence[int], values: Sequence[float]) -> float:
    """A Fréchet distance at N -> infinity: the least-squares line in 1/N (Chong & Forsyth 2020).

    Reliable where every N is well above the number of features.
    """
    return float(np.polyfit(1 / np.asarray(counts), values, 1)[1])


def kernel_distance(a: Tensor, b: Tensor, *, paired: bool = False) -> Tensor:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018): scalar.

    Over all pairs but those of a row with itself. paired: b[i] was made from a[i]; their pairs
    are left out too, for an unbiased value (Gretton et al. 2012, Eq. 4).
    """
    return _mmd(*_tables(_kernel, a, b), paired=paired)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _mmd(within_a: Tensor, within_b: Tensor, between: Tensor, paired: bool) -> Tensor:
    def off_diagonal(table: Tensor) -> Tensor:
        return (table.sum() - table.trace()) / (len(table) * (len(table) - 1))

    both = off_diagonal(between) if paired else between.mean()
    return off_diagonal(within_a) + off_diagonal(within_b) - 2 * both


def kid(real: Tensor, fake: Tensor, *, groups: Groups = 10, paired: bool = False) -> Measured:
    """`kernel_distance` with its interval. Unbiased at any N, so it can be slightly negative."""
    return _over_pairs(lambda *t: _mmd(*t, paired), _tables(_kernel, real, fake), groups=groups)


class PrecisionRecall(NamedTuple):
    """Two shares in [0, 1]."""

    precision: Tensor
    recall: Tensor


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> PrecisionRecall:
    """How much of fake looks real, and how much of real is covered (Kynkaanniemi et al. 2019).

    A set's manifold is the union of balls around its members, each as wide as the distance to
    its k-th nearest other member. precision: the share of fake inside real's manifold; recall:
    the share of real inside fake's. Both depend on N and M.
    """
    of_real, of_fake, between = _tables(_squares, real, fake)
    return PrecisionRecall(_inside(of_real, between, k), _inside(of_fake, between.T, k))


def _inside(within: Tensor, between: Tensor, k: int) -> Tensor:
    radii = within.kthvalue(k + 1, dim=1).values  # each row is its own nearest: k + 1
    return (between <= radii[:, None]).any(0).double().mean()


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances, (N, D), (M, D) float64 -> (N, M); equal rows are exactly 0 apart.

    As |a|^2 + |b|^2 - 2 a.b, fast but inexact where a and b are close: float32 would not do.
    """
    lengths = a.square().sum(1)[:, None] + b.square().sum(1)
    found = torch.addmm(lengths, a, b.T, alpha=-2)
    return found.masked_fill_(found < ROUNDING * lengths, 0.0)


def _tables(pairs: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tables:
    """pairs: (N, D), (M, D) -> (N, M). The tables take 2.4 GB for N = M = 10,000."""
    a, b = a.cpu().double(), b.cpu().double()
    return pairs(a, a), pairs(b, b), pairs(a, b)


def _over_pairs(statistic: Callable[..., Tensor], tables: Tables, **options: Any) -> Measured:
    """`jackknife` over the rows of both sets, with tables that are computed once."""
    a, b, between = tables

    def of_rows(i: Tensor, j: Tensor) -> Tensor:
        return statistic(a[i][:, i], b[j][:, j], between[i][:, j])

    return jackknife(of_rows, *map(torch.arange, between.shape), **options)


def nearest_neighbours(a: Tensor, b: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """Euclidean distances and indices of the k rows of b nearest to each row of a: (N, k) twice.

    Shows whether a model copies. Rows are features, or whole images: `x.flatten(1)`.
    """
    squared, indices = [], []
    for part in tqdm(a.cpu().split(ROWS), "neighbours", unit="part", delay=2, leave=False):
        table = [_squares(part.double(), rows.double()) for rows in b.cpu().split(ROWS)]
        found = torch.cat(table, dim=1).topk(k, largest=False)
        squared.append(found.values)
        indices.append(found.indices)
    return torch.cat(squared).sqrt(), torch.cat(indices)


@torch.no_grad()
def evaluate_images(
    real: Tensor,
    fake: Tensor,
    *,
    paired: bool = False,
    train: Tensor | None = None,
    features: nn.Module | None = None,
    perceptual: nn.Module | None = None,
    clusters: Tensor | None = None,
    groups: int = 10,
    k: int = 3,
    seed: int = 0,
) -> Evaluation:
    """Compute all metrics of generated against real images (N, 3, S, S), with intervals.

    float in [-1, 1] or uint8 -> `fid` (`proxy_fid` without Inception), `kid`, `precision`,
    `recall`. paired: fake[i] was made from real[i]; adds `psnr`, `ssim` and `perceptual`, and the
    Fréchet distance is `r_fid`. train, images or features: adds `train_distance`, the median
    distance of a fake image to the nearest training image, and `nearer_to_train`, the share of
    fake images nearer to one than the median real image: 0.5 where the model samples as the data
    do, near 1 where it copies (real must then be held out). clusters, of pairs: (N,) int, images
    that are not independent. features, perceptual: default `frechet_features()`,
    `perceptual_distance()`. groups: of the jackknife, drawn by `seed` (0: no intervals). Raises
    ValueError for values outside [-1, 1] and for too few images.
    """
    _check_sets(real, fake, groups, k)
    features = features or frechet_features().to(real.device)
    settings: dict[str, Any] = {"features": _name_of(features), "groups": groups, "k": k}
    settings |= {"seed": seed, "image": list(real.shape[1:])}
    settings |= {} if clusters is None else {"clusters": len(clusters.unique())}
    measured, drawn = {}, 0
    if paired:
        perceptual = perceptual or perceptual_distance().to(real.device)
        settings["perceptual"] = _name_of(perceptual)
        measured = compare_pairs(real, fake, perceptual, clusters)
    if groups:
        draw = torch.Generator().manual_seed(seed)
        of_real = random_groups(len(real), groups, draw, clusters)
        drawn = (of_real, of_real if paired else random_groups(len(fake), groups, draw))
    a, b = extract_features(real, features), extract_features(fake, features)
    name = "fid" if settings["features"] == "Inception" else "proxy_fid"
    name = name.replace("fid", "r_fid") if paired else name
    measured |= {name: proxy_fid(a, b, groups=drawn), "kid": kid(a, b, groups=drawn, paired=paired)}
    tables, shares = _tables(_squares, a, b), {"groups": drawn, "bounds": (0.0, 1.0)}
    precision = _over_pairs(lambda r, f, rf: _inside(r, rf, k), tables, n=len(b), **shares)
    recall = _over_pairs(lambda r, f, rf: _inside(f, rf.T, k), tables, n=len(a), **shares)
    measured |= {"precision": precision, "recall": recall}
    if train is not None:
        train = extract_features(train, features) if train.ndim == 4 else train
        pair = [nearest_neighbours(x, train)[0][:, 0] for x in (a, b)]
        measured["train_distance"] = median_interval(pair[1])
        measured["nearer_to_train"] = jackknife(
            lambda a, b: (b < a.median()).double().mean(), *pair, n=len(b), **shares
        )
    return Evaluation(measured, settings)


def _name_of(module: nn.Module) -> str:
    return getattr(module, "name", type(module).__name__)


def _check_sets(real: Tensor, fake: Tensor, groups: int, k: int) -> None:
    """Raise ValueError for values that are no images, and for too few of them."""
    for x in (real, fake):
        if x.is_floating_point() and not (x.abs() <= 1 + 1e-4).all():
            raise ValueError("real and fake must be uint8, or finite floats in [-1, 1]")
    n = min(len(real), len(fake))
    if groups == 1 or k < 1 or n < max(2 * groups, 2 * k + 1):
        raise ValueError(
            f"{n} images are too few for groups={groups} and k={k}: at least two for each of two "
            "or more groups (0: no intervals), and 2k + 1"
        )


def evaluate_first_stage(
    autoencoder: Autoencoder, x: Tensor, *, groups: int = 10, seed: int = 0, **options: Any
) -> Evaluation:
    """Compute how well held-out images x (N, 3, H, W) survive a first stage (LDM Tab. 8, and more).

    `evaluate_images(x, D(E(x)), paired=True, **options)`, and `compression`, the numbers of an
    image over those of its latent. For VQ also `bits_per_pixel`, log2(K) h w / (H W), without
    entropy coding; `code_usage`, the share of the K codes in use, which grows with N; and
    `perplexity`, exp of the entropy of their counts. PSNR is infinite in pixel space.
    """
    device, config, n = next(autoencoder.parameters(), x).device, autoencoder.config, len(x)
    options["features"] = options.get("features") or frechet_features().to(device)
    options["perceptual"] = options.get("perceptual") or perceptual_distance().to(device)
    x_rec, z = reconstructions(autoencoder, x)
    found = evaluate_images(x.cpu(), x_rec, paired=True, groups=groups, seed=seed, **options)
    found["compression"] = exactly(x[0].numel() / z[0].numel(), n)
    if config.regularizer == "vq":
        bits = math.log2(config.codebook_size) * z[0, 0].numel() / x[0, 0].numel()
        codes = torch.cat([autoencoder.code_indices(p.to(device)).cpu() for p in z.split(ROWS)])

        def usage(codes: Tensor) -> tuple[Tensor, Tensor]:
            return code_usage(codes.flatten().bincount(minlength=config.codebook_size))

        draw, drawn = torch.Generator().manual_seed(seed), []
        if groups:
            drawn = [random_groups(n, groups, draw, options.get("clusters"))]
        found |= {"bits_per_pixel": exactly(bits, n), "code_usage": exactly(usage(codes)[0], n)}
        found["perplexity"] = jackknife(
            lambda rows: usage(rows)[1], codes, groups=drawn, bounds=(1.0, math.inf)
        )
    return found
