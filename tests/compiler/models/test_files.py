"""Files are seen through links as the loader sees them, and of a hub's repository those are fetched that are loaded."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from otcache.compiler.models.files import files_in
from otcache.compiler.models.load import load_model
from otcache.schemas.errors import ModelError

OTHER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def linked(tiny_flux_folder, tmp_path) -> Path:
    """The tiny pipeline whose transformer is a link to a folder elsewhere."""
    folder = tmp_path / "linked"
    shutil.copytree(tiny_flux_folder, folder)
    shutil.move(folder / "transformer", tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    weights = {name: value + 0.01 for name, value in load_file(tiny_flux_folder / OTHER).items()}
    save_file(weights, tmp_path / "second" / Path(OTHER).name, {"format": "pt"})
    config = json.loads((tmp_path / "second" / "config.json").read_text()) | {"note": "of the second"}
    (tmp_path / "second" / "config.json").write_text(json.dumps(config))
    (folder / "transformer").symlink_to(tmp_path / "first")
    return folder


def test_digests_follow_links(tiny_flux_folder, linked, tmp_path):
    first, plain = load_model(str(linked)), load_model(str(tiny_flux_folder))
    assert (first.weights_digest, first.config_digest) == (plain.weights_digest, plain.config_digest)
    (linked / "transformer").unlink()
    (linked / "transformer").symlink_to(tmp_path / "second")
    second = load_model(str(linked))
    assert second.weights_digest != first.weights_digest and second.config_digest != first.config_digest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="nothing is recast elsewhere")
def test_a_recast_copy_follows_links(linked, tmp_path):
    weights = {name: value.bfloat16() for name, value in load_file(linked / OTHER).items()}
    save_file(weights, linked / OTHER, {"format": "pt"})
    found = load_model(str(linked), scratch=tmp_path / "scratch").transformer.state_dict()
    assert all(torch.equal(found[name], value.float()) for name, value in weights.items())


def test_links_in_circles_and_to_nothing_end(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "a.json").write_text("{}")
    (tmp_path / "part" / "up").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "part")
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    assert [path.relative_to(tmp_path).as_posix() for path in files_in(tmp_path)] == ["again/a.json", "part/a.json"]


def test_a_variant_is_loaded_where_it_is_named(tiny_flux_folder, tmp_path):
    folder = tmp_path / "half"
    shutil.copytree(tiny_flux_folder, folder)
    weights = {name: value.half() for name, value in load_file(folder / OTHER).items()}
    save_file(weights, (folder / OTHER).with_suffix(".fp16.safetensors"), {"format": "pt"})
    plain, half = (load_model(str(folder), variant=variant, scratch=tmp_path) for variant in (None, "fp16"))
    assert plain.weights_digest != half.weights_digest, "of what was loaded"
    found = half.transformer.state_dict()
    assert all(torch.equal(found[name], value.float()) for name, value in weights.items())
    (folder / OTHER).unlink()
    with pytest.raises(
        ModelError, match=r"its transformer as fp16 only .* no --variant was given: expected --variant fp16"
    ):
        load_model(str(folder))
    with pytest.raises(ModelError, match=r"as fp16 only .* --variant bf16 was given: expected --variant fp16"):
        load_model(str(folder), variant="bf16")


# --- a hub on this machine: the two addresses that huggingface_hub asks, from a folder of files


class Hub(http.server.BaseHTTPRequestHandler):
    """`/api/models/org/name[/revision/main]`, and `/org/name/resolve/<revision>/<path>`."""

    folder: Path
    fetched: list[str]
    commit = "c" * 40

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/"):
            names = [file.relative_to(self.folder).as_posix() for file in files_in(self.folder)]
            entry = {"id": "org/name", "sha": self.commit, "siblings": [{"rfilename": name} for name in names]}
            if "/tree/" in path:
                entry = [
                    {"type": "file", "path": name, "oid": "0" * 40, "size": (self.folder / name).stat().st_size}
                    for name in names
                ]
            self._answer(json.dumps(entry).encode(), {"Content-Type": "application/json"})
            return
        name = path.partition("/resolve/")[2].partition("/")[2]
        file = self.folder / name
        if not file.is_file():
            self.send_error(404)
            return
        data = file.read_bytes()
        if self.command == "GET":
            self.fetched.append(name)
        self._answer(data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": self.commit})

    def _answer(self, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def hub(folder: Path):
    """Address of a hub whose one model is the folder, and the files that were fetched from it."""
    handler = type("Handler", (Hub,), {"folder": folder, "fetched": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.fetched
    finally:
        server.shutdown()
        server.server_close()


FIND = """
import sys
from otcache.compiler.models.find import find_model
from otcache.compiler.models.load import load_model
from otcache.schemas.errors import ModelError
name, variant, trust = sys.argv[1], sys.argv[2] or None, sys.argv[3] == "trust"
try:
    print(find_model(name, variant=variant, trust_remote_code=trust))
    load_model(name, variant=variant, trust_remote_code=trust)
