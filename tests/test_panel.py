"""The panel: its controls are driven as a front end would, and the picture is the model's own."""

import base64
import builtins
import io
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from minildm import ConditionerConfig, LatentDiffusion, LatentDiffusionConfig
from minildm.data.emoji import STYLES
from minildm.data.variants import style_caption
from minildm.panel import TextPanel, text_panel
from minildm.tokenizer import CaptionTokenizer

WORDS = ["a red apple", "a dog", *(style_caption("", style) for style in STYLES)]


@pytest.fixture
def model(ldm_config: LatentDiffusionConfig, shaken: Callable) -> LatentDiffusion:
    """A tiny one that reads a few words."""
    tokenizer = CaptionTokenizer.trained_on(WORDS)
    reads = ConditionerConfig(
        kind="text", d_cond=8, depth=1, heads=2, d_head=4, length=12, vocab_size=len(tokenizer)
    )
    model = shaken(LatentDiffusion(replace(ldm_config, conditioner=reads)))
    model.conditioner.set_tokenizer(tokenizer)
    return model.eval()


@pytest.fixture
def panel(model: LatentDiffusion) -> TextPanel:
    return text_panel(model, steps=3)


def shown(panel: TextPanel) -> Tensor:
    """The picture in the panel, as it is seen: (H, W, 3) uint8."""
    source = re.search(r'base64,([^"]+)"', panel.picture.value)[1]
    picture = Image.open(io.BytesIO(base64.b64decode(source)))
    return torch.from_numpy(np.array(picture))


def drawn(model: LatentDiffusion, caption: str, **options: Any) -> Tensor:
    return model.sample([caption], **({"steps": 3, "guidance_scale": 3.0, "seed": 0} | options))


def test_it_begins_with_the_models_picture(panel: TextPanel, model: LatentDiffusion) -> None:
    assert torch.equal(panel.x, drawn(model, "a red apple"))
    pixels = ((panel.x[0] + 1) * 127.5).round().to(torch.uint8)
    large = pixels.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)
    assert torch.equal(shown(panel), large.permute(1, 2, 0)) and large.shape == (3, 256, 256)
    assert re.search(r"&#x27;a red apple&#x27;: \d+\.\d s", panel.said.value)


@pytest.mark.parametrize(
    ("moved", "caption", "options"),
    [
        ({"prompt": "a dog"}, "a dog", {}),
        ({"style": "noto"}, "a red apple, noto style", {}),
        ({"prompt": "a dog", "style": "blob"}, "a dog, blob style", {}),
        ({"guidance_scale": 1.0}, "a red apple", {"guidance_scale": 1.0}),
        ({"steps": 5}, "a red apple", {"steps": 5}),
        ({"seed": 7}, "a red apple", {"seed": 7}),
    ],
)
def test_each_control_does_what_it_says_at_a_click(
    panel: TextPanel, model: LatentDiffusion, moved: dict, caption: str, options: dict
) -> None:
    before, x = panel.picture.value, panel.x
    for name, value in moved.items():
        panel.controls[name].value = value
    assert panel.picture.value == before  # not before the click
    panel.button.click()
    assert torch.equal(panel.x, drawn(model, caption, **options))
    assert not torch.equal(panel.x, x) and panel.picture.value != before
    for name in moved:  # and back again
        panel.controls[name].value = text_panel(model, steps=3).controls[name].value
    panel.button.click()
    assert torch.equal(panel.x, x)


def test_unknown_words_are_named_beside_the_picture(panel: TextPanel) -> None:
    panel.controls["prompt"].value = "a quokka & a dog"
    panel.button.click()
    assert "does not know &#x27;quokka&#x27;" in panel.said.value and panel.x is not None
    assert "quokka &amp; a dog" in panel.picture.value  # the alt text
    panel.controls["prompt"].value = "a dog"
    panel.button.click()
    assert "quokka" not in panel.said.value + panel.picture.value


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"prompt": "a dog " * 20}, "has 40 tokens, must be at most 10"),
        ({"seed": -1}, "seed=-1 must lie in 0.."),
        ({"seed": 2**63}, "must lie in 0.."),
    ],
)
def test_errors_of_input_stand_in_the_panel(
    panel: TextPanel, wrong: dict[str, Any], said: str
) -> None:
    for name, value in wrong.items():
        panel.controls[name].value = value
    panel.button.click()
    assert said in panel.said.value and panel.picture.value == "" and panel.x is None
    assert not panel.button.disabled
    panel.controls["prompt"].value, panel.controls["seed"].value = "a dog", 1
    panel.button.click()
    assert said not in panel.said.value and panel.x is not None


def test_prompts_are_text_and_not_markup(panel: TextPanel) -> None:
    panel.controls["prompt"].value = '<b> "dog"'
    panel.button.click()
    assert "<b>" not in panel.said.value + panel.picture.value
    assert 'alt="What the model draws for &#x27;&lt;b&gt; &quot;dog&quot;' in panel.picture.value


def test_a_notebook_gets_the_widgets_and_a_picture_with_its_text(panel: TextPanel) -> None:
    data, metadata = panel._repr_mimebundle_()
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == panel.box.model_id
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert data["image/png"] in panel.picture.value
    assert metadata["image/png"]["alt"] == "What the model draws for 'a red apple', seed 0."
    assert data["text/plain"].startswith("TextPanel(prompt='a red apple', style=None")
    panel.controls["seed"].value = -1
    panel.button.click()
    data, metadata = panel._repr_mimebundle_()
    assert "image/png" not in data and not metadata


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"style": "oil"}, "style='oil' is not known; known: noto, twemoji"),
        ({"steps": 0}, r"steps=0 must lie in 1\.\.100"),
        ({"guidance_scale": 0.5}, r"guidance_scale=0\.5 must lie in 1\.\.10"),
        ({"seed": "x"}, "seed='x'"),
        ({"prompt": 3}, "prompt=3"),
    ],
)
def test_what_the_panel_cannot_hold_is_refused(
    model: LatentDiffusion, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        text_panel(model, **settings)


def test_a_model_of_classes_is_refused(ldm_config: LatentDiffusionConfig) -> None:
    with pytest.raises(ValueError, match="model must read text, got one of kind='class'"):
        text_panel(LatentDiffusion(ldm_config))


def test_without_ipywidgets_it_says_what_to_install(
    model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == "ipywidgets":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install 'ipywidgets>=8'"):
        text_panel(model)
