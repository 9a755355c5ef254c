"""Stage 1's terms against float64 computations of their formulas, and which weights they reach."""

import math
from typing import Any

import pytest
import torch
from helpers import randn, shaken, tiny_autoencoder_config
from torch import Tensor

from minildm.compression.autoencoder import Autoencoder
from minildm.compression.loss import (
    AdversarialConfig,
    PatchDiscriminator,
    autoencoder_loss,
    discriminator_loss,
)

F64 = torch.float64
VQ = tiny_autoencoder_config(regularizer="vq", codebook_size=16)


@pytest.fixture
def autoencoder() -> Autoencoder:
    return shaken(Autoencoder(tiny_autoencoder_config()))


def critic(**options: Any) -> PatchDiscriminator:
    return PatchDiscriminator(AdversarialConfig(disc_channels=4, disc_layers=1, **options))


def images(seed: int = 0) -> Tensor:
    return randn(2, 3, 16, 24, seed=seed).clamp(-1, 1)


def fixed(like: Tensor) -> Tensor:
    """The same noise at every call."""
    return randn(*like.shape, seed=7, dtype=like.dtype)


@pytest.mark.parametrize(("layers", "official"), [(2, 663_361), (3, 2_765_633)])
def test_the_published_discriminators_have_as_many_parameters(layers: int, official: int) -> None:
    model = PatchDiscriminator(AdversarialConfig(disc_layers=layers))
    assert sum(p.numel() for p in model.parameters()) == official


@pytest.mark.parametrize(("layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_depends_on_its_patch_alone(layers: int, patch: int) -> None:
    model = PatchDiscriminator(AdversarialConfig(disc_layers=layers)).double().eval()
    x = torch.randn(1, 3, 160, 128, dtype=F64, requires_grad=True)
    logits = model(x)
    assert logits.shape == (1, 1, 160 // 2**layers - 2, 128 // 2**layers - 2)
    middle = logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2]
    seen = torch.autograd.grad(middle, x)[0][0].abs().sum(0) > 0  # (H, W)
    assert (seen.any(1).sum(), seen.any(0).sum()) == (patch, patch)
    least = torch.zeros(2, 3, 3 * 2**layers, 3 * 2**layers, dtype=F64)  # see train_autoencoder
    assert model(least).shape == (2, 1, 1, 1)


def test_the_hinge_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0], dtype=F64), torch.tensor([-2.0, 0.5], dtype=F64)
    hinge = 0.5 * ((0 + 0.5 + 2.0) / 3 + (0 + 1.5) / 2)
    assert discriminator_loss(real, fake).item() == pytest.approx(hinge, rel=1e-12)


def test_the_ramp_leads_from_0_to_the_full_weight(autoencoder: Autoencoder) -> None:
    other = critic(weight=0.8, start=11, ramp=4, limit=1e-3)  # the adaptive weight is at its limit
    options = {"kl_weight": 1.0, "discriminator": other}
    steps = (1, 10, 11, 12, 13, 14, 15, 1000)
    terms = [autoencoder_loss(autoencoder, images(), **options, step=step) for step in steps]
    weights = [1e3 * found["adv_weight"].item() for found in terms]
    assert weights == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    assert [found["adv_loss"] != 0 for found in terms] == [step >= 11 for step in steps]


@pytest.mark.parametrize(
    ("name", "value"),
    [("weight", -1.0), ("limit", math.nan), ("disc_channels", 10**9), ("disc_layers", 0)],
)
def test_impossible_configs_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value} must lie in"):
        AdversarialConfig(**{name: value})


def test_the_vq_loss_is_its_terms_and_reaches_all_weights() -> None:
    model, x = shaken(Autoencoder(VQ)).train(), images()
    terms = autoencoder_loss(model, x, kl_weight=5.0, codebook_weight=0.3)
    quantized = model.decoder.quantizer.eval()(model.moments(x))
    x_rec = model.decoder.render(quantized.z)
    assert torch.allclose(terms["loss"], (x - x_rec).abs().mean() + 0.3 * quantized.loss)
    assert terms["code_usage"] == len(quantized.indices.unique()) / 16
    terms["loss"].backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


def test_the_loss_and_every_gradient_in_float64(autoencoder: Autoencoder) -> None:
    """L1 + 10 L2 + 0.7 perceptual + KL + weight * adaptive * g."""
    model, x = autoencoder.double().train(), images().double()
    other = shaken(critic(weight=0.8, start=5)).double().eval()

    def perceptual(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().amax(dim=(1, 2, 3))

    options = {"kl_weight": 0.1, "mse_weight": 10.0, "noise": fixed}
    options |= {"perceptual": perceptual, "perceptual_weight": 0.7, "discriminator": other}
    terms = autoencoder_loss(model, x, **options, step=5)
    terms["loss"].backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}

    model.zero_grad()
    mean, logvar = posterior = model.posterior(x)
    x_rec = model.decoder(posterior.sample(fixed))
    fidelity = (x - x_rec).abs().mean() + 10 * (x - x_rec).square().mean()
    fidelity = fidelity + 0.7 * perceptual(x, x_rec).mean()
    g = -other(x_rec).mean()
    last = model.decoder.conv_out.weight
    norms = [torch.autograd.grad(t, last, retain_graph=True)[0].norm() for t in (fidelity, g)]
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / x.numel()
    weight = 0.8 * (norms[0] / (norms[1] + 1e-4)).item()
    whole = fidelity + 0.1 * kl + weight * g
    whole.backward()
    assert terms["adv_weight"].item() == pytest.approx(weight, rel=1e-12)
    assert terms["loss"].item() == pytest.approx(whole.item(), rel=1e-12)
    for name, parameter in model.named_parameters():
        largest = parameter.grad.abs().max()
        assert (found[name] - parameter.grad).abs().max() <= 1e-10 * largest, name


def test_each_player_gets_the_gradient_of_its_own_loss(autoencoder: Autoencoder) -> None:
    model, other, x = autoencoder.train(), critic().eval(), images()
    terms = autoencoder_loss(model, x, kl_weight=1e-6, noise=fixed, discriminator=other)
    terms["loss"].backward(retain_graph=True)
    assert all(p.grad is None for p in other.parameters())
    before = [p.grad.clone() for p in model.parameters()]
    terms["disc_loss"].backward()
    assert all(torch.equal(g, p.grad) for g, p in zip(before, model.parameters(), strict=True))
    x_rec = model.decoder(model.posterior(x).sample(fixed)).detach()
    loss = discriminator_loss(other(x), other(x_rec))
    for parameter in other.parameters():
        [wanted] = torch.autograd.grad(loss, parameter, retain_graph=True)
        assert torch.allclose(parameter.grad, wanted, atol=1e-6)


@pytest.mark.parametrize("config", [tiny_autoencoder_config(), VQ], ids=["kl", "vq"])
def test_the_loss_reads_no_value(config: Any) -> None:
    """On the meta device there are none: reading one would wait for a GPU."""
    model, other = Autoencoder(config).to("meta"), critic().to("meta")
    terms = autoencoder_loss(model, images().to("meta"), kl_weight=1.0, discriminator=other)
    (terms["loss"] + terms["disc_loss"]).backward()
    assert all(term.shape == () for term in terms.values())
