"""What a task needs of the data: classes, objects, labels, words; and the pictures themselves."""

from torch.utils.data import Dataset

from minildm.autoencoder import AutoencoderConfig
from minildm.data.variants import style_caption
from minildm.diffusion import LatentDiffusionConfig
from minildm.experiments import LatentDiffusionExperiment
from minildm.tokenizer import CaptionTokenizer

# What a task needs of the pictures themselves, beside their latents
PAINTED = {"none": (), "low_res": ("image",), "inpaint": ("image",), "semantic": ("semantic",)}


def conditioned_on(
    experiment: LatentDiffusionExperiment, autoencoder: AutoencoderConfig, data: Dataset
) -> tuple[LatentDiffusionConfig, CaptionTokenizer | None]:
    """The model's config, with what the data know of classes and words, and its tokenizer.

    The vocabulary is that of the captions, and the styles' names where training uses them.
    """
    conditioner, known = experiment.conditioner, {}
    if conditioner.concat == "semantic":
        if not hasattr(data, "semantic_classes"):
            raise ValueError(f"data {data.name!r} has no semantic maps; they belong to scenes")
        known["labels"] = data.semantic_classes
    if conditioner.kind == "layout":
        if not hasattr(data, "objects"):
            raise ValueError(f"data {data.name!r} has no boxes; a layout needs scenes")
        return experiment.model_config(autoencoder, data.objects, **known), None
    if conditioner.kind != "text" or conditioner.encoder != "trained":
        return experiment.model_config(autoencoder, tuple(data.classes), **known), None
    captions = captions_of(data)
    if experiment.data.style_words:
        captions += [style_caption("", style) for style in data.styles]
    tokenizer = CaptionTokenizer.trained_on(captions)
    known["vocab_size"] = len(tokenizer)
    return experiment.model_config(autoencoder, **known), tokenizer


def captions_of(data: Dataset) -> list[str]:
    """Every caption of a data set, without decoding its pictures where it offers that."""
    captions = getattr(data, "captions", None)
    if captions is not None:
        return list(captions)
    item = getattr(data, "without_image", data.__getitem__)
    return [item(i)["caption"] for i in range(len(data))]
