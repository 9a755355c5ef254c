"""Writes that are whole or not there at all, and where data/ lies."""

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from minildm.files import atomic_write, cache_dir, data_dir, lock, write_csv, write_json


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_appears_whole_with_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "model.bin"
    with atomic_write(path) as file:
        file.write(b"one")
        assert not path.exists()
        file.write(b"two")
    assert path.read_bytes() == b"onetwo"
    assert names(path.parent) == ["model.bin"]


def test_an_old_file_is_replaced_and_stands_until_then(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"a much longer old content")
    with atomic_write(str(path)) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"a much longer old content"
    assert path.read_bytes() == b"new"


def test_a_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    with atomic_write(tmp_path / "ours") as file:
        file.write(b"x")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("usual", "ours")]
    assert modes[0] == modes[1]


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such modes")
def test_a_lock_may_be_taken_by_whoever_may_write_there(tmp_path: Path) -> None:
    with lock(tmp_path / ".lock"):
        assert stat.S_IMODE((tmp_path / ".lock").stat().st_mode) == 0o666


@pytest.mark.parametrize("room", [0, 5, 99])
def test_a_full_disk_keeps_the_old_file_and_names_it(
    room: int, tmp_path: Path, full_disk: Callable[..., None]
) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"old")
    full_disk(room)
    with pytest.raises(OSError, match="No space left on device") as caught, atomic_write(path) as f:
        for _ in range(10):
            f.write(b"ten bytes!")
    assert caught.value.filename == str(path)
    assert str(path) in str(caught.value)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["model.bin"]


def test_a_disk_that_fills_at_the_last_moment_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "model.bin"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["model.bin"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_any_other_end_keeps_the_old_file_too(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"new")
        raise error
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["model.bin"]


def test_without_an_old_file_a_failure_leaves_nothing(
    tmp_path: Path, full_disk: Callable[..., None]
) -> None:
    full_disk(3)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "config.json", {"a": 1})
    assert names(tmp_path) == []


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("not a folder")
    with pytest.raises(OSError, match="runs"):
        write_json(tmp_path / "runs" / "config.json", {})


def test_json_goes_round_and_can_be_read(tmp_path: Path) -> None:
    content = {"a": [1, 2.5, None], "b": {"c": "ε"}}
    write_json(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == content
    assert len(text.splitlines()) > 5


def test_what_is_no_json_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", [1])
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert json.loads((tmp_path / "x.json").read_text()) == [1]
    assert names(tmp_path) == ["x.json"]


def test_data_is_beside_the_package_or_where_the_variable_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MINILDM_DATA", raising=False)
    assert data_dir() == Path(__file__).resolve().parent.parent / "data"
    monkeypatch.setenv("MINILDM_DATA", str(tmp_path))
    assert data_dir() == tmp_path


def test_no_data_folder_says_where_it_looked_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINILDM_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"nowhere.*clone.*MINILDM_DATA"):
        data_dir()


def test_the_cache_is_in_the_home_or_where_the_variable_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINILDM_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("MINILDM_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "minildm"


def test_rows_become_csv_with_what_they_lack_left_empty(tmp_path: Path) -> None:
    rows = [{"b": 2, "a": 'with, "quotes"'}, {"a": "", "other": 5}]
    write_csv(tmp_path / "new/t.csv", ("a", "b"), rows)
    text = (tmp_path / "new/t.csv").read_bytes()
    assert text == b'a,b\n"with, ""quotes""",2\n,\n'
    with pytest.raises(AttributeError):
        write_csv(tmp_path / "new/t.csv", ("a",), [None])
    assert (tmp_path / "new/t.csv").read_bytes() == text  # the old one stays
