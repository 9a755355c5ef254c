"""Official models, as github.com/CompVis/latent-diffusion publishes them."""

from minildm.autoencoder import Autoencoder
from minildm.conditioning import Conditioner
from minildm.diffusion import LatentDiffusion
from minildm.interop import compvis_conditioner, compvis_diffusion, compvis_unet
from minildm.interop.compvis_autoencoder import TARGETS, load_autoencoder
from minildm.interop.compvis_conditioner import load_conditioner
from minildm.interop.compvis_diffusion import load_diffusion
from minildm.interop.compvis_unet import load_unet
from minildm.interop.reading import (
    CheckpointLike,
    ConfigLike,
    PathLike,
    read_config,
    read_tensors,
)
from minildm.unet import UNet

KNOWN = (
    compvis_diffusion.TARGET,
    *TARGETS,
    compvis_unet.TARGET,
    *compvis_conditioner.TARGETS,
)


def load_compvis(
    config: ConfigLike,
    checkpoint: CheckpointLike,
    *,
    ema: bool = True,
    clip: PathLike | None = None,
) -> LatentDiffusion | Autoencoder | UNet | Conditioner:
    """An official latent diffusion model, or a part: first stage, UNet, encoder of conditions.

    Whole models: LatentDiffusion, of latent-diffusion and of stable-diffusion v1. First stages:
    AutoencoderKL, VQModel, VQModelInterface, IdentityFirstStage. UNets: UNetModel, as
    `unet_config` names it in a diffusion model's config. Conditions, as `cond_stage_config` does:
    ClassEmbedder, TransformerEmbedder, BERTEmbedder (its words come with the extra `text`),
    SpatialRescaler.

    config: the official YAML, a path or the parsed mapping, whole or from its target on.
    checkpoint: a `.ckpt`, a `.safetensors`, or tensors by their official names. A first stage is
    also found in the checkpoint of a whole latent diffusion model, whose other parts are left;
    UNets and conditions need their tensors by the names in themselves. ema: take the averaged
    weights of a whole model where the checkpoint has them. clip: for Stable Diffusion, the folder
    of CLIP's words and config.json, which are in no checkpoint; CLIP's weights are.

    The result is on the CPU, in float32 whatever the precision stored, in evaluation mode. A file
    in float32 stays mapped into memory: do not write over it while the model lives; training does
    not change it. A whole model's first stage has the scale 1 / scale_factor, of the config or of
    the checkpoint; a first stage alone 1: the factor belongs to the diffusion model.

    Every tensor finds its place and every place its tensor, except the loss's, the averages of
    the weights or what they average, the schedule's (compared with the config's), the colours of
    semantic maps and the scores of next words. Raises ValueError for a config that cannot be
    expressed, CheckpointError (a ValueError) for tensors that do not fit, the first ten listed,
    and for a file that is cut short or would run code: none is run.
    """
    target, params = read_config(config)
    if target not in KNOWN:
        raise ValueError(
            f"{params.where}: target {target!r} is not known; known: {', '.join(KNOWN)}"
        )
    tensors = read_tensors(checkpoint)
    if target == compvis_diffusion.TARGET:
        return load_diffusion(params, tensors, ema=ema, clip=clip)
    if target in TARGETS:
        return load_autoencoder(target, params, tensors)
    if target == compvis_unet.TARGET:
        return load_unet(params, tensors)
    return load_conditioner(target, params, tensors)
