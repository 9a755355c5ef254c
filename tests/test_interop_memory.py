"""A large checkpoint is in memory once: the file is mapped, and read as it is used.

Measured in a process of its own: the most that it held, over what it held before loading.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from published import drawn
from safetensors.torch import save_file

from minildm import PUBLISHED, Autoencoder, LatentDiffusion, LatentDiffusionConfig, UNet, UNetConfig
from minildm.conditioning import build_conditioner
from minildm.interop.compvis_diffusion import diffusion_places
from minildm.interop.compvis_saving import official_diffusion

WIDE = LatentDiffusionConfig(  # some 35 M parameters
    autoencoder=PUBLISHED["ffhq256"].autoencoder,
    unet=UNetConfig(in_channels=3, out_channels=3, width=128, width_mult=(1, 2, 4), d_head=32),
    image_size=256,
)
MEASURE = """
import json, resource, sys
from minildm import interop

def most():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = most()
model = interop.load_compvis(*sys.argv[1:])
held = sum(p.nbytes for p in model.parameters())
print(json.dumps({"more": most() - before, "model": held}))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: Any) -> Path:
    """A checkpoint with averages in the official formats, beside its config."""
    folder = tmp_path_factory.mktemp("large")
    with torch.device("meta"):
        parts = Autoencoder(WIDE.autoencoder), UNet(WIDE.unet)
    conditioner = build_conditioner(WIDE.conditioner)
    first_stage, unet = parts
    first_stage.shift, first_stage.scale = torch.zeros(()), torch.ones(())
    model = LatentDiffusion(WIDE, autoencoder=first_stage, unet=unet, conditioner=conditioner)
    state = model.state_dict()
    shapes = {
        name: tuple(part.shape)
        for ema in (False, True)
        for place in diffusion_places(WIDE, ema=ema)
        for name, part in zip(
            place.theirs, place.split(state[place.ours.removeprefix("model.")]), strict=True
        )
    }
    tensors = drawn(shapes)
    torch.save({"state_dict": tensors}, folder / "model.ckpt")
    save_file(tensors, folder / "model.safetensors")
    config = {"model": official_diffusion(model)}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_a_checkpoint_is_in_memory_once(name: str, files: Path) -> None:
    command = [sys.executable, "-c", MEASURE, files / "config.yaml", files / name]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    measured = json.loads(said)
    file = (files / name).stat().st_size
    assert file > 300e6
    assert measured["model"] < 0.7 * file  # what was averaged is left
    # What is read of the file, and some room: q, k and v that were joined, a tensor at a time.
    assert 0.9 < measured["more"] / measured["model"] < 1.3
