"""Images against their originals, and two sets of images, with intervals.

PSNR, SSIM, a perceptual distance and reconstructions; Fréchet and kernel distance, precision. The
latter are of features (N, D) and (M, D), in float64 on the CPU.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minildm.compression.autoencoder import Autoencoder
from minildm.compression.perceptual import (
    EfficientNetLite0,
    Frozen,
    announce_once,
    perceptual_distance,
    weights_file,
)
from minildm.compression.quantizer import code_usage
from minildm.data.dataset import as_float
from minildm.evaluation.intervals import (
    Evaluation,
    Measured,
    jackknife,
    mean_interval,
    random_groups,
)
from minildm.files import progress

INCEPTION_FILES = (  # one network of 2015, as two projects name it
    "weights-inception-2015-12-05-6726825d.pth",  # torch-fidelity
    "pt_inception-2015-12-05-6726825d.pth",  # pytorch-fid
)
ROUNDING = 1e-12  # squared distances below this share of the squared lengths are 0
PART = 64  # images that go through a network at a time


def psnr(x: Tensor, x_rec: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB: two (B, 3, H, W) in [-1, 1] -> (B,).

    On [0, 1], after clamping: -10 log10 of each image's mean squared error; infinite for equal
    images. Average over images, not over their errors: `mean_interval(psnr(...))`.
    """
    squares = (_unit_range(x) - _unit_range(x_rec)) ** 2
    return -10 * squares.mean(dim=(1, 2, 3)).log10()


def ssim(x: Tensor, x_rec: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), at most 1: two (B, 3, H, W) in [-1, 1] -> (B,).

    On [0, 1] after clamping: Eq. 13 in Gaussian windows of 11 pixels, sigma 1.5, images mirrored
    at their edges; the mean over channels and pixels. As torchmetrics, which is slow to import.
    """
    pairs = (_unit_range(y).flatten(0, 1)[:, None] for y in (x, x_rec))  # (3B, 1, H, W)
    a, b = (F.pad(y, (5, 5, 5, 5), mode="reflect") for y in pairs)
    window = torch.exp(-(torch.arange(-5.0, 6.0, device=x.device) ** 2) / (2 * 1.5**2))
    window = torch.outer(window, window)[None, None] / window.sum() ** 2
    mean_a, mean_b, aa, bb, ab = (F.conv2d(y, window) for y in (a, b, a * a, b * b, a * b))
    luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    spread = aa - mean_a**2 + bb - mean_b**2
    structure = (2 * (ab - mean_a * mean_b) + 0.03**2) / (spread + 0.03**2)
    return (luminance * structure).unflatten(0, (len(x), -1)).mean(dim=(1, 2, 3, 4))


def _unit_range(x: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1], clamped, float32."""
    return ((x.float() + 1) / 2).clamp(0, 1)


@torch.no_grad()
def compare_pairs(
    real: Tensor, fake: Tensor, perceptual: nn.Module, clusters: Tensor | None = None
) -> dict[str, Measured]:
    """Means of `psnr`, `ssim` and `perceptual` over pairs: two (N, 3, H, W), float or uint8."""
    place, parts = next(perceptual.parameters(), real).device, []
    for pair in zip(real.split(PART), fake.split(PART), strict=True):
        a, b = (as_float(x).to(place) for x in pair)
        parts.append(torch.stack([metric(a, b) for metric in (psnr, ssim, perceptual)]).cpu())
    found = [mean_interval(values, clusters) for values in torch.cat(parts, dim=1)]
    return dict(zip(("psnr", "ssim", "perceptual"), found, strict=True))


@torch.no_grad()
def reconstruct(autoencoder: Autoencoder, x: Tensor) -> Tensor:
    """D(E(x)), for KL of the mean, clamped: (B, 3, H, W), float or uint8 -> in [-1, 1], CPU."""
    place, found = next(autoencoder.parameters(), x).device, []
    for part in progress(x.split(PART), "reconstruct", unit="batch", delay=2, leave=False):
        z = autoencoder.encode(as_float(part).to(place), sample=False)
        found.append(autoencoder.decode(z).float().clamp(-1.0, 1.0).cpu())
    return torch.cat(found)


class InceptionFeatures(Frozen):
    """torch-fidelity's Inception of 2015, pooled: the features behind published FIDs.

    It takes 256 levels, so no gradient reaches the images, and resizes them as TensorFlow 1 did.
    (B, 3, H, W) in [-1, 1] -> (B, 2048)
    """

    name = "Inception"

    def __init__(self, path: Path) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))
        self.net = net.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        levels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return self.net(levels)[0]


