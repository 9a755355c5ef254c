"""Two pictures side by side, one click: the preference study of LDM Tab. 4, for a notebook.

Two-alternative forced choice: whoever is asked cannot say "both". Which pair comes next and which
of its pictures is on the left are drawn by a seed, and nothing on the screen tells them apart.
"""

import csv
import hashlib
import html
import io
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minildm.fidelity import check_set
from minildm.files import atomic_write
from minildm.intervals import Measured, proportion_interval
from minildm.panel import SIDE, as_png, widgets_package

SIDES = ("left", "right")
COLUMNS = ("pair", "left", "right", "chosen", "study")


class PreferencePanel:
    """Asks of N pairs which picture is chosen, and counts; the last line of a cell.

    first, second: pictures (N, 3, H, W) in [-1, 1]; first[i] and second[i] are a pair.
    path: a CSV of the votes, a line each; a study that was begun there goes on, and pairs that
        have a vote are not asked for again.
    question: what stands above the pair. names: of `first` and `second`, for the CSV.
    seed: of the order of the pairs and of their sides.

    `buttons["left"].click()` is a vote. `current` is the number of the pair that is shown, None
    at the end; `shown` its pictures, left and right. Raises ValueError for sets that are not
    alike, and for a CSV of another study, or damaged.
    """

    def __init__(
        self,
        first: Tensor,
        second: Tensor,
        path: str | os.PathLike[str],
        *,
        question: str = "Which looks better?",
        names: tuple[str, str] = ("first", "second"),
        seed: int = 0,
    ) -> None:
        for name, x in (("first", first), ("second", second)):
            check_set(x, name, first.shape[1:])
        if len(first) != len(second) or not len(first):
            raise ValueError(f"first and second must be pairs, got {len(first)} and {len(second)}")
        if len(set(names)) < 2:
            raise ValueError(f"names={names} must be two different ones")
        self.pictures = [x.detach().float().cpu().clamp(-1, 1) for x in (first, second)]
        self.path, self.question, self.names = Path(path), question, tuple(names)
        draw = torch.Generator().manual_seed(seed)
        self.order = torch.randperm(len(first), generator=draw).tolist()
        self.on_the_left = torch.randint(2, (len(first),), generator=draw).tolist()
        self.study = self._fingerprint(seed)
        self._build(widgets_package())
        self._next()

    def _fingerprint(self, seed: int) -> str:
        """Changes with the pictures, the question and the seed: votes belong to one study."""
        content = hashlib.sha256(repr((self.question, self.names, seed)).encode())
        for x in self.pictures:
            content.update(((x + 1) * 127.5).round().to(torch.uint8).numpy().tobytes())
        return content.hexdigest()[:12]

    def _build(self, widgets: Any) -> None:
        self.buttons = {side: widgets.Button(description=side) for side in SIDES}
        for side, button in self.buttons.items():
            button.on_click(lambda _, side=side: self.vote(side))
        self.frames = {side: widgets.HTML() for side in SIDES}
        self.asked, self.said = widgets.HTML(), widgets.HTML()
        columns = [widgets.VBox([self.frames[s], self.buttons[s]]) for s in SIDES]
        self.box = widgets.VBox([self.asked, widgets.HBox(columns), self.said])

    # --- votes ---

    def votes(self) -> dict[int, str]:
        """What was chosen so far, by the pair's number; ValueError as for the panel."""
        if not self.path.exists():
            return {}
        rows = list(csv.DictReader(io.StringIO(self.path.read_text(encoding="utf-8"))))
        if any(row.get("study") != self.study for row in rows):
            raise ValueError(f"{self.path} holds votes of another study, or is damaged")
        found = {int(row["pair"]): row["chosen"] for row in rows if row["pair"].isdecimal()}
        known = set(found) <= set(self.order) and set(found.values()) <= set(self.names)
        if len(found) != len(rows) or not known:
            raise ValueError(f"{self.path} is damaged: not each of its lines is a pair and a name")
        return found

    def vote(self, side: str) -> None:
        """The picture on that side is chosen; the vote is on disk before the next pair comes."""
        if side not in SIDES:
            raise ValueError(f"side={side!r} must be left or right")
        if self.current is None:
            raise ValueError("each pair has its vote")
        names = self._names_of(self.current)
        chosen = names[SIDES.index(side)]
        if self.current not in self.votes():  # another window may have been faster
            kept = self.path.read_bytes() if self.path.exists() else _line(COLUMNS)
            with atomic_write(self.path) as file:
                file.write(kept + _line((self.current, *names, chosen, self.study)))
        self._next()

    def _names_of(self, pair: int) -> tuple[str, str]:
        """Whose picture is left, whose right."""
        return self.names if self.on_the_left[pair] == 0 else self.names[::-1]

    def share(self) -> Measured:
        """How often `names[0]` was chosen, with Wilson's interval; ValueError without a vote."""
        chosen = list(self.votes().values())
        if not chosen:
            raise ValueError(f"{self.path} has no vote yet")
        return proportion_interval(chosen.count(self.names[0]), len(chosen))

    # --- what is seen ---

    @property
    def shown(self) -> tuple[Tensor, Tensor]:
        """The pictures (3, H, W) on the screen, left and right; ValueError at the end."""
        if self.current is None:
            raise ValueError("each pair has its vote: nothing is shown")
        left = self.on_the_left[self.current]
        return self.pictures[left][self.current], self.pictures[1 - left][self.current]

    def _next(self) -> None:
        """Show the first pair that has no vote, or the result."""
        voted = self.votes()
        self.current: int | None = next((i for i in self.order if i not in voted), None)
        done = self.current is None
        self.asked.value = "" if done else f"<b>{html.escape(self.question)}</b>"
        for button in self.buttons.values():
            button.disabled = done
        for side, frame in self.frames.items():
            frame.value = ""
            if not done:
                source = f"data:image/png;base64,{as_png(self.shown[SIDES.index(side)])}"
                frame.value = f'<img src="{source}" alt="The {side} picture of the pair">'
        text = f"{len(voted)} of {len(self.order)} pairs"
        if done:
            text = f"Thank you. {self.names[0]} was preferred in {self.share()}."
        self.said.value = f'<div role="status">{html.escape(text)}</div>'

    @property
    def alt_text(self) -> str:
        """A sentence for those who cannot see the pictures, which tells nothing of their names."""
        return f"{self.question} Two pictures side by side, pair {len(self.votes()) + 1}."

    def _repr_mimebundle_(self, **_kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        shown = self.box._repr_mimebundle_() | {"text/plain": repr(self)}
        if self.current is None:
            return shown, {}
        left, right = self.shown
        white = torch.ones(3, left.shape[1], max(1, left.shape[2] // 8))
        png = as_png(torch.cat([left, white, right], dim=2), 2 * SIDE)
        return shown | {"image/png": png}, {"image/png": {"alt": self.alt_text}}

    def __repr__(self) -> str:
        return f"PreferencePanel({len(self.votes())} of {len(self.order)} pairs)"


def _line(values: tuple[Any, ...]) -> bytes:
    """One line of a CSV."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue().encode()
