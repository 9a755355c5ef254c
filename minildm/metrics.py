"""How good are pictures? Each number alone, or all in one call; with intervals.

`evaluate_pictures` and `evaluate_first_stage` give an `Evaluation`, names to `Measured`: a value,
an interval, and the N without which neither means much. On other features than Inception's a
Frechet distance is a *proxy*-FID: compare its values only with each other, at one N, one picture
size and one reference set. It falls as N grows (Chong & Forsyth 2020), by an amount that depends
on the model; `kid` does not: give both.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from minildm.autoencoder import Autoencoder
from minildm.distances import (
    Lots,
    Neighbours,
    PrecisionRecall,
    frechet_distance,
    frechet_distances,
    kernel_distance,
    kernel_distances,
    nearest,
    precision_recall,
    precision_recalls,
)
from minildm.features import OfflineFeatures, frechet_features, perceptual_distance
from minildm.fidelity import (
    PART,
    as_floats,
    check_set,
    compare_pairs,
    device_of,
    evaluating,
    extract,
    name_of,
    psnr,
    ssim,
)
from minildm.intervals import (
    Evaluation,
    Measured,
    exactly,
    jackknife_interval,
    lots,
    mean_interval,
    median_interval,
    proportion_interval,
)
from minildm.judge import Judge, correct
from minildm.regularizers import code_usage

__all__ = [
    "Evaluation",
    "Measured",
    "Neighbours",
    "PrecisionRecall",
    "accuracy",
    "evaluate_first_stage",
    "evaluate_pictures",
    "extract",
    "frechet_distance",
    "kernel_distance",
    "kid",
    "mean_interval",
    "median_interval",
    "nearest_neighbours",
    "precision_recall",
    "proportion_interval",
    "proxy_fid",
    "psnr",
    "reconstruct",
    "ssim",
]

CONFIDENCE = 0.95


# Many pictures against many others.


def proxy_fid(
    real: Tensor,
    fake: Tensor,
    features: nn.Module | None = None,
    *,
    groups: int = 10,
    confidence: float = 0.95,
) -> Measured:
    """Frechet distance of two sets on offline features (Heusel et al. 2017, other features).

    real, fake: pictures (N, 3, S, S), float in [-1, 1] or uint8, of one size; or their features
    (N, D) from `extract`, which spares the network's time. features: `OfflineFeatures()` by
    default; with block=10 a smaller N will do. groups: of the jackknife behind the interval,
    which is about this N (the bias of a finite N is in all its values alike); 0: no interval.
    n is the smaller set's size. ValueErrors name too small sets, other shapes, NaN.
    """
    real, fake, drawn = _compared(real, fake, features, groups)
    found = frechet_distances(real, fake, drawn)
    return jackknife_interval(found, min(len(real), len(fake)), confidence, (0.0, math.inf))


def kid(
    real: Tensor,
    fake: Tensor,
    features: nn.Module | None = None,
    *,
    groups: int = 10,
    confidence: float = 0.95,
) -> Measured:
    """Kernel distance of two sets (Binkowski et al. 2018), unbiased; arguments as `proxy_fid`.

    It may be slightly negative. The unbiased estimate uses all pairs, not subsets of 1,000.
    """
    real, fake, drawn = _compared(real, fake, features, groups)
    found = kernel_distances(real, fake, drawn)
    return jackknife_interval(found, min(len(real), len(fake)), confidence)


def _compared(
    real: Tensor, fake: Tensor, features: nn.Module | None, groups: int
) -> tuple[Tensor, Tensor, Lots | None]:
    """Two sets of pictures or features, checked -> their features, and the jackknife's lots."""
    _check_sets(real, fake, groups)
    if real.ndim == 4:
        features = features or OfflineFeatures()
        real, fake = extract(real, features), extract(fake, features)
    return real, fake, _lots(len(real), len(fake), groups)


