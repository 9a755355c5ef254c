"""Where each of our tensors stands in another project's file, and the filling of a model."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from minildm.checkpoints import CheckpointError
from minildm.interop.reading import Tensors

Module = TypeVar("Module", bound=nn.Module)

SHOWN = 10  # misfits in an error


class Place(NamedTuple):
    """One of our tensors, and what holds it there: one tensor, or several as its rows in order.

    So q, k and v: one below the other, or, where ours lie beside each other for each of several
    `heads`, a head's rows of each in turn. `flat` is how many last axes of 1 theirs lacks: a
    linear layer, or a convolution over flattened pixels, holds what our 1x1 convolution does.
    """

    ours: str
    theirs: tuple[str, ...]
    flat: int = 0
    heads: int = 1

    def join(self, parts: Iterable[Tensor]) -> Tensor:
        """Their tensors -> ours."""
        parts = tuple(parts)
        if len(parts) == 1:
            joined = parts[0]
        else:
            joined = torch.cat([p.unflatten(0, (self.heads, -1)) for p in parts], 1).flatten(0, 1)
        return joined[(...,) + (None,) * self.flat]

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Our tensor -> theirs, in the order of their names."""
        tensor = tensor[(...,) + (0,) * self.flat]
        if self.heads == 1:
            return tensor.chunk(len(self.theirs))
        rows = tensor.unflatten(0, (self.heads, len(self.theirs), -1))
        return rows.movedim(1, 0).flatten(1, 2).unbind()


def layer(ours: str, *theirs: str) -> Iterator[Place]:
    """The weight and the bias of a layer."""
    for name in ("weight", "bias"):
        yield Place(f"{ours}.{name}", tuple(f"{module}.{name}" for module in theirs))


def below(places: Iterable[Place], ours: str, theirs: str) -> Iterator[Place]:
    """The places of a part, in a whole model: what its names begin with there."""
    for place in places:
        names = tuple(f"{theirs}{name}" for name in place.theirs)
        yield place._replace(ours=f"{ours}{place.ours}", theirs=names)


def empty(build: Callable[[], Module]) -> Module:
    """A model on the meta device, to be filled."""
    with torch.device("meta"):
        model = build()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.numel():  # in no file: it only says where the model is
                setattr(module, name, torch.empty(0))
    return model


def fill(
    model: nn.Module,
    places: Iterable[Place],
    tensors: Tensors,
    *,
    own: Mapping[str, Tensor] | None = None,
    unused: re.Pattern[str] | None = None,
    spare: Collection[str] = (),
) -> None:
    """Give a model on the meta device its tensors, in float32, without a second copy of a file's.

    own: what only our model has. unused: names of theirs that inference does not need. spare:
    such names one by one. Raises CheckpointError with the first ten tensors that are missing,
    that have no place, another shape, or values that are not finite.
    """
    places = tuple(places)
    misfits = list(_misfits(_shapes(model, places), tensors.named, unused, spare))
    if misfits:
        listed = "\n  ".join(misfits[:SHOWN])
        raise CheckpointError(
            f"{tensors.source}: {len(misfits)} tensors do not fit, such as\n  {listed}"
        )
    state = dict(own or {})
    for place in places:
        joined = place.join(tensors.named[name].detach() for name in place.theirs)
        copy = not tensors.ours and len(place.theirs) == 1  # joined ones are new as they are
        device = "meta" if joined.is_meta else "cpu"
        state[place.ours] = joined.to(device, torch.float32, copy=copy).contiguous()
    model.load_state_dict(state, assign=True)


def _shapes(model: nn.Module, places: tuple[Place, ...]) -> dict[str, tuple[int, ...]]:
    """The shape that each of their tensors must have."""
    state, shapes = model.state_dict(), {}
    for place in places:
        for name, part in zip(place.theirs, place.split(state[place.ours]), strict=True):
            shapes[name] = tuple(part.shape)
    return shapes


def _misfits(
    shapes: Mapping[str, tuple[int, ...]],
    named: Mapping[str, Any],
    unused: re.Pattern[str] | None,
    spare: Collection[str],
) -> Iterator[str]:
    for name, shape in shapes.items():
        if name not in named:
            yield f"{name} {shape} is missing"
        elif flaw := _flaw(named[name], shape):
            yield f"{name} {flaw}"
    for name in named:
        left = name in shapes or name in spare or (unused and unused.match(str(name)))
        if not left:
            yield f"{name} has no place in this model"


def _flaw(value: object, shape: tuple[int, ...]) -> str:
    if not isinstance(value, Tensor):
        return f"is no tensor but a {type(value).__name__}"
    if tuple(value.shape) != shape:
        return f"is {tuple(value.shape)}, must be {shape}"
    if not value.is_floating_point() or value.layout != torch.strided:
        return f"is {value.dtype}, {value.layout}; must be dense floating point"
    if not value.is_meta and not all(b.isfinite() for b in value.detach().float().aminmax()):
        return "holds values that are not finite: NaN or infinite"
    return ""
