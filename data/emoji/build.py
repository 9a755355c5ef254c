"""Build emoji.npz from openly licensed npm packages: `python data/emoji/build.py`.

Requires `npm` and the versions of resvg-py and Pillow below (`pip install "minildm[data]"` has the
first). Every package is pinned and its sha256 checked; the same tools give the same bytes.
captions.csv lists the emoji that are kept: their captions, families and split (see the card).
"""

import argparse
import csv
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from minildm.data.dataset import square
from minildm.data.emoji import read_emoji
from minildm.files import data_dir

HERE = Path(__file__).resolve().parent
SIDE = 128  # pixels
TOOLS = {"resvg-py": "0.5.0", "pillow": "13.0.0"}

# name@version of each package, and the sha256 of the file that `npm pack` fetches
BASE = ("emojibase-data@17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
STYLES = {
    "noto": (
        "@iconify-json/noto@1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    "twemoji": (
        "@iconify-json/twemoji@1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    ),
    "fluent": (
        "@iconify-json/fluent-emoji-flat@1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "fluent3d": (
        "@lobehub/fluent-emoji-3d@1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ),
    "blob": (
        "@iconify-json/noto-v1@1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
    ),
}
WEBP = {"fluent3d": {"quality": 86, "alpha_quality": 100, "method": 5}}  # shaded: lossy, 38 dB
LOSSLESS = {"lossless": True, "quality": 100, "method": 4}  # flat: smaller and better lossless

NO_SYMBOLS = {"fluent3d"}  # 0.7 MB of buttons and arrows, which the flat styles draw as well

OLD_NAMES = {  # the blob set has names only; most are emojibase's, these were changed since
    "smiling face with open hands": "hugging-face",
    "enraged face": "pouting-face",
    "bullseye": "direct-hit",
}
NO_NAME = {  # there is a drawing of that name, and it shows another thing (seen by eye)
    "cricket",  # the game
    "eye in speech bubble",  # no bubble
    *("keycap: #", "keycap: *"),  # an empty key
}

SHOWN = (  # on the contact sheet
    *("1F34E", "1F353", "1F355", "1F369", "1F436", "1F98A", "1F419", "1F98B", "1F33B", "1F335"),
    *("1F3E0", "1F3F0", "1F680", "26F5", "1F6B2", "1F308", "2602", "26BD", "1F3B8", "1F47B"),
)

Package = dict[str, bytes]  # a package's files, by their path


def fetch(package: tuple[str, str], folder: Path) -> Package:
    """The package's files; its tarball is fetched once, by `npm pack`, and checked."""
    spec, sha256 = package
    name = re.sub("[@/]", "-", spec.removeprefix("@"))
    path = folder / f"{name}.tgz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", spec, "--silent", "--pack-destination", str(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(f"{path}: sha256 {found}, expected {sha256}; delete it and try again")
    files: Package = {}
    with tarfile.open(path) as tarball:
        for member in tarball:
            if file := tarball.extractfile(member):
                files[member.name.removeprefix("package/")] = file.read()
    return files


def base_list(package: Package) -> list[dict[str, Any]]:
    """The emoji of captions.csv, in emojibase's order."""
    with (HERE / "captions.csv").open(newline="", encoding="utf-8") as file:
        kept = {row["hexcode"]: row for row in csv.DictReader(file)}
    names = json.loads(package["meta/groups.json"])
    rows = [row for row in json.loads(package["en/data.json"]) if row["hexcode"] in kept]
    return [
        {
            "hexcode": row["hexcode"],
            "name": row["label"],
            "group": names["groups"][str(row["group"])],
            "subgroup": names["subgroups"][str(row["subgroup"])],
            "tags": row.get("tags", []),
            "caption": kept[row["hexcode"]]["caption"],
            "family": kept[row["hexcode"]]["family"],
            "split": kept[row["hexcode"]]["split"],
        }
        for row in sorted(rows, key=lambda row: row["order"])
    ]


def groups_of(emoji: list[dict[str, Any]]) -> dict[str, list[str]]:
    """{group: its subgroups}, in order."""
    pairs = dict.fromkeys((row["group"], row["subgroup"]) for row in emoji)
    return {group: [s for g, s in pairs if g == group] for group, _ in pairs}


def svg(icons: dict[str, Any], name: str) -> str:
    """One icon of an iconify set as an SVG on a square canvas."""
    flips, icon = False, icons["icons"].get(name)
    while icon is None:  # an alias, perhaps mirrored
        alias = icons["aliases"][name]
        flips, name = flips ^ alias.get("hFlip", False), alias["parent"]
        icon = icons["icons"].get(name)
    width = icon.get("width", icons["width"])
    height = icon.get("height", icons["height"])
    side = max(width, height)
    x, y = icon.get("left", 0) - (side - width) / 2, icon.get("top", 0) - (side - height) / 2
    body = icon["body"]
    if flips:
        body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SIDE}" height="{SIDE}" viewBox="{x:g} {y:g} {side:g} {side:g}">{body}</svg>'
    )


def render(code: str) -> Image.Image:
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=code, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def slug(name: str) -> str:
    """'woman’s hat' -> 'womans-hat'."""
    plain = re.sub("[’'.]", "", name.lower().replace("ñ", "n"))
    return re.sub("[^a-z0-9]+", "-", plain).strip("-")


def plain_hex(hexcode: str) -> str:
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


Draw = Callable[[dict[str, Any]], Image.Image | None]  # an emoji -> its image, if there is one


def iconify(package: Package) -> Draw:
    """A set of SVGs, by its table from code points to names, else by name (all of the blobs)."""
    icons = json.loads(package["icons.json"])
    there = set(icons["icons"]) | set(icons["aliases"])
    names = {plain_hex(k): v for k, v in json.loads(package["chars.json"]).items()}

    def draw(emoji: dict[str, Any]) -> Image.Image | None:
        name = names.get(plain_hex(emoji["hexcode"]))
        if name is None and emoji["name"] not in NO_NAME:
            name = OLD_NAMES.get(emoji["name"], slug(emoji["name"]))
        return render(svg(icons, name)) if name in there else None

    return draw


def images_3d(package: Package) -> Draw:
    """The set of 256-pixel WebP files, named by code point."""
    names = {plain_hex(Path(name).stem): name for name in package if name.endswith(".webp")}

    def draw(emoji: dict[str, Any]) -> Image.Image | None:
        name = names.get(plain_hex(emoji["hexcode"]))
        if name is None:
            return None
        image = Image.open(io.BytesIO(package[name]))
        small = image.convert("RGBa").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        return small.convert("RGBA")  # resized with the colours weighted by alpha

    return draw


@dataclass
class Drawings:
    """What the file will hold, and what was left out."""

    chunks: list[bytes]
    emoji: list[int]
    style: list[int]
    duplicates: Counter[str]
    bytes_of: Counter[str]


def draw_all(emoji: list[dict[str, Any]], folder: Path) -> Drawings:
    """Every image as WebP, style after style, without a style's exact duplicates."""
    out = Drawings([], [], [], Counter(), Counter())
    for index, (style, package) in enumerate(STYLES.items()):
        draw = (images_3d if style == "fluent3d" else iconify)(fetch(package, folder))
        seen: set[bytes] = set()
        for number, row in enumerate(emoji):
            unwanted = style in NO_SYMBOLS and row["group"] == "symbols"
            image = None if unwanted else draw(row)
            if image is None:
                continue
            pixels = square(image, SIDE).tobytes()
            if pixels in seen:
                out.duplicates[style] += 1
                continue
            seen.add(pixels)
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", **WEBP.get(style, LOSSLESS))
            out.chunks.append(buffer.getvalue())
            out.emoji.append(number)
            out.style.append(index)
            out.bytes_of[style] += len(buffer.getvalue())
        print(f"{style}: {len(seen)} drawings, {out.bytes_of[style]:,} bytes", file=sys.stderr)
    return out


def save(path: Path, drawings: Drawings, meta: dict[str, Any]) -> None:
    """One npz of plain arrays, stored without a second compression and without dates."""
    text = json.dumps(meta, ensure_ascii=False, separators=(",", ":")).encode()
    lengths = [len(chunk) for chunk in drawings.chunks]
    np.savez(
        path,
        blob=np.frombuffer(b"".join(drawings.chunks), np.uint8),
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        emoji=np.array(drawings.emoji, np.int16),
        style=np.array(drawings.style, np.uint8),
        meta=np.frombuffer(text, np.uint8),
    )


def report(emoji: list[dict[str, Any]], drawings: Drawings, path: Path) -> None:
    """The table of the card: drawings of each group in each style, emoji of each group."""
    groups = pd.Series([emoji[i]["group"] for i in drawings.emoji], name="group")
    styles = pd.Series([list(STYLES)[i] for i in drawings.style], name="style")
    print(pd.crosstab(groups, styles, margins=True).to_string())
    print(pd.Series([row["group"] for row in emoji], name="emoji").value_counts())
    print("bytes:", dict(drawings.bytes_of), "duplicates:", dict(drawings.duplicates))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    print(f"{path.name}: {path.stat().st_size:,} bytes, sha256 {digest}")


def contact_sheet(path: Path, side: int = 64, gap: int = 4) -> None:
    """Twenty emoji in every style of the installed file."""
    step = side + gap
    sheet = Image.new("RGB", (len(SHOWN) * step + gap, len(STYLES) * step + gap), "white")
    for row, style in enumerate(STYLES):
        for column, hexcode in enumerate(SHOWN):
            image = read_emoji(data_dir())[hexcode, style].rgba().convert("RGBa")
            small = image.resize((side, side), Image.Resampling.LANCZOS).convert("RGBA")
            sheet.paste(small, (gap + column * step, gap + row * step), small)
    sheet.save(path, quality=85, method=6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "emoji.npz")
    parser.add_argument("--cache", type=Path, default=HERE / ".cache", help="for the packages")
    parser.add_argument("--contact-sheet", action="store_true", help="only draw this")
    arguments = parser.parse_args()
    if arguments.contact_sheet:
        raise SystemExit(contact_sheet(HERE / "contact_sheet.webp"))
    for tool, wanted in TOOLS.items():
        if version(tool) != wanted:
            raise SystemExit(f"{tool} {version(tool)} is installed, the pinned one is {wanted}")
    emoji = base_list(fetch(BASE, arguments.cache))
    drawings = draw_all(emoji, arguments.cache)
    meta = {"styles": list(STYLES), "groups": groups_of(emoji), "emoji": emoji}
    save(arguments.out, drawings, meta)
    report(emoji, drawings, arguments.out)


if __name__ == "__main__":
    main()
