"""What training makes of a batch: mirrored and shrunk images, masks, named styles.

(B, 3, H, W) in [-1, 1] -> the same range; masks are (B, 1, H, W), 1 = known, 0 = hole.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minildm.data.dataset import as_float
from minildm.layers import Batch, BatchRandom


def mirrored(batch: Batch, chosen: Tensor) -> Batch:
    """Mirror the chosen (B,) bool samples: image, semantic (B, H, W), boxes (B, K, 4), if there."""
    batch = dict(batch)
    for key in {"image", "semantic"} & set(batch):
        x = batch[key]
        batch[key] = torch.where(chosen.view(-1, *[1] * (x.ndim - 1)), x.flip(-1), x)
    if "boxes" in batch:
        left, top, right, bottom = batch["boxes"].unbind(-1)
        turned = torch.stack([1 - right, top, 1 - left, bottom], dim=-1)
        there = chosen[:, None] & (batch["classes"] >= 0)  # (B, K): the padding stays zero
        batch["boxes"] = torch.where(there[..., None], turned, batch["boxes"])
    return batch


def style_caption(caption: str, style: str) -> str:
    """Append the style to a caption, as prompts do: "a red apple, blob style"."""
    return f"{caption}, {style} style"


def with_styles(batch: Batch, share: float, rng: BatchRandom) -> Batch:
    """Take a random share of the captions from `styled`, where they name the style."""
    named = (rng.rand(len(batch["caption"])) < share).tolist()
    rows = zip(batch["caption"], batch["styled"], named, strict=True)
    return {**batch, "caption": [styled if chosen else plain for plain, styled, chosen in rows]}


def task_inputs(
    batch: Batch, kind: str, f: int, rng: BatchRandom, masks: Sequence[str] = ("lama", "halves")
) -> Batch:
    """What a task's conditioner reads, made from `image` or `semantic` (uint8 or as in items).

    "low_res": `low_res` (B, 3, H/f, W/f); "inpaint": `image` in [-1, 1] and `mask` (B, 1, H, W) of
    the kinds `masks`, keys of MASKS; "semantic": `semantic` as int64. Other kinds need nothing.
    """
    if kind == "semantic":
        return {"semantic": batch["semantic"].long()}
    if kind == "low_res":
        return {"low_res": shrink(as_float(batch["image"]), f)}
    if kind == "inpaint":
        x = as_float(batch["image"])
        return {"image": x, "mask": draw_masks(masks, len(x), x.shape[2:], rng).to(x)}
    return {}


def shrink(x: Tensor, factor: int) -> Tensor:
    """Bicubic, antialiased: (B, 3, H, W) -> (B, 3, H/factor, W/factor)."""
    size = (x.shape[-2] // factor, x.shape[-1] // factor)
    return F.interpolate(x, size=size, mode="bicubic", antialias=True).clamp(-1, 1)


def enlarge(x: Tensor, factor: int) -> Tensor:
    """Bicubic: (B, 3, h, w) -> (B, 3, factor h, factor w); the baseline of super-resolution."""
    return F.interpolate(x, scale_factor=factor, mode="bicubic").clamp(-1, 1)


def pixel_centres(size: tuple[int, int], device: torch.device) -> Tensor:
    """x and y of each pixel's centre in [0, 1]: (H, W, 2)."""
    y, x = ((torch.arange(side, device=device) + 0.5) / side for side in size)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)


def strokes(n: int, size: tuple[int, int], rng: BatchRandom) -> Tensor:
    """Free-form holes: one to three broad strokes, each a chain of two to five segments.

    Width: 0.08 to 0.22 of the image's side, as the wide masks of LaMa (Suvorov et al. 2022).
    """
    most, corners = 3, 6
    draw = rng.rand(n, most, corners, 2)
    start, turns = draw[:, :, :1], (draw[:, :, 1:] - 0.5) * 0.9
    path = torch.cat([start, turns], dim=2).cumsum(dim=2).clamp(-0.1, 1.1)  # (n, most, corners, 2)
    width, segments, count = rng.rand(n, 3, most).unbind(1)  # (n, most) each
    far = to_segments(path[:, :, :-1], path[:, :, 1:], size)  # (n, most, segments, H, W)
    used = torch.arange(corners - 1, device=draw.device) < 2 + (4 * segments[..., None]).floor()
    wanted = torch.arange(most, device=draw.device) < 1 + (most * count[:, :1]).floor()
    there = (used & wanted[..., None])[..., None, None]
    half = (0.04 + 0.07 * width)[..., None, None, None]
    return 1 - ((far < half) & there).any(dim=2).any(dim=1)[:, None].float()


def to_segments(a: Tensor, b: Tensor, size: tuple[int, int]) -> Tensor:
    """Distance of each pixel's centre to segments a-b (..., 2), x and y in [0, 1]: (..., H, W)."""
    pixels = pixel_centres(size, a.device)
    a, way = a[..., None, None, :], (b - a)[..., None, None, :]
    along = ((pixels - a) * way).sum(-1) / way.square().sum(-1).clamp(min=1e-9)
    return (pixels - a - along.clamp(0, 1)[..., None] * way).square().sum(-1).sqrt()


def boxes(n: int, size: tuple[int, int], rng: BatchRandom) -> Tensor:
    """One to three rectangular holes of any aspect: each side 0.15 to 0.5 of the image's."""
    draw = rng.rand(n, 3, 5)
    sides = (0.15 + 0.35 * draw[..., 2:4])[:, :, None, None]  # (n, 3, 1, 1, 2)
    low = draw[:, :, None, None, :2] * (1 - sides)
    wanted = torch.arange(3, device=draw.device) < 1 + (3 * draw[:, :1, 4]).floor()  # (n, 3)
    pixels = pixel_centres(size, draw.device)
    hole = ((pixels >= low) & (pixels < low + sides)).all(-1)  # (n, 3, H, W)
    return 1 - (hole & wanted[..., None, None]).any(dim=1)[:, None].float()


def halves(n: int, size: tuple[int, int], rng: BatchRandom) -> Tensor:
    """One half of the image is a hole: left, right, top or bottom."""
    which = rng.randint(4, n)
    x, y = pixel_centres(size, which.device).unbind(-1)
    return torch.stack([x >= 0.5, x <= 0.5, y >= 0.5, y <= 0.5]).float()[which, None]


def lama(n: int, size: tuple[int, int], rng: BatchRandom) -> Tensor:
    """Strokes or boxes, each for half of the images: LaMa's recipe, as in LDM Sec. 4.5."""
    box = rng.rand(n, 1, 1, 1) < 0.5
    return torch.where(box, boxes(n, size, rng), strokes(n, size, rng))


MASKS = {draw.__name__: draw for draw in (lama, strokes, boxes, halves)}


def draw_masks(kinds: Sequence[str], n: int, size: tuple[int, int], rng: BatchRandom) -> Tensor:
    """Draw a mask (n, 1, H, W) of one of the kinds, keys of MASKS, for each of n images."""
    drawn = torch.stack([MASKS[kind](n, size, rng) for kind in kinds])
    return drawn[rng.randint(len(kinds), n), torch.arange(n, device=drawn.device)]


def mean_fill(x: Tensor, mask: Tensor) -> Tensor:
    """Fill the hole with the mean colour of the known pixels; the baseline of inpainting."""
    known = (x * mask).sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True).clamp(min=1)
    return torch.where(mask > 0.5, x, known)
