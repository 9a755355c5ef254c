"""Official checkpoints, whole: averages, factors, copies, Stable Diffusion's CLIP; what is refused.

A small model of each published kind, its weights drawn by their official names.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from published import drawn
from published_whole import WHOLE, narrow_whole, with_averages
from safetensors.torch import load_file, save_file
from tiny_clip import tiny_clip
from torch import Tensor
from transformers import CLIPTextModel

from minildm import LatentDiffusion, interop
from minildm.checkpoints import CheckpointError
from minildm.interop.compvis_diffusion import diffusion_places

PATHS = {path.split("/")[2]: path for path in WHOLE}
Checkpoint = tuple[dict[str, Any], dict[str, Tensor]]


def narrow(name: str) -> Checkpoint:
    return narrow_whole(WHOLE[PATHS[name]])


@pytest.fixture(scope="module")
def semantic() -> Checkpoint:
    """The smallest: three levels, no attention but one."""
    return narrow("semantic_synthesis256")


def named(model: LatentDiffusion, *, ema: bool = False) -> dict[str, Tensor]:
    """Our tensors by the official names of those that they came from."""
    state = model.state_dict()
    return {
        name: part
        for place in diffusion_places(model.config, ema=ema)
        for name, part in zip(
            place.theirs, place.split(state[place.ours.removeprefix("model.")]), strict=True
        )
    }


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_whole_model_is_read_from_its_files(
    suffix: str, semantic: Checkpoint, tmp_path: Path
) -> None:
    config, tensors = semantic
    path, yaml_path = tmp_path / f"model{suffix}", tmp_path / "config.yaml"
    torch.save({"state_dict": tensors}, path) if suffix == ".ckpt" else save_file(tensors, path)
    yaml_path.write_text(yaml.safe_dump(config))
    model = interop.load_compvis(yaml_path, path)
    assert same(named(model), tensors)
    assert not model.training
    assert not any(p.requires_grad for p in model.autoencoder.parameters())
    assert all(p.requires_grad for p in model.unet.parameters())
    maps = torch.arange(32 * 32).reshape(1, 32, 32) % 182
    x = model.sample(maps, steps=2, seed=0)
    assert x.shape == (1, 3, 32, 32)
    batch = {"image": x, "semantic": maps}
    model.train().loss(batch)["loss"].backward()
    assert all(p.grad is not None for p in model.conditioner.parameters())


def test_averages_are_taken_where_they_are(semantic: Checkpoint) -> None:
    config, tensors = semantic
    both = with_averages(tensors)
    averaged, trained = (interop.load_compvis(config, both, ema=ema) for ema in (True, False))
    assert same(named(averaged, ema=True), both)
    assert same(named(trained), both)
    assert not same(named(averaged), both)
    alone = {n: t for n, t in both.items() if not n.startswith("model.diffusion_model.")}
    assert same(named(interop.load_compvis(config, alone), ema=True), both)
    assert same(named(interop.load_compvis(config, tensors)), tensors)


def test_half_of_the_averages_is_not_enough(semantic: Checkpoint) -> None:
    config, tensors = semantic
    both = with_averages(tensors)
    name = "model_ema.diffusion_modeltime_embed0weight"
    del both[name]
    with pytest.raises(CheckpointError, match=rf"1 tensors do not fit.*\n  {name} .* is missing"):
        interop.load_compvis(config, both)


def test_the_factor_of_the_latents_is_one_over_the_scale() -> None:
    config, tensors = narrow("lsun_churches256")
    model = interop.load_compvis(config, tensors)
    assert model.autoencoder.scale * tensors["scale_factor"] == pytest.approx(1)
    del config["model"]["params"]["scale_by_std"]
    with pytest.raises(CheckpointError, match="scale_factor has no place"):
        interop.load_compvis(config, tensors)
    factor = tensors.pop("scale_factor")
    config["model"]["params"]["scale_factor"] = factor.item()
    again = interop.load_compvis(config, tensors)
    assert torch.equal(again.autoencoder.scale, model.autoencoder.scale)


@pytest.mark.parametrize(
    "factor", [None, 0.5, torch.ones(1), torch.zeros(()), torch.tensor(torch.nan)]
)
def test_a_measured_factor_must_be_there(factor: Any) -> None:
    config, tensors = narrow("lsun_churches256")
    tensors |= {"scale_factor": factor}
    with pytest.raises(CheckpointError, match="scale_by_std=True needs scale_factor, a positive"):
        interop.load_compvis(config, tensors)


def test_the_first_stage_of_a_whole_model_is_read_alone(semantic: Checkpoint) -> None:
    config, tensors = semantic
    model = interop.load_compvis(config, with_averages(tensors))
    part = config["model"]["params"]["first_stage_config"]
    alone = interop.load_compvis(part, with_averages(tensors)).state_dict()
    assert all(torch.equal(alone[n], t) for n, t in model.autoencoder.state_dict().items())


def test_a_first_stage_that_is_the_condition_s_stands_twice() -> None:
    config, tensors = narrow("inpainting_big")
    assert any(name.startswith("cond_stage_model.encoder") for name in tensors)
    assert same(named(interop.load_compvis(config, tensors)), tensors)
    once = {n: t for n, t in tensors.items() if not n.startswith("cond_stage_model.")}
    assert same(named(interop.load_compvis(config, once)), once)
    other = {"cond_stage_model.quant_conv.bias": torch.ones(3)}
    with pytest.raises(CheckpointError, match=r"quant_conv\.bias is not the same as first"):
        interop.load_compvis(config, tensors | other)


# --- what does not fit ---


def changed(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """`a__b=1` sets b within a; None takes away."""
    config = copy.deepcopy(config)
    for key, value in changes.items():
        *path, last = key.split("__")
        at = config["model"]["params"]
        for name in path:
            at = at[name]
        at[last] = value
        if value is None:
            del at[last]
    return config


IDENTITY, MODULES = {"target": "torch.nn.Identity"}, "ldm.modules.encoders.modules"
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"guidance": 3}, "guidance=3 is not known"),
    "no first stage": ({"first_stage_config": None}, "lacks 'first_stage_config'"),
    "no target": ({"unet_config": {"params": {}}}, "unet_config names no target"),
    "another UNet": ({"unet_config__target": "ldm.UNet"}, "unet_config: 'ldm.UNet' is not known"),
    "another first stage": ({"first_stage_config__target": "x"}, "first_stage_config: 'x' is not"),
    "another condition": ({"cond_stage_config__target": "x"}, "cond_stage_config: 'x' is not kn"),
    "a word": ({"cond_stage_config": "__is_it__"}, "cond_stage_config must be a mapping"),
    "betas": ({"given_betas": [0.1]}, r"given_betas=\[0\.1\] cannot be expressed"),
    "schedule": ({"beta_schedule": "sqrt"}, "beta_schedule='sqrt' cannot be expressed"),
    "ends": ({"linear_end": 0.0001}, "linear_start, linear_end: need 0 < b0 <= b1"),
    "variance": ({"v_posterior": 0.5}, r"v_posterior=0\.5 cannot be expressed, only 0\.0"),
    "predicts": ({"parameterization": "mu"}, "parameterization='mu' cannot be expressed"),
    "loss": ({"loss_type": "huber"}, "loss_type='huber' cannot be expressed"),
    "channels": ({"channels": 4}, "channels=4 cannot be expressed, only 3"),
    "no factor": ({"scale_factor": 0.0}, r"scale_factor=0\.0 must be positive"),
    "way": ({"conditioning_key": "adm"}, "conditioning_key='adm' cannot be expressed"),
    "no tokens": ({"conditioning_key": "crossattn"}, "SpatialRescaler' is not known; known: ldm"),
    "beside": ({"unet_config__params__in_channels": 5}, "and 3 of the condition beside it must be"),
    "low resolution": (
        {"cond_stage_config": IDENTITY, "unet_config__params__in_channels": 8},
        r"takes 5 channels beside z_t, can be expressed: 3 \(low_res\)",
    ),
    "the first stage alone": (
        {"cond_stage_config": "__is_first_stage__"},
        r"takes 3 channels beside z_t, can be expressed: 4 \(inpaint\)",
    ),
    "a factor of the condition's": (
        {
            "cond_stage_config": "__is_first_stage__",
            "unet_config__params__in_channels": 7,
            "scale_factor": 0.5,
        },
        r"scale_factor=0\.5, .* there, it is not scaled",
    ),
    "a class beside": (
        {"cond_stage_config": {"target": f"{MODULES}.ClassEmbedder"}},
        "ClassEmbedder' is not known; known: .*SpatialRescaler, torch.nn.Identity",
    ),
    "no CLIP": (
        {
            "cond_stage_config": {"target": f"{MODULES}.FrozenCLIPEmbedder"},
            "conditioning_key": "crossattn",
        },
        r"cond_stage_config\.params: FrozenCLIPEmbedder .*give clip=, a folder with config\.json",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_model_we_cannot_express_is_refused(case: str, semantic: Checkpoint) -> None:
    changes, said = BAD[case]
    with pytest.raises(ValueError, match=rf"config: model\.params.*{said}"):
        interop.load_compvis(changed(semantic[0], **changes), semantic[1])


NAN = torch.full((32,), torch.nan)
WEIGHT = "model.diffusion_model.out.2.weight"
MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({WEIGHT: None}, r"out\.2\.weight \(3, 32, 3, 3\) is missing"),
    "foreign": ({"model.more": torch.ones(1)}, "model.more has no place"),
    "foreign average": ({"model_ema.x": torch.ones(1)}, "model_ema.x has no place"),
    "a factor": ({"scale_factor": torch.ones(())}, "scale_factor has no place"),
    "shape": ({WEIGHT: torch.ones(3)}, r"out\.2\.weight is \(3,\), must be \(3, 32, 3, 3\)"),
    "nan": ({"model.diffusion_model.out.0.bias": NAN}, r"out\.0\.bias holds values that are not"),
    "condition": (
        {"cond_stage_model.channel_mapper.weight": torch.ones(3, 9, 1, 1)},
        r"channel_mapper\.weight is \(3, 9, 1, 1\), must be \(3, 182, 1, 1\)",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_tensor_that_does_not_fit_is_named(case: str, semantic: Checkpoint) -> None:
    changes, said = MISFITS[case]
    tensors = {n: t for n, t in (semantic[1] | changes).items() if t is not None}
    with pytest.raises(CheckpointError, match=rf"(?s)checkpoint: 1 tensors do not fit.*{said}"):
        interop.load_compvis(semantic[0], tensors)


def test_ten_of_all_parts_are_listed(semantic: Checkpoint) -> None:
    parts = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")
    kept = {n: t for i, (n, t) in enumerate(semantic[1].items()) if i % 3}
    foreign = {f"{part}more.{i}": torch.ones(1) for part in parts for i in range(5)}
    with pytest.raises(CheckpointError, match="tensors do not fit") as raised:
        interop.load_compvis(semantic[0], kept | foreign)
    assert len(str(raised.value).splitlines()) == 11


def test_the_config_of_another_checkpoint_shows(semantic: Checkpoint) -> None:
    other = changed(semantic[0], linear_end=0.0155)
    with pytest.raises(CheckpointError, match=r"alphas_cumprod are not those .* b1=0\.0155"):
        interop.load_compvis(other, semantic[1])
    with pytest.raises(CheckpointError, match="alphas_cumprod are not those"):
        interop.load_compvis(changed(semantic[0], timesteps=500), semantic[1])
    half = semantic[1] | {"alphas_cumprod": semantic[1]["alphas_cumprod"].half()}
    interop.load_compvis(semantic[0], half)


# --- Stable Diffusion v1 ---

CLIP_TEXT = "cond_stage_model.transformer.text_model."


@pytest.fixture
def stable(tmp_path: Path) -> tuple[dict[str, Any], dict[str, Tensor], Path]:
    """A small one: the text-to-image model, its text read by a tiny CLIP with other weights."""
    config, tensors = narrow("txt2img-1p4B-eval.yaml")
    folder = tiny_clip(tmp_path)
    clip = {"target": f"{MODULES}.FrozenCLIPEmbedder", "params": {"max_length": 10}}
    config = changed(config, cond_stage_config=clip, unet_config__params__context_dim=16)
    tensors = {n: t for n, t in tensors.items() if not n.startswith("cond_stage_model.")}
    tensors |= {n: t[:, :16] for n, t in tensors.items() if "attn2.to_k" in n or "attn2.to_v" in n}
    for name, t in load_file(folder / "model.safetensors").items():
        if name.startswith("text_model."):
            tensors[f"cond_stage_model.transformer.{name}"] = t + 0.1 * drawn({"": t.shape})[""]
    tensors[f"{CLIP_TEXT}embeddings.position_ids"] = torch.arange(10)[None]
    return config, tensors, folder


@torch.no_grad()
def test_stable_diffusion_reads_with_the_clip_of_its_checkpoint(stable: Any) -> None:
    config, tensors, folder = stable
    theirs = CLIPTextModel.from_pretrained(folder).eval()
    state = {n: tensors[f"{CLIP_TEXT}{n.removeprefix('text_model.')}"] for n in theirs.state_dict()}
    theirs.load_state_dict(state)
    (folder / "model.safetensors").unlink()  # its words are enough
    model = interop.load_compvis(config, tensors, clip=folder)
    captions = ["a red dog", ""]
    tokens = model.conditioner({"caption": captions}).tokens
    ids = model.conditioner.ids({"caption": captions})
    assert (tokens - theirs(ids).last_hidden_state).abs().max() < 1e-5
    x = model.sample(captions, size=64, steps=2, guidance_scale=5.0, seed=0)
    assert x.shape == (2, 3, 64, 64)
    assert not any("clip" in name for name in model.state_dict())
    version = changed(config, cond_stage_config__params__version=str(folder))
    again = interop.load_compvis(version, tensors)
    assert torch.equal(again.conditioner({"caption": captions}).tokens, tokens)


@torch.no_grad()
def test_without_its_clip_the_folder_s_reads(stable: Any) -> None:
    config, tensors, folder = stable
    rest = {n: t for n, t in tensors.items() if not n.startswith(CLIP_TEXT)}
    model = interop.load_compvis(config, rest, clip=folder)
    ids = model.conditioner.ids({"caption": ["red"]})
    truth = CLIPTextModel.from_pretrained(folder).eval()(ids).last_hidden_state
    assert (model.conditioner({"caption": ["red"]}).tokens - truth).abs().max() < 1e-5


LOST: dict[str, tuple[Callable[[Path], None], str]] = {
    "config": (lambda folder: (folder / "config.json").unlink(), "lacks config.json"),
    "words": (
        lambda folder: [
            (folder / f).unlink(missing_ok=True)
            for f in ("vocab.json", "merges.txt", "tokenizer.json")
        ],
        "lacks vocab.json, merges.txt",
    ),
    "nonsense": (lambda folder: (folder / "config.json").write_text("{"), ".+"),
}


@pytest.mark.parametrize("case", LOST)
def test_half_a_folder_of_clip_is_none(case: str, stable: Any) -> None:
    config, tensors, folder = stable
    lose, said = LOST[case]
    lose(folder)
    with pytest.raises(ValueError, match=rf"holds no CLIP \({said}\)"):
        interop.load_compvis(config, tensors, clip=folder)


def test_a_clip_that_does_not_fit_is_named(stable: Any) -> None:
    config, tensors, folder = stable
    odd = tensors | {f"{CLIP_TEXT}final_layer_norm.bias": torch.ones(3)}
    with pytest.raises(CheckpointError, match=r"final_layer_norm\.bias is \(3,\), must be \(16,\)"):
        interop.load_compvis(config, odd, clip=folder)
