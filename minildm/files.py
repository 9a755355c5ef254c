"""Files: atomic writes, hashes of tensors, where `data/` and the cache are; progress bars."""

import hashlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from torch import Tensor, nn
from tqdm import tqdm


def progress(*args: Any, **options: Any) -> tqdm:
    """A tqdm bar as text, of which a saved notebook keeps the last state (and of a widget none)."""
    in_notebook = type(sys.stdout).__module__ == "ipykernel.iostream"
    return tqdm(*args, file=sys.stdout if in_notebook else None, **options)


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open `path` for writing bytes; the file appears, complete, only when the block succeeds.

    The bytes go to a temporary file in the same folder, which is renamed to `path`. After any
    failure (a full disk, Ctrl-C) the old file is unchanged. An OSError names `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        reason = f"cannot be written, left as before: {error.strerror or error}"
        raise OSError(error.errno, reason, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a folder to write into; it becomes `path`, complete, only when the block succeeds.

    Raises FileExistsError if `path` is a file or a folder with content.
    """
    path = Path(path).absolute()
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(f"{path} already exists: choose a new or an empty folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        folder = Path(temporary, path.name)
        folder.mkdir()
        yield folder
        folder.replace(path)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def data_dir() -> Path:
    """Return the folder with emoji/, weights/ and results/: `MINILDM_DATA`, else the clone's data/.

    Raises FileNotFoundError if it does not exist, as after an installation without a clone.
    """
    folder = Path(os.environ.get("MINILDM_DATA") or Path(__file__).resolve().parents[1] / "data")
    if not folder.is_dir():
        reason = "install from a clone (pip install -e .), or set MINILDM_DATA to its data/ folder"
        raise FileNotFoundError(f"no data folder at {folder}: {reason}")
    return folder


def cache_dir() -> Path:
    """Return the folder of decoded images and latents: `MINILDM_CACHE`, else ~/.cache/minildm.

    Where neither can be written, a temporary folder, with one warning.
    """
    try:
        folder = Path(os.environ.get("MINILDM_CACHE") or Path.home() / ".cache/minildm")
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
        folder = Path(tempfile.mkdtemp(prefix="minildm-"))
        os.environ["MINILDM_CACHE"] = str(folder)  # of the processes that this one starts, too
        warnings.warn(f"the cache goes to {folder} ({error})", stacklevel=2)
    return folder


def fingerprint(tensors: Mapping[str, Tensor] | nn.Module) -> str:
    """Return the sha256 of the names, shapes and float32 values of named tensors."""
    tensors = tensors.state_dict() if isinstance(tensors, nn.Module) else tensors
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().float().cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)}\n".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()
