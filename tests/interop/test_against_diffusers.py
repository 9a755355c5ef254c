"""Numbers equal diffusers', element by element, with random weights and replayed noise.

Our models are saved for diffusers and theirs read by us: a tensor in a wrong place would show.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randn, shaken
from interop import diffusers_models as tiny
from interop import official_models as official
from interop.diffusers_models import LDM, PIXELS, STABLE, SUPER, TEXT, diffusers, error, quiet
from torch import Tensor

from minildm import interop
from minildm.compression.autoencoder import Autoencoder, AutoencoderConfig
from minildm.conditioning import (
    CaptionTokenizer,
    ConditionerConfig,
    FrozenTextConfig,
    LowResConfig,
    TextConfig,
)
from minildm.diffusion.latent_diffusion import LatentDiffusion, LatentDiffusionConfig
from minildm.diffusion.objective import ObjectiveConfig
from minildm.diffusion.schedule import ScheduleConfig
from minildm.diffusion.unet import UNet, UNetConfig
from minildm.interop.diffusers import PIPELINES

with quiet():
    from diffusers.loaders.single_file_utils import (
        convert_ldm_unet_checkpoint,
        convert_ldm_vae_checkpoint,
    )
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
        LDMBertConfig,
        LDMBertModel,
    )

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=("float32", "float64"))
KL = AutoencoderConfig(z_channels=3, channels=8, channel_mult=(1, 2), num_res_blocks=1, groups=4)
VQ = replace(KL, regularizer="vq", codebook_size=32, hid_z_channels=5, vq_legacy=True)
AUTOENCODERS = {
    "kl, attention": replace(KL, channel_mult=(1, 2, 2), attn_levels=(1,), num_res_blocks=2),
    "kl, no attention": replace(KL, mid_attn=False),
    "kl, attention everywhere": replace(KL, attn_levels=(0, 1)),
    "vq": VQ,
    "vq, one level": replace(VQ, channel_mult=(1,), attn_levels=(0,), mid_attn=False),
}
UNET = UNetConfig(
    in_channels=3,
    out_channels=3,
    channels=8,
    channel_mult=(1, 2, 3),
    attn_levels=(0, 2),
    d_head=8,
    groups=4,
)
ACROSS = replace(UNET, d_cond=5, depth=2, heads=2, d_head=None)
UNETS = {
    "self-attention": UNET,
    "one residual block, no level attends": replace(UNET, attn_levels=(), num_res_blocks=1),
    "resblock_updown, scale_shift": replace(UNET, resblock_updown=True, scale_shift=True),
    "cross-attention": ACROSS,
    "cross-attention, heads by width": replace(ACROSS, heads=None, d_head=4),
    "cross-attention, scale_shift": replace(ACROSS, scale_shift=True, attn_levels=(1,)),
}


def theirs_of(model: Any, folder: Path, dtype: torch.dtype) -> Any:
    """diffusers' model of ours."""
    interop.save_diffusers(model, folder)
    kind = getattr(diffusers, tiny.json.loads((folder / "config.json").read_text())["_class_name"])
    with quiet():
        return kind.from_pretrained(folder).eval().to(dtype)


