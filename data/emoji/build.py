"""Build emoji.npz from openly licensed npm packages: `python data/emoji/build.py`.

Needs `npm` and the versions of resvg-py and Pillow below (`pip install "minildm[data]"` has the
first). Every package is pinned and its sha256 checked; the same tools give the same bytes.
"""

import argparse
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
from captions import caption
from PIL import Image

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

NO_GROUP = {"component", "flags"}
NO_SYMBOLS = {"fluent3d"}  # 0.7 MB of buttons and arrows, which the flat styles draw as well
MIRRORED = ": facing right"  # the same drawing, mirrored; a flipped caption would be wrong
NOT_FOR_CLASS = {  # by emojibase's name
    *("middle finger", "water pistol", "kitchen knife", "dagger", "crossed swords", "bomb"),
    *("cigarette", "no smoking", "syringe", "pill", "drop of blood"),
    *("coffin", "headstone", "funeral urn", "love hotel", "no one under eighteen"),
    *("sake", "bottle with popping cork", "wine glass", "cocktail glass", "tropical drink"),
    *("beer mug", "clinking beer mugs", "clinking glasses", "tumbler glass"),
}

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

GENDER = {"2640", "2642"}
HAIR = {"1F9B0", "1F9B1", "1F9B2", "1F9B3"}
NEUTRAL = {  # code points that differ by gender, beard or blond hair alone -> one of them
    **dict.fromkeys(["1F468", "1F469", "1F9D4", "1F471"], "1F9D1"),  # man, woman ... -> person
    **dict.fromkeys(["1F466", "1F467"], "1F9D2"),  # boy, girl -> child
    **dict.fromkeys(["1F474", "1F475"], "1F9D3"),  # old man, old woman -> older person
    **dict.fromkeys(["1F934", "1F478"], "1FAC5"),  # prince, princess -> person with crown
    **dict.fromkeys(["1FAC3", "1F930"], "1FAC4"),  # pregnant man, woman -> person
    **dict.fromkeys(["1F936"], "1F385"),  # Mrs. Claus -> Santa Claus
    **dict.fromkeys(["1F483"], "1F57A"),  # woman dancing -> man dancing
    **dict.fromkeys(["1F46B", "1F46C"], "1F46D"),  # two people holding hands
}
SAME = {  # sequences that draw what one code point draws
    "1F9D1-1F384": "1F385",  # Mx Claus
    "1F9D1-1FA70": "1F57A",  # ballet dancer
    "1F9D1-1F91D-1F9D1": "1F46D",  # people holding hands
    "1F9D1-2764-1F9D1": "1F491",  # couple with heart
    "1F9D1-2764-1F48B-1F9D1": "1F48F",  # kiss
    "1F9D1-1F37C": "1F931",  # person feeding baby -> breast-feeding
}
JOINERS = {"200D", "FE0F", "27A1"}  # 27A1: the drawing faces right


def family(hexcode: str) -> str:
    """The code point without gender, skin tone, hair and direction: the key of the split."""
    parts = [NEUTRAL.get(part, part) for part in hexcode.split("-")]
    arrow_alone = parts[0] == "27A1"
    drop = GENDER | HAIR | JOINERS
    kept = [p for p in parts if p not in drop and not re.fullmatch("1F3F[B-F]", p)]
    if not kept or arrow_alone:  # a sign that stands for itself
        return parts[0]
    if len(kept) > 1 and set(kept) <= {"1F9D1", "1F9D2"}:
        return "1F46A"  # every family
    key = "-".join(kept)
    return SAME.get(key, key)


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
    """The emoji that are kept, in emojibase's order."""
    names = json.loads(package["meta/groups.json"])
    emoji = []
    rows = json.loads(package["en/data.json"])
    for row in sorted((r for r in rows if "group" in r), key=lambda r: r["order"]):
        group = names["groups"][str(row["group"])]
        if group in NO_GROUP or row["label"] in NOT_FOR_CLASS or MIRRORED in row["label"]:
            continue
        emoji.append(
            {
                "hexcode": row["hexcode"],
                "name": row["label"],
                "group": group,
                "subgroup": names["subgroups"][str(row["subgroup"])],
                "tags": row.get("tags", []),
                "caption": caption(row["label"], group),
                "family": family(row["hexcode"]),
            }
        )
    return emoji


def groups_of(emoji: list[dict[str, Any]]) -> dict[str, list[str]]:
    """{group: its subgroups}, in order."""
    groups: dict[str, list[str]] = {}
    for row in emoji:
        subgroups = groups.setdefault(row["group"], [])
        if row["subgroup"] not in subgroups:
            subgroups.append(row["subgroup"])
    return groups


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


