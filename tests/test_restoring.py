"""Judging super-resolution and inpainting, on models whose answers are known."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from minildm import EmojiDataset
from minildm.data.corruptions import enlarge, mean_fill, shrink
from minildm.experiments import as_regression
from minildm.fidelity import psnr
from minildm.losses import draw_t
from minildm.presets import PRESETS
from minildm.restoring import evaluate_restoration, given_of, kept, pasted, plain, restored, task_of

F = 4


class Answers:
    """Stands for a model: `answer` makes pictures of a condition."""

    def __init__(self, concat: str, answer: Any) -> None:
        self.config = SimpleNamespace(conditioner=SimpleNamespace(concat=concat))
        self.autoencoder, self.answer = SimpleNamespace(f=F), answer

    def sample(self, y: Any, **_options: Any) -> Tensor:
        return self.answer(y)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return (
        EmojiDataset("val", 64, subgroups=("food-fruit", "heart")).images[:40].float() / 127.5 - 1
    )


def test_what_is_given_follows_the_seed_alone(x: Tensor) -> None:
    for task in ("low_res", "inpaint"):
        one, same, other = (given_of(x, task, seed=s) for s in (0, 0, 1))
        assert all(torch.equal(one[key], same[key]) for key in one)
        if task == "inpaint":
            assert not torch.equal(one["mask"], other["mask"])
    assert torch.equal(given_of(x, "low_res")["low_res"], shrink(x, F))
    assert not torch.equal(given_of(x, "low_res", degradation="spoiled")["low_res"], shrink(x, F))


def test_the_rivals_are_bicubic_and_the_mean(x: Tensor) -> None:
    assert torch.equal(plain(given_of(x, "low_res")), enlarge(shrink(x, F), F))
    given = given_of(x, "inpaint")
    assert torch.equal(plain(given), mean_fill(x, given["mask"]))


def test_known_pixels_are_pasted(x: Tensor) -> None:
    given = given_of(x, "inpaint")
    out = restored(Answers("inpaint", lambda y: torch.zeros_like(y["image"])), given)
    assert torch.equal(out, x * given["mask"])
    assert pasted(x, {"low_res": x}) is x


def test_kept_is_the_psnr_of_what_was_given(x: Tensor) -> None:
    low = given_of(x, "low_res")
    assert torch.allclose(kept(x, low), psnr(shrink(x, F), shrink(x, F)))
    given = given_of(x, "inpaint")
    worse = torch.where(given["mask"] > 0.5, x, -x)  # the hole does not count
    assert kept(worse, given).isinf().all()
    off = kept((x * 0.5), given)
    alone = ((0.25 * x * given["mask"]) ** 2).mean((1, 2, 3))  # on [0, 1]: half of the difference
    assert torch.allclose(off, -10 * alone.log10(), atol=1e-3)


@pytest.mark.parametrize("task", ["low_res", "inpaint"])
def test_who_follows_is_told_from_who_does_not(task: str, x: Tensor) -> None:
    """One model answers with the plain rival, which is true to its condition; one with grey."""
    noise = 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))

    def follow(y: Any) -> Tensor:
        return (plain(y) + noise[: len(next(iter(y.values())))]).clamp(-1, 1)

    def ignore(y: Any) -> Tensor:
        return noise[: len(next(iter(y.values())))].clone()

    good, bad = (
        evaluate_restoration(Answers(task, answer), x, groups=4) for answer in (follow, ignore)
    )
    assert good["model"].settings["follows"] and not bad["model"].settings["follows"]
    rival = "bicubic" if task == "low_res" else "mean fill"
    assert set(good) == {"model", rival}
    assert good["model"]["psnr"].value > bad["model"]["psnr"].high
    names = {"psnr", "ssim", "perceptual", "kid", "precision", "recall", "kept", "kept_shuffled"}
    assert names <= set(good["model"])
    assert good[rival]["psnr"].n == len(x)


def test_other_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="concat='semantic' restores no picture"):
        task_of(Answers("semantic", None))


def test_a_regression_asks_once_where_all_is_noise() -> None:
    """Its only time is the last, its signal there is 0, and its answer is z0 itself."""
    experiment = as_regression(PRESETS["emoji-sr"])
    schedule = experiment.schedule.build()
    t = draw_t(schedule, 10_000, torch.device("cpu"), experiment.t_bias)
    assert (t == schedule.T - 1).all()
    assert float(schedule.alphas_cumprod[-1]) == 0
    out = torch.randn(2, 3, 4, 4)
    found = schedule.prediction("z0", out, torch.randn(2, 3, 4, 4), torch.ones(2).long())
    assert torch.equal(found.z0, out)
