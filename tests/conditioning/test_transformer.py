"""The unmasked transformer, against torch's own and against its symmetries."""

import pytest
import torch
from helpers import randn
from torch import nn

from minildm.conditioning.transformer import EncoderBlock, TokenTransformer, grid_waves


def test_a_block_equals_torchs_pre_norm_layer() -> None:
    """torch's layer has heads * d_head = d and biases on q, k, v (zero here)."""
    d, heads = 12, 3
    ours = EncoderBlock(d, heads=heads, d_head=d // heads).double()
    theirs = nn.TransformerEncoderLayer(
        d, heads, 4 * d, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).double()
    attn = ours.attn
    state = {
        "self_attn.in_proj_weight": torch.cat(
            [m.weight for m in (attn.to_q, attn.to_k, attn.to_v)]
        ),
        "self_attn.in_proj_bias": torch.zeros(3 * d),
        "self_attn.out_proj.weight": attn.to_out.weight,
        "self_attn.out_proj.bias": attn.to_out.bias,
    }
    parts = {"linear1": ours.ff[0], "linear2": ours.ff[2]}
    for name, module in (parts | {"norm1": ours.norm1, "norm2": ours.norm2}).items():
        state |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    theirs.load_state_dict(state)
    x = randn(2, 5, d, dtype=torch.float64)
    assert (ours(x) - theirs.train()(x)).abs().max() < 1e-12


def test_the_width_of_the_heads_is_free() -> None:
    net = TokenTransformer(9, 6, 10, depth=2, heads=8, d_head=4)
    assert net.blocks[0].attn.to_q.weight.shape == (32, 10)
    assert net(torch.arange(6)[None]).shape == (1, 6, 10)


def test_every_token_sees_every_other_one_in_both_directions() -> None:
    net = TokenTransformer(9, 6, 8, depth=1, heads=2, d_head=4).eval()
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    base = net(ids)
    for position in range(6):
        changed = ids.clone()
        changed[0, position] = 7
        assert ((net(changed) - base).abs().amax(dim=2)[0] > 1e-6).all(), position


def test_without_positions_the_order_does_not_matter() -> None:
    net = TokenTransformer(9, 6, 8, depth=2, heads=2, d_head=4).double().eval()
    ids, order = torch.tensor([[1, 2, 3, 4, 5, 6]]), torch.tensor([3, 1, 0, 5, 2, 4])
    assert not torch.allclose(net(ids[:, order]), net(ids)[:, order])
    nn.init.zeros_(net.position.weight)
    assert torch.allclose(net(ids[:, order]), net(ids)[:, order], atol=1e-12)


@pytest.mark.parametrize(("side", "d"), [(16, 128), (5, 8), (60, 64), (2, 3)])
def test_near_positions_of_the_grid_are_similar(side: int, d: int) -> None:
    table = grid_waves(side, d)
    assert table.shape == (side**2, d)
    apart = torch.cdist(table, table) + 100 * torch.eye(side**2)
    assert apart.min() > 0.1  # no two positions are the same
    if d % 4:
        return
    assert torch.allclose(table.pow(2).mean(), torch.tensor(1.0))
    y, x = (torch.arange(side**2) // side), (torch.arange(side**2) % side)
    for other in range(0, side**2, max(side**2 // 7, 1)):  # x in the first half, y in the second
        assert torch.equal(table[x == x[other], : d // 2].std(0), torch.zeros(d // 2))
        assert torch.equal(table[y == y[other], d // 2 :].std(0), torch.zeros(d // 2))
    lowest = table[y == 0, 0]  # half a wave over the grid: falls from one end to the other
    assert (lowest.diff() < 0).all() and torch.allclose(lowest[0], -lowest[-1], atol=1e-5)
