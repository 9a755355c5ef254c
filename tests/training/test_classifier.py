"""Classifier and segmenter: they learn what is visible, and count agreement."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import randn
from torch import Tensor

from minildm.data.scenes import ScenesDataset
from minildm.layers import BatchRandom
from minildm.training.checkpoint import load_model
from minildm.training.classifier import (
    QUESTIONS,
    Classifier,
    ClassifierConfig,
    SegmenterConfig,
    agreement,
    correct,
    moved,
    segmented,
    soften,
)
from minildm.training.configs import ClassifierExperiment, DataConfig, TrainConfig
from minildm.training.stages import train_classifier

NAMES = {"labels": ("dark", "light", "grey"), "groups": ("a", "b"), "styles": ("s",)}
CONFIG = ClassifierConfig(**NAMES, channels=8)


def rng(seed: int = 0) -> BatchRandom:
    return BatchRandom(torch.Generator().manual_seed(seed))


def squares(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images with a dark or a light square on white, and which it is."""
    label = torch.arange(n) % 2
    x = torch.ones(n, 3, 16, 16)
    x[:, :, 4:12, 4:12] = (label.float() - 0.9).view(-1, 1, 1, 1)
    return x + 0.05 * randn(*x.shape, seed=seed), label


def test_it_learns_two_classes() -> None:
    x, label = squares(32, seed=0)
    batch = {"image": x, "label": label, "group": label, "style": torch.zeros(32).long()}
    model = Classifier(CONFIG)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(40):
        optimizer.zero_grad()
        model.loss(batch, rng(step))["loss"].backward()
        optimizer.step()
    model.eval()
    x, label = squares(300, seed=1)
    assert correct(model, x, label, "label").float().mean() > 0.98
    assert correct(model, x, 1 - label).float().mean() < 0.02  # "group" by default


def test_the_loss_is_the_sum_of_its_questions() -> None:
    model, x = Classifier(CONFIG).eval(), randn(4, 3, 16, 16)
    truth = torch.tensor([0, 1, 1, 0])
    batch = {"image": x, "label": truth, "group": truth, "style": torch.zeros(4).long()}
    terms, drawn = model.loss(batch, rng()), rng()
    logits = model(soften(moved(x, drawn), drawn))
    for question in QUESTIONS:
        logp = F.log_softmax(logits[question], dim=1)
        picked = logp.gather(1, batch[question][:, None])[:, 0]
        expected = -(0.9 * picked + 0.1 * logp.mean(dim=1)).mean()
        assert torch.allclose(terms[question], expected, atol=1e-6)
    assert torch.allclose(terms["loss"], sum(terms[q] for q in QUESTIONS))


def test_augmentation_shifts_zooms_and_blurs_on_white() -> None:
    white, black = torch.ones(50, 3, 16, 16), torch.full((200, 3, 16, 16), -1.0)
    assert torch.allclose(moved(white, rng()), white, atol=1e-6)
    out = moved(black, rng())
    assert out.min() >= -1 - 1e-5
    assert 0.9 < out.max() <= 1 + 1e-5  # what enters is white
    assert (out[:, :, 8, 8] + 1).abs().max() < 1e-5  # the middle stays inside
    assert len(out.unique(dim=0)) > 150
    noise = soften(white, rng()) - 1
    assert noise.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.3)  # 0.1 U times normal


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


def test_a_segmenter_learns_scenes_and_loads(tmp_path: Path) -> None:
    scenes = ScenesDataset("train", 32, n=32)
    train = TrainConfig(steps=50, batch_size=8, lr=1e-2, warmup_steps=5, precision="fp32")
    data = DataConfig(kind="scenes", size=32)
    experiment = ClassifierExperiment(train=train, data=data, channels=8, maps=True)
    list(train_classifier(experiment, scenes, run_dir=tmp_path, device="cpu"))
    model = load_model(tmp_path, kind="segmenter")
    items = [scenes[i] for i in range(16)]
    x, maps = (torch.stack([item[key] for item in items]) for key in ("image", "semantic"))
    right, chance = (agreement(segmented(model, x), m)[0].mean() for m in (maps, maps.roll(1, 0)))
    assert right > chance + 0.1


@pytest.mark.parametrize("changes", [{"channels": 12}, {"labels": ()}, {"channel_mult": ()}])
def test_impossible_configs_are_refused(changes: dict) -> None:
    with pytest.raises(ValueError, match="must be a multiple of 8"):
        replace(SegmenterConfig(labels=("sky",), channels=8), **changes)
