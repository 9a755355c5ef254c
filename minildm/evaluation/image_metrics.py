"""An image against its original: PSNR, SSIM and a perceptual distance; reconstructions."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from minildm.compression.autoencoder import Autoencoder
from minildm.data.dataset import as_float
from minildm.evaluation.intervals import Measured, exactly, mean_interval

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
    at their edges; the mean over channels and pixels, as torchmetrics computes it.
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
    """Means of `psnr`, `ssim` and `perceptual` over pairs: two (N, 3, H, W), float or uint8.

    The mean PSNR is infinite, without an interval, where an image is reproduced exactly.
    """
    place = next(perceptual.parameters(), real).device
    metrics = {"psnr": psnr, "ssim": ssim, "perceptual": perceptual}
    found: dict[str, list[Tensor]] = {name: [] for name in metrics}
    pairs = list(zip(real.split(PART), fake.split(PART), strict=True))
    for a, b in tqdm(pairs, "pairs", unit="batch", delay=2, leave=False):
        a, b = as_float(a).to(place), as_float(b).to(place)
        for name, metric in metrics.items():
            found[name].append(metric(a, b).cpu())
    values = {name: torch.cat(parts) for name, parts in found.items()}
    infinite = exactly(math.inf, len(real))
    return {
        name: infinite if v.isinf().any() else mean_interval(v, clusters)
        for name, v in values.items()
    }


def reconstruct(autoencoder: Autoencoder, x: Tensor) -> Tensor:
    """D(E(x)), for KL of the mean, clamped: (B, 3, H, W), float or uint8 -> in [-1, 1], CPU."""
    return reconstructions(autoencoder, x)[0]


@torch.no_grad()
def reconstructions(autoencoder: Autoencoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """What `reconstruct` returns, and the latents (B, c, h, w)."""
    place, was_training = next(autoencoder.parameters(), x).device, autoencoder.training
    autoencoder.eval()
    found = []
    for part in tqdm(x.split(PART), "reconstruct", unit="batch", delay=2, leave=False):
        z = autoencoder.encode(as_float(part).to(place), sample=False)
        found.append((autoencoder.decode(z).float().clamp(-1.0, 1.0).cpu(), z.cpu()))
    autoencoder.train(was_training)
    x_rec, z = map(torch.cat, zip(*found, strict=True))
    return x_rec, z
