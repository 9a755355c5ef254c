# ruff: noqa: F401 (names for other rooms)
"""tau_theta: what turns a condition into the UNet's input, LDM Sec. 3.3."""

from minildm.conditioning.base import (
    Conditioner,
    ConditionerConfig,
    Conditioning,
    Encode,
    look_up,
)
from minildm.conditioning.spatial import (
    HybridConditioner,
    HybridConfig,
    InpaintConditioner,
    InpaintConfig,
    LowResConditioner,
    LowResConfig,
    SemanticConditioner,
    SemanticConfig,
    masked,
)
from minildm.conditioning.text_encoders import FrozenTextConditioner, FrozenTextConfig
from minildm.conditioning.tokenizer import CaptionTokenizer
from minildm.conditioning.tokens import (
    CaptionConditioner,
    ClassConditioner,
    ClassConfig,
    IdsConditioner,
    IdsConfig,
    LayoutConditioner,
    LayoutConfig,
    TextConditioner,
    TextConfig,
)
