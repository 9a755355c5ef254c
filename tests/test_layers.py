"""Building blocks: closed forms, skips at the start, symmetries, shapes."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from minildm.layers import (
    GEGLU,
    AvgDown,
    CrossAttention,
    Downsample,
    GroupNorm,
    ResBlock,
    SelfAttention2d,
    SpatialTransformer,
    Upsample,
    attention,
    timestep_embedding,
    zero_init,
)

F64 = torch.float64


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_a_norm_in_bfloat16_is_float64s_in_any_layout(weights: torch.dtype, randn: Any) -> None:
    x, norm = 3 * randn(2, 8, 4, 6) + 1, GroupNorm(4, 8)
    nn.init.normal_(norm.weight)
    norm.to(weights)
    expected = F.group_norm(x.bfloat16().double(), 4, norm.weight.double(), norm.bias.double())
    for layout in (torch.contiguous_format, torch.channels_last):
        low = x.bfloat16().contiguous(memory_format=layout).requires_grad_()
        out = norm(low)
        out.sum().backward()
        assert out.dtype == low.grad.dtype == torch.bfloat16
        assert out.is_contiguous(memory_format=layout)
        assert (out.double() - expected).abs().max() < 2**-8 * expected.abs().max()


@pytest.mark.parametrize("autocast", [False, True])
def test_attention_and_its_gradients_in_bfloat16_are_float64s(autocast: bool, randn: Any) -> None:
    exact = [randn(2, 3, 5, 4, seed=s).bfloat16().double().requires_grad_() for s in range(3)]
    low = [y.detach().bfloat16().requires_grad_() for y in exact]
    q, k, v = exact
    expected = torch.softmax(q @ k.mT / 2, dim=-1) @ v  # 2 = sqrt(d)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = attention(*low)
    weight = randn(2, 3, 5, 4, seed=3).bfloat16()
    (out * weight).sum().backward()
    (expected * weight.double()).sum().backward()
    assert out.dtype == torch.bfloat16
    for ours, truth in [
        (out, expected),
        *((a.grad, b.grad) for a, b in zip(low, exact, strict=True)),
    ]:
        assert (ours.double() - truth).abs().max() < 2**-8 * truth.abs().max()


def test_the_embedding_has_cosines_then_sines() -> None:
    times, width, half = [0, 1, 7, 999], 12, 6
    emb = timestep_embedding(torch.tensor(times), width)
    assert emb.shape == (4, width)
    for row, t in zip(emb.tolist(), times, strict=True):
        angles = [t * 10_000 ** (-i / half) for i in range(half)]
        assert row[:half] == pytest.approx([math.cos(a) for a in angles], abs=2e-4)
        assert row[half:] == pytest.approx([math.sin(a) for a in angles], abs=2e-4)


def test_an_odd_width_gets_one_column_of_zeros() -> None:
    t = torch.tensor([3, 500])
    odd, even = timestep_embedding(t, 7), timestep_embedding(t, 6)
    assert torch.equal(odd[:, :6], even)
    assert torch.equal(odd[:, 6], torch.zeros(2))


def test_the_slowest_frequency_follows_max_period() -> None:
    emb = timestep_embedding(torch.tensor([1]), 4, max_period=100.0)
    angles = (1.0, 0.1)
    expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    assert emb[0].tolist() == pytest.approx(expected)


RESAMPLED = {"none": nn.Identity(), "up": Upsample(), "down": AvgDown()}


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("resample", RESAMPLED)
def test_a_fresh_residual_block_is_its_skip(resample: str, scale_shift: bool, randn: Any) -> None:
    x, emb = randn(2, 8, 4, 6), randn(2, 5)
    block = ResBlock(8, 8, d_emb=5, groups=4, scale_shift=scale_shift, resample=resample)
    assert torch.equal(block(x, emb), RESAMPLED[resample](x))
    wider = ResBlock(8, 12, d_emb=5, groups=4, scale_shift=scale_shift, resample=resample)
    assert torch.equal(wider(x, emb), wider.skip(RESAMPLED[resample](x)))


def test_without_zero_out_a_residual_block_starts_beside_its_skip(randn: Any) -> None:
    x = randn(2, 8, 4, 6)
    assert not torch.allclose(ResBlock(8, 8, groups=4, zero_out=False)(x), x)


def normed(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


@pytest.mark.parametrize("scale_shift", [False, True])
def test_a_residual_block_is_its_formula(scale_shift: bool, shaken: Any, randn: Any) -> None:
    block = shaken(ResBlock(8, 12, d_emb=5, groups=4, scale_shift=scale_shift)).double()
    x, emb = randn(2, 8, 4, 6, dtype=F64), randn(2, 5, dtype=F64)
    hid = block.conv1(F.silu(normed(x, block.norm1)))
    from_emb = block.to_emb(F.silu(emb))[:, :, None, None]
    if scale_shift:
        hid = normed(hid, block.norm2) * (1 + from_emb[:, :12]) + from_emb[:, 12:]
    else:
        hid = normed(hid + from_emb, block.norm2)
    expected = block.skip(x) + block.conv2(F.silu(hid))
    assert torch.allclose(block(x, emb), expected, atol=1e-10)


TAPS = [  # of a 3x3 kernel: where its single 1 stands, which pixel it then picks
    (False, (0, 0), (0, 0)),
    (False, (2, 2), (2, 2)),
    (True, (1, 1), (0, 0)),
    (True, (0, 0), (-1, -1)),
    (True, (2, 2), (1, 1)),
]


@pytest.mark.parametrize(("all_sides", "tap", "offset"), TAPS)
def test_downsampling_pads_where_the_official_code_does(
    all_sides: bool, tap: tuple[int, int], offset: tuple[int, int], randn: Any
) -> None:
    down, x = Downsample(1, pad_all_sides=all_sides), randn(1, 1, 6, 8)
    zero_init(down)
    with torch.no_grad():
        down.conv.weight[0, 0, tap[0], tap[1]] = 1.0
    picked = torch.zeros(1, 1, 3, 4)
    for i in range(3):
        for j in range(4):
            row, column = 2 * i + offset[0], 2 * j + offset[1]
            if 0 <= row < 6 and 0 <= column < 8:  # else a padded zero
                picked[0, 0, i, j] = x[0, 0, row, column]
    assert torch.equal(down(x), picked)


def test_plain_resampling_repeats_and_averages(randn: Any) -> None:
    x = randn(2, 3, 2, 5)
    up = Upsample()(x)
    assert torch.equal(up, x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    assert torch.allclose(AvgDown()(up), x)
    assert torch.allclose(AvgDown()(x[:, :, :, :2])[:, :, 0, 0], x[:, :, :, :2].mean(dim=(2, 3)))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head of one sample, by the definition: (N, d), (M, d), (M, d) -> (N, d)."""
    return torch.softmax(q @ k.T / math.sqrt(q.shape[1]), dim=1) @ v


