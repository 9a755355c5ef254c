"""Stage 1's GAN terms against a float64 computation of their formulas, and who gets a gradient."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minildm import Autoencoder
from minildm.discriminator import DiscriminatorConfig, PatchDiscriminator
from minildm.losses import (
    AdversarialConfig,
    adaptive_weight,
    adversarial_terms,
    autoencoder_loss,
    discriminator_loss,
)

F64 = torch.float64
ON = AdversarialConfig(weight=0.5)


def critic() -> PatchDiscriminator:
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        return PatchDiscriminator(DiscriminatorConfig(width=4, layers=1))


def pictures(randn: Any, seed: int = 0) -> Tensor:
    return randn(2, 3, 16, 24, seed=seed).clamp(-1, 1)


def grads(module: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in module.parameters()]


def test_hinge_and_vanilla_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0], dtype=F64), torch.tensor([-2.0, 0.5], dtype=F64)
    hinge = 0.5 * ((0 + 0.5 + 2.0) / 3 + (0 + 1.5) / 2)
    assert discriminator_loss(real, fake, "hinge").item() == pytest.approx(hinge, rel=1e-12)
    sigmoid = [1 / (1 + math.exp(-logit)) for logit in (2.0, 0.5, -1.0, -2.0, 0.5)]
    entropy = -sum(map(math.log, sigmoid[:3])) / 3 - sum(math.log(1 - p) for p in sigmoid[3:]) / 2
    found = discriminator_loss(real, fake, "vanilla").item()
    assert found == pytest.approx(0.5 * entropy, rel=1e-12)


def test_the_adaptive_weight_by_hand(randn: Any) -> None:
    """Two terms linear in the last weight: their gradients are known."""
    last = randn(4, 5, dtype=F64).requires_grad_()
    a, b = randn(4, 5, seed=1, dtype=F64), randn(4, 5, seed=2, dtype=F64)
    found = adaptive_weight((last * a).sum(), (last * b).sum(), last)
    assert found.item() == pytest.approx((a.norm() / (b.norm() + 1e-4)).item(), rel=1e-6)
    assert not found.requires_grad


def test_the_adaptive_weight_is_bounded(randn: Any) -> None:
    last, a = randn(4, 5).requires_grad_(), randn(4, 5, seed=1)
    assert adaptive_weight((last * a).sum() * 1e3, (last * a).sum() * 0, last) == 1e4
    assert adaptive_weight((last * a).sum() * 0, (last * a).sum(), last) == 0


def test_half_precision_gradients_do_not_underflow(randn: Any) -> None:
    """Squares of 1e-4 are no float16 numbers; the norms must be float32's."""
    last = randn(64, 64).half().requires_grad_()
    small = torch.full((64, 64), 1e-4, dtype=torch.float16)
    found = adaptive_weight((last * small).sum(), (last * small).sum(), last)
    norm = small.float().norm().item()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(norm / (norm + 1e-4), rel=1e-3)


def test_the_loss_is_its_formula_in_float64(
    autoencoder: Autoencoder, randn: Any, shaken: Any
) -> None:
    """L1 + 10 L2 + 0.7 perceptual + KL + d_weight * lambda * g, every gradient by hand."""
    model, judge = autoencoder.double().train(), shaken(critic()).double().eval()
    x = pictures(randn).double()

    def perceptual(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().amax(dim=(1, 2, 3))

    torch.manual_seed(0)
    terms = autoencoder_loss(
        model,
        x,
        kl_weight=0.1,
        mse_weight=10.0,
        perceptual=perceptual,
        perceptual_weight=0.7,
        discriminator=judge,
        adversarial=AdversarialConfig(weight=0.8, start=5),
        step=5,
    )
    terms["loss"].backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}

    torch.manual_seed(0)
    model.zero_grad()
    posterior = model.posterior(x)
    x_rec = model.decoder(posterior.sample())
    fidelity = (x - x_rec).abs().mean() + 10 * (x - x_rec).square().mean()
    fidelity = fidelity + 0.7 * perceptual(x, x_rec).mean()
    g = -judge(x_rec).mean()
    last = model.decoder.conv_out.weight
    norms = [torch.autograd.grad(t, last, retain_graph=True)[0].norm() for t in (fidelity, g)]
    mean, logvar = posterior
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
def test_no_gradient_leaks_to_the_other_side(
    kind: str, autoencoder: Autoencoder, randn: Any
) -> None:
    model, judge, x = autoencoder.train(), critic().train(), pictures(randn)
    config = AdversarialConfig(kind=kind)
    terms = autoencoder_loss(model, x, kl_weight=1e-6, discriminator=judge, adversarial=config)
    terms["loss"].backward(retain_graph=True)
    assert all(g is None for g in grads(judge))  # the autoencoder's turn
    assert all(g is not None for g in grads(model))
    before = [g.clone() for g in grads(model)]
    terms["disc_loss"].backward()
    assert all(g is not None for g in grads(judge))  # the critic's turn
    assert all(torch.equal(a, b) for a, b in zip(before, grads(model), strict=True))
    assert all(p.requires_grad for p in judge.parameters())


