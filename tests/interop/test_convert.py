"""The same model in three forms; published models by name; Stable Diffusion with its CLIP."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import shaken, tiny_clip

from minildm import interop
from minildm.compression.autoencoder import AutoencoderConfig
from minildm.conditioning import FrozenTextConfig
from minildm.diffusion.latent_diffusion import LatentDiffusion, LatentDiffusionConfig
from minildm.diffusion.unet import UNetConfig
from minildm.interop.weights import read_tensors
from minildm.interop.official import FILES, official_model, stand_in
from minildm.training.checkpoint import CheckpointError, load_model, save_model
from minildm.training.published import PUBLISHED

UNET = UNetConfig(
    in_channels=3, out_channels=3, channels=32, channel_mult=(1, 1), num_res_blocks=1,
    attn_levels=(1,),
)  # fmt: skip
KL = AutoencoderConfig(z_channels=3, channels=32, channel_mult=(1, 1), num_res_blocks=1)


@pytest.fixture
def ours(tmp_path: Path) -> tuple[LatentDiffusion, Path]:
    """An unconditional model that all three can express, and its folder."""
    config = LatentDiffusionConfig(autoencoder=KL, unet=UNET, image_size=16)
    model = shaken(LatentDiffusion(config)).eval()
    model.autoencoder.scale.fill_(1.7)
    save_model(model.autoencoder, tmp_path / "ours/first_stage")
    save_model(model, tmp_path / "ours", first_stage="first_stage")
    return model, tmp_path / "ours"


@pytest.mark.parametrize(("form", "name"), [("diffusers", "theirs"), ("compvis", "model.ckpt")])
def test_there_and_back_is_the_same_model(ours: Any, tmp_path: Path, form: str, name: str) -> None:
    model, folder = ours
    assert interop.convert(folder, tmp_path / name, to=form) == ("minildm", form)
    assert interop.convert(tmp_path / name, tmp_path / "back") == (form, "minildm")
    options = {"n": 2, "steps": 3, "seed": 1}
    images, same = (m.sample(**options) for m in (model, load_model(tmp_path / "back")))
    assert torch.allclose(images, same, atol=1e-5) and images.std() > 0.01
    shutil.move(tmp_path / "back", tmp_path / "elsewhere")  # the folder is complete
    assert torch.equal(load_model(tmp_path / "elsewhere").sample(**options), same)
    with pytest.raises(FileExistsError, match="already exists"):
        interop.convert(folder, tmp_path / name, to=form)


def test_what_cannot_be_converted_is_refused(ours: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="to='' must be one of diffusers, compvis"):
        interop.convert(ours[1], tmp_path / "out")
    with pytest.raises(ValueError, match="patch=2, only 1"):
        interop.convert("emoji-kl-f4", tmp_path / "out", to="diffusers")
    (tmp_path / "alone.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"alone\.yaml cannot be read"):
        interop.convert(tmp_path / "alone.ckpt", tmp_path / "out")
    interop.save_diffusers(ours[0].unet, tmp_path / "unet")
    with pytest.raises(ValueError, match="a UNet alone has no folder of ours"):
        interop.convert(tmp_path / "unet", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_stable_diffusion_keeps_its_clip(tmp_path: Path) -> None:
    clip = FrozenTextConfig(encoder="clip", path=str(tiny_clip(tmp_path)), d_cond=16, length=10)
    config = LatentDiffusionConfig(
        autoencoder=KL, unet=replace(UNET, d_cond=16), conditioner=clip, image_size=16
    )
    model = shaken(LatentDiffusion(config)).eval()
    interop.save_compvis(model, tmp_path / "own.ckpt")
    names = {n for n in read_tensors(tmp_path / "own.ckpt") if n.startswith("cond_stage_model.")}
    assert "cond_stage_model.transformer.text_model.final_layer_norm.weight" in names
    assert len(names) == sum(1 for _ in model.conditioner.network.parameters())
    (tmp_path / "model.safetensors").unlink()  # its words and config are enough
    again = interop.load_compvis(tmp_path / "own.yaml", tmp_path / "own.ckpt", clip=tmp_path)
    captions = {"caption": ["a red dog", ""]}
    assert torch.equal(model.conditioner(captions).tokens, again.conditioner(captions).tokens)
    assert again.sample("red", steps=2, guidance_scale=5.0).shape == (1, 3, 16, 16)
    tensors = read_tensors(tmp_path / "own.ckpt")
    tensors["cond_stage_model.transformer.text_model.final_layer_norm.bias"] = torch.ones(3)
    with pytest.raises(
        CheckpointError, match=r"final_layer_norm\.bias: file \(3,\), model \(16,\)"
    ):
        interop.load_compvis(tmp_path / "own.yaml", tensors, clip=tmp_path)


@pytest.mark.parametrize(
    "name", ["celeba256", "lsun_churches256", "txt2img-1p4B", "inpainting_big"]
)
def test_a_stand_in_has_the_blocks_of_the_published_model(name: str) -> None:
    published, small = PUBLISHED[name], stand_in(name).config
    for part in ("channel_mult", "attn_levels", "resblock_updown", "scale_shift", "depth"):
        assert getattr(small.unet, part) == getattr(published.unet, part)
    assert small.autoencoder.regularizer == published.autoencoder.regularizer
    assert (small.schedule, small.conditioner.kind) == (
        published.schedule,
        published.conditioner.kind,
    )


def test_published_files_are_read_if_they_exist(tmp_path: Path) -> None:
    assert FILES.keys() == PUBLISHED.keys() - {"stable-diffusion-v1"}
    files, model = FILES["celeba256"], stand_in("celeba256", seed=3)
    found = official_model("celeba256", seed=3)
    assert not found.real and "no folder was given" in found.said and files.url in found.said
    x = found.model.sample(n=1, steps=2, seed=0)
    assert torch.equal(x, model.sample(n=1, steps=2, seed=0)) and x.std() > 0.01
    interop.save_compvis(model, tmp_path / files.checkpoint)
    (tmp_path / files.checkpoint).with_suffix(".yaml").rename(tmp_path / files.config)
    found, other = (official_model(name, tmp_path) for name in ("celeba256", "ffhq256"))
    assert found.real and files.checkpoint in found.said
    assert not other.real and f"is not in {tmp_path}" in other.said
    state = found.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="name='celeba' is not known; known: celeba256, ffhq256"):
        official_model("celeba")
