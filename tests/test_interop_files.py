"""Official files: read whatever the format, refused with their name where they are not right."""

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
from published import official_state, tiny
from safetensors.torch import save_file
from torch import Tensor

from minildm import interop
from minildm.checkpoints import CheckpointError

CONFIG, TENSORS = tiny()
FORMATS: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    "model.ckpt": lambda tensors, path: torch.save({"state_dict": tensors, "epoch": 3}, path),
    "bare.ckpt": torch.save,
    "old.ckpt": lambda tensors, path: torch.save(
        {"state_dict": tensors}, path, _use_new_zipfile_serialization=False
    ),
    "model.safetensors": save_file,
}


@pytest.fixture(params=FORMATS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / request.param
    FORMATS[request.param](TENSORS, path)
    return path


def test_every_format_is_read(checkpoint: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"model": CONFIG, "data": {"target": "anything"}}))
    state = official_state(interop.load_compvis(config, checkpoint))
    assert all(torch.equal(state[name], TENSORS[name]) for name in TENSORS)


def test_training_leaves_the_file_as_it_is(checkpoint: Path) -> None:
    before = checkpoint.read_bytes()
    model = interop.load_compvis(CONFIG, checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert checkpoint.read_bytes() == before
    again = official_state(interop.load_compvis(CONFIG, str(checkpoint)))
    assert all(torch.equal(again[name], TENSORS[name]) for name in TENSORS)


def test_a_file_cut_short_is_refused(checkpoint: Path) -> None:
    whole = checkpoint.read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        checkpoint.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=f"{checkpoint.name} is cut short"):
            interop.load_compvis(CONFIG, checkpoint)


@pytest.mark.parametrize("name", ["noise.ckpt", "noise.safetensors"])
def test_a_file_of_something_else_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(CheckpointError, match=f"{name} is cut short"):
        interop.load_compvis(CONFIG, tmp_path / name)


@pytest.mark.parametrize("name", ["none.ckpt", "none.safetensors"])
def test_a_file_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        interop.load_compvis(CONFIG, tmp_path / name)


def test_a_file_without_names_is_refused(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "list.ckpt")
    with pytest.raises(CheckpointError, match=r"list\.ckpt holds no tensors by name but a list"):
        interop.load_compvis(CONFIG, tmp_path / "list.ckpt")


