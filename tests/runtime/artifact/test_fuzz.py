"""Damage by chance and by search: detected or harmless, and nothing but the exception tree.

`pytest -m long tests/runtime/test_fuzz.py -s` prints the figures of the long runs; the tests without a mark are the
same checks with fewer inputs.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import sys
from collections import Counter
from io import BytesIO
from pathlib import Path

import pytest
import small_artifact as small
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from otcache.runtime import Sampler
from otcache.runtime.artifact.onnx_references import external_locations
from otcache.runtime.artifact.reader import Artifact
from otcache.runtime.shipping.packing import pack, unpack
from otcache.runtime.shipping.signing import parse_signature
from otcache.runtime.shipping.verify import verify
from otcache.schemas.digest import digest_of_bytes
from otcache.schemas.errors import ArtifactError, OTCacheError
from otcache.schemas.manifest import MANIFEST_NAME, core_digest
from otcache.schemas.manifest_file import parse_manifest

GOLDEN = Path(__file__).parents[2] / "golden" / "1.1" / "artifact"
OUTSIDE = ("digest", "measurements", "attachments")
"""Parts of a manifest that its digest does not cover."""
SHARD = 5_000
SHARDS = 20

# --- what the loader does to the world, watched
# ---------------------------------------------------------------------------

FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "pickle.find_class",
    "marshal.loads",
    "ctypes.dlopen",
    "socket.connect",
    "os.remove",
    "os.rename",
    "shutil.rmtree",
)
_folder: str | None = None
_seen: list[str] = []


def _watch(event: str, arguments: tuple) -> None:
    if _folder is None:
        return
    if event in FORBIDDEN:
        _seen.append(event)
    elif event == "open" and isinstance(arguments[0], str | bytes | Path):
        path = str(arguments[0])
        writes = isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if writes or not (path == _folder or path.startswith(_folder + "/")):
            _seen.append(f"open {path}")


sys.addaudithook(_watch)


def outcome(folder):
    """The artifact, or the one line of its ArtifactError; whatever else happens is a failure."""
    global _folder
    _folder = str(folder)
    try:
        artifact = Artifact.open(folder)
        artifact.verify()
        return artifact
    except ArtifactError as error:
        message = str(error)
        assert message.isprintable() and len(message) < 1500, message
        return message
    finally:
        _folder = None
        assert not _seen, _seen


def core(manifest):
    return manifest.model_dump(exclude=set(OUTSIDE))


# --- every flip in the manifest
# -------------------------------------------------------------------------------------------


def flips(folder, places, masks):
    """Flip bits of a manifest one at a time: (detected, harmless) counts; a third kind fails."""
    path = folder / MANIFEST_NAME
    data = path.read_bytes()
    expected = core(parse_manifest(data).manifest)
    counts: Counter[str] = Counter()
    for place in places:
        for mask in masks:
            path.write_bytes(data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :])
            found = outcome(folder)
            if isinstance(found, str):
                counts["detected"] += 1
            else:
                assert core(found.manifest) == expected, (place, mask)
                counts["harmless"] += 1
    path.write_bytes(data)
    return counts


def test_flips_in_the_manifest(damaged):
    size = (damaged / MANIFEST_NAME).stat().st_size
    counts = flips(damaged, range(0, size, 41), [1 << (size % 8), 0x20])
    assert counts["detected"] > 0.9 * counts.total()


@pytest.mark.long
def test_every_flip_in_the_manifest(damaged):
    size = (damaged / MANIFEST_NAME).stat().st_size
    counts = flips(damaged, range(size), [1 << bit for bit in range(8)])
    print(f"\nflips: {size} bytes, all 8 bits: {dict(counts)}")
    assert counts.total() == 8 * size


# --- flips, cuts and swaps in all files
# -----------------------------------------------------------------------------------


def whole(tmp_path):
    """The golden artifact with a report beside it."""
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "whole"))
    (folder / "report.html").write_bytes(b"<p>report</p>" * 50)
    value = json.loads((folder / MANIFEST_NAME).read_bytes())
    data = (folder / "report.html").read_bytes()
    value["attachments"] = [{"path": "report.html", "size_bytes": len(data), "digest": digest_of_bytes(data)}]
    value["measurements"] = [{"name": "latency_s/2", "value": 0.5, "unit": "s"}]
    (folder / MANIFEST_NAME).write_text(json.dumps(value, indent=1, sort_keys=True))
    return folder


def damage(choice, contents):
    """One flip, cut or swap: (what was done, paths with their new bytes)."""
    names = sorted(contents)
    # Half of all damage goes where something could be missed.
    name = MANIFEST_NAME if choice.random() < 0.5 else choice.choice(names)
    data = contents[name]
    kind = choice.choice(("flip", "cut", "swap bytes", "swap files"))
    if kind == "flip":
        place = choice.randrange(len(data))
        return kind, {name: data[:place] + bytes([data[place] ^ (1 << choice.randrange(8))]) + data[place + 1 :]}
    if kind == "cut":
        return kind, {name: data[: choice.randrange(len(data))]}
    if kind == "swap bytes":
        first, second = sorted(choice.sample(range(len(data)), 2))
        changed = bytearray(data)
        changed[first], changed[second] = changed[second], changed[first]
        return kind, {name: bytes(changed)}
    other = choice.choice([each for each in names if each != name])
    return kind, {name: contents[other], other: data}


def damages(tmp_path, count):
    folder = whole(tmp_path)
    contents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    expected = core(parse_manifest(contents[MANIFEST_NAME]).manifest)
    choice, counts = random.Random(0), Counter()
    assert not isinstance(outcome(folder), str)
    for _ in range(count):
        kind, changed = damage(choice, contents)
        for name, data in changed.items():
            (folder / name).write_bytes(data)
        found = outcome(folder)
        if isinstance(found, str):
            counts[f"{kind}: detected"] += 1
        elif all(contents[name] == data for name, data in changed.items()):
            counts[f"{kind}: of equal bytes"] += 1
        else:
            # Loads: then it is the manifest alone, with the same core, and every file has the digest in it.
            assert set(changed) == {MANIFEST_NAME} and core(found.manifest) == expected, (kind, sorted(changed))
            counts[f"{kind}: harmless"] += 1
        for name in changed:
            (folder / name).write_bytes(contents[name])
    return counts


def test_damage(tmp_path):
    counts = damages(tmp_path, 200)
    assert counts["flip: detected"] > 20 and counts["cut: detected"] > 20


@pytest.mark.long
def test_damage_in_all_files(tmp_path):
    counts = damages(tmp_path, 10_000)
    print(f"\ndamage: {dict(sorted(counts.items()))}")
    assert counts.total() == 10_000


# --- inputs that Hypothesis makes
# -----------------------------------------------------------------------------------------

HOSTILE = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    1 << 31,
    (1 << 31) + 1,
    1 << 48,
    1 << 63,
    1 << 64,
    0.0,
    -0.0,
    1e-320,
    0.5,
    1e6,
    1e7,
    1e308,
    "",
    "0",
    "1.0",
    "1.1",
    "2.0",
    "1.9999",
    "full",
    "batch",
    "float32",
    "h0",
    "h1",
    "h2",
    "text",
    "latents",
    "embed",
    "cfg_norm",
    "../x",
    "/etc/passwd",
    "manifest.json",
    "engines/onnx/head.onnx",
    "engines",
    "con",
    "a\0b",
    "é",
    "\ud800",
    "x" * 5000,
    "sha256:" + "0" * 64,
    [],
    [[]],
    {},
    {"a": {}},
    [0],
    [1, 2, 3],
    ["batch"],
    ["batch", 4, 12],
    [0.1] * 70,
)
"""Values at the edges of what some field takes."""

any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


def _places(value, path=()):
    """Every place in a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(inner, (*path, key))


