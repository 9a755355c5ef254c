"""A training's folder: what it is, how far it came, and its log; survives being killed."""

import csv
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from minildm import processes
from minildm.files import atomic_write, write_json
from minildm.types import Record


class RunFolder:
    """`training/run.json` (what is trained), `training/state.pt` (a resume), `log.csv`.

    Opening a folder that holds a run of another experiment raises a ValueError that lists what
    differs; nothing is overwritten.
    """

    def __init__(self, path: str | Path, experiment: dict[str, Any]) -> None:
        self.path = Path(path)
        self._run, self._state = self.path / "training/run.json", self.path / "training/state.pt"
        self._log = self.path / "log.csv"
        if self._run.exists():
            self._refuse_another(json.loads(self._run.read_text())["experiment"], experiment)
        self.experiment = experiment

    def _refuse_another(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        old, new = flat(old), flat(new)
        differ = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
        if differ:
            listed = ", ".join(f"{k}: {old.get(k)} there, {new.get(k)} asked" for k in differ[:5])
            raise ValueError(
                f"run_dir={self.path} holds another run ({listed}); take another folder or "
                "delete that one"
            )

    def fixed(self, name: str, value: Any) -> Any:
        """A choice made once: `value` on the first start, and what was chosen then ever after.

        A callable is called where there is a choice to make. Of several processes the main one
        chooses for all; each must ask.
        """
        return processes.from_main(lambda: self._fixed(name, value))

    def _fixed(self, name: str, value: Any) -> Any:
        content = {"experiment": self.experiment}
        if self._run.exists():
            content = json.loads(self._run.read_text())
        if name not in content:
            content[name] = value() if callable(value) else value
            write_json(self._run, content)
        return content[name]

    def load_state(self) -> dict[str, Any] | None:
        """What `save_state` saved last, on the CPU; None for a fresh run."""
        if not self._state.exists():
            return None
        try:
            return torch.load(self._state, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            if isinstance(error, OSError) and error.filename:
                raise  # no permission, or the like; torch's own seek errors name no file
            raise ValueError(
                f"{self._state} is cut short or no training state: {error}; delete it to train "
                "from the start"
            ) from error

    def save_state(self, state: dict[str, Any]) -> None:
        """Replace the saved state, atomically."""
        with atomic_write(self._state) as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # torch hides a full disk behind its zip's wrong length
                raise error.__context__ or error from None

    def rewind_log(self, step: int) -> None:
        """Drop what was logged after `step`: a resumed run does those steps again."""
        if not self._log.exists():
            return
        header, *rows = self._log.read_text().splitlines() or [""]
        whole = [row for row in rows if row.count(",") == header.count(",")]
        kept = [row for row in whole if int(row.split(",")[0]) <= step]
        with atomic_write(self._log) as file:
            file.write("".join(f"{row}\n" for row in [header, *kept]).encode())

    def log(self, record: Record) -> None:
        """Append one step to `log.csv`."""
        self.path.mkdir(parents=True, exist_ok=True)
        fresh = not self._log.exists()
        with self._log.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if fresh:
                writer.writerow(["step", "images", "seconds", "lr", *record.terms])
            numbers = [record.seconds, record.lr, *record.terms.values()]
            writer.writerow([record.step, record.images, *(f"{n:.6g}" for n in numbers)])

    def history(self) -> list[Record]:
        """All logged steps."""
        return read_log(self.path)

    def last_good(self) -> str:
        """Says which checkpoint a failed run leaves behind."""
        state = self.load_state()
        return f"the checkpoint of step {state['step']} stays" if state else "no checkpoint yet"


def saved_step(folder: str | Path) -> int | None:
    """The step of the checkpoint that a training left in its folder; None where there is none."""
    path = Path(folder) / "training/state.pt"
    if not path.is_file():
        return None
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"]


def read_log(folder: str | Path) -> list[Record]:
    """The steps in a run folder's `log.csv`; a last line that was cut short is left out."""
    path = Path(folder) / "log.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    return [
        Record(int(r[0]), int(r[1]), float(r[2]), float(r[3]), _terms(header[4:], r[4:]))
        for r in rows
        if len(r) == len(header)
    ]


def _terms(names: list[str], values: list[str]) -> dict[str, float]:
    return {name: float(value) for name, value in zip(names, values, strict=True)}


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted names: {"unet": {"width": 32}} -> {"unet.width": 32}."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found