class OfflineFeatures(EfficientNetLite0):
    """Pooled features of EfficientNet-Lite0; compare only images of one size.

    layers: default "head", 1,280 numbers. The covariance of a middle block, as of "block10", 112
    numbers, is estimated from fewer images. Those of several layers follow each other.
    (B, 3, H, W) in [-1, 1], H and W at least 32 -> (B, D)
    """

    def __init__(self, *layers: str) -> None:
        super().__init__()
        self.chosen = layers or ("head",)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.maps(x, self.chosen).values()
        return torch.cat([layer.mean(dim=(2, 3)) for layer in maps], dim=1)


def frechet_features() -> InceptionFeatures | OfflineFeatures:
    """Return Inception's features where its weights are on the machine; nothing is downloaded.

    Else `OfflineFeatures()`, and a warning in the log, once, says so. By `.name`, "Inception" or
    "EfficientNet-Lite0", a distance is called FID or proxy-FID.
    """
    found = next(filter(None, map(weights_file, INCEPTION_FILES)), None)
    if found is not None:
        return InceptionFeatures(found)
    announce_once("Inception", INCEPTION_FILES, OfflineFeatures.name)
    return OfflineFeatures()


@torch.no_grad()
def extract_features(x: Tensor, features: nn.Module, batch_size: int = 128) -> Tensor:
    """Features of images, in batches: (N, 3, S, S), float in [-1, 1] or uint8 -> (N, D), CPU."""
    place = next(features.parameters(), x).device
    parts = progress(x.split(batch_size), desc="features", unit="batch", delay=2, leave=False)
    return torch.cat([features(as_float(part).to(place)).float().cpu() for part in parts])


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


def proxy_fid(real: Tensor, fake: Tensor, **options: Any) -> Measured:
    """`frechet_distance` with its interval; a proxy for FID on features other than Inception's.

    Compare values only at one N, image size and reference set: it falls as N grows (Chong &
    Forsyth 2020). options: of `jackknife`.
    """
    return jackknife(frechet_distance, real, fake, bounds=(0.0, math.inf), **options)


def kernel_distance(a: Tensor, b: Tensor, *, paired: bool = False) -> Tensor:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018): scalar.

    Over all pairs but those of a row with itself. paired: b[i] was made from a[i]; their pairs
    are left out too, for an unbiased value (Gretton et al. 2012, Eq. 4).
    """

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def off_diagonal(table: Tensor) -> Tensor:
        return (table.sum() - table.trace()) / (len(table) * (len(table) - 1))

    a, b = a.cpu().double(), b.cpu().double()
    between = off_diagonal(kernel(a, b)) if paired else kernel(a, b).mean()
    return off_diagonal(kernel(a, a)) + off_diagonal(kernel(b, b)) - 2 * between


def kid(real: Tensor, fake: Tensor, *, paired: bool = False, **options: Any) -> Measured:
    """`kernel_distance` with its interval. Unbiased at any N, so it can be slightly negative."""
    return jackknife(partial(kernel_distance, paired=paired), real, fake, **options)


def precision(real: Tensor, fake: Tensor, k: int = 3) -> Tensor:
    """The share of fake that looks real (Kynkaanniemi et al. 2019): scalar.

    That is, within the union of balls around the members of real, each as wide as the distance
    to its k-th nearest other member. Recall, how much of real is covered, is
    `precision(fake, real)`. Both depend on N and M.
    """
    real, fake = real.cpu().double(), fake.cpu().double()
    radii = _squares(real, real).kthvalue(k + 1, dim=1).values  # each is its own nearest: k + 1
    return (_squares(real, fake) <= radii[:, None]).any(0).double().mean()


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances, (N, D), (M, D) float64 -> (N, M); equal rows are exactly 0 apart.

    As |a|^2 + |b|^2 - 2 a.b, fast but inexact where a and b are close: float32 would not do.
    """
    lengths = a.square().sum(1)[:, None] + b.square().sum(1)
    found = torch.addmm(lengths, a, b.T, alpha=-2)
    return found.masked_fill_(found < ROUNDING * lengths, 0.0)


