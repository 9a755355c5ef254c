"""Moving average of a model's weights: what is sampled from, and saved beside the model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """shadow <- decay * shadow + (1 - decay) * weights, after each optimiser step.

    The decay warms up, min(decay, (1 + n) / (10 + n)) at the n-th update counted from 1, as in
    the official code: early averages would otherwise remember the random initialisation.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay={decay} must lie in [0, 1)")
        self.decay, self.updates = decay, 0
        self.shadow = {name: p.detach().clone() for name, p in self._averaged(model)}

    @staticmethod
    def _averaged(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one step towards the model's weights; call it once per optimiser step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        names, weights = zip(*self._averaged(model), strict=True)
        shadow = [self.shadow[name] for name in names]
        torch._foreach_lerp_(shadow, [w.detach() for w in weights], 1.0 - decay)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[nn.Module]:
        """Within the block, `model` has the averaged weights; after it, its own again."""
        own = {name: p.detach().clone() for name, p in self._averaged(model)}
        self._copy_into(model, self.shadow)
        try:
            yield model
        finally:
            self._copy_into(model, own)

    def copy_to(self, model: nn.Module) -> None:
        """Give `model` the averaged weights for good."""
        self._copy_into(model, self.shadow)

    @torch.no_grad()
    def _copy_into(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        for name, parameter in self._averaged(model):
            parameter.copy_(weights[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name, and `updates`."""
        return {**self.shadow, "updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave; KeyError names averages that are missing."""
        missing = set(self.shadow) - set(state)
        if missing:
            raise KeyError(f"EMA state lacks {sorted(missing)[:10]}")
        self.updates = int(state["updates"])
        for name, average in self.shadow.items():
            average.copy_(state[name])
