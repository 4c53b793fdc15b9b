"""From prompt to picture on the small artifact, against a numpy oracle."""

import os
import shutil
import subprocess
import sys
import threading

import host_device
import numpy as np
import pytest
import small_artifact as small
import torch

from otcache.runtime import ArtifactError, HostError, RequestError, Sampler, UsageError
from otcache.runtime.artifact.reader import Artifact
from otcache.runtime.engines.choose import Selection
from otcache.runtime.serving.noise import noise

PROMPTS = ["a red ring", "a blue star", "zebra"]


@pytest.fixture(scope="module")
def sampler(artifact_folder):
    with Sampler.load(artifact_folder, threads=1) as loaded:
        yield loaded


def text_of(prompts):
    return np.stack([small.TABLE[small.ids_of(text)].mean(axis=0) for text in prompts])


@pytest.mark.parametrize("budget", [2, "3", "full"])
@pytest.mark.parametrize("seed", [5, [1, 2, 3]])
def test_latents_are_the_oracles(sampler, budget, seed):
    conditioning = sampler.encode(PROMPTS)
    text = np.stack([text_of([""] * 3), text_of(PROMPTS)])
    np.testing.assert_allclose(conditioning["text"], text, atol=1e-6)
    found = sampler.sample(conditioning, budget=budget, seed=seed, guidance_scale=3.0)
    program = sampler.manifest.program(budget).program
    expected = small.oracle(text.astype(np.float64), noise((3, 4, 4), seed, 3), program, (-2.0, 3.0))
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("backend", ["onnxruntime", "resident"])
def test_means_are_weighed_as_the_oracle_does(tmp_path, backend):
    folder = small.with_means(small.write_artifact(tmp_path / "small"))
    artifact = Artifact.open(folder)
    text = np.stack([text_of([""] * 3), text_of(PROMPTS)]).astype(np.float64)
    program = artifact.manifest.program("4").program
    expected = small.oracle(text, noise((3, 4, 4), 5, 3), program, (-2.0, 3.0))
    of_backend = Selection(host_device.HostBackend(), {})
    with Sampler.load(folder) if backend == "onnxruntime" else Sampler(artifact, of_backend) as loaded:
        found = loaded.sample(loaded.encode(PROMPTS), budget=4, seed=5, guidance_scale=3.0)
        plain = loaded.sample(loaded.encode(PROMPTS), budget=2, seed=5, guidance_scale=3.0)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    assert not np.allclose(found, plain, atol=1e-2)


def test_pictures(sampler):
    seen = []
    images = sampler("a red ring", budget=2, seed=3, images_per_prompt=2, progress=lambda *step: seen.append(step))
    assert images.shape == (2, 4, 4, 3) and images.dtype == np.float32 and 0 <= images.min() <= images.max() <= 1
    assert seen == [(1, 2), (2, 2)]
    latents = sampler.sample(sampler.encode(["a red ring"] * 2), budget=2, seed=3)
    np.testing.assert_array_equal(images, sampler.decode(latents))
    np.testing.assert_allclose(images, 1 / (1 + np.exp(-latents.reshape(2, 4, 4, 3))), atol=1e-6)


def test_seeds_mean_what_they_mean_in_torch(sampler):
    drawn = torch.randn((2, 3, 4, 4), generator=torch.Generator().manual_seed(8))
    packed = drawn.view(2, 3, 2, 2, 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 4, 12).numpy()
    conditioning = sampler.encode(["a", "red"])
    given = sampler.sample(conditioning, budget=2, latents=packed)
    np.testing.assert_allclose(sampler.sample(conditioning, budget=2, seed=8), given, atol=1e-5)


def test_negative_prompt_and_guidance_count(sampler):
    plain = sampler("a star", budget=2)
    assert np.abs(sampler("a star", budget=2, negative_prompt="") - plain).max() == 0
    assert np.abs(sampler("a star", budget=2, negative_prompt="red ring") - plain).max() > 1e-3
    assert np.abs(sampler("a star", budget=2, guidance_scale=2) - plain).max() > 1e-3


