# ruff: noqa: F401 (names for other rooms)
"""tau_theta: what turns a condition into the UNet's input, LDM Sec. 3.3."""

from minildm.conditioning.base import Conditioner, ConditionerConfig, Conditioning, look_up
from minildm.conditioning.spatial import HybridConfig, InpaintConfig, LowResConfig, SemanticConfig
from minildm.conditioning.text_encoders import (
    CaptionTokenizer,
    FrozenTextConditioner,
    FrozenTextConfig,
    TextConditioner,
    TextConfig,
)
from minildm.conditioning.tokens import ClassConfig, IdsConfig, LayoutConfig
