"""The checks behind the exercises: right answers pass, typical mistakes are named, none raises."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from minildm.exercises import (
    Result,
    adversarial,
    autoencoder_kl,
    beyond_the_paper,
    choosing_f,
    class_guidance,
    diffusion_steps,
    downsampling_factor,
    evaluation_of_samples,
    inpainting,
    layout_tokens,
    official_numbers,
    perceptual_compression,
    quickstart,
    sampling_steps,
    scaling_out,
    semantic_synthesis,
    super_resolution,
    text_to_image,
    two_stages,
    unet_parts,
    vector_quantisation,
)
from minildm.exercises.result import Trial, check_function

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
MODULES = {  # what the exercises' cells import
    "00_quickstart": {"quickstart": quickstart},
    "01_perceptual_and_semantic_compression": {
        "perceptual_compression": perceptual_compression,
        "math": math,
        "torch": torch,
    },
    "02_autoencoder_kl": {"autoencoder_kl": autoencoder_kl},
    "03_vector_quantisation": {"vector_quantisation": vector_quantisation},
    "04_perceptual_and_adversarial_losses": {"adversarial": adversarial},
    "05_choosing_f_first_stage": {"choosing_f": choosing_f, "torch": torch},
    "06_diffusion_step_by_step": {"diffusion_steps": diffusion_steps},
    "07_unet": {"unet_parts": unet_parts, "torch": torch, "rearrange": rearrange},
    "08_latent_diffusion": {"two_stages": two_stages},
    "09_samplers": {"sampling_steps": sampling_steps},
    "10_class_conditional_and_guidance": {"class_guidance": class_guidance, "torch": torch},
    "11_text_to_image": {"text_to_image": text_to_image, "torch": torch},
    "12_layout_to_image": {"layout_tokens": layout_tokens, "torch": torch},
    "13_super_resolution": {"super_resolution": super_resolution, "torch": torch},
    "14_inpainting": {"inpainting": inpainting, "torch": torch, "F": F},
    "15_semantic_synthesis_and_large_pictures": {
        "semantic_synthesis": semantic_synthesis,
        "torch": torch,
        "F": F,
    },
    "16_downsampling_factor": {"downsampling_factor": downsampling_factor, "torch": torch},
    "17_evaluation": {"evaluation_of_samples": evaluation_of_samples, "torch": torch},
    "18_official_checkpoints": {"official_numbers": official_numbers, "torch": torch},
    "19_scaling_out": {"scaling_out": scaling_out, "torch": torch},
    "20_beyond": {"beyond_the_paper": beyond_the_paper, "torch": torch},
}
CHECKS = (quickstart.check_noised, quickstart.check_guidance)
Fn = Callable[..., Any]


def tagged(path: Path, tag: str) -> list[str]:
    """The sources of a notebook's cells with that tag, in order."""
    cells = nbformat.read(path, as_version=4).cells
    return [cell.source for cell in cells if tag in cell.metadata.get("tags", ())]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_solution_in_the_notebook_passes_its_check(path: Path) -> None:
    sources = tagged(path, "solution")
    assert len(sources) >= 2
    for source in sources:
        assert "assert " in source and ".check_" in source
        exec(source, dict(MODULES[path.stem]))  # it asserts `.ok`


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_stub_runs_and_is_not_right_yet(path: Path) -> None:
    for source in tagged(path, "exercise"):
        *body, call = source.strip().splitlines()
        names = dict(MODULES[path.stem])
        exec("\n".join(body), names)
        verdict = eval(call, names)
        assert isinstance(verdict, Result) and not verdict.ok
        assert "nothing is written yet" in verdict.message and "Not yet" in repr(verdict)


def b111(abar: Tensor) -> Tensor:
    return abar.view(-1, 1, 1, 1)


RIGHT: list[tuple[Fn, Fn]] = [
    (quickstart.check_noised, lambda z, e, a: b111(a) ** 0.5 * z + (1 - b111(a)) ** 0.5 * e),
    (
        quickstart.check_noised,  # in double precision, as a loop over the batch
        lambda z, e, a: torch.stack(
            [a[i].double().sqrt() * z[i] + (1 - a[i].double()).sqrt() * e[i] for i in range(len(a))]
        ),
    ),
    (quickstart.check_guidance, lambda n, c, s: n + s * (c - n)),
    (quickstart.check_guidance, lambda n, c, s: (1 - s) * n + s * c),
    (quickstart.check_guidance, lambda n, c, s: torch.lerp(n, c, s)),
]


