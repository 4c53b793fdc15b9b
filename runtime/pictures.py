"""Pictures and videos to files: one contact sheet, numbered files, or frames that move (GIF, MP4)."""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from otcache.schemas.errors import HostError, UsageError
from otcache.schemas.places import check_new_file, unwritable
from otcache.schemas.whole_files import whole_file

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
SUFFIXES = tuple(_FORMATS)
VIDEO_SUFFIXES = (".gif", ".mp4")


def numbered(path: Path, n: int) -> list[Path]:
    """A name for each of n files.

    >>> [path.name for path in numbered(Path("out.png"), 2)]
    ['out-1.png', 'out-2.png']
    """
    return [path.with_name(f"{path.stem}-{index}{path.suffix}") for index in range(1, n + 1)]


def numbered_frames(path: Path, n: int) -> list[Path]:
    """A name for each of n frames, with as many digits everywhere, so that names sort.

    >>> numbered_frames(Path("out.png"), 100)[0].name
    'out-001.png'
    """
    digits = len(str(n))
    return [path.with_name(f"{path.stem}-{index:0{digits}}{path.suffix}") for index in range(1, n + 1)]


def check_targets(paths: Sequence[Path], *, force: bool, video: bool = False) -> None:
    """Refuse, before any work is done, files that cannot or must not be written. Raises UsageError, HostError."""
    allowed = (*SUFFIXES, *VIDEO_SUFFIXES) if video else SUFFIXES
    for path in paths:
        if path.suffix.lower() not in allowed:
            raise UsageError(f"-o is {path}: expected a name that ends in {', '.join(allowed)}")
        if path.suffix.lower() == ".mp4":
            _av()
        check_new_file(path, "-o", force=force)


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

    columns: of each budget float32 (n, height, width, 3) in [0, 1], the same prompts and seeds. Returns uint8 (…, …,
    3).
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


def save_all(drawn: Mapping[str, NDArray[np.float32]], targets: Sequence[Path], *, separate: bool, fps: int) -> None:
    """Write what was drawn at each budget, float32 (n, [frames,] height, width, 3), to the targets.

    One picture a target, or one sheet; of videos a moving one, or a file for each frame of each. Raises UsageError,
    HostError.
    """
    some = next(iter(drawn.values()))
    if some.ndim == 4:
        shown = sheets(drawn, separate=separate)
        for picture, target in zip(shown, targets, strict=True):
            save(picture, target)
        return
    moving = [
        sheets({name: clips[:, i] for name, clips in drawn.items()}, separate=separate) for i in range(some.shape[1])
    ]
    videos = [np.stack(frames) for frames in zip(*moving, strict=True)]
    if targets[0].suffix.lower() in VIDEO_SUFFIXES:
        for video, target in zip(videos, targets, strict=True):
            save_video(video, target, fps=fps)
    else:
        for frame, target in zip(np.concatenate(videos), targets, strict=True):
            save(frame, target)


def sheets(drawn: Mapping[str, NDArray[np.float32]], *, separate: bool) -> list[NDArray[np.uint8]]:
    """Every picture, or one sheet of all: a column for each budget if there are several."""
    if separate:
        return [picture for part in drawn.values() for picture in to_uint8(part)]
    return [comparison(drawn) if len(drawn) > 1 else contact_sheet(next(iter(drawn.values())))]


def to_uint8(pictures: NDArray[np.float32]) -> NDArray[np.uint8]:
    """[0, 1] → [0, 255], rounded as diffusers does."""
    return np.round(pictures * 255).astype(np.uint8)


def save_video(frames: NDArray[np.uint8], path: Path, *, fps: int) -> None:
    """Write uint8 (frames, height, width, 3) as GIF or MP4, whole or not at all. Raises UsageError, HostError."""
    try:
        with whole_file(path) as part:
            (_write_gif if path.suffix.lower() == ".gif" else _write_mp4)(frames, part, fps)
    except OSError as error:
        raise unwritable(path, "-o", error) from None


def _write_gif(frames: NDArray[np.uint8], path: Path | BinaryIO, fps: int) -> None:
    """At most 256 colours a frame, shown for whole hundredths of a second. path: a file, or an open one."""
    from PIL import Image

    first, *rest = (Image.fromarray(frame).quantize(256) for frame in frames)
    first.save(path, "GIF", save_all=True, append_images=rest, duration=max(20, round(1000 / fps)), loop=0)


def _write_mp4(frames: NDArray[np.uint8], path: Path, fps: int) -> None:
    """H.264; an odd side loses its last row or column, because colours are stored for two by two pixels."""
    av = _av()
    _, height, width, _ = frames.shape
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = width // 2 * 2, height // 2 * 2, "yuv420p"
        for frame in frames[:, : stream.height, : stream.width]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def encoded(picture: NDArray[np.float32], kind: str, *, fps: int = 15) -> bytes:
    """A file's bytes.

    picture: float32 (height, width, 3) in [0, 1], or the frames of a video, (frames, height, width, 3). kind: `png`,
    `jpeg` or `webp` of the former, `gif` of the latter.
    """
    from PIL import Image

    file = io.BytesIO()
    if kind == "gif":
        _write_gif(to_uint8(picture), file, fps)
    else:
        Image.fromarray(to_uint8(picture)).save(file, kind.upper())
    return file.getvalue()


def _av() -> Any:
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise HostError(
            f"-o names an MP4, which needs a package that is missing ({error}): run pip install 'otcache[video]', "
            "or write a GIF"
        ) from None


def save(picture: NDArray[np.uint8], path: Path) -> None:
    """Write uint8 (height, width, 3), whole or not at all. Raises UsageError if it cannot be written."""
    from PIL import Image

    try:
        with whole_file(path) as part:
            Image.fromarray(picture).save(part, _FORMATS[path.suffix.lower()])
    except OSError as error:
        raise unwritable(path, "-o", error) from None
