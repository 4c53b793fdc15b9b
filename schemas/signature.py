"""`manifest.sig`: an Ed25519 signature of an artifact's digest.

`schemas/README.md`, "Signature", is its specification.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .manifest import Digest
from .program import Frozen

MAX_SIGNATURE_BYTES = 4096
PREFIX = b"otcache artifact signature v1\0"
"""What is signed begins with this, so that a signature made for anything else is none of an artifact."""


class Signature(Frozen):
    """What `manifest.sig` says."""

    algorithm: Literal["ed25519"]
    digest: Digest
    """Of the artifact that was signed."""
    public_key: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{43}=$")]
    """Base64 of the 32 bytes of the key, to say which key would fit; never trusted."""
    signature: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{86}==$")]
    """Base64 of the 64 bytes."""


def signed_message(digest: str) -> bytes:
    """The bytes that are signed for an artifact of this digest (`sha256:…`)."""
    return PREFIX + digest.encode("ascii")
