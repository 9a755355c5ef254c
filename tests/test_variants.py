"""Mirrored boxes and named styles: what training makes of an item."""

import torch

from minildm import EmojiDataset, ScenesDataset
from minildm.data.variants import mirrored_boxes, style_caption, with_styles


def test_mirrored_boxes_are_where_the_mirrored_picture_has_its_objects() -> None:
    """A scene's semantic map says where an object's pixels are; its box must hold them."""
    data, found = ScenesDataset("train", 64, n=12), 0
    for i in range(12):
        item = data[i]
        batch = {"boxes": item["boxes"][None], "classes": item["classes"][None]}
        boxes = mirrored_boxes(batch, torch.tensor([True]))["boxes"][0]
        mirror = item["semantic"].flip(-1)
        for box, kind in zip(boxes, item["classes"].tolist(), strict=True):
            if kind < 0 or (item["classes"] == kind).sum() > 1:
                continue
            rows, columns = torch.nonzero(mirror == 8 + kind, as_tuple=True)
            left, top, right, bottom = (64 * box).tolist()
            assert left - 1 <= columns.min() and columns.max() <= right + 1
            assert top - 1 <= rows.min() and rows.max() <= bottom + 1
            found += 1
    assert found > 10


def test_only_the_mirrored_and_only_real_boxes_move() -> None:
    boxes = torch.tensor([[[0.1, 0.2, 0.4, 0.9], [0.0, 0.0, 0.0, 0.0]]]).repeat(2, 1, 1)
    batch = {"boxes": boxes, "classes": torch.tensor([[3, -1]] * 2), "label": torch.arange(2)}
    out = mirrored_boxes(batch, torch.tensor([False, True]))
    assert torch.equal(out["boxes"][0], boxes[0])
    assert torch.allclose(out["boxes"][1, 0], torch.tensor([0.6, 0.2, 0.9, 0.9]))
    assert not out["boxes"][1, 1].any()
    assert torch.allclose(mirrored_boxes(out, torch.tensor([False, True]))["boxes"], boxes)
    assert torch.equal(batch["boxes"], boxes)  # the caller's are left alone
    assert mirrored_boxes({"label": 1}, torch.tensor([True])) == {"label": 1}


def test_styles_are_named_in_their_share_of_the_captions() -> None:
    n, share = 4000, 0.3
    batch = {"caption": ["a dog"] * n, "style": torch.arange(n) % 2}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        captions = with_styles(batch, ("flat", "round"), share)["caption"]
    assert set(captions) == {"a dog", "a dog, flat style", "a dog, round style"}
    assert set(captions[::2]) == {"a dog", "a dog, flat style"}  # each its own style
    named = sum(caption != "a dog" for caption in captions) / n
    assert abs(named - share) < 4 * (share * (1 - share) / n) ** 0.5
    assert with_styles(batch, ("flat", "round"), 0.0) is batch
    assert style_caption("a dog", "flat") == "a dog, flat style"


def test_unpaired_styles_are_left_out_of_training_and_found_in_their_own_split() -> None:
    whole = EmojiDataset("train", 32)
    train, apart = (EmojiDataset(split, 32, unpaired=8) for split in ("train", "unpaired"))
    assert len(train) + len(apart) == len(whole)

    def pairs(data: EmojiDataset) -> set[tuple[str, int]]:
        return set(zip(data.hexcodes, data.style_ids.tolist(), strict=True))

    assert not pairs(train) & pairs(apart)
    assert pairs(train) | pairs(apart) == pairs(whole)
    assert len(set(apart.hexcodes)) == len(apart)  # one style of each
    assert len(apart) > 100
    assert set(apart.style_ids.tolist()) == set(range(5))
    assert train.fingerprint != whole.fingerprint
    # Most are still known in other styles: composition, not guessing.
    assert len(set(apart.hexcodes) & set(train.hexcodes)) > 0.9 * len(apart)
