"""Official models, as github.com/CompVis/latent-diffusion publishes them."""

from minildm.autoencoder import Autoencoder
from minildm.interop.compvis_autoencoder import TARGETS, load_autoencoder
from minildm.interop.reading import CheckpointLike, ConfigLike, read_config, read_tensors

NOT_YET = (
    "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    "ldm.models.diffusion.ddpm.LatentDiffusion",
)


def load_compvis(config: ConfigLike, checkpoint: CheckpointLike) -> Autoencoder:
    """An official first stage: AutoencoderKL, VQModel, VQModelInterface, IdentityFirstStage.

    config: the official YAML, a path or the parsed mapping, whole or from its target on.
    checkpoint: a `.ckpt`, a `.safetensors`, or tensors by their official names; that of a whole
    latent diffusion model does too, its other parts are left. The result is on the CPU, in
    float32 whatever the precision stored, in evaluation mode. A file in float32 stays mapped into
    memory: do not write over it while the model lives; training does not change it. `scale` stays
    1: the official scale_factor belongs to the diffusion model's config, not to the first stage's.

    Every tensor finds its place and every place its tensor, except the loss's, the averages of
    the weights and the colours of semantic maps. Raises ValueError for a config that cannot be
    expressed, CheckpointError (a ValueError) for tensors that do not fit, the first ten listed,
    and for a file that is cut short or would run code: none is run.
    """
    target, params = read_config(config)
    if target not in TARGETS:
        later = " is not read yet" if target in NOT_YET else " is not known"
        raise ValueError(f"{params.where}: target {target!r}{later}; known: {', '.join(TARGETS)}")
    return load_autoencoder(target, params, read_tensors(checkpoint))