@DTYPES
@pytest.mark.parametrize("name", AUTOENCODERS)
@torch.no_grad()
def test_a_first_stage_equals_theirs(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config, most = AUTOENCODERS[name], TOLERANCE[dtype]
    ours = shaken(Autoencoder(config)).eval()
    ours.scale.fill_(1.7)
    theirs, ours = theirs_of(ours, tmp_path / "theirs", dtype), ours.to(dtype)
    factor = theirs.config.scaling_factor
    x = randn(2, 3, 16, 24, dtype=dtype).clamp(-1, 1)
    encoded = theirs.encode(x)
    z = encoded.latents if config.regularizer == "vq" else encoded.latent_dist.mean
    assert error(ours.encode(x, sample=False), z * factor) < max(most, 1e-7)  # float32 factor
    if config.regularizer == "kl":
        posterior, moments = ours.posterior(x), encoded.latent_dist
        assert error(posterior.logvar, moments.logvar) < most
        assert error(posterior.kl(), moments.kl()) < most
        noise = randn(*z.shape, seed=3, dtype=dtype)
        drawn = ours.encode(x, noise=lambda _: noise) * ours.scale
        assert error(drawn, moments.mean + moments.std * noise) < most
    else:
        codes, loss, (_, _, indices) = theirs.quantize(z)
        quantized = ours.decoder.quantizer(z)
        assert torch.equal(quantized.indices.flatten(), indices)
        assert error(quantized.z, codes) < most and error(quantized.loss, loss) < most
    z = randn(2, 3, 8, 6, dtype=dtype)
    assert error(ours.decoder(z), theirs.decode(z).sample) < most


@DTYPES
@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("size", [(8, 12), (5, 7)], ids=("8x12", "5x7"))
def test_a_unet_equals_theirs(
    name: str, size: tuple[int, int], dtype: torch.dtype, tmp_path: Path
) -> None:
    config = UNETS[name]
    if config.resblock_updown and size == (5, 7):
        size = (8, 4)
    ours = shaken(UNet(config)).eval()
    theirs, ours = theirs_of(ours, tmp_path / "theirs", dtype), ours.to(dtype)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    z, t = randn(2, 3, *size, dtype=dtype).requires_grad_(), torch.tensor([3, 700])
    tokens = [randn(2, 7, 5, seed=1, dtype=dtype)] if config.d_cond else []
    if not config.d_cond and size == (5, 7):
        z = randn(2, 3, 8, 4, dtype=dtype).requires_grad_()  # UNet2DModel takes no odd sizes
    out, truth = ours(z, t, *tokens), theirs(z, t, *tokens).sample
    assert error(out, truth) < TOLERANCE[dtype]
    gradients = [torch.autograd.grad(y.square().sum(), z)[0] for y in (out, truth)]
    assert error(*gradients) < 10 * TOLERANCE[dtype]


# --- official tensors, brought into diffusers' models by diffusers' own conversion ---


def official_part(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", ["layout2img-openimages256", "cin256-v2"])
@torch.no_grad()
def test_an_official_unet_computes_what_diffusers_computes(name: str) -> None:
    config, shapes = official.unet(official.BY_NAME[name], narrow=True)
    tensors, p = official.drawn(shapes), config["params"]
    ours = interop.load_compvis(config, tensors)
    widths = [p["model_channels"] * m for m in p["channel_mult"]]
    attends = [2**i in p["attention_resolutions"] for i in range(len(widths))]
    theirs = diffusers.UNet2DConditionModel(
        in_channels=p["in_channels"],
        out_channels=p["out_channels"],
        block_out_channels=widths,
        down_block_types=[f"{'CrossAttn' * a}DownBlock2D" for a in attends],
        up_block_types=[f"{'CrossAttn' * a}UpBlock2D" for a in attends[::-1]],
        layers_per_block=p["num_res_blocks"],
        attention_head_dim=[ours.config.heads_of(width) for width in widths],
        transformer_layers_per_block=p["transformer_depth"],
        cross_attention_dim=p["context_dim"],
    )
    shape = {"layers_per_block": p["num_res_blocks"]}
    theirs.load_state_dict(convert_ldm_unet_checkpoint(official_part(tensors), shape))
    z, t = randn(2, 3, 8, 16), torch.tensor([3, 900])
    tokens = randn(2, 5, p["context_dim"], seed=1)
    assert error(ours(z, t, tokens), theirs.eval()(z, t, tokens).sample) < 1e-5


@pytest.mark.parametrize("name", ["kl-f4", "vq-f4"])
@torch.no_grad()
def test_an_official_first_stage_computes_what_diffusers_computes(name: str) -> None:
    config, shapes = official.first_stage(official.RELEASED[name], official.quarter)
    tensors, p = official.drawn(shapes), config["params"]["ddconfig"]
    ours = interop.load_compvis(config, tensors)
    n = len(p["ch_mult"])
    shape = {
        "block_out_channels": [p["ch"] * m for m in p["ch_mult"]],
        "down_block_types": ["DownEncoderBlock2D"] * n,
        "up_block_types": ["UpDecoderBlock2D"] * n,
        "layers_per_block": p["num_res_blocks"],
        "latent_channels": p["z_channels"],
    }
    state = convert_ldm_vae_checkpoint(dict(tensors), shape)
    if name == "kl-f4":
        theirs: Any = diffusers.AutoencoderKL(**shape)
    else:
        codes = state["quantize.embedding.weight"] = tensors["quantize.embedding.weight"]
        theirs = diffusers.VQModel(**shape, num_vq_embeddings=len(codes))
    theirs.load_state_dict(state)
    x, encoded = randn(1, 3, 8, 16).clamp(-1, 1), theirs.eval().encode
    z = encoded(x).latent_dist.mean if name == "kl-f4" else encoded(x).latents
    assert error(ours.encode(x, sample=False), z) < 1e-5
    if name == "vq-f4":  # rounding must not choose another code
        z = ours.decoder.quantizer.codes(ours.code_indices(z)) + 1e-3 * randn(*z.shape)
    assert error(ours.decode(z), theirs.decode(z).sample) < 1e-5


@torch.no_grad()
def test_official_self_attention_has_its_formula() -> None:
    """q, k, v of a head are adjacent rows; heads from num_head_channels; in float64."""
    config, shapes = official.unet(official.BY_NAME["semantic_synthesis256"], narrow=True)
    tensors = official.drawn(shapes)
    block = interop.load_compvis(config, tensors).middle[1].double()
    w = {
        n.removeprefix("middle_block.1."): t.double() for n, t in tensors.items() if "block.1." in n
    }
    x = randn(2, 256, 3, 4, dtype=torch.float64)
    normed = torch.nn.functional.group_norm(x, 32, w["norm.weight"], w["norm.bias"], 1e-5)
    qkv = torch.einsum("oi,bihw->bohw", w["qkv.weight"][..., 0], normed).flatten(2)
    q, k, v = (qkv + w["qkv.bias"][:, None]).view(2, 8, 3, 32, 12).unbind(2)  # (B, head, d, N)
    weights = (q.transpose(2, 3) @ k / 32**0.5).softmax(-1)
    out = (v @ weights.transpose(2, 3)).reshape(2, 256, 12)
    out = w["proj_out.weight"][..., 0] @ out + w["proj_out.bias"][:, None]
    assert error(block(x), x + out.view_as(x)) < 1e-10


@torch.no_grad()
def test_an_official_encoder_computes_what_diffusers_computes(tmp_path: Path) -> None:
    sizes = {"n_embed": 12, "n_layer": 2, "vocab_size": 40, "max_seq_len": 7}
    tensors = official.drawn(official.transformer_shapes(sizes))
    target = f"{official.ENCODERS}.TransformerEmbedder"
    ours = interop.load_compvis({"target": target, "params": sizes}, tensors).double()
    layers = {
        "0": ("self_attn_layer_norm", "final_layer_norm"),
        "1.to_out": ("self_attn.out_proj",),
    }
    layers |= {f"1.to_{m}": (f"self_attn.{m}_proj",) for m in "qkv"}
    layers |= {"1.net.0.0": ("", "fc1"), "1.net.2": ("", "fc2")}
    tops = {"token_emb": "embed_tokens", "pos_emb.emb": "embed_positions", "norm": "layer_norm"}
    state = {}
    for name, tensor in tensors.items():
        module, kind = name.removeprefix("transformer.").rsplit(".", 1)
        if module.startswith("attn_layers."):
            i, part = module.removeprefix("attn_layers.layers.").split(".", 1)
            module = f"model.layers.{int(i) // 2}.{layers[part][int(i) % 2]}"
        elif module != "to_logits":
            module = f"model.{tops[module]}"
        state[f"{module}.{kind}"] = tensor
    shape = {"encoder_layers": 2, "encoder_ffn_dim": 48, "encoder_attention_heads": 8}
    shape |= {"vocab_size": 40, "max_position_embeddings": 7, "head_dim": 64, "d_model": 12}
    theirs = LDMBertModel(LDMBertConfig(**shape)).double().eval()
    theirs.load_state_dict(state)
    ids = torch.arange(21).view(3, 7)
    truth = theirs.model(ids, return_dict=False)[0]
    assert error(ours({"ids": ids}).tokens, truth) < 1e-10


# --- whole pipelines ---

CAPTIONS = CaptionTokenizer.trained_on(tiny.PROMPTS)


def made_here(name: str, clip: Path) -> LatentDiffusion:
    """A small model of ours for which diffusers has that pipeline."""
    conditioners = {
        SUPER: LowResConfig(),
        TEXT: TextConfig(d_cond=12, heads=2, d_head=4, length=77, vocab_size=len(CAPTIONS)),
        STABLE: FrozenTextConfig(encoder="clip", path=str(clip), d_cond=16, length=10),
    }
    conditioner = conditioners.get(name, ConditionerConfig())
    stages = {SUPER: VQ, PIXELS: AutoencoderConfig(regularizer="identity", z_channels=3)}
    stages[TEXT] = replace(KL, channel_mult=(1, 2, 2, 2))
    channels = 3 + conditioner.concat_channels(3)
    unet = replace(UNET, channel_mult=(1, 2), attn_levels=(1,), in_channels=channels, d_head=4)
    config = LatentDiffusionConfig(
        autoencoder=stages.get(name, KL),
        unet=replace(unet, d_cond=conditioner.d_cond),
        conditioner=conditioner,
        schedule=ScheduleConfig(beta_start=0.001, beta_end=0.02, kind="linear"),
        objective=ObjectiveConfig(predict="v"),
        image_size=16 if name == TEXT else 8,
    )
    model = shaken(LatentDiffusion(config)).eval()
    if name not in (PIXELS, SUPER):
        model.autoencoder.scale.fill_(1.7)
    if name == TEXT:
        model.conditioner.set_tokenizer(CAPTIONS)
    return model


@pytest.mark.parametrize("name", PIPELINES)
def test_our_model_gives_the_same_images_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clip").mkdir()
    ours = made_here(name, tiny.tiny_clip(tmp_path / "clip"))
    interop.save_diffusers(ours, tmp_path / "ours")
    theirs = tiny.read_pipeline(name, tmp_path / "ours")
    images = tiny.sampled_here(ours, name, 0.7)
    assert images.std() > 0.1
    assert error(tiny.sampled_there(theirs, name, 0.7, monkeypatch), images) < 1e-4
    again = interop.load_diffusers(tmp_path / "ours")
    assert error(tiny.sampled_here(again, name, 0.7), images) < 1e-5


@pytest.mark.parametrize("name", PIPELINES)
def test_their_pipeline_gives_the_same_images_here(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tiny.pipeline(name, tmp_path / "words")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = interop.load_diffusers(tmp_path / "theirs")
    truth = tiny.sampled_there(theirs, name, 0.7, monkeypatch)
    assert truth.std() > 0.1
    assert error(tiny.sampled_here(ours, name, 0.7), truth) < 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beta_schedule": "linear", "num_train_timesteps": 50},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ],
    ids=str,
)
def test_their_schedule_is_ours(changes: dict[str, Any], tmp_path: Path) -> None:
    theirs = tiny.pipeline(LDM, tmp_path / "words")
    theirs.scheduler = tiny.scheduler(**changes)
    theirs.save_pretrained(tmp_path / "theirs")
    model = interop.load_diffusers(tmp_path / "theirs")
    assert (model.config.objective.predict == "v") == ("prediction_type" in changes)
    assert error(model.schedule.alphas_cumprod, theirs.scheduler.alphas_cumprod) < 1e-5
