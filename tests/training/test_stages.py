"""What each training leaves and learns, by conditioner, objective, first stage and option."""

from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TinyImages, randn, shaken, tiny_autoencoder_config, tiny_unet_config
from safetensors.torch import load_file
from torch import Tensor
from training.trainings import GAN, KL, LDM, TRAIN, VQ, Training, each, stage, state_of

from minildm import (
    HybridConfig,
    InpaintConfig,
    LayoutConfig,
    LowResConfig,
    ObjectiveConfig,
    ScenesDataset,
    ScheduleConfig,
    SemanticConfig,
    TextConfig,
    with_steps,
)
from minildm.compression.autoencoder import Autoencoder
from minildm.compression.quantizer import DiagonalGaussian
from minildm.conditioning import ConditionerConfig
from minildm.diffusion.latent_diffusion import LatentDiffusion
from minildm.files import fingerprint
from minildm.training.checkpoint import load_model, read_card, save_model
from minildm.training.configs import DataConfig
from minildm.training.presets import PIXELS
from minildm.training.stages import new_model

# --- stage 1 ---


def test_the_autoencoder_ends_with_averaged_weights_and_their_scale(tmp_path: Path) -> None:
    list(KL(tmp_path))
    model = load_model(tmp_path, kind="autoencoder")
    assert not (tmp_path / "ema.safetensors").exists()
    x = torch.stack([item["image"] for item in TinyImages()])
    x = torch.cat([x, x.flip(-1)]).repeat(40, 1, 1, 1)
    with torch.no_grad():
        assert model.encode(x).std().item() == pytest.approx(1.0, abs=0.01)
    info = read_card(tmp_path)["info"]
    assert (info["data"], info["images"], info["train"]["steps"]) == ("tiny", 12, 6)


def test_the_discriminator_learns_once_it_has_entered(tmp_path: Path) -> None:
    weights, terms = [], []
    for record in GAN(tmp_path, GAN.changed(save_every=1)):
        weights.append(state_of(tmp_path)["modules"]["disc_loss.net.0.weight"])
        terms.append(record.terms)
    moves = [not torch.equal(one, other) for one, other in pairwise(weights)]
    assert moves == [False, True, True, True, True]  # it enters at step 3
    assert all(t["disc_loss"] == t["adv_weight"] == 0 for t in terms[:2])
    assert all(t["disc_loss"] > 0 and t["adv_weight"] > 0 for t in terms[2:])


# --- stage 2 ---


def test_the_diffusion_model_has_its_own_and_averaged_weights(tmp_path: Path) -> None:
    run, before = tmp_path / "deep/run", {p.name: p.read_bytes() for p in stage().iterdir()}
    list(LDM(run))
    state, averaged, own = state_of(run), load_model(run), load_model(run, ema=False)
    for name, weight in averaged.unet.named_parameters(prefix="unet"):
        assert torch.equal(weight, state["ema"][name])
        assert torch.equal(own.get_parameter(name), state["modules"][f"loss.{name}"])
    assert averaged.config.conditioner.classes == ("red", "green", "blue")
    assert read_card(run)["first_stage"]["sha256"] == fingerprint(load_model(stage()))
    assert {p.name: p.read_bytes() for p in stage().iterdir()} == before
    images = [m.sample(["red", "blue"], steps=2, seed=0) for m in (averaged, own)]
    assert not torch.allclose(*images, atol=1e-4)


def test_it_trains_on_normalised_latents_of_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, loss = [], LatentDiffusion.loss

    def spy(self: LatentDiffusion, batch: dict, *args: Any) -> dict[str, Tensor]:
        means = batch["moments"].chunk(2, dim=2)[0] / 2.0  # (B, 2, c, h, w): of both sides
        seen.append((means - batch["z"][:, None]).abs().amax((2, 3, 4)) < 1e-6)
        return loss(self, batch, *args)

    monkeypatch.setattr(LatentDiffusion, "loss", spy)
    monkeypatch.setattr(DiagonalGaussian, "sample", lambda self, noise: self.mean)
    list(LDM(tmp_path))
    own, mirrored = torch.cat(seen).unbind(1)  # (24,)
    assert (own | mirrored).all()
    assert 0 < (~own).sum() < 24


