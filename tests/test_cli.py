"""The command line: what is written, and how bad input ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from minildm import EmojiDataset, cli


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """`minildm ARGUMENTS` in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["minildm", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_sample_draws_one_picture_a_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "two.png"
    arguments = ["sample", "emoji-class", "food-fruit", "heart", "--steps", "2", "--out", str(out)]
    assert run(monkeypatch, *arguments) == 0
    with Image.open(out) as picture:
        assert picture.width > 128
        assert "food-fruit" in picture.info["Description"]
    assert "2 pictures" in capsys.readouterr().out


def test_evaluate_writes_the_numbers_it_prints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "judge.json"
    assert run(monkeypatch, "evaluate", "emoji-judge", "--out", str(out)) == 0
    found = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == found
    assert {"label", "group", "style"} <= found.keys()


def test_evaluate_measures_a_first_stage_in_one_call(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = SimpleNamespace(name="emoji-val", images=EmojiDataset("val", 64).images[:24])
    monkeypatch.setattr(cli.DataConfig, "dataset", lambda self, split: few)
    out = tmp_path / "first_stage.json"
    assert run(monkeypatch, "evaluate", "emoji-kl-f4", "--out", str(out)) == 0
    found = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == found
    rows = found["measured"]
    assert {"psnr", "ssim", "perceptual", "kid", "precision", "recall", "compression"} < rows.keys()
    assert found["psnr"].endswith("(N=24)") and rows["psnr"]["value"] > 25
    assert rows["compression"] == {"value": 16.0, "low": None, "high": None, "n": 24}
    assert found["settings"]["features"] in ("EfficientNet-Lite0", "Inception")


def test_evaluate_measures_on_photographs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "evaluate", "emoji-kl-f4", "--data", "photos", "--size", "32") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["data"], found["size"]) == ("photos-val", 32)
    assert found["settings"]["clusters"] == 11  # photographs, of which there are 88 crops
    assert found["measured"]["psnr"]["n"] == 88


@pytest.fixture
def two_classes(tmp_path: Path) -> Path:
    for name, value in (("dark", 40), ("light", 220)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(6):
            noise = torch.randint(-20, 20, (32, 32, 3), generator=torch.Generator().manual_seed(i))
            array = (noise + value).to(torch.uint8).numpy()
            Image.fromarray(array).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


def test_both_stages_train_on_a_folder_of_pictures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, two_classes: Path
) -> None:
    common = ["--folder", str(two_classes), "--size", "32", "--steps", "2", "--device", "cpu"]
    ae, ldm, out = (str(tmp_path / name) for name in ("ae", "ldm", "own.png"))
    assert run(monkeypatch, "train", "emoji-kl-f4", "--run-dir", ae, *common) == 0
    stage2 = ["train", "emoji-class", "--first-stage", ae, "--run-dir", ldm, *common]
    assert run(monkeypatch, *stage2) == 0
    assert run(monkeypatch, "sample", ldm, "dark", "light", "--steps", "2", "--out", out) == 0
    assert Path(out).stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "emoji-kl-f5", "--run-dir", "x"], "preset='emoji-kl-f5' is not known"),
        (["train", "emoji-class", "--run-dir", "x"], "needs --first-stage"),
        (["train", "emoji-kl-f4", "--run-dir", "x", "--folder", "nowhere"], "nowhere"),
        (["sample", "emoji-claas"], "pretrained model 'emoji-claas' is not known"),
        (["sample", "emoji-class", "food-friut"], "did you mean 'food-fruit'"),
        (["sample", "emoji-class"], "name 1 of the classes"),
        (["sample", "emoji-kl-f4"], "not a diffusion model"),
        (["sample", "emoji-class", "heart", "--steps", "0"], "steps=0 must lie in 1..T=1000"),
        (["demo", "--scale", "huge"], "scale='huge' is not known"),
        (["demo", "--device", "abacus"], "device='abacus' is not here; there is"),
        (["evaluate", "emoji-judge", "--data", "photos"], "--data and --folder are for first"),
        (["evaluate", "emoji-kl-f4", "--data", "mnist"], "kind='mnist' is not known"),
        (
            ["train", "emoji-kl-f4", "--run-dir", "x", "--data", "photos", "--folder", "y"],
            "give --data photos or --folder y, not both",
        ),
        (
            ["sample", "emoji-class", "heart", "--sampler", "euclid"],
            "sampler='euclid' is not known; known: ddim, ddpm",
        ),
    ],
)
def test_bad_input_ends_in_one_line_that_names_it(
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == 2
    message = capsys.readouterr().err
    assert said in message
    assert len(message.strip().splitlines()) == 1
    assert not any(path.suffix in (".png", ".safetensors") for path in tmp_path.rglob("*"))


def test_a_broken_picture_is_found_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    two_classes: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (two_classes / "dark/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n cut short")
    command = ["train", "emoji-kl-f4", "--run-dir", str(tmp_path / "ae"), "--size", "32"]
    command += ["--folder", str(two_classes), "--steps", "2", "--device", "cpu"]
    assert run(monkeypatch, *command) == 2
    assert "broken.png is not a readable picture" in capsys.readouterr().err
    assert not (tmp_path / "ae").exists()
    (two_classes / "dark/broken.png").unlink()
    assert run(monkeypatch, *command) == 0  # the same command, with the picture moved away


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to one process")
def test_ctrl_c_says_how_to_go_on(tmp_path: Path, two_classes: Path) -> None:
    command = [sys.executable, "-m", "minildm", "train", "emoji-kl-f4", "--device", "cpu"]
    command += ["--run-dir", str(tmp_path / "ae"), "--size", "32", "--folder", str(two_classes)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "ae/log.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from the last checkpoint" in err
    assert "Traceback" not in err


def test_python_m_minildm_is_the_same_command_line() -> None:
    command = [sys.executable, "-m", "minildm", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert all(name in shown.stdout for name in ("demo", "train", "sample", "evaluate"))
