"""Official files: every format is read, damaged ones are named; nothing in a pickle runs."""

import copy
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import shaken
from interop import official_models as official
from safetensors.torch import save_file
from torch import Tensor

from minildm import interop
from minildm.compression.autoencoder import Autoencoder, AutoencoderConfig
from minildm.conditioning import ClassConfig, HybridConfig, SemanticConfig, TextConfig
from minildm.diffusion.unet import UNet, UNetConfig
from minildm.training.checkpoint import CheckpointError

STAGE = official.RELEASED["vq-f4-noattn"]
CONFIG, SHAPES = official.first_stage(STAGE, official.quarter)
TENSORS = official.drawn(SHAPES)
NAME = "quant_conv.bias"


def legacy(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


FORMATS: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    "model.ckpt": lambda tensors, path: torch.save({"state_dict": tensors, "epoch": 3}, path),
    "bare.ckpt": torch.save,
    "old.ckpt": legacy,
    "model.safetensors": save_file,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_and_a_damaged_one_is_named(name: str, tmp_path: Path) -> None:
    path, config = tmp_path / name, tmp_path / "config.yaml"
    FORMATS[name](TENSORS, path)
    config.write_text(yaml.safe_dump({"model": CONFIG, "data": {"target": "anything"}}))
    before = path.read_bytes()
    model = interop.load_compvis(config, path)
    assert torch.equal(model.encoder.to_moments.bias, TENSORS[NAME])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert path.read_bytes() == before  # training does not change the file
    for size in (0, 3, 100, len(before) // 2, len(before) - 1):
        path.write_bytes(before[:size])
        with pytest.raises(CheckpointError, match=f"{name} is cut short"):
            interop.load_compvis(CONFIG, path)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        interop.load_compvis(CONFIG, path)


class Trap:
    """Unpickled freely, makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.folder,)


@pytest.mark.parametrize(
    "save", [torch.save, legacy, lambda c, path: path.write_bytes(pickle.dumps(c))]
)
def test_code_in_a_pickle_does_not_run(save: Callable[..., None], tmp_path: Path) -> None:
    path, sprung = tmp_path / "evil.ckpt", tmp_path / "sprung"
    save({"state_dict": TENSORS, "callbacks": Trap(sprung)}, path)
    with pytest.raises(CheckpointError, match=r"evil\.ckpt is .* nothing was run") as error:
        interop.load_compvis(CONFIG, path)
    assert not sprung.exists()
    assert "safe_globals" not in str(error.value)  # torch's advice, which is how to run it


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "torch.load", "numpy.load"])
def test_nothing_else_that_a_pickle_names_is_looked_up(name: str, tmp_path: Path) -> None:
    module, _, function = name.rpartition(".")
    pickled = b"\x80\x02" + f"c{module}\n{function}\n(X\x07\x00\x00\x00mkdir x".encode() + b"tR."
    (tmp_path / "evil.ckpt").write_bytes(pickled)
    with pytest.raises(CheckpointError, match=r"evil\.ckpt is .* nothing was run"):
        interop.load_compvis(CONFIG, tmp_path / "evil.ckpt")


def test_what_lightning_leaves_is_inert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module: Any = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, name, module)
    made = module.ModelCheckpoint()
    made.best = 3
    callbacks = {module.ModelCheckpoint: {"best": np.float64(0.25), "callback": made}}
    path = tmp_path / "lightning.ckpt"
    legacy({"callbacks": callbacks, "state_dict": TENSORS}, path)
    # As NumPy 1 wrote it: the module has moved since.
    path.write_bytes(path.read_bytes().replace(b"numpy._core.multi", b"numpy.core.multi"))
    monkeypatch.delitem(sys.modules, name)
    assert torch.equal(interop.load_compvis(CONFIG, path).encoder.to_moments.bias, TENSORS[NAME])
    with pytest.raises(pickle.UnpicklingError):  # allowed for our reading alone
        torch.load(path, weights_only=True)


MISFITS: list[tuple[dict[str, Any], str]] = [
    ({NAME: None}, r"quant_conv\.bias: file nothing, model \(3,\)"),
    ({"more": torch.ones(1)}, r"more: file \(1,\), model nothing"),
    ({NAME: torch.ones(4)}, r"quant_conv\.bias: file \(4,\), model \(3,\)"),
    ({NAME: torch.full((3,), torch.nan)}, r"quant_conv\.bias: file values that are not finite"),
    ({NAME: torch.ones(3).long()}, r"quant_conv\.bias: file torch\.int64, not floats"),
    ({NAME: [1.0] * 3}, r"quant_conv\.bias: file list, not floats"),
]


@pytest.mark.parametrize(("changes", "said"), MISFITS, ids=[said for _, said in MISFITS])
def test_a_tensor_that_does_not_fit_is_named(changes: dict[str, Any], said: str) -> None:
    tensors = {name: value for name, value in (TENSORS | changes).items() if value is not None}
    with pytest.raises(CheckpointError, match=rf"(?s)checkpoint: 1 tensors do not fit.*{said}"):
        interop.load_compvis(CONFIG, tensors)


def test_what_inference_does_not_need_is_left() -> None:
    extra = {"loss.logvar": torch.tensor(0.0), "model_ema.decay": torch.tensor(0.9)}
    interop.load_compvis(CONFIG, TENSORS | extra | {"colorize": torch.ones(3, 4, 1, 1)})
    foreign = {f"more.{i}": torch.ones(1) for i in range(30)}
    with pytest.raises(CheckpointError, match="30 tensors do not fit") as raised:
        interop.load_compvis(CONFIG, TENSORS | foreign)
    assert len(str(raised.value).splitlines()) == 11  # ten of them are listed


# --- configs that cannot be expressed ---

SEMANTIC = official.narrow("semantic_synthesis256")
ENCODERS, DDCONFIG = official.ENCODERS, "first_stage_config__params__ddconfig"
BAD: list[tuple[dict[str, Any], str]] = [
    ({"guidance": 3}, "guidance=3 is not known"),
    ({"first_stage_config": ...}, "lacks 'autoencoder'"),
    ({"unet_config__target": "ldm.UNet"}, "target='ldm.UNet' is not known; known: ldm.models"),
    ({"given_betas": [0.1]}, r"given_betas=\[0\.1\] is not known"),
    ({"beta_schedule": "sqrt"}, "beta_schedule='sqrt' cannot be expressed, only .'linear', 'sqrt_"),
    ({"linear_end": 0.0001}, "beta_start"),
    ({"linear_end": "0.01"}, "beta_end='0.01' must be float"),
    ({"parameterization": "mu"}, "parameterization='mu' cannot be expressed"),
    ({"loss_type": "huber"}, "loss='huber'"),
    ({"channels": 4}, "channels=4 must be 3"),
    ({"scale_factor": 0.0}, "scale_factor=.* must be positive"),
    ({"scale_by_std": True}, "scale_factor=.* must be positive"),
    ({"conditioning_key": "crossattn"}, "conditioning_key='crossattn' cannot be expressed with"),
    ({"unet_config__params__in_channels": 5}, "in_channels=5"),
    ({"unet_config__params__context_dim": 7}, "use_spatial_transformer=False"),
    ({"unet_config__params__channel_mult": [2, 4]}, r"channel_mult=\[2, 4\] must begin with 1"),
    ({f"{DDCONFIG}__double_z": True}, "double_z=True cannot be expressed, only .False."),
    ({f"{DDCONFIG}__attn_type": "linear"}, "attn_type='linear' cannot be expressed"),
    (
        {"cond_stage_config": {"target": f"{ENCODERS}.FrozenCLIPEmbedder"}},
        "clip=None must be a fold",
    ),
    ({"linear_end": 0.0155}, "alphas_cumprod are not of ScheduleConfig"),
]


@pytest.mark.parametrize(
    ("changes", "said"), BAD, ids=[str(next(iter(c.items())))[:40] for c, _ in BAD]
)
def test_a_config_that_cannot_be_expressed_is_refused(changes: dict[str, Any], said: str) -> None:
    config, tensors = copy.deepcopy(SEMANTIC[0]), SEMANTIC[1]
    for key, value in changes.items():
        *path, last = key.split("__")
        at = config["model"]["params"]
        for name in path:
            at = at[name]
        at[last] = value
        if value is ...:
            del at[last]
    with pytest.raises(ValueError, match=said):
        interop.load_compvis(config, tensors)


UNET = UNetConfig(in_channels=3, out_channels=3, channels=32, channel_mult=(1, 2), attn_levels=(1,))
KL = AutoencoderConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1)
TEXT = TextConfig(d_cond=32, vocab_size=40, heads=4)


def shifted() -> Autoencoder:
    model = Autoencoder(KL)
    model.shift.fill_(0.5)
    return model


HYBRID = HybridConfig(
    tokens=ClassConfig(classes=("a",)), concat=SemanticConfig(labels=("x",), stages=1)
)
OURS: list[tuple[Callable[[], Any], str]] = [
    (lambda: UNet(UNetConfig(**vars(UNET) | {"groups": 8})), "cannot express groups=8, only 32"),
    (lambda: UNet(UNetConfig(**vars(UNET) | {"channel_mult": (2, 2)})), "must begin with 1"),
    (lambda: Autoencoder(AutoencoderConfig(**vars(KL) | {"patch": 2})), "patch=2, only 1"),
    (shifted, "shift=0.5"),
    (TEXT.build, r"cannot express TextConfig.*heads=4.*, only .*heads=8"),
    (HYBRID.build, "cannot express HybridConfig"),
]


@pytest.mark.parametrize("case", range(len(OURS)))
def test_what_has_no_official_form_is_refused(case: int, tmp_path: Path) -> None:
    build, said = OURS[case]
    with pytest.raises(ValueError, match=said):
        interop.save_compvis(shaken(build()), tmp_path / "own.ckpt")
    with pytest.raises(ValueError, match=r"x\.pt must end in \.ckpt or \.safetensors"):
        interop.save_compvis(UNet(UNET), tmp_path / "x.pt")
    assert list(tmp_path.iterdir()) == []