except ModelError as error:
    print(f"refused: {error}")
"""


def fetch(address: str, home: Path, variant: str = "", trust: str = "") -> list[str]:
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    environment |= {
        "HF_HUB_DISABLE_XET": "1",
        "OTC_CACHE": str(home / "otc"),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", FIND, "org/name", variant, trust]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    return (result.stdout.strip() or result.stderr).splitlines()


@pytest.fixture(scope="module")
def repository(tiny_flux_folder, tmp_path_factory) -> Path:
    """The tiny pipeline as people upload them: variants, a chat template, a checkpoint in one file, Python, old
    parts.
    """
    folder = tmp_path_factory.mktemp("hub") / "repository"
    shutil.copytree(tiny_flux_folder, folder)
    for path in [*folder.rglob("*.safetensors")]:
        half = {name: value.half() for name, value in load_file(path).items()}
        save_file(half, path.with_suffix(".fp16.safetensors"), {"format": "pt"})
    (folder / "tokenizer_2" / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "all-in-one.safetensors").write_bytes(b"\0" * 64)
    (folder / "pipeline.py").write_text("raise SystemExit")
    (folder / "text_encoder" / "pytorch_model.bin").write_bytes(b"\0" * 64)
    shutil.copytree(folder / "vae", folder / "vae_1_0")
    return folder


def test_what_model_index_names_is_fetched(repository, tmp_path):
    with hub(repository) as (address, fetched):
        (folder,) = fetch(address, tmp_path)
    assert Path(folder).is_relative_to(tmp_path)
    expected = {path.relative_to(repository).as_posix() for path in files_in(repository)}
    expected -= {"all-in-one.safetensors", "pipeline.py", "text_encoder/pytorch_model.bin"}
    expected = {name for name in expected if "fp16" not in name and not name.startswith("vae_1_0")}
    assert set(fetched) == expected and "tokenizer_2/chat_template.jinja" in expected and "prompts.txt" in expected
    assert len(fetched) == len(set(fetched)), "each once"


def test_a_variant_alone_is_fetched(repository, tmp_path):
    folder = tmp_path / "repository"
    shutil.copytree(repository, folder)
    for path in folder.rglob("*.safetensors"):
        if "fp16" not in path.name and path.parent.name != "vae":
            path.unlink()
    with hub(folder) as (address, fetched):
        assert len(fetch(address, tmp_path / "home", "fp16")) == 1
        weights = {name for name in fetched if name.endswith(".safetensors")}
        assert {name.partition("/")[0] for name in weights} == {"vae", "transformer", "text_encoder", "text_encoder_2"}
        assert all("fp16" in name for name in weights)
        (refused,) = fetch(address, tmp_path / "other")
    assert "fp16" in refused and "expected --variant fp16" in refused
