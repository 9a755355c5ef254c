"""Every published latent diffusion model, whole: each name and shape, and its preset."""

import re
from collections import Counter
from typing import Any

import pytest
import torch
from published import listed_shapes, on_meta
from published_whole import RETRIEVAL, TABLES, WHOLE, whole_config, whole_shapes
from test_interop_unet import STABLE, stable_shapes
from tiny_clip import tiny_clip

from minildm import PUBLISHED, LatentDiffusion, interop
from minildm.interop.compvis_diffusion import diffusion_places

PRESET_OF = {  # of the configurations to train, whose names are longer
    "celebahq-ldm-vq-4.yaml": "celeba256",
    "ffhq-ldm-vq-4.yaml": "ffhq256",
    "lsun_bedrooms-ldm-vq-4.yaml": "lsun_beds256",
    "lsun_churches-ldm-kl-8.yaml": "lsun_churches256",
    "cin-ldm-vq-f8.yaml": "cin256",
    "cin256-v2.yaml": "cin256-v2",
    "txt2img-1p4B-eval.yaml": "txt2img-1p4B",
}
LOADED = [path for path in WHOLE if path != RETRIEVAL]
UNETS = {m["unet_state_dict"]["keys_sha256"] for m in WHOLE.values()}


def preset_of(path: str) -> str:
    name = path.split("/")[2]
    return PRESET_OF.get(name, name)


def load(path: str, **options: Any) -> LatentDiffusion:
    model = WHOLE[path]
    return interop.load_compvis(whole_config(model), on_meta(whole_shapes(model)), **options)


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def places_of(model: LatentDiffusion, ema: bool) -> list[str]:
    return [name for p in diffusion_places(model.config, ema=ema) for name in p.theirs]


@pytest.mark.parametrize("path", LOADED)
def test_a_published_model_loads_whole(path: str) -> None:
    theirs, listed = WHOLE[path], whole_shapes(WHOLE[path])
    model = load(path)
    assert model.config == PUBLISHED[preset_of(path)]
    assert parameters(model.unet) == theirs["unet_params"]
    assert parameters(model.autoencoder) == theirs["first_stage"]["params"]["total"]
    scores = theirs["cond_stage"].get("params_breakdown", {}).get("to_logits_unused", 0)
    assert parameters(model.conditioner) == theirs["cond_stage"]["params"] - scores
    side = model.config.image_size // model.autoencoder.f
    assert [model.config.autoencoder.z_channels, side, side] == theirs["latent_shape"]
    assert not any(buffer.is_meta for buffer in model.schedule.buffers())
    # Every name is taken, or in the table of what inference does not need.
    taken = set(places_of(model, ema=theirs["diffusion"]["use_ema"]))
    left = set(listed) - taken
    assert taken <= set(listed)
    rest = {n for n in left if n not in TABLES and "to_logits" not in n and n != "scale_factor"}
    raw = set(places_of(model, ema=False)) - taken
    copies = {n for n in rest if theirs["cond_stage"]["target"] == "__is_first_stage__"}
    copies = {n for n in copies if n.startswith("cond_stage_model.")}
    assert rest - copies - {"model_ema.decay", "model_ema.num_updates"} == raw


@pytest.mark.parametrize("key", sorted(UNETS))
def test_averages_have_names_of_their_own(key: str) -> None:
    """Without dots, no two names are the same."""
    names = Counter(name.replace(".", "") for name in listed_shapes(key))
    assert set(names.values()) == {1}


def test_the_averaged_and_the_trained_are_both_there() -> None:
    path = "models/ldm/ffhq256/config.yaml"
    assert load(path, ema=False).config == load(path).config


def test_all_published_are_there() -> None:
    assert {preset_of(path) for path in LOADED} == PUBLISHED.keys() - {"stable-diffusion-v1"}
    assert (len(LOADED), len(PUBLISHED)) == (18, 14)


def test_the_model_of_retrieved_pictures_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cond_stage_config: 'torch\.nn\.Identity' is not known"):
        load(RETRIEVAL)


def stable_config() -> dict[str, Any]:
    """As the published configuration of Stable Diffusion v1, whose CLIP is made tiny here."""
    config = whole_config(WHOLE["configs/latent-diffusion/txt2img-1p4B-eval.yaml"])
    params = config["model"]["params"]
    params |= {"image_size": 64, "first_stage_key": "jpg", "cond_stage_key": "txt"}
    params["unet_config"]["params"] = STABLE | {"context_dim": 16}
    clip = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}
    return {"model": config["model"] | {"params": params | {"cond_stage_config": clip}}}


def test_stable_diffusion_is_its_preset(tmp_path: Any) -> None:
    """But for CLIP, of which there is a tiny one here."""
    first_stage = whole_shapes(WHOLE["models/ldm/lsun_churches256/config.yaml"])
    shapes = {n: s for n, s in first_stage.items() if n.startswith("first_stage_model.")}
    to_16 = re.compile(r".*attn2\.to_[kv]\.weight")
    shapes |= {
        f"model.diffusion_model.{n}": (s[0], 16) if to_16.match(n) else s
        for n, s in stable_shapes().items()
    }
    config = stable_config()
    config["model"]["params"]["cond_stage_config"]["params"] = {"max_length": 10}
    model = interop.load_compvis(config, on_meta(shapes), clip=tiny_clip(tmp_path))
    preset, ours = PUBLISHED["stable-diffusion-v1"], model.config
    assert ours.autoencoder == preset.autoencoder
    assert ours.schedule == preset.schedule
    assert ours.image_size == preset.image_size == 512
    assert {**vars(ours.unet), "d_cond": 768} == vars(preset.unet)
    assert vars(ours.conditioner) | {
        "d_cond": 768,
        "length": 77,
        "encoder_path": preset.conditioner.encoder_path,
    } == vars(preset.conditioner)
    assert torch.allclose(1 / model.autoencoder.scale, torch.tensor(0.18215))


def test_a_preset_of_stable_diffusion_has_the_published_size() -> None:
    with torch.device("meta"):
        from minildm import Autoencoder, UNet

        preset = PUBLISHED["stable-diffusion-v1"]
        unet, first_stage = UNet(preset.unet), Autoencoder(preset.autoencoder)
    assert parameters(unet) == 859_520_964
    assert parameters(first_stage) == 83_653_863
