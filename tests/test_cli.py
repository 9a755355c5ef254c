"""The command line: each command once, small; bad input ends in one sentence."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from minildm import EmojiDataset, ScenesDataset, cli, load_model, plots
from minildm.data.dataset import to_tensor

TINY = ["--steps", "2", "--batch-size", "2", "--set", "data.size=32"]


def run(*words: object) -> int:
    """The exit status of `minildm WORDS`."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr("sys.argv", ["minildm", *map(str, words)])
        cli.main()
    return stop.value.code or 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen images of one's own, in two classes."""
    folder = tmp_path_factory.mktemp("own")
    for i, pixels in enumerate(EmojiDataset("val", 64).images[:16]):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / "ab"[i % 2] / f"{i}.png")
    return folder


def test_both_stages_train_on_a_folder_and_are_sampled_and_evaluated_on_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ae, ldm, classifier = (tmp_path / name for name in ("ae", "ldm", "classifier"))
    tiny = [*TINY, "--folder", folder]
    assert run("train", "emoji-kl-f8", "--run-dir", ae, *tiny, "--set", "model.patch=1") == 0
    assert "within train.warmup_steps=100" in capsys.readouterr().err
    changed = ["--set", "train.warmup_steps=1", "--set", "objective.predict=v"]
    second = ["train", "emoji-class-f8", "--first-stage", ae, *tiny, *changed]
    assert run(*second, "--run-dir", ldm) == 0
    assert run("train", "emoji-classifier", "--run-dir", classifier, *tiny, *changed[:2]) == 0
    assert (
        load_model(ldm).config.objective.predict == "v" and "warmup" not in capsys.readouterr().err
    )
    assert run(*second, "--run-dir", ldm, "--steps", 4) == 2
    error = capsys.readouterr().err
    assert "(train.steps: 2 there, 4 here)" in error and f"--init {ldm}" in error
    png, numbers = tmp_path / "samples.png", tmp_path / "numbers.json"
    assert run("sample", ldm, "b", "--n", 3, "--steps", 2, "--out", png) == 0
    with Image.open(png) as image:
        assert image.size[0] > 3 * 32
    whole = ["--split", "all", "--out", numbers]
    judged = ["--classifier", classifier, "--steps", 2, "--n", 8]
    assert run("evaluate", ldm, *judged, *whole) == 0
    results = json.loads(numbers.read_text())
    assert results["model"] == str(ldm) and results["data"]["path"] == str(folder)
    [evaluation] = results["evaluations"].values()
    measured = evaluation["measured"]
    assert {"kid", "precision", "nearest", "label", "label_real"} <= measured.keys()
    assert measured["recall"]["n"] == 16 and evaluation["settings"]["groups"] == 4
    for model, name in ((ae, "psnr"), (classifier, "label"), ("emoji-sr", "kept")):
        words = ["--folder", folder] if model == "emoji-sr" else []
        assert run("evaluate", model, *words, "--n", 4, "--steps", 1, *whole) == 0
        results = json.loads(numbers.read_text())
        assert results["model"] == str(model)
        assert name in next(iter(results["evaluations"].values()))["measured"]
    assert run("evaluate", ldm, "--n", 3, "--split", "all") == 2
    assert "n=3 and 16 images of own0-all must be at least 7" in capsys.readouterr().err
    card = json.loads((ae / "config.json").read_text())
    del card["info"]["data_config"]
    (ae / "config.json").write_text(json.dumps(card))
    assert run("evaluate", ae) == 2
    assert "give --folder" in capsys.readouterr().err


