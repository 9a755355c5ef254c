"""An image against its original: PSNR, SSIM and a perceptual distance; reconstructions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from minildm.compression.autoencoder import Autoencoder
from minildm.data.dataset import as_float
from minildm.evaluation.intervals import Measured, mean_interval

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
    place, was_training = next(autoencoder.parameters(), x).device, autoencoder.training
    autoencoder.eval()
    found = []
    for part in tqdm(x.split(PART), "reconstruct", unit="batch", delay=2, leave=False):
        z = autoencoder.encode(as_float(part).to(place), sample=False)
        found.append(autoencoder.decode(z).float().clamp(-1.0, 1.0).cpu())
    autoencoder.train(was_training)
    return torch.cat(found)
