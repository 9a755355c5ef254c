"""What each training leaves and learns, by conditioner, objective, first stage and option."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TinyImages, shaken, tiny_autoencoder_config, tiny_unet_config
from safetensors.torch import load_file
from torch import Tensor
from training.trainings import EXPERIMENTS, TRAIN, VQ, Training, outcome

from minildm.compression.autoencoder import Autoencoder, AutoencoderConfig
from minildm.conditioning import (
    HybridConfig,
    InpaintConfig,
    LayoutConfig,
    LowResConfig,
    SemanticConfig,
    TextConfig,
)
from minildm.data.scenes import ScenesDataset
from minildm.diffusion.latent_diffusion import LatentDiffusion
from minildm.diffusion.objective import ObjectiveConfig
from minildm.diffusion.schedule import ScheduleConfig
from minildm.files import fingerprint
from minildm.training.checkpoint import load_model, read_card, save_model
from minildm.training.configs import DataConfig, with_steps
from minildm.training.stages import new_model

TEXT = TextConfig(d_cond=8, length=10, depth=1, heads=1, d_head=8)


def scenes() -> ScenesDataset:
    return ScenesDataset("train", 16, n=12)


# --- stage 1 ---


def test_the_autoencoder_ends_with_averaged_weights_and_their_scale(
    trainings: dict[str, Training], tmp_path: Path
) -> None:
    run, data = tmp_path / "run", TinyImages()
    list(trainings["kl"](run))
    model = load_model(run, kind="autoencoder")
    averages = torch.load(run / "training/state.pt", weights_only=True)["ema"]
    assert all(torch.equal(weight, averages[name]) for name, weight in model.named_parameters())
    assert not (run / "ema.safetensors").exists()
    x = torch.stack([item["image"] for item in data])
    x = torch.cat([x, x.flip(-1)]).repeat(40, 1, 1, 1)
    with torch.no_grad():
        assert model.encode(x).std().item() == pytest.approx(1.0, abs=0.01)
    info = read_card(run)["info"]
    assert (info["data"], info["images"], info["train"]["steps"]) == ("tiny", 12, 6)
    assert "unfinished" not in info


def test_the_discriminator_learns_once_it_has_entered(
    trainings: dict[str, Training], tmp_path: Path
) -> None:
    training, seen = trainings["vq-gan"], []
    each = replace(training.experiment, train=replace(TRAIN, save_every=1))
    for record in training(tmp_path / "gan", each):
        state = torch.load(tmp_path / "gan/training/state.pt", weights_only=True)
        seen.append((record.terms, state["disc_loss model"]["net.0.weight"].clone()))
    changed = [not torch.equal(one, other) for (_, one), (_, other) in pairwise(seen)]
    assert changed == [False, True, True, True, True]  # it enters at step 3
    terms = [terms for terms, _ in seen]
    assert all(t["disc_loss"] == t["adv_weight"] == 0 for t in terms[:2])
    assert all(t["disc_loss"] > 0 and t["adv_weight"] > 0 for t in terms[2:])
    without = training(tmp_path / "none", replace(training.experiment, adversarial=None))
    alone = [record.terms["rec_loss"] for record in without]
    assert [t["rec_loss"] for t in terms][:3] == alone[:3]
    assert [t["rec_loss"] for t in terms][3:] != alone[3:]


def test_what_cannot_be_trained_is_refused(trainings: dict[str, Training], tmp_path: Path) -> None:
    training = trainings["kl"]
    pixels = AutoencoderConfig(regularizer="identity", z_channels=3)
    deep = tiny_autoencoder_config(channel_mult=(1, 1, 1, 1, 1, 1))
    for changes, said in (
        ({"model": pixels}, "nothing to train"),
        ({"model": deep}, "multiple of f=32"),
        ({"perceptual_weight": 1.0}, "at least 32 for the perceptual distance"),
        ({"train": replace(TRAIN, precision="fp16")}, "precision='fp16' requires a GPU"),
    ):
        with pytest.raises(ValueError, match=said):
            next(training(tmp_path / "run", replace(training.experiment, **changes)))
    assert not (tmp_path / "run").exists()


# --- stage 2 ---


def test_the_diffusion_model_has_its_own_and_averaged_weights(
    trainings: dict[str, Training], stage: Path, tmp_path: Path
) -> None:
    run = tmp_path / "deep" / "run"
    before = {p.name: p.read_bytes() for p in stage.iterdir()}
    list(trainings["ldm"](run))
    state = torch.load(run / "training/state.pt", weights_only=True)
    averaged, own = load_model(run), load_model(run, ema=False)
    for name, weight in averaged.unet.named_parameters(prefix="unet"):
        assert torch.equal(weight, state["ema"][name])
    for name, weight in own.unet.named_parameters(prefix="unet"):
        assert torch.equal(weight, state["loss model"][name])
    assert averaged.config.conditioner.classes == ("red", "green", "blue")
    assert read_card(run)["first_stage"]["sha256"] == fingerprint(load_model(stage))
    assert averaged.autoencoder.scale.item() == 2.0
    assert {p.name: p.read_bytes() for p in stage.iterdir()} == before
    images = [m.sample(["red", "blue"], steps=2, seed=0) for m in (averaged, own)]
    assert images[0].shape == (2, 3, 16, 16)
    assert not torch.allclose(*images, atol=1e-4)


def test_it_trains_on_normalised_latents_of_both_sides(
    trainings: dict[str, Training], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, loss = [], LatentDiffusion.loss

    def spy(self: LatentDiffusion, batch: dict, *args: Any) -> dict[str, Tensor]:
        seen.append((batch["moments"], batch["z"]))
        return loss(self, batch, *args)

    monkeypatch.setattr(LatentDiffusion, "loss", spy)
    monkeypatch.setattr(
        "minildm.compression.quantizer.DiagonalGaussian.sample", lambda self, noise: self.mean
    )
    list(trainings["ldm"](tmp_path / "run"))
    mirrored = 0
    for moments, z in seen:
        for both, latent in zip(moments, z, strict=True):
            sides = [torch.allclose(side / 2.0, latent, atol=1e-6) for side in both[:, :2]]
            assert any(sides)
            mirrored += sides == [False, True]
    assert 0 < mirrored < 24


CONDITIONERS: dict[str, tuple[Any, Any, list[Any]]] = {
    "text": (TEXT, TinyImages, ["red", "blue"]),
    "layout": (
        LayoutConfig(d_cond=8, grid=4, depth=1, heads=1, d_head=8),
        scenes,
        [[("dog", (0.1, 0.1, 0.9, 0.9))], [("house", (0.1, 0.1, 0.9, 0.9))]],
    ),
    "low_res": (LowResConfig(), TinyImages, [{"low_res": torch.full((1, 3, 8, 8), -1.0)}]),
    "inpaint": (
        InpaintConfig(),
        TinyImages,
        [{"image": torch.zeros(1, 3, 16, 16), "mask": torch.ones(1, 1, 16, 16)}],
    ),
    "semantic": (SemanticConfig(stages=1), scenes, [{"semantic": torch.ones(1, 16, 16).long()}]),
    "hybrid": (
        HybridConfig(tokens=TEXT, concat=LowResConfig()),
        TinyImages,
        [{"low_res": torch.zeros(1, 3, 8, 8), "y": ["red"]}],
    ),
}


def conditioned(name: str) -> Any:
    """The tiny diffusion experiment with another conditioner."""
    conditioner, base = CONDITIONERS[name][0], EXPERIMENTS["ldm"]
    unet = tiny_unet_config(
        in_channels=2 + conditioner.concat_channels(2), d_cond=conditioner.d_cond
    )
    data = replace(base.data, style_words=0.5)
    return replace(base, unet=unet, conditioner=conditioner, data=data)


@pytest.mark.parametrize("name", CONDITIONERS)
def test_every_conditioner_trains_loads_and_samples(
    name: str, trainings: dict[str, Training], tmp_path: Path
) -> None:
    _, data, asked = CONDITIONERS[name]
    list(trainings["ldm"](tmp_path / "run", conditioned(name), data=data()))
    model = load_model(tmp_path / "run")
    fresh, _ = new_model(LatentDiffusion, model.config, TRAIN.seed)
    pairs = zip(model.conditioner.parameters(), fresh.conditioner.parameters(), strict=True)
    assert all(not torch.equal(trained, drawn) for trained, drawn in pairs)
    y = asked if len(asked) > 1 else asked[0]
    x = model.sample(y, steps=2, seed=0)
    assert x.shape == (len(asked), 3, 16, 16)
    assert x.isfinite().all()
    assert len(asked) == 1 or not torch.equal(x, model.sample(y[::-1], steps=2, seed=0))


def test_the_vocabulary_is_of_captions_and_styles(
    trainings: dict[str, Training], tmp_path: Path
) -> None:
    list(trainings["ldm"](tmp_path / "run", conditioned("text")))
    model = load_model(tmp_path / "run")
    assert not model.conditioner.tokenizer.unknown("red green blue, flat style")
    assert model.config.conditioner.vocab_size == 4 + len(
        ["red", "green", "blue", ",", "flat", "style"]
    )
    for damage, said in (
        (lambda path: path.write_text(path.read_text()[:100]), "not a tokenizer"),
        (lambda path: path.unlink(), "not a tokenizer"),
    ):
        damage(tmp_path / "run/tokenizer.json")
        with pytest.raises(ValueError, match=rf"tokenizer\.json .*{said}"):
            load_model(tmp_path / "run")


OBJECTIVES = {
    "v": (
        ObjectiveConfig(predict="v", loss_weighting="min_snr"),
        ScheduleConfig(zero_terminal_snr=True),
    ),
    "z0": (ObjectiveConfig(predict="z0", loss="l1"), ScheduleConfig(kind="cosine")),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_loads_and_samples(
    name: str, trainings: dict[str, Training], tmp_path: Path
) -> None:
    objective, schedule = OBJECTIVES[name]
    experiment = replace(trainings["ldm"].experiment, objective=objective, schedule=schedule)
    records = list(trainings["ldm"](tmp_path / "run", experiment))
    assert all(("simple" in r.terms) == (name == "v") for r in records)
    model = load_model(tmp_path / "run")
    assert (model.config.objective, model.config.schedule) == (objective, schedule)
    assert model.sample(["red"], steps=4, seed=0, guidance_scale=2.0).isfinite().all()


@pytest.mark.parametrize("kind", ["vq", "identity"])
def test_diffusion_on_vq_latents_and_on_pixels(
    kind: str, trainings: dict[str, Training], tmp_path: Path
) -> None:
    config = VQ if kind == "vq" else AutoencoderConfig(regularizer="identity", z_channels=3)
    save_model(shaken(Autoencoder(config)), tmp_path / "any")
    c, base = config.z_channels, trainings["ldm"].experiment
    experiment = replace(base, unet=replace(base.unet, in_channels=c, out_channels=c))
    run = trainings["ldm"](tmp_path / "run", experiment, first_stage=tmp_path / "any")
    assert all(record.terms["loss"] > 0 for record in run)
    assert load_model(tmp_path / "run").sample(["red"], steps=2, seed=0).shape == (1, 3, 16, 16)


# --- a start from another model ---


def test_a_training_starts_from_a_trained_model(training: Training, tmp_path: Path) -> None:
    list(training(tmp_path / "first"))
    further = with_steps(training.experiment, 2, lr=1e-9, warmup_steps=0, ema_decay=0.0)
    list(training(tmp_path / "second", further, init=tmp_path / "first"))
    one, other = load_model(tmp_path / "first"), load_model(tmp_path / "second")
    for (name, weight), later in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(weight, later, atol=1e-6), name


def test_a_model_of_another_task_gives_its_unet(
    trainings: dict[str, Training], tmp_path: Path
) -> None:
    training = trainings["ldm"]
    base = replace(training.experiment, unet=tiny_unet_config())
    list(training(tmp_path / "classes", base))
    further = with_steps(conditioned("text"), 2, lr=1e-9, warmup_steps=0, ema_decay=0.0)
    list(training(tmp_path / "run", further, init=tmp_path / "classes"))
    model, classes = load_model(tmp_path / "run"), load_model(tmp_path / "classes")
    fresh, _ = new_model(LatentDiffusion, model.config, TRAIN.seed)
    for part, source in (("unet", classes), ("conditioner", fresh)):
        ours, theirs = getattr(model, part).parameters(), getattr(source, part).parameters()
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


def test_parts_that_do_not_fit_are_refused(
    trainings: dict[str, Training], stage: Path, tmp_path: Path
) -> None:
    ldm, kl = trainings["ldm"], trainings["kl"]
    list(ldm(tmp_path / "ldm"))
    wide = replace(ldm.experiment, unet=tiny_unet_config(channels=16))
    save_model(shaken(load_model(stage), seed=8), tmp_path / "other")
    begun = kl(tmp_path / "begun")
    list(islice(begun, 2))
    begun.close()
    larger = replace(ldm.experiment, data=DataConfig(size=32))
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (wide, {"init": tmp_path / "ldm"}, "ldm' holds a model of another kind or config"),
        (None, {"init": stage}, "ae' holds a model of another kind or config"),
        (
            None,
            {"init": tmp_path / "ldm", "first_stage": tmp_path / "other"},
            "ldm' was trained on another first stage",
        ),
        (None, {"first_stage": tmp_path / "begun"}, "begun' is not trained to its end"),
        (larger, {}, "images of 16 px, data.size is 32"),
        (conditioned("layout"), {}, "kind='layout' requires scenes, got 'tiny'"),
        (conditioned("semantic"), {}, "kind='semantic' requires scenes"),
    ]
    for experiment, options, said in cases:
        with pytest.raises(ValueError, match=said):
            next(ldm(tmp_path / "run", experiment, **options))


# --- they learn ---


def test_an_autoencoder_overfits(trainings: dict[str, Training], tmp_path: Path) -> None:
    overfit = with_steps(trainings["kl"].experiment, 80, flip=False, save_every=80, lr=0.02)
    records = list(trainings["kl"](tmp_path / "run", overfit, data=TinyImages(4)))
    assert records[-1].terms["rec_loss"] < 0.35 * records[0].terms["rec_loss"]


def test_a_diffusion_model_overfits(trainings: dict[str, Training], tmp_path: Path) -> None:
    overfit = with_steps(trainings["ldm"].experiment, 60, flip=False, save_every=60, batch_size=16)
    run = trainings["ldm"](tmp_path / "run", overfit, data=TinyImages(2))
    losses = [record.terms["loss"] for record in run]
    assert losses[0] == pytest.approx(1.0, abs=0.2)  # the untrained UNet says 0
    assert sum(losses[-10:]) / 10 < 0.6


# --- precision, layout, compilation ---


def test_bf16_trains_float32_weights(training: Training, tmp_path: Path) -> None:
    half = replace(training.experiment, train=replace(TRAIN, precision="bf16"))
    assert all(record.terms["loss"] < 1e3 for record in training(tmp_path / "half", half))
    list(training(tmp_path / "full"))
    weights, full = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "full"))
    assert {w.dtype for w in weights.values()} <= {torch.float32, torch.int64}
    assert any(not torch.equal(weights[name], full[name]) for name in full)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was compiled; without the code generator, which takes minutes."""
    seen, compile_ = [], torch.compile

    def quick(call: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(type(call.__self__).__name__)
        return compile_(call, *args, backend="aot_eager", **kwargs)

    monkeypatch.setattr(torch, "compile", quick)
    torch._dynamo.reset()
    yield seen
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "networks"),
    [("ldm", ["UNet", "ClassConditioner"]), ("vq-gan", ["Encoder", "Decoder"])],
)
def test_a_compiled_training_ends_like_an_eager_one(
    name: str, networks: list[str], trainings: dict[str, Training], compiled: list, tmp_path: Path
) -> None:
    """Also where the adaptive weight runs the decoder's backward pass twice."""
    training, train = trainings[name], replace(TRAIN, steps=2)
    small = replace(training.experiment, train=train)
    if name == "ldm":
        unet = tiny_unet_config(channel_mult=(1,), attn_levels=())
        small = replace(small, unet=unet)
    else:
        game = replace(small.adversarial, start=2)
        model = replace(small.model, regularizer="kl", codebook_size=None)
        small = replace(small, model=model, restart_dead=0, adversarial=game)
    list(training(tmp_path / "eager", small))
    assert not compiled
    list(training(tmp_path / "fast", replace(small, train=replace(train, compile=True))))
    assert compiled[:2] == networks
    one, other = outcome(tmp_path / "eager"), outcome(tmp_path / "fast")
    weights = [key for key, value in one.items() if isinstance(value, Tensor)]
    assert all(torch.allclose(one[key].double(), other[key].double(), atol=1e-4) for key in weights)