def test_self_attention_splits_heads_before_q_k_v(shaken: Any, randn: Any) -> None:
    block = SelfAttention2d(8, heads=2, groups=4, eps=1e-5, zero_out=False)
    block, x = shaken(block).double(), randn(2, 8, 3, 5, dtype=F64)
    out = torch.empty_like(x)
    for b in range(2):
        qkv = block.to_qkv(normed(x[b : b + 1], block.norm)).flatten(2)[0]  # (24, N)
        heads = []
        for rows in qkv.split(12):  # q, k and v of a head lie beside each other
            q, k, v = (part.T for part in rows.split(4))
            heads.append(attend(q, k, v).T.reshape(4, 3, 5))
        out[b] = torch.cat(heads)
    assert torch.allclose(block(x), x + block.to_out(out), atol=1e-10)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_self_attention_never_holds_all_n_by_n_weights(
    layout: torch.memory_format, randn: Any
) -> None:
    """The fused kernel alone is allowed; it refuses tokens whose channels lie apart."""
    block = SelfAttention2d(8, heads=2, groups=4, eps=1e-6, zero_out=False)
    x = randn(2, 8, 6, 4).contiguous(memory_format=layout)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert block.to(memory_format=layout)(x).shape == x.shape


@pytest.mark.parametrize("d_cond", [None, 6])
def test_cross_attention_is_its_formula(d_cond: int | None, shaken: Any, randn: Any) -> None:
    block = shaken(CrossAttention(8, d_cond=d_cond, heads=3, d_head=4)).double()
    x = randn(2, 5, 8, dtype=F64)
    cond = None if d_cond is None else randn(2, 7, 6, seed=1, dtype=F64)
    for b, (own, other) in enumerate(zip(x, x if cond is None else cond, strict=True)):
        q, k, v = block.to_q(own), block.to_k(other), block.to_v(other)
        heads = zip(q.split(4, 1), k.split(4, 1), v.split(4, 1), strict=True)
        expected = block.to_out(torch.cat([attend(*parts) for parts in heads], dim=1))
        assert torch.allclose(block(x, cond)[b], expected, atol=1e-10)