def test_images_of_ones_own_are_conditions_and_an_image_of_a_grid_is_made_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, draw = [], plots.image_grid
    monkeypatch.setattr(plots, "image_grid", lambda x, **how: shown.append(x) or draw(x, **how))
    image, mask, labels = folder / "a/0.png", tmp_path / "mask.png", tmp_path / "labels.png"
    Image.linear_gradient("L").resize((64, 64)).save(mask)  # white below
    Image.fromarray(ScenesDataset("val", 64, n=1).maps[0].numpy()).save(labels)
    classes = ["sample", "emoji-class", "heart", "person", "--n", 2]
    cases = [
        ["sample", "emoji-sr", "--image", image, "--size", 128, "--out", tmp_path / "x.webp"],
        ["sample", "emoji-inpaint", "--image", image, "--mask", mask, "--out", tmp_path / "x.jpg"],
        ["sample", "scenes-semantic", "--map", labels, "--n", 2, "--out", tmp_path / "x.png"],
        [*classes, "--out", tmp_path / "y.png"],
        [*classes, "--index", 2, "--out", tmp_path / "z.png"],
    ]
    for words in cases:
        assert run(*words, "--steps", 1) == 0
        with Image.open(words[-1]) as found:
            assert found.format == {".webp": "WEBP", ".jpg": "JPEG"}.get(words[-1].suffix, "PNG")
    assert [x.shape[0] for x in shown] == [1, 1, 2, 4, 1] and shown[0].shape[-1] == 128
    with Image.open(image) as pixels:
        known = to_tensor(pixels.convert("RGB"))[:, :30] / 127.5 - 1
    assert torch.allclose(shown[1][0, :, :30].cpu(), known, atol=1e-2)
    assert torch.allclose(shown[3][2], shown[4][0], atol=1e-3)
    assert run("reconstruct", "mixed-kl-f4", image, folder / "b/1.png", "--out", cases[0][-1]) == 0
    assert torch.allclose(shown[5][0, :, :30], known, atol=1e-2)  # the input, above
    assert shown[5].shape == (4, 3, 64, 64)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("emoji-class", ["person", "food-fruit"]),
        ("emoji-text", ["a red apple"]),
        ("emoji-inpaint", ["--n", "2"]),
        ("emoji-sr", ["--n", "2"]),
        ("scenes-semantic", ["--n", "2"]),
        ("scenes-layout", ["--layout", "LAYOUT", "--n", "2"]),
    ],
)
def test_each_shipped_model_is_sampled_by_one_command(
    model: str, words: list[str], tmp_path: Path
) -> None:
    out, layout = tmp_path / "x.png", tmp_path / "layout.json"
    layout.write_text('{"classes": ["dog"], "boxes": [[0.1, 0.5, 0.4, 0.9]]}')
    words = [layout if word == "LAYOUT" else word for word in words]
    assert run("sample", model, *words, "--steps", 1, "--out", out) == 0
    assert out.stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "emoji-clas", "--run-dir", "x"], "preset='emoji-clas' is not known"),
        (["train", "emoji-class", "--run-dir", "x"], "requires --first-stage"),
        (["train", "emoji-kl-f4", "--run-dir", "x", "--set", "modl.patch=1"], "modl"),
        (["train", "emoji-kl-f4", "--run-dir", "x", "--set", "train.lr"], "NAME=VALUE"),
        (["train", "emoji-kl-f4", "--run-dir", "x", "--set", "model.channels=1000000000"], "10"),
        (["train", "emoji-kl-f4", "--run-dir", "x", "--folder", "nowhere"], "nowhere"),
        (["train", "emoji-kl-f4", "--run-dir", "x", "--device", "cuda:7"], "cuda:7"),
        (["sample", "emoji-clas"], "emoji-class"),
        (["sample", "mixed-kl-f4"], "not 'latent-diffusion'"),
        (["sample", "emoji-class", "frut"], "frut"),
        (["sample", "emoji-class"], "None"),
        (["sample", "scenes-layout", "--layout", "LAYOUT"], "is not a layout"),
        (["sample", "emoji-class", "person", "--out", "x.gif"], "must end in .png, .jpg or .webp"),
        (["sample", "emoji-class", "person", "--out", "LAYOUT/x.png"], "exists"),
        (["sample", "emoji-class", "person", "--image", "LAYOUT"], "does not read"),
        (["sample", "emoji-inpaint", "--mask", "LAYOUT"], "must be a dict of image"),
        (["sample", "emoji-class", "person", "--index", "1"], "must be below 1"),
        (["sample", "scenes-semantic", "--map", "LAYOUT"], "cannot identify image"),
        (["reconstruct", "emoji-class", "LAYOUT"], "not 'autoencoder'"),
        (["convert", "nothing", "x"], "nothing"),
        (["demo", "--scale", "huge"], "huge"),
    ],
)
def test_bad_input_ends_in_one_sentence(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = tmp_path / "layout.json"
    layout.write_text('{"boxes": 3}')
    paths = {"x": tmp_path / "x", "LAYOUT": layout, "LAYOUT/x.png": layout / "x.png"}
    assert run(*(paths.get(word, word) for word in words)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("minildm: ") and "\n" not in error
    assert said in error
