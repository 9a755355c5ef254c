"""What tasks do to a picture: shrink it, spoil it, cut holes into it.

All draw from torch's global generator or one that is given, so that a training goes on where it
was, and by `draws`, so that several processes spoil a batch as one does.
"""

import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from minildm import draws

DEGRADATIONS = ("bicubic", "spoiled")


def shrink(x: Tensor, factor: int) -> Tensor:
    """Bicubic, antialiased: (B, 3, H, W) in [-1, 1] -> (B, 3, H/factor, W/factor) in [-1, 1].

    Raises ValueError for sides that factor does not divide.
    """
    height, width = x.shape[-2:]
    if factor < 1 or height % factor or width % factor:
        raise ValueError(f"factor={factor} must divide the sides of {tuple(x.shape)}")
    size = (height // factor, width // factor)
    return F.interpolate(x, size=size, mode="bicubic", antialias=True).clamp(-1, 1)


def enlarge(x: Tensor, factor: int) -> Tensor:
    """Bicubic: (B, 3, h, w) in [-1, 1] -> (B, 3, factor h, factor w), the rival of a model."""
    return F.interpolate(x, scale_factor=factor, mode="bicubic").clamp(-1, 1)


def spoiled(x: Tensor, factor: int, generator: Generator | None = None) -> Tensor:
    """Blurred, shrunk, with noise and the marks of JPEG, each as strong as drawn: as `shrink`.

    Blur: a Gaussian of 0 to `factor` / 2 pixels. Noise: standard deviation 0 to 0.12 of [-1, 1].
    JPEG: quality 30 to 95. After the degradations of blind super-resolution (LDM Sec. 4.4 names
    them; Zhang et al. 2021), much simpler.
    """
    whole = torch.rand(3, draws.total(len(x)), generator=generator)
    sigma, strength, quality = draws.mine(whole, dim=1)
    widest = float((whole[0] * factor / 2).to(x).max())  # in the batch, whoever has that picture
    small = shrink(blur(x, (sigma * factor / 2).to(x), widest), factor)
    noise = draws.randn(*small.shape, generator=generator).to(x)
    small = (small + 0.12 * strength.to(x)[:, None, None, None] * noise).clamp(-1, 1)
    return jpeg(small, (30 + 65 * quality).round().int().tolist())


def blur(x: Tensor, sigma: Tensor, widest: float | None = None) -> Tensor:
    """A Gaussian blur of its own for each picture: (B, 3, H, W), sigma (B,) >= 0 in pixels.

    widest: the sigma after three of which all Gaussians are cut; default: the largest here.
    """
    widest = float(sigma.max()) if widest is None else widest
    reach = min(int(3 * widest + 1), min(x.shape[-2:]) - 1)
    away = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    weights = torch.exp(-(away**2) / (2 * sigma.clamp(min=1e-3)[:, None] ** 2))  # (B, 2 reach + 1)
    weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(3, 0)[:, None]
    flat = F.pad(x.flatten(0, 1)[None], (reach,) * 4, mode="reflect")  # (1, 3B, ...)
    across = F.conv2d(flat, weights[:, :, None], groups=len(weights))
    return F.conv2d(across, weights[..., None], groups=len(weights))[0].unflatten(0, (-1, 3))


def jpeg(x: Tensor, quality: Sequence[int]) -> Tensor:
    """Each picture (B, 3, H, W) in [-1, 1] written as a JPEG of its quality, and read again."""
    pixels = ((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    read = []
    for picture, q in zip(pixels, quality, strict=True):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=q)
        read.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(read)).permute(0, 3, 1, 2).to(x) / 127.5 - 1


# --- masks: (n, 1, H, W) float, 1 = known, 0 = hole ---


def strokes(n: int, size: tuple[int, int], generator: Generator | None = None) -> Tensor:
    """Free-form holes: one to three broad brush strokes, each a chain of two to five pieces.

    A share of the picture wide: 0.08 to 0.22, as the wide masks of LaMa (Suvorov et al. 2022).
    """
    strokes, corners = 3, 6
    draw = draws.rand(n, strokes, corners, 2, generator=generator)
    start, turns = draw[:, :, :1], (draw[:, :, 1:] - 0.5) * 0.9
    path = torch.cat([start, turns], dim=2).cumsum(dim=2).clamp(-0.1, 1.1)  # (n, strokes, corners)
    width, pieces, count = draws.rand(3, n, strokes, dim=1, generator=generator)
    far = to_segments(path[:, :, :-1], path[:, :, 1:], size)  # (n, strokes, pieces, H, W)
    used = torch.arange(corners - 1) < 2 + (4 * pieces[..., None]).floor()
    wanted = torch.arange(strokes) < 1 + (strokes * count[:, :1]).floor()
    there = (used & wanted[..., None])[..., None, None]
    half = (0.04 + 0.07 * width)[..., None, None, None]
    return 1 - ((far < half) & there).any(dim=2).any(dim=1)[:, None].float()


def to_segments(a: Tensor, b: Tensor, size: tuple[int, int]) -> Tensor:
    """Distance of each pixel's centre to segments a-b (..., 2), x and y in shares: (..., H, W)."""
    height, width = size
    y, x = ((torch.arange(side) + 0.5) / side for side in size)
    pixels = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).view(height, width, 2)
    a, way = a[..., None, None, :], (b - a)[..., None, None, :]
    along = ((pixels - a) * way).sum(-1) / way.square().sum(-1).clamp(min=1e-9)
    return (pixels - a - along.clamp(0, 1)[..., None] * way).square().sum(-1).sqrt()


