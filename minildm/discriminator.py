"""The critic of stage 1: a patch GAN, Isola et al. 2017, as LDM appendix G trains it."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from minildm import processes


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Shape of D. Each of `layers` halves the sides; three see 70 pixels, two 34, one 16."""

    in_channels: int = 3
    width: int = 64
    layers: int = 3

    def __post_init__(self) -> None:
        for name in ("in_channels", "width", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def least_side(self) -> int:
        """The smallest picture's side that leaves one logit."""
        return 3 * 2**self.layers


class BatchNorm2d(nn.BatchNorm2d):
    """torch's, over the pictures of all processes that train together, on whatever device."""

    def forward(self, x: Tensor) -> Tensor:
        if processes.world() == 1 or not self.training:
            return super().forward(x)
        wide, each = x.to(torch.promote_types(x.dtype, torch.float32)), (0, 2, 3)
        n = processes.world() * x.numel() // x.shape[1]  # values of a channel
        mean = processes.total(wide.sum(each)) / n
        centred = wide - mean[:, None, None]
        variance = processes.total(centred.square().sum(each)) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            unbiased = (variance * n / (n - 1)).to(self.running_var)
            self.running_var.lerp_(unbiased, self.momentum)
        factor = self.weight * (variance + self.eps).rsqrt()
        return (centred * factor[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class PatchDiscriminator(nn.Module):
    """A logit for each patch, above 0 where it looks real. Batch norm between, as officially.

    (B, 3, H, W) -> (B, 1, H / 2**layers - 2, W / 2**layers - 2)
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.width * min(2**i, 8) for i in range(config.layers + 1)]
        net: list[nn.Module] = [nn.Conv2d(config.in_channels, widths[0], 4, 2, 1)]
        for i, (c_in, c_out) in enumerate(pairwise(widths), 1):
            stride = 2 if i < config.layers else 1
            net += [nn.LeakyReLU(0.2), nn.Conv2d(c_in, c_out, 4, stride, 1, bias=False)]
            net += [BatchNorm2d(c_out)]
        self.net = nn.Sequential(*net, nn.LeakyReLU(0.2), nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[-2:]) < self.config.least_side:
            raise ValueError(
                f"x is {x.shape[-2]} x {x.shape[-1]} pixels: a discriminator of "
                f"{self.config.layers} layers needs sides of {self.config.least_side} at least"
            )
        return self.net(x)


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    """Small normal weights, as in the pix2pix code that this network comes from."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
