"""Published models by name: files where they are, and else a stand-in that says what it is."""

from pathlib import Path

import pytest
import torch

from minildm import PUBLISHED, interop
from minildm.interop.official import FILES, official_model, small, stand_in


def test_every_published_model_has_its_files_named() -> None:
    assert FILES.keys() == PUBLISHED.keys() - {"stable-diffusion-v1"}
    for files in FILES.values():
        assert files.url.startswith("https://") and files.checkpoint.endswith(".ckpt")
        assert files.config.endswith(".yaml")


def test_a_stand_in_says_what_it_is_and_draws() -> None:
    found = official_model("celeba256")
    assert not found.real and "no folder was named" in found.said
    assert FILES["celeba256"].url in found.said
    x = found.model.sample(n=1, steps=2, seed=0)
    assert x.shape == (1, 3, 64, 64) and x.std() > 0.01
    assert torch.equal(x, official_model("celeba256").model.sample(n=1, steps=2, seed=0))
    assert not torch.equal(x, stand_in("celeba256", seed=1).sample(n=1, steps=2, seed=0))


@pytest.mark.parametrize("name", ["lsun_churches256", "txt2img-1p4B", "inpainting_big"])
def test_a_stand_in_has_the_blocks_of_what_it_stands_for(name: str) -> None:
    whole, narrow = PUBLISHED[name], small(PUBLISHED[name])
    for part in ("width_mult", "attn_levels", "resblock_updown", "scale_shift", "depth"):
        assert getattr(narrow.unet, part) == getattr(whole.unet, part)
    assert narrow.autoencoder.regularizer == whole.autoencoder.regularizer
    assert narrow.schedule == whole.schedule
    assert narrow.conditioner.concat == whole.conditioner.concat
    model = stand_in(name)
    assert model.config.unet == narrow.unet
    assert sum(p.numel() for p in model.parameters()) < 15e6


def test_files_that_are_there_are_read(tmp_path: Path) -> None:
    files, model = FILES["celeba256"], stand_in("celeba256", seed=3)
    (tmp_path / files.checkpoint).parent.mkdir(parents=True)
    interop.save_compvis(model, tmp_path / files.checkpoint)
    written = (tmp_path / files.checkpoint).with_suffix(".yaml")
    written.rename(tmp_path / files.config)
    found = official_model("celeba256", tmp_path)
    assert found.real and files.checkpoint in found.said
    state, same = model.state_dict(), found.model.state_dict()
    assert all(torch.equal(state[key], same[key]) for key in state)
    # Another one's are missing in the same folder: that is said, too.
    assert f"is not in {tmp_path}" in official_model("ffhq256", tmp_path).said


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="name='celeba' is not known; known: celeba256, ffhq256"):
        official_model("celeba")
