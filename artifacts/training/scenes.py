"""Captioned pictures of one shape on a plain ground: the data that the bundled models are trained on.

Everything is drawn from signed distances on a pixel grid, so a picture is a pure function of its `Scene`.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "green": (44, 160, 70),
    "blue": (40, 80, 210),
    "yellow": (245, 214, 48),
    "orange": (247, 134, 20),
    "purple": (138, 62, 186),
    "cyan": (70, 205, 225),
    "white": (245, 245, 245),
}
BACKGROUNDS = {**PALETTE, "black": (24, 24, 28)}
SHAPES = ("circle", "square", "triangle", "ring", "star", "cross", "crescent", "hexagon")
SIZES = {"small": 0.42, "medium": 0.58, "large": 0.76}
"""Radius of the shape as a fraction of half the picture's side."""
TEXTURES = ("plain", "striped", "dotted")
TILT = 0.3
"""Largest angle, in radians, by which a shape is turned."""
TEXTURE_SHADE = 0.55
"""Brightness of the dark part of a texture relative to the shape's colour."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a caption says (all names) and what it leaves to chance (place, angle, shading)."""

    shape: str
    colour: str
    size: str
    texture: str
    background: str
    x: float = 0.0
    y: float = 0.0
    angle: float = 0.0
    shading: float = 0.0

    @property
    def caption(self) -> str:
        """The caption in its short form, for example `a small striped red ring on blue`."""
        words = ["a"]
        if self.size != "medium":
            words.append(self.size)
        if self.texture != "plain":
            words.append(self.texture)
        return " ".join([*words, self.colour, self.shape, "on", self.background])

    @property
    def long_caption(self) -> str:
        """The same caption with its ground spelled out: `… on a blue background`."""
        head, ground = self.caption.rsplit(" on ", 1)
        return f"{head} on a {ground} background"


def all_scenes() -> list[Scene]:
    """Every combination of names whose shape can be told from its ground, in a fixed order."""
    return [
        Scene(shape=shape, colour=colour, size=size, texture=texture, background=background)
        for shape, colour, size, texture, background in itertools.product(SHAPES, PALETTE, SIZES, TEXTURES, BACKGROUNDS)
        if colour != background
    ]


def place(scene: Scene, random: np.random.Generator) -> Scene:
    """The scene at a random place and slight tilt, wholly inside the picture, with a random gradient of light."""
    room = 0.6 * (0.92 - SIZES[scene.size])
    x, y = random.uniform(-room, room, size=2)
    return Scene(
        shape=scene.shape,
        colour=scene.colour,
        size=scene.size,
        texture=scene.texture,
        background=scene.background,
        x=float(x),
        y=float(y),
        angle=float(random.uniform(-TILT, TILT)),
        shading=float(random.uniform(-0.12, 0.12)),
    )


def _polygon_distance(px: np.ndarray, py: np.ndarray, sides: int) -> np.ndarray:
    """Signed distance to a regular polygon with circumradius 1."""
    sector = 2 * math.pi / sides
    angle = np.mod(np.arctan2(py, px) + sector / 2, sector) - sector / 2
    return np.hypot(px, py) * np.cos(angle) - math.cos(sector / 2)


def _star_distance(px: np.ndarray, py: np.ndarray, inner: float = 0.45) -> np.ndarray:
    """Signed distance (near the edge) to a five-pointed star with circumradius 1."""
    sector = 2 * math.pi / 5
    angle = np.abs(np.mod(np.arctan2(py, px) + sector / 2, sector) - sector / 2)
    radius = np.hypot(px, py)
    qx, qy = radius * np.cos(angle), radius * np.sin(angle)
    ex, ey = inner * math.cos(sector / 2) - 1.0, inner * math.sin(sector / 2)
    return ((qx - 1.0) * ey - qy * ex) / math.hypot(ex, ey)


def _shape_distance(shape: str, px: np.ndarray, py: np.ndarray) -> np.ndarray:
    """Signed distance to a unit shape, negative inside. px, py: float64 (height, width)."""
    radius = np.hypot(px, py)
    match shape:
        case "circle":
            return radius - 0.9
        case "ring":
            return np.abs(radius - 0.74) - 0.24
        case "square":
            return np.maximum(np.abs(px), np.abs(py)) - 0.78
        case "cross":
            arms = np.minimum(np.abs(px), np.abs(py)) - 0.28
            return np.maximum(arms, np.maximum(np.abs(px), np.abs(py)) - 0.95)
        case "triangle":
            return _polygon_distance(py, px, 3)
        case "hexagon":
            return _polygon_distance(px, py, 6)
        case "star":
            return _star_distance(-py, px)
        case "crescent":
            return np.maximum(radius - 0.95, 0.72 - np.hypot(px - 0.45, py))
    raise ValueError(f"unknown shape {shape!r}: expected one of {', '.join(SHAPES)}")


