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
from einops import rearrange, reduce
from torch import Tensor, nn

from minildm.diffusion.latent_diffusion import LatentDiffusion
from minildm.layers import CrossAttention, TransformerBlock


def attention_weights(attn: CrossAttention, x: Tensor, cond: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)), LDM Sec. 3.3; each row sums to 1.

    (B, N, d_in), (B, M, d_cond) -> (B, head, N, M)
    """
    q, k = (
        rearrange(y, "b n (head d) -> b head n d", head=attn.heads)
        for y in (attn.to_q(x), attn.to_k(cond))
    )
    scores = torch.einsum("bhnd,bhmd->bhnm", q.float(), k.float()) / q.shape[-1] ** 0.5
    return scores.softmax(dim=-1)


@contextmanager
def attention_maps(model: LatentDiffusion) -> Iterator[list[Tensor]]:
    """Within the block each call of the UNet adds its maps (B, M, h, w), on the CPU, to the list.

    They are means over the heads and all blocks, resized to the latent; at each pixel they sum to
    1 over the M tokens. B is the number of conditions: of a guided call the half with the
    condition is taken. Raises ValueError for a model without tokens.
    """
    if model.config.unet.d_cond is None:
        raise ValueError("this model has no cross-attention: its UNet receives no tokens")
    maps, blocks = [], []  # blocks: (B, N, M) of each block of the current call
    n = 0  # conditions; guidance puts as many null conditions before them

    def count(_conditioner: nn.Module, _args: Any, c: Any) -> None:
        nonlocal n
        n = len(c.tokens)

    @torch.no_grad()
    def keep_block(attn: CrossAttention, args: Any, _out: Any) -> None:
        weights = attention_weights(attn, *(part[-n:] for part in args))
        blocks.append(reduce(weights, "b head n m -> b n m", "mean"))

    def keep_call(_unet: nn.Module, args: Any, _out: Any) -> None:
        h, w = args[0].shape[-2:]
        found = []
        for block in blocks:
            f = round((h * w / block.shape[1]) ** 0.5)  # how much smaller than the latent
            small = rearrange(block, "b (h w) m -> b m h w", h=h // f)
            found.append(F.interpolate(small, (h, w), mode="bilinear"))
        maps.append(torch.stack(found).mean(0).cpu())
        blocks.clear()

    blocks_of = (m for m in model.unet.modules() if isinstance(m, TransformerBlock))
    hooks = [(model.conditioner, count), *((m.cross_attn, keep_block) for m in blocks_of)]
    with ExitStack() as stack:
        for module, hook in [*hooks, (model.unet, keep_call)]:
            stack.enter_context(module.register_forward_hook(hook))
        yield maps
