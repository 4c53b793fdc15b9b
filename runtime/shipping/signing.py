"""Ed25519 signatures of artifacts: `manifest.sig` beside the manifest. `schemas/README.md`, "Signature", specifies it.

What is signed is the artifact's digest, and with it every program, coefficient and file; measurements and reports are
not. Keys are PEM files as `openssl genpkey -algorithm ed25519` writes them. Needs the package cryptography, which is
asked for when a signature is made or checked and not before.
"""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from otcache.schemas.digest import canonical_json
from otcache.schemas.errors import ArtifactError, HostError, UsageError
from otcache.schemas.manifest import SIGNATURE_NAME
from otcache.schemas.messages import damage_error, one_line
from otcache.schemas.places import check_writable, unwritable
from otcache.schemas.safe_files import read_small
from otcache.schemas.signature import MAX_SIGNATURE_BYTES, Signature, signed_message
from otcache.schemas.strict_json import parse_object
from otcache.schemas.whole_files import write_whole

from ..artifact.reader import Artifact

MAX_KEY_BYTES = 1 << 16
MAKE_KEYS = "openssl genpkey -algorithm ed25519 -out key.pem && openssl pkey -in key.pem -pubout -out key.pub.pem"


def sign(artifact: Artifact, key: Path, *, force: bool = False) -> Signature:
    """Sign an artifact whose files have been verified, and write the signature beside its manifest.

    It is written whole or not at all. Raises UsageError (the key, or a signature that is there without `force`),
    HostError without cryptography.
    """
    private = _private_key(key)
    public = private.public_key().public_bytes_raw()
    digest = artifact.manifest.digest
    signature = Signature(
        algorithm="ed25519",
        digest=digest,
        public_key=_base64(public),
        signature=_base64(private.sign(signed_message(digest))),
    )
    check_place(artifact.folder, force=force)
    _write(artifact.folder / SIGNATURE_NAME, signature)
    return signature


def read_signature(artifact: Artifact) -> Signature:
    """The signature beside the manifest, whoever made it. Raises ArtifactError if there is none or it is damaged."""
    if not os.path.lexists(artifact.folder / SIGNATURE_NAME):
        raise unsigned_error(artifact.folder)
    return parse_signature(read_small(artifact.folder, SIGNATURE_NAME, MAX_SIGNATURE_BYTES))


def parse_signature(data: bytes) -> Signature:
    """The signature in the bytes of `manifest.sig`. Raises ArtifactError."""
    value = parse_object(data, SIGNATURE_NAME)
    try:
        signature = Signature.model_validate_json(canonical_json(value), strict=True)
    except (ValidationError, UnicodeEncodeError) as error:
        problem = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else error
        raise damage_error(SIGNATURE_NAME, problem, "a signature") from None
    for text in (signature.public_key, signature.signature):
        if _base64(base64.b64decode(text)) != text:
            raise damage_error(SIGNATURE_NAME, f"base64 with loose bits {text[-4:]}", "its one canonical form")
    return signature


def check_signature(artifact: Artifact, public_key: Path) -> Signature:
    """The artifact's signature, if it is right and made with the private half of `public_key`.

    Raises ArtifactError, with a message of its own for each of: not signed, signature damaged, signature of another
    artifact, made with another key, forged; UsageError for the key, HostError without cryptography.
    """
    public = load_public_key(public_key)
    signature = read_signature(artifact)
    compare_signature(signature, artifact.manifest.digest, public, public_key)
    return signature


def compare_signature(signature: Signature, digest: str, public: Any, public_key: Path) -> None:
    """Raise ArtifactError unless `signature` is one of `digest`, made with the private half of `public`."""
    if signature.digest != digest:
        raise ArtifactError(
            f"{SIGNATURE_NAME} belongs to another artifact: found a signature of {signature.digest}: expected one of "
            f"{digest}: get the signature of this one"
        )
    expected = _base64(public.public_bytes_raw())
    if signature.public_key != expected:
        raise ArtifactError(
            f"{SIGNATURE_NAME} was made with another key: found ed25519 {signature.public_key}: expected {expected}, "
            f"which is {one_line(public_key)}: name the maker's key, or do not trust this artifact"
        )
    if not _verifies(public, base64.b64decode(signature.signature), signed_message(digest)):
        raise ArtifactError(
            f"{SIGNATURE_NAME} is forged or damaged: found bytes that the key {expected} has not signed: expected its "
            "signature: do not trust this artifact"
        )


def unsigned_error(name: object) -> ArtifactError:
    """The error of an artifact or archive that has no signature."""
    return ArtifactError(
        f"{one_line(name)} is not signed: found no {SIGNATURE_NAME}: expected one: get it from who made the artifact, "
        "or sign it with otc sign"
    )


def _verifies(public: Any, signature: bytes, message: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        public.verify(signature, message)
    except InvalidSignature:
        return False
    return True


def check_place(folder: Path, *, force: bool) -> None:
    """Raise UsageError if no signature can be written beside the manifest in `folder`, or one is there."""
    target = folder / SIGNATURE_NAME
    if os.path.lexists(target) and not force:
        raise UsageError(
            f"{one_line(target)} exists: the artifact is signed already: replace the signature with --force"
        )
    check_writable(target, "ARTIFACT")


def _write(target: Path, signature: Signature) -> None:
    try:
        write_whole(target, canonical_json(signature.model_dump(mode="json")) + b"\n")
    except OSError as error:
        raise unwritable(target, "ARTIFACT", error) from None


def _private_key(path: Path) -> Any:
    """An Ed25519PrivateKey."""
    serialization = _serialization()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    data = _read_key(path, "--key")
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except TypeError:
        raise UsageError(
            f"--key is {one_line(path)}: it is encrypted: expected a plain key: openssl pkey -in KEY -out PLAIN"
        ) from None
    except Exception as error:  # cryptography raises ValueError, UnsupportedAlgorithm and others
        raise _no_key("--key", path, error, "a private") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise _no_key("--key", path, type(key).__name__, "a private")
    return key


def load_public_key(path: Path) -> Any:
    """The Ed25519PublicKey in a PEM file. Raises UsageError, HostError."""
    serialization = _serialization()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    data = _read_key(path, "--public-key")
    try:
        key = serialization.load_pem_public_key(data)
    except Exception as error:
        raise _no_key("--public-key", path, error, "a public") from None
    if not isinstance(key, Ed25519PublicKey):
        raise _no_key("--public-key", path, type(key).__name__, "a public")
    return key


def _read_key(path: Path, option: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(MAX_KEY_BYTES)
    except (OSError, ValueError) as error:
        reason = one_line(getattr(error, "strerror", None) or error)
        raise UsageError(f"{option} is {one_line(path)}: {reason}: expected a PEM file: {MAKE_KEYS}") from None


def _no_key(option: str, path: Path, found: object, kind: str) -> UsageError:
    what = one_line(found, 80)
    return UsageError(f"{option} is {one_line(path)}: found {what}: expected {kind} Ed25519 key in PEM: {MAKE_KEYS}")


def _serialization() -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError:
        raise HostError("signatures need the package cryptography: pip install 'otcache[sign]'") from None
    return serialization


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
