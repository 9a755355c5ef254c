"""eps_theta: shapes, an untrained network returns 0, invariances, clear errors.

Equality with diffusers' UNets is tested with the weights' conversion, in tests/interop.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
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
    tokens = None if config.d_cond is None else randn(batch, 5, config.d_cond, dtype=torch.float64)
    return randn(batch, config.in_channels, h, w, seed=1, dtype=torch.float64), t, tokens


def unet_of(config: UNetConfig) -> Any:
    return shaken(UNet(config)).double()


@EACH_VARIANT
@pytest.mark.parametrize(("batch", "h", "w"), [(1, 4, 8), (3, 8, 4), (2, 5, 7), (1, 6, 9)])
def test_an_untrained_unet_returns_zero(config: UNetConfig, batch: int, h: int, w: int) -> None:
    out = UNet(config).double()(*inputs(config, batch, h, w))
    assert torch.equal(out, torch.zeros(batch, 2, h, w, dtype=torch.float64))


@EACH_VARIANT
def test_samples_are_independent_and_every_input_matters(config: UNetConfig) -> None:
    unet, (z_t, t, tokens) = unet_of(config), inputs(config, 3, 5, 8)
    together = unet(z_t, t, tokens)
    for i in range(3):
        own = slice(i, i + 1)
        alone = unet(z_t[own], t[own], None if tokens is None else tokens[own])
        assert torch.allclose(alone[0], together[i], atol=1e-9)
    assert (unet(z_t + 1, t, tokens) - together).abs().max() > 1e-3
    assert (unet(z_t, (t + 500) % 1000, tokens) - together).abs().max() > 1e-3


def test_tokens_matter_for_their_own_sample_and_in_no_order() -> None:
    unet, (z_t, t, tokens) = unet_of(TOKENS), inputs(TOKENS, 2, 4, 8)
    other = tokens.clone()
    other[1] += 1.0
    out = unet(z_t, t, tokens)
    change = (unet(z_t, t, other) - out).abs().amax(dim=(1, 2, 3))
    assert change[1] > 1e-3
    assert change[0] < 1e-9
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


@pytest.mark.parametrize("config", [BASE, TOKENS])
def test_tokens_are_required_with_d_cond_alone(config: UNetConfig) -> None:
    z_t, t, _ = inputs(config, 2, 4, 8)
    tokens = randn(2, 5, 6) if config is BASE else None
    with pytest.raises(ValueError, match="does not fit the UNet's d_cond="):
        UNet(config)(z_t.float(), t, tokens)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"in_channels": 0}, r"in_channels=0 must lie in 1\.\.10000"),
        ({"channels": 10**9}, r"channels=1000000000 must lie in 1\.\.10000"),
        ({"num_res_blocks": 10**9}, r"num_res_blocks=1000000000 must lie in 1\.\.100"),
        ({"d_cond": 10**9}, r"d_cond=1000000000"),
        ({"depth": 0}, "depth=0"),
        ({"dropout": 1.0}, r"dropout=1\.0 must lie in \[0, 1\)"),
        ({"channel_mult": (), "attn_levels": ()}, r"channel_mult=\(\)"),
        ({"channel_mult": (1, 0)}, r"channel_mult=\(1, 0\)"),
        ({"channel_mult": (1, 10**9)}, r"channel_mult=\(1, 1000000000\)"),
        ({"channel_mult": (1,) * 11}, "1 to 10 levels"),
        ({"channels": 6}, "channels=6, .* multiples of groups=4"),
        ({"attn_levels": (3,)}, r"attn_levels=\(3,\) must lie in 0\.\.2"),
        ({"heads": 2}, "heads=2, d_head=4: one of them"),
        ({"d_head": None}, "heads=None, d_head=None"),
        ({"d_head": 5}, "heads=None, d_head=5: .* divide"),
        ({"attn_levels": (), "d_head": 5}, "d_head=5"),
    ],
)
def test_impossible_configs_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(BASE, **wrong)
