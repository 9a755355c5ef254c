"""Building blocks against closed forms and symmetries; random numbers of a shared batch."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import randn, shaken
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from minildm.layers import (
    GEGLU,
    BatchRandom,
    CrossAttention,
    Downsample,
    GroupNorm,
    ResBlock,
    SelfAttention2d,
    SpatialTransformer,
    Upsample,
    attention,
    check_fields,
    resize,
    seed_of,
    timestep_embedding,
    zero_init,
)

F64 = torch.float64


# --- random numbers ---

DRAWS: dict[str, Callable[[BatchRandom, int], Tensor]] = {
    "rand": lambda rng, n: rng.rand(n, 5),
    "randint": lambda rng, n: rng.randint(1000, n),
    "randn_like": lambda rng, n: rng.randn_like(torch.zeros(n, 3, 4, 4, dtype=F64)),
}


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", DRAWS)
def test_the_rows_of_all_processes_are_those_of_one(name: str, world: int, seeded: bool) -> None:
    def drawn(rank: int, world: int) -> tuple[Tensor, Tensor]:
        """Two draws in a row: the second also depends on how much the first took."""
        torch.manual_seed(3)
        rng = BatchRandom(torch.Generator().manual_seed(5) if seeded else None, rank, world)
        return DRAWS[name](rng, 8 // world), DRAWS[name](rng, 8 // world)

    whole, parts = drawn(0, 1), [drawn(rank, world) for rank in range(world)]
    assert torch.equal(torch.cat([part[0] for part in parts]), whole[0])
    assert torch.equal(torch.cat([part[1] for part in parts]), whole[1])
    assert not torch.equal(*whole)


def test_alone_the_numbers_are_torchs() -> None:
    for draw, theirs in (
        (lambda r: r.rand(3, 5), lambda g: torch.rand(3, 5, generator=g)),
        (lambda r: r.randint(9, 5), lambda g: torch.randint(9, (5,), generator=g)),
        (lambda r: r.randn_like(torch.zeros(3, 2)), lambda g: torch.randn(3, 2, generator=g)),
    ):
        ours = draw(BatchRandom(torch.Generator().manual_seed(0)))
        assert torch.equal(ours, theirs(torch.Generator().manual_seed(0)))


def test_numbers_go_to_the_device_asked_for() -> None:
    place = torch.device("meta")
    for rng in (BatchRandom(), BatchRandom(torch.Generator())):
        assert rng.rand(2, 3, device=place).device == place
        assert rng.randn_like(torch.zeros(2, device=place)).device == place


def test_seeds_are_spread_and_repeatable() -> None:
    seeds = {seed_of(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    ones = sum(seed.bit_count() for seed in seeds) / 1000
    assert ones == pytest.approx(31.5, abs=4 * math.sqrt(63 / 4 / 1000))  # each bit is fair
    assert seed_of(1, 2) == seed_of(1, 2) != seed_of(2, 1)


# --- small helpers ---


def test_a_field_out_of_range_is_named() -> None:
    class Config:
        steps, rate, size = 5, math.nan, None

    check_fields(Config, 1, 5, "steps", "size")
    with pytest.raises(ValueError, match=r"steps=5 must lie in 6\.\.9"):
        check_fields(Config, 6, 9, "size", "steps")
    with pytest.raises(ValueError, match="rate=nan"):
        check_fields(Config, 0, 1, "rate")


def test_the_embedding_has_cosines_then_sines() -> None:
    times, width, half = [0, 1, 7, 999], 12, 6
    emb = timestep_embedding(torch.tensor(times), width)
    for row, t in zip(emb.tolist(), times, strict=True):
        angles = [t * 10_000 ** (-i / half) for i in range(half)]
        assert row[:half] == pytest.approx([math.cos(a) for a in angles], abs=2e-4)
        assert row[half:] == pytest.approx([math.sin(a) for a in angles], abs=2e-4)
    odd = timestep_embedding(torch.tensor(times), 13)
    assert torch.equal(odd, F.pad(emb, (0, 1)))
    slow = timestep_embedding(torch.tensor([1]), 4, max_period=100.0)[0]
    assert slow.tolist() == pytest.approx([math.cos(1), math.cos(0.1), math.sin(1), math.sin(0.1)])


# --- bfloat16 on a CPU ---


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_a_norm_in_bfloat16_is_float64s_in_any_layout(weights: torch.dtype) -> None:
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


# --- residual blocks and resampling ---


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("resample", ["none", "up", "down"])
def test_a_fresh_residual_block_is_its_skip(resample: str, scale_shift: bool) -> None:
    x, emb = randn(2, 8, 4, 6), randn(2, 5)
    block = ResBlock(8, 8, d_emb=5, groups=4, scale_shift=scale_shift, resample=resample)
    assert torch.equal(block(x, emb), resize(x, resample))
    wider = ResBlock(8, 12, d_emb=5, groups=4, scale_shift=scale_shift, resample=resample)
    assert torch.equal(wider(x, emb), wider.skip(resize(x, resample)))
    assert not torch.allclose(ResBlock(8, 8, groups=4, zero_out=False)(x), x)


def normed(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


@pytest.mark.parametrize("scale_shift", [False, True])
def test_a_residual_block_is_its_formula(scale_shift: bool) -> None:
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
    all_sides: bool, tap: tuple[int, int], offset: tuple[int, int]
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


def test_resizing_repeats_and_averages() -> None:
    x = randn(2, 3, 2, 5)
    up = resize(x, "up")
    assert torch.equal(up, x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    assert torch.allclose(resize(up, "down"), x)
    assert torch.allclose(resize(x[..., :2], "down")[:, :, 0, 0], x[..., :2].mean(dim=(2, 3)))
    layer, block = Upsample(3), ResBlock(3, 6, groups=3, resample="up")
    assert torch.equal(layer(x), layer.conv(up))
    assert layer(x, (3, 9)).shape == (2, 3, 3, 9)
    assert block(x, size=(3, 9)).shape == (2, 6, 3, 9)


# --- attention ---


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head of one sample, by the definition: (N, d), (M, d), (M, d) -> (N, d)."""
    return torch.softmax(q @ k.T / math.sqrt(q.shape[1]), dim=1) @ v


