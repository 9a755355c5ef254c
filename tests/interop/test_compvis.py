"""Official models load exactly, whole and in parts; what was loaded comes out again."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import randn, shaken
from interop import official_models as official
from interop.official_models import BY_NAME, WHOLE
from safetensors.torch import load_file
from torch import Tensor, nn

from minildm import interop
from minildm.compression.autoencoder import AutoencoderConfig
from minildm.conditioning import (
    ClassConfig,
    HybridConfig,
    IdsConfig,
    InpaintConfig,
    LayoutConfig,
    LowResConfig,
    TextConfig,
)
from minildm.diffusion.latent_diffusion import LatentDiffusion, LatentDiffusionConfig
from minildm.diffusion.objective import ObjectiveConfig
from minildm.diffusion.schedule import ScheduleConfig
from minildm.diffusion.unet import UNetConfig
from minildm.interop.compvis import PARTS, _parts, _places
from minildm.interop.weights import exported, read_tensors
from minildm.training.published import PUBLISHED
from minildm.training.published import RELEASED as PRESETS

PRESET_OF = {  # of the configurations to train, whose names are longer
    "celebahq-ldm-vq-4": "celeba256",
    "ffhq-ldm-vq-4": "ffhq256",
    "lsun_bedrooms-ldm-vq-4": "lsun_beds256",
    "lsun_churches-ldm-kl-8": "lsun_churches256",
    "cin-ldm-vq-f8": "cin256",
    "txt2img-1p4B-eval": "txt2img-1p4B",
}
KINDS = (  # one of each kind of condition
    *("lsun_churches256", "cin256-v2", "txt2img-1p4B-eval"),
    *("semantic_synthesis256", "bsr_sr", "inpainting_big"),
)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def official_state(part: Any) -> dict[str, Tensor]:
    """A part's tensors by their official names."""
    parts = _parts(part)
    tensors = exported(nn.ModuleDict(parts), _places(parts))
    return {n.removeprefix(PARTS[next(iter(parts))][0]): t for n, t in tensors.items()}


# --- every published model, on the meta device ---


@pytest.mark.parametrize("path", official.FIRST_STAGES)
def test_a_published_first_stage_loads_exactly(path: str) -> None:
    stage = official.FIRST_STAGES[path]
    config, shapes = official.first_stage(stage)
    model = interop.load_compvis({"model": config}, official.on_meta(shapes))
    assert official.names_hash(official_state(model)) == stage["state_dict"]["keys_sha256"]
    assert parameters(model) == stage["params"]["total"]
    assert model.f == stage["f"]
    if path.startswith("models"):
        assert model.config == PRESETS[path.split("/")[2]].model


@pytest.mark.parametrize("path", official.DIFFERENT_UNETS.values())
def test_a_published_unet_loads_exactly(path: str) -> None:
    config, shapes = official.unet(WHOLE[path])
    model = interop.load_compvis(config, official.on_meta(shapes))
    wanted = WHOLE[path]["unet_state_dict"]["keys_sha256"]
    assert official.names_hash(official_state(model)) == wanted
    assert parameters(model) == WHOLE[path]["unet_params"]


@pytest.mark.parametrize("name", [n for n, c in BY_NAME.items() if "state_dict" in c["cond_stage"]])
def test_a_published_encoder_loads_exactly(name: str) -> None:
    config, shapes = official.condition(BY_NAME[name])
    model = interop.load_compvis(config, official.on_meta(shapes))
    unused = {n for n in shapes if ".to_logits." in n}
    assert official_state(model).keys() == shapes.keys() - unused
    scores = BY_NAME[name]["cond_stage"].get("params_breakdown", {}).get("to_logits_unused", 0)
    assert bool(scores) == bool(unused)
    assert parameters(model) == BY_NAME[name]["cond_stage"]["params"] - scores


@pytest.mark.parametrize("name", [n for n in BY_NAME if "768x768" not in n])
def test_a_published_model_loads_whole(name: str) -> None:
    config, shapes = official.whole_model(BY_NAME[name])
    shapes |= dict.fromkeys(official.TABLES, (1000,))
    shapes |= official.averages(shapes) if BY_NAME[name]["diffusion"]["use_ema"] else {}
    tensors = official.on_meta(shapes) | {"scale_factor": torch.tensor(0.7)}
    by_std = BY_NAME[name]["diffusion"]["scale_by_std"]
    tensors = {n: t for n, t in tensors.items() if by_std or n != "scale_factor"}
    model = interop.load_compvis(config, tensors)
    assert model.config == PUBLISHED[PRESET_OF.get(name, name)]
    assert parameters(model.unet) == BY_NAME[name]["unet_params"]
    side = model.config.image_size // model.autoencoder.f
    assert [model.config.autoencoder.z_channels, side, side] == BY_NAME[name]["latent_shape"]
    assert not any(buffer.is_meta for buffer in model.schedule.buffers())


