"""Saved by official names: what was loaded comes out exactly; what has no such name is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from published_whole import TABLES, WHOLE
from safetensors.torch import load_file
from test_interop_whole import narrow
from tiny_clip import tiny_clip
from torch import Tensor, nn

from minildm import (
    PUBLISHED,
    Autoencoder,
    AutoencoderConfig,
    ConditionerConfig,
    LatentDiffusion,
    LatentDiffusionConfig,
    ObjectiveConfig,
    ScheduleConfig,
    UNet,
    UNetConfig,
    interop,
)
from minildm.conditioning import build_conditioner
from minildm.interop.compvis_saving import schedule_tables
from minildm.interop.reading import read_tensors

KINDS = (
    *("lsun_churches256", "cin256-v2.yaml", "txt2img-1p4B-eval.yaml"),
    *("semantic_synthesis256", "bsr_sr", "inpainting_big"),
)


def read(path: Path) -> dict[str, Tensor]:
    return dict(read_tensors(path).named)


@pytest.mark.parametrize("name", KINDS)
def test_what_was_loaded_comes_out_again(name: str, tmp_path: Path) -> None:
    """The tensors, to the last bit, under their names; a model that is equal; and again."""
    config, tensors = narrow(name)
    by_std = "scale_factor" in tensors
    model = interop.load_compvis(config, tensors)
    first, second = tmp_path / "first.ckpt", tmp_path / "deep" / "second.ckpt"
    interop.save_compvis(model, first, scale_by_std=by_std)
    saved = read(first)
    unused = {n for n in tensors if ".to_logits." in n}
    assert saved.keys() == tensors.keys() - unused | set(TABLES)
    assert all(torch.equal(saved[n], tensors[n]) for n in tensors.keys() - unused)
    again = interop.load_compvis(first.with_suffix(".yaml"), first)
    assert again.config == model.config
    written = yaml.safe_load(first.with_suffix(".yaml").read_text())
    check_config(written["model"], config["model"])
    state = again.state_dict()
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    interop.save_compvis(again, second, scale_by_std=by_std)
    assert all(torch.equal(t, saved[n]) for n, t in read(second).items())
    assert second.with_suffix(".yaml").read_text() == first.with_suffix(".yaml").read_text()


def check_config(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """The saved config says what the official one says."""
    top = ("image_size", "channels", "timesteps", "linear_start", "linear_end", "loss_type")
    sizes = ("model_channels", "in_channels", "out_channels", "channel_mult", "num_res_blocks")
    assert ours["target"] == theirs["target"]
    ours, theirs = ours["params"], theirs["params"]
    assert [ours[key] for key in top] == [theirs[key] for key in top]
    mine, unet = (p["unet_config"]["params"] for p in (ours, theirs))
    assert [mine[key] for key in sizes] == [unet[key] for key in sizes]
    for part in ("unet_config", "first_stage_config", "cond_stage_config"):
        if isinstance(theirs[part], str):
            assert ours[part] == theirs[part]
        else:
            assert ours[part]["target"] == theirs[part]["target"]


def test_a_safetensors_file_holds_the_same(tmp_path: Path) -> None:
    config, tensors = narrow("inpainting_big")  # whose first stage stands there twice
    model = interop.load_compvis(config, tensors)
    for name in ("model.ckpt", "model.safetensors"):
        interop.save_compvis(model, tmp_path / name)
    one, other = read(tmp_path / "model.ckpt"), load_file(tmp_path / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(t, other[n]) for n, t in one.items())
    bytes_held = sum(t.nbytes for t in one.values())
    assert (tmp_path / "model.ckpt").stat().st_size < 1.1 * bytes_held + 200_000


def test_the_tables_are_the_official_ones() -> None:
    """As numpy computes them in the official code's steps."""
    for name in ("txt2img-1p4B", "ffhq256"):
        schedule = PUBLISHED[name].schedule
        betas = np.linspace(schedule.b0**0.5, schedule.b1**0.5, schedule.T) ** 2
        alphas = 1 - betas
        abar = np.cumprod(alphas)
        before = np.append(1.0, abar[:-1])
        variance = betas * (1 - before) / (1 - abar)
        truth = {
            "betas": betas,
            "alphas_cumprod": abar,
            "alphas_cumprod_prev": before,
            "sqrt_alphas_cumprod": np.sqrt(abar),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - abar),
            "log_one_minus_alphas_cumprod": np.log(1 - abar),
            "sqrt_recip_alphas_cumprod": np.sqrt(1 / abar),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / abar - 1),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
            "posterior_mean_coef1": betas * np.sqrt(before) / (1 - abar),
            "posterior_mean_coef2": (1 - before) * np.sqrt(alphas) / (1 - abar),
        }
        ours = schedule_tables(schedule)
        assert ours.keys() == truth.keys() == set(TABLES)
        for key, table in ours.items():
            assert np.allclose(table.numpy(), truth[key], rtol=1e-5, atol=1e-12), key


