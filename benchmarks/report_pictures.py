"""A report as people see it, at the widths of a screen and of a phone, light and dark, as small
PNGs in `docs/images`.

  python benchmarks/report_pictures.py path/to/report     the folder that holds report.html

They are what a headless Chromium shows first of the page, with 256 colours.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "images"
SIZES = {1280: 1560, 390: 1560}  # pixels: width and height of the window
SHADES = {"light": [], "dark": ["--blink-settings=preferredColorScheme=0"]}
COLOURS = 256


def photograph(page: Path, width: int, shade: str) -> bytes:
    """What a browser shows of a page, as a PNG."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        raise SystemExit("error: there is no chromium\n  fix: install it")
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "page.png"
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             *SHADES[shade], f"--user-data-dir={place}/profile", f"--screenshot={file}",
             f"--window-size={width},{SIZES[width]}", page.resolve().as_uri()],
            check=True, capture_output=True,
        )  # fmt: skip
        return reduced(file.read_bytes())


def reduced(png: bytes) -> bytes:
    """A PNG in `COLOURS` colours: the commonest, of areas and lines, are exact; the others, of the
    edges of letters, are near."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    counted = sorted(picture.getcolors(picture.width * picture.height), reverse=True)
    colors = [color for _, color in counted]
    common = [part for color in colors[: COLOURS // 4] for part in color]
    each = Image.new("RGB", (len(colors), 1))
    each.putdata(colors)  # each counts once, so that a small area keeps its hue
    near = each.quantize(COLOURS - COLOURS // 4, Image.Quantize.MEDIANCUT).getpalette()
    palette = Image.new("P", (1, 1))
    palette.putpalette(common + near)
    small = io.BytesIO()
    picture.quantize(palette=palette, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("report", type=Path, help="folder that holds report.html")
    page = parser.parse_args().report / "report.html"
    if not page.is_file():
        parser.error(f"{page} does not exist")
    for width in SIZES:
        for shade in SHADES:
            file = OUT / f"report-{width}-{shade}.png"
            file.write_bytes(photograph(page, width, shade))
            print(f"{file.relative_to(ROOT)}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
