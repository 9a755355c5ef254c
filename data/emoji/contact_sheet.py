"""Draw contact_sheet.webp: twenty emoji in every style. `python data/emoji/contact_sheet.py`."""

from pathlib import Path

from PIL import Image

from minildm.data.emoji import STYLES, load_rgba

EMOJI = (
    *("1F34E", "1F353", "1F355", "1F369", "1F436", "1F98A", "1F419", "1F98B", "1F33B", "1F335"),
    *("1F3E0", "1F3F0", "1F680", "26F5", "1F6B2", "1F308", "2602", "26BD", "1F3B8", "1F47B"),
)
SIDE, GAP = 64, 4


def main() -> None:
    step = SIDE + GAP
    sheet = Image.new("RGB", (len(EMOJI) * step + GAP, len(STYLES) * step + GAP), "white")
    for row, style in enumerate(STYLES):
        for column, hexcode in enumerate(EMOJI):
            picture = load_rgba(hexcode, style).convert("RGBa")
            small = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS).convert("RGBA")
            sheet.paste(small, (GAP + column * step, GAP + row * step), small)
    sheet.save(Path(__file__).with_name("contact_sheet.webp"), quality=85, method=6)


if __name__ == "__main__":
    main()