def test_the_critics_gradient_is_that_of_its_own_loss(randn: Any) -> None:
    x, x_rec = pictures(randn), pictures(randn, 1)
    judge = critic().eval()
    alone = copy.deepcopy(judge)
    last = torch.ones((), requires_grad=True)
    terms = adversarial_terms(judge, x, x_rec * last, (x_rec * last - x).abs().mean(), last, ON, 1)
    terms["disc_loss"].backward()
    discriminator_loss(alone(x), alone(x_rec)).backward()
    for one, other in zip(grads(judge), grads(alone), strict=True):
        assert torch.allclose(one, other, atol=1e-7)


def test_before_the_start_the_critic_is_not_asked(autoencoder: Autoencoder, randn: Any) -> None:
    x, judge = pictures(randn), critic()
    judge.register_forward_hook(lambda *_: pytest.fail("asked"))
    config = AdversarialConfig(start=10)
    torch.manual_seed(0)
    terms = autoencoder_loss(
        autoencoder, x, kl_weight=1e-6, discriminator=judge, adversarial=config, step=9
    )
    torch.manual_seed(0)
    plain = autoencoder_loss(autoencoder, x, kl_weight=1e-6)
    assert terms["loss"] == plain["loss"]
    assert not terms["disc_loss"].requires_grad
    assert {terms[n].item() for n in ("adv_loss", "adv_weight", "disc_loss")} == {0.0}


def test_the_ramp_leads_to_the_full_weight() -> None:
    config = AdversarialConfig(weight=0.8, start=11, ramp=4)
    weights = [config.weight_at(step) for step in (1, 10, 11, 12, 13, 14, 15, 1000)]
    assert weights == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    assert AdversarialConfig(weight=0.5, start=3).weight_at(3) == 0.5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "wgan"}, "kind='wgan' is not known; known: 'hinge', 'vanilla'"),
        ({"weight": -1.0}, "weight=-1.0 must not be negative"),
        ({"ramp": -1}, "ramp=-1"),
        ({"limit": math.nan}, "limit=nan"),
        ({"lr_factor": 0.0}, "lr_factor=0.0 must be positive"),
    ],
)
def test_impossible_games_are_refused(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AdversarialConfig(**options)


def test_the_official_kl_stages_bound_is_ours_in_their_units(
    autoencoder: Autoencoder, randn: Any
) -> None:
    """Their loss sums over an image's values; where its bound binds, the step is still the same."""
    model, judge, x = autoencoder.double().train(), critic().double().eval(), pictures(randn)
    x, numel = x.double(), x[0].numel()
    config = AdversarialConfig(weight=0.5, limit=1e4 / numel)
    torch.manual_seed(0)
    terms = autoencoder_loss(model, x, kl_weight=1e-6, discriminator=judge, adversarial=config)
    terms["loss"].backward()
    ours = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    torch.manual_seed(0)
    posterior = model.posterior(x)
    x_rec = model.decoder(posterior.sample())
    nll, g = (x - x_rec).abs().sum() / len(x), -judge(x_rec).mean()
    last = model.decoder.conv_out.weight
    norms = [torch.autograd.grad(t, last, retain_graph=True)[0].norm() for t in (nll, g)]
    ratio = (norms[0] / (norms[1] + 1e-4)).item()
    assert ratio > 1e4
    (nll + 1e-6 * posterior.kl().sum() / len(x) + 0.5 * min(ratio, 1e4) * g).backward()
    theirs = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.allclose(numel * ours, theirs, rtol=1e-9, atol=1e-9 * theirs.abs().max())


def test_a_validation_loss_needs_no_gradient(autoencoder: Autoencoder, randn: Any) -> None:
    with torch.no_grad():
        terms = autoencoder_loss(
            autoencoder, pictures(randn), kl_weight=1e-6, discriminator=critic(), adversarial=ON
        )
    assert terms["adv_weight"] == 0
    assert terms["disc_loss"] > 0


def test_a_critic_that_fails_is_not_left_frozen(randn: Any) -> None:
    judge, x = critic(), randn(2, 3, 4, 4)
    last = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match="needs sides of 6"):
        adversarial_terms(judge, x, x * last, (x * last).abs().mean(), last, ON, 1)
    assert all(p.requires_grad for p in judge.parameters())


def test_a_game_without_a_critic_is_refused(autoencoder: Autoencoder, randn: Any) -> None:
    with pytest.raises(ValueError, match="needs a discriminator, got None"):
        autoencoder_loss(autoencoder, pictures(randn), kl_weight=1e-6, adversarial=ON)


def test_unknown_losses_are_refused() -> None:
    with pytest.raises(ValueError, match="kind='wgan' is not known"):
        discriminator_loss(torch.zeros(2), torch.zeros(2), "wgan")


@pytest.mark.parametrize(("value", "said"), [(math.nan, "not finite"), (2.0, r"in \[-1, 1\]")])
def test_a_bad_batch_is_refused(value: float, said: str, autoencoder: Autoencoder) -> None:
    x = torch.zeros(2, 3, 8, 8)
    x[1, 2, 3, 4] = value
    with pytest.raises(ValueError, match=f"image .*{said}"):
        autoencoder_loss(autoencoder, x, kl_weight=1e-6)
