"""eps_theta: shapes, an untrained network says 0, time and condition matter, clear errors."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minildm import UNet, UNetConfig
from minildm.layers import ResBlock, SelfAttention2d, SpatialTransformer

PLAIN = UNetConfig(
    in_channels=3,
    out_channels=2,
    width=8,
    width_mult=(1, 2, 2),
    res_blocks=1,
    attn_levels=(1,),
    d_head=4,
    groups=4,
)
VARIANTS = {
    "self-attention": PLAIN,
    "tokens": replace(PLAIN, d_cond=6, depth=2),
    "residual blocks resize": replace(PLAIN, resblock_updown=True, scale_shift=True),
    "no attention but in the middle": replace(PLAIN, attn_levels=(), res_blocks=2),
    "heads": replace(PLAIN, heads=2, d_head=None),
    "one level": replace(PLAIN, width_mult=(2,), attn_levels=(0,)),
}


def inputs(config: UNetConfig, batch: int, h: int, w: int) -> tuple[Tensor, Tensor, Tensor | None]:
    draw = torch.Generator().manual_seed(0)
    z_t = torch.randn(batch, config.in_channels, h, w, generator=draw)
    t = torch.randint(1000, (batch,), generator=draw)
    if config.d_cond is None:
        return z_t, t, None
    return z_t, t, torch.randn(batch, 5, config.d_cond, generator=draw)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("batch", "h", "w"), [(1, 4, 8), (3, 8, 4), (2, 5, 7), (1, 6, 9)])
def test_an_untrained_unet_answers_zero(variant: str, batch: int, h: int, w: int) -> None:
    config = VARIANTS[variant]
    out = UNet(config)(*inputs(config, batch, h, w))
    assert torch.equal(out, torch.zeros(batch, 2, h, w))


@pytest.mark.parametrize("variant", VARIANTS)
def test_samples_of_a_batch_do_not_see_each_other(variant: str, shaken: Any) -> None:
    config = VARIANTS[variant]
    unet = shaken(UNet(config)).double()
    z_t, t, tokens = inputs(config, 3, 4, 8)
    z_t, tokens = z_t.double(), None if tokens is None else tokens.double()
    together = unet(z_t, t, tokens)
    for i in range(3):
        own = slice(i, i + 1)
        alone = unet(z_t[own], t[own], None if tokens is None else tokens[own])
        assert torch.allclose(alone[0], together[i], atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_latent_and_time_matter(variant: str, shaken: Any) -> None:
    config = VARIANTS[variant]
    unet = shaken(UNet(config))
    z_t, t, tokens = inputs(config, 2, 4, 8)
    out = unet(z_t, t, tokens)
    assert (unet(z_t + 1, t, tokens) - out).abs().max() > 1e-3
    assert (unet(z_t, (t + 500) % 1000, tokens) - out).abs().max() > 1e-3


def test_the_condition_matters_for_its_own_sample(shaken: Any) -> None:
    config = VARIANTS["tokens"]
    unet = shaken(UNet(config))
    z_t, t, tokens = inputs(config, 2, 4, 8)
    other = tokens.clone()
    other[1] += 1.0
    change = (unet(z_t, t, other) - unet(z_t, t, tokens)).abs().amax(dim=(1, 2, 3))
    assert change[1] > 1e-3
    assert change[0] < 1e-5


def test_attention_stands_at_its_levels_and_in_the_middle() -> None:
    config = replace(PLAIN, width_mult=(1, 2, 3, 4), attn_levels=(1, 3), res_blocks=2)
    kinds = Counter(m.norm.num_channels for m in UNet(config).modules() if is_attention(m))
    # Level 1 has 16 channels, level 3 has 32; two blocks down, three up, one in the middle.
    assert kinds == {16: 5, 32: 6}


def is_attention(module: nn.Module) -> bool:
    return isinstance(module, SelfAttention2d | SpatialTransformer)


def test_tokens_are_taken_by_spatial_transformers_alone() -> None:
    unet = UNet(VARIANTS["tokens"])
    assert not any(isinstance(m, SelfAttention2d) for m in unet.modules())
    depths = {len(m.blocks) for m in unet.modules() if isinstance(m, SpatialTransformer)}
    assert depths == {2}


def test_a_number_of_heads_and_their_width_say_the_same(shaken: Any) -> None:
    by_width = replace(PLAIN, width_mult=(1,), attn_levels=(0,), d_head=4)
    by_number = replace(by_width, d_head=None, heads=2)
    first, second = shaken(UNet(by_width)), UNet(by_number)
    second.load_state_dict(first.state_dict())
    given = inputs(by_width, 2, 4, 4)
    assert torch.equal(first(*given), second(*given))


def grads_and_runs(config: UNetConfig, shaken: Any) -> tuple[list[Tensor], int]:
    """Gradients of a loss, and how often the first residual block ran for them."""
    unet = shaken(UNet(config)).double().train()
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    # Before the block: a recomputation stops as soon as it has all that the backward pass needs.
    next(m for m in unet.modules() if isinstance(m, ResBlock)).register_forward_pre_hook(count)
    z_t, t, tokens = inputs(config, 2, 4, 8)
    unet(z_t.double(), t, tokens.double()).pow(2).mean().backward()
    return [p.grad for p in unet.parameters()], runs


def test_checkpointing_recomputes_and_gives_the_same_gradients(shaken: Any) -> None:
    config = VARIANTS["tokens"]
    plain, once = grads_and_runs(config, shaken)
    saved, twice = grads_and_runs(replace(config, checkpoint=True), shaken)
    assert (once, twice) == (1, 2)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(plain, saved, strict=True))


def test_every_parameter_gets_a_gradient(shaken: Any) -> None:
    grads, _ = grads_and_runs(VARIANTS["tokens"], shaken)
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads)


Z, T, TOKENS = torch.zeros(2, 3, 4, 8), torch.zeros(2, dtype=torch.long), torch.zeros(2, 5, 6)
WRONG_INPUTS = {
    "channels": ("z_t must be", (torch.zeros(2, 4, 4, 8), T, TOKENS)),
    "axes": ("z_t must be", (torch.zeros(3, 4, 8), T, TOKENS)),
    "no pixel": ("0 x 8; 3 levels need at least 1", (torch.zeros(2, 3, 0, 8), T, TOKENS)),
    "one time": ("t must be", (Z, T[:1], TOKENS)),
    "time as a scalar": ("t must be", (Z, T[0], TOKENS)),
    "no tokens": ("takes tokens", (Z, T, None)),
    "token width": ("tokens must be", (Z, T, torch.zeros(2, 5, 7))),
    "token batch": ("tokens must be", (Z, T, torch.zeros(1, 5, 6))),
    "token axes": ("tokens must be", (Z, T, torch.zeros(2, 6))),
}


@pytest.mark.parametrize("case", WRONG_INPUTS)
def test_inputs_that_do_not_fit_are_refused(case: str) -> None:
    said, given = WRONG_INPUTS[case]
    with pytest.raises(ValueError, match=said):
        UNet(VARIANTS["tokens"])(*given)


def test_a_mean_over_four_pixels_needs_four() -> None:
    config = replace(PLAIN, resblock_updown=True)
    with pytest.raises(ValueError, match="3 x 8; 3 levels need at least 4 x 4"):
        UNet(config)(torch.zeros(2, 3, 3, 8), T)
    assert UNet(PLAIN)(torch.zeros(2, 3, 1, 1), T).shape == (2, 2, 1, 1)


def test_unasked_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"takes tokens none, got \(2, 5, 6\)"):
        UNet(PLAIN)(Z, T, TOKENS)


WRONG_CONFIGS = {
    "no channels": {"in_channels": 0},
    "no blocks": {"res_blocks": 0},
    "no depth": {"depth": 0},
    "dropout": {"dropout": 1.0},
    "no levels": {"width_mult": (), "attn_levels": ()},
    "a level without channels": {"width_mult": (1, 0)},
    "groups": {"width": 6},
    "groups of the first level": {"width": 2, "width_mult": (2, 4, 4), "d_head": 2},
    "level outside": {"attn_levels": (3,)},
    "heads and d_head": {"heads": 2},
    "neither heads nor d_head": {"d_head": None},
    "zero heads": {"d_head": None, "heads": 0},
    "zero d_head": {"d_head": 0},
    "d_head": {"d_head": 5},
    "heads": {"d_head": None, "heads": 3},
    "heads in the middle": {"attn_levels": (), "d_head": 5},
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_configs_that_cannot_be_built_are_refused(case: str) -> None:
    with pytest.raises(ValueError, match="|".join(WRONG_CONFIGS[case]) + "|channels"):
        replace(PLAIN, **WRONG_CONFIGS[case])
