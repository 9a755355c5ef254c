"""Small classifiers that say whether the asked thing is in a picture."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor, nn

from minildm import draws
from minildm.types import Batch

QUESTIONS = ("label", "group", "style")


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """A residual network of a few levels with one linear head per question."""

    labels: tuple[str, ...]
    groups: tuple[str, ...]
    styles: tuple[str, ...]
    width: int = 32
    width_mult: tuple[int, ...] = (1, 2, 4, 8)
    dropout: float = 0.2

    def __post_init__(self) -> None:
        if self.width % 8:
            raise ValueError(f"width={self.width} must be a multiple of 8")
        if not (self.labels and self.groups and self.styles):
            raise ValueError("labels, groups and styles must each name at least one class")


class JudgeBlock(nn.Module):
    """3x3 convolutions beside a skip, at half the size: (B, c_in, h, w) -> (B, c_out, h/2, w/2)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.skip = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(8, c_out), nn.GroupNorm(8, c_out)

    def forward(self, x: Tensor) -> Tensor:
        hid = self.norm2(self.conv2(F.silu(self.norm1(self.conv1(x)))))
        return F.silu(self.skip(F.avg_pool2d(x, 2)) + hid)


class Judge(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> logits for "label" (subgroup), "group" and "style"."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.width * m for m in config.width_mult]
        self.conv_in = nn.Conv2d(3, config.width, 3, padding=1)
        pairs = zip([config.width, *widths[:-1]], widths, strict=True)
        self.blocks = nn.Sequential(*(JudgeBlock(a, b) for a, b in pairs))
        self.dropout = draws.Dropout(config.dropout)
        sizes = {"label": config.labels, "group": config.groups, "style": config.styles}
        self.heads = nn.ModuleDict({k: nn.Linear(widths[-1], len(v)) for k, v in sizes.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hid = self.blocks(F.silu(self.conv_in(x)))
        hid = self.dropout(reduce(hid, "b c h w -> b c", "mean"))
        return {question: head(hid) for question, head in self.heads.items()}

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy with 0.1 label smoothing for each question, and their sum, `loss`."""
        logits = self(soften(batch["image"]))
        terms = {q: F.cross_entropy(logits[q], batch[q], label_smoothing=0.1) for q in QUESTIONS}
        return {"loss": sum(terms.values()), **terms}


def soften(x: Tensor) -> Tensor:
    """Shift, zoom, dim and blur pictures at random, so that the judge looks at what is drawn.

    A generated picture is a little soft and never quite centred; a judge that has only seen
    crisp originals would judge that instead. (B, 3, H, W) -> the same shape.
    """
    n = len(x)
    theta = torch.zeros(n, 2, 3, device=x.device)
    theta[:, 0, 0] = theta[:, 1, 1] = draws.uniform(0.85, 1.2, n, device=x.device)
    theta[:, :, 2] = draws.uniform(-0.15, 0.15, n, 2, device=x.device)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    # Outside the picture is white, which is 0 after this subtraction.
    x = F.grid_sample(x - 1.0, grid, align_corners=False) + 1.0
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    amount = draws.rand(n, 1, 1, 1, device=x.device)
    x = x + amount * (blurred - x)
    return x + 0.1 * draws.rand(n, 1, 1, 1, device=x.device) * draws.randn_like(x)


@torch.no_grad()
def logits_of(judge: Judge, x: Tensor) -> dict[str, Tensor]:
    """The judge's logits for every question, in batches: (B, 3, H, W) -> (B, answers), CPU."""
    place = next(judge.parameters(), x).device
    parts = [judge(part.to(place)) for part in x.split(256)]
    return {question: torch.cat([part[question].cpu() for part in parts]) for question in parts[0]}


def correct(judge: Judge, x: Tensor, truth: Tensor, question: str = "group") -> Tensor:
    """Whether the judge names the truth: (B, 3, H, W), (B,) int64 -> (B,) bool."""
    if question not in QUESTIONS:
        raise ValueError(f"question={question!r} is not known; known: {', '.join(QUESTIONS)}")
    return logits_of(judge, x)[question].argmax(dim=1) == truth.cpu()
