"""Shared by the tests: tiny pictures and models, a cache of their own, the smoke scale."""

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from trainings import DATA, KINDS, TRAIN, Training

from minildm import (
    Autoencoder,
    AutoencoderConfig,
    ConditionerConfig,
    UNetConfig,
    save_model,
    train_autoencoder,
    train_judge,
    train_ldm,
)
from minildm.diffusion import LatentDiffusionConfig
from minildm.discriminator import DiscriminatorConfig
from minildm.experiments import AutoencoderExperiment, JudgeExperiment, LatentDiffusionExperiment
from minildm.losses import AdversarialConfig

pytest.register_assert_rewrite("exercise_rules")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The rules of exercise_rules run over the tables of the module that imports them."""
    if metafunc.function.__module__ != "exercise_rules":
        return
    from test_exercises import ODD  # here: that module's own tests come with it

    tables = {"mistake": getattr(metafunc.module, "WRONG", {}), "odd": ODD}
    for name in {"mistake", "odd"} & set(metafunc.fixturenames):
        metafunc.parametrize(name, tables[name].values(), ids=tables[name])
    if "check" in metafunc.fixturenames:
        metafunc.parametrize("check", metafunc.module.CHECKS)


@pytest.fixture(scope="session", autouse=True)
def own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from or left in the user's cache; lessons run at the smallest scale."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINILDM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("MINILDM_SCALE", os.environ.get("MINILDM_SCALE", "smoke"))
        yield


@pytest.fixture(scope="module", autouse=True)
def seeded_module() -> None:
    """What a module's own fixtures draw depends on no module before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def seeded(seeded_module: None) -> None:
    """What a test draws depends on no test before it: it fails alone as it fails among all."""
    torch.manual_seed(0)


