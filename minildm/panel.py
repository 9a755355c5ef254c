"""A panel for a notebook: a prompt, a style, guidance, steps, a seed, and the picture they give."""

import base64
import html
import io
import time
import warnings
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from minildm.conditioning import CaptionConditioner
from minildm.data.emoji import STYLES
from minildm.data.variants import style_caption
from minildm.diffusion import LatentDiffusion

if TYPE_CHECKING:
    from ipywidgets import Widget

SIDE = 256  # pixels, at least, of a picture in the panel


def text_panel(
    model: LatentDiffusion,
    prompt: str = "a red apple",
    *,
    style: str | None = None,
    guidance_scale: float = 3.0,
    steps: int = 25,
    seed: int = 0,
) -> "TextPanel":
    """A panel with these settings and, drawn already, their picture; the last line of a cell.

    style: one of the emoji's, whose name then follows the prompt; None: none. Raises ImportError
    without ipywidgets, ValueError for a model that reads no text and for a setting that the panel
    cannot hold; what only the model refuses, such as a prompt that is too long, the panel says.
    """
    if not isinstance(model.conditioner, CaptionConditioner):
        raise ValueError(f"model must read text, got one of kind={model.config.conditioner.kind!r}")
    if style not in (None, *STYLES):
        raise ValueError(f"style={style!r} is not known; known: {', '.join(STYLES)}")
    panel = TextPanel(model)
    panel.set(prompt=prompt, style=style, guidance_scale=guidance_scale, steps=steps, seed=seed)
    panel.draw()
    return panel


class TextPanel:
    """Widgets round a model of text. `controls` has them by name; a click on `button` draws.

    x: the last picture, (1, 3, H, W) in [-1, 1] on the CPU; None where there is none. Where no
    widget can be shown, as in a published notebook, the picture is shown alone.
    """

    def __init__(self, model: LatentDiffusion) -> None:
        widgets = widgets_package()
        self.model = model
        self.x: Tensor | None = None
        wide = {"style": {"description_width": "5em"}, "layout": {"width": "26em"}}
        named = [("none named", None), *((f"{style} style", style) for style in STYLES)]
        most = min(100, model.schedule.T)
        self.controls: dict[str, Widget] = {
            "prompt": widgets.Text(description="prompt", **wide),
            "style": widgets.Dropdown(options=named, description="style", **wide),
            "guidance_scale": widgets.FloatSlider(
                min=1, max=10, step=0.5, description="guidance", **wide
            ),
            "steps": widgets.IntSlider(min=1, max=most, description="steps", **wide),
            "seed": widgets.IntText(description="seed", **wide),
        }
        self.button = widgets.Button(description="draw", button_style="primary")
        self.button.on_click(lambda _: self.draw())
        self.picture, self.said = widgets.HTML(), widgets.HTML()
        left = widgets.VBox([*self.controls.values(), self.button, self.said])
        self.box = widgets.HBox([left, self.picture])

    def set(self, **settings: Any) -> None:
        """Move controls, by name; ValueError for a value that one of them cannot have."""
        from traitlets import TraitError

        for name, value in settings.items():
            control = self.controls[name]
            try:
                control.value = value
            except TraitError as error:
                raise ValueError(f"{name}={value!r}: {error}") from error
            if control.value != value:  # a slider moves to its nearest end instead
                raise ValueError(f"{name}={value!r} must lie in {control.min:g}..{control.max:g}")

    @property
    def caption(self) -> str:
        """What the model is asked for: the prompt, and the style's name as in training."""
        prompt, style = self.controls["prompt"].value, self.controls["style"].value
        return prompt if style is None else style_caption(prompt, style)

    def draw(self) -> None:
        """Draw what the controls say; the same settings give the same picture.

        Unknown words, and errors of input, are said in the panel.
        """
        self.button.disabled, self.x = True, None
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                started = time.perf_counter()
                self.x = self._sample()
                seconds = time.perf_counter() - started
            notes = [str(warning.message) for warning in caught]
            self._show(*notes, f"{self.caption!r}: {seconds:.1f} s")
        except ValueError as error:
            self._show(str(error), wrong=True)
        finally:
            self.button.disabled = False

    def _sample(self) -> Tensor:
        seed = self.controls["seed"].value
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed={seed} must lie in 0..2**63 - 1")
        options = {name: self.controls[name].value for name in ("guidance_scale", "steps")}
        return self.model.sample([self.caption], seed=seed, **options).cpu()

    def _show(self, *lines: str, wrong: bool = False) -> None:
        """The picture, where there is one, and what there is to say."""
        self.picture.value = ""
        if self.x is not None:
            source = f"data:image/png;base64,{as_png(self.x[0])}"
            self.picture.value = f'<img src="{source}" alt="{html.escape(self.alt_text)}">'
        color = "#D55E00" if wrong else "inherit"
        text = "<br>".join(html.escape(line) for line in lines)
        self.said.value = f'<div role="status" style="color: {color}">{text}</div>'

    @property
    def alt_text(self) -> str:
        """A sentence for those who cannot see the picture."""
        return f"What the model draws for {self.caption!r}, seed {self.controls['seed'].value}."

    def _repr_mimebundle_(self, **_kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        shown = self.box._repr_mimebundle_() | {"text/plain": repr(self)}
        if self.x is None:
            return shown, {}
        return shown | {"image/png": as_png(self.x[0])}, {"image/png": {"alt": self.alt_text}}

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={widget.value!r}" for name, widget in self.controls.items())
        return f"TextPanel({values})"


def as_png(x: Tensor, side: int = SIDE) -> str:
    """A picture (3, H, W) in [-1, 1] as a PNG in base64, at least `side` wide, in sharp squares."""
    pixels = ((x + 1) * 127.5).round().to(torch.uint8)
    picture = Image.fromarray(rearrange(pixels, "c h w -> h w c").numpy())
    k = -(-side // picture.width)
    picture = picture.resize((k * picture.width, k * picture.height), Image.Resampling.NEAREST)
    picture.save(file := io.BytesIO(), "png")
    return base64.b64encode(file.getvalue()).decode()


def widgets_package() -> Any:
    """The package ipywidgets; an ImportError says what to install."""
    try:
        import ipywidgets
    except ImportError as error:
        raise ImportError("the panel is made of widgets: pip install 'ipywidgets>=8'") from error
    return ipywidgets