def _template():
    entry = {"path": "x.onnx", "size_bytes": 1, "digest": "sha256:" + "0" * 64}
    value = small.manifest_value([{**entry, "path": f"engines/onnx/{name}.onnx"} for name in small.STAGES])
    value["files"] += [{**entry, "path": "tokenizers/words.json"}, {**entry, "path": "golden/l", "size_bytes": 192}]
    value["golden"] = {
        "prompt": "a",
        "budget": "2",
        "seed": 3,
        "guidance_scale": 5.0,
        "latents": "golden/l",
        "max_relative_error": 1e-3,
    }
    value["attachments"] = [{**entry, "path": "report.html"}]
    return json.loads(json.dumps(value))


TEMPLATE = _template()
PLACES = [path for path in _places(TEMPLATE) if path]


def _holds(value, key):
    """Whether a JSON value is an object with that name, or an array that is long enough."""
    if isinstance(value, list):
        return isinstance(key, int) and key < len(value)
    return isinstance(value, dict) and isinstance(key, str) and key in value


@st.composite
def manifests(draw):
    """A valid manifest with up to three places changed, sealed or not, perhaps with a few bytes changed."""
    value = json.loads(json.dumps(TEMPLATE))
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from(PLACES))
        inner = value
        for key in parents:
            inner = inner[key] if _holds(inner, key) else None
        if not (_holds(inner, last) or (isinstance(inner, dict) and isinstance(last, str))):
            continue  # an earlier change took that place away
        action = draw(st.sampled_from(("replace", "replace", "any", "remove", "twice", "like")))
        if action == "remove":
            inner.pop(last, None) if isinstance(inner, dict) else inner.pop(last)
        elif action == "twice" and isinstance(inner, list):
            inner.insert(last, inner[last])
        elif action == "any":
            inner[last] = draw(any_json)
        elif action == "like":
            found = TEMPLATE
            for key in draw(st.sampled_from(PLACES)):
                found = found[key]
            inner[last] = json.loads(json.dumps(found))
        else:
            inner[last] = draw(st.sampled_from(HOSTILE))
    if draw(st.integers(0, 9)):
        try:
            value["digest"] = core_digest(value)
        except ValueError:  # a number that is not finite, half a surrogate pair
            value["digest"] = "sha256:" + "0" * 64
    data = json.dumps(value, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    return _with_edits(draw, data) if draw(st.integers(0, 7)) == 0 else data


def _with_edits(draw, data):
    edited = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(edited)))
        edited[place : place + draw(st.integers(0, 3))] = draw(
            st.binary(max_size=3) | st.sampled_from((b"[" * 40, b'"', b"NaN", b"1e999", b"9" * 30))
        )
    return bytes(edited)


