"""Videos to files: GIF, MP4, and frames as pictures."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from otcache.runtime import pictures
from otcache.schemas.errors import HostError, UsageError


@pytest.fixture
def clips():
    """Two clips of four frames, 16 × 24, that get brighter: float32 (2, 4, 16, 24, 3)."""
    levels = np.linspace(0.1, 0.9, 4, dtype=np.float32)
    return np.broadcast_to(levels[None, :, None, None, None], (2, 4, 16, 24, 3)).copy()


def brightness(frames):
    return [float(np.asarray(frame, np.float64)[:16, :24].mean() / 255) for frame in frames]


def test_gif_has_every_frame_and_its_time(clips, tmp_path):
    out = tmp_path / "clip.gif"
    pictures.save_all({"2": clips[:1]}, [out], separate=False, fps=10)
    with Image.open(out) as image:
        assert image.n_frames == 4 and image.size == (24, 16) and image.info["duration"] == 100
        frames = []
        for index in range(4):
            image.seek(index)
            frames.append(image.convert("RGB"))
    assert brightness(frames) == pytest.approx([0.1, 0.3667, 0.6333, 0.9], abs=0.01)


def test_bytes_of_a_video_and_of_a_picture(clips):
    with Image.open(io.BytesIO(pictures.encoded(clips[0], "gif", fps=10))) as image:
        assert (image.format, image.n_frames, image.size) == ("GIF", 4, (24, 16))
    with Image.open(io.BytesIO(pictures.encoded(clips[0, 1], "png"))) as image:
        np.testing.assert_array_equal(np.asarray(image), pictures.to_uint8(clips[0, 1]))


def test_mp4_has_every_frame(clips, tmp_path):
    av = pytest.importorskip("av")
    out = tmp_path / "clip.mp4"
    pictures.save_all({"2": clips[:1]}, [out], separate=False, fps=10)
    with av.open(str(out)) as container:
        assert container.streams.video[0].average_rate == 10
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert brightness(frames) == pytest.approx([0.1, 0.3667, 0.6333, 0.9], abs=0.02)


def test_mp4_without_its_package(clips, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(HostError, match=r"otcache\[video\]"):
        pictures.check_targets([tmp_path / "clip.mp4"], force=False, video=True)


def test_frames_are_numbered_so_that_names_sort(clips, tmp_path):
    targets = pictures.numbered_frames(tmp_path / "clip.png", 12)
    assert [path.name for path in targets[:2]] == ["clip-01.png", "clip-02.png"] and targets[-1].name == "clip-12.png"
    pictures.save_all({"2": clips[:1]}, targets[:4], separate=False, fps=10)
    assert brightness([Image.open(path) for path in targets[:4]]) == pytest.approx([0.1, 0.3667, 0.6333, 0.9], abs=0.01)


def test_several_clips_move_side_by_side_or_apart(clips, tmp_path):
    pictures.save_all({"2": clips}, [tmp_path / "both.gif"], separate=False, fps=10)
    with Image.open(tmp_path / "both.gif") as image:
        assert image.size == (50, 16) and image.n_frames == 4
    apart = [tmp_path / "a.gif", tmp_path / "b.gif"]
    pictures.save_all({"2": clips}, apart, separate=True, fps=10)
    assert all(Image.open(path).n_frames == 4 for path in apart)


def test_pictures_are_not_written_as_videos(tmp_path):
    with pytest.raises(UsageError, match=r"\.gif: expected a name that ends in \.png"):
        pictures.check_targets([tmp_path / "one.gif"], force=False)
