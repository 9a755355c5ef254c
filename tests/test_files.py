"""Files that are complete or absent, the folders of data and cache, and hashes of tensors."""

import errno
import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn

from minildm.files import (
    atomic_write,
    cache_dir,
    data_dir,
    fingerprint,
    new_folder,
    write_json,
)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_appears_complete_with_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "model.bin"
    for new in (b"first content", b"second"):
        with atomic_write(str(path)) as file:
            file.write(new)
        assert path.read_bytes() == new
    assert names(path.parent) == ["model.bin"]


ENOSPC = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [ENOSPC, KeyboardInterrupt()], ids=repr)
def test_any_failure_keeps_the_old_file(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(error)) as caught, atomic_write(path) as file:
        file.write(b"new")
        raise error
    assert names(tmp_path) == ["model.bin"] and path.read_bytes() == b"old"
    if error is ENOSPC:
        assert caught.value.filename == str(path)
        assert "No space left on device" in str(caught.value)


def test_a_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "models" / "one"
    with pytest.raises(RuntimeError), new_folder(path) as folder:
        (folder / "config.json").write_text("{}")
        raise RuntimeError
    assert names(path.parent) == []
    path.mkdir()  # empty: may be replaced
    with new_folder(path) as folder:
        (folder / "config.json").write_text("{}")
        assert names(path) == []
    assert names(path) == ["config.json"]
    assert names(path.parent) == ["one"]


def test_what_is_there_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(b"kept")
    for path in (tmp_path, file):
        with pytest.raises(FileExistsError, match=f"{path.name} already exists"), new_folder(path):
            pass
    with pytest.raises(OSError, match=r"model\.bin"):  # a file in place of a folder
        write_json(file / "config.json", {})
    assert file.read_bytes() == b"kept"


def test_where_data_and_cache_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINILDM_DATA", raising=False)
    assert data_dir() == Path(__file__).resolve().parent.parent / "data"
    monkeypatch.setenv("MINILDM_DATA", str(tmp_path))
    assert data_dir() == tmp_path
    monkeypatch.setenv("MINILDM_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"nowhere.*clone.*MINILDM_DATA"):
        data_dir()
    monkeypatch.delenv("MINILDM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "minildm"
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))  # as one that cannot be written
    with pytest.warns(UserWarning, match=r"the cache goes to .*minildm-.* \("):
        folder = cache_dir()
    assert folder.is_dir() and cache_dir() == folder  # no second warning: those are errors


def test_the_fingerprint_is_of_names_shapes_and_float32_values() -> None:
    model = nn.Linear(2, 3)
    bias, weight = (p.detach().numpy().tobytes() for p in (model.bias, model.weight))
    by_hand = hashlib.sha256(b"bias (3,)\n" + bias + b"weight (3, 2)\n" + weight).hexdigest()
    state = model.state_dict()
    assert fingerprint(model) == fingerprint(dict(reversed(state.items()))) == by_hand
    assert fingerprint({**state, "bias": state["bias"] + 1e-6}) != by_hand
    assert fingerprint({**state, "weight": state["weight"].reshape(2, 3)}) != by_hand
    half = {"x": torch.tensor([1.5], dtype=torch.bfloat16)}
    assert fingerprint(half) == fingerprint({"x": torch.tensor([1.5])})