class Trap:
    """Unpickled freely, makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.folder,)


def zipped(content: object, path: Path) -> None:
    torch.save(content, path)


def legacy(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def plain(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("save", [zipped, legacy, plain])
def test_code_in_a_pickle_does_not_run(save: Callable[..., None], tmp_path: Path) -> None:
    path, sprung = tmp_path / "evil.ckpt", tmp_path / "sprung"
    save({"state_dict": TENSORS, "callbacks": Trap(sprung)}, path)
    with pytest.raises(
        CheckpointError, match=r"evil\.ckpt is cut short, no checkpoint, or would"
    ) as error:
        interop.load_compvis(CONFIG, path)
    assert not sprung.exists()
    assert "safe_globals" not in str(error.value)  # torch's advice, which is how to run it


NAMED = (  # whatever a pickle asks for, that no stand-in's name is
    *("os.system", "builtins.eval", "builtins.getattr", "subprocess.Popen", "torch.load"),
    *("pytorch_lightning.trainer.Trainer", "numpy.core.multiarray._reconstruct"),
    "pytorch_lightning.callbacks.model_checkpoint.os.system",
)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("call", [b"R", b"\x81"])  # as a function, as a class
def test_nothing_else_that_a_pickle_names_is_looked_up(
    name: str, call: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module, _, function = name.rpartition(".")
    pickled = b"\x80\x02" + f"c{module}\n{function}\n(X\x07\x00\x00\x00mkdir x".encode()
    Path("evil.ckpt").write_bytes(pickled + b"t" + call + b".")
    with pytest.raises(CheckpointError, match=rf"evil\.ckpt is .* nothing was run: .*{function}"):
        interop.load_compvis(CONFIG, "evil.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["evil.ckpt"]


def test_the_trap_would_spring(tmp_path: Path) -> None:
    zipped({"callbacks": Trap(tmp_path / "sprung")}, tmp_path / "evil.ckpt")
    torch.load(tmp_path / "evil.ckpt", weights_only=False)
    assert (tmp_path / "sprung").exists()


def test_what_lightning_leaves_is_read_as_inert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, name, module)
    made = module.ModelCheckpoint()
    made.best = 3
    state = {"best": np.float64(0.25), "callback": made}
    path = tmp_path / "lightning.ckpt"
    legacy({"callbacks": {module.ModelCheckpoint: state}, "state_dict": TENSORS}, path)
    # As NumPy 1 wrote it: the module has moved since.
    path.write_bytes(path.read_bytes().replace(b"numpy._core.multi", b"numpy.core.multi"))
    monkeypatch.delitem(sys.modules, name)
    loaded = official_state(interop.load_compvis(CONFIG, path))
    assert all(torch.equal(loaded[key], TENSORS[key]) for key in TENSORS)
    with pytest.raises(pickle.UnpicklingError):  # allowed for our reading alone
        torch.load(path, weights_only=True)


NAN = torch.full((8, 2), float("nan"))
MISFITS = {
    "missing": ({"quant_conv.weight": None}, r"quant_conv\.weight \(2, 4, 1, 1\) is missing"),
    "foreign": ({"more.weight": torch.ones(1)}, r"more\.weight has no place in this model"),
    "shape": (
        {"quant_conv.weight": torch.ones(2, 4)},
        r"quant_conv\.weight is \(2, 4\), must be \(2, 4, 1, 1\)",
    ),
    "nan": ({"quantize.embedding.weight": NAN}, r"quantize\.embedding\.weight holds .* not finite"),
    "infinite": ({"quant_conv.bias": torch.tensor([1, -torch.inf])}, r"quant_conv\.bias holds"),
    "whole numbers": ({"quant_conv.bias": torch.tensor([1, 2])}, r"quant_conv\.bias is torch\.int"),
    "no tensor": ({"quant_conv.bias": [1.0, 2.0]}, r"quant_conv\.bias is no tensor but a list"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_tensor_that_does_not_fit_is_named(misfit: str, tmp_path: Path) -> None:
    changes, said = MISFITS[misfit]
    tensors = {name: value for name, value in (TENSORS | changes).items() if value is not None}
    torch.save({"state_dict": tensors}, tmp_path / "odd.ckpt")
    with pytest.raises(CheckpointError, match=rf"(?s)odd\.ckpt: 1 tensors do not fit.*{said}"):
        interop.load_compvis(CONFIG, tmp_path / "odd.ckpt")
    with pytest.raises(CheckpointError, match=rf"(?s)checkpoint: 1 tensors do not fit.*{said}"):
        interop.load_compvis(CONFIG, tensors)


def test_a_sparse_tensor_does_not_fit() -> None:
    sparse = {"quant_conv.bias": torch.ones(2).to_sparse()}
    with pytest.raises(CheckpointError, match=r"quant_conv\.bias is .*sparse_coo; must be dense"):
        interop.load_compvis(CONFIG, TENSORS | sparse)


def test_ten_misfits_are_listed() -> None:
    foreign = {f"more.{i}": torch.ones(1) for i in range(20)}
    with pytest.raises(CheckpointError, match="20 tensors do not fit") as raised:
        interop.load_compvis(CONFIG, TENSORS | foreign)
    assert str(raised.value).count("has no place") == 10


SHAPE = CONFIG["params"]["ddconfig"]
KL = {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {"embed_dim": 2}}
BAD_SHAPES = {
    "linear attention": (
        {"attn_type": "linear"},
        r"attn_type='linear' .* 'vanilla', 'none'",
    ),
    "old linear attention": ({"use_linear_attn": True}, "use_linear_attn=True cannot be expressed"),
    "resampling": ({"resamp_with_conv": False}, "resamp_with_conv=False cannot be expressed"),
    "tanh": ({"tanh_out": True}, "tanh_out=True cannot be expressed"),
    "moments": ({"double_z": True}, "double_z=True cannot be expressed, only False"),
    "other channels out": ({"out_ch": 4}, "out_ch=4 cannot be expressed, only 3"),
    "unknown": (
        {"act": "relu"},
        "ddconfig: act='relu' is not known; known: attn_",
    ),
    "width": ({"ch": 48}, "width=48 .* groups=32"),
    "text": ({"ch": "wide"}, "ch='wide' must be a whole number >= 1"),
    "truth": ({"ch": True}, "ch=True must be a whole number"),
    "nothing": ({"num_res_blocks": 0}, "num_res_blocks=0 must be a whole number >= 1"),
    "one factor": ({"ch_mult": 2}, "ch_mult=2 must be a list of whole numbers"),
    "factors": ({"ch_mult": ["1"]}, r"ch_mult=\['1'\] must be a list of whole numbers"),
    "no levels": ({"ch_mult": []}, r"width_mult=\(\) must hold at least one"),
    "odd size": ({"ch_mult": [1, 1], "resolution": 9}, "resolution=9 must be a multiple of f=2"),
    "share": ({"dropout": "none"}, "dropout='none' must be a number"),
    "lacking": ({"z_channels": None}, "z_channels=None must be a whole number"),
}


@pytest.mark.parametrize("case", BAD_SHAPES)
def test_a_network_we_cannot_express_is_refused(case: str, tmp_path: Path) -> None:
    changes, said = BAD_SHAPES[case]
    params = {**CONFIG["params"], "ddconfig": SHAPE | changes}
    path = tmp_path / "odd.yaml"
    path.write_text(yaml.safe_dump({"model": {**CONFIG, "params": params}}))
    with pytest.raises(ValueError, match=rf"odd\.yaml: model\.params.*{said}"):
        interop.load_compvis(path, TENSORS)


BAD_PARAMS = {
    "remapped codes": (CONFIG, {"remap": "used.npy"}, "remap='used.npy' cannot be expressed"),
    "unknown": (CONFIG, {"codes": 3}, "config.params: codes=3 is not known"),
    "codebook of none": (CONFIG, {"n_embed": 0}, "n_embed=0 must be a whole number >= 1"),
    "no network": (CONFIG, {"ddconfig": 3}, "config.params.ddconfig must be a mapping, got 3"),
    "codebook": (KL, {"ddconfig": SHAPE | {"double_z": True}, "n_embed": 3}, "n_embed=3 is not"),
    "no moments": (KL, {"ddconfig": SHAPE}, "double_z=False cannot be expressed, only True"),
    "lacking": (KL, {}, "config.params lacks 'ddconfig'"),
}


@pytest.mark.parametrize("case", BAD_PARAMS)
def test_parameters_we_cannot_express_are_refused(case: str) -> None:
    config, changes, said = BAD_PARAMS[case]
    with pytest.raises(ValueError, match=said):
        interop.load_compvis({**config, "params": config["params"] | changes}, TENSORS)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"target": "ldm.Other"}, "'ldm.Other' is not known; known: ldm.models.diffusion.ddpm.L"),
        ({"target": "ldm.models.diffusion.ddpm.DDPM"}, "DDPM' is not known; known: ldm.models"),
        ({"model": {"params": {}}}, r"config: model names no target: \['params'\]"),
        ({"model": [1]}, r"config: model must be a mapping, got \[1\]"),
    ],
)
def test_another_target_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        interop.load_compvis(config, TENSORS)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "not readable as YAML"),
        (b"model: [1", "not readable as YAML"),
        (b"\xff\xfe\x00", "not readable as YAML"),
        (b"", "must be a mapping, got None"),
        (b"x: !!python/object/apply:os.mkdir [made]", "not readable as YAML"),
    ],
)
def test_a_config_that_is_none_is_refused(
    content: bytes | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "odd.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"odd\.yaml.*{said}"):
        interop.load_compvis(path, TENSORS)
    assert not (tmp_path / "made").exists()
