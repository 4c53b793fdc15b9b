"""The timing cache that builds share: nothing is lost when several write it, and the library's own takes part."""

from __future__ import annotations

import json
import multiprocessing
import time
from contextlib import nullcontext

import pytest

from otcache.runtime.artifact.reader import Artifact
from otcache.runtime.build import plan as tensorrt_build
from otcache.runtime.build import timing_cache
from otcache.runtime.build.plan import BuildJob, build_plan
from otcache.schemas.combinations import combinations

RTX = "tensorrt-rtx"


class Config:
    """Makes caches as the library does: of what a file has."""

    def create_timing_cache(self, data):
        return Cache(json.loads(data) if data else {})

    def set_timing_cache(self, cache, *, ignore_mismatch):
        assert not ignore_mismatch
        self.cache = cache


class Cache:
    """Measurements by kernel; those that are there stay, as `ITimingCache.combine` has it."""

    def __init__(self, found):
        self.found = found

    def combine(self, other, *, ignore_mismatch):
        assert not ignore_mismatch
        self.found = {**other.found, **self.found}
        time.sleep(0.005)  # as a large one takes, so that writers meet
        return True

    def serialize(self):
        return json.dumps(self.found).encode()


def measure(path, names, lock):
    """A build that measures some kernels."""
    config = Config()
    cache = timing_cache.attach(config, path)
    assert config.cache is cache
    cache.found |= dict.fromkeys(names, 1.0)
    timing_cache.keep(config, cache, path, lock)
    return cache.found


def test_the_last_of_two_that_began_together_keeps_the_others(tmp_path):
    path, configs = tmp_path / "cache", [Config(), Config()]
    caches = [timing_cache.attach(config, path) for config in configs]
    for config, cache, name in zip(configs, caches, "ab", strict=True):
        cache.found[name] = 1.0
        timing_cache.keep(config, cache, path, nullcontext())
    assert set(json.loads(path.read_bytes())) == {"a", "b"}
    assert set(measure(path, ["c"], nullcontext())) == {"a", "b", "c"}, "and the next one begins with both"


def test_many_processes_at_once_lose_nothing(tmp_path):
    path, context = tmp_path / "cache", multiprocessing.get_context("fork")
    lock = context.Lock()
    names = [[f"{number}.{kernel}" for kernel in range(5)] for number in range(12)]
    processes = [context.Process(target=measure, args=(path, own, lock)) for own in names]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert set(json.loads(path.read_bytes())) == {name for own in names for name in own}
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_library_takes_what_was_kept(artifact_folder, tmp_path, monkeypatch):
    """As for the full library, whose timing cache RTX still has, but fills with nothing."""
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(tensorrt_build, "buildable_targets", lambda trt: ())
    given, stored = [], timing_cache._load

    def watched(config, path):
        given.append(path.read_bytes() if path.is_file() else b"")
        return stored(config, path)

    monkeypatch.setattr(timing_cache, "_load", watched)
    (one, *_) = combinations(Artifact.open(artifact_folder).manifest)
    kept = []
    for number in range(2):
        build_plan(
            BuildJob(
                name="spread",
                source=one,
                backend=RTX,
                target="any",
                shapes={"term_0": ((1, 4, 12), (1, 4, 12), (4, 4, 12))},
                workspace_bytes=None,
                output=tmp_path / f"{number}.plan",
                timing_cache=tmp_path / "cache",
            )
        )
        kept.append((tmp_path / "cache").read_bytes())
    assert given == [b"", b"", kept[0], kept[0]] and kept[0], "read before a build, and again before it is written"