@pytest.mark.parametrize(("check", "fn"), RIGHT)
def test_a_right_answer_passes_however_it_is_written(check: Fn, fn: Fn) -> None:
    verdict = check(fn)
    assert verdict.ok and verdict and "Right" in repr(verdict), verdict


WRONG_NOISED: dict[str, tuple[Fn, str]] = {
    "no roots": (lambda z, e, a: b111(a) * z + (1 - b111(a)) * e, "roots are missing"),
    "swapped": (lambda z, e, a: (1 - b111(a)).sqrt() * z + b111(a).sqrt() * e, "swapped"),
    "root of each": (lambda z, e, a: b111(a).sqrt() * z + (1 - b111(a).sqrt()) * e, "not 1 − √ᾱ"),
    "one weight": (lambda z, e, a: b111(a).sqrt() * (z + e), "√ᾱ weighs both"),
    "bare noise": (lambda z, e, a: b111(a).sqrt() * z + e, "noise is not weighed"),
    "bare latent": (lambda z, e, a: z + (1 - b111(a)).sqrt() * e, "latent is not weighed"),
    "minus": (lambda z, e, a: b111(a).sqrt() * z - (1 - b111(a)).sqrt() * e, "subtracted"),
    "no noise": (lambda z, e, a: b111(a).sqrt() * z, "ε is missing"),
    "one abar for all": (
        lambda z, e, a: a[0].sqrt() * z + (1 - a[0]).sqrt() * e,
        "first sample's abar",
    ),
    "along the width": (
        # with B = 1 it is right, with B = w it runs: the trap of broadcasting
        lambda z, e, a: a.sqrt() * z + (1 - a).sqrt() * e,
        "met the width",
    ),
    "shape": (lambda z, e, a: (b111(a).sqrt() * z + (1 - b111(a)).sqrt() * e)[:, 0], "shape is"),
    "in place": (lambda z, e, a: z.mul_(b111(a).sqrt()).add_((1 - b111(a)).sqrt() * e), "in place"),
    "nan": (lambda z, e, a: b111(a).sqrt() * z + (b111(a) - 1).sqrt() * e, "not finite"),
    "other": (lambda z, e, a: 2 * z, "not those of the equation"),
}
WRONG_GUIDANCE: dict[str, tuple[Fn, str]] = {
    "swapped": (lambda n, c, s: c + s * (n - c), "swapped"),
    "1 + s": (lambda n, c, s: c + s * (c - n), "starts at eps_c"),
    "(1 + s) spelled out": (lambda n, c, s: (1 + s) * c - s * n, "starts at eps_c"),
    "s - 1": (lambda n, c, s: s * c + (s - 1) * n, "sign is wrong"),
    "no null": (lambda n, c, s: s * c, "eps_null is missing"),
    "no difference": (lambda n, c, s: n + s * c, "difference is missing"),
    "step alone": (lambda n, c, s: s * (c - n), "step alone"),
    "no s": (lambda n, c, s: c, "does not use s"),
    "no condition": (lambda n, c, s: n, "does not use the condition"),
    "backwards": (lambda n, c, s: n - s * (c - n), "turned round"),
    "s fixed": (lambda n, c, s: n + 3.0 * (c - n), "right at s = 3, but not at s = 1"),
    "s = 0 forgotten": (
        lambda n, c, s: n + s * (c - n) if s else c,
        "at s = 0, where it must be eps_null",
    ),
    "shape": (lambda n, c, s: (n + s * (c - n)).mean(0), "shape is"),
    "in place": (lambda n, c, s: n.add_(s * (c - n)), "in place"),
    "other": (lambda n, c, s: n + s**2 * (c - n), "not those of (5)"),
}


@pytest.mark.parametrize("mistake", WRONG_NOISED)
def test_a_mistake_in_the_forward_process_is_named(mistake: str) -> None:
    fn, said = WRONG_NOISED[mistake]
    verdict = quickstart.check_noised(fn)
    assert not verdict.ok and said in verdict.message, verdict


@pytest.mark.parametrize("mistake", WRONG_GUIDANCE)
def test_a_mistake_in_guidance_is_named(mistake: str) -> None:
    fn, said = WRONG_GUIDANCE[mistake]
    verdict = quickstart.check_guidance(fn)
    assert not verdict.ok and said in verdict.message, verdict


