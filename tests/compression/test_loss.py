"""Stage 1's terms against float64 computations of their formulas, and which weights they reach."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import randn, shaken, tiny_autoencoder_config
from torch import Tensor, nn

from minildm.compression.autoencoder import Autoencoder
from minildm.compression.loss import (
    AdversarialConfig,
    DiscriminatorConfig,
    PatchDiscriminator,
    adaptive_weight,
    autoencoder_loss,
    discriminator_loss,
)

F64 = torch.float64
VQ = tiny_autoencoder_config(regularizer="vq", codebook_size=16)
OFFICIAL = Path(__file__).parents[1] / "official/params.json"
LOSSES = [c for c in json.loads(OFFICIAL.read_text())["configs"] if "discriminator_params" in c]


@pytest.fixture
def autoencoder() -> Autoencoder:
    return shaken(Autoencoder(tiny_autoencoder_config()))


@pytest.fixture
def critic() -> PatchDiscriminator:
    return PatchDiscriminator(DiscriminatorConfig(channels=4, layers=1))


def images(seed: int = 0) -> Tensor:
    return randn(2, 3, 16, 24, seed=seed).clamp(-1, 1)


def fixed(like: Tensor) -> Tensor:
    """The same noise at every call."""
    return randn(*like.shape, seed=7, dtype=like.dtype)


@pytest.mark.parametrize("published", LOSSES, ids=lambda c: c["path"])
def test_the_published_discriminators_have_as_many_parameters(published: dict) -> None:
    layers = published["lossconfig"]["params"].get("disc_num_layers", 3)
    model = PatchDiscriminator(DiscriminatorConfig(layers=layers))
    assert sum(p.numel() for p in model.parameters()) == published["discriminator_params"]


@pytest.mark.parametrize(("layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_depends_on_its_patch_alone(layers: int, patch: int) -> None:
    model = PatchDiscriminator(DiscriminatorConfig(channels=2, layers=layers)).double().eval()
    x = torch.randn(1, 3, 160, 128, dtype=F64, requires_grad=True)
    logits = model(x)
    assert logits.shape == (1, 1, 160 // 2**layers - 2, 128 // 2**layers - 2)
    middle = logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2]
    seen = torch.autograd.grad(middle, x)[0][0].abs().sum(0) > 0  # (H, W)
    assert (seen.any(1).sum(), seen.any(0).sum()) == (patch, patch)
    side = model.config.least_side
    assert model(torch.zeros(2, 3, side, side).double()).shape == (2, 1, 1, 1)


def test_hinge_and_vanilla_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0], dtype=F64), torch.tensor([-2.0, 0.5], dtype=F64)
    hinge = 0.5 * ((0 + 0.5 + 2.0) / 3 + (0 + 1.5) / 2)
    entropy = nn.functional.binary_cross_entropy_with_logits
    vanilla = 0.5 * (entropy(real, torch.ones_like(real)) + entropy(fake, torch.zeros_like(fake)))
    for kind, expected in (("hinge", hinge), ("vanilla", vanilla.item())):
        assert discriminator_loss(real, fake, kind).item() == pytest.approx(expected, rel=1e-12)


def test_the_adaptive_weight_by_hand() -> None:
    """Two terms linear in the last weight: their gradients are known."""
    last = randn(4, 5, dtype=F64).requires_grad_()
    a, b = randn(4, 5, seed=1, dtype=F64), randn(4, 5, seed=2, dtype=F64)
    found = adaptive_weight((last * a).sum(), (last * b).sum(), last)
    assert found.item() == pytest.approx((a.norm() / (b.norm() + 1e-4)).item(), rel=1e-6)
    assert not found.requires_grad
    assert adaptive_weight((last * a).sum() * 1e6, (last * a).sum() * 0, last) == 1e4


def test_the_ramp_leads_to_the_full_weight() -> None:
    config = AdversarialConfig(weight=0.8, start=11, ramp=4)
    weights = [config.weight_at(step) for step in (1, 10, 11, 12, 13, 14, 15, 1000)]
    assert weights == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    assert AdversarialConfig(weight=0.5, start=3).weight_at(3) == 0.5


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (AdversarialConfig, {"weight": -1.0}, r"weight=-1.0 must lie in 0\.\."),
        (AdversarialConfig, {"limit": math.nan}, "limit=nan"),
        (DiscriminatorConfig, {"channels": 10**9}, "channels=1000000000 must lie in"),
        (DiscriminatorConfig, {"layers": 0}, "layers=0 must lie in"),
    ],
)
def test_impossible_configs_are_refused(config: type, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_the_vq_loss_is_its_terms_and_reaches_all_weights() -> None:
    model, x = shaken(Autoencoder(VQ)).train(), images()
    terms = autoencoder_loss(model, x, kl_weight=5.0, codebook_weight=0.3)
    quantized = model.decoder.quantizer.eval()(model.moments(x))
    x_rec = model.decoder.render(quantized.z)
    assert torch.allclose(terms["loss"], (x - x_rec).abs().mean() + 0.3 * quantized.loss)
    assert terms["code_usage"] == len(quantized.indices.unique()) / 16
    terms["loss"].backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


def test_the_loss_and_every_gradient_in_float64(
    autoencoder: Autoencoder, critic: PatchDiscriminator
) -> None:
    """L1 + 10 L2 + 0.7 perceptual + KL + weight * adaptive * g."""
    model, x = autoencoder.double().train(), images().double()
    critic = shaken(critic).double().eval()

    def perceptual(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().amax(dim=(1, 2, 3))

    options = {"kl_weight": 0.1, "mse_weight": 10.0, "noise": fixed}
    options |= {"perceptual": perceptual, "perceptual_weight": 0.7, "discriminator": critic}
    game = AdversarialConfig(weight=0.8, start=5)
    terms = autoencoder_loss(model, x, **options, adversarial=game, step=5)
    terms["loss"].backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}

    model.zero_grad()
    mean, logvar = posterior = model.posterior(x)
    x_rec = model.decoder(posterior.sample(fixed))
    fidelity = (x - x_rec).abs().mean() + 10 * (x - x_rec).square().mean()
    fidelity = fidelity + 0.7 * perceptual(x, x_rec).mean()
    g = -critic(x_rec).mean()
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


@pytest.mark.parametrize("kind", ["hinge", "vanilla"])
def test_each_player_gets_the_gradient_of_its_own_loss(
    kind: str, autoencoder: Autoencoder, critic: PatchDiscriminator
) -> None:
    model, critic, x = autoencoder.train(), critic.eval(), images()
    options = {"discriminator": critic, "adversarial": AdversarialConfig(kind=kind)}
    terms = autoencoder_loss(model, x, kl_weight=1e-6, noise=fixed, **options)
    terms["loss"].backward(retain_graph=True)
    assert all(p.grad is None for p in critic.parameters())
    before = [p.grad.clone() for p in model.parameters()]
    terms["disc_loss"].backward()
    assert all(torch.equal(g, p.grad) for g, p in zip(before, model.parameters(), strict=True))
    x_rec = model.decoder(model.posterior(x).sample(fixed)).detach()
    loss = discriminator_loss(critic(x), critic(x_rec), kind)
    for parameter in critic.parameters():
        [wanted] = torch.autograd.grad(loss, parameter, retain_graph=True)
        assert torch.allclose(parameter.grad, wanted, atol=1e-6)


def test_before_its_start_the_discriminator_is_not_called(
    autoencoder: Autoencoder, critic: PatchDiscriminator
) -> None:
    critic.register_forward_hook(lambda *_: pytest.fail("called"))
    options = {"discriminator": critic, "adversarial": AdversarialConfig(start=10), "step": 9}
    terms = autoencoder_loss(autoencoder, images(), kl_weight=1e-6, noise=fixed, **options)
    without = autoencoder_loss(autoencoder, images(), kl_weight=1e-6, noise=fixed)
    assert terms["loss"] == without["loss"]
    assert {terms[n].item() for n in ("adv_loss", "adv_weight", "disc_loss")} == {0.0}


@pytest.mark.parametrize("config", [tiny_autoencoder_config(), VQ], ids=["kl", "vq"])
def test_the_loss_reads_no_value(config: object, critic: PatchDiscriminator) -> None:
    """On the meta device there are none: reading one would wait for a GPU."""
    options = {"discriminator": critic.to("meta"), "adversarial": AdversarialConfig()}
    model = Autoencoder(config).to("meta")
    terms = autoencoder_loss(model, images().to("meta"), kl_weight=1.0, **options)
    (terms["loss"] + terms["disc_loss"]).backward()
    assert all(term.shape == () for term in terms.values())
