"""eps_theta: shapes, an untrained network returns 0, invariances.

Equality with diffusers' UNets is tested with the weights' conversion, in tests/interop.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusion.references import F64
from helpers import randn, shaken
from torch import Tensor

from minildm.diffusion.unet import UNet, UNetConfig
from minildm.layers import ResBlock

BASE = UNetConfig(
    in_channels=3,
    out_channels=2,
    channels=8,
    channel_mult=(1, 2, 2),
    num_res_blocks=1,
    attn_levels=(1,),
    d_head=4,
    groups=4,
)
TOKENS = replace(BASE, d_cond=6, depth=2)
VARIANTS = {
    "self-attention": BASE,
    "tokens": TOKENS,
    "residual blocks resize": replace(BASE, resblock_updown=True, scale_shift=True),
    "attention only in the middle": replace(BASE, attn_levels=(), num_res_blocks=2),
    "heads": replace(BASE, heads=2, d_head=None),
    "one level": replace(BASE, channel_mult=(2,), attn_levels=(0,)),
}
EACH_VARIANT = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


def inputs(config: UNetConfig, batch: int, h: int, w: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """z_t, t, tokens; float64."""
    t = torch.arange(batch) * 300 + 17
    tokens = None if config.d_cond is None else randn(batch, 5, config.d_cond, dtype=F64)
    return randn(batch, config.in_channels, h, w, seed=1, dtype=F64), t, tokens


def unet_of(config: UNetConfig) -> Any:
    return shaken(UNet(config)).double()


@EACH_VARIANT
def test_untrained_it_returns_zero_and_trained_every_input_matters(
    config: UNetConfig,
) -> None:
    z_t, t, tokens = inputs(config, 3, 4, 8)
    assert torch.equal(UNet(config).double()(z_t, t, tokens), torch.zeros_like(z_t[:, :2]))
    unet = unet_of(config)
    together = unet(z_t, t, tokens)
    for i in range(3):
        alone = unet(*(None if x is None else x[i : i + 1] for x in (z_t, t, tokens)))
        assert torch.allclose(alone[0], together[i], atol=1e-9)
    assert (unet(z_t + 1, t, tokens) - together).abs().max() > 1e-3
    assert (unet(z_t, (t + 500) % 1000, tokens) - together).abs().max() > 1e-3


def test_tokens_matter_for_their_own_sample_and_in_no_order() -> None:
    unet, (z_t, t, tokens) = unet_of(TOKENS), inputs(TOKENS, 2, 4, 8)
    other = tokens + torch.tensor([0.0, 1.0]).view(2, 1, 1)
    out = unet(z_t, t, tokens)
    change = (unet(z_t, t, other) - out).abs().amax(dim=(1, 2, 3))
    assert change[0] < 1e-9 < 1e-3 < change[1]
    assert torch.allclose(unet(z_t, t, tokens[:, [3, 0, 4, 1, 2]]), out, atol=1e-9)


def test_checkpointing_recomputes_and_gives_the_same_gradients() -> None:
    grads, counts = [], []
    for checkpoint in (False, True):
        unet, runs = unet_of(replace(TOKENS, checkpoint=checkpoint)).train(), []
        # Before the block: a recomputation stops once it has all that the backward pass needs.
        block = next(m for m in unet.modules() if isinstance(m, ResBlock))
        block.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        unet(*inputs(TOKENS, 2, 4, 8)).pow(2).mean().backward()
        grads.append([p.grad for p in unet.parameters()])
        counts.append(len(runs))
    assert counts == [1, 2]
    assert all(a.abs().max() > 0 for a in grads[0])  # every parameter takes part
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*grads, strict=True))
