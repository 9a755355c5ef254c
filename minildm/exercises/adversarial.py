"""Checks of notebook 04: what the discriminator minimises, and how hard it may push."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minildm.exercises.result import Result, Trial, check_function

EPS, MOST = 1e-4, 1e4  # of the adaptive weight
NOT_FINITE = (
    "where the adversarial gradient is 0 it divides by 0, and training ends in NaN: add 1e-4 to "
    "the norm below."
)


def check_critic_loss(fn: object) -> Result:
    """Check `critic_loss(real, fake)`: logits, twice (B, 1, h, w) -> a scalar."""
    praise = "what is right by a margin of 1 costs nothing, the rest grows in a straight line."
    sure = Trial(
        (torch.full((2, 1, 3, 3), 3.0), torch.full((2, 1, 3, 3), -2.0)),
        torch.tensor(0.0),
        {},
        "it is right for mixed logits, but a critic that is right by more than 1 must pay 0.",
    )
    return check_function(fn, [_hinge(4, 1, 3, 5), _hinge(1, 1, 2, 2), sure], praise)


def _hinge(*shape: int) -> Trial:
    draw = torch.Generator().manual_seed(0)
    real = 1.5 * torch.randn(shape, generator=draw) + 1.4
    fake = 1.5 * torch.randn(shape, generator=draw) - 0.7

    def half(of_real: Tensor, of_fake: Tensor) -> Tensor:
        return 0.5 * (of_real.mean() + of_fake.mean())

    right = half((1 - real).relu(), (1 + fake).relu())
    return Trial((real, fake), right, _hinge_mistakes(real, fake, half))


def _hinge_mistakes(
    real: Tensor, fake: Tensor, half: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    on_real, on_fake = (1 - real).relu(), (1 + fake).relu()
    swapped = (1 + real).relu(), (1 - fake).relu()
    return {
        "the one half in front is missing.": 2 * half(on_real, on_fake),
        "real and fake, or both signs, are swapped: that critic calls reconstructions real.": (
            half(*swapped)
        ),
        "the sign on real is wrong: logits above 1 must cost nothing there.": (
            half(swapped[0], on_fake)
        ),
        "the sign on fake is wrong: logits below -1 must cost nothing there.": (
            half(on_real, swapped[1])
        ),
        "the relu is missing: without it D could lower its loss without end.": (
            half(1 - real, 1 + fake)
        ),
        "the relu comes before the mean: each patch has a hinge of its own.": (
            half((1 - real.mean()).relu(), (1 + fake.mean()).relu())
        ),
        "the margin of 1 is missing.": half((-real).relu(), fake.relu()),
        "inside the relu the signs are turned round: it is 1 - real and 1 + fake.": (
            half((real - 1).relu(), (-1 - fake).relu())
        ),
        "that sums over the logits; (4) has their mean.": 0.5 * (on_real.sum() + on_fake.sum()),
        "that is the vanilla loss, softplus; the hinge is a relu.": (
            half(F.softplus(-real), F.softplus(fake))
        ),
        "what D says of the reconstructions is missing.": half(on_real, torch.zeros(1)),
        "what D says of the real pictures is missing.": half(torch.zeros(1), on_fake),
        "that is the autoencoder's side of the game; D minimises (4).": -fake.mean(),
        "the sign is turned round: D minimises this.": -half(on_real, on_fake),
    }


def check_adaptive_weight(fn: object) -> Result:
    """Check `adaptive_weight(grad_rec, grad_adv)`: two gradients of one weight -> a scalar."""
    praise = "both terms push equally hard, and a vanishing gradient makes no NaN."
    zero = "it is right elsewhere, but where grad_adv is 0 it must be clamped to 1e4."
    plain, weak = _ratio(2.0, 5.0), _ratio(3e-3, 1e-3)
    grad, none = _gradient(3.0, 2), torch.zeros(3, 8, 3, 3)
    clamped = Trial((grad, none), torch.tensor(MOST), {}, zero)
    found = check_function(fn, [plain, weak, clamped], praise)
    if "values are not finite" in found.message:
        return Result(False, NOT_FINITE)
    return check_function(_and_its_gradient(fn), [_detached()], praise) if found.ok else found


def _gradient(norm: float, seed: int) -> Tensor:
    grad = torch.randn(3, 8, 3, 3, generator=torch.Generator().manual_seed(seed))
    return norm * grad / grad.norm()


def _ratio(of_rec: float, of_adv: float) -> Trial:
    rec, adv = _gradient(of_rec, 0), _gradient(of_adv, 1)
    a, b = rec.norm(), adv.norm()
    mistakes = {
        "it is upside down: a strong adversarial gradient needs a small weight.": b / (a + EPS),
        "add 1e-4 to the norm below: where grad_adv is 0 there would be NaN.": a / b,
        "that adds 1e-4 above as well; it stands below alone.": (a + EPS) / (b + EPS),
        "those are squared norms; (6) has the norms themselves.": a**2 / (b**2 + EPS),
        "that is the sum of the absolute values; the norm is the root of the sum of squares.": (
            rec.abs().sum() / (adv.abs().sum() + EPS)
        ),
        "that is the mean of the absolute values; the norm is the root of the sum of squares.": (
            rec.abs().mean() / (adv.abs().mean() + EPS)
        ),
        "that is the norm of grad_rec alone.": a,
        "that divides value by value; take the norms first.": (rec / (adv + EPS)).norm(),
    }
    return Trial((rec, adv), a / (b + EPS), mistakes)


def _detached() -> Trial:
    rec, adv = _gradient(2.0, 0), _gradient(5.0, 1)
    value = (rec.norm() / (adv.norm() + EPS)).item()
    flows = "its value is right, but it carries a gradient: the weight must be detached."
    return Trial((rec, adv), torch.tensor([value, 0.0]), {flows: torch.tensor([value, 1.0])})


def _and_its_gradient(fn: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The answer, and 1 where a gradient would flow through it."""

    def both(rec: Tensor, adv: Tensor) -> Tensor:
        with torch.enable_grad():
            found = fn(rec.clone().requires_grad_(), adv.clone().requires_grad_())
        return torch.stack([found.detach(), torch.tensor(float(found.requires_grad))])

    return both
