"""Latents of a whole data set, encoded once and kept on disk."""

import hashlib

import torch
from torch import Tensor

from minildm.compression.autoencoder import Autoencoder
from minildm.compression.quantizer import DiagonalGaussian
from minildm.data.dataset import ImageDataset, cached
from minildm.files import fingerprint, progress


@torch.no_grad()
def encode_dataset(autoencoder: Autoencoder, data: ImageDataset, precision: str = "fp32") -> Tensor:
    """Moments of every image and of its mirror image: (N, 2, c', h, w) float32 on the CPU.

    Cached under the data's fingerprint, the encoder's hash and the precision ("fp32", "bf16").
    """

    def encode() -> Tensor:
        device, was_training = autoencoder.scale.device, autoencoder.training
        autoencoder.eval()  # no dropout
        parts = []
        for rows in progress(torch.arange(len(data)).split(128), desc="encode", delay=2):
            x = torch.stack([data[i]["image"] for i in rows.tolist()]).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision != "fp32"):
                both = [autoencoder.moments(side).float() for side in (x, x.flip(-1))]
            parts.append(torch.stack(both, dim=1).cpu())  # (B, 2, c', h, w)
        autoencoder.train(was_training)
        return torch.cat(parts)

    key = f"{data.fingerprint}-{fingerprint(autoencoder.encoder)}-{precision}"
    return cached(f"latents-{hashlib.sha256(key.encode()).hexdigest()[:24]}", encode)


def measure_scale(autoencoder: Autoencoder, data: ImageDataset, precision: str = "fp32") -> float:
    """Standard deviation of a sample of the posteriors over the data set; 1 unless KL.

    LDM appendix G estimates it on the first batch; this is over all images, in closed form: the
    variance of the means plus the mean of the variances.
    """
    if autoencoder.config.regularizer != "kl":
        return 1.0  # as in the paper: VQ latents have a variance near one (App. G)
    moments = encode_dataset(autoencoder, data, precision).flatten(0, 1)
    mean, logvar = DiagonalGaussian.from_moments(moments.double())
    return (mean.var() + logvar.exp().mean()).sqrt().item()
