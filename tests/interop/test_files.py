"""Files of every kind and age are read, nothing in a pickle runs, models are converted."""

import pickle
import shutil
import subprocess
import sys
import types
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import randn, shaken
from interop import diffusers_models as tiny
from interop.diffusers_models import error
from interop.official_models import KL, UNET, same, saved
from safetensors.torch import load_file, save_file
from torch import Tensor

from minildm import interop
from minildm.compression.autoencoder import Autoencoder
from minildm.diffusion.latent_diffusion import LatentDiffusion, LatentDiffusionConfig
from minildm.training.checkpoint import CheckpointError, load_model, save_model

WEIGHTS = "diffusion_pytorch_model.safetensors"

# --- official checkpoints ---


@pytest.fixture
def stage(tmp_path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The official config and tensors of a first stage."""
    return saved(shaken(Autoencoder(KL)), tmp_path)


def legacy(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


FORMATS: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    "model.ckpt": lambda tensors, path: torch.save({"state_dict": tensors, "epoch": 3}, path),
    "old.ckpt": legacy,
    "model.safetensors": save_file,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_and_a_damaged_one_is_named(
    name: str, stage: Any, tmp_path: Path
) -> None:
    (part, tensors), path, config = stage, tmp_path / name, tmp_path / "config.yaml"
    FORMATS[name](tensors, path)
    config.write_text(yaml.safe_dump({"model": part, "data": {"target": "anything"}}))
    model = interop.load_compvis(config, path)
    assert torch.equal(model.encoder.to_moments.bias, tensors["quant_conv.bias"])
    before = path.read_bytes()
    for size in (0, 3, 100, len(before) // 2, len(before) - 1):
        path.write_bytes(before[:size])
        with pytest.raises(CheckpointError, match=f"{name} is cut short"):
            interop.load_compvis(part, path)


@pytest.mark.parametrize(
    "save", [torch.save, legacy, lambda c, path: path.write_bytes(pickle.dumps(c))]
)
def test_code_in_a_pickle_does_not_run(
    save: Callable[..., None], stage: Any, tmp_path: Path
) -> None:
    path, sprung = tmp_path / "evil.ckpt", tmp_path / "sprung"
    trap = type("Trap", (), {"__reduce__": lambda _: (Path.mkdir, (sprung,))})
    save({"state_dict": stage[1], "callbacks": trap()}, path)
    with pytest.raises(CheckpointError, match=r"evil\.ckpt is .* nothing was run") as raised:
        interop.load_compvis(stage[0], path)
    assert not sprung.exists()
    assert "safe_globals" not in str(raised.value)  # torch's advice, which is how to run it


def test_what_lightning_leaves_is_inert(
    stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module: Any = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, name, module)
    made = module.ModelCheckpoint()
    made.best = 3
    callbacks = {module.ModelCheckpoint: {"best": np.float64(0.25), "callback": made}}
    path = tmp_path / "lightning.ckpt"
    legacy({"callbacks": callbacks, "state_dict": stage[1]}, path)
    # As NumPy 1 wrote it: the module has moved since.
    path.write_bytes(path.read_bytes().replace(b"numpy._core.multi", b"numpy.core.multi"))
    monkeypatch.delitem(sys.modules, name)
    interop.load_compvis(stage[0], path)
    sprung = tmp_path / "sprung"
    objects = (np.float64(0.5), np.zeros(2), Path("runs"), Namespace(a=1), defaultdict(list, a=[1]))
    trap = type("Trap", (), {"__reduce__": lambda _: (subprocess.Popen, (["touch", sprung],))})
    new = tmp_path / "new.ckpt"
    torch.save({"hyper_parameters": [*objects, trap()], "state_dict": stage[1]}, new)
    model = interop.load_compvis(stage[0], new)
    assert torch.equal(model.encoder.to_moments.bias, stage[1]["quant_conv.bias"])
    assert not sprung.exists()
    with pytest.raises(pickle.UnpicklingError):  # allowed for our reading alone
        torch.load(path, weights_only=True)


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_what_surrounds_the_tensors_is_left_out(prefix: str, stage: Any) -> None:
    config, wanted = stage[0], interop.load_compvis(*stage).state_dict()
    tensors = {prefix + name: tensor for name, tensor in stage[1].items()}
    tables = ("ddim_sigmas", "ddim_alphas_prev", "betas", "sqrt_alphas_cumprod")  # of samplers
    for content in (
        tensors | dict.fromkeys(tables, torch.ones(9)),
        {f"module.{name}": tensor for name, tensor in tensors.items()},
        {name.replace("encoder.", "encoder._orig_mod."): v for name, v in tensors.items()},
        {"model": tensors, "global_step": 3},
        tensors | {"global_step": 3},
    ):
        assert same(interop.load_compvis(config, content).state_dict(), wanted)


# --- diffusers folders ---


@torch.no_grad()
def test_linear_layers_depth_and_heads_per_level_are_read(tmp_path: Path) -> None:
    z, t, tokens = randn(2, 3, 8, 8), torch.tensor([3, 700]), randn(2, 7, 5, seed=1)
    changes = {"use_linear_projection": True, "transformer_layers_per_block": 2}
    theirs = tiny.unet(cross_attention_dim=5, attention_head_dim=[2, 4], **changes)
    theirs.save_pretrained(tmp_path / "linear")
    ours = interop.load_diffusers(tmp_path / "linear")
    assert (ours.config.d_head, ours.config.heads, ours.config.depth) == (4, None, 2)
    assert error(ours(z, t, tokens), theirs(z, t, tokens).sample) < 1e-5
    theirs = tiny.unet(attention_head_dim=None)
    theirs.save_pretrained(tmp_path / "one head")
    assert error(interop.load_diffusers(tmp_path / "one head")(z, t), theirs(z, t).sample) < 1e-5


def test_names_of_the_first_year_pickles_and_half_precision_are_read(tmp_path: Path) -> None:
    tiny.first_stage("AutoencoderKL").save_pretrained(tmp_path)
    state, path = interop.load_diffusers(tmp_path).state_dict(), tmp_path / WEIGHTS
    tensors = load_file(path)
    save_file({n: t.half() for n, t in tensors.items()}, path.with_suffix(".fp16.safetensors"))
    assert same(interop.load_diffusers(tmp_path).state_dict(), state)  # the precise one
    path.unlink()
    rounded = interop.load_diffusers(tmp_path).state_dict()["encoder.conv_in.weight"]
    assert torch.equal(rounded, tensors["encoder.conv_in.weight"].half().float())
    was = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in was.items():
        tensors = {name.replace(f".{new}.", f".{old}."): v for name, v in tensors.items()}
    torch.save(tensors, path.with_suffix(".bin"))
    assert same(interop.load_diffusers(tmp_path).state_dict(), state)


def test_weights_in_several_files_are_read(tmp_path: Path) -> None:
    tiny.unet().save_pretrained(tmp_path / "one")
    tiny.unet().save_pretrained(tmp_path, max_shard_size=20_000)
    one, several = (interop.load_diffusers(folder) for folder in (tmp_path / "one", tmp_path))
    assert same(one.state_dict(), several.state_dict())
    next(tmp_path.glob("*-00002-of-*")).unlink()
    with pytest.raises(CheckpointError, match=r"-00002-of-.* is missing"):
        interop.load_diffusers(tmp_path)


# --- from one form to another ---


@pytest.mark.parametrize(("form", "name"), [("diffusers", "theirs"), ("compvis", "model.ckpt")])
def test_there_and_back_is_the_same_model(form: str, name: str, tmp_path: Path) -> None:
    config = LatentDiffusionConfig(autoencoder=KL, unet=UNET, image_size=16)
    model, folder = shaken(LatentDiffusion(config)).eval(), tmp_path / "ours"
    model.autoencoder.scale.fill_(1.7)
    save_model(model.autoencoder, folder / "first_stage")
    save_model(model, folder, first_stage="first_stage")
    assert interop.convert(folder, tmp_path / name, to=form) == ("minildm", form)
    assert interop.convert(tmp_path / name, tmp_path / "back") == (form, "minildm")
    shutil.move(tmp_path / "back", tmp_path / "elsewhere")  # the folder is complete
    options = {"n": 2, "steps": 3, "seed": 1}
    images, same = (m.sample(**options) for m in (model, load_model(tmp_path / "elsewhere")))
    assert torch.allclose(images, same, atol=1e-5) and images.std() > 0.01
    with pytest.raises(FileExistsError, match="already exists"):
        interop.convert(folder, tmp_path / name, to=form)
