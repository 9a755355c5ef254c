"""The paper's ablations, ready to run: `minildm sweep f`."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from minildm.presets import FACTOR_UNETS
from minildm.sweeps.sweep import Sweep

SMALL = {"preset": "emoji-class-f4", "first_stage": "emoji-kl-f4"}  # 32 px, 2,000 steps of 16
QUARTERS = (250, 500, 1000, 2000)
ALIKE = {  # all that two presets for scenes can share: what they are told differs, and how
    "objective.predict": "v",
    "t_bias": 2.0,
    "alone_steps": 0,
    "conditioner.p_uncond": 0.0,  # samples are drawn without guidance
    "unet.width_mult": [1, 2, 2],
    "unet.attn_levels": [1, 2],
    "train.steps": 7000,
}
SHIPPED = {"model": "emoji-class", "sampling.guidance_scale": 3.0}


Parts = dict[str, Any]  # what a Sweep is made of


class StandardSweeps(Mapping[str, Sweep]):
    """Sweeps by name, each made when it is asked for: that looks into data/, which may be away."""

    def __init__(self, parts: Iterable[tuple[str, Parts]]) -> None:
        self._parts = dict(parts)

    def __getitem__(self, name: str) -> Sweep:
        return Sweep(name=name, **self._parts[name])

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def _sweep(name: str, question: str, paper: str, **parts: object) -> tuple[str, Parts]:
    return name, {"question": question, "paper": paper, **parts}


SWEEPS = StandardSweeps(
    (
        _sweep(
            "f",
            "What does the downsampling factor do?",
            "Fig. 6: f = 1 and 2 learn slowly, f = 32 stagnates, 4 to 16 balance. Fig. 7: the same "
            "order over sampling speed, with LDM-4 and LDM-8 best.",
            levels={
                str(f): {
                    "preset": f"emoji-class-f{f}",
                    "first_stage": "pixels" if f == 1 else f"emoji-kl-f{f}",
                }
                for f in FACTOR_UNETS
            },
            measure_at=QUARTERS,
            samplings={f"ddim {steps}": {"steps": steps} for steps in (5, 10, 50)},
        ),
        _sweep(
            "regularizer",
            "KL or VQ: which latent is easier to learn?",
            "Sec. 4.1: VQ latents sometimes give better samples although they reconstruct a "
            "little worse.",
            shared=SMALL,
            levels={
                "KL": {"first_stage": "emoji-kl-f4"},
                "VQ": {"first_stage": "emoji-vq-f4"},
            },
            measure_at=QUARTERS,
        ),
        _sweep(
            "first_stage_attention",
            "Does attention in the first stage pay?",
            "Tab. 6 and 8: it reconstructs better; without it sampling is a little faster, and "
            "FID a little worse.",
            shared=SMALL,
            levels={
                "without": {"first_stage.model.mid_attn": False},
                "with": {"first_stage.model.mid_attn": True},
            },
            measure_at=QUARTERS,
        ),
        _sweep(
            "ddim_steps",
            "How many steps of DDIM are enough?",
            "Fig. 7: FID falls with the steps, and flattens between 50 and 200.",
            shared=SHIPPED,
            levels={str(s): {"sampling.steps": s} for s in (2, 5, 10, 20, 50, 100)},
        ),
        _sweep(
            "sampler",
            "Which sampler, at ten steps?",
            "The paper samples with DDIM; the official code has PLMS, which came later.",
            shared={**SHIPPED, "sampling.steps": 10},
            levels={
                s: {"sampling.sampler": s}
                for s in ("ddim", "ddpm", "plms", "dpm_solver_pp", "euler", "heun")
            },
        ),
        _sweep(
            "guidance_scale",
            "How much guidance?",
            "Tab. 2 and 3: a scale of 1.5 more than halves FID, and takes recall for precision.",
            shared={"model": "emoji-class"},
            levels={str(s): {"sampling.guidance_scale": s} for s in (1.0, 1.5, 3.0, 5.0, 8.0)},
        ),
        _sweep(
            "objective",
            "What should the network predict?",
            "The paper predicts eps; v and z0 are later or older.",
            shared=SMALL,
            levels={p: {"objective.predict": p} for p in ("eps", "v", "z0")},
            measure_at=QUARTERS,
        ),
        _sweep(
            "latent_scale",
            "Does the scale of the latent matter?",
            "Appendix D.1: KL latents that are not scaled to unit variance have another "
            "signal-to-noise ratio, and sample worse.",
            shared=SMALL,
            levels={f"std {s:g}": {"latent_std": s} for s in (0.25, 0.5, 1.0, 2.0, 4.0)},
            measure_at=QUARTERS,
        ),
        _sweep(
            "conditioning",
            "A map beside z_t, or boxes through cross-attention: which is followed better?",
            "Sec. 3.3: maps that are aligned with the picture are concatenated, everything else "
            "goes through cross-attention. Here, too, each condition has its own way in, and a map "
            "says more than boxes; the layers that read boxes make the UNet half as large again. "
            "So what is told differs, as well as how.",
            shared=ALIKE,
            levels={
                "concat: a map": {"preset": "scenes-semantic"},
                "cross-attention: boxes": {"preset": "scenes-layout"},
            },
            measure_at=(3500,),
        ),
    )
)
