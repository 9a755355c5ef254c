"""Whole samplings of official models against diffusers' networks and scheduler, in float32.

Each published model is narrowed, its weights are drawn by their official names. Ours are loaded
from these; diffusers' own conversion brings the very tensors into its UNet and first stage, its
DDIM walks with the noise that ours drew, and what a condition is, is written out here.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers_copy import error
from published_whole import WHOLE, narrow_whole
from test_interop import in_diffusers
from test_interop_conditioner import encoded
from test_interop_unet import conditional, converted, unconditional
from torch import Tensor

from minildm import LatentDiffusion, interop

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    from diffusers import DDIMScheduler

STEPS, SCALE = 4, 3.0
NAMES = (  # one of each kind
    *("ffhq256", "lsun_churches256", "cin256", "layout2img-openimages256"),
    *("semantic_synthesis256", "bsr_sr", "inpainting_big"),
)
PATHS = {name: f"models/ldm/{name}/config.yaml" for name in NAMES}
PATHS |= {
    name: f"configs/latent-diffusion/{name}.yaml" for name in ("cin256-v2", "txt2img-1p4B-eval")
}


class Theirs:
    """diffusers' parts of a whole official checkpoint."""

    def __init__(
        self, model: Mapping[str, Any], config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> None:
        self.tensors, params = tensors, config["model"]["params"]
        unet_params = params["unet_config"]["params"]
        unet = self.part("model.diffusion_model.")
        self.unet = (conditional if "context_dim" in unet_params else unconditional)(unet_params)
        self.unet.load_state_dict(converted(unet_params, unet))
        self.unet.eval()
        self.vae = in_diffusers(model["first_stage"], self.part("first_stage_model."))
        self.scale_factor = float(tensors.get("scale_factor", params["scale_factor"]))
        self.scheduler = DDIMScheduler(
            num_train_timesteps=params["timesteps"],
            beta_start=params["linear_start"],
            beta_end=params["linear_end"],
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            timestep_spacing="leading",
        )

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {n[len(prefix) :]: t for n, t in self.tensors.items() if n.startswith(prefix)}

    def eps(self, z: Tensor, t: Tensor, c: tuple[Tensor | None, Tensor | None]) -> Tensor:
        tokens, beside = c
        z = z if beside is None else torch.cat([z, beside], dim=1)
        return self.unet(z, t, *([] if tokens is None else [tokens])).sample

    def sample(self, c: Any, c_null: Any, noise: list[Tensor]) -> tuple[Tensor, Tensor]:
        z = noise[0]
        self.scheduler.set_timesteps(STEPS)
        for t, drawn in zip(self.scheduler.timesteps, noise[1:], strict=True):
            eps = self.eps(z, t, c)
            if c_null is not None:
                eps_null = self.eps(z, t, c_null)
                eps = eps_null + SCALE * (eps - eps_null)
            z = self.scheduler.step(eps, t, z, eta=1.0, variance_noise=drawn).prev_sample
        return z, self.vae.decode(z / self.scale_factor).sample


def classes(theirs: Theirs, draw: Any) -> tuple[Any, Any, Any]:
    table = theirs.tensors["cond_stage_model.embedding.weight"]
    null = (table[1000:].expand(2, 1, -1), None) if len(table) == 1001 else None
    return [7, 999], (table[[7, 999]][:, None], None), null


def captions(theirs: Theirs, draw: Any) -> tuple[Any, Any, Any]:
    """As everybody's uncased BERT numbers them, between 101 and 102, padded with 0."""
    ids = torch.zeros(2, 77, dtype=torch.int64)
    ids[:, :4] = torch.tensor([[101, 1037, 3899, 102], [101, 102, 0, 0]])
    tokens = encoded(theirs.part("cond_stage_model."), ids, depth=1).float()
    return ["a dog", ""], (tokens, None), (tokens[1:].expand(2, -1, -1), None)


def numbers(theirs: Theirs, draw: Any) -> tuple[Any, Any, Any]:
    ids = (draw(2, 92).abs() * 1000).long()
    return ids, (encoded(theirs.part("cond_stage_model."), ids, depth=1).float(), None), None


def maps(theirs: Theirs, draw: Any) -> tuple[Any, Any, Any]:
    labels = (draw(2, 32, 32).abs() * 50).long().clamp(max=181)
    shares = F.one_hot(labels, 182).permute(0, 3, 1, 2).float()
    for _ in range(2):
        shares = F.interpolate(shares, scale_factor=0.5, mode="bilinear")
    beside = F.conv2d(shares, theirs.tensors["cond_stage_model.channel_mapper.weight"])
    return labels, (None, beside), None


def low_resolution(theirs: Theirs, draw: Any) -> tuple[Any, Any, Any]:
    x = draw(2, 3, 8, 8).clamp(-1, 1)
    return x, (None, x), None


def holes(theirs: Theirs, draw: Any) -> tuple[Any, Any, Any]:
    """The official script: the hole black, and 1 in a mask that is brought to [-1, 1]."""
    x, known = draw(2, 3, 32, 32).clamp(-1, 1), (draw(2, 1, 32, 32, seed=9) > 0).float()
    black = ((x + 1) / 2 * known) * 2 - 1
    hole = F.interpolate(1 - known, size=(8, 8)) * 2 - 1
    z = theirs.vae.encode(black).latents
    return {"image": x, "mask": known}, (None, torch.cat([z, hole], dim=1)), None


CONDITIONS: dict[str, Callable[..., tuple[Any, Any, Any]]] = {
    "class_label": classes,
    "caption": captions,
    "coordinates_bbox": numbers,
    "segmentation": maps,
    "LR_image": low_resolution,
    "masked_image": holes,
}


def ours(model: LatentDiffusion, y: Any, guided: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Latents, pictures, and the noise that was drawn."""
    draw, past = torch.Generator().manual_seed(3), []

    def noise(like: Tensor) -> Tensor:
        past.append(torch.randn(like.shape, generator=draw))
        return past[-1]

    side = model.autoencoder.f * 2 ** max(3, len(model.config.unet.width_mult) - 1)
    options = {"steps": STEPS, "eta": 1.0, "size": side, "n": 2, "noise": noise}
    *_, last = model.steps(y, guidance_scale=SCALE if guided else 1.0, **options)
    return last.z, model.autoencoder.decode(last.z), past


@pytest.mark.parametrize("name", PATHS)
@torch.no_grad()
def test_a_whole_sampling_is_theirs(name: str, randn: Any) -> None:
    official = WHOLE[PATHS[name]]
    config, tensors = narrow_whole(official)
    model, theirs = interop.load_compvis(config, tensors), Theirs(official, config, tensors)
    y, c, c_null = None, (None, None), None
    if official["cond_stage"]["target"] != "__is_unconditional__":
        y, c, c_null = CONDITIONS[official["cond_stage_key"]](theirs, randn)
    z, x, noise = ours(model, y, c_null is not None)
    their_z, their_x = theirs.sample(c, c_null, noise)
    assert z.std() > 0.1
    assert error(z, their_z) < 1e-4
    assert error(x, their_x) < 1e-4
