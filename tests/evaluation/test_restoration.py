"""Super-resolution, inpainting and semantic maps, with models whose answers are known."""

from types import SimpleNamespace

import pytest
import torch
from helpers import randn
from torch import Tensor

from minildm.data.dataset import as_float
from minildm.data.emoji import EmojiDataset
from minildm.data.transforms import enlarge, mean_fill, shrink
from minildm.evaluation.following import evaluate_restoration
from minildm.evaluation.restoration import baseline, given_of, kept


@pytest.fixture(scope="module")
def x() -> Tensor:
    return as_float(EmojiDataset("val", 64, subgroups=("food-fruit", "heart")).images[:40])


def test_what_is_given_follows_the_seed_and_the_baselines_are_bicubic_and_the_mean(
    x: Tensor,
) -> None:
    for task in ("low_res", "inpaint"):
        one, same = (given_of(x, task, degradation="degraded", seed=1) for _ in range(2))
        assert all(torch.equal(one[key], same[key]) for key in one)
    given = given_of(x, "inpaint")
    assert not torch.equal(given["mask"], one["mask"])
    assert torch.equal(baseline(given), mean_fill(x, given["mask"]))
    assert torch.equal(given_of(x, "low_res")["low_res"], shrink(x, 4))
    assert torch.equal(baseline(given_of(x, "low_res")), enlarge(shrink(x, 4), 4))


def test_kept_is_the_psnr_of_what_was_given(x: Tensor) -> None:
    assert kept(x, given_of(x, "low_res")).isinf().all()
    given = given_of(x, "inpaint")
    worse = torch.where(given["mask"] > 0.5, x, -x)  # the hole does not count
    assert kept(worse, given).isinf().all()
    alone = ((0.25 * x * given["mask"]) ** 2).mean((1, 2, 3))  # on [0, 1]: half of the difference
    assert torch.allclose(kept(x * 0.5, given), -10 * alone.log10(), atol=1e-3)


@pytest.mark.parametrize("task", ["low_res", "inpaint"])
def test_who_follows_is_told_from_who_does_not(task: str, x: Tensor) -> None:
    """One model answers with the baseline, which is true to its condition; one with grey."""
    noise, found = 0.05 * randn(*x.shape), {}
    for name, answer in (("good", baseline), ("bad", lambda given: 0.0)):
        model = SimpleNamespace(
            autoencoder=SimpleNamespace(f=4),
            sample=lambda given, answer=answer, **_: (answer(given) + noise).clamp(-1, 1),
        )
        found[name] = evaluate_restoration(model, x, given_of(x, task), groups=4, steps=7)
    good, bad = found["good"]["model"], found["bad"]["model"]
    assert good.settings["follows"] == {"kept": True} and good.settings["steps"] == 7
    assert bad.settings["follows"] == {"kept": False}
    assert set(found["good"]) == {"model", "bicubic" if task == "low_res" else "mean fill"}
    assert good["psnr"].value > bad["psnr"].high and good["psnr"].n == len(x)
    assert {"ssim", "perceptual", "kid", "precision", "kept", "kept_shuffled"} <= set(good)
