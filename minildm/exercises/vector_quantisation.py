"""Checks of notebook 03: quantising with a straight-through gradient, and counting codes."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from minildm.exercises.result import Result, Trial, check_function

NOT_FINITE = (
    "a code that no latent chose has the share 0, and 0 · log 0 came out as NaN; its share of "
    "the entropy is 0: torch.special.entr knows that."
)


def _draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def check_quantise(fn: object) -> Result:
    """Check `quantise(z, codebook)`: (B, c, h, w), (K, c) -> codes (B, c, h, w), and gradients."""
    praise = "the values are codes, and the decoder's gradient passes to z as if nothing happened."
    # c = K, and c = h: a wrong axis runs, without any error.
    values = [_values(2, 3, 4, 5, 7), _values(1, 4, 4, 4, 4)]
    found = check_function(fn, values, praise)
    return check_function(_gradients_of(fn), [_gradients()], praise) if found.ok else found


def _values(b: int, c: int, h: int, w: int, k: int) -> Trial:
    z, codebook = _draw((b, c, h, w), (k, c))
    flat = rearrange(z, "b c h w -> (b h w) c")
    distance = torch.cdist(flat, codebook)

    def codes(indices: Tensor) -> Tensor:
        return rearrange(codebook[indices], "(b h w) c -> b c h w", b=b, h=h)

    right = codes(distance.argmin(1))
    wrong_axis = torch.cdist(z.reshape(-1, c), codebook).argmin(1)
    mistakes = {
        "those are the farthest codes: argmin, not argmax, of the distance.": (
            codes(distance.argmax(1))
        ),
        "the largest product is not the nearest code: long codes win; compare |z − e|.": (
            codes((flat @ codebook.T).argmax(1))
        ),
        "it returns z unchanged: the value must be the code's, the gradient z's.": z,
        "reshape alone mixes channels and places: move the channels last first, "
        "as rearrange(z, 'b c h w -> (b h w) c').": codebook[wrong_axis].reshape(z.shape),
        "the codes are right, but laid out wrongly: move the channels back to the second axis.": (
            codebook[distance.argmin(1)].reshape(z.shape)
        ),
        "that is z minus its code; return the code.": z - right,
    }
    return Trial((z, codebook), right, mistakes)


def _gradients() -> Trial:
    """A weighted sum of the answer, differentiated: (gradient of z, then of the codebook)."""
    z, codebook, weight = _draw((2, 3, 2, 4), (5, 3), (2, 3, 2, 4))
    flat = rearrange(z, "b c h w -> (b h w) c")
    one_hot = F.one_hot(torch.cdist(flat, codebook).argmin(1), len(codebook)).float()
    to_codes = one_hot.T @ rearrange(weight, "b c h w -> (b h w) c")
    none, nothing = torch.zeros_like(z), torch.zeros_like(codebook)

    def both(of_z: Tensor, of_codes: Tensor) -> Tensor:
        return torch.cat([of_z.flatten(), of_codes.flatten()])

    mistakes = {
        "the values are right, but no gradient reaches z, so the encoder learns nothing: "
        "return z + (codes − z).detach().": both(none, to_codes),
        "the values are right, but everything is detached: z gets no gradient.": both(
            none, nothing
        ),
        "z's gradient is right, but the codebook gets one from the reconstruction, too: "
        "detach the codes.": both(weight, to_codes),
    }
    otherwise = "its values are right, but its gradients are not those of (2)."
    return Trial((z, codebook, weight), both(weight, nothing), mistakes, otherwise)


def _gradients_of(fn: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def gradients(z: Tensor, codebook: Tensor, weight: Tensor) -> Tensor:
        leaves = z.clone().requires_grad_(), codebook.clone().requires_grad_()
        with torch.enable_grad():
            loss = (fn(*leaves) * weight).sum()
        found = [None, None]
        if loss.requires_grad:
            found = torch.autograd.grad(loss, leaves, allow_unused=True)
        pairs = zip(found, leaves, strict=True)
        return torch.cat([(torch.zeros_like(a) if g is None else g).flatten() for g, a in pairs])

    return gradients


def check_code_statistics(fn: object) -> Result:
    """Check `code_statistics(indices, K)`: n batches (n, B, h, w) int64 -> (usage, perplexity)."""
    praise = "counted over all batches at once, then one entropy; a batch's own would be too low."
    found = check_function(fn, [_statistics(6, 32), _statistics(3, 7), _evenly(8)], praise)
    if "values are not finite" in found.message:
        return Result(False, NOT_FINITE)
    return found


def _evenly(k: int) -> Trial:
    """Every code alike: the perplexity is K."""
    indices = torch.arange(4 * k).remainder(k).view(2, 2, k, 1)
    otherwise = "it is right where some codes are chosen more often, but alike they must give K."
    return Trial((indices, k), torch.tensor([1.0, k]), {}, otherwise)


def _statistics(n: int, k: int) -> Trial:
    """Batches that each choose among a few codes of their own; some codes stay unused."""
    draw = torch.Generator().manual_seed(n)
    own = torch.randint(3, (n, 2, 3, 4), generator=draw)
    indices = (own + 2 * torch.arange(n).view(-1, 1, 1, 1)).remainder(k - 1)
    share = _share(indices, k)
    usage, entropy = (share > 0).float().mean(), torch.special.entr(share).sum()
    perplexity = entropy.exp()
    each = torch.stack([torch.stack(_both(_share(batch, k))) for batch in indices])
    bits = entropy / torch.tensor(2.0).log()
    mistakes = {
        "those are means over the batches of their own numbers, which are too low: count the "
        "choices of all batches first.": each.mean(0),
        "the usage is right; the perplexity is a mean over batches: take the entropy of all "
        "counts together.": torch.stack([usage, each[:, 1].mean()]),
        "the perplexity is right; the usage is a mean over batches: a code counts as used when any "
        "batch uses it.": torch.stack([each[:, 0].mean(), perplexity]),
        "those are the last batch's numbers alone.": each[-1],
        "two bases are mixed: an entropy with log2 wants 2 ** H, one with log wants exp(H).": (
            torch.stack([usage, bits.exp()])
        ),
        "two bases are mixed: the entropy is in nats, so take exp(H), not 2 ** H.": (
            torch.stack([usage, 2**entropy])
        ),
        "that is the entropy; the perplexity is its exp.": torch.stack([usage, entropy]),
        "that is the entropy in bits; the perplexity is 2 to its power.": torch.stack(
            [usage, bits]
        ),
        "the entropy's sign is wrong: −Σ p log p.": torch.stack([usage, (-entropy).exp()]),
        "the usage is a count; divide by K.": torch.stack([usage * k, perplexity]),
        "usage and perplexity are swapped.": torch.stack([perplexity, usage]),
    }
    return Trial((indices, k), torch.stack([usage, perplexity]), mistakes)


def _share(indices: Tensor, k: int) -> Tensor:
    return indices.flatten().bincount(minlength=k) / indices.numel()


def _both(share: Tensor) -> tuple[Tensor, Tensor]:
    return (share > 0).float().mean(), torch.special.entr(share).sum().exp()