def _check_sets(real: Tensor, fake: Tensor, groups: int) -> None:
    if real.shape[1:] != fake.shape[1:]:
        shapes = f"{tuple(real.shape)} and {tuple(fake.shape)}"
        raise ValueError(f"real and fake must be alike but for their number, got {shapes}")
    if groups < 0 or groups == 1 or min(len(real), len(fake)) < max(2, 2 * groups):
        raise ValueError(
            f"groups={groups} must be 0 or 2 and more, with two pictures each at least: got "
            f"{len(real)} real and {len(fake)} fake"
        )


def _check_pairs(real: Tensor, fake: Tensor, paired: bool, clusters: Tensor | None) -> None:
    if paired and len(real) != len(fake):
        raise ValueError(f"paired sets must be equally many: {len(real)} real, {len(fake)} fake")
    if clusters is not None and not paired:
        raise ValueError(f"clusters {tuple(clusters.shape)} are for paired sets, paired=False")


def _lots(
    n: int,
    m: int,
    groups: int,
    seed: int = 0,
    paired: bool = False,
    clusters: Tensor | None = None,
) -> Lots | None:
    """Groups of both sets; a pair falls into one."""
    if not groups:
        return None
    generator = torch.Generator().manual_seed(seed)
    of_real = lots(n, groups, generator, clusters)
    return of_real, of_real if paired else lots(m, groups, generator)


def nearest_neighbours(
    fake: Tensor,
    train: Tensor,
    k: int = 1,
    *,
    features: nn.Module | Literal["pixels"] | None = None,
) -> Neighbours:
    """The k training pictures nearest to each picture: does a model copy? (N, k) twice.

    fake, train: pictures (N, 3, S, S) and (M, 3, S, S), float in [-1, 1] or uint8; or features,
    as `proxy_fid` takes them. Distances are Euclidean on the features, `frechet_features()` by
    default; for "pixels" the root of the mean squared difference. ValueError unless 1 <= k <= M.
    """
    if fake.shape[1:] != train.shape[1:]:
        shapes = f"{tuple(fake.shape)} and {tuple(train.shape)}"
        raise ValueError(f"fake and train must be alike but for their number, got {shapes}")
    if isinstance(features, str) and features != "pixels":
        raise ValueError(f"features={features!r} must be 'pixels', a module or None")
    if features == "pixels":
        found = nearest(as_floats(fake).flatten(1), as_floats(train).flatten(1), k)
        return found._replace(distances=found.distances / math.sqrt(fake[0].numel()))
    if fake.ndim == 4:
        features = features or frechet_features()
        fake, train = extract(fake, features), extract(train, features)
    return nearest(fake, train, k)


# All in one call.


@torch.no_grad()
def evaluate_pictures(
    real: Tensor,
    fake: Tensor,
    *,
    paired: bool = False,
    train: Tensor | None = None,
    features: nn.Module | None = None,
    perceptual: nn.Module | None = None,
    clusters: Tensor | None = None,
    groups: int = 10,
    k: int = 3,
    seed: int = 0,
) -> Evaluation:
    """Everything that can be said of fake pictures beside real ones.

    real (N, 3, S, S), fake (M, 3, S, S), float in [-1, 1] or uint8. `fid` (`proxy_fid` on other
    features than Inception's), `kid`, `precision` and `recall`. paired: fake[i] was made from
    real[i]; then `psnr` (infinite, without an interval, where a picture is reproduced exactly),
    `ssim` and `perceptual` too, and the Frechet distance is `r_fid` (`proxy_r_fid`). train,
    pictures (or their features, from `extract`): `train_distance`, the median distance of a fake
    picture to the nearest training picture, and `nearer_to_train`, the share of fake pictures
    that are nearer to one than the median real picture is: 0.5 where the model draws as the data
    do, near 1 where it copies (real must then be pictures it was not trained on).

    clusters, for pairs: (N,) int, which pictures belong together (crops of one photograph, styles
    of one emoji) and are not independent: intervals are then over clusters. features,
    perceptual: `frechet_features()`, `perceptual_distance()` by default. Means have
    Student's t intervals, the median that of its neighbours in order; the others a jackknife over
    `groups` groups drawn by `seed`, about their expectation at these N (0: none). Raises
    ValueError for other shapes, values that are not finite or leave [-1, 1], and too few
    pictures: 2 * groups, and k + 1 beside a group.
    """
    for name, x in (("real", real), ("fake", fake)):
        check_set(x, name)
    _check_sets(real, fake, groups)
    _check_left(min(len(real), len(fake)), groups, k)
    _check_pairs(real, fake, paired, clusters)
    if train is not None and train.ndim == 4:
        check_set(train, "train", real.shape[1:])
    features = features or frechet_features().to(real.device)
    settings: dict[str, Any] = {"features": name_of(features), "groups": groups, "k": k}
    settings |= {"seed": seed, "confidence": CONFIDENCE, "picture": list(real.shape[1:])}
    measured = {}
    if paired:
        perceptual = perceptual or perceptual_distance().to(real.device)
        settings["perceptual"] = name_of(perceptual)
        measured |= compare_pairs(real, fake, perceptual, clusters)
    if clusters is not None:
        settings["clusters"] = len(clusters.unique())
    drawn = _lots(len(real), len(fake), groups, seed, paired, clusters)
    with evaluating(features):
        a, b = extract(real, features), extract(fake, features)
        if train is not None and train.ndim == 4:
            train = extract(train, features)
    frechet = ("r_" if paired else "") + "fid"
    frechet = frechet if name_of(features) == "Inception" else f"proxy_{frechet}"
    measured |= _sets(a, b, drawn, k, paired, frechet)
    if train is not None:
        measured |= _copying(a, b, train, drawn)
    return Evaluation(measured, settings)


