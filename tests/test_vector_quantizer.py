"""The codebook: nearest codes, both loss terms, the straight path of the gradient, dead codes."""

import math
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from minildm import Autoencoder, AutoencoderConfig
from minildm.regularizers import VectorQuantizer, code_usage


def quantizer(randn: Any, codes: int = 7, channels: int = 3, **options: Any) -> VectorQuantizer:
    made = VectorQuantizer(codes, channels, **options).double()
    with torch.no_grad():
        made.codebook.copy_(randn(codes, channels, seed=1, dtype=torch.float64))
    return made


def by_hand(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and indices from every squared distance, one by one."""
    points = rearrange(z, "b c h w -> b h w 1 c")
    indices = (points - codebook).square().sum(-1).argmin(-1)  # (B, h, w)
    return rearrange(codebook[indices], "b h w c -> b c h w"), indices


def test_the_nearest_code_is_taken(randn: Any) -> None:
    made, z = quantizer(randn), randn(2, 3, 4, 6, dtype=torch.float64)
    codes, indices = by_hand(z, made.codebook)
    found = made(z)
    assert torch.equal(found.indices, indices)
    assert torch.equal(made.nearest(z), indices)
    assert torch.equal(made.codes(indices), codes)
    assert torch.allclose(found.z, codes, rtol=0, atol=1e-14)


def test_long_tables_of_distances_are_made_in_parts(randn: Any, monkeypatch: Any) -> None:
    made, z = quantizer(randn, codes=2**13), randn(3, 3, 32, 32, dtype=torch.float64)
    rows: list[int] = []
    real = torch.addmm

    def counted(*args: Any, **options: Any) -> Tensor:
        rows.append(len(args[1]))
        return real(*args, **options)

    monkeypatch.setattr(torch, "addmm", counted)
    assert torch.equal(made.nearest(z), by_hand(z, made.codebook)[1])
    assert len(rows) > 1
    assert max(rows) * 2**13 <= 2**24


def test_codes_stay_where_they_are(randn: Any) -> None:
    made = quantizer(randn)
    z = rearrange(made.codebook.detach(), "(b h w) c -> b c h w", b=1, h=1)
    found = made(z)
    assert found.indices.flatten().tolist() == list(range(7))
    assert torch.equal(found.z, z)
    assert found.loss == 0


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("commitment", [0.25, 2.0])
def test_loss_and_gradients_are_the_formulas(legacy: bool, commitment: float, randn: Any) -> None:
    made = quantizer(randn, commitment=commitment, legacy=legacy)
    z = randn(2, 3, 4, 5, dtype=torch.float64).requires_grad_()
    codes, indices = by_hand(z.detach(), made.codebook.detach())
    found = made(z)
    squared = (z.detach() - codes).square().mean()
    assert found.loss.item() == pytest.approx((1 + commitment) * squared.item(), rel=1e-12)
    found.loss.backward()
    to_z, to_codes = (1.0, commitment) if legacy else (commitment, 1.0)
    slope = 2 * (z.detach() - codes) / z.numel()
    assert torch.allclose(z.grad, to_z * slope, rtol=0, atol=1e-14)
    expected = torch.zeros_like(made.codebook)
    expected.index_add_(0, indices.flatten(), -rearrange(slope, "b c h w -> (b h w) c"))
    assert torch.allclose(made.codebook.grad, to_codes * expected, rtol=0, atol=1e-14)


def test_the_gradient_goes_straight_through(randn: Any) -> None:
    made, z = quantizer(randn), randn(2, 3, 4, 5, dtype=torch.float64).requires_grad_()
    weights = randn(2, 3, 4, 5, seed=2, dtype=torch.float64)
    (made(z).z * weights).sum().backward()
    assert torch.equal(z.grad, weights)
    assert made.codebook.grad is None


def test_half_precision_is_left_at_the_door(randn: Any) -> None:
    made, z = VectorQuantizer(5, 3), randn(1, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = made(z.bfloat16())
    assert found.z.dtype == found.loss.dtype == torch.float32


def test_usage_is_counted_over_an_epoch(randn: Any) -> None:
    made = quantizer(randn).train()
    made.epoch_latents = 48  # two batches of 24
    batches = [randn(1, 3, 4, 6, seed=seed, dtype=torch.float64) for seed in range(4)]
    counts = [
        by_hand(z, made.codebook.detach())[1].flatten().bincount(minlength=7) for z in batches
    ]
    made(batches[0])
    assert made.usage() == code_usage(counts[0])  # as far as it has seen
    made(batches[1])
    assert made.usage() == code_usage(counts[0] + counts[1])
    made(batches[2])  # an epoch is whole, the next has begun
    assert made.usage() == code_usage(counts[0] + counts[1])
    made(batches[3])
    made(batches[0])
    assert made.usage() == code_usage(counts[2] + counts[3])


def test_evaluation_counts_nothing(randn: Any) -> None:
    made = quantizer(randn, codes=4).eval()
    made.restart_after = 1
    before = {name: value.clone() for name, value in made.state_dict().items()}
    made(randn(2, 3, 4, 4, dtype=torch.float64))
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def test_perplexity_and_share_of_known_counts() -> None:
    share, perplexity = code_usage(torch.tensor([5, 5, 5, 5]))
    assert (share, perplexity.item()) == (1, pytest.approx(4))
    share, perplexity = code_usage(torch.tensor([9, 0, 0, 0]))
    assert (share, perplexity.item()) == (0.25, pytest.approx(1))
    share, perplexity = code_usage(torch.tensor([1, 3]))
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert (share, perplexity.item()) == (1, pytest.approx(math.exp(entropy)))


def test_dead_codes_move_onto_latents(randn: Any) -> None:
    made = VectorQuantizer(16, 3).double().train()
    made.restart_after = 3
    made.restart_all()
    z = randn(2, 3, 4, 4, dtype=torch.float64)
    points = rearrange(z, "b c h w -> (b h w) c")
    made(z)
    assert all((points == code).all(1).any() for code in made.codebook)
    with torch.no_grad():
        made.codebook[5] = 100.0  # no latent is near it from now on
    for _ in range(3):
        assert (made.codebook[5] == 100.0).all()
        made(z)
    kept = made.codebook.detach().clone()
    made(z)
    assert (points == made.codebook[5]).all(1).any()
    alive = [i for i in range(16) if (made.codebook[i] == kept[i]).all()]
    assert set(made.nearest(z).flatten().tolist()) & set(alive)  # those in use stayed


def test_the_remedy_itself_is_no_usage(randn: Any) -> None:
    """Few latents, many codes: those moved onto a latent are chosen at once, and count not."""
    made = VectorQuantizer(64, 3).double().train()
    made.restart_after = 1
    made.restart_all()
    z = randn(1, 3, 2, 2, dtype=torch.float64)  # four latents, always the same
    for _ in range(20):
        made(z)
    usage, perplexity = made.usage()
    assert usage * 64 <= 4
    assert perplexity <= 4 + 1e-9


def test_without_a_gradient_nothing_moves(randn: Any) -> None:
    """A preview inside a training loop changes neither codes nor counts."""
    made = VectorQuantizer(8, 3).train()
    made.restart_after = 1
    made.restart_all()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    with torch.no_grad():
        made(randn(2, 3, 4, 4))
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_codebook_in_half_precision_compares_in_full(dtype: torch.dtype, randn: Any) -> None:
    made = VectorQuantizer(500, 3)
    with torch.no_grad():
        made.codebook.copy_(randn(500, 3, seed=1))
    made.to(dtype)
    z = randn(2, 3, 16, 16).to(dtype)
    assert torch.equal(made.nearest(z), by_hand(z.double(), made.codebook.double())[1])


def test_a_quantizer_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="size=0 and channels=3 must be at least 1"):
        VectorQuantizer(0, 3)


def test_without_the_remedy_codes_stay_dead(randn: Any) -> None:
    made = VectorQuantizer(16, 3).double().train()
    first = made.codebook.detach().clone()
    for seed in range(4):
        made(randn(2, 3, 4, 4, seed=seed, dtype=torch.float64))
    assert torch.equal(made.codebook, first)


# --- in the autoencoder ---

VQ = AutoencoderConfig(
    regularizer="vq", codebook_size=11, z_channels=2, width=8, width_mult=(1, 2), groups=4
)


def test_the_decoder_quantises_first(shaken: Any, randn: Any) -> None:
    model = shaken(Autoencoder(VQ)).eval()
    x = randn(2, 3, 8, 12).clamp(-1, 1)
    z = model.encode(x)
    assert z.shape == (2, 2, 4, 6)
    assert torch.equal(z, model.encode(x, sample=False))  # nothing is drawn
    assert z.unique().numel() == z.numel()  # before quantisation: continuous
    codes = model.decoder.quantizer.codes(model.code_indices(z))
    assert not torch.allclose(z, codes)
    assert torch.allclose(model.decode(z), model.decode(codes), atol=1e-5)
    assert torch.allclose(model.decode(z), model.decoder.render(codes), atol=1e-5)


def test_a_nudge_below_half_the_way_changes_nothing(shaken: Any, randn: Any) -> None:
    model = shaken(Autoencoder(VQ)).eval()
    indices = torch.arange(11).expand(1, 2, 11)
    z = model.decoder.quantizer.codes(indices)
    nearest = torch.pdist(model.decoder.quantizer.codebook).min()
    nudge = randn(*z.shape)
    nudge = 0.49 * nearest * nudge / nudge.norm(dim=1, keepdim=True)
    assert torch.equal(model.code_indices(z + nudge), indices)


@pytest.mark.parametrize("call", ["posterior", "code_indices"])
def test_what_a_regulariser_has_not_is_refused(call: str, autoencoder: Autoencoder) -> None:
    x = torch.zeros(1, 3, 8, 8)
    if call == "posterior":
        with pytest.raises(ValueError, match="'vq' has no posterior"):
            Autoencoder(VQ).posterior(x)
    else:
        with pytest.raises(ValueError, match="'kl' has no codes"):
            autoencoder.code_indices(torch.zeros(1, 2, 4, 4))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"regularizer": "vq"}, "codebook_size=None must be at least 1"),
        ({"regularizer": "vq", "codebook_size": 0}, "codebook_size=0 must be at least 1"),
        ({"codebook_size": 8}, "codebook_size=8 belongs to 'vq', not to 'kl'"),
        ({"regularizer": "vq", "codebook_size": 8, "commitment": -1.0}, "commitment=-1.0"),
        ({"regularizer": "identity"}, "z_channels=4 must be in_channels=3"),
        ({"hid_z_channels": 0}, "hid_z_channels=0 must be None or at least 1"),
        ({"regularizer": "vq", "codebook_size": 8, "commitment": math.nan}, "commitment=nan"),
        ({"regularizer": "fsq"}, "regularizer='fsq' is not known"),
    ],
)
def test_impossible_codebooks_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AutoencoderConfig(**changes)


# --- pixel space ---


def test_pixel_space_is_the_identity(randn: Any) -> None:
    model = Autoencoder(AutoencoderConfig(regularizer="identity", z_channels=3))
    x = randn(2, 3, 5, 7).clamp(-1, 1)
    assert model.f == 1
    assert not list(model.parameters())
    assert torch.equal(model.encode(x), x)
    assert torch.equal(model.decode(x), x)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.full((1, 3, 8, 8), 255.0), r"must lie in \[-1, 1\], got 255 to 255; bytes"),
        (torch.full((1, 3, 8, 8), -1.5), r"must lie in \[-1, 1\]"),
        (torch.full((1, 3, 8, 8), torch.nan), "not finite"),
        (torch.full((1, 3, 8, 8), torch.inf), "not finite"),
        (torch.zeros(1, 3, 8, 9), "multiples of f=2"),
        (torch.zeros(1, 4, 8, 8), r"must be \(B, 3, H, W\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "must be floats .*uint8"),
        (torch.zeros(0, 3, 8, 8), r"must be floats .*\(0, 3, 8, 8\)"),
    ],
)
def test_pictures_that_are_none_are_refused(x: Tensor, said: str, autoencoder: Autoencoder) -> None:
    with pytest.raises(ValueError, match=said):
        autoencoder.encode(x)


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (2, 4, 4)])
def test_latents_that_do_not_fit_are_refused(shape: tuple, autoencoder: Autoencoder) -> None:
    with pytest.raises(ValueError, match=r"z must be \(B, 2, h, w\), got"):
        autoencoder.decode(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"z must be \(B, 2, h, w\), got"):
        Autoencoder(VQ).code_indices(torch.zeros(shape))