def boxes(n: int, size: tuple[int, int], generator: Generator | None = None) -> Tensor:
    """One to three rectangular holes of any aspect: each side 0.15 to 0.5 of the picture's."""
    draw = draws.rand(n, 3, 5, generator=generator)
    sides = 0.15 + 0.35 * draw[..., 2:4]
    low = draw[..., :2] * (1 - sides)
    wanted = torch.arange(3) < 1 + (3 * draw[:, :1, 4]).floor()  # (n, 3)
    rows, columns = ((torch.arange(side) + 0.5) / side for side in size)
    across = (columns >= low[..., :1]) & (columns < low[..., :1] + sides[..., :1])  # (n, 3, W)
    down = (rows >= low[..., 1:]) & (rows < low[..., 1:] + sides[..., 1:])  # (n, 3, H)
    hole = down[..., :, None] & across[..., None, :] & wanted[..., None, None]
    return 1 - hole.any(dim=1)[:, None].float()


def halves(n: int, size: tuple[int, int], generator: Generator | None = None) -> Tensor:
    """Half of the picture is a hole: left, right, top or bottom."""
    which = draws.randint(4, n, generator=generator)
    height, width = size
    mask = torch.ones(4, 1, height, width)
    mask[0, :, :, : width // 2] = 0
    mask[1, :, :, width - width // 2 :] = 0
    mask[2, :, : height // 2] = 0
    mask[3, :, height - height // 2 :] = 0
    return mask[which]


def lama(n: int, size: tuple[int, int], generator: Generator | None = None) -> Tensor:
    """Strokes or boxes, one half each: the recipe of LaMa, which LDM Sec. 4.5 trains with."""
    box = draws.rand(n, 1, 1, 1, generator=generator) < 0.5
    return torch.where(box, boxes(n, size, generator), strokes(n, size, generator))


MASKS: dict[str, Callable[..., Tensor]] = {
    "lama": lama,
    "strokes": strokes,
    "boxes": boxes,
    "halves": halves,
}


def draw_masks(
    kinds: Sequence[str], n: int, size: tuple[int, int], generator: Generator | None = None
) -> Tensor:
    """A mask (n, 1, H, W) for each of n pictures, each of one of the kinds, by lot.

    1 = known, 0 = hole; some of each in every mask. ValueError for an unknown kind, or none.
    """
    unknown = [kind for kind in kinds if kind not in MASKS]
    if unknown or not kinds:
        raise ValueError(f"masks={tuple(kinds)} must be some of {', '.join(MASKS)}")
    drawn = torch.stack([MASKS[kind](n, size, generator) for kind in kinds])
    chosen = drawn[draws.randint(len(kinds), n, generator=generator), torch.arange(n)]
    whole, none = chosen.flatten(1).amin(1) == 1, chosen.flatten(1).amax(1) == 0
    middle = boxed_middle(size)
    return torch.where((whole | none)[:, None, None, None], middle, chosen)


def boxed_middle(size: tuple[int, int]) -> Tensor:
    """The plainest mask: a hole of half the side in the middle, (1, 1, H, W)."""
    height, width = size
    mask = torch.ones(1, 1, height, width)
    mask[..., height // 4 : height - height // 4, width // 4 : width - width // 4] = 0
    return mask


def mean_fill(x: Tensor, mask: Tensor) -> Tensor:
    """The hole in the mean colour of what is known: the plainest rival of inpainting."""
    known = (x * mask).sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True).clamp(min=1)
    return torch.where(mask > 0.5, x, known)
