"""Diffusion on VQ latents (before quantisation) and on pixels, f = 1, as on KL latents."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainings import Training

from minildm import Autoencoder, AutoencoderConfig, LatentDiffusion, load_model, save_model
from minildm.experiments import LatentDiffusionExperiment
from minildm.training import encode_dataset, measure_scale

PIXELS = AutoencoderConfig(regularizer="identity", z_channels=3)


@pytest.fixture(params=["vq", "identity"])
def first_stage(request: pytest.FixtureRequest, ae_config: Any, shaken: Any) -> Autoencoder:
    if request.param == "identity":
        return Autoencoder(PIXELS).eval()
    return shaken(Autoencoder(replace(ae_config, regularizer="vq", codebook_size=32))).eval()


@pytest.fixture
def ldm(first_stage: Autoencoder, trainings: dict[str, Training], tmp_path: Path) -> Training:
    save_model(first_stage, tmp_path / "any")
    base, c = trainings["ldm"], first_stage.config.z_channels
    experiment: LatentDiffusionExperiment = base.experiment
    unet = replace(experiment.unet, in_channels=c, out_channels=c)
    options = {**base.options, "first_stage": tmp_path / "any"}
    return Training(base.start, replace(experiment, unet=unet), options)


def test_a_folder_gives_the_first_stage_back(first_stage: Autoencoder, tmp_path: Path) -> None:
    save_model(first_stage, tmp_path / "any")
    back = load_model(tmp_path / "any", kind="autoencoder")
    assert back.config == first_stage.config
    for name, tensor in first_stage.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_latents_are_cached_as_they_are(first_stage: Autoencoder, pictures: Any) -> None:
    x = torch.stack([pictures[i]["image"] for i in range(len(pictures))])
    kept = encode_dataset(first_stage, pictures, "fp32")
    with torch.no_grad():
        for side, view in enumerate((x, x.flip(-1))):
            assert torch.allclose(kept[:, side], first_stage.encode(view), atol=1e-6)


def test_no_scale_is_measured(first_stage: Autoencoder, pictures: Any) -> None:
    assert measure_scale(first_stage, pictures) == 1.0


def test_it_trains_on_latents_and_samples_pictures(
    ldm: Training, first_stage: Autoencoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    loss = LatentDiffusion.loss

    def spy(self: LatentDiffusion, batch: dict) -> dict:
        seen.append(batch["z"])
        return loss(self, batch)

    monkeypatch.setattr(LatentDiffusion, "loss", spy)
    records = list(ldm(tmp_path / "run"))
    assert all(torch.isfinite(torch.tensor(r.terms["loss"])) for r in records)
    pictures = ldm.options["data"]
    x = torch.stack([pictures[i]["image"] for i in range(len(pictures))])
    with torch.no_grad():
        sides = torch.cat([first_stage.encode(x), first_stage.encode(x.flip(-1))])
    for z in torch.cat(seen):
        assert (sides - z).abs().amax((1, 2, 3)).min() < 1e-5  # one of the data's own latents
    model = load_model(tmp_path / "run")
    assert model.autoencoder.scale == 1
    drawn = model.sample(["red"], steps=3, seed=0)
    assert drawn.shape == (1, 3, 16, 16)
    assert drawn.isfinite().all()


def test_what_is_sampled_from_vq_lies_on_codes(
    ldm: Training, first_stage: Autoencoder, tmp_path: Path
) -> None:
    """Decoding a sample quantises it: the picture is that of the nearest codes."""
    list(ldm(tmp_path / "run"))
    model = load_model(tmp_path / "run")
    *_, last = model.steps(["red"], steps=3, seed=0)
    if first_stage.config.regularizer == "identity":
        assert torch.equal(model.autoencoder.decode(last.z), last.z)
        return
    codes = model.autoencoder.decoder.quantizer.codes(model.autoencoder.code_indices(last.z))
    with torch.no_grad():
        assert not torch.allclose(last.z, codes, atol=1e-3)
        found, wanted = model.autoencoder.decode(last.z), model.autoencoder.decode(codes)
    assert torch.allclose(found, wanted, atol=1e-5)
