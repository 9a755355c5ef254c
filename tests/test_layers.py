"""Building blocks against closed forms and symmetries; random numbers of a shared batch."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from einops import reduce, repeat
from helpers import randn, shaken
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from minildm.layers import (
    BatchRandom,
    CrossAttention,
    GroupNorm,
    ResBlock,
    SelfAttention2d,
    SpatialTransformer,
    attention,
    seed_of,
)

F64 = torch.float64


# --- random numbers ---


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("world", [2, 4])
def test_the_rows_of_all_processes_are_those_of_one(world: int, seeded: bool) -> None:
    def drawn(rank: int, world: int) -> list[Tensor]:
        """Several draws in a row: each depends on how much those before it took."""
        torch.manual_seed(3)
        rng = BatchRandom(torch.Generator().manual_seed(5) if seeded else None, rank, world)
        like = torch.zeros(8 // world, 3, 4, dtype=F64)
        return [rng.rand(len(like), 5), rng.randint(1000, len(like)), rng.randn_like(like)]

    parts = [drawn(rank, world) for rank in range(world)]
    assert all(map(torch.equal, map(torch.cat, zip(*parts, strict=True)), drawn(0, 1)))


def test_seeds_are_spread_and_repeatable() -> None:
    seeds = {seed_of(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(seeds) == 1000 and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(1, 2) == seed_of(1, 2) != seed_of(2, 1)


# --- bfloat16 on a CPU ---


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_norm_in_bfloat16_is_float64s(layout: torch.memory_format, weights: torch.dtype) -> None:
    x, norm = 3 * randn(2, 8, 4, 6) + 1, GroupNorm(4, 8)
    nn.init.normal_(norm.weight)
    norm.to(weights)
    expected = F.group_norm(x.bfloat16().double(), 4, norm.weight.double(), norm.bias.double())
    low = x.bfloat16().contiguous(memory_format=layout).requires_grad_()
    out = norm(low)
    out.sum().backward()
    assert out.dtype == low.grad.dtype == torch.bfloat16
    assert out.is_contiguous(memory_format=layout)
    assert (out.double() - expected).abs().max() < 2**-8 * expected.abs().max()


@pytest.mark.parametrize("autocast", [False, True])
def test_attention_and_its_gradients_in_bfloat16_are_float64s(autocast: bool) -> None:
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
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(low, exact, strict=True))]
    for ours, truth in pairs:
        assert (ours.double() - truth).abs().max() < 2**-8 * truth.abs().max()


# --- residual blocks ---

RESIZED: dict[str, tuple[nn.Module | None, Callable[[Tensor], Tensor]]] = {
    "none": (None, lambda x: x),
    "up": (nn.Upsample(scale_factor=2), lambda x: repeat(x, "b c h w -> b c (h 2) (w 2)")),
    "down": (nn.AvgPool2d(2), lambda x: reduce(x, "b c (h 2) (w 2) -> b c h w", "mean")),
}


def normed(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("how", RESIZED)
def test_a_residual_block_is_its_formula(how: str, scale_shift: bool) -> None:
    module, resize = RESIZED[how]
    block = ResBlock(8, 12, d_emb=5, groups=4, scale_shift=scale_shift, resize=module).double()
    x, emb = randn(2, 8, 4, 6, dtype=F64), randn(2, 5, dtype=F64)
    small = resize(x)
    assert torch.allclose(block(x, emb), block.skip(small), atol=1e-12)  # before training
    shaken(block)
    hid = block.conv1(resize(F.silu(normed(x, block.norm1))))
    from_emb = block.to_emb(F.silu(emb))[:, :, None, None]
    if scale_shift:
        hid = normed(hid, block.norm2) * (1 + from_emb[:, :12]) + from_emb[:, 12:]
    else:
        hid = normed(hid + from_emb, block.norm2)
    expected = block.skip(small) + block.conv2(F.silu(hid))
    assert torch.allclose(block(x, emb), expected, atol=1e-10)


# --- attention ---


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head of one sample, by the definition: (N, d), (M, d), (M, d) -> (N, d)."""
    return torch.softmax(q @ k.T / math.sqrt(q.shape[1]), dim=1) @ v


def test_self_attention_splits_heads_before_q_k_v() -> None:
    block = shaken(SelfAttention2d(8, heads=2, groups=4, eps=1e-5, zero_out=False)).double()
    x = randn(1, 8, 3, 5, dtype=F64)
    qkv = block.to_qkv(normed(x, block.norm)).flatten(2)[0]  # (24, N)
    heads = []
    for rows in qkv.split(12):  # q, k and v of a head are adjacent
        heads.append(attend(*(part.T for part in rows.split(4))).T.reshape(4, 3, 5))
    assert torch.allclose(block(x), x + block.to_out(torch.cat(heads)[None]), atol=1e-10)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_self_attention_never_stores_all_n_by_n_weights(layout: torch.memory_format) -> None:
    """Only the fused kernel is allowed; it refuses tokens whose channels are not adjacent."""
    block = SelfAttention2d(8, heads=2, groups=4, eps=1e-6, zero_out=False)
    x = randn(2, 8, 6, 4).contiguous(memory_format=layout)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert block.to(memory_format=layout)(x).shape == x.shape


@pytest.mark.parametrize("d_cond", [None, 6])
def test_cross_attention_is_its_formula(d_cond: int | None) -> None:
    block = shaken(CrossAttention(8, d_cond=d_cond, heads=3, d_head=4)).double()
    x = randn(2, 5, 8, dtype=F64)
    cond = None if d_cond is None else randn(2, 7, 6, seed=1, dtype=F64)
    for b, (own, other) in enumerate(zip(x, x if cond is None else cond, strict=True)):
        q, k, v = block.to_q(own), block.to_k(other), block.to_v(other)
        heads = zip(q.split(4, 1), k.split(4, 1), v.split(4, 1), strict=True)
        expected = block.to_out(torch.cat([attend(*parts) for parts in heads], dim=1))
        assert torch.allclose(block(x, cond)[b], expected, atol=1e-10)


@pytest.mark.parametrize("d_cond", [None, 6])
def test_a_transformer_begins_as_its_skip_and_commutes_with_a_permutation(
    d_cond: int | None,
) -> None:
    block = SpatialTransformer(8, d_cond=d_cond, heads=2, groups=4, depth=2).double()
    x, order = randn(2, 8, 4, 6, dtype=F64), torch.randperm(24)
    tokens = randn(2, 7, 6, seed=3, dtype=F64) if d_cond else None
    assert torch.equal(block(x, tokens), x)

    def permuted(y: Tensor) -> Tensor:
        return y.flatten(2)[:, :, order].reshape(y.shape)

    out = shaken(block)(x, tokens)
    assert not torch.allclose(out, x, atol=1e-3)
    assert torch.allclose(block(permuted(x), tokens), permuted(out), atol=1e-10)
    if d_cond:  # the order of the condition's tokens does not matter, their sample does
        assert torch.allclose(block(x, tokens.flip(1)), out, atol=1e-10)
        assert not torch.allclose(block(x, tokens.flip(0)), out, atol=1e-3)