def test_threads_get_the_bits_they_get_alone(sampler):
    requests = [(budget, seed, count) for budget in (2, 3, "full") for seed in (0, 1) for count in (1, 2)]
    alone = [sampler("a star", budget=b, seed=s, images_per_prompt=c) for b, s, c in requests]
    found = {}

    def serve(order):
        for index in order:
            budget, seed, count = requests[index]
            found[index, order[0]] = sampler("a star", budget=budget, seed=seed, images_per_prompt=count)

    count = len(requests)
    workers = [threading.Thread(target=serve, args=([(i + k) % count for i in range(count)],)) for k in (0, 5, 7)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 3 * count
    for (index, _), images in found.items():
        np.testing.assert_array_equal(images, alone[index])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"budget": 5}, "expected one of 2, 3, full"),
        ({"budget": True}, "budget is True"),
        ({"budget": 2, "prompt": []}, "prompt is []"),
        ({"budget": 2, "prompt": 3}, "prompt is 3"),
        ({"budget": 2, "prompt": ["a", None]}, r"prompt\[1\] is None"),
        ({"budget": 2, "prompt": "\ud800"}, "surrogate"),
        ({"budget": 2, "seed": 1.5}, "seed is 1.5"),
        ({"budget": 2, "seed": 2**64}, "seed is"),
        ({"budget": 2, "seed": [1, 2]}, "expected one number, or 1"),
        ({"budget": 2, "seed": True}, "seed is True"),
        ({"budget": 2, "images_per_prompt": 0}, "images_per_prompt is 0"),
        ({"budget": 2, "guidance_scale": 7}, "expected 2 to 6"),
        ({"budget": 2, "guidance_scale": float("nan")}, "expected 2 to 6"),
        ({"budget": 2, "guidance_scale": "4"}, "expected 2 to 6"),
        ({"budget": 2, "negative_prompt": ["a", "b"]}, "expected one, or 1"),
    ],
)
def test_requests_that_are_refused(sampler, arguments, words):
    with pytest.raises(RequestError, match=words.replace("[]", r"\[\]")):
        sampler(**{"prompt": "a", **arguments})


def test_conditioning_that_is_refused(sampler):
    good = sampler.encode("a")
    for wrong, words in (({}, "expected exactly"), ({"text": good["text"][:1]}, "expected float32"), (3, "dict")):
        with pytest.raises(RequestError, match=words):
            sampler.sample(wrong, budget=2)
    with pytest.raises(RequestError, match="latents are"):
        sampler.sample(good, budget=2, latents=np.zeros((1, 3), np.float32))
    with pytest.raises(RequestError, match="latents are"):
        sampler.decode(np.zeros((0, 4, 12), np.float32))


def test_cancelled_request_leaves_the_sampler_usable(sampler):
    def cancel(done, total):
        raise TimeoutError("enough")

    with pytest.raises(TimeoutError):
        sampler("a", budget=2, progress=cancel)
    assert sampler("a", budget=2).shape == (1, 4, 4, 3)


def test_numpy_integers_are_numbers(sampler):
    plain = sampler("a", budget=2, seed=3)
    np.testing.assert_array_equal(plain, sampler("a", budget=np.int64(2), seed=np.int64(3)))


def test_budget_for(artifact_folder):
    with Sampler.load(artifact_folder) as sampler:
        assert sampler.budgets == ("2", "3", "full")
        assert sampler.budget_for(latency_s=0.15) == "2" and sampler.budget_for(latency_s=9) == "3"
        with pytest.raises(RequestError, match="budget 2 takes"):
            sampler.budget_for(latency_s=0.01)
        sampler("a", budget="full")
        assert sampler.budget_for(latency_s=1e3) == "full"


def test_budget_for_a_quality(damaged):
    with Sampler.load(small.with_qualities(damaged, {"2": (26.0, 0.9), "3": (41.0, 0.99)})) as sampler:
        assert sampler.budget_for(psnr_db=26) == "2" and sampler.budget_for(psnr_db=26.1) == "3"
        assert sampler.budget_for(psnr_db=26, ssim=0.95) == "3" == sampler.budget_for(ssim=0.95)
        assert sampler.budget_for(psnr_db=37, worst=True) == "full", "the worst is 5 dB below the mean"
        assert sampler.budget_for(psnr_db=60) == "full"
        assert [sampler.budget_for(quality=tier) for tier in ("draft", "high", "best")] == ["2", "3", "full"]
        assert sampler.budget_for(quality="worst psnr>=36") == "3"
        for wrong in ({}, {"latency_s": 1.0, "psnr_db": 30}, {"quality": "high", "ssim": 0.9}):
            with pytest.raises(RequestError, match="expected either latency_s, or psnr_db and ssim, or quality"):
                sampler.budget_for(**wrong)
        for wrong, message in (
            ({"psnr_db": "high"}, "psnr is 'high': expected a number"),
            ({"ssim": float("nan")}, "ssim is nan"),
            ({"quality": "finest"}, "expected one of draft, good, high, best"),
            ({"quality": "lpips<=0.1"}, "an artifact's figures are PSNR and SSIM"),
        ):
            with pytest.raises(RequestError, match=message):
                sampler.budget_for(**wrong)


