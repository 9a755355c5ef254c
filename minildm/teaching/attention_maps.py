"""Where each token of a condition gets attention: the cross-attention's weights as maps.

with attention_maps(model) as maps:
    x = model.sample(["a red apple"], steps=25, guidance_scale=3.0, seed=0)
words, shown = of_words(model, "a red apple", torch.stack(maps).mean(0)[0])  # (K, h, w)

Hooks recompute the weights from the module's input, since the fused attention does not keep them
(after Tang et al. 2023, "What the DAAM").
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from minildm.diffusion.latent_diffusion import LatentDiffusion
from minildm.layers import CrossAttention, TransformerBlock


def attention_weights(attn: CrossAttention, x: Tensor, cond: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)), LDM Sec. 3.3.

    (B, N, d_in), (B, M, d_cond) or None -> (B, head, N, M); each row sums to 1.
    """
    cond = x if cond is None else cond
    q, k = (
        rearrange(y, "b n (head d) -> b head n d", head=attn.heads)
        for y in (attn.to_q(x), attn.to_k(cond))
    )
    scores = torch.einsum("bhnd,bhmd->bhnm", q.float(), k.float()) / q.shape[-1] ** 0.5
    return scores.softmax(dim=-1)


class _Hooks:
    """What the hooks remember: the maps of the UNet's current call and of all calls before."""

    def __init__(self) -> None:
        self.maps: list[Tensor] = []  # (B, M, h, w) of each finished call
        self.parts: list[Tensor] = []  # (B, M, h, w) of each block of the current call
        self.conditions = 0  # B
        self.rows = slice(None)  # of the call: those with the condition
        self.size = (0, 0)  # h, w of the latent

    def condition(self, _conditioner: nn.Module, _args: Any, c: Any) -> None:
        self.conditions = len(c.tokens)

    def begin(self, _unet: nn.Module, args: Any) -> None:
        # Guidance doubles the batch: the null condition first, then the condition.
        doubled = len(args[0]) == 2 * self.conditions
        self.rows = slice(self.conditions if doubled else 0, None)
        self.size, self.parts = tuple(args[0].shape[-2:]), []

    @torch.no_grad()
    def block(self, attn: CrossAttention, args: Any, _out: Any) -> None:
        x, cond = (part[self.rows] for part in args)
        weights = reduce(attention_weights(attn, x, cond), "b head n m -> b n m", "mean")
        shrunk = round((self.size[0] * self.size[1] / x.shape[1]) ** 0.5)  # at the block's level
        maps = rearrange(weights, "b (h w) m -> b m h w", h=self.size[0] // shrunk)
        self.parts.append(F.interpolate(maps, self.size, mode="bilinear"))

    def end(self, _unet: nn.Module, _args: Any, _out: Any) -> None:
        self.maps.append(torch.stack(self.parts).mean(0).cpu())


@contextmanager
def attention_maps(model: LatentDiffusion) -> Iterator[list[Tensor]]:
    """Within the block each call of the UNet adds its maps (B, M, h, w), on the CPU, to the list.

    They are means over the heads and all blocks, resized to the latent; at each pixel they sum to
    1 over the M tokens. B is the number of conditions: of a guided call the half with the
    condition is taken. Raises ValueError for a model without tokens.
    """
    if model.config.unet.d_cond is None:
        raise ValueError("this model has no cross-attention: its UNet receives no tokens")
    hooks = _Hooks()
    handles = [
        model.conditioner.register_forward_hook(hooks.condition),
        model.unet.register_forward_pre_hook(hooks.begin),
        model.unet.register_forward_hook(hooks.end),
    ]
    blocks = (m for m in model.unet.modules() if isinstance(m, TransformerBlock))
    handles += [block.cross_attn.register_forward_hook(hooks.block) for block in blocks]
    try:
        yield hooks.maps
    finally:
        for handle in handles:
            handle.remove()


def of_words(model: LatentDiffusion, caption: str, maps: Tensor) -> tuple[list[str], Tensor]:
    """The words of a caption and their maps, without start, end and padding.

    (M, h, w) -> K words, (K, h, w). Raises ValueError for a model that is not trained on text.
    """
    if model.config.conditioner.kind != "text":
        raise ValueError(f"a model of kind {model.config.conditioner.kind!r} reads no words")
    words = model.conditioner.tokenizer.words(caption)
    return words, maps[1 : 1 + len(words)]  # token 0 is the start
