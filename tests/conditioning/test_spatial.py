"""Images concatenated with z_t: what the UNet receives, alone and next to tokens."""

import pytest
import torch
import torch.nn.functional as F
from helpers import randn, shaken
from torch import Tensor

from minildm import ClassConfig, HybridConfig, InpaintConfig, LowResConfig, SemanticConfig

CONFIGS = {
    "low_res": LowResConfig(),
    "inpaint": InpaintConfig(),
    "semantic": SemanticConfig(labels=("sky", "grass", "dog", "cat"), channels=5),
}
INPUT = {
    "low_res": {"low_res": randn(2, 3, 4, 6).clamp(-1, 1)},
    "inpaint": {"image": randn(2, 3, 8, 12).clamp(-1, 1), "mask": (randn(2, 1, 8, 12) > 0).float()},
    "semantic": {"semantic": torch.arange(192).reshape(2, 8, 12) % 4},
}


def encode(x: Tensor, *, sample: bool = True) -> Tensor:
    """A first stage of f = 2 with six channels."""
    return torch.cat([F.avg_pool2d(x, 2), F.max_pool2d(x, 2)], dim=1)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_concatenated_channels_are_those_of_the_config(kind: str) -> None:
    config = CONFIGS[kind]
    c = config.build()(INPUT[kind], encode)
    assert c.tokens is None
    assert c.concat.shape[1] == config.concat_channels(6)
    assert kind != "low_res" or torch.equal(c.concat, INPUT[kind][kind])
    assert config.d_cond is None and not config.null_batch and config.p_uncond == 0
    with pytest.raises(ValueError, match=f"kind='{kind}' has no null condition"):
        config.build().null(2)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_single_image_is_repeated_and_may_stand_alone(kind: str) -> None:
    tau = CONFIGS[kind].build()
    single = {key: x[0] for key, x in INPUT[kind].items()}
    batch = tau.batch_from(single, 3)
    assert all(torch.equal(batch[key], torch.stack([x] * 3)) for key, x in single.items())
    if len(single) == 1:
        assert torch.equal(tau.batch_from(single[kind], 3)[kind], batch[kind])


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_hybrid_is_the_sum_of_its_parts(kind: str) -> None:
    tokens = ClassConfig(classes=("a", "b"), d_cond=4, p_uncond=0.3)
    config = HybridConfig(tokens=tokens, concat=CONFIGS[kind])
    tau = shaken(config.build())
    assert {name.split(".")[0] for name in tau.state_dict()} <= {"tokens", "concat"}
    assert (config.d_cond, config.p_uncond) == (4, 0.3)
    assert config.concat_channels(6) == CONFIGS[kind].concat_channels(6)
    batch = tau.batch_from(INPUT[kind] | {"y": "b"}, 1)
    assert batch["label"].tolist() == [1, 1]  # one class for both images
    c = tau(batch, encode, torch.tensor([True, False]))
    assert torch.equal(c.concat, tau.concat(batch, encode).concat)
    assert torch.equal(c.tokens[0], tau.null(1).tokens[0])
    assert torch.equal(c.tokens[1], tau.tokens(batch).tokens[1])


def test_inpainting_sees_the_latent_of_the_known_part_and_1_in_the_hole() -> None:
    x = INPUT["inpaint"]["image"]
    coarse = (torch.rand(2, 1, 4, 6) < 0.5).float()
    mask = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    tau = InpaintConfig().build()
    black = x * mask - (1 - mask)  # -1 is black
    inside = torch.where(mask > 0.5, x, torch.rand(2, 3, 8, 12))  # has no effect
    for image in (x, inside):
        batch = tau.batch_from({"image": image, "mask": mask.bool()}, 2)
        concat = tau(batch, encode).concat
        assert torch.equal(concat[:, :-1], encode(black))
        assert torch.equal(concat[:, -1:], 1 - 2 * coarse)  # 1 = hole, as in the official code


@pytest.mark.parametrize("stages", [0, 1, 2])
def test_a_semantic_map_is_averaged_over_pixels_and_mixed(stages: int) -> None:
    """Halved bilinearly, that is the mean over 2 x 2; then a 1 x 1 convolution, in float64."""
    config = SemanticConfig(labels=tuple("abcd"), stages=stages, channels=5)
    tau, f = shaken(config.build()).double(), 2**stages
    maps = torch.randint(4, (2, 8, 12), generator=torch.Generator().manual_seed(0))
    shares = torch.stack([(maps == k).double() for k in range(4)], dim=1)
    shares = shares.view(2, 4, 8 // f, f, 12 // f, f).mean((3, 5))
    expected = torch.einsum("cl,blhw->bchw", tau.mapper.weight[:, :, 0, 0], shares)
    concat = tau(tau.batch_from(maps.byte(), 2)).concat  # any type that holds integers
    assert torch.allclose(concat, expected, atol=1e-12)
