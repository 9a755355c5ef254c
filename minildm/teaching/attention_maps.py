"""Where each token of a condition gets attention: the cross-attention's weights as maps.

with attention_maps(model) as maps:
    x = model.sample(["a red apple"], steps=25, guidance_scale=3.0, seed=0)
shown = torch.stack(maps)[:, -len(x) :].mean(0)  # (B, M, h, w) with the condition, over the steps

Hooks recompute the weights from the module's input, since the fused attention does not keep them
(after Tang et al. 2023, "What the DAAM").
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minildm.diffusion.latent_diffusion import LatentDiffusion
from minildm.layers import CrossAttention, TransformerBlock


def attention_weights(attn: CrossAttention, x: Tensor, cond: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)), LDM Sec. 3.3; each row sums to 1.

    (B, N, d_in), (B, M, d_cond) -> (B, head, N, M)
    """
    q, k = attn.to_q(x).float(), attn.to_k(cond).float()
    q, k = (rearrange(y, "b n (head d) -> b head n d", head=attn.heads) for y in (q, k))
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)


@contextmanager
def attention_maps(model: LatentDiffusion) -> Iterator[list[Tensor]]:
    """Within the block each call of the UNet adds its maps (B, M, h, w), on the CPU, to the list.

    They are means over the heads and all blocks, resized to the latent; at each pixel they sum to
    1 over the M tokens. Of a guided call the first half of B has the null condition.
    """
    maps, blocks = [], []  # blocks: the weights in each block of the current call

    def look(attn: CrossAttention, args: Any, _out: Tensor) -> None:
        blocks.append(attention_weights(attn, *args).mean(1).detach())  # (B, N, M)

    def keep(_unet: nn.Module, args: Any, _out: Tensor) -> None:
        h, w = args[0].shape[-2:]
        found = []
        for weights in blocks:
            f = round((h * w / weights.shape[1]) ** 0.5)  # how much smaller than the latent
            small = rearrange(weights, "b (h w) m -> b m h w", h=h // f)
            found.append(F.interpolate(small, (h, w), mode="bilinear"))
        maps.append(torch.stack(found).mean(0).cpu())
        blocks.clear()

    with ExitStack() as stack:
        stack.callback(model.unet.register_forward_hook(keep).remove)
        for block in model.unet.modules():
            if isinstance(block, TransformerBlock):
                stack.callback(block.cross_attn.register_forward_hook(look).remove)
        yield maps
