"""A training's folder: whose run it is, its saved state, and its log."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minildm import Record
from minildm.runs import RunFolder

EXPERIMENT: dict[str, Any] = {"Toy": {"lr": 0.1, "data": {"size": 8, "styles": ["a", "b"]}}}


def started(path: Path) -> RunFolder:
    run = RunFolder(path, EXPERIMENT)
    run.fixed("precision", "fp32")
    return run


def records(n: int) -> list[Record]:
    """Steps 1 .. n - 1."""
    terms = [{"loss": 1 / i, "extra": float(i)} for i in range(1, n)]
    return [Record(i, 4 * i, 0.5 * i, 0.01, t) for i, t in enumerate(terms, 1)]


def test_opening_a_folder_writes_nothing(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "run", EXPERIMENT).load_state() is None
    assert RunFolder(tmp_path / "run", EXPERIMENT).history() == []
    assert not (tmp_path / "run").exists()


def test_the_same_experiment_opens_its_folder_again(tmp_path: Path) -> None:
    started(tmp_path)
    assert RunFolder(tmp_path, EXPERIMENT).fixed("precision", "bf16") == "fp32"


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"Toy": {"lr": 0.2, "data": {"size": 8, "styles": ["a", "b"]}}}, "lr: 0.1 there, 0.2 a"),
        ({"Toy": {"lr": 0.1, "data": {"size": 9, "styles": ["a", "b"]}}}, "Toy.data.size: 8 there"),
        ({"Toy": {"lr": 0.1, "data": {"size": 8, "styles": ["a"]}}}, r"styles: \['a', 'b'\] there"),
        ({"Toy": {"lr": 0.1, "data": {"size": 8}}}, "styles"),
        ({"Other": {"lr": 0.1}}, "Other.lr: None there, 0.1 asked"),
    ],
)
def test_another_experiment_is_refused_with_what_differs(
    other: dict, said: str, tmp_path: Path
) -> None:
    started(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=said) as caught:
        RunFolder(tmp_path, other)
    assert str(tmp_path) in str(caught.value)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_choice_is_made_once(tmp_path: Path) -> None:
    run = started(tmp_path)
    assert run.fixed("colour", "red") == "red"
    assert run.fixed("colour", "blue") == "red"
    assert started(tmp_path).fixed("colour", "green") == "red"


# --- the state ---


def test_the_last_state_comes_back(tmp_path: Path) -> None:
    run = started(tmp_path)
    run.save_state({"step": 1, "weights": torch.ones(3)})
    run.save_state({"step": 2, "weights": torch.arange(3.0)})
    state = started(tmp_path).load_state()
    assert state["step"] == 2
    assert torch.equal(state["weights"], torch.arange(3.0))
    assert "step 2" in run.last_good()
    assert "no checkpoint" in RunFolder(tmp_path / "new", EXPERIMENT).last_good()


@pytest.mark.parametrize("part", [0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999])
def test_a_state_that_was_cut_short_is_named(part: float, tmp_path: Path) -> None:
    run = started(tmp_path)
    run.save_state({"step": 1, "weights": torch.randn(1000)})
    file = tmp_path / "training/state.pt"
    content = file.read_bytes()
    file.write_bytes(content[: int(part * len(content))])
    with pytest.raises(ValueError, match=r"training/state\.pt is cut short.*delete it") as caught:
        run.load_state()
    assert str(tmp_path) in str(caught.value)


def test_a_state_that_would_run_code_is_refused(tmp_path: Path) -> None:
    run = started(tmp_path)
    torch.save({"step": 1, "trap": Path("x")}, tmp_path / "training/state.pt")
    with pytest.raises(ValueError, match="no training state"):
        run.load_state()


@pytest.mark.parametrize("room", [0, 100, 3000])
def test_a_full_disk_keeps_the_last_state(
    room: int, tmp_path: Path, full_disk: Callable[..., None]
) -> None:
    run = started(tmp_path)
    run.save_state({"step": 1, "weights": torch.zeros(1000)})
    full_disk(room)
    with pytest.raises(OSError, match=r"No space left.*state\.pt"):
        run.save_state({"step": 2, "weights": torch.ones(1000)})
    assert run.load_state()["step"] == 1
    assert sorted(p.name for p in (tmp_path / "training").iterdir()) == ["run.json", "state.pt"]


# --- the log ---


def test_the_log_is_read_as_it_was_written(tmp_path: Path) -> None:
    run, written = started(tmp_path), records(8)
    for record in written:
        run.log(record)
    read = started(tmp_path).history()
    assert [r[:2] for r in read] == [r[:2] for r in written]
    for one, other in zip(read, written, strict=True):
        assert one[2:4] == pytest.approx(other[2:4], rel=1e-5)
        assert one.terms == pytest.approx(other.terms, rel=1e-5)
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert lines[0] == "step,images,seconds,lr,loss,extra"
    assert len(lines) == 8


@pytest.mark.parametrize("step", [0, 3, 7, 100])
def test_a_rewound_log_ends_at_its_step_and_goes_on(step: int, tmp_path: Path) -> None:
    run = started(tmp_path)
    for record in records(8):
        run.log(record)
    before = run.history()
    run.rewind_log(step)
    assert run.history() == before[:step]
    run.log(records(10)[-1])
    assert [r.step for r in run.history()] == [*range(1, min(step, 7) + 1), 9]


def test_a_last_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    run = started(tmp_path)
    for record in records(4):
        run.log(record)
    file = tmp_path / "log.csv"
    file.write_text(file.read_text() + "4,16,2")
    assert [r.step for r in run.history()] == [1, 2, 3]
    run.rewind_log(3)
    run.log(records(6)[-1])
    assert [r.step for r in run.history()] == [1, 2, 3, 5]


def test_an_empty_log_holds_no_step(tmp_path: Path) -> None:
    run = started(tmp_path)
    (tmp_path / "log.csv").touch()
    assert run.history() == []
