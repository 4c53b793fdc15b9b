"""Pictures to files: one contact sheet, or numbered files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from otcache.schemas.errors import UsageError

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
SUFFIXES = tuple(_FORMATS)


def numbered(path: Path, n: int) -> list[Path]:
    """`out.png` → `out-1.png`, `out-2.png`, …"""
    return [path.with_name(f"{path.stem}-{index}{path.suffix}") for index in range(1, n + 1)]


def check_targets(paths: Sequence[Path], *, force: bool) -> None:
    """Refuse, before any work is done, files that cannot or must not be written. Raises UsageError."""
    for path in paths:
        if path.suffix.lower() not in SUFFIXES:
            raise UsageError(f"-o is {path}: expected a name that ends in {', '.join(SUFFIXES)}")
        if not path.parent.is_dir():
            raise UsageError(f"-o is {path}: its folder {path.parent} does not exist: create it, or choose another")
        if path.is_dir():
            raise UsageError(f"-o is {path}: expected a file's name, but a folder is there: choose another")
        if path.exists() and not force:
            raise UsageError(f"-o is {path}: it exists: choose another name, or overwrite it with --force")


def contact_sheet(pictures: NDArray[np.float32], gap: int = 2) -> NDArray[np.uint8]:
    """All pictures, float32 (n, height, width, 3) in [0, 1], in rows on white: uint8 (rows·…, columns·…, 3)."""
    n, height, width, _ = pictures.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, picture in enumerate(to_uint8(pictures)):
        y, x = index // columns * (height + gap), index % columns * (width + gap)
        sheet[y : y + height, x : x + width] = picture
    return sheet


def comparison(columns: Mapping[str, NDArray[np.float32]], cell: int = 128, gap: int = 4) -> NDArray[np.uint8]:
    """A labelled column per budget, a row per picture, on white; small pictures are enlarged to `cell` pixels.

    columns: of each budget float32 (n, height, width, 3) in [0, 1], the same prompts and seeds. Returns uint8 (…, …, 3).
    """
    from PIL import Image, ImageDraw, ImageFont

    n, height, width, _ = next(iter(columns.values())).shape
    scale = max(1.0, cell / width)
    size = (round(width * scale), round(height * scale))
    head = 24
    sheet = Image.new("RGB", (len(columns) * (size[0] + gap) + gap, head + n * (size[1] + gap) + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for column, (name, drawn) in enumerate(columns.items()):
        left = gap + column * (size[0] + gap)
        draw.text((left + size[0] / 2, head / 2 + gap / 2), f"budget {name}", fill="#222222", font=font, anchor="mm")
        for row, picture in enumerate(to_uint8(drawn)):
            enlarged = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
            sheet.paste(enlarged, (left, head + gap + row * (size[1] + gap)))
    return np.asarray(sheet)


def to_uint8(pictures: NDArray[np.float32]) -> NDArray[np.uint8]:
    """[0, 1] → [0, 255], rounded as diffusers does."""
    return np.round(pictures * 255).astype(np.uint8)


def save(picture: NDArray[np.uint8], path: Path) -> None:
    """Write uint8 (height, width, 3), whole or not at all. Raises UsageError if it cannot be written."""
    from PIL import Image

    partial = path.with_name(f".{path.name}.partial")
    try:
        Image.fromarray(picture).save(partial, _FORMATS[path.suffix.lower()])
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UsageError(f"-o is {path}: it cannot be written: {error.strerror or error}: choose another") from None
