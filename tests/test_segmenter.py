"""The judge of maps: shapes, what agreement counts, a training that learns, what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minildm import PRESETS, ScenesDataset, load_model, train_judge
from minildm.experiments import DataConfig, JudgeExperiment, TrainConfig
from minildm.segmenter import Segmenter, SegmenterConfig, agreement, roughened, segmented

SMALL = SegmenterConfig(labels=("sky", "grass", "dog"), width=8, width_mult=(1, 2))


def test_it_answers_for_each_pixel_and_sees_as_far_as_its_levels() -> None:
    torch.manual_seed(0)
    model, x = Segmenter(SMALL).eval(), torch.rand(2, 3, 16, 24) * 2 - 1
    assert model(x).shape == (2, 3, 16, 24)
    with torch.no_grad():
        other = x.clone()
        other[:, :, 0, 0] = 1
        changed = (model(x) - model(other)).abs().amax(1) > 1e-6
    assert changed[:, 0, 0].all() and changed[:, 8, 8].all()  # norms and levels reach that far
    assert torch.equal(segmented(model, x), model(x).argmax(1))


def test_agreement_counts_pixels_and_labels() -> None:
    """By hand: one map with a sky of 12 pixels and a dog of 4, half of which is found."""
    asked = torch.zeros(1, 4, 4, dtype=torch.int64)
    asked[0, :2, :2] = 2
    found = asked.clone()
    found[0, 0, :2] = 0
    pixels, iou = agreement(found, asked)
    assert pixels.tolist() == [14 / 16]
    assert torch.allclose(iou, torch.tensor([(12 / 14 + 2 / 4) / 2]))
    assert torch.equal(torch.stack(agreement(asked, asked)), torch.ones(2, 1))
    found[0, 3, 3] = 1  # a label that nobody asked for counts against the sky alone
    assert torch.allclose(agreement(found, asked)[1], torch.tensor([(11 / 14 + 2 / 4) / 2]))


def test_roughened_pictures_stay_near() -> None:
    x = torch.rand(64, 3, 16, 16) * 2 - 1
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        out = roughened(x)
    assert out.shape == x.shape and 0.01 < (out - x).square().mean() < 0.3


def test_it_learns_scenes_and_loads_again(tmp_path: Path) -> None:
    scenes = ScenesDataset("train", 32, n=48)
    train = TrainConfig(steps=60, batch_size=8, lr=1e-2, warmup_steps=5, precision="fp32")
    experiment = JudgeExperiment(
        train=train, data=DataConfig(kind="scenes", size=32), width=8, maps=True
    )
    run = train_judge(experiment, scenes, run_dir=tmp_path / "run", device="cpu")
    losses = [record.terms["loss"] for record in run]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    model = load_model(tmp_path / "run", kind="segmenter")
    items = [scenes[i] for i in range(16)]
    x, maps = (torch.stack([item[key] for item in items]) for key in ("image", "semantic"))
    right, chance = (agreement(segmented(model, x), m)[0].mean() for m in (maps, maps.roll(1, 0)))
    assert right > chance + 0.1


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="sides that 4 divides"):
        Segmenter(SMALL)(torch.zeros(1, 3, 16, 18))
    with pytest.raises(ValueError, match=r"maps must both be \(N, H, W\)"):
        agreement(torch.zeros(1, 4, 4).long(), torch.zeros(1, 4, 5).long())
    with pytest.raises(ValueError, match="width=12 must be a multiple of 8"):
        replace(SMALL, width=12)
    with pytest.raises(ValueError, match="at least one class"):
        replace(SMALL, labels=())
    with pytest.raises(ValueError, match="two judges"):
        replace(PRESETS["scenes-segmenter"], crops=True)
    with pytest.raises(ValueError, match=r"maps=True needs data.kind='scenes'"):
        replace(PRESETS["scenes-segmenter"], data=DataConfig())
