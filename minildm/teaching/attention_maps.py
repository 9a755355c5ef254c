"""Where each token of a condition gets attention: the cross-attention's weights as maps.

with attention_maps(model) as maps:
    x = model.sample(["a red apple"], steps=25, guidance_scale=3.0, seed=0)
shown = torch.stack(maps).mean(0)  # (B, M, h, w); token 0 is the start, then come the words

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
    1 over the M tokens. B is the number of conditions: of a guided call the half with the
    condition is taken. Raises ValueError for a model without tokens.
    """
    if model.config.unet.d_cond is None:
        raise ValueError("this model has no cross-attention: its UNet receives no tokens")
    maps, seen = [], []  # seen: each block of the current call, with its input and tokens
    n = 0  # conditions; guidance puts as many null conditions before them

    def count(_conditioner: nn.Module, _args: Any, c: Any) -> None:
        nonlocal n
        n = len(c.tokens)

    @torch.no_grad()
    def keep(_unet: nn.Module, args: Any, _out: Any) -> None:
        h, w = args[0].shape[-2:]
        found = []
        for attn, x, cond in seen:
            weights = attention_weights(attn, x[-n:], cond[-n:]).mean(1)
            f = round((h * w / x.shape[1]) ** 0.5)  # how much smaller than the latent
            small = rearrange(weights, "b (h w) m -> b m h w", h=h // f)
            found.append(F.interpolate(small, (h, w), mode="bilinear"))
        maps.append(torch.stack(found).mean(0).cpu())
        seen.clear()

    hooks = [(model.conditioner, count), (model.unet, keep)]
    for block in model.unet.modules():
        if isinstance(block, TransformerBlock):
            hooks.append((block.cross_attn, lambda attn, args, _: seen.append((attn, *args))))
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.enter_context(module.register_forward_hook(hook))
        yield maps