def test_all_published_are_covered() -> None:
    counts = len(official.FIRST_STAGES), len(WHOLE), len(official.DIFFERENT_UNETS), len(PUBLISHED)
    assert counts == (13, 19, 11, 14)
    names = {PRESET_OF.get(name, name) for name in BY_NAME}
    assert PUBLISHED.keys() - names == {"stable-diffusion-v1"}
    with pytest.raises(ValueError, match="conditioning_key='crossattn' cannot be expressed"):
        config, shapes = official.whole_model(WHOLE[official.RETRIEVAL])
        interop.load_compvis(config, official.on_meta(shapes))


# --- there and back ---


@pytest.mark.parametrize("name", KINDS)
def test_what_was_loaded_comes_out_again(name: str, tmp_path: Path) -> None:
    config, tensors = official.narrow(name)
    by_std = "scale_factor" in tensors
    model = interop.load_compvis(config, tensors)
    factor = 0.7 if by_std else config["model"]["params"]["scale_factor"]
    assert model.autoencoder.scale.item() == pytest.approx(1 / factor)
    first, second = tmp_path / "first.ckpt", tmp_path / "deep/second.safetensors"
    interop.save_compvis(model, first, scale_by_std=by_std)
    saved = dict(read_tensors(first))
    assert saved.keys() == {n for n in tensors if ".to_logits." not in n}
    assert all(torch.allclose(t, tensors[n], atol=0, rtol=1e-6) for n, t in saved.items())
    assert all(torch.equal(t, tensors[n]) for n, t in saved.items() if n != "scale_factor")
    again = interop.load_compvis(first.with_suffix(".yaml"), first)
    assert again.config == model.config
    assert official.same(again.state_dict(), model.state_dict())
    interop.save_compvis(again, second, scale_by_std=by_std)
    assert official.same(load_file(second), saved)
    assert second.with_suffix(".yaml").read_text() == first.with_suffix(".yaml").read_text()
    ours, theirs = (
        c["model"]["params"]
        for c in (yaml.safe_load(first.with_suffix(".yaml").read_text()), config)
    )
    same = ("image_size", "channels", "timesteps", "linear_start", "linear_end", "loss_type")
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}


OWN_UNET = UNetConfig(
    in_channels=3, out_channels=3, channels=32, channel_mult=(1, 2), attn_levels=(1,), d_head=8
)
OWN = LatentDiffusionConfig(
    autoencoder=AutoencoderConfig(z_channels=3, channels=32, channel_mult=(1, 2), num_res_blocks=1),
    unet=replace(OWN_UNET, d_cond=32),
    conditioner=ClassConfig(classes=("a", "b"), d_cond=32),
    schedule=ScheduleConfig(kind="linear", beta_start=0.0001, beta_end=0.02),
    objective=ObjectiveConfig(predict="z0", loss="l1"),
    image_size=16,
)


def own(**changes: Any) -> LatentDiffusion:
    conditioner = changes.get("conditioner", OWN.conditioner)
    channels = 3 + conditioner.concat_channels(3)
    unet = replace(OWN_UNET, in_channels=channels, d_cond=conditioner.d_cond)
    return shaken(LatentDiffusion(replace(OWN, **{"unet": unet, **changes}))).eval()


def through_files(model: Any, folder: Path, **options: Any) -> Any:
    interop.save_compvis(model, folder / "own.safetensors")
    return interop.load_compvis(folder / "own.yaml", folder / "own.safetensors", **options)


def test_a_model_of_our_own_is_read_as_official(tmp_path: Path) -> None:
    model = own()
    model.autoencoder.scale.fill_(0.37)
    again = through_files(model, tmp_path)
    assert replace(again.config, conditioner=OWN.conditioner) == model.config
    assert again.config.conditioner.classes == ("0", "1", "2")  # numbers, one for "no class"
    options = {"steps": 3, "seed": 0, "eta": 1.0}
    assert torch.equal(again.sample(["0", "1"], **options), model.sample(["a", "b"], **options))


@pytest.mark.parametrize(
    "conditioner",
    [
        TextConfig(d_cond=32, vocab_size=40, length=9),
        LayoutConfig(d_cond=32, classes=("a", "b"), grid=4, max_boxes=2),
        IdsConfig(d_cond=32, vocab_size=40, length=9),
    ],
    ids=lambda config: config.kind,
)
@torch.no_grad()
def test_tokens_become_numbers(conditioner: Any, tmp_path: Path) -> None:
    model = own(conditioner=conditioner)
    again = through_files(model, tmp_path)
    read = again.config.conditioner
    assert read.kind == "ids"
    ids = torch.arange(read.length)[None] % read.vocab_size
    assert torch.equal(again.conditioner.network(ids), model.conditioner.network(ids))


