"""The discriminator of stage 1: a patch GAN, Isola et al. 2017, as in LDM appendix G."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from minildm.layers import check_fields


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Shape of D. Each of `layers` halves the sides; three see 70 pixels, two 34, one 16."""

    in_channels: int = 3
    channels: int = 64
    layers: int = 3

    def __post_init__(self) -> None:
        check_fields(self, 1, 1024, "in_channels", "channels")
        check_fields(self, 1, 10, "layers")

    @property
    def least_side(self) -> int:
        """The smallest side of an image that leaves one logit."""
        return 3 * 2**self.layers


class PatchDiscriminator(nn.Module):
    """Give each patch a logit, above 0 where it looks real; with batch norm, as officially.

    (B, 3, H, W) -> (B, 1, H / 2**layers - 2, W / 2**layers - 2)
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.channels * min(2**i, 8) for i in range(config.layers + 1)]
        net: list[nn.Module] = [nn.Conv2d(config.in_channels, widths[0], 4, 2, 1)]
        for i, (c_in, c_out) in enumerate(pairwise(widths), 1):
            stride = 2 if i < config.layers else 1
            net += [nn.LeakyReLU(0.2), nn.Conv2d(c_in, c_out, 4, stride, 1, bias=False)]
            net += [nn.BatchNorm2d(c_out)]
        self.net = nn.Sequential(*net, nn.LeakyReLU(0.2), nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    """Small normal weights, as in the pix2pix code that this network comes from."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
