"""The published first stages load exactly, and then compute what diffusers computes with them.

Names and shapes are the official ones; for the numbers, widths are a quarter and weights drawn,
and diffusers' own conversion of official checkpoints says where each tensor belongs.
"""

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers_copy import (
    DTYPES,
    TOLERANCE,
    AutoencoderKL,
    VQModel,
    convert_ldm_vae_checkpoint,
    error,
)
from published import (
    FIRST_STAGES,
    RELEASED,
    drawn,
    names_hash,
    narrowed,
    official_config,
    official_shapes,
    official_state,
    on_meta,
    tiny,
)
from torch import Tensor

import minildm
from minildm import Autoencoder, interop
from minildm.paper import RELEASED as PRESETS

LEVEL_ATTENTION = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.attn\.(\d+)\.(\w+)\.(\w+)")
THEIR_LAYERS = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def diffusers_shape(shape: Mapping[str, Any]) -> dict[str, Any]:
    """An official ddconfig as diffusers' arguments."""
    sides = [shape["resolution"] // 2**i for i in range(len(shape["ch_mult"]))]
    attends = [side in shape["attn_resolutions"] for side in sides]
    return {
        "block_out_channels": [narrowed(shape["ch"]) * m for m in shape["ch_mult"]],
        "down_block_types": [f"{'Attn' * a}DownEncoderBlock2D" for a in attends],
        "up_block_types": [f"{'Attn' * a}UpDecoderBlock2D" for a in attends[::-1]],
        "layers_per_block": shape["num_res_blocks"],
        "latent_channels": narrowed(shape["z_channels"]),
        "mid_block_add_attention": shape.get("attn_type") != "none",
    }


def in_diffusers(stage: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """diffusers' model of a first stage with these official tensors."""
    shape, levels = diffusers_shape(stage["ddconfig"]), len(stage["ddconfig"]["ch_mult"])
    if stage["n_embed"] is None:
        model = AutoencoderKL(**shape)
    else:
        codes, channels = tensors["quantize.embedding.weight"].shape
        model = VQModel(**shape, num_vq_embeddings=codes, vq_embed_dim=channels)
    state = convert_ldm_vae_checkpoint(dict(tensors), shape)
    for name in [name for name in state if ".attn." in name]:  # it only knows the middle's
        net, level, block, layer, kind = LEVEL_ATTENTION.fullmatch(name).groups()
        up = net == "decoder.up"
        place = levels - 1 - int(level) if up else level
        layer = f"attentions.{block}.{THEIR_LAYERS[layer]}.{kind}"
        state[f"{net}_blocks.{place}.{layer}"] = state.pop(name).squeeze()
    if "quantize.embedding.weight" in tensors:
        state["quantize.embedding.weight"] = tensors["quantize.embedding.weight"]
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("path", FIRST_STAGES)
def test_a_published_first_stage_loads_exactly(path: str) -> None:
    stage = FIRST_STAGES[path]
    tensors = on_meta(official_shapes(stage))
    model = interop.load_compvis(official_config(stage), tensors)
    assert len(tensors) == stage["state_dict"]["n_keys"]
    assert names_hash(official_state(model)) == stage["state_dict"]["keys_sha256"]
    assert sum(p.numel() for p in model.parameters()) == stage["params"]["total"]


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_first_stage_is_its_preset(name: str) -> None:
    stage = RELEASED[name]
    model = interop.load_compvis(official_config(stage), on_meta(official_shapes(stage)))
    assert model.config == PRESETS[name].model


def test_all_nine_are_there() -> None:
    assert len(RELEASED) == len(PRESETS) == 9
    assert RELEASED.keys() == PRESETS.keys()


@DTYPES
@pytest.mark.parametrize("name", RELEASED)
@torch.no_grad()
def test_a_loaded_first_stage_computes_what_diffusers_computes(
    name: str, dtype: torch.dtype, randn: Any
) -> None:
    stage = RELEASED[name]
    tensors = drawn(official_shapes(stage, narrowed))
    ours = interop.load_compvis(official_config(stage, narrowed), tensors).to(dtype)
    theirs = in_diffusers(stage, tensors).to(dtype)
    x = randn(1, 3, max(8, ours.f), 2 * max(8, ours.f), dtype=dtype).clamp(-1, 1)
    encoded = theirs.encode(x)
    if stage["n_embed"] is None:
        z = encoded.latent_dist.mean
        assert error(ours.posterior(x).logvar, encoded.latent_dist.logvar) < TOLERANCE[dtype]
    else:
        z = encoded.latents
    assert error(ours.encode(x, sample=False), z) < TOLERANCE[dtype]
    if stage["n_embed"] is not None:  # near codes: rounding must not choose another
        codes = ours.decoder.quantizer.codes(ours.code_indices(z))
        z = codes + 1e-3 * randn(*codes.shape, dtype=dtype)
    assert error(ours.decode(z), theirs.decode(z).sample) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["kl-f4", "vq-f8-n256"])
def test_what_was_loaded_comes_out_again(name: str) -> None:
    tensors = drawn(official_shapes(RELEASED[name], narrowed))
    model = interop.load_compvis(official_config(RELEASED[name], narrowed), tensors)
    state = official_state(model)
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[key], tensors[key]) for key in tensors)


