"""The demo at its smallest scale: everything that the page shows is there."""

import json
import re
from pathlib import Path

from PIL import Image

from minildm.demo import demo


def test_the_demo_leaves_its_page_and_numbers(tmp_path: Path) -> None:
    results = demo(tmp_path, scale="smoke", device="cpu", seed=1)
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert results["psnr_samples_shipped"] > results["psnr_bicubic"] > 15
    assert results["accuracy_samples_shipped"] > 0.5 > results["noise_samples_shipped"]
    page = (tmp_path / "index.html").read_text()
    images = re.findall(r'img src="([^"]+)" alt="[^"]{20,}"', page)
    assert len(images) == 4
    for name in images:
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 100
    assert all(text in page for text in results["intervals"].values())
