"""The paper's first stages: losses as published, Tab. 8's rows, and small ones at every f."""

from dataclasses import replace

import pytest
import torch
from published import RELEASED as PUBLISHED

from minildm import PRESETS, Autoencoder
from minildm.experiments import AutoencoderExperiment
from minildm.paper import FIRST_STAGES, RELEASED
from minildm.presets import LADDER, PIXELS

TAB_8 = {  # name: f, c, codebook
    "kl-f2": (2, 2, None),
    "vq-f2": (2, 2, 2048),
    "kl-f4": (4, 3, None),
    "vq-f4": (4, 3, 8192),
    "vq-f4-noattn": (4, 3, 8192),
    "vq-f4-n256": (4, 3, 256),
    "kl-f8": (8, 4, None),
    "vq-f8": (8, 4, 16384),
    "vq-f8-n256": (8, 4, 256),
    "kl-f16": (16, 16, None),
    "kl-f16-c8": (16, 8, None),
    "vq-f16": (16, 8, 16384),
    "kl-f32": (32, 64, None),
    "kl-f32-c16": (32, 16, None),
    "vq-f32": (32, 16, 16384),
}


def test_there_are_nine_and_all_of_tab_8() -> None:
    assert PUBLISHED.keys() == RELEASED.keys()
    assert len(RELEASED) == 9
    assert FIRST_STAGES.keys() == TAB_8.keys()


@pytest.mark.parametrize("name", TAB_8)
def test_a_row_has_its_f_its_channels_and_its_codebook(name: str) -> None:
    model = FIRST_STAGES[name].model
    assert (model.f, model.z_channels, model.codebook_size) == TAB_8[name]
    assert PRESETS[name] is FIRST_STAGES[name]


@pytest.mark.parametrize("name", RELEASED)
def test_the_loss_is_the_published_one(name: str) -> None:
    published, experiment = PUBLISHED[name], RELEASED[name]
    wanted = published["lossconfig"]["params"]
    game = experiment.adversarial
    assert experiment.train.lr == pytest.approx(
        published["base_learning_rate"] * experiment.train.batch_size
    )
    assert (game.weight, game.start) == (wanted["disc_weight"], wanted["disc_start"])
    assert game.discriminator.layers == wanted.get("disc_num_layers", 3)
    assert game.kind == "hinge"
    assert experiment.perceptual_weight == 1.0
    assert (experiment.mse_weight, experiment.restart_dead) == (0.0, 0)
    train = experiment.train
    assert (train.betas, train.decay, train.ema_decay) == ((0.5, 0.9), "constant", 0.0)
    assert (train.weight_decay, train.warmup_steps) == (0.0, 0)
    limit = 1e4 / (3 * 256**2) if experiment.model.regularizer == "kl" else 1e4
    assert game.limit == limit
    if experiment.model.regularizer == "kl":
        assert experiment.kl_weight == wanted["kl_weight"]
    else:
        assert experiment.codebook_weight == wanted["codebook_weight"]
        assert (experiment.model.commitment, experiment.model.vq_legacy) == (0.25, True)


@pytest.mark.parametrize("name", TAB_8)
def test_a_row_reconstructs_any_size_that_f_divides(name: str) -> None:
    """On narrow copies: every level, attention and codebook as in the row."""
    model = Autoencoder(replace(FIRST_STAGES[name].model, width=32)).eval()
    x = torch.rand(1, 3, 2 * model.f, 3 * model.f) * 2 - 1
    with torch.no_grad():
        z = model.encode(x, sample=False)
        assert z.shape == (1, model.config.z_channels, 2, 3)
        assert model.decode(z).shape == x.shape


def test_the_ladder_has_every_factor_twice() -> None:
    rungs = {(e.model.regularizer, e.model.f) for e in LADDER.values()}
    assert rungs == {(kind, f) for kind in ("kl", "vq") for f in (2, 4, 8, 16, 32)}
    assert PIXELS.f == 1
    for name, experiment in LADDER.items():
        assert isinstance(experiment, AutoencoderExperiment)
        assert name == f"emoji-{experiment.model.regularizer}-f{experiment.model.f}"
        assert experiment.data.size % experiment.model.f == 0
        assert PRESETS[name] == experiment
