"""The attention's weights, recomputed by hooks, are the module's own; no hook is left behind."""

from typing import Any

import pytest
import torch
from einops import rearrange
from helpers import randn, shaken, tiny_ldm_config
from torch import Tensor

from minildm.conditioning import CaptionTokenizer, TextConfig
from minildm.diffusion.latent_diffusion import LatentDiffusion
from minildm.layers import CrossAttention
from minildm.teaching.attention_maps import attention_maps, attention_weights

CAPTIONS = ["a red apple", "a dog"]


@pytest.fixture
def model() -> LatentDiffusion:
    """A model of text: 16 x 16 images, 8 x 8 latents, attention at 4 x 4."""
    words = CaptionTokenizer.trained_on(CAPTIONS)
    config = TextConfig(vocab_size=len(words), length=6, d_cond=8, depth=1, heads=2, d_head=4)
    model = shaken(LatentDiffusion(tiny_ldm_config(config)))
    model.conditioner.set_tokenizer(words)
    return model.eval()


def first_maps(model: LatentDiffusion, captions: list[str], **options: Any) -> Tensor:
    with attention_maps(model) as maps:
        model.sample(captions, steps=2, seed=0, **options)
    return maps[0]


def test_the_weights_times_v_are_the_module_s_output() -> None:
    attn = shaken(CrossAttention(12, d_cond=6, heads=3, d_head=5)).double()
    x, cond = randn(2, 7, 12).double(), randn(2, 4, 6, seed=1).double()
    weights = attention_weights(attn, x, cond).double()
    v = rearrange(attn.to_v(cond), "b m (head d) -> b head m d", head=3)
    out = attn.to_out(rearrange(weights @ v, "b head n d -> b n (head d)"))
    assert torch.allclose(out, attn(x, cond), atol=1e-5)


def test_each_step_adds_its_maps_and_the_sample_is_unchanged(model: LatentDiffusion) -> None:
    options = {"steps": 3, "guidance_scale": 3.0, "guidance_interval": (0, 500), "seed": 0}
    expected = model.sample(CAPTIONS, **options)
    with attention_maps(model) as maps:  # outside the interval a call is not doubled
        watched = model.sample(CAPTIONS, **options)
    assert torch.equal(expected, watched)
    assert [tuple(m[-2:].shape) for m in maps] == [(2, 6, 8, 8)] * 3
    assert all(torch.allclose(m.sum(dim=1), torch.ones(8, 8), atol=1e-5) for m in maps)


def test_under_guidance_the_second_half_has_the_condition(model: LatentDiffusion) -> None:
    conditional = first_maps(model, CAPTIONS)  # at the first step z_T is the same
    null, guided = first_maps(model, CAPTIONS, guidance_scale=4.0).chunk(2)
    assert torch.allclose(conditional, guided, atol=1e-6)
    assert torch.allclose(null, first_maps(model, ["", ""]), atol=1e-6)
    assert not torch.allclose(conditional, first_maps(model, ["", ""]), atol=1e-3)


def test_the_maps_are_means_over_heads_and_blocks(model: LatentDiffusion) -> None:
    seen: list[Tensor] = []
    blocks = [m for n, m in model.unet.named_modules() if n.endswith("cross_attn")]
    for block in blocks:
        block.register_forward_hook(lambda m, a, _: seen.append(attention_weights(m, *a).mean(1)))
    maps = first_maps(model, CAPTIONS, size=(16, 32))  # not square: h and w must not be swapped
    assert len(blocks) > 1
    each = torch.stack(seen[: len(blocks)]).mean(0)  # (B, 32, M)
    small = rearrange(each, "b (h w) m -> b m h w", h=4)
    whole = torch.nn.functional.interpolate(small, (8, 16), mode="bilinear")
    assert torch.allclose(maps, whole, atol=1e-6)


def test_hooks_are_removed_after_an_error(model: LatentDiffusion) -> None:
    with pytest.raises(RuntimeError, match="stop"), attention_maps(model):
        raise RuntimeError("stop")
    assert not any(m._forward_hooks for m in model.modules())
