"""Every field of a first-stage experiment reaches what it is for; bad pictures end it at once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trainings import TRAIN, Training

from minildm import Autoencoder, features, load_model, save_model, training
from minildm.discriminator import DiscriminatorConfig
from minildm.losses import AdversarialConfig


@pytest.fixture
def gan(trainings: dict[str, Training]) -> Training:
    return trainings["vq-gan"]


def test_weights_and_codebook_are_those_asked_for(
    gan: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    loss = training.autoencoder_loss

    def spy(model: Autoencoder, x: Any, **options: Any) -> Any:
        quantizer = model.decoder.quantizer
        fresh = bool((quantizer.idle > 1000).all())
        kept = {"restart_after": quantizer.restart_after, "epoch": quantizer.epoch_latents}
        seen.append({**options, **kept, "fresh": fresh})
        return loss(model, x, **options)

    monkeypatch.setattr(training, "autoencoder_loss", spy)
    asked = replace(gan.experiment, codebook_weight=0.3, mse_weight=0.7, restart_dead=5)
    list(gan(tmp_path / "run", asked))
    for step, options in enumerate(seen, 1):
        assert options["codebook_weight"] == 0.3
        assert options["mse_weight"] == 0.7
        assert options["step"] == step
        assert options["adversarial"] == asked.adversarial
        assert options["discriminator"].config == asked.adversarial.discriminator
        assert options["perceptual"] is None
        assert options["restart_after"] == 5
        assert options["epoch"] == 12 * 8 * 8  # pictures times latents
    assert [options["fresh"] for options in seen] == [True, *[False] * 5]

    seen.clear()
    list(gan(tmp_path / "further", replace(asked, restart_dead=0), init=tmp_path / "run"))
    assert seen[0]["restart_after"] is None
    seen.clear()
    list(gan(tmp_path / "again", asked, init=tmp_path / "run"))
    assert not seen[0]["fresh"]  # a trained codebook is not thrown away


def test_a_trained_codebook_counts_anew(gan: Training, tmp_path: Path) -> None:
    list(gan(tmp_path / "run"))
    assert load_model(tmp_path / "run").decoder.quantizer.counts.any()
    model = training.new_model(Autoencoder, gan.experiment.model, 0, tmp_path / "run")
    quantizer = model.decoder.quantizer
    assert not any(t.any() for t in (quantizer.counts, quantizer.last_counts, quantizer.idle))


@pytest.fixture
def large(trainings: dict[str, Training], make_pictures: Any) -> Training:
    """KL on 32 px: what the perceptual distance wants at least."""
    kl = trainings["autoencoder"]
    return Training(kl.start, kl.experiment, {**kl.options, "data": make_pictures(6, 32)})


def test_the_perceptual_term_is_logged_and_learnt_from(large: Training, tmp_path: Path) -> None:
    asked = replace(large.experiment, perceptual_weight=0.5, perceptual="offline")
    records = list(large(tmp_path / "with", asked))
    for record in records:
        terms = record.terms
        whole = terms["rec_loss"] + 0.5 * terms["perceptual"] + 1e-6 * terms["reg_loss"]
        assert terms["loss"] == pytest.approx(whole, rel=1e-5)
    without = list(large(tmp_path / "without"))
    assert records[0].terms["rec_loss"] == without[0].terms["rec_loss"]
    assert records[2].terms["rec_loss"] != without[2].terms["rec_loss"]
    info = training.read_card(tmp_path / "with")["info"]
    assert info["perceptual"] == "EfficientNet-Lite0 distance"


def test_a_resumed_run_keeps_its_perceptual_distance(
    large: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VGG's weights appear between start and resume: the loss stays what it was."""
    monkeypatch.setattr(features, "weights_file", lambda *names: None)
    asked = replace(large.experiment, perceptual_weight=0.5)
    run = large(tmp_path / "run", asked)
    next(run)
    next(run)
    run.close()
    monkeypatch.setattr(features, "weights_file", lambda *names: tmp_path / "vgg.pth")
    monkeypatch.setattr(features, "LPIPS", lambda: pytest.fail("another distance"))
    assert [r.step for r in large(tmp_path / "run", asked)] == [3, 4, 5, 6]


