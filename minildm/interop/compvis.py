"""Official models, as github.com/CompVis/latent-diffusion publishes them."""

from minildm.autoencoder import Autoencoder
from minildm.conditioning import Conditioner
from minildm.interop import compvis_conditioner, compvis_unet
from minildm.interop.compvis_autoencoder import TARGETS, load_autoencoder
from minildm.interop.compvis_conditioner import load_conditioner
from minildm.interop.compvis_unet import load_unet
from minildm.interop.reading import CheckpointLike, ConfigLike, read_config, read_tensors
from minildm.unet import UNet

KNOWN = (*TARGETS, compvis_unet.TARGET, *compvis_conditioner.TARGETS)
NOT_YET = ("ldm.models.diffusion.ddpm.LatentDiffusion",)


def load_compvis(
    config: ConfigLike, checkpoint: CheckpointLike
) -> Autoencoder | UNet | Conditioner:
    """An official first stage, UNet, or encoder of conditions.

    First stages: AutoencoderKL, VQModel, VQModelInterface, IdentityFirstStage. UNets: UNetModel,
    as `unet_config` names it in a diffusion model's config. Conditions, as `cond_stage_config`
    does: ClassEmbedder, TransformerEmbedder, BERTEmbedder (its words come with the extra `text`),
    SpatialRescaler.

    config: the official YAML, a path or the parsed mapping, whole or from its target on.
    checkpoint: a `.ckpt`, a `.safetensors`, or tensors by their official names. A first stage is
    also found in the checkpoint of a whole latent diffusion model, whose other parts are left;
    the others need their tensors by the names in themselves. The result is on the CPU, in float32
    whatever the precision stored, in evaluation mode. A file in float32 stays mapped into memory:
    do not write over it while the model lives; training does not change it. A first stage's
    `scale` stays 1: the official scale_factor belongs to the diffusion model's config.

    Every tensor finds its place and every place its tensor, except the loss's, the averages of
    the weights, the colours of semantic maps and the scores of next words. Raises ValueError for
    a config that cannot be expressed, CheckpointError (a ValueError) for tensors that do not fit,
    the first ten listed, and for a file that is cut short or would run code: none is run.
    """
    target, params = read_config(config)
    if target not in KNOWN:
        later = " is not read yet" if target in NOT_YET else " is not known"
        raise ValueError(f"{params.where}: target {target!r}{later}; known: {', '.join(KNOWN)}")
    tensors = read_tensors(checkpoint)
    if target in TARGETS:
        return load_autoencoder(target, params, tensors)
    if target == compvis_unet.TARGET:
        return load_unet(params, tensors)
    return load_conditioner(target, params, tensors)