def _sets(
    a: Tensor, b: Tensor, drawn: Lots | None, k: int, paired: bool, frechet: str
) -> dict[str, Measured]:
    """Distances of two sets of features, real and fake."""
    spread = frechet_distances(a, b, drawn), kernel_distances(a, b, drawn, paired=paired)
    precision, recall = precision_recalls(a, b, drawn, k)
    n = min(len(a), len(b))
    return {
        frechet: jackknife_interval(spread[0], n, CONFIDENCE, (0.0, math.inf)),
        "kid": jackknife_interval(spread[1], n),
        "precision": jackknife_interval(precision, len(b), CONFIDENCE, (0.0, 1.0)),
        "recall": jackknife_interval(recall, len(a), CONFIDENCE, (0.0, 1.0)),
    }


def _copying(a: Tensor, b: Tensor, train: Tensor, drawn: Lots | None) -> dict[str, Measured]:
    """How near fake pictures are to training pictures, beside real ones that are none."""
    of_real, of_fake = nearest(a, train).distances[:, 0], nearest(b, train).distances[:, 0]
    shares = [_below_median(of_fake, of_real)]
    for i in range(0 if drawn is None else int(drawn[0].max()) + 1):
        shares.append(_below_median(of_fake[drawn[1] != i], of_real[drawn[0] != i]))
    share = jackknife_interval(torch.stack(shares), len(b), CONFIDENCE, (0.0, 1.0))
    return {"train_distance": median_interval(of_fake, CONFIDENCE), "nearer_to_train": share}


def _below_median(values: Tensor, reference: Tensor) -> Tensor:
    return (values < reference.median()).double().mean()


def _check_left(n: int, groups: int, k: int) -> None:
    left = n - (math.ceil(n / groups) if groups else 0)
    if not 1 <= k < left:
        raise ValueError(
            f"k={k} must lie in 1..{left - 1}: {left} pictures are left beside a group"
        )


# A first stage.


@torch.no_grad()
def reconstruct(autoencoder: Autoencoder, x: Tensor) -> Tensor:
    """D(E(x)), for KL of the mean, clipped: (B, 3, H, W) in [-1, 1] -> the same, on the CPU."""
    return torch.cat([x_rec for x_rec, _ in _reconstructions(autoencoder, x)])