@torch.no_grad()
def evaluate_images(
    real: Tensor,
    fake: Tensor,
    *,
    paired: bool = False,
    features: nn.Module | None = None,
    perceptual: nn.Module | None = None,
    clusters: Tensor | None = None,
    groups: int = 10,
    seed: int = 0,
) -> Evaluation:
    """Compute all metrics of generated against real images (N, 3, S, S), with intervals.

    float in [-1, 1] or uint8 -> `fid` (`proxy_fid` without Inception), `kid`, `precision`,
    `recall`; `nearest`, how far the features of fake are from the nearest of real, `nearest_real`,
    those of real from each other. paired: fake[i] was made from real[i]; instead of `nearest`
    `psnr`, `ssim` and `perceptual`, alone if N < 7; the Fréchet distance is `r_fid`. clusters,
    of pairs: (N,) int, images that are not independent. features, perceptual: default
    `frechet_features()`, `perceptual_distance()`. groups: of the jackknife, two images or more
    each, drawn by `seed`. Raises ValueError for values outside [-1, 1] and too few images.
    """
    for x in (real, fake):
        if x.is_floating_point() and not (x.abs() <= 1 + 1e-4).all():
            raise ValueError("real and fake must be uint8, or finite floats in [-1, 1]")
    n, networks, measured = min(len(real), len(fake)), {}, {}
    few, groups = n < 7, min(groups, max(2, n // 2))
    if groups < 2 or (few and not paired):
        raise ValueError(f"{n} images in {groups} groups are too few: at least 7, and 2 groups")
    if paired:
        networks["perceptual"] = perceptual or perceptual_distance().to(real.device)
        measured = compare_pairs(real, fake, networks["perceptual"], clusters)
    if few:
        return Evaluation(measured, image=list(real.shape[1:]))
    networks["features"] = features or frechet_features().to(real.device)
    names = {key: getattr(net, "name", type(net).__name__) for key, net in networks.items()}
    draw = torch.Generator().manual_seed(seed)
    of_real = random_groups(len(real), groups, draw, clusters)
    drawn = [of_real, of_real if paired else random_groups(len(fake), groups, draw)]
    a, b = (extract_features(x, networks["features"]) for x in (real, fake))
    proxy = "" if names["features"] == "Inception" else "proxy_"
    measured[f"{proxy}r_fid" if paired else f"{proxy}fid"] = proxy_fid(a, b, groups=drawn)
    measured["kid"] = kid(a, b, groups=drawn, paired=paired)
    shares = {"groups": drawn, "bounds": (0.0, 1.0)}
    measured["precision"] = jackknife(precision, a, b, n=len(b), **shares)
    measured["recall"] = jackknife(lambda a, b: precision(b, a), a, b, n=len(a), **shares)
    if not paired:
        a, b = a.double(), b.double()
        measured["nearest"] = mean_interval(_squares(b, a).amin(1).sqrt())
        measured["nearest_real"] = mean_interval(_squares(a, a).kthvalue(2, 1).values.sqrt())
    return Evaluation(measured, groups=groups, seed=seed, image=list(real.shape[1:]), **names)


@torch.no_grad()
def evaluate_first_stage(
    autoencoder: Autoencoder, x: Tensor, *, groups: int = 10, seed: int = 0, **options: Any
) -> Evaluation:
    """Compute how well held-out images x (N, 3, H, W) survive a first stage (LDM Tab. 8, and more).

    `evaluate_images(x, D(E(x)), paired=True, **options)`, and `compression`, the numbers of an
    image over those of its latent. For VQ also `bits_per_pixel`, log2(K) / f^2, without entropy
    coding; `code_usage`, the share of the K codes in use, which grows with N; and `perplexity`,
    exp of the entropy of their counts. PSNR is infinite in pixel space.
    """
    config, size, n = autoencoder.config, autoencoder.config.codebook_size, len(x)
    x = x.to(next(autoencoder.parameters(), x).device)
    options |= {"groups": groups, "seed": seed}
    found = evaluate_images(x, reconstruct(autoencoder, x), paired=True, **options)
    found["compression"] = Measured(3 * config.f**2 / config.z_channels, n=n)
    if config.regularizer == "vq":
        z = (autoencoder.moments(as_float(part)) for part in x.split(PART))
        nearest = autoencoder.decoder.quantizer.nearest
        codes = torch.cat([nearest(part).cpu() for part in z])  # (N, h, w)

        def perplexity(rows: Tensor) -> Tensor:
            return code_usage(rows.flatten().bincount(minlength=size))[1]

        draw = torch.Generator().manual_seed(seed)
        drawn = [random_groups(n, min(groups, max(2, n // 2)), draw, options.get("clusters"))]
        found["bits_per_pixel"] = Measured(math.log2(size) / config.f**2, n=n)
        found["code_usage"] = Measured(len(codes.unique()) / size, n=n)
        found["perplexity"] = jackknife(perplexity, codes, groups=drawn, bounds=(1.0, math.inf))
    return found