TEXT = TextConfig(d_cond=8, length=10, depth=1, heads=1, d_head=8)
BOX, LOW_RES = (0.1, 0.1, 0.9, 0.9), torch.zeros(1, 3, 8, 8)
HOLE = {"image": torch.zeros(1, 3, 16, 16), "mask": torch.ones(1, 1, 16, 16)}
CONDITIONERS: dict[str, tuple[Any, Any]] = {  # and what is sampled
    "text": (TEXT, ["red", "blue"]),
    "layout": (
        LayoutConfig(d_cond=8, grid=4, depth=1, heads=1, d_head=8),
        [[("dog", BOX)], [("house", BOX)]],
    ),
    "low_res": (LowResConfig(), {"low_res": LOW_RES}),
    "inpaint": (InpaintConfig(), HOLE),
    "semantic": (SemanticConfig(stages=1), {"semantic": torch.ones(1, 16, 16).long()}),
    "hybrid": (
        HybridConfig(tokens=TEXT, concat=LowResConfig()),
        {"low_res": LOW_RES, "y": ["red"]},
    ),
}


def conditioned(name: str) -> Any:
    """The tiny diffusion experiment with another conditioner."""
    conditioner = CONDITIONERS[name][0]
    channels = 2 + conditioner.concat_channels(2)
    unet = tiny_unet_config(in_channels=channels, d_cond=conditioner.d_cond)
    data = DataConfig(size=16, style_words=0.5)
    return LDM.changed(unet=unet, conditioner=conditioner, data=data)


@pytest.mark.parametrize("name", CONDITIONERS)
def test_every_conditioner_trains_loads_and_samples(name: str, tmp_path: Path) -> None:
    scenes = name in ("layout", "semantic")
    data = ScenesDataset("train", 16, n=12) if scenes else TinyImages()
    list(LDM(tmp_path, conditioned(name), data=data))
    model = load_model(tmp_path)
    fresh = new_model(LatentDiffusion, model.config, TRAIN.seed)
    pairs = zip(model.conditioner.parameters(), fresh.conditioner.parameters(), strict=True)
    assert all(not torch.equal(trained, drawn) for trained, drawn in pairs)
    y = CONDITIONERS[name][1]
    x = model.sample(y, steps=2, seed=0)
    assert x.shape[1:] == (3, 16, 16) and x.isfinite().all()
    assert isinstance(y, dict) or not torch.equal(x, model.sample(y[::-1], steps=2, seed=0))
    if name == "text":
        assert not model.conditioner.tokenizer.unknown("red green blue, flat style")
        words = len(["red", "green", "blue", ",", "flat", "style"])
        assert model.config.conditioner.vocab_size == 4 + words


V = ObjectiveConfig(predict="v", loss_weighting="min_snr"), ScheduleConfig(zero_terminal_snr=True)
Z0 = ObjectiveConfig(predict="z0", loss="l1"), ScheduleConfig(kind="cosine")


@pytest.mark.parametrize(
    ("config", "objective", "schedule"), [(VQ, *V), (PIXELS, *Z0)], ids=["vq", "pixels"]
)
def test_every_objective_trains_on_vq_latents_and_on_pixels(
    config: Any, objective: Any, schedule: Any, tmp_path: Path
) -> None:
    save_model(shaken(Autoencoder(config)), tmp_path / "any")
    unet = tiny_unet_config(in_channels=config.z_channels, out_channels=config.z_channels)
    experiment = LDM.changed(unet=unet, objective=objective, schedule=schedule)
    records = list(LDM(tmp_path / "run", experiment, first_stage=tmp_path / "any"))
    assert all(("simple" in r.terms) == (objective.predict == "v") for r in records)
    model = load_model(tmp_path / "run")
    assert (model.config.objective, model.config.schedule) == (objective, schedule)
    x = model.sample(["red"], steps=4, seed=0, guidance_scale=2.0)
    assert x.shape == (1, 3, 16, 16) and x.isfinite().all()


# --- a start from another model ---


@each
def test_a_training_starts_from_a_trained_model(training: Training, tmp_path: Path) -> None:
    list(training(tmp_path / "first"))
    further = training.changed(steps=2, lr=1e-9, warmup_steps=0, ema_decay=0.0)
    list(training(tmp_path / "second", further, init=tmp_path / "first"))
    one, other = load_model(tmp_path / "first"), load_model(tmp_path / "second")
    for (name, weight), later in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(weight, later, atol=1e-6), name