def _reconstructions(autoencoder: Autoencoder, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Reconstructions and latents of parts of x."""
    place = device_of(autoencoder, x.device)
    for part in tqdm(x.split(PART), "reconstruct", unit="batch", delay=2, leave=False):
        z = autoencoder.encode(as_floats(part).to(place), sample=False)
        yield autoencoder.decode(z).cpu().float().clamp(-1.0, 1.0), z


@torch.no_grad()
def evaluate_first_stage(
    autoencoder: Autoencoder,
    x: Tensor,
    *,
    features: nn.Module | None = None,
    perceptual: nn.Module | None = None,
    clusters: Tensor | None = None,
    groups: int = 10,
    k: int = 3,
    seed: int = 0,
) -> Evaluation:
    """How well pictures survive a first stage, and what it makes of them; LDM Tab. 8 and more.

    x (N, 3, H, W), float in [-1, 1] or uint8, which it was not trained on, against D(E(x)) by
    `evaluate_pictures(paired=True)`, and: `compression`, the numbers of a picture over those of
    its latent, H W 3 / (h w c). For VQ also `bits_per_pixel`, log2(K) h w / (H W), of a code
    without entropy coding; `code_usage`, the share of the K codes that these pictures use (it
    grows with N, so it has no interval), and `perplexity`, exp of the entropy of their counts
    over the whole set. Pixel space (f = 1) is exact: PSNR infinite. Networks not given run where
    the autoencoder is. ValueErrors as `evaluate_pictures`.
    """
    check_set(x, "x")
    _check_sets(x, x, groups)
    _check_left(len(x), groups, k)
    place, config = device_of(autoencoder, x.device), autoencoder.config
    lot = lots(len(x), max(groups, 1), torch.Generator().manual_seed(seed), clusters)
    counts = torch.zeros(max(groups, 1), config.codebook_size or 0, dtype=torch.int64)
    found = []
    with evaluating(autoencoder):
        of_part = iter(lot.split(PART))
        for x_rec, z in _reconstructions(autoencoder, x):
            found.append(x_rec)
            if config.regularizer == "vq":
                _count_codes(counts, autoencoder.code_indices(z).cpu(), next(of_part))
    evaluation = evaluate_pictures(
        x.cpu(),
        torch.cat(found),
        paired=True,
        features=features or frechet_features().to(place),
        perceptual=perceptual or perceptual_distance().to(place),
        clusters=clusters,
        groups=groups,
        k=k,
        seed=seed,
    )
    extra = {"compression": exactly(x[0].numel() / z[0].numel(), len(x))}
    if config.regularizer == "vq":
        bits = math.log2(config.codebook_size) * z[0, 0].numel() / x[0, 0].numel()
        extra |= {"bits_per_pixel": exactly(bits, len(x)), **_codes(counts, len(x), groups)}
    return replace(evaluation, measured=evaluation.measured | extra)


def _count_codes(counts: Tensor, indices: Tensor, lot: Tensor) -> None:
    """Adds choices (B, h, w) of pictures in groups (B,) to counts (G, K), in place."""
    group = lot[:, None, None].expand_as(indices)
    flat = (group * counts.shape[1] + indices).flatten()
    counts += flat.bincount(minlength=counts.numel()).view_as(counts)


def _codes(counts: Tensor, n: int, groups: int) -> dict[str, Measured]:
    """Usage and perplexity from the counts of each group's pictures (G, K)."""
    usage, perplexity = code_usage(counts.sum(0))
    without = [code_usage(counts.sum(0) - counts[i])[1] for i in range(groups)]
    spread = jackknife_interval(torch.stack([perplexity, *without]), n, bounds=(1.0, math.inf))
    return {"code_usage": exactly(float(usage), n), "perplexity": spread}


# The judge.


def accuracy(judge: Judge, x: Tensor, truth: Tensor, question: str = "group") -> Measured:
    """How often the judge sees what was asked for, with Wilson's interval.

    Pictures (N, 3, H, W), float in [-1, 1] or uint8; truth (N,) int64; question: "label" (the
    subgroup), "group" or "style". The judge errs too: give its accuracy on real pictures beside.
    """
    if len(x) != len(truth) or truth.ndim != 1 or not len(x):
        shapes = f"{tuple(x.shape)} and {tuple(truth.shape)}"
        raise ValueError(f"x must be (N, 3, H, W) and truth (N,), N >= 1, got {shapes}")
    device = next(judge.parameters()).device
    with evaluating(judge):
        right = correct(judge, as_floats(x).to(device), truth.to(device), question)
    return proportion_interval(int(right.sum()), len(x))