def test_only_the_exit_of_cross_attention_has_a_bias() -> None:
    block = CrossAttention(8, d_cond=6, heads=2, d_head=4)
    assert {name for name, _ in block.named_parameters() if "bias" in name} == {"to_out.bias"}


def test_geglu_gates_with_the_exact_gelu(shaken: Any, randn: Any) -> None:
    layer, x = shaken(GEGLU(3, 4)).double(), randn(2, 5, 3, dtype=F64)
    both = x @ layer.proj.weight.T + layer.proj.bias
    value, gate = both[..., :4], both[..., 4:]
    gelu = 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2)))
    assert torch.allclose(layer(x), value * gelu, atol=1e-12)


def blocks() -> dict[str, tuple[nn.Module, Tensor | None]]:
    """Each kind of attention over 8 channels, with the tokens that it takes."""
    self_attention = SelfAttention2d(8, heads=2, groups=4, eps=1e-6, zero_out=True)
    crossed = SpatialTransformer(8, d_cond=6, heads=2, d_head=3, groups=4, depth=2)
    tokens = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(3))
    return {
        "self-attention": (self_attention, None),
        "transformer": (crossed, tokens),
        "transformer without condition": (
            SpatialTransformer(8, d_cond=None, heads=2, d_head=4, groups=4),
            None,
        ),
    }


def run(block: nn.Module, x: Tensor, tokens: Tensor | None) -> Tensor:
    return block(x) if isinstance(block, SelfAttention2d) else block(x, tokens)


@pytest.mark.parametrize("kind", blocks())
def test_fresh_attention_is_its_skip(kind: str, randn: Any) -> None:
    block, tokens = blocks()[kind]
    x = randn(2, 8, 4, 6)
    assert torch.equal(run(block, x, tokens), x)


@pytest.mark.parametrize("kind", blocks())
def test_attention_commutes_with_a_permutation_of_the_pixels(
    kind: str, shaken: Any, randn: Any
) -> None:
    block, tokens = blocks()[kind]
    block, x = shaken(block).double(), randn(2, 8, 4, 6, dtype=F64)
    tokens = None if tokens is None else tokens.double()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))

    def permuted(y: Tensor) -> Tensor:
        return y.flatten(2)[:, :, order].reshape(y.shape)

    out = run(block, x, tokens)
    assert not torch.allclose(out, x, atol=1e-3)  # it does something
    assert torch.allclose(run(block, permuted(x), tokens), permuted(out), atol=1e-10)


def test_the_order_of_the_condition_tokens_does_not_matter(shaken: Any, randn: Any) -> None:
    block = shaken(SpatialTransformer(8, d_cond=6, heads=2, d_head=4, groups=4)).double()
    x, tokens = randn(2, 8, 4, 6, dtype=F64), randn(2, 5, 6, seed=1, dtype=F64)
    assert torch.allclose(block(x, tokens), block(x, tokens.flip(1)), atol=1e-10)
    assert not torch.allclose(block(x, tokens), block(x, tokens.flip(0)), atol=1e-3)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("h", "w"), [(2, 6), (4, 4)])
def test_shapes(batch: int, h: int, w: int, randn: Any) -> None:
    x, emb = randn(batch, 8, h, w), randn(batch, 5)
    assert ResBlock(8, 12, d_emb=5, groups=4)(x, emb).shape == (batch, 12, h, w)
    assert ResBlock(8, 12, groups=4)(x).shape == (batch, 12, h, w)
    assert ResBlock(8, 8, groups=4, resample="up")(x).shape == (batch, 8, 2 * h, 2 * w)
    assert Upsample(8)(x).shape == (batch, 8, 2 * h, 2 * w)
    assert ResBlock(8, 8, groups=4, resample="down")(x).shape == (batch, 8, h // 2, w // 2)
    for all_sides in (True, False):
        down = Downsample(8, pad_all_sides=all_sides)
        assert down(x).shape == (batch, 8, h // 2, w // 2)
    for block, tokens in blocks().values():
        tokens = None if tokens is None else tokens[:1].expand(batch, -1, -1)
        assert run(block, x, tokens).shape == x.shape
    tokens, cond = randn(batch, h * w, 8), randn(batch, 7, 6)
    assert CrossAttention(8, d_cond=6, heads=2, d_head=3)(tokens, cond).shape == tokens.shape
    assert GEGLU(8, 5)(tokens).shape == (batch, h * w, 5)
    assert timestep_embedding(torch.arange(batch), 9).shape == (batch, 9)