Draw = Callable[[dict[str, Any]], Image.Image | None]  # an emoji -> its picture, if there is one


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


def pictures_3d(package: Package) -> Draw:
    """The set of 256-pixel WebP files, named by code point."""
    names = {plain_hex(Path(name).stem): name for name in package if name.endswith(".webp")}

    def draw(emoji: dict[str, Any]) -> Image.Image | None:
        name = names.get(plain_hex(emoji["hexcode"]))
        if name is None:
            return None
        picture = Image.open(io.BytesIO(package[name]))
        small = picture.convert("RGBa").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        return small.convert("RGBA")  # resized with the colours weighted by alpha

    return draw


def on_white(picture: Image.Image) -> bytes:
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB").tobytes()


@dataclass
class Pictures:
    """What the file will hold, and what was left out."""

    chunks: list[bytes]
    emoji: list[int]
    style: list[int]
    duplicates: Counter[str]
    bytes_of: Counter[str]


def draw_all(emoji: list[dict[str, Any]], folder: Path) -> Pictures:
    """Every picture as WebP, style after style, without a style's exact duplicates."""
    out = Pictures([], [], [], Counter(), Counter())
    for index, (style, package) in enumerate(STYLES.items()):
        draw = (pictures_3d if style == "fluent3d" else iconify)(fetch(package, folder))
        seen: set[bytes] = set()
        for number, row in enumerate(emoji):
            unwanted = style in NO_SYMBOLS and row["group"] == "symbols"
            picture = None if unwanted else draw(row)
            if picture is None:
                continue
            pixels = on_white(picture)
            if pixels in seen:
                out.duplicates[style] += 1
                continue
            seen.add(pixels)
            buffer = io.BytesIO()
            picture.save(buffer, "WEBP", **WEBP.get(style, LOSSLESS))
            out.chunks.append(buffer.getvalue())
            out.emoji.append(number)
            out.style.append(index)
            out.bytes_of[style] += len(buffer.getvalue())
        print(f"{style}: {len(seen)} pictures, {out.bytes_of[style]:,} bytes", file=sys.stderr)
    return out


def save(path: Path, pictures: Pictures, meta: dict[str, Any]) -> None:
    """One npz of plain arrays, stored without a second compression and without dates."""
    text = json.dumps(meta, ensure_ascii=False, separators=(",", ":")).encode()
    lengths = [len(chunk) for chunk in pictures.chunks]
    np.savez(
        path,
        blob=np.frombuffer(b"".join(pictures.chunks), np.uint8),
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        emoji=np.array(pictures.emoji, np.int16),
        style=np.array(pictures.style, np.uint8),
        meta=np.frombuffer(text, np.uint8),
    )


def report(emoji: list[dict[str, Any]], pictures: Pictures, path: Path) -> None:
    """The table of the card: pictures of each group in each style."""
    styles = list(STYLES)
    pairs = zip(pictures.emoji, pictures.style, strict=True)
    count = Counter((emoji[e]["group"], styles[s]) for e, s in pairs)
    print("| group | emoji | " + " | ".join(styles) + " | all |")
    print("|" + "---|" * (len(styles) + 3))
    for group in dict.fromkeys(row["group"] for row in emoji):
        cells = [count[group, style] for style in styles]
        number = sum(row["group"] == group for row in emoji)
        print(f"| {group} | {number} | " + " | ".join(map(str, cells)) + f" | {sum(cells)} |")
    totals = [sum(n for (_, s), n in count.items() if s == style) for style in styles]
    print(f"| all | {len(emoji)} | " + " | ".join(map(str, totals)) + f" | {sum(totals)} |")
    print("bytes:", dict(pictures.bytes_of), "duplicates:", dict(pictures.duplicates))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    print(f"{path.name}: {path.stat().st_size:,} bytes, sha256 {digest}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "emoji.npz")
    parser.add_argument("--cache", type=Path, default=HERE / ".cache", help="for the packages")
    arguments = parser.parse_args()
    for tool, wanted in TOOLS.items():
        if version(tool) != wanted:
            raise SystemExit(f"{tool} {version(tool)} is installed, the pinned one is {wanted}")
    emoji = base_list(fetch(BASE, arguments.cache))
    pictures = draw_all(emoji, arguments.cache)
    drawn = sorted(set(pictures.emoji))  # a few are another's exact duplicate in every style
    emoji = [emoji[i] for i in drawn]
    pictures.emoji = [drawn.index(i) for i in pictures.emoji]
    meta = {"styles": list(STYLES), "groups": groups_of(emoji), "emoji": emoji}
    save(arguments.out, pictures, meta)
    report(emoji, pictures, arguments.out)


if __name__ == "__main__":
    main()
