"""Sheets of pictures and difference maps, with a known place for each, so that the page can take them out again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SMALLEST, LARGEST = 144, 256
"""Longest side of a picture on a sheet, in pixels; others are enlarged or reduced to it."""
AMPLIFICATION = 10
"""A difference map is as dark as it gets where pictures differ by a tenth of their range, or more."""
WHITE = 24
"""Of the 256 colours, how many lead from white to those of matplotlib's map, whose lightest one is a yellow."""


def _colours() -> np.ndarray:
    map_ = matplotlib.colormaps["magma_r"](np.linspace(0, 1, 256))[:, :3]
    white = np.clip(1 - np.arange(256) / WHITE, 0, 1)[:, None]
    colours: np.ndarray = np.round(255 * (white + (1 - white) * map_)).astype(np.uint8)
    return colours


COLOURS = _colours()
"""uint8 (256, 3) of a difference map, from white for none to black for most: its lightness falls all the way, so that
grey shows the same."""
FONT = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
INK, PAPER = "#222222", "#ffffff"


def difference_map(picture: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Mean absolute difference of the channels × `AMPLIFICATION`, in `COLOURS`.

    Takes two pictures, uint8 (height, width, 3), and makes a third.
    """
    difference = np.abs(picture.astype(np.float64) - reference.astype(np.float64)).mean(axis=-1) / 255
    levels: np.ndarray = COLOURS[np.minimum(np.round(255 * AMPLIFICATION * difference), 255).astype(np.uint8)]
    return levels


def cell_of(height: int, width: int) -> tuple[int, int]:
    """Width and height, in pixels, that a picture of a size in pixels has on a sheet.

    >>> cell_of(1024, 512), cell_of(32, 32), cell_of(200, 160)
    ((128, 256), (144, 144), (160, 200))
    """
    longest = max(height, width)
    scale = max(SMALLEST, min(LARGEST, longest)) / longest
    return max(1, round(width * scale)), max(1, round(height * scale))


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Where the pictures of a sheet stand: columns in groups, a label above each, and perhaps one beside each row."""

    cell: tuple[int, int]
    groups: tuple[int, ...]
    """Columns of each group."""
    rows: int
    margin: int = 0
    """Room for the labels of rows."""
    gap: int = 6
    head: int = 56
    foot: int = 34
    """Room for the scale of difference maps."""

    @property
    def size(self) -> tuple[int, int]:
        width, height = self.cell
        columns = sum(self.groups)
        return (
            self.margin + self.gap + columns * (width + self.gap) + 4 * self.gap * (len(self.groups) - 1),
            self.head + self.gap + self.rows * (height + self.gap) + self.foot,
        )

    def box(self, row: int, column: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of a picture in pixels.

        >>> Sheet(cell=(100, 50), groups=(2, 1), rows=1).box(0, 2)
        (242, 62, 342, 112)
        """
        group = int(np.searchsorted(np.cumsum(self.groups), column, side="right"))
        left = self.margin + self.gap + column * (self.cell[0] + self.gap) + 4 * self.gap * group
        top = self.head + self.gap + row * (self.cell[1] + self.gap)
        return left, top, left + self.cell[0], top + self.cell[1]

    def cut(self, image: Image.Image, row: int, column: int) -> Image.Image:
        """One picture of the sheet."""
        return image.crop(self.box(row, column))

    def draw(
        self,
        columns: Sequence[Sequence[np.ndarray]],
        labels: Sequence[str],
        groups: Sequence[str],
        rows: Sequence[str] = (),
    ) -> Image.Image:
        """Draw the sheet.

        Args:
            columns: pictures of each column, uint8 (height, width, 3), one a row.
            labels: of the columns.
            groups: titles of the groups of columns.
            rows: labels of the rows, if they have any.
        """
        image = Image.new("RGB", self.size, PAPER)
        pen = ImageDraw.Draw(image)
        font = ImageFont.truetype(FONT, 13)
        first = 0
        for title, count in zip(groups, self.groups, strict=True):
            middle = (self.box(0, first)[0] + self.box(0, first + count - 1)[2]) / 2
            pen.text((middle, 16), title, fill=INK, font=font, anchor="mm")
            first += count
        self._scale(image, pen, font)
        for column, (label, pictures) in enumerate(zip(labels, columns, strict=True)):
            left, _, right, _ = self.box(0, column)
            pen.text(((left + right) / 2, 42), label, fill=INK, font=font, anchor="mm")
            for row, picture in enumerate(pictures):
                image.paste(self._fit(picture), self.box(row, column)[:2])
        for row, label in enumerate(rows):
            _, top, _, bottom = self.box(row, 0)
            pen.text((self.margin, (top + bottom) / 2), label, fill=INK, font=font, anchor="rm", align="right")
        return image

    def _scale(self, image: Image.Image, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont) -> None:
        """The colour bar at the foot, ending where the last column does."""
        right = self.box(0, sum(self.groups) - 1)[2]
        height = self.size[1] - self.foot / 2 - 2
        most = f"{100 / AMPLIFICATION:g} %"
        pen.text((right, height), most, fill=INK, font=font, anchor="rm")
        left = right - int(pen.textlength(most, font=font)) - 6 - 96
        image.paste(colour_bar(96, 12), (left, int(height) - 6))
        pen.text((left - 6, height), "difference: 0", fill=INK, font=font, anchor="rm")

    def _fit(self, picture: np.ndarray) -> Image.Image:
        larger = picture.shape[1] < self.cell[0]
        return Image.fromarray(picture).resize(
            self.cell, Image.Resampling.BICUBIC if larger else Image.Resampling.LANCZOS
        )


def colour_bar(width: int = 256, height: int = 14) -> Image.Image:
    """The scale of difference maps, none on the left."""
    return Image.fromarray(np.broadcast_to(COLOURS[np.linspace(0, 255, width).astype(int)], (height, width, 3)).copy())
