"""Trainings on captions and layouts, from the first step to a sample; what a broken folder says."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyPictures
from safetensors.torch import load_file
from trainings import DATA, STEPS, Training, identical

from minildm import ConditionerConfig, LatentDiffusion, load_model, save_model
from minildm.checkpoints import CheckpointError
from minildm.tokenizer import CaptionTokenizer
from minildm.training import new_model, with_steps

SMALL = {"d_cond": 8, "depth": 1, "heads": 2, "d_head": 4, "p_uncond": 0.5}
CONDITIONERS = {
    "text": ConditionerConfig(kind="text", length=8, **SMALL),
    "layout": ConditionerConfig(kind="layout", max_boxes=2, grid=5, **SMALL),
    "frozen": ConditionerConfig(
        kind="text", encoder="minilm", length=16, **SMALL | {"d_cond": 384}
    ),
}
ASKED: dict[str, Any] = {
    "text": ["a red square", "a blue square, flat style"],
    "layout": [[("red", (0.1, 0.1, 0.6, 0.7))], [("blue", (0.5, 0.2, 0.9, 0.8))]],
    "frozen": ["a red square", "a blue square, flat style"],
}


class Placed(TinyPictures):
    """The tiny pictures with a caption of several words, and the box of the square."""

    objects = TinyPictures.classes

    def __getitem__(self, i: int) -> dict[str, Any]:
        item = super().__getitem__(i)
        side = len(self.images[i][0])
        ys, xs = (self.images[i] < 255).any(dim=0).nonzero(as_tuple=True)
        box = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / side
        absent = torch.zeros(1, 4)
        return {
            **item,
            "caption": f"a {item['caption']} square",
            "boxes": torch.cat([box[None], absent]),
            "classes": torch.tensor([int(item["label"]), -1]),
        }


@pytest.fixture
def asking(trainings: dict[str, Training]) -> Callable[[str], Training]:
    """`asking(kind)`: the tiny diffusion training with another condition."""

    def make(kind: str) -> Training:
        ldm, conditioner = trainings["ldm"], CONDITIONERS[kind]
        experiment = replace(
            ldm.experiment,
            conditioner=conditioner,
            unet=replace(ldm.experiment.unet, d_cond=conditioner.d_cond),
            data=replace(DATA, style_words=0.5),
        )
        return Training(ldm.start, experiment, {**ldm.options, "data": Placed()})

    return make


@pytest.mark.parametrize("kind", CONDITIONERS)
def test_killed_and_resumed_it_ends_bit_for_bit(
    kind: str, asking: Callable[[str], Training], tmp_path: Path
) -> None:
    training = asking(kind)
    assert len(list(training(tmp_path / "whole"))) == STEPS
    run = training(tmp_path / "broken")
    for _ in range(3):
        next(run)
    run.close()
    with torch.random.fork_rng([]):
        torch.manual_seed(99)  # another process, another random state
        assert [r.step for r in training(tmp_path / "broken")] == [3, 4, 5, 6]
    assert identical(tmp_path / "whole", tmp_path / "broken")
    words = [tmp_path / name / "tokenizer.json" for name in ("whole", "broken")]
    assert [path.exists() for path in words] == [kind == "text"] * 2
    if kind == "text":
        assert words[0].read_bytes() == words[1].read_bytes()


@pytest.mark.parametrize("kind", CONDITIONERS)
def test_what_was_trained_loads_and_samples(
    kind: str, asking: Callable[[str], Training], tmp_path: Path
) -> None:
    list(asking(kind)(tmp_path / "run"))
    one, other = (load_model(tmp_path / "run") for _ in range(2))
    options = {"steps": 2, "guidance_scale": 2.0, "seed": 0}
    x = one.sample(ASKED[kind], **options)
    assert x.shape == (2, 3, 16, 16)
    assert torch.equal(x, other.sample(ASKED[kind], **options))
    swapped = one.sample(ASKED[kind][::-1], **options)
    assert not torch.equal(x, swapped)  # the condition reaches the picture
    save_model(one, tmp_path / "again", first_stage="../first-stage")
    assert torch.equal(load_model(tmp_path / "again").sample(ASKED[kind], **options), x)


def test_training_moves_the_transformer(asking: Callable[[str], Training], tmp_path: Path) -> None:
    for kind in ("text", "layout"):
        list(asking(kind)(tmp_path / kind))
        trained = load_model(tmp_path / kind)
        fresh = new_model(LatentDiffusion, trained.config, asking(kind).experiment.train.seed)
        moved = {
            name: not torch.equal(weight, dict(fresh.conditioner.named_parameters())[name])
            for name, weight in trained.conditioner.named_parameters()
        }
        assert all(moved.values()), (kind, moved)


# --- words ---


def test_the_vocabulary_is_that_of_captions_and_styles(
    asking: Callable[[str], Training], tmp_path: Path
) -> None:
    list(asking("text")(tmp_path / "run"))
    model = load_model(tmp_path / "run")
    known = "a red green blue square , flat style"
    assert not model.conditioner.tokenizer.unknown(known)
    assert model.config.conditioner.vocab_size == len(model.conditioner.tokenizer) == 4 + 8


def test_unknown_words_warn_and_still_sample(
    asking: Callable[[str], Training], tmp_path: Path
) -> None:
    list(asking("text")(tmp_path / "run"))
    model = load_model(tmp_path / "run")
    with pytest.warns(UserWarning, match=r"does not know 'zorgly': read as \[UNK\]"):
        x = model.sample("a zorgly square", n=1, steps=2, seed=0)
    assert x.isfinite().all()
    with pytest.raises(ValueError, match="has 7 tokens, must be at most 6"):
        model.sample("a red red red red red square", steps=2)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "is missing"),
    "cut short": (lambda path: path.write_text(path.read_text()[:100]), "is no tokenizer"),
    "of other words": (
        lambda path: CaptionTokenizer.trained_on(["one", "two"]).save(path),
        "tokenizer has 6 tokens, the model 12",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_tokenizer_is_named(
    case: str, asking: Callable[[str], Training], tmp_path: Path
) -> None:
    list(asking("text")(tmp_path / "run"))
    destroy, said = BROKEN[case]
    destroy(tmp_path / "run/tokenizer.json")
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json.* {said}"):
        load_model(tmp_path / "run")


# --- a start from another task ---


@pytest.mark.parametrize("kind", ["text", "layout"])
def test_a_model_of_another_task_gives_its_unet(
    kind: str, trainings: dict, asking: Callable[[str], Training], tmp_path: Path
) -> None:
    list(trainings["ldm"](tmp_path / "classes"))
    classes, training = load_model(tmp_path / "classes"), asking(kind)
    further = with_steps(training.experiment, 2, lr=1e-9, warmup_steps=0, ema_decay=0.0)
    list(training(tmp_path / "run", further, init=tmp_path / "classes"))
    model = load_model(tmp_path / "run")
    fresh = new_model(LatentDiffusion, model.config, further.train.seed)
    for (name, weight), theirs in zip(
        model.unet.named_parameters(), classes.unet.parameters(), strict=True
    ):
        assert torch.allclose(weight, theirs, atol=1e-6), name
    for (name, weight), drawn in zip(
        model.conditioner.named_parameters(), fresh.conditioner.parameters(), strict=True
    ):
        assert torch.allclose(weight, drawn, atol=1e-6), name


def test_another_unet_gives_nothing(
    trainings: dict, asking: Callable[[str], Training], tmp_path: Path
) -> None:
    list(trainings["ldm"](tmp_path / "classes"))
    training = asking("text")
    wider = replace(training.experiment, unet=replace(training.experiment.unet, width=16, groups=8))
    for experiment in (wider, asking("frozen").experiment):  # tokens of 384 are another UNet, too
        with pytest.raises(ValueError, match="classes' holds a model of another kind or config"):
            next(training(tmp_path / "run", experiment, init=tmp_path / "classes"))


# --- data and encoders that do not suit ---


def test_a_layout_needs_boxes(
    pictures: Any, asking: Callable[[str], Training], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="data 'tiny' has no boxes; a layout needs scenes"):
        next(asking("layout")(tmp_path / "run", data=pictures))


def test_a_frozen_encoder_stays_out_of_the_folder(
    asking: Callable[[str], Training], tmp_path: Path
) -> None:
    list(asking("frozen")(tmp_path / "run"))
    state = torch.load(tmp_path / "run/training/state.pt", weights_only=True)["model"]
    names = {*load_file(tmp_path / "run/model.safetensors"), *state}
    assert any(name.startswith("unet.") for name in names)
    assert not [name for name in names if name.startswith("conditioner.")]
    model = load_model(tmp_path / "run")
    assert model.conditioner.network is load_model(tmp_path / "run").conditioner.network


def test_a_frozen_encoder_has_its_width(asking: Callable[[str], Training], tmp_path: Path) -> None:
    training = asking("text")
    narrow = replace(training.experiment.conditioner, encoder="minilm")
    with pytest.raises(ValueError, match="d_cond=8 must be 384"):
        next(training(tmp_path / "run", replace(training.experiment, conditioner=narrow)))
