"""`minildm convert`: the same model in three forms; nothing is lost, nothing overwritten."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from minildm import (
    Autoencoder,
    AutoencoderConfig,
    LatentDiffusion,
    LatentDiffusionConfig,
    UNetConfig,
    cli,
    interop,
    load_model,
    save_model,
)


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    """An unconditional model that all three can express, every weight drawn."""
    first_stage = AutoencoderConfig(z_channels=3, width=32, width_mult=(1, 1), res_blocks=1)
    unet = UNetConfig(
        in_channels=3, out_channels=3, width=32, width_mult=(1, 1), res_blocks=1, attn_levels=(1,)
    )
    config = LatentDiffusionConfig(autoencoder=first_stage, unet=unet, image_size=16)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = LatentDiffusion(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        model.autoencoder.scale.fill_(1.7)
    return model


@pytest.fixture
def ours(model: LatentDiffusion, tmp_path: Path) -> Path:
    save_model(model.autoencoder, tmp_path / "ours/first_stage")
    save_model(model, tmp_path / "ours", first_stage="first_stage")
    return tmp_path / "ours"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["minildm", "convert", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize(("form", "name"), [("diffusers", "theirs"), ("compvis", "model.ckpt")])
def test_there_and_back_is_the_same_model(
    model: LatentDiffusion, ours: Path, tmp_path: Path, form: str, name: str
) -> None:
    there, back = tmp_path / name, tmp_path / "back"
    assert interop.convert(ours, there, to=form) == ("minildm", form)
    assert interop.convert(there, back) == (form, "minildm")
    again = load_model(back)
    picture, same = (m.sample(n=2, steps=3, seed=1) for m in (model, again))
    assert torch.allclose(picture, same, atol=1e-5) and picture.std() > 0.01
    # It stands on its own: the folder can move.
    shutil.move(back, tmp_path / "elsewhere")
    assert torch.equal(load_model(tmp_path / "elsewhere").sample(n=2, steps=3, seed=1), same)


def test_a_first_stage_alone(model: LatentDiffusion, tmp_path: Path) -> None:
    save_model(model.autoencoder, tmp_path / "ours")
    interop.convert(tmp_path / "ours", tmp_path / "vae", to="diffusers")
    interop.convert(tmp_path / "vae", tmp_path / "back")
    again = load_model(tmp_path / "back")
    assert isinstance(again, Autoencoder)
    x = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    with torch.no_grad():
        latents = [m.encode(x, sample=False) for m in (again, model.autoencoder)]
        pairs = [(m.decode(z), z) for m, z in zip((again, model.autoencoder), latents, strict=True)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*pairs, strict=True))


def test_from_the_command_line(
    ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, ours, tmp_path / "a.safetensors", "--to", "compvis") == 0
    assert "(minildm) -> " in capsys.readouterr().out
    (tmp_path / "a.yaml").rename(tmp_path / "b.yaml")
    assert run(monkeypatch, tmp_path / "a.safetensors", tmp_path / "c") == 2
    assert "has no a.yaml or config.yaml beside it" in capsys.readouterr().err
    named = ("--config", tmp_path / "b.yaml")
    assert run(monkeypatch, tmp_path / "a.safetensors", tmp_path / "c", *named) == 0
    assert load_model(tmp_path / "c").config == load_model(ours).config


@pytest.mark.parametrize(
    ("name", "to", "message"),
    [
        ("theirs", None, "to=None: .*ours is minildm's; it can become diffusers, compvis"),
        ("theirs", "minildm", "to='minildm': .*ours is minildm's"),
        ("theirs", "onnx", "to='onnx': .* it can become diffusers, compvis"),
        ("model.bin", "compvis", r"model.bin must end in \.ckpt or \.safetensors"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_left(
    ours: Path, tmp_path: Path, name: str, to: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        interop.convert(ours, tmp_path / name, to=to)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours"]


def test_what_is_there_is_kept(ours: Path, tmp_path: Path) -> None:
    for form, name in (("diffusers", "full"), ("compvis", "full.ckpt")):
        target = tmp_path / name
        if form == "diffusers":
            target.mkdir()
            (target / "mine.txt").write_text("kept")
        else:
            target.write_text("kept")
        with pytest.raises(FileExistsError, match="is there already, and kept"):
            interop.convert(ours, target, to=form)
    assert (tmp_path / "full/mine.txt").read_text() == "kept" == target.read_text()


def test_a_part_that_has_no_folder_of_ours(model: LatentDiffusion, tmp_path: Path) -> None:
    interop.save_diffusers(model.unet, tmp_path / "unet")
    with pytest.raises(ValueError, match="a UNet alone has no folder of ours"):
        interop.convert(tmp_path / "unet", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_options_of_official_files_belong_to_them(ours: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config=.x\.yaml. belongs to an official file"):
        interop.convert(ours, tmp_path / "theirs", to="diffusers", config="x.yaml")
    with pytest.raises(ValueError, match="pretrained model 'nobody' is not known"):
        interop.convert("nobody", tmp_path / "theirs", to="diffusers")