@pytest.mark.parametrize("concat", [LowResConfig(), InpaintConfig()], ids=lambda c: c.kind)
def test_a_hybrid_comes_back(concat: Any, tmp_path: Path) -> None:
    model = own(conditioner=HybridConfig(tokens=OWN.conditioner, concat=concat))
    again = through_files(model, tmp_path)
    x = randn(1, 3, 16, 16).clamp(-1, 1)
    images = {"low_res": x[..., :8, :8]}
    if concat.kind == "inpaint":
        images = {"image": x, "mask": x[:, :1].gt(0).float()}
    ours, read = (
        m.sample({**images, "y": [y]}, steps=2, seed=0) for m, y in ((model, "b"), (again, "1"))
    )
    assert torch.equal(ours, read)


@pytest.mark.parametrize("name", ["autoencoder", "unet", "conditioner"])
def test_a_part_is_saved_alone(name: str, tmp_path: Path) -> None:
    part = getattr(own(), name)
    again = through_files(part, tmp_path)
    assert type(again) is type(part)
    assert official.same(again.state_dict(), part.state_dict())


# --- whole checkpoints ---

Checkpoint = tuple[dict[str, Any], dict[str, Tensor]]


@pytest.fixture(scope="module")
def semantic() -> Checkpoint:
    return official.narrow("semantic_synthesis256")


def test_a_loaded_model_samples_and_trains(semantic: Checkpoint) -> None:
    before = torch.get_rng_state()
    model = interop.load_compvis(*semantic)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert not any(p.requires_grad for p in model.autoencoder.parameters())
    maps = torch.arange(32 * 32).reshape(1, 32, 32) % 182
    x = model.sample(maps, steps=2, seed=0)
    assert x.shape == (1, 3, 32, 32)
    model.train().loss({"image": x, "semantic": maps})["loss"].backward()
    assert all(
        p.grad is not None for p in (*model.unet.parameters(), model.conditioner.mapper.weight)
    )


def test_averages_are_taken_if_there_are_any(semantic: Checkpoint) -> None:
    config, tensors = semantic
    shapes = official.averages({name: tuple(t.shape) for name, t in tensors.items()})
    both = tensors | official.drawn(shapes, seed=5)
    trained, averaged = (interop.load_compvis(config, both, ema=ema) for ema in (False, True))
    for model, average in ((trained, False), (averaged, True)):
        parts = {"unet": model.unet}
        state = exported(nn.ModuleDict(parts), _places(parts, average))
        assert all(torch.equal(t, both[n]) for n, t in state.items())
    alone = {n: t for n, t in both.items() if not n.startswith("model.diffusion_model.")}
    assert official.same(interop.load_compvis(config, alone).state_dict(), averaged.state_dict())
    del both["model_ema.diffusion_modeltime_embed0weight"]
    with pytest.raises(ValueError, match=r"(?s)1 tensors do not fit.*time_embed0weight"):
        interop.load_compvis(config, both)


def test_parts_of_a_whole_checkpoint_are_read_alone(semantic: Checkpoint) -> None:
    config, tensors = semantic
    model, params = interop.load_compvis(config, tensors), config["model"]["params"]
    for key, part in (("first_stage", model.autoencoder), ("cond_stage", model.conditioner)):
        alone = interop.load_compvis(params[f"{key}_config"], {"state_dict": tensors})
        assert official.same(alone.state_dict(), part.state_dict())


def test_training_keeps_a_loaded_codebook_at_first() -> None:
    config, shapes = official.first_stage(official.RELEASED["vq-f4"], official.quarter)
    model = interop.load_compvis(config, official.drawn(shapes)).train()
    codes = model.decoder.quantizer.codebook.detach().clone()
    model.decoder.quantizer.restart_after = 2
    model.decode(randn(1, 3, 2, 2))
    assert torch.equal(model.decoder.quantizer.codebook, codes)
    assert (model.config.vq_legacy, model.config.commitment) == (True, 0.25)


def test_pixels_have_no_tensors() -> None:
    model = interop.load_compvis({"target": "ldm.models.autoencoder.IdentityFirstStage"}, {})
    x = randn(1, 3, 5, 7).clamp(-1, 1)
    assert torch.equal(model.decode(model.encode(x)), x)


def test_any_precision_becomes_float32_and_the_caller_keeps_its_tensors() -> None:
    config, shapes = official.first_stage(official.RELEASED["kl-f4"], official.quarter)
    tensors = {name: t.half() for name, t in official.drawn(shapes).items()}
    kept = {name: t.clone() for name, t in tensors.items()}
    model = interop.load_compvis(config, tensors)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(t, kept[n].float()) for n, t in official_state(model).items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert official.same(tensors, kept)