def test_self_attention_splits_heads_before_q_k_v() -> None:
    block = shaken(SelfAttention2d(8, heads=2, groups=4, eps=1e-5, zero_out=False)).double()
    x = randn(2, 8, 3, 5, dtype=F64)
    out = torch.empty_like(x)
    for b in range(2):
        qkv = block.to_qkv(normed(x[b : b + 1], block.norm)).flatten(2)[0]  # (24, N)
        heads = []
        for rows in qkv.split(12):  # q, k and v of a head are adjacent
            q, k, v = (part.T for part in rows.split(4))
            heads.append(attend(q, k, v).T.reshape(4, 3, 5))
        out[b] = torch.cat(heads)
    assert torch.allclose(block(x), x + block.to_out(out), atol=1e-10)


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
    assert {name for name, _ in block.named_parameters() if "bias" in name} == {"to_out.bias"}
    x = randn(2, 5, 8, dtype=F64)
    cond = None if d_cond is None else randn(2, 7, 6, seed=1, dtype=F64)
    for b, (own, other) in enumerate(zip(x, x if cond is None else cond, strict=True)):
        q, k, v = block.to_q(own), block.to_k(other), block.to_v(other)
        heads = zip(q.split(4, 1), k.split(4, 1), v.split(4, 1), strict=True)
        expected = block.to_out(torch.cat([attend(*parts) for parts in heads], dim=1))
        assert torch.allclose(block(x, cond)[b], expected, atol=1e-10)


def test_geglu_gates_with_the_exact_gelu() -> None:
    layer, x = shaken(GEGLU(3, 4)).double(), randn(2, 5, 3, dtype=F64)
    both = x @ layer.proj.weight.T + layer.proj.bias
    value, gate = both[..., :4], both[..., 4:]
    gelu = 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2)))
    assert torch.allclose(layer(x), value * gelu, atol=1e-12)


ATTENTION: dict[str, tuple[Callable[[], nn.Module], bool]] = {  # over 8 channels; takes tokens?
    "self": (lambda: SelfAttention2d(8, heads=2, groups=4, eps=1e-6, zero_out=True), False),
    "transformer": (
        lambda: SpatialTransformer(8, d_cond=6, heads=2, d_head=3, groups=4, depth=2),
        True,
    ),
    "transformer without condition": (
        lambda: SpatialTransformer(8, d_cond=None, heads=2, d_head=4, groups=4),
        False,
    ),
}


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_begins_as_its_skip_and_commutes_with_a_permutation(kind: str) -> None:
    build, conditional = ATTENTION[kind]
    block, x = build().double(), randn(2, 8, 4, 6, dtype=F64)
    tokens = randn(2, 7, 6, seed=3, dtype=F64) if conditional else None
    given = () if kind == "self" else (tokens,)
    assert torch.equal(block(x, *given), x)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))

    def permuted(y: Tensor) -> Tensor:
        return y.flatten(2)[:, :, order].reshape(y.shape)

    out = shaken(block)(x, *given)
    assert not torch.allclose(out, x, atol=1e-3)
    assert torch.allclose(block(permuted(x), *given), permuted(out), atol=1e-10)
    if conditional:  # the order of the condition's tokens does not matter, their sample does
        assert torch.allclose(block(x, tokens.flip(1)), out, atol=1e-10)
        assert not torch.allclose(block(x, tokens.flip(0)), out, atol=1e-3)