def test_the_scale_comes_back_whatever_it_was() -> None:
    from minildm.interop.compvis_saving import _scale_factor

    with torch.device("cpu"):
        model = Autoencoder(AutoencoderConfig(width=32, width_mult=(1,), res_blocks=1))
    for factor in torch.linspace(0.01, 9, 997):
        model.scale = (1 / factor.double()).float()
        assert torch.equal((1 / _scale_factor(model)).float(), model.scale)


# --- our own ---

UNET = UNetConfig(
    in_channels=3,
    out_channels=3,
    width=32,
    width_mult=(1, 2),
    attn_levels=(1,),
    d_head=8,
    d_cond=32,
)
OWN = LatentDiffusionConfig(
    autoencoder=AutoencoderConfig(z_channels=3, width=32, width_mult=(1, 2), res_blocks=1),
    unet=UNET,
    conditioner=ConditionerConfig(kind="class", classes=("a", "b"), d_cond=32),
    schedule=ScheduleConfig(kind="linear", b0=0.0001, b1=0.02),
    objective=ObjectiveConfig(predict="z0", loss="l1"),
    image_size=16,
)


def test_a_model_of_our_own_is_read_as_official(shaken: Any, tmp_path: Path) -> None:
    model = shaken(LatentDiffusion(OWN)).eval()
    model.autoencoder.scale.fill_(0.37)
    interop.save_compvis(model, tmp_path / "own.safetensors")
    again = interop.load_compvis(tmp_path / "own.yaml", tmp_path / "own.safetensors")
    assert again.config == replace(
        OWN, conditioner=replace(again.config.conditioner)
    )  # its classes are numbers, one more for "no class"
    assert len(again.config.conditioner.classes) == 3
    options = {"steps": 3, "seed": 0, "eta": 1.0}
    assert torch.equal(again.sample(["0", "1"], **options), model.sample(["a", "b"], **options))


TEXTS = {
    "text": {"kind": "text", "vocab_size": 40, "length": 9},
    "layout": {"kind": "layout", "classes": ("a", "b"), "grid": 4, "max_boxes": 2},
    "ids": {"kind": "ids", "vocab_size": 40, "length": 9, "p_uncond": 0.0},
}


@pytest.mark.parametrize("kind", TEXTS)
@torch.no_grad()
def test_tokens_come_out_as_numbers(kind: str, shaken: Any, tmp_path: Path) -> None:
    config = replace(OWN, conditioner=ConditionerConfig(d_cond=32, **TEXTS[kind]))
    model = shaken(LatentDiffusion(config)).eval()
    interop.save_compvis(model, tmp_path / "own.ckpt")
    again = interop.load_compvis(tmp_path / "own.yaml", tmp_path / "own.ckpt")
    read = again.config.conditioner
    assert read.kind == "ids"
    ids = torch.arange(read.length)[None] % read.vocab_size
    assert torch.equal(again.conditioner.network(ids), model.conditioner.network(ids))


def test_tokens_beside_a_picture_are_hybrid(shaken: Any, tmp_path: Path, randn: Any) -> None:
    for concat, beside in (("low_res", 3), ("inpaint", 4)):
        conditioner = replace(OWN.conditioner, concat=concat)
        unet = replace(UNET, in_channels=3 + beside)
        model = shaken(LatentDiffusion(replace(OWN, conditioner=conditioner, unet=unet))).eval()
        interop.save_compvis(model, tmp_path / "own.ckpt")
        again = interop.load_compvis(tmp_path / "own.yaml", tmp_path / "own.ckpt")
        assert again.config.conditioner.concat == concat
        x = randn(1, 3, 16, 16).clamp(-1, 1)
        pictures = (
            {"low_res": x} if concat == "low_res" else {"image": x, "mask": x[:, :1].gt(0).float()}
        )
        ours, read = (
            m.sample({**pictures, "y": [y]}, steps=2, seed=0)
            for m, y in ((model, "b"), (again, "1"))
        )
        assert torch.equal(ours, read)


