"""Classifier and segmenter: they learn what is visible, and count agreement."""

from pathlib import Path

import pytest
import torch
from helpers import TinyImages
from training.trainings import CLASSIFIER

from minildm.data.dataset import as_float
from minildm.data.scenes import ScenesDataset
from minildm.training.checkpoint import load_model
from minildm.training.classifier import agreement, logits_of
from minildm.training.configs import DataConfig


def test_a_classifier_learns_three_colours(tmp_path: Path) -> None:
    experiment, val = CLASSIFIER.changed(steps=40, save_every=40, batch_size=16), TinyImages(30)
    *_, last = CLASSIFIER(tmp_path, experiment, data=TinyImages(48))
    assert last.terms["loss"] == pytest.approx(
        sum(last.terms[q] for q in ("label", "group", "style"))
    )
    logits = logits_of(load_model(tmp_path, kind="classifier"), as_float(val.images))
    for question in ("label", "group"):
        right = logits[question].argmax(dim=1) == val.columns[question]
        assert right.float().mean() > 0.9


def test_a_segmenter_learns_scenes(tmp_path: Path) -> None:
    scenes, data = ScenesDataset("train", 32, n=32), DataConfig(kind="scenes", size=32)
    changes = {"steps": 50, "save_every": 50, "batch_size": 8}
    list(CLASSIFIER(tmp_path, CLASSIFIER.changed(**changes, data=data), data=scenes))
    model = load_model(tmp_path, kind="segmenter")
    maps = scenes.maps[:16].long()
    found = logits_of(model, as_float(scenes.images[:16])).argmax(1)
    right, chance = (agreement(found, m)[0].mean() for m in (maps, maps.roll(1, 0)))
    assert right > chance + 0.1


def test_agreement_counts_pixels_and_labels() -> None:
    """By hand: one map with a sky of 12 pixels and a dog of 4, half of which is found."""
    maps = torch.zeros(1, 4, 4, dtype=torch.int64)
    maps[0, :2, :2] = 2
    found = maps.clone()
    found[0, 0, :2] = 0
    pixels, iou = agreement(found, maps)
    assert pixels.tolist() == [14 / 16]
    assert torch.allclose(iou, torch.tensor([(12 / 14 + 2 / 4) / 2]))
    found[0, 3, 3] = 1  # a label that is not in the map counts against the sky alone
    assert torch.allclose(agreement(found, maps)[1], torch.tensor([(11 / 14 + 2 / 4) / 2]))
