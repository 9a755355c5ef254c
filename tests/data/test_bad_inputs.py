"""Each wrong argument ends in one sentence that names it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from minildm.data.dataset import ImageDataset
from minildm.data.emoji import EmojiDataset
from minildm.data.folder import ImageFolder, wrap_dataset

X = torch.linspace(-1, 1, 16).view(1, 4, 4)
BYTES = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ImageDataset(BYTES.float(), name="a"), "images must be .* uint8, got"),
        (lambda: ImageDataset(BYTES[:0], name="a"), "one length, at least 1"),
        (lambda: ImageDataset(BYTES, name="a", columns={"code": ["b"]}), "one length.*'code': 1"),
        (lambda: EmojiDataset(size=48), "size='48'.*32, 64, 128"),
        (lambda: EmojiDataset(styles=["notto"]), "styles='notto'.*'noto'.*fluent3d"),
        (lambda: EmojiDataset(subgroups=["food-fruits"]), "subgroups='food-fruits'.*'food-fruit'"),
        (lambda: EmojiDataset("unpaired"), "one length, at least 1"),
        (lambda: ImageFolder("nowhere", 8), r"no image .*\.png.* in .*nowhere"),
        (lambda: wrap_dataset([(X.abs(), 0), (X, 0)], 8), "item 1 of list must.* from -1 to 1"),
        (lambda: wrap_dataset([{"img": X}], 8), "must be .image, integer label.*dict.*'img'"),
        (lambda: wrap_dataset([(X.abs(), "cat")], 8), "integer label.*'str' object cannot be"),
        (lambda: wrap_dataset([(Image.new("F", (4, 4)), 0)], 8), "item 0 .*grey of 32 bits"),
        (lambda: wrap_dataset([(X.abs(), 3)], 8, classes="ab"), "2 names, the labels end at 3"),
    ],
)
def test_a_wrong_argument_is_named(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