def test_a_loaded_model_is_ready_to_use_and_to_train(randn: Any) -> None:
    config, tensors = tiny()
    before = torch.get_rng_state()
    model = minildm.interop.load_compvis({"model": config}, tensors)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    assert (model.scale.item(), model.shift.item()) == (1, 0)
    assert model.encode(randn(1, 3, 4, 6).clamp(-1, 1)).shape == (1, 2, 4, 6)
    assert (model.config.vq_legacy, model.config.commitment) == (True, 0.25)


def test_training_keeps_a_loaded_codebook_at_first(randn: Any) -> None:
    config, tensors = tiny()
    model = interop.load_compvis(config, tensors).train()
    model.decoder.quantizer.restart_after = 2
    model.decode(randn(1, 2, 2, 2))
    assert torch.equal(model.decoder.quantizer.codebook, tensors["quantize.embedding.weight"])


def test_the_interface_of_the_diffusion_model_is_the_same_network() -> None:
    config, tensors = tiny()
    plain = interop.load_compvis(config, tensors)
    config["target"] += "Interface"
    model = interop.load_compvis(config, tensors)
    assert model.config == plain.config
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_the_callers_tensors_stay_the_callers() -> None:
    config, tensors = tiny()
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    model = interop.load_compvis(config, tensors)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensors[name], kept[name]) for name in kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_precision_becomes_float32(dtype: torch.dtype) -> None:
    config, tensors = tiny()
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    state = official_state(interop.load_compvis(config, stored))
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert all(torch.equal(state[name], stored[name].float()) for name in stored)


def test_what_inference_does_not_need_is_left() -> None:
    config, tensors = tiny(use_ema=True, lossconfig={"target": "some.Loss"}, monitor="val/rec")
    extra = {
        "loss.discriminator.main.0.weight": torch.ones(2),
        "loss.perceptual_loss.lin0.model.1.weight": torch.ones(2),
        "loss.logvar": torch.tensor(0.0),
        "model_ema.decay": torch.tensor(0.99),
        "model_ema.num_updates": torch.tensor(3),
        "model_ema.encoderconv_inweight": torch.ones(2),
        "colorize": torch.ones(3, 4, 1, 1),
    }
    state = official_state(interop.load_compvis(config, tensors | extra))
    assert all(torch.equal(state[name], tensors[name]) for name in tensors)


LDM = {
    "model.diffusion_model.out.2.weight": torch.ones(2),
    "model_ema.diffusion_modelout2weight": torch.ones(2),
    "cond_stage_model.embedding.weight": torch.ones(2),
    "alphas_cumprod_prev": torch.ones(2),
    "betas": torch.ones(2),
    "posterior_mean_coef1": torch.ones(2),
    "log_one_minus_alphas_cumprod": torch.ones(2),
    "sqrt_recipm1_alphas_cumprod": torch.ones(2),
    "lvlb_weights": torch.ones(2),
    "logvar": torch.ones(2),
    "scale_factor": torch.tensor(0.2),
}


def test_a_first_stage_is_found_in_a_whole_models_checkpoint() -> None:
    config, tensors = tiny()
    whole = LDM | {f"first_stage_model.{name}": tensor for name, tensor in tensors.items()}
    state = official_state(interop.load_compvis(config, {"state_dict": whole}))
    assert all(torch.equal(state[name], tensors[name]) for name in tensors)
    with pytest.raises(ValueError, match=r"(?s)1 tensors do not fit.*encoder\.more has no place"):
        interop.load_compvis(config, whole | {"encoder.more": torch.ones(1)})


@pytest.mark.parametrize("checkpoint", [{}, LDM], ids=("nothing", "a whole model"))
def test_pixels_have_no_tensors(checkpoint: dict[str, Tensor], randn: Any) -> None:
    config = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    model = interop.load_compvis(config, checkpoint)
    x = randn(1, 3, 5, 7).clamp(-1, 1)
    assert isinstance(model, Autoencoder)
    assert torch.equal(model.decode(model.encode(x)), x)
    with pytest.raises(ValueError, match="more has no place"):
        interop.load_compvis(config, checkpoint | {"more": torch.ones(1)})
