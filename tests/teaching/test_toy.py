"""The closed-form denoisers against the gradient of the log density of z_t, by autograd."""

import pytest
import torch
from helpers import randn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from minildm.diffusion.schedule import NoiseSchedule
from minildm.teaching.toy import mixture_eps

F64 = torch.float64
SCHEDULE = NoiseSchedule.scaled_linear(dtype=F64)
TIMES = torch.tensor([0, 10, 300, 999])  # one for each sample


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("s", [0.0, 0.5, 3.0])
def test_the_best_eps_is_the_score(k: int, s: float) -> None:
    """E[eps | z_t] is -sqrt(1 - abar) times the score (Tweedie); one point: a Gaussian's."""
    points = randn(k, 2, 1, 3, seed=1, dtype=F64)
    z = (points[0] + randn(4, 2, 1, 3, dtype=F64)).requires_grad_(True)
    signal_scale, noise_scale = SCHEDULE.scales(TIMES)
    log_p = 0
    for z_t, a, b in zip(z, signal_scale, noise_scale, strict=True):
        std = ((a * s) ** 2 + b**2).sqrt()
        around = Independent(Normal(a * points, std.expand_as(points)), 3)
        log_p += MixtureSameFamily(Categorical(torch.ones(k, dtype=F64)), around).log_prob(z_t)
    expected = -noise_scale * torch.autograd.grad(log_p, z)[0]
    assert torch.allclose(mixture_eps(SCHEDULE, points, s)(z, TIMES), expected, rtol=1e-8)
