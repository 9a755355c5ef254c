"""A large checkpoint is in memory once: the file is mapped, and read as it is used.

Measured in a process of its own: the most that it held, over what it held before loading.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from minildm import PUBLISHED, Autoencoder, LatentDiffusion, LatentDiffusionConfig, UNet, UNetConfig
from minildm.interop.compvis_diffusion import diffusion_places
from minildm.interop.compvis_saving import official_diffusion
from minildm.interop.places import empty

WIDE = LatentDiffusionConfig(  # some 80 M parameters
    autoencoder=PUBLISHED["ffhq256"].autoencoder,
    unet=UNetConfig(in_channels=3, out_channels=3, width=64, width_mult=(1, 2, 4), d_head=32),
    image_size=256,
)
MEASURE = """
import json, pathlib, resource, sys
from minildm import interop

def most():
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # ru_maxrss begins, there, with what the parent held.
    [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

config, *checkpoints = sys.argv[1:]
before, said = most(), []
for checkpoint in checkpoints:
    model = interop.load_compvis(config, checkpoint)
    held = sum(p.nbytes for p in model.parameters())
    said.append({"more": most() - before, "model": held})
    del model
print(json.dumps(said))
"""


def write_files(folder: Path) -> list[Path]:
    """The config, and a checkpoint with averages in both official formats."""
    first_stage = empty(lambda: Autoencoder(WIDE.autoencoder))
    first_stage.shift, first_stage.scale = torch.zeros(()), torch.ones(())
    model = LatentDiffusion(WIDE, autoencoder=first_stage, unet=empty(lambda: UNet(WIDE.unet)))
    state = model.state_dict()
    tensors = {
        name: torch.full(part.shape, 0.5)
        for ema in (False, True)
        for place in diffusion_places(WIDE, ema=ema)
        for name, part in zip(
            place.theirs, place.split(state[place.ours.removeprefix("model.")]), strict=True
        )
    }
    paths = [folder / name for name in ("config.yaml", "model.ckpt", "model.safetensors")]
    paths[0].write_text(yaml.safe_dump({"model": official_diffusion(model)}))
    torch.save({"state_dict": tensors}, paths[1])
    save_file(tensors, paths[2])
    return paths


def test_a_checkpoint_is_in_memory_once(tmp_path: Path) -> None:
    paths = write_files(tmp_path)
    command = [sys.executable, "-c", MEASURE, *paths]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for path, measured in zip(paths[1:], json.loads(said), strict=True):
        file = path.stat().st_size
        assert file > 300e6
        assert measured["model"] < 0.9 * file  # what was averaged is left
        # What is read of the file, and some room: a tensor at a time, q, k and v that are joined.
        assert 0.8 < measured["more"] / measured["model"] < 1.4