@pytest.mark.parametrize(
    ("changes", "size", "said"),
    [
        ({}, 15, "pictures of 15 x 15 .* multiples of f=2"),
        ({"perceptual_weight": 1.0}, 16, "at least 32 for the perceptual distance"),
        (
            {"adversarial": AdversarialConfig(start=5, discriminator=DiscriminatorConfig())},
            16,
            "at least 24 for the discriminator",
        ),
    ],
)
def test_pictures_that_do_not_suit_leave_no_run(
    changes: dict, size: int, said: str, trainings: dict, make_pictures: Any, tmp_path: Path
) -> None:
    kl = trainings["autoencoder"]
    asked = replace(kl.experiment, **changes)
    with pytest.raises(ValueError, match=said):
        next(kl(tmp_path / "run", asked, data=make_pictures(4, size)))
    assert not (tmp_path / "run").exists()


def test_bytes_and_no_data_are_refused(
    trainings: dict, make_pictures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kl, data = trainings["autoencoder"], make_pictures(4)
    whole = type(data).__getitem__
    monkeypatch.setattr(
        type(data), "__getitem__", lambda s, i: {**whole(s, i), "image": s.images[i].float()}
    )
    with pytest.raises(ValueError, match=r"must lie in \[-1, 1\], got 0 to 255"):
        next(kl(tmp_path / "run", data=data))
    with pytest.raises(ValueError, match="data holds no picture"):
        next(kl(tmp_path / "run", data=make_pictures(0)))


def test_a_picture_gone_bad_stops_with_the_step(
    trainings: dict, make_pictures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kl, data = trainings["autoencoder"], make_pictures(8)
    whole = type(data).__getitem__

    def going_bad(self: Any, i: int) -> dict[str, Any]:
        item = whole(self, i)
        return {**item, "image": item["image"] * (float("nan") if self.reads > 14 else 1.0)}

    monkeypatch.setattr(type(data), "__getitem__", going_bad)
    run = kl(tmp_path / "run", data=data)
    said = "step 4: image holds values that are not finite.*; the checkpoint of step 2 stays"
    with pytest.raises(ValueError, match=said):
        list(run)
    assert load_model(tmp_path / "run").config == kl.experiment.model


def test_stage_two_checks_the_pictures_it_encodes(
    trainings: dict, autoencoder: Autoencoder, make_pictures: Any, tmp_path: Path
) -> None:
    ldm, data = trainings["ldm"], make_pictures(5)
    save_model(autoencoder, tmp_path / "ae")
    with pytest.raises(ValueError, match=r"data has pictures of 32 px, .*data\.size=16"):
        next(ldm(tmp_path / "run", data=make_pictures(5, 32)))
    whole = type(data).__getitem__
    broken = type(
        "Broken",
        (type(data),),
        {
            "__getitem__": lambda s, i: {
                **whole(s, i),
                "image": whole(s, i)["image"] * float("nan"),
            },
            "fingerprint": "broken",
        },
    )
    bad = make_pictures(5)
    bad.__class__, bad.fingerprint = broken, "broken"
    with pytest.raises(ValueError, match="data: pictures 0 to 4 holds values that are not finite"):
        training.encode_dataset(autoencoder, bad, "fp32")


def test_encoding_evaluates(autoencoder: Autoencoder, pictures: Any) -> None:
    """Dropout would put noise into every cached latent."""
    config = replace(autoencoder.config, dropout=0.5)
    model = Autoencoder(config).train()
    first = training.encode_dataset(model, pictures, "fp32")
    assert model.training
    with torch.no_grad():
        x = torch.stack([pictures[i]["image"] for i in range(len(pictures))])
        assert torch.allclose(first[:, 0], model.eval().moments(x), atol=1e-6)


def test_steps_are_as_many_as_asked(gan: Training, tmp_path: Path) -> None:
    assert len(list(gan(tmp_path))) == TRAIN.steps
