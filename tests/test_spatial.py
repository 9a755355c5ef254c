"""Pictures beside z_t: what the UNet is given, what is refused, and that the tokens stay apart."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import shaken
from torch import Tensor

from minildm import Autoencoder, ConditionerConfig, LatentDiffusion
from minildm.conditioning import build_conditioner
from minildm.diffusion import LatentDiffusionConfig
from minildm.spatial import masked

LABELS = ("sky", "grass", "dog", "cat")


def conditioner(concat: str, **options: Any) -> Any:
    if concat == "semantic":
        options = {"labels": LABELS, **options}
    return build_conditioner(ConditionerConfig(concat=concat, **options)).eval()


@pytest.fixture
def model_of(ldm_config: LatentDiffusionConfig) -> Any:
    """`model_of(concat, hybrid)`: the tiny model with a picture beside z_t, of random weights."""

    def make(concat: str, hybrid: bool = False) -> LatentDiffusion:
        kind = ldm_config.conditioner if hybrid else ConditionerConfig()
        stages = {1: 0, 2: 1, 4: 2}[ldm_config.autoencoder.f]
        labels = LABELS if concat == "semantic" else ()
        config = replace(kind, concat=concat, labels=labels, stages=stages)
        c = ldm_config.autoencoder.z_channels
        unet = replace(
            ldm_config.unet,
            in_channels=c + config.concat_channels(c),
            d_cond=ldm_config.unet.d_cond if hybrid else None,
        )
        whole = replace(ldm_config, conditioner=config, unet=unet)
        return shaken(LatentDiffusion(whole)).eval()

    return make


def asked(model: LatentDiffusion, concat: str, n: int = 2, side: int = 16) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    f = model.autoencoder.f
    x = 2 * torch.rand(n, 3, side, side, generator=draw) - 1
    mask = torch.ones(n, 1, side, side)
    mask[..., : side // 2] = 0
    return {
        "low_res": {"low_res": F.avg_pool2d(x, f)},
        "inpaint": {"image": x, "mask": mask},
        "semantic": {"semantic": torch.randint(4, (n, side, side), generator=draw)},
    }[concat]


KINDS = ("low_res", "inpaint", "semantic")


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("concat", KINDS)
def test_a_sample_has_the_condition_s_size_and_follows_it(
    concat: str, hybrid: bool, model_of: Any
) -> None:
    model = model_of(concat, hybrid)
    tokens = {"y": ["red", "blue"]} if hybrid else {}
    one, wide = asked(model, concat), asked(model, concat, side=32)
    options = {"steps": 2, "seed": 0}
    x = model.sample(one | tokens, **options)
    assert x.shape == (2, 3, 16, 16)
    assert model.sample(wide | tokens, **options).shape == (2, 3, 32, 32)
    swapped = model.sample({k: v.flip(0) for k, v in one.items()} | tokens, **options)
    assert not torch.allclose(x, swapped)
    if hybrid:
        assert not torch.allclose(x, model.sample(one | {"y": ["blue", "blue"]}, **options))
        assert not torch.allclose(x, model.sample(one | tokens, guidance_scale=2.0, **options))


@pytest.mark.parametrize("concat", KINDS)
def test_one_picture_is_drawn_n_times(concat: str, model_of: Any) -> None:
    model = model_of(concat)
    single = {k: v[0] for k, v in asked(model, concat).items()}
    x = model.sample(single, n=3, steps=2, seed=0)
    assert len(x) == 3 and not torch.allclose(x[0], x[1])
    if len(single) == 1:
        (alone,) = single.values()
        assert torch.equal(model.sample(alone, n=3, steps=2, seed=0), x)


def test_guidance_keeps_the_picture_in_both_halves(model_of: Any) -> None:
    """eps = null + s (c - null), each half computed alone with the same picture beside z_t."""
    model = model_of("low_res", hybrid=True)
    y = asked(model, "low_res") | {"y": ["red", "green"]}
    states = list(model.steps(y, steps=1, guidance_scale=3.0, seed=0, spacing="trailing"))
    z_T = torch.randn(2, *states[0].z.shape[1:], generator=torch.Generator().manual_seed(0))
    t = torch.full((2,), states[0].t)
    with torch.no_grad():
        c = model.conditioner(model.conditioner.batch_from(y, 2))
        null = model.conditioner.null(2)._replace(concat=c.concat)
        eps = [model.eps_theta(z_T, t, condition) for condition in (null, c)]
        guided = eps[0] + 3 * (eps[1] - eps[0])
        z0 = model.schedule.z0_from_eps(z_T, t, guided)
    assert torch.allclose(states[0].z0_hat, z0, rtol=1e-4, atol=1e-4 * float(z0.abs().max()))


# --- what stands beside z_t ---


def test_inpainting_sees_the_latent_of_what_is_known_and_one_in_the_hole(
    autoencoder: Autoencoder,
) -> None:
    f, x = autoencoder.f, torch.rand(2, 3, 16, 16) * 2 - 1
    mask = (torch.rand(2, 1, 16 // f, 16 // f) < 0.5).float()
    fine = F.interpolate(mask, scale_factor=f)

    def encode(picture: Tensor) -> Tensor:
        return autoencoder.encode(picture, sample=False)

    with torch.no_grad():
        beside = conditioner("inpaint")({"image": x, "mask": fine}, encode).concat
        c = autoencoder.config.z_channels
        black = x * fine - (1 - fine)  # -1 is black
        assert beside.shape[1] == c + 1
        assert torch.equal(beside[:, :c], encode(black))
        assert torch.equal(beside[:, c:], 1 - 2 * mask)  # 1 = hole, as in the official code
        assert torch.equal(masked(x, fine), black)


def test_what_lies_in_the_hole_changes_nothing(model_of: Any) -> None:
    model = model_of("inpaint")
    y = asked(model, "inpaint")
    other = y | {"image": torch.where(y["mask"] > 0.5, y["image"], torch.rand(2, 3, 16, 16))}
    options = {"steps": 2, "seed": 0}
    assert torch.equal(model.sample(y, **options), model.sample(other, **options))


def test_a_map_is_averaged_over_pixels_and_mixed() -> None:
    """Halved bilinearly, that is: mean over 2 x 2; then a 1 x 1 convolution, in float64."""
    tau = shaken(conditioner("semantic", stages=2, channels=5)).double()
    maps = torch.randint(4, (2, 8, 12), generator=torch.Generator().manual_seed(0))
    shares = torch.stack([(maps == k).double() for k in range(4)], dim=1)
    shares = shares.view(2, 4, 2, 4, 3, 4).mean((3, 5))
    expected = torch.einsum("cl,blhw->bchw", tau.spatial.mapper.weight[:, :, 0, 0], shares)
    found = tau({"semantic": maps}).concat
    assert found.shape == (2, 5, 2, 3)
    assert torch.allclose(found, expected, atol=1e-12)


# --- what is refused ---

X, MASK = torch.zeros(2, 3, 8, 8), torch.ones(2, 1, 8, 8)
WRONG = {
    "no picture": ("low_res", {"low_res": X[:, :1]}, "low_res must be a tensor (B, 3, H, W)"),
    "out of range": ("low_res", {"low_res": X + 1.5}, "low_res must lie in [-1, 1], got 1.5..1.5"),
    "NaN": ("low_res", {"low_res": X / 0}, "must lie in [-1, 1]"),
    "bytes": ("low_res", {"low_res": X.byte()}, "of floats, got (2, 3, 8, 8) torch.uint8"),
    "grey mask": ("inpaint", {"image": X, "mask": MASK / 2}, "mask must be binary"),
    "small mask": ("inpaint", {"image": X, "mask": MASK[..., :4]}, "must be (2, 1, 8, 8)"),
    "no mask": ("inpaint", {"image": X, "mask": None}, "mask must be (2, 1, 8, 8)"),
    "label": ("semantic", {"semantic": torch.full((1, 8, 8), 4)}, "must lie in 0..3, got 4..4"),
    "negative": ("semantic", {"semantic": torch.full((1, 8, 8), -1)}, "must lie in 0..3"),
    "float map": ("semantic", {"semantic": torch.zeros(1, 8, 8)}, "of int64, got (1, 8, 8)"),
    "sides": ("semantic", {"semantic": torch.zeros(1, 8, 6).long()}, "sides that 4 divides"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_picture_is_refused(case: str) -> None:
    concat, batch, said = WRONG[case]
    tau = conditioner(concat)
    if case == "no mask":
        with pytest.raises(ValueError) as error:
            tau.spatial(batch, lambda x: x)
    else:
        with pytest.raises(ValueError) as error:
            tau(batch, lambda x: x)
    assert said in str(error.value)


def test_wrong_questions_are_refused(model_of: Any) -> None:
    model = model_of("inpaint", hybrid=True)
    y = asked(model, "inpaint")
    for wrong in (None, y, y["image"], y | {"y": "red", "more": 1}):
        with pytest.raises(ValueError, match=r"dict of \['image', 'mask', 'y'\]"):
            model.sample(wrong, steps=1)
    with pytest.raises(ValueError, match="must hold tensors"):
        model.sample({"image": [1], "mask": y["mask"], "y": "red"}, steps=1)
    with pytest.raises(ValueError, match=r"size=32, but the condition beside z_t is for \(16, 16"):
        model.sample(y | {"y": ["red", "red"]}, size=32, steps=1)
    with pytest.raises(ValueError, match="guidance_scale must be 1"):
        plain = model_of("low_res")
        plain.sample(asked(plain, "low_res"), guidance_scale=2.0, steps=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"concat": "depth"}, "concat='depth' is not known; known: 'none', 'low_res'"),
        ({"stages": -1}, "stages=-1 must not be negative"),
        ({"channels": 0}, "channels=0 must be at least 1"),
        ({"labels": ("a", "a")}, "labels must be different names"),
    ],
)
def test_wrong_configs_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ConditionerConfig(**options)


def test_parts_that_do_not_fit_are_refused(
    ldm_config: LatentDiffusionConfig, model_of: Any
) -> None:
    config = model_of("semantic").config
    wrong = replace(config.conditioner, stages=5)
    with pytest.raises(ValueError, match="stages=5 must be log2 of f="):
        replace(config, conditioner=wrong)
    with pytest.raises(ValueError, match="and 3 of the condition beside it must be the UNet's"):
        replace(config, unet=ldm_config.unet)
    with pytest.raises(ValueError, match="needs labels"):
        conditioner("semantic", labels=())