def raising(*_: object) -> None:
    raise RuntimeError("The size of tensor a (4)\nmust match " + "very " * 60)


def leaving(*_: object) -> None:
    raise SystemExit


def unwritten(*_: object) -> None:
    raise NotImplementedError


def recursing(*args: object) -> object:
    return recursing(*args)


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no text for this")


ODD: dict[str, tuple[object, str]] = {
    "no function": (None, "the function itself; this is of type NoneType"),
    "its result": (torch.zeros(2), "the function itself; this is of type Tensor"),
    "raises": (raising, "RuntimeError: The size of tensor a (4) must match"),
    "leaves": (leaving, "SystemExit"),
    "unwritten": (unwritten, "nothing is written yet"),
    "returns None": (lambda *_: None, "is there a `return`"),
    "returns Ellipsis": (lambda *_: ..., "nothing is written yet"),
    "returns NotImplemented": (lambda *_: NotImplemented, "nothing is written yet"),
    "too few arguments": (lambda a: a, "TypeError"),
    "recursion": (recursing, "RecursionError"),
    "numpy": (lambda a, *_: a.numpy(), "one of type ndarray"),
    "number": (lambda *_: 1.0, "one of type float"),
    "unprintable": (lambda *_: Unprintable(), "one of type Unprintable"),
    "scalar": (lambda *_: torch.tensor(1.0), "shape is ()"),
    "empty": (lambda *_: torch.zeros(0), "shape is (0,)"),
    "complex": (lambda a, *_: a.to(torch.complex64), "values are complex"),
    "whole numbers": (lambda a, *_: a.long(), "values"),
    "booleans": (lambda a, *_: a > 0, "values"),
    "sparse": (lambda a, *_: a.to_sparse(), "compared"),
    "on no device": (lambda a, *_: a.to("meta"), "compared"),
    "a class": (Unprintable, "TypeError"),
    "resized": (lambda a, *_: a.resize_(1), "shape"),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", ODD)
def test_no_answer_makes_a_check_raise(check: Fn, case: str) -> None:
    fn, said = ODD[case]
    verdict = check(fn)
    assert isinstance(verdict, Result) and verdict.ok is False
    assert said in verdict.message and "\n" not in verdict.message, verdict
    assert len(verdict.message) < 200


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_leaves_the_random_state_alone(check: Fn) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    check(lambda a, *_: torch.randn_like(a))
    assert torch.equal(torch.get_rng_state(), before)


def test_every_trial_must_pass() -> None:
    trials = [Trial((torch.full((2,), v),), torch.full((2,), 2 * v)) for v in (0.0, 1.0)]
    assert check_function(lambda a: 2 * a, trials, "doubled") == Result(True, "doubled")
    assert not check_function(lambda a: 0 * a, trials, "doubled")  # right on the first alone


def test_an_answer_within_rounding_is_right() -> None:
    trial = Trial((torch.tensor([1000.0]),), torch.tensor([1000.0]))
    assert check_function(lambda a: a * (1 + 1e-6), [trial], "")
    assert not check_function(lambda a: a * (1 + 1e-3), [trial], "")
    assert not check_function(lambda a: np.float32(1000.0), [trial], "")


@pytest.mark.parametrize("answer", [6, 6.0, np.float32(6), np.float64(6), np.int64(6)])
def test_a_number_will_do_where_a_scalar_is_asked_for(answer: Any) -> None:
    scalar, row = (Trial((torch.ones(3),), torch.full(shape, 6.0)) for shape in ((), (1,)))
    assert check_function(lambda a: answer, [scalar], "").ok
    assert not check_function(lambda a: answer + 1, [scalar], "").ok
    verdict = check_function(lambda a: answer, [row], "")  # but not in place of a row
    assert not verdict.ok and f"one of type {type(answer).__name__}" in verdict.message


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (True, "one of type bool"),
        ("6", "one of type str"),
        (math.nan, "not finite"),
        (6 + 0j, "take .real"),
        (torch.tensor(6 + 1e-9j), "take .real"),
        (10**400, "could not be compared"),
    ],
)
def test_what_is_no_number_is_refused_for_what_it_is(answer: Any, said: str) -> None:
    verdict = check_function(lambda a: answer, [Trial((torch.ones(1),), torch.tensor(6.0))], "")
    assert not verdict.ok and said in verdict.message