class TinyPictures(Dataset[dict[str, Any]]):
    """Squares of one colour on white, 16 x 16: what any data set of the package offers."""

    classes = ("red", "green", "blue")  # label i has its colour in channel i
    groups = ("warm", "cold")
    styles = ("flat",)
    name = "tiny"

    def __init__(self, n: int = 12, size: int = 16) -> None:
        draw = torch.Generator().manual_seed(n)
        self.labels = torch.arange(n) % 3
        self.images = torch.full((n, 3, size, size), 255, dtype=torch.uint8)
        for image, label in zip(self.images, self.labels, strict=True):
            x, y = torch.randint(1, size // 2, (2,), generator=draw).tolist()
            side = int(torch.randint(size // 4, size // 2, (), generator=draw))
            image[:, y : y + side, x : x + side] = 0
            image[label, y : y + side, x : x + side] = 255
        self.fingerprint = hashlib.sha256(self.images.numpy().tobytes()).hexdigest()
        self.reads = 0  # how often an item was asked for

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Any]:
        self.reads += 1
        label = self.labels[i]
        ids = {"label": label, "group": (label > 0).long(), "style": torch.tensor(0)}
        image = self.images[i].float() / 127.5 - 1
        return {"image": image, "caption": self.classes[label], **ids}


@pytest.fixture
def pictures() -> TinyPictures:
    """A dozen."""
    return TinyPictures()


@pytest.fixture
def make_pictures() -> type[TinyPictures]:
    """`make_pictures(n=12, size=16)`."""
    return TinyPictures


@pytest.fixture
def ae_config() -> AutoencoderConfig:
    """f = 2, two latent channels."""
    return AutoencoderConfig(
        z_channels=2, width=8, width_mult=(1, 2), res_blocks=1, groups=4, mid_attn=False
    )


@pytest.fixture
def unet_config() -> UNetConfig:
    """Two levels, tokens of width 8."""
    return UNetConfig(
        in_channels=2,
        out_channels=2,
        width=8,
        width_mult=(1, 2),
        res_blocks=1,
        attn_levels=(1,),
        d_head=4,
        d_cond=8,
        groups=4,
    )


@pytest.fixture
def ldm_config(ae_config: AutoencoderConfig, unet_config: UNetConfig) -> LatentDiffusionConfig:
    """Conditional on three classes, for 16 x 16 pictures."""
    return LatentDiffusionConfig(
        autoencoder=ae_config,
        unet=unet_config,
        conditioner=ConditionerConfig(kind="class", classes=TinyPictures.classes, d_cond=8),
        image_size=16,
    )


@pytest.fixture
def autoencoder(ae_config: AutoencoderConfig) -> Autoencoder:
    return shaken(Autoencoder(ae_config)).eval()


def shaken(module: nn.Module, seed: int = 0) -> Any:
    """The module with all weights drawn anew, so that zero-initialised layers take part, too."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = 0.3 if parameter.ndim == 1 else 1.0 / parameter[0].numel() ** 0.5
            parameter.copy_(spread * torch.randn(parameter.shape, generator=draw))
            if parameter.ndim == 1:
                parameter.add_(0.5)
    return module


@pytest.fixture(name="shaken")
def shaken_fixture() -> Any:
    """`shaken(module)`: all weights drawn anew, the zero-initialised ones included."""
    return shaken


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(name="randn")
def randn_fixture() -> Any:
    """`randn(*shape, seed=0, dtype=float32)`: normal numbers, the same at every call."""
    return randn


class FilledFile:
    """A file open for writing, on a disk that has `room` for that many bytes more."""

    def __init__(self, file: Any, room: int, error: BaseException) -> None:
        self.file, self.room, self.error = file, room, error

    def __enter__(self) -> "FilledFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, content: bytes) -> int:
        written = self.file.write(memoryview(content)[: self.room])
        self.room -= written
        if written < len(content):
            raise self.error
        return written


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`full_disk(room)`: from now on a file fails after that many bytes, by default with ENOSPC."""
    real = os.fdopen
    enospc = OSError(errno.ENOSPC, "No space left on device")

    def fill(room: int, error: BaseException = enospc) -> None:
        monkeypatch.setattr(os, "fdopen", lambda *a, **k: FilledFile(real(*a, **k), room, error))

    return fill


def vq_gan(config: AutoencoderConfig) -> AutoencoderExperiment:
    """A codebook that counts epochs and restarts codes, and a critic that enters at step 3."""
    critic = DiscriminatorConfig(width=4, layers=1)
    return AutoencoderExperiment(
        model=replace(config, regularizer="vq", codebook_size=64),
        train=TRAIN,
        data=DATA,
        restart_dead=2,
        adversarial=AdversarialConfig(start=3, ramp=3, lr_factor=0.5, discriminator=critic),
    )


@pytest.fixture
def trainings(
    pictures: Any,
    ae_config: AutoencoderConfig,
    unet_config: UNetConfig,
    autoencoder: Autoencoder,
    tmp_path: Path,
) -> dict[str, Training]:
    autoencoder.scale.fill_(2.0)
    save_model(autoencoder, tmp_path / "first-stage")
    data = {"data": pictures}
    conditioner = ConditionerConfig(kind="class", d_cond=8, p_uncond=0.5)
    ldm = LatentDiffusionExperiment(
        unet=replace(unet_config, dropout=0.1), train=TRAIN, data=DATA, conditioner=conditioner
    )
    return {
        "autoencoder": Training(
            train_autoencoder, AutoencoderExperiment(model=ae_config, train=TRAIN, data=DATA), data
        ),
        "vq-gan": Training(train_autoencoder, vq_gan(ae_config), data),
        "ldm": Training(train_ldm, ldm, {**data, "first_stage": tmp_path / "first-stage"}),
        "judge": Training(train_judge, JudgeExperiment(train=TRAIN, data=DATA, width=8), data),
    }


@pytest.fixture(params=KINDS)
def training(request: pytest.FixtureRequest, trainings: dict[str, Training]) -> Training:
    return trainings[request.param]
