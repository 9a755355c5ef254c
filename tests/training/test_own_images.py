"""Images of one's own through both stages: a captioned folder, and any torch data set."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_unet_config
from PIL import Image
from torch.utils.data import TensorDataset
from training.trainings import KL, LDM, each

from minildm import TextConfig, load_model, wrap_dataset
from minildm.training.configs import DataConfig

COLORS = ("red", "green", "blue")


def captioned(root: Path, captions: dict[int, str]) -> Path:
    """Twelve squares of one colour each, with captions."""
    root.mkdir()
    for i in range(12):
        Image.new("RGB", (20, 20), COLORS[i % 3]).save(root / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "text": text} for i, text in captions.items()]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def text_experiment(root: Path, length: int = 10) -> Any:
    text = TextConfig(d_cond=8, length=length, depth=1, heads=1, d_head=8)
    data = DataConfig(kind="folder", path=str(root), size=16)
    return LDM.changed(conditioner=text, unet=tiny_unet_config(), data=data)


def test_a_captioned_folder_trains_both_stages_and_may_be_moved(tmp_path: Path) -> None:
    captions = {i: f"a {COLORS[i % 3]} square" for i in range(12)}
    root = captioned(tmp_path / "squares", captions)
    list(KL(tmp_path / "ae", KL.changed(data=text_experiment(root).data), data=None))
    options: dict[str, Any] = {"first_stage": tmp_path / "ae", "data": None}
    list(islice(LDM(tmp_path / "run", text_experiment(root), **options), 3))
    moved = text_experiment(root.rename(tmp_path / "moved"))
    assert [r.step for r in LDM(tmp_path / "run", moved, **options)] == list(range(1, 7))
    model = load_model(tmp_path / "run")
    x = model.sample(["a red square", "a blue square"], steps=2, seed=0)
    assert x.shape == (2, 3, 16, 16) and not model.conditioner.tokenizer.unknown("a green square")


def test_captions_are_checked_before_anything_is_encoded(tmp_path: Path) -> None:
    few = captioned(tmp_path / "few", dict.fromkeys(range(10), "a square"))
    long = captioned(tmp_path / "long", {i: "a b c d e" if i % 4 else "a" for i in range(12)})
    cases = [
        (few, r"\d of \d+ images of 'few-train' have no caption: 1[01]\.png"),
        (long, r"'a b c d e' has 5 tokens, at most 4; \d of \d+ are too long"),
    ]
    for root, said in cases:
        with pytest.raises(ValueError, match=said):
            next(LDM(tmp_path / "run", text_experiment(root, length=6), data=None))


def test_a_wrapped_torch_dataset_trains_both_stages(tmp_path: Path) -> None:
    data = TensorDataset(torch.rand(12, 1, 28, 28), torch.arange(12) % 3)
    wrapped = wrap_dataset(data, 16, classes=COLORS)
    list(KL(tmp_path / "ae", data=wrapped))
    list(LDM(tmp_path / "run", data=wrapped, first_stage=tmp_path / "ae"))
    x = load_model(tmp_path / "run").sample(["red", "blue"], steps=2, seed=0)
    assert x.shape == (2, 3, 16, 16)


@each
def test_another_data_set_is_told_how_to_be_wrapped(training: Any, tmp_path: Path) -> None:
    data = TensorDataset(torch.rand(12, 3, 16, 16), torch.arange(12) % 3)
    with pytest.raises(ValueError, match=r"data=.* must be an ImageDataset: see minildm.wrap_d"):
        next(training(tmp_path, data=data))