def test_channels_that_a_model_did_not_have_begin_without_influence(tmp_path: Path) -> None:
    unconditional = {"unet": tiny_unet_config(d_cond=None), "conditioner": ConditionerConfig()}
    list(LDM(tmp_path / "a", LDM.changed(**unconditional)))
    further = with_steps(conditioned("inpaint"), 1, lr=1e-9, ema_decay=0.0)
    list(LDM(tmp_path / "b", further, init=tmp_path / "a"))
    z, masked, t = randn(2, 2, 8, 8), randn(2, 3, 8, 8, seed=1), torch.tensor([3, 900])
    expected = load_model(tmp_path / "a").unet(z, t)
    found = load_model(tmp_path / "b").unet(torch.cat([z, masked], dim=1), t)
    assert torch.allclose(found, expected, atol=1e-5)


def test_held_out_loss_is_logged_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DataConfig, "dataset", lambda *_: TinyImages())
    list(LDM(tmp_path / "a"))
    held_out = list(LDM(tmp_path / "b", LDM.changed(held_out=9)))
    logged = [{k for k in record.terms if k.startswith("held_out_")} for record in held_out]
    assert logged[::2] == 3 * [set()] and logged[1] == logged[3] == logged[5] > {"held_out_9"}
    weights = [load_file(tmp_path / name / "model.safetensors") for name in "ab"]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_model_of_another_task_gives_its_unet(tmp_path: Path) -> None:
    list(LDM(tmp_path / "a", LDM.changed(unet=tiny_unet_config())))
    further = with_steps(conditioned("text"), 1, lr=1e-9, ema_decay=0.0)
    list(LDM(tmp_path / "b", further, init=tmp_path / "a"))
    model, classes = load_model(tmp_path / "b"), load_model(tmp_path / "a")
    fresh = new_model(LatentDiffusion, model.config, TRAIN.seed)
    for part, source in (("unet", classes), ("conditioner", fresh)):
        ours, theirs = getattr(model, part).parameters(), getattr(source, part).parameters()
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    run, begun, other = (tmp_path / name for name in ("run", "begun", "other"))
    list(LDM(run))
    list(islice(KL(begun), 2))
    save_model(shaken(load_model(stage()), seed=8), other)
    deep = tiny_autoencoder_config(channel_mult=(1, 1, 1, 1, 1, 1))
    wide = LDM.changed(unet=tiny_unet_config(channels=16))
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (KL.changed(model=deep), {}, "multiples of f=32"),
        (wide, {"init": run}, r"run' holds .* another config \(unet.channels: 8 there, 16 here"),
        (None, {"init": stage()}, r"ae' holds .* another config \(autoencoder"),
        (None, {"init": run, "first_stage": other}, "run' was trained on another first stage"),
        (None, {"first_stage": begun}, "begun' is not trained to its end"),
        (LDM.changed(data=DataConfig(size=32)), {}, "images of 16 px, data.size is 32"),
        (conditioned("layout"), {}, "kind='layout' requires scenes, got 'tiny'"),
        (None, {"data": [0]}, r"data=\[0\] must be an ImageDataset: see minildm.wrap_dataset"),
    ]
    for experiment, options, said in cases:
        with pytest.raises(ValueError, match=said):
            next(LDM(tmp_path / "none", experiment, **options))
    assert not (tmp_path / "none").exists()


# --- they learn ---


def test_both_stages_overfit(tmp_path: Path) -> None:
    overfit = KL.changed(steps=80, flip=False, save_every=80, lr=0.02)
    first, *_, last = KL(tmp_path / "ae", overfit, data=TinyImages(4))
    assert last.terms["rec_loss"] < 0.35 * first.terms["rec_loss"]
    overfit = LDM.changed(steps=60, flip=False, save_every=60, batch_size=16)
    losses = [r.terms["loss"] for r in LDM(tmp_path / "ldm", overfit, data=TinyImages(2))]
    assert losses[0] == pytest.approx(1.0, abs=0.2)  # the untrained UNet says 0
    assert sum(losses[-10:]) / 10 < 0.6


# --- precision ---


@each
def test_bf16_trains_float32_weights(training: Training, tmp_path: Path) -> None:
    for name, precision in (("half", "bf16"), ("full", "fp32")):
        list(training(tmp_path / name, training.changed(steps=2, precision=precision)))
    weights, full = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "full"))
    assert {w.dtype for w in weights.values()} <= {torch.float32, torch.int64}
    assert any(not torch.equal(weights[name], full[name]) for name in full)
