"""Features of images for Fréchet distances: Inception's, or EfficientNet-Lite0's offline."""

from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from minildm.compression.perceptual import EfficientNetLite0, Frozen, announce_once, weights_file
from minildm.data.dataset import as_float

INCEPTION_FILES = (  # one network of 2015, as two projects name it
    "weights-inception-2015-12-05-6726825d.pth",  # torch-fidelity, torchmetrics
    "pt_inception-2015-12-05-6726825d.pth",  # pytorch-fid
)


class InceptionFeatures(Frozen):
    """torch-fidelity's Inception of 2015, pooled: the features behind published FIDs.

    It takes 256 levels, so no gradient reaches the images, and resizes them as TensorFlow 1 did.
    (B, 3, H, W) in [-1, 1] -> (B, 2048)
    """

    name = "Inception"
    num_features = 2048  # torchmetrics reads this

    def __init__(self, path: Path) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))
        self.net = net.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        levels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        with torch.autocast(x.device.type, enabled=False):
            return self.net(levels)[0]


class OfflineFeatures(EfficientNetLite0):
    """Pooled features of EfficientNet-Lite0; compare only images of one size.

    block: None for the head, 1,280 numbers; 0..15 for that block's map (block 10: 112 numbers),
        whose covariance fewer images suffice to estimate.

    (B, 3, H, W) in [-1, 1], H and W at least 32 -> (B, num_features)
    """

    def __init__(self, block: int | None = None) -> None:
        super().__init__()
        self.layer = "head" if block is None else f"block{block}"
        self.num_features = 1280 if block is None else self.widths[block]

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x, (self.layer,))[self.layer].mean(dim=(2, 3))


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
    parts = tqdm(x.split(batch_size), desc="features", unit="batch", delay=2, leave=False)
    return torch.cat([features(as_float(part).to(place)).float().cpu() for part in parts])