def _texture_shade(texture: str, px: np.ndarray, py: np.ndarray) -> np.ndarray:
    """Brightness of the texture in [TEXTURE_SHADE, 1]. px, py in units of the shape's radius."""
    match texture:
        case "plain":
            dark = np.zeros_like(px)
        case "striped":
            dark = 0.5 + 6.0 * (np.abs(np.mod(px / 0.62, 1.0) - 0.5) - 0.25)
        case "dotted":
            qx, qy = np.mod(px / 0.62, 1.0) - 0.5, np.mod(py / 0.62, 1.0) - 0.5
            dark = 0.5 + 6.0 * (0.28 - np.hypot(qx, qy))
        case _:
            raise ValueError(f"unknown texture {texture!r}: expected one of {', '.join(TEXTURES)}")
    return 1.0 - (1.0 - TEXTURE_SHADE) * np.clip(dark, 0.0, 1.0)


def _own_axes(scale: float, x: float, y: float, angle: float, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of every pixel in a shape's own frame, where its radius is 1. Returns float64 (side, side) twice."""
    axis = (np.arange(side) + 0.5) * 2 / side - 1
    gx, gy = np.meshgrid(axis, axis)
    cos, sin = math.cos(angle), math.sin(angle)
    return ((gx - x) * cos + (gy - y) * sin) / scale, (-(gx - x) * sin + (gy - y) * cos) / scale


def _cover(shape: str, scale: float, x: float, y: float, angle: float, side: int) -> np.ndarray:
    """Share of every pixel that a shape covers, float64 (side, side) in [0, 1]."""
    pixel = 2 / side / scale
    return np.clip(0.5 - _shape_distance(shape, *_own_axes(scale, x, y, angle, side)) / pixel, 0.0, 1.0)


def render(scene: Scene, side: int = 64) -> np.ndarray:
    """Draw a scene. Returns uint8 (side, side, 3)."""
    scale = SIZES[scene.size]
    px, py = _own_axes(scale, scene.x, scene.y, scene.angle, side)
    gy = ((np.arange(side) + 0.5) * 2 / side - 1)[:, None]
    cover = _cover(scene.shape, scale, scene.x, scene.y, scene.angle, side)[..., None]
    shape = np.asarray(PALETTE[scene.colour]) * _texture_shade(scene.texture, px, py)[..., None]
    ground = np.asarray(BACKGROUNDS[scene.background]) * (1.0 + scene.shading * gy)[..., None]
    return np.clip(cover * shape + (1 - cover) * ground, 0, 255).round().astype(np.uint8)


def _name_pixels(picture: np.ndarray) -> np.ndarray:
    """Name of the palette's colour nearest to each pixel. picture: uint8 (height, width, 3)."""
    names, references = [], []
    for name, colour in BACKGROUNDS.items():
        names.append(name)
        references.append(np.asarray(colour, dtype=np.float64))
        if name in PALETTE:
            names.append(name)
            references.append(np.asarray(colour, dtype=np.float64) * TEXTURE_SHADE)
    distance = np.linalg.norm(picture[:, :, None, :].astype(np.float64) - np.stack(references), axis=-1)
    return np.asarray(names)[distance.argmin(axis=-1)]


def read_colours(picture: np.ndarray) -> tuple[str, str]:
    """The colour of the shape and of the ground, from the pixels alone.

    picture: uint8 (height, width, 3). The ground is the commonest colour along the border, the shape the
    commonest other colour; a texture's dark shade counts as the colour that it shades.
    """
    labels = _name_pixels(picture)
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    found, counts = np.unique(border, return_counts=True)
    ground = str(found[counts.argmax()])
    found, counts = np.unique(labels[(labels != ground) & (labels != "black")], return_counts=True)
    return (str(found[counts.argmax()]) if found.size else ground), ground


def _crop(mask: np.ndarray, side: int = 24) -> np.ndarray:
    """The bounding box of a mask, bool (height, width), stretched to (side, side)."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    row = np.linspace(rows[0], rows[-1], side).round().astype(int)
    column = np.linspace(columns[0], columns[-1], side).round().astype(int)
    return mask[np.ix_(row, column)]


@functools.cache
def _draw_silhouettes() -> list[tuple[str, np.ndarray]]:
    """Every shape at a few tilts, cropped."""
    return [
        (shape, _crop(_cover(shape, 0.8, 0.0, 0.0, float(angle), 96) > 0.5))
        for shape in SHAPES
        for angle in np.linspace(-TILT, TILT, 7)
    ]


def read_shape(picture: np.ndarray) -> str:
    """The shape's name, from the pixels alone: the silhouette with the best intersection over union, "" if none.

    picture: uint8 (height, width, 3).
    """
    _, ground = read_colours(picture)
    covered = _name_pixels(picture) != ground
    if not covered.any():
        return ""
    found = _crop(covered)
    return max(_draw_silhouettes(), key=lambda one: (one[1] & found).sum() / (one[1] | found).sum())[0]