def test_stable_diffusion_keeps_its_clip(tmp_path: Path) -> None:
    conditioner = ConditionerConfig(
        kind="text", encoder="clip", encoder_path=str(tiny_clip(tmp_path)), d_cond=16, length=10
    )
    unet = replace(UNET, d_cond=16)
    model = LatentDiffusion(replace(OWN, conditioner=conditioner, unet=unet)).eval()
    interop.save_compvis(model, tmp_path / "own.ckpt")
    names = {n for n in read(tmp_path / "own.ckpt") if n.startswith("cond_stage_model.")}
    assert "cond_stage_model.transformer.text_model.final_layer_norm.weight" in names
    assert len(names) == sum(1 for _ in model.conditioner.network.network.parameters())
    (tmp_path / "model.safetensors").unlink()
    again = interop.load_compvis(tmp_path / "own.yaml", tmp_path / "own.ckpt", clip=tmp_path)
    tokens = (m.conditioner({"caption": ["a red dog"]}).tokens for m in (model, again))
    assert torch.equal(*tokens)


@pytest.mark.parametrize("name", ["autoencoder", "unet", "conditioner"])
def test_a_part_is_saved_alone(name: str, shaken: Any, tmp_path: Path) -> None:
    part = getattr(shaken(LatentDiffusion(OWN)).eval(), name)
    interop.save_compvis(part, tmp_path / "part.ckpt")
    again = interop.load_compvis(tmp_path / "part.yaml", tmp_path / "part.ckpt")
    assert type(again) is type(part)
    state = again.state_dict()
    assert all(torch.equal(state[n], t) for n, t in part.state_dict().items())


def own(**changes: Any) -> LatentDiffusion:
    return LatentDiffusion(replace(OWN, **changes))


def shifted() -> LatentDiffusion:
    model = own()
    model.autoencoder.shift.fill_(0.5)
    return model


def scaled() -> Autoencoder:
    model = Autoencoder(OWN.autoencoder)
    model.scale.fill_(0.5)
    return model


TEN = replace(OWN.conditioner, kind="text", vocab_size=40)
REFUSED = {
    "groups": (lambda: own(unet=replace(UNET, groups=8)), r"unet: groups=8 \(only 32\) cannot be"),
    "pixels": (
        lambda: own(autoencoder=replace(OWN.autoencoder, patch=2)),
        r"autoencoder: patch=2 \(only 1\) cannot be expressed",
    ),
    "predicts": (lambda: own(objective=ObjectiveConfig(predict="v")), "predict='v' cannot be"),
    "shift": (shifted, r"autoencoder: shift=0\.5 cannot be expressed"),
    "a scale alone": (scaled, r"shift=0, scale=0\.5 have no place in a first stage alone"),
    "heads": (lambda: own(conditioner=replace(TEN, heads=4)), "heads=4, d_head=64 cannot be"),
    "a reader": (
        lambda: own(
            conditioner=replace(TEN, encoder="minilm", d_cond=384),
            unet=replace(UNET, d_cond=384),
        ),
        "encoder='minilm', .* cannot be expressed in the official code, only 'clip'",
    ),
    "maps and tokens": (
        lambda: own(
            conditioner=replace(OWN.conditioner, concat="semantic", labels=("x",), stages=1),
            unet=replace(UNET, in_channels=6),
        ),
        "concat='semantic' beside kind='class' cannot be",
    ),
    "nothing": (
        lambda: build_conditioner(ConditionerConfig()),
        "this conditioner has no tensors of its own",
    ),
    "first width": (lambda: UNet(replace(UNET, width_mult=(2, 2))), r"channel_mult=\[2, 2\] must"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_official_form_is_refused(case: str, tmp_path: Path) -> None:
    make, said = REFUSED[case]
    model: nn.Module = make()
    with pytest.raises(ValueError, match=said):
        interop.save_compvis(model, tmp_path / "own.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_a_name_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x\.pt must end in \.ckpt or \.safetensors"):
        interop.save_compvis(UNet(UNET), tmp_path / "x.pt")


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, full_disk: Any) -> None:
    path = tmp_path / "own.ckpt"
    interop.save_compvis(UNet(UNET), path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    full_disk(1000)
    with pytest.raises(OSError, match=r"own\.ckpt"):
        interop.save_compvis(UNet(UNET), path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_every_kind_of_condition_is_saved() -> None:
    stages = {path.split("/")[2]: model["cond_stage"]["target"] for path, model in WHOLE.items()}
    assert {stages[name] for name in KINDS} == set(stages.values())