def test_closed(artifact_folder):
    sampler = Sampler.load(artifact_folder)
    sampler.close()
    sampler.close()
    with pytest.raises(RequestError, match="closed"):
        sampler("a", budget=2)


def test_backends(artifact_folder):
    with Sampler.load(artifact_folder) as sampler:
        assert sampler.backend == "onnxruntime" and "no engines" in sampler.passed_over["tensorrt"]
    with pytest.raises(HostError, match="no engines"):
        Sampler.load(artifact_folder, backend="tensorrt")
    with pytest.raises(UsageError, match="expected one of auto"):
        Sampler.load(artifact_folder, backend="cuda")
    with pytest.raises(UsageError, match="threads"):
        Sampler.load(artifact_folder, threads=0)


def test_engines_that_are_not_what_the_manifest_says(damaged):
    shutil.copy(damaged / "engines/onnx/block_1.onnx", damaged / "engines/onnx/head.onnx")
    small.reseal_file(damaged, "engines/onnx/head.onnx")
    with pytest.raises(ArtifactError, match=r"head\.onnx: found inputs"):
        Sampler.load(damaged)
    (damaged / "engines/onnx/head.onnx").write_bytes(b"no model")
    small.reseal_file(damaged, "engines/onnx/head.onnx")
    with pytest.raises(ArtifactError, match="expected an ONNX model"):
        Sampler.load(damaged)
    (damaged / "tokenizers/words.json").write_bytes(b"{}")
    small.reseal_file(damaged, "tokenizers/words.json")
    with pytest.raises(ArtifactError, match="tokenizer"):
        Sampler.load(damaged)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v["stages"][5]["outputs"][0].update(shape=["batch", 4, 5, 3]), "pictures has shape"),
        (lambda v: v["stages"][4]["outputs"][0].update(shape=[1, small.WIDTH]), "text has shape"),
        (lambda v: v["stages"][4]["inputs"][0].update(shape=[3, "batch"]), "batch not first"),
        (lambda v: v["latents"].update(shape=[small.WIDTH, small.TOKENS]), "latents has shape"),
    ],
)
def test_shapes_that_do_not_fit(damaged, change, words):
    value = small.read_manifest(damaged)
    change(value)
    small.write_manifest(damaged, value)
    with pytest.raises(ArtifactError, match=words):
        Sampler.load(damaged)


SERVE = """
import pathlib, sys
from otcache.runtime import Sampler
with Sampler.load(sys.argv[1]) as sampler:
    sampler("a red ring", budget=2)
banned = {"torch", "diffusers", "transformers", "ot", "optuna", "scipy", "onnx", "matplotlib"}
# The peak of this process alone: getrusage also counts the one that started it, up to the exec.
status = pathlib.Path("/proc/self/status").read_text().split() if sys.platform == "linux" else ["VmHWM:", "0"]
print(sorted((banned | {"otcache.compiler"}) & set(sys.modules)), status[status.index("VmHWM:") + 1])
"""


def test_serving_imports_nothing_of_the_build_host(artifact_folder):
    done = subprocess.run(
        [sys.executable, "-c", SERVE, str(artifact_folder)], capture_output=True, text=True, check=True
    )
    found, kilobytes = done.stdout.rsplit(" ", 1)
    assert found == "[]" and int(kilobytes) < 500_000 and not done.stderr


def test_importing_the_package_is_light():
    code = "import sys, otcache.runtime; print(sorted({'numpy', 'pydantic', 'onnxruntime', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_engine_reports_to_nobody(artifact_folder, tmp_path):
    """ONNX Runtime's builds keep a database of what they run in the home folder: off, unless the user wants it."""
    environment = {key: value for key, value in os.environ.items() if key not in ("ORT_DISABLE_TELEMETRY", "CI")}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run(
        [sys.executable, "-c", SERVE, str(artifact_folder)], env=environment, check=True, capture_output=True
    )
    assert list(tmp_path.rglob("*")) == []