raw = st.binary(max_size=300) | st.text(alphabet='{}[]":,\\u0123456789eE+-.truefalsn ', max_size=200).map(str.encode)
inputs = st.one_of(manifests(), manifests(), manifests(), raw)
fuzzing = settings(
    deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink)
)
"""No database and no time limits: the inputs are those of the seed, on a slow machine as well."""


class Loader:
    """A folder that only holds a manifest, given one after the other; files are missing, so that loading ends at the
    latest there.
    """

    def __init__(self, folder):
        self.folder, self.counts = folder, Counter()
        folder.mkdir(exist_ok=True)

    def __call__(self, data):
        (self.folder / MANIFEST_NAME).write_bytes(data)
        try:
            parse_manifest(data)
            self.counts["valid"] += 1
        except (OTCacheError, ValueError):
            self.counts["refused"] += 1
        assert isinstance(outcome(self.folder), str)


@settings(fuzzing, max_examples=400)
@given(inputs)
def test_loader(tmp_path_factory, data):
    Loader(tmp_path_factory.getbasetemp() / "loader")(data)


@pytest.mark.long
@pytest.mark.parametrize("shard", range(SHARDS))
def test_loader_on_many_inputs(tmp_path, shard):
    loader = Loader(tmp_path / "x")

    @seed(shard)
    @settings(fuzzing, max_examples=SHARD)
    @given(inputs)
    def run(data):
        loader(data)

    run()
    print(f"\nloader: shard {shard}: {dict(loader.counts)}")
    assert loader.counts.total() >= SHARD and loader.counts["valid"] > SHARD / 50


