"""Files: writes that are whole or not there at all, and where `data/` lies."""

import csv
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open `path` for writing bytes; it appears, whole, only when the block ends well.

    The bytes go to a temporary file beside it, are forced to the disk and then renamed over
    `path`. After any failure (a full disk, Ctrl-C) the old file stands unharmed and the
    temporary one is gone. An OSError names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)  # mkstemp's 0600 is for secrets
        Path(temporary).replace(path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = f"could not write it, kept as before: {error.strerror or error}"
            raise OSError(error.errno, reason, str(path)) from error
        raise


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write into; it becomes `path`, whole, only when the block ends well.

    Raises FileExistsError where `path` is there already, unless as an empty folder. After any
    failure nothing of it is left.
    """
    path = Path(path).absolute()
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(f"{path} is there already, and kept: name a new or an empty folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # mkdtemp's 0700 is for secrets
        if path.is_dir():
            path.rmdir()  # an empty one; not everywhere may a folder be renamed over it
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def lock(path: str | os.PathLike[str]) -> FileLock:
    """A lock that ends with its process; who may write into its folder may take it, too."""
    return FileLock(path, mode=0o666)  # it holds nothing; filelock's 0644 is for one user


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def path_between(start: str | Path, target: str | Path) -> str:
    """The way from one folder to another, relative, so that both can move together."""
    start, target = Path(start).resolve(), Path(target).resolve()
    try:
        return Path(os.path.relpath(target, start)).as_posix()
    except ValueError:  # on Windows, from one drive to another
        return target.as_posix()


def write_csv(
    path: str | os.PathLike[str], columns: Sequence[str], rows: Iterable[Mapping[str, Any]]
) -> None:
    """Write a line for each row under `columns`, atomically.

    What a row lacks stays empty, what has no column is left out.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def data_dir() -> Path:
    """The folder with emoji/, weights/ and results/: `MINILDM_DATA`, else the clone's data/.

    Raises FileNotFoundError when there is none, as after an install without the clone.
    """
    chosen = os.environ.get("MINILDM_DATA")
    folder = Path(chosen) if chosen else Path(__file__).resolve().parent.parent / "data"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no data folder at {folder}: install from a clone (pip install -e .), or set "
            "MINILDM_DATA to the data/ folder of one"
        )
    return folder


def cache_dir() -> Path:
    """Where decoded pictures and latents are kept: `MINILDM_CACHE`, else ~/.cache/minildm."""
    chosen = os.environ.get("MINILDM_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache/minildm"
