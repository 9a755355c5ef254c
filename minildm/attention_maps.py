"""Where each token of a condition is looked at: the weights of the cross-attention, as maps.

with attention_maps(model) as maps:
    x = model.sample(["a red apple"], steps=25, guidance_scale=3.0, seed=0)
words, shown = of_words(model, "a red apple", torch.stack(maps).mean(0)[0])  # (K, h, w)

The model computes as ever; hooks see what goes in and compute the weights once more, since the
fused attention keeps none (after Tang et al. 2023, "What the DAAM").
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from minildm.diffusion import LatentDiffusion
from minildm.layers import CrossAttention, SpatialTransformer


def attention_weights(attn: CrossAttention, x: Tensor, cond: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)), LDM Sec. 3.3, which the fused `attention` never holds.

    (B, N, d_in), (B, M, d_cond) or None -> (B, head, N, M); each row sums to 1.
    """
    cond = x if cond is None else cond
    q, k = (
        rearrange(y, "b n (head d) -> b head n d", head=attn.heads)
        for y in (attn.to_q(x), attn.to_k(cond))
    )
    scores = torch.einsum("bhnd,bhmd->bhnm", q.float(), k.float()) / q.shape[-1] ** 0.5
    return scores.softmax(dim=-1)


class _Watch:
    """The hooks' memory: what one call of the UNet has shown so far, and all calls before."""

    def __init__(self) -> None:
        self.maps: list[Tensor] = []  # (B, M, h, w) of each call that is done
        self.asked: int | None = None  # B: how many conditions the conditioner was given last
        self.rows = slice(None)  # of the call: those with the condition
        self.size = (0, 0)  # h, w of the latent
        self.parts: list[Tensor] = []  # (B, M, h, w) of each block so far

    def conditioner(self, _module: nn.Module, _args: Any, c: Any) -> None:
        self.asked = None if c.tokens is None else len(c.tokens)

    def begin(self, _unet: nn.Module, args: Any) -> None:
        z_t = args[0]
        # Guidance doubles the batch: "no condition" first, then the condition.
        doubled = self.asked is not None and len(z_t) == 2 * self.asked
        self.rows = slice(self.asked if doubled else 0, None)
        self.size, self.parts = tuple(z_t.shape[-2:]), []

    def end(self, _unet: nn.Module, _args: Any, _out: Any) -> None:
        self.maps.append(torch.stack(self.parts).mean(0).cpu())

    def block(self, level: dict[str, tuple[int, int]]) -> Callable[..., None]:
        """The hook of a cross-attention at that level's size."""

        @torch.no_grad()
        def look(attn: CrossAttention, args: Any, _out: Any) -> None:
            x, cond = (part[self.rows] for part in args)
            weights = reduce(attention_weights(attn, x, cond), "b head n m -> b n m", "mean")
            h, w = level["size"]
            maps = rearrange(weights, "b (h w) m -> b m h w", h=h, w=w)
            self.parts.append(F.interpolate(maps, self.size, mode="bilinear"))

        return look


@contextmanager
def attention_maps(model: LatentDiffusion) -> Iterator[list[Tensor]]:
    """Within the block each call of the UNet adds its maps (B, M, h, w), on the CPU, to the list.

    They are means over the heads and all blocks, resized to the latent; at each pixel they sum to
    1 over the M tokens. Samplers such as DDIM call the UNet once a step. B is the number of
    conditions: of a guided call the half with the condition is taken. Raises ValueError for a
    model without tokens.
    """
    if model.config.unet.d_cond is None:
        raise ValueError("this model has no cross-attention: its UNet takes no tokens")
    watch = _Watch()
    handles = [
        model.conditioner.register_forward_hook(watch.conditioner),
        model.unet.register_forward_pre_hook(watch.begin),
        model.unet.register_forward_hook(watch.end),
    ]
    for module in model.unet.modules():
        if isinstance(module, SpatialTransformer):
            level: dict[str, tuple[int, int]] = {}
            handles.append(module.register_forward_pre_hook(_size_into(level)))
            for block in module.blocks:
                handles.append(block.cross_attn.register_forward_hook(watch.block(level)))
    try:
        yield watch.maps
    finally:
        for handle in handles:
            handle.remove()


def _size_into(level: dict[str, tuple[int, int]]) -> Callable[..., None]:
    """A hook that keeps a feature map's h and w, which its tokens no longer show."""

    def keep(_module: nn.Module, args: Any) -> None:
        level["size"] = tuple(args[0].shape[-2:])

    return keep


def of_words(model: LatentDiffusion, caption: str, maps: Tensor) -> tuple[list[str], Tensor]:
    """The words of a caption and their maps: (M, h, w) -> K words, (K, h, w).

    Without start, end and padding. Raises ValueError where the model reads no text, or the maps
    are fewer than the words.
    """
    if model.config.conditioner.kind != "text":
        raise ValueError(f"a model of {model.config.conditioner.kind!r} reads no words")
    words = model.conditioner.tokenizer.words(caption)
    if maps.ndim != 3 or len(maps) < len(words) + 2:
        raise ValueError(
            f"maps must be (M, h, w) with M >= {len(words) + 2}, got {tuple(maps.shape)}"
        )
    return words, maps[1 : 1 + len(words)]  # token 0 is the start
