"""Draw contact_sheet.webp: the middle square of each. `python data/photos/contact_sheet.py`."""

from pathlib import Path

from PIL import Image, ImageOps

from minildm.data.photos import load_photo, photo_table

COLUMNS, SIDE, GAP = 12, 72, 4


def main() -> None:
    step, rows = SIDE + GAP, photo_table()
    sheet = Image.new("RGB", (COLUMNS * step + GAP, -(-len(rows) // COLUMNS) * step + GAP), "white")
    for i, row in enumerate(rows):
        picture = Image.fromarray(load_photo(row.name).permute(1, 2, 0).numpy())
        square = ImageOps.fit(picture, (SIDE, SIDE), Image.Resampling.LANCZOS)
        sheet.paste(square, (GAP + i % COLUMNS * step, GAP + i // COLUMNS * step))
    sheet.save(Path(__file__).with_name("contact_sheet.webp"), quality=80, method=6)


if __name__ == "__main__":
    main()