def _serve(folder, data, counts):
    """A sealed manifest that loads is served: engines that do not fit it are refused, too."""
    (folder / MANIFEST_NAME).write_bytes(data)
    try:
        with Sampler.load(folder, threads=1) as sampler:
            sampler("a red ring", budget=sampler.budgets[0], seed=1)
        counts["served"] += 1
    except OTCacheError:
        counts["refused"] += 1


@st.composite
def servable(draw, folder):
    """The small artifact's manifest, files included, with one number, name or flag changed."""
    value = json.loads((folder / MANIFEST_NAME).read_bytes())
    places = [path for path in _places(value) if path and path[0] not in ("files", "digest", "producer", "model")]
    *parents, last = draw(st.sampled_from(places))
    inner = value
    for key in parents:
        inner = inner[key]
    inner[last] = draw(st.sampled_from(HOSTILE) | st.integers(-2, 9) | st.floats(-9, 9, allow_nan=False))
    with contextlib.suppress(ValueError):
        value["digest"] = core_digest(value)
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _served(source, folder, count, number):
    counts = Counter()
    shutil.copytree(source, folder)

    @seed(number)
    @settings(fuzzing, max_examples=count)
    @given(servable(source))
    def run(data):
        _serve(folder, data, counts)

    run()
    return counts


def test_serving_what_loads(artifact_folder, tmp_path):
    counts = _served(artifact_folder, tmp_path / "x", 60, 0)
    assert counts["refused"] and counts["served"]


@pytest.mark.long
def test_serving_much_that_loads(artifact_folder, tmp_path):
    counts = _served(artifact_folder, tmp_path / "x", 3_000, 1)
    print(f"\nserved: {dict(counts)}")


# --- the other readers
# ----------------------------------------------------------------------------------------------------


def _archive(folder):
    stream = BytesIO()
    pack(Artifact.open(folder), stream)
    return stream.getvalue()


def _readers(folder, work, count, number):
    """ONNX walker, signature and archive on edited valid inputs and on raw bytes."""
    onnx = [(folder / stage.onnx).read_bytes() for stage in Artifact.open(folder).manifest.stages]
    signature = json.dumps(
        {
            "algorithm": "ed25519",
            "digest": "sha256:" + "0" * 64,
            "public_key": "A" * 43 + "=",
            "signature": "A" * 86 + "==",
        }
    ).encode()
    archive = _archive(folder)
    counts: Counter[str] = Counter()
    work.mkdir()

    @seed(number)
    @settings(fuzzing, max_examples=count)
    @given(st.data())
    def run(data):
        kind = data.draw(st.sampled_from(("onnx", "signature", "archive")))
        base = {"onnx": data.draw(st.sampled_from(onnx)), "signature": signature, "archive": archive}[kind]
        blob = data.draw(raw) if data.draw(st.integers(0, 5)) == 0 else _with_edits(data.draw, base)
        if data.draw(st.integers(0, 5)) == 0:
            blob = blob[: data.draw(st.integers(0, len(blob)))]
        try:
            if kind == "onnx":
                (work / "x.onnx").write_bytes(blob)
                external_locations(work / "x.onnx", "x.onnx")
            elif kind == "signature":
                parse_signature(blob)
            else:
                unpack(BytesIO(blob), work / "out")
            counts[f"{kind}: read"] += 1
        except OTCacheError:
            counts[f"{kind}: refused"] += 1
        if (work / "out").exists():
            verify(work / "out")
            shutil.rmtree(work / "out")
        assert {path.name for path in work.iterdir()} <= {"x.onnx"}

    run()
    return counts


def test_other_readers(artifact_folder, tmp_path):
    counts = _readers(artifact_folder, tmp_path / "x", 150, 0)
    assert counts["archive: refused"] and counts["onnx: refused"] and counts["signature: refused"]


@pytest.mark.long
@pytest.mark.parametrize("shard", range(4))
def test_other_readers_on_many_inputs(artifact_folder, tmp_path, shard):
    counts = _readers(artifact_folder, tmp_path / "x", SHARD, shard)
    print(f"\nreaders: shard {shard}: {dict(sorted(counts.items()))}")
