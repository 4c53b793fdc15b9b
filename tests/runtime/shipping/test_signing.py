"""`otc sign`, `otc verify --public-key`: every way in which a signature is not right has its own line."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys

import pytest
import small_artifact as small
from click.testing import CliRunner

pytest.importorskip("cryptography")

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from otcache.runtime.artifact.reader import Artifact
from otcache.runtime.cli import main as cli
from otcache.runtime.serving.bench import save_latencies
from otcache.schemas.errors import ArtifactError
from otcache.schemas.manifest import SIGNATURE_NAME
from otcache.schemas.signature import PREFIX, signed_message

BLOCK = "engines/onnx/block_0.onnx"
PEM, PKCS8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
PUBLIC = serialization.PublicFormat.SubjectPublicKeyInfo


def write_keys(folder, name, key=None, password=None):
    key = key or ed25519.Ed25519PrivateKey.generate()
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(PEM, PKCS8, encryption))
    public.write_bytes(key.public_key().public_bytes(PEM, PUBLIC))
    return private, public


@pytest.fixture
def keys(tmp_path):
    return write_keys(tmp_path, "key")


def otc(*arguments):
    return CliRunner().invoke(cli.main, list(map(str, arguments)))


def refused(result, exit_code, *words):
    assert result.exit_code == exit_code, result.output
    (line,) = result.stderr.splitlines()
    for word in words:
        assert word in line, line
    return line


@pytest.fixture
def signed(damaged, keys):
    assert otc("sign", damaged, "--key", keys[0]).exit_code == 0
    return damaged


def change_signature(folder, **change):
    value = json.loads((folder / SIGNATURE_NAME).read_bytes())
    (folder / SIGNATURE_NAME).write_text(json.dumps({**value, **change}))


def test_signed(signed, keys):
    result = otc("verify", signed, "--public-key", keys[1])
    assert result.exit_code == 0 and "ok: signed with ed25519" in result.stdout and not result.stderr
    found = json.loads(otc("verify", signed, "--public-key", keys[1], "--level", "structure", "--json").stdout)
    value = json.loads((signed / SIGNATURE_NAME).read_bytes())
    assert found["public_key"] == value["public_key"] and value["algorithm"] == "ed25519"
    key = serialization.load_pem_public_key(keys[1].read_bytes())
    message = b"otcache artifact signature v1\0" + small.read_manifest(signed)["digest"].encode()
    key.verify(base64.b64decode(value["signature"]), message)
    assert otc("verify", signed).exit_code == 0, "a signature does not disturb those who have no key"


def test_signing_is_deterministic_and_leaves_the_digest(signed, keys):
    before = (signed / SIGNATURE_NAME).read_bytes()
    refused(otc("sign", signed, "--key", keys[0]), 2, "is signed already", "--force")
    result = otc("sign", signed, "--key", keys[0], "--force", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["digest"] == small.read_manifest(signed)["digest"]
    assert (signed / SIGNATURE_NAME).read_bytes() == before
    assert not [path for path in signed.iterdir() if "partial" in path.name]


def test_not_signed(damaged, keys):
    refused(otc("verify", damaged, "--public-key", keys[1]), 4, "is not signed", SIGNATURE_NAME, "otc sign")


def test_another_key(signed, tmp_path):
    other = write_keys(tmp_path, "other")[1]
    refused(otc("verify", signed, "--public-key", other), 4, "made with another key", "other.pub.pem")


def test_another_key_that_claims_to_be_this_one(signed, keys, tmp_path):
    """The name of the key in the file is not believed."""
    private, _ = write_keys(tmp_path, "other")
    mine = json.loads((signed / SIGNATURE_NAME).read_bytes())["public_key"]
    assert otc("sign", signed, "--key", private, "--force").exit_code == 0
    change_signature(signed, public_key=mine)
    refused(otc("verify", signed, "--public-key", keys[1]), 4, "forged or damaged")


def test_altered_manifest(signed, keys):
    value = small.read_manifest(signed)
    value["timestep_scale"] = 0.002
    small.write_manifest(signed, value, seal=False)
    refused(otc("verify", signed, "--public-key", keys[1]), 4, "manifest.json: found digest")
    small.write_manifest(signed, value)
    refused(otc("verify", signed, "--public-key", keys[1]), 4, "belongs to another artifact")


def test_signature_of_another_artifact(signed, keys, artifact_folder, tmp_path):
    other = shutil.copytree(artifact_folder, tmp_path / "other")
    value = small.read_manifest(other)
    value["conditions"]["seed"] = 7
    small.write_manifest(other, value)
    shutil.copy(signed / SIGNATURE_NAME, other)
    refused(otc("verify", other, "--public-key", keys[1]), 4, "belongs to another artifact")
    change_signature(other, digest=value["digest"])
    refused(otc("verify", other, "--public-key", keys[1]), 4, "forged or damaged")


def test_signature_for_another_purpose(signed, keys):
    """The bare digest signed with the same key, as another program might have it signed, is none of an artifact."""
    key = serialization.load_pem_private_key(keys[0].read_bytes(), None)
    digest = small.read_manifest(signed)["digest"]
    assert signed_message(digest) == PREFIX + digest.encode()
    change_signature(signed, signature=base64.b64encode(key.sign(digest.encode())).decode())
    refused(otc("verify", signed, "--public-key", keys[1]), 4, "forged or damaged")


def test_altered_file(signed, keys):
    data = bytearray((signed / BLOCK).read_bytes())
    data[-1] ^= 1
    (signed / BLOCK).write_bytes(data)
    refused(otc("verify", signed, "--public-key", keys[1]), 4, BLOCK, "digest")
    refused(otc("sign", signed, "--key", keys[0], "--force"), 4, BLOCK, "digest")


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "valid JSON"),
        (b"{}", "Field required"),
        (b"[]", "JSON object"),
        (b"\xff", "UTF-8"),
        (b" " * 5000, "at most 4096"),
        (b'{"algorithm": "none"}', "ed25519"),
        (b'{"digest": 1, "digest": 2}', "twice"),
    ],
)
def test_damaged_signature(signed, keys, data, word):
    (signed / SIGNATURE_NAME).write_bytes(data)
    refused(otc("verify", signed, "--public-key", keys[1]), 4, SIGNATURE_NAME, word)


def test_flips_in_every_byte_of_a_signature(signed, keys):
    """Refused, or the same signature written with other white space."""
    from otcache.runtime.shipping.signing import check_signature, parse_signature

    artifact = Artifact.open(signed)
    path = signed / SIGNATURE_NAME
    data = path.read_bytes()
    expected, kept = parse_signature(data), 0
    for place in range(len(data)):
        for mask in {1 << place % 8, 0x20}:
            path.write_bytes(data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :])
            try:
                check_signature(artifact, keys[1])
            except ArtifactError:
                continue
            kept += 1
            assert parse_signature(path.read_bytes()) == expected
    assert kept <= 4


def test_signature_that_is_a_link(signed, keys, tmp_path):
    (signed / SIGNATURE_NAME).rename(tmp_path / "elsewhere")
    (signed / SIGNATURE_NAME).symlink_to(tmp_path / "elsewhere")
    refused(otc("verify", signed, "--public-key", keys[1]), 4, "a symbolic link")


def test_keys_that_are_none(damaged, tmp_path, keys):
    private, public = keys
    (tmp_path / "text").write_text("no key")
    curve = write_keys(tmp_path, "curve", ec.generate_private_key(ec.SECP256R1()))
    locked, _ = write_keys(tmp_path, "locked", password=b"secret")
    for key, words in {
        tmp_path / "none": "No such file",
        tmp_path: "directory",
        tmp_path / "text": "expected a private Ed25519 key",
        public: "expected a private Ed25519 key",
        curve[0]: "expected a private Ed25519 key",
        locked: "encrypted",
    }.items():
        refused(otc("sign", damaged, "--key", key), 2, "--key is", words)
    assert not (damaged / SIGNATURE_NAME).exists()
    for key in (private, curve[1], tmp_path / "text"):
        refused(otc("verify", damaged, "--public-key", key), 2, "--public-key is", "expected a public Ed25519 key")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")
def test_keys_of_openssl(damaged, tmp_path):
    """The documented commands, word for word."""
    from otcache.runtime.shipping.signing import MAKE_KEYS

    lines = [line.strip() for line in (otc("sign", "--help").stdout).splitlines() if line.strip().startswith("openssl")]
    assert " && ".join(lines) == MAKE_KEYS
    subprocess.run(MAKE_KEYS, shell=True, check=True, cwd=tmp_path, capture_output=True)
    assert otc("sign", damaged, "--key", tmp_path / "key.pem").exit_code == 0
    assert otc("verify", damaged, "--public-key", tmp_path / "key.pub.pem").exit_code == 0


def test_without_cryptography(damaged, keys):
    """In a real process whose import of it fails: signing says which pip command helps, plain verifying needs
    it not.
    """
    code = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from otcache.runtime.cli.main import main; main(prog_name='otc')"
    )

    def run(*arguments):
        line = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    for arguments in (("sign", damaged, "--key", keys[0]), ("verify", damaged, "--public-key", keys[1])):
        done = run(*arguments)
        assert done.returncode == 6 and "pip install 'otcache[sign]'" in done.stderr, done.stderr
    assert run("verify", damaged).returncode == 0


def test_saved_latencies_keep_the_signature(signed, keys):
    """Measurements stand outside what is signed."""
    artifact = Artifact.open(signed)
    save_latencies(artifact, {"2": 0.25})
    assert otc("verify", signed, "--public-key", keys[1]).exit_code == 0
