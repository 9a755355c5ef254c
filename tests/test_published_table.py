"""The table of published models is what its command makes, and says what the paper says."""

import csv
from pathlib import Path

import pytest
from scripts import RESULTS, command_of
from torch import nn

from minildm import PUBLISHED


def test_the_table_is_what_the_command_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = command_of("published")
    monkeypatch.setattr("sys.argv", ["published.py", "--out", str(tmp_path)])
    command.main()
    assert (tmp_path / command.TABLE).read_text() == (RESULTS / command.TABLE).read_text()


def test_it_has_the_papers_sizes() -> None:
    """Millions of parameters in Tables 12, 13 and 15, where they are of the same models."""
    lines = (RESULTS / "published.csv").read_text().splitlines()
    rows = {row["model"]: row for row in csv.DictReader(lines)}
    assert rows.keys() == PUBLISHED.keys()
    parts = ("first_stage_m", "unet_m", "conditioner_m")
    whole = {name: sum(float(row[part]) for part in parts) for name, row in rows.items()}
    assert round(whole["bsr_sr"]) == 169
    assert round(float(rows["celeba256"]["unet_m"])) == 274
    assert round(float(rows["cin256"]["unet_m"])) == 395
    assert round(float(rows["semantic_synthesis256"]["unet_m"])) == 215


def test_products_are_counted_right() -> None:
    """Against the closed form of one convolution: out x in x 3 x 3 a place."""
    command = command_of("published")
    config = PUBLISHED["celeba256"]

    class Plain(nn.Conv2d):
        def forward(self, z: object, t: object, c: object) -> object:
            return super().forward(z)

    conv = Plain(3, 5, 3, padding=1, device="meta")
    assert command.products(conv, config, 8) == 5 * 3 * 9 * 8 * 8
