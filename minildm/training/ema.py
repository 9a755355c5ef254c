"""Moving average of a model's weights: samples come from it."""

import torch
from torch import Tensor, nn


class EMA:
    """shadow <- decay * shadow + (1 - decay) * weights, after each optimiser step.

    The decay warms up as min(decay, (1 + n) / (10 + n)) at update n = 1, 2, ..., as in the
    official code: otherwise early averages would contain the random initialisation.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999) -> None:
        self.decay, self.updates = decay, 0
        self.shadow = {name: p.detach().clone() for name, p in _trained(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = list(_trained(model).values())
        torch._foreach_lerp_(list(self.shadow.values()), weights, 1.0 - decay)

    def copy_to(self, model: nn.Module) -> None:
        """Replace the model's weights by the averages."""
        model.load_state_dict(self.shadow, strict=False)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name, and `updates`."""
        return {**self.shadow, "updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the result of `state_dict`. Raises KeyError for a missing average."""
        self.updates = int(state["updates"])
        for name, average in self.shadow.items():
            average.copy_(state[name])


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
