"""Evaluate any trained model in one call, as `minildm evaluate` does."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from minildm.compression.autoencoder import Autoencoder
from minildm.data.emoji import EmojiDataset
from minildm.evaluation import following, restoration
from minildm.evaluation.distribution import evaluate_first_stage
from minildm.evaluation.intervals import Evaluation
from minildm.training.checkpoint import pretrained
from minildm.training.classifier import Classifier, Segmenter
from minildm.training.configs import DataConfig


def evaluate_model(
    model: nn.Module,
    *,
    data: DataConfig | None = None,
    classifier: nn.Module | None = None,
    per_class: int = 24,
    n: int = 128,
    guidance_scale: Sequence[float] = (3.0,),
    seed: int = 0,
    **sampling: Any,
) -> dict[str, Evaluation]:
    """Evaluate a first stage, a diffusion model or a classifier on held-out data.

    data: of a first stage; the others bring their own. classifier: default, the shipped one of
    the task. per_class, n: samples of each class, or in all. Models of classes, captions and
    layouts are evaluated at each guidance scale. Raises ValueError where nothing can tell.
    """
    if isinstance(model, Autoencoder):
        held_out = (data or DataConfig()).dataset("val")
        clusters = getattr(held_out, "photo_ids", None)  # crops of one photograph
        found = evaluate_first_stage(model, held_out.images, clusters=clusters, seed=seed)
        return {held_out.name: found}
    if isinstance(model, Classifier):
        return {"held-out images": following.evaluate_classifier(model)}
    if isinstance(model, Segmenter):
        return {"held-out scenes": restoration.evaluate_segmenter(model, n)}
    sampling, kind = {"seed": seed, **sampling}, model.config.conditioner.kind
    if kind in ("low_res", "inpaint"):
        _, x = following.emoji_prompts(EmojiDataset("val", model.config.image_size), n, seed=seed)
        return restoration.evaluate_restoration(model, x, **sampling)
    names = {"layout": "scenes-classifier", "semantic": "scenes-segmenter"}
    judge = classifier or pretrained(names.get(kind, "emoji-classifier")).to(model.device)
    if kind == "semantic":
        return {"held-out scenes": restoration.evaluate_semantic(model, judge, n, **sampling)}
    found = {}
    for scale in guidance_scale:
        options, key = {"guidance_scale": scale, **sampling}, f"guidance {scale:g}"
        if kind == "class":
            found[key] = following.evaluate_classes(model, judge, per_class, **options)
        elif kind == "layout":
            found[key] = following.evaluate_layout(model, judge, n, **options)
        elif kind in ("text", "frozen_text"):
            for styled in (False, True):
                name = f"{'styled' if styled else 'plain'}, {key}"
                found[name] = following.evaluate_text(model, judge, n, styled=styled, **options)
        else:
            raise ValueError(f"a model with the condition {kind!r} has nothing to evaluate it by")
    return found
