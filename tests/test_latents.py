"""The cache of latents: encoded once, made anew when it is damaged or the question changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minildm import Autoencoder
from minildm.data.latents import LatentDataset, cached_moments
from minildm.regularizers import DiagonalGaussian
from minildm.training import encode_dataset, measure_scale


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINILDM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def runs(autoencoder: Autoencoder) -> list[int]:
    """Grows with every call of the encoder."""
    calls: list[int] = []
    autoencoder.encoder.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_the_second_call_reads_the_cache(
    cache: Path, runs: list[int], autoencoder: Autoencoder, pictures: Any
) -> None:
    first = encode_dataset(autoencoder, pictures, "fp32")
    assert runs
    runs.clear()
    assert torch.equal(encode_dataset(autoencoder, pictures, "fp32"), first)
    assert not runs
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("damage", [b"", b"\x08", b"not tensors, by far" * 9, None])
def test_a_damaged_cache_is_made_anew(
    damage: bytes | None, cache: Path, runs: list[int], autoencoder: Autoencoder, pictures: Any
) -> None:
    first = encode_dataset(autoencoder, pictures, "fp32")
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] if damage is None else damage)
    runs.clear()
    assert torch.equal(encode_dataset(autoencoder, pictures, "fp32"), first)
    assert runs
    assert file.read_bytes() == whole


def test_other_pictures_weights_or_precision_are_encoded_anew(
    cache: Path,
    runs: list[int],
    autoencoder: Autoencoder,
    make_pictures: Callable[..., Any],
    shaken: Any,
) -> None:
    def encoded(pictures: Any, precision: str = "fp32") -> Tensor:
        runs.clear()
        moments = encode_dataset(autoencoder, pictures, precision)
        assert runs
        return moments

    first = encoded(make_pictures())
    assert len(encoded(make_pictures(5))) == 5
    rough = encoded(make_pictures(), "bf16")
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, first)
    assert torch.allclose(rough, first, atol=0.1 * first.abs().max().item())
    shaken(autoencoder, seed=4)
    assert not torch.allclose(encoded(make_pictures()), first, atol=1e-3)
    assert len(list(cache.iterdir())) == 4


@torch.no_grad()
def test_moments_are_the_posteriors_of_each_picture_and_its_mirror_image(
    autoencoder: Autoencoder, make_pictures: Callable[..., Any]
) -> None:
    pictures = make_pictures(131)  # more than a batch of 128
    moments = encode_dataset(autoencoder, pictures, "fp32")
    assert moments.shape == (131, 2, 4, 8, 8)
    for i in (0, 130):
        x = pictures[i]["image"][None]
        for side, view in enumerate((x, x.flip(-1))):
            posterior = autoencoder.posterior(view)
            ours = DiagonalGaussian.from_moments(moments[i, side][None])
            assert torch.allclose(ours.mean, posterior.mean, atol=1e-5)
            assert torch.allclose(ours.logvar, posterior.logvar, atol=1e-5)


@torch.no_grad()
def test_the_measured_scale_brings_draws_to_unit_variance(
    autoencoder: Autoencoder, pictures: Any
) -> None:
    autoencoder.encoder.to_moments.bias[2:] -= 1.0
    autoencoder.scale.fill_(123.0)  # what was there before plays no role
    autoencoder.scale.fill_(measure_scale(autoencoder, pictures))
    x = torch.stack([pictures[i]["image"] for i in range(len(pictures))])
    x = torch.cat([x, x.flip(-1)]).repeat(40, 1, 1, 1)  # 960 pictures, 128 values each
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        z = autoencoder.encode(x)
    assert z.std().item() == pytest.approx(1.0, abs=0.01)


def test_the_cache_answers_by_its_key(cache: Path) -> None:
    cached = cached_moments("key", lambda: torch.ones(2, 3))
    assert torch.equal(cached_moments("key", lambda: torch.zeros(9)), cached)
    assert torch.equal(cached_moments("other", lambda: torch.zeros(9)), torch.zeros(9))


def test_items_hold_moments_in_place_of_the_image(pictures: Any) -> None:
    moments = torch.arange(12.0).view(12, 1, 1, 1, 1).expand(12, 2, 4, 8, 8)
    data = LatentDataset(pictures, moments)
    assert len(data) == 12
    assert set(data[7]) == set(pictures[7]) - {"image"} | {"moments"}
    assert torch.equal(data[7]["moments"], moments[7])
    assert data[7]["caption"] == pictures[7]["caption"]
    assert "image" in pictures[7]


def test_moments_of_other_pictures_are_refused(pictures: Any) -> None:
    with pytest.raises(ValueError, match="data has 12 pictures, moments 3"):
        LatentDataset(pictures, torch.zeros(3, 2, 4, 8, 8))
