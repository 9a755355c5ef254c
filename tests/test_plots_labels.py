"""Maps of labels as pictures: one colour a label, told apart, the grounds pale."""

import pytest
import torch

from minildm import plots
from minildm.data.scenes import BACKGROUNDS, ScenesDataset


def test_a_label_has_one_colour_and_no_other_label_has_it() -> None:
    count = len(ScenesDataset.semantic_classes)
    maps = torch.arange(2 * count).view(2, 1, count) % count
    x = plots.label_pictures(maps, muted=len(BACKGROUNDS))
    assert x.shape == (2, 3, 1, count) and x.dtype == torch.uint8
    assert torch.equal(x[0], x[1])
    assert len(x[0, :, 0].T.unique(dim=0)) == count
    fewer = plots.label_pictures(maps[:, :, :10], muted=len(BACKGROUNDS))
    assert torch.equal(fewer, x[..., :10])  # whatever else the maps hold


def test_muted_labels_are_pale() -> None:
    x = plots.label_pictures(torch.arange(60).view(1, 1, 60), muted=8)[0, :, 0].int()
    spread = x.amax(0) - x.amin(0)
    assert spread[:8].max() < 60 < spread[8:].min() and x[:, :8].min() > 180


@pytest.mark.parametrize(
    "maps", [torch.zeros(4, 4), torch.zeros(1, 4, 4), -torch.ones(1, 2, 2).long()]
)
def test_what_is_no_map_is_refused(maps: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="maps must be"):
        plots.label_pictures(maps)
