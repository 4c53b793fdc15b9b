"""`otc verify`, `sign`, `pack`, `unpack`: artifacts that are shipped."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, BinaryIO

import click

from otcache.schemas.errors import UsageError
from otcache.schemas.messages import one_line
from otcache.schemas.places import check_new_file

from ..messages import readable_size
from .completion import complete_backends
from .options import artifact_argument, json_option, print_json, quiet_option, threads_option
from .progress import progress_bar

if TYPE_CHECKING:
    from ..shipping.packing import Packed
    from ..shipping.verify import Outcome

LEVELS = ("structure", "digests", "host", "golden")
"""As `verify.LEVELS`, which costs more to import than a command line's help may."""


@click.command(
    epilog="""\b
Levels, each with everything before it:
  structure  the manifest, and that every file is there with its size
  digests    the content of every file; ONNX files refer to no others
  host       a backend of this host loads every stage
  golden     the request that was stored at compile time gives the latents that were stored with it

\b
Exit codes:
  0  everything asked for is right
  2  an option, or a key that cannot be read
  4  artifact: damaged, incomplete, of an unknown version, not signed, or signed by another key
  6  host: no backend serves it, its golden request comes out otherwise, or cryptography is missing

\b
Examples:
  otc verify artifacts/shapes
  otc verify artifacts/shapes --level golden --json
  otc verify artifacts/shapes --public-key key.pub.pem
"""
)
@artifact_argument
@click.option("--level", type=click.Choice(LEVELS), default="digests", show_default=True, help="How far to check.")
@click.option(
    "--public-key",
    type=click.Path(path_type=Path),
    default=None,
    metavar="FILE",
    help="Ed25519 key in PEM; without a signature that fits it, the artifact is refused.",
)
@click.option(
    "--backend",
    default="auto",
    show_default=True,
    shell_complete=complete_backends,
    help="For the levels host and golden: auto, onnxruntime, tensorrt or tensorrt-rtx.",
)
@threads_option
@quiet_option
@json_option
def verify(
    artifact: Path, level: str, public_key: Path | None, backend: str, threads: int | None, quiet: bool, as_json: bool
) -> None:
    """Check ARTIFACT: manifest and structure first, then as far as --level says. Stops at the first fault."""
    from ..shipping.verify import verify as check

    with progress_bar("verify", quiet=quiet, as_json=as_json):
        outcome = check(artifact, level, public_key=public_key, backend=backend, threads=threads)
    if as_json:
        print_json({"ok": True, "artifact": str(artifact), **asdict(outcome)})
    else:
        _print_outcome(outcome)


def _print_outcome(outcome: Outcome) -> None:
    checked = "sizes" if outcome.level == "structure" else "sizes and digests"
    click.echo(f"ok: {outcome.files} files ({checked}), {readable_size(outcome.size_bytes)}, {outcome.digest}")
    if outcome.public_key:
        click.echo(f"ok: signed with ed25519 {outcome.public_key}")
    if outcome.host:
        click.echo(f"ok: {outcome.host.backend} serves it here")
        for name, reason in outcome.host.passed_over.items():
            click.echo(one_line(f"note: {name} was passed over: {reason}", 400), err=True)
        for plans in outcome.host.plans:
            word, reason = ("ok", "run here") if plans.reason is None else ("note", f"do not run here: {plans.reason}")
            said = one_line(f"{word}: {plans.backend} plans for {plans.target} {reason}", 400)
            click.echo(said, err=plans.reason is not None)
            if plans.narrower:
                said = f"note: {plans.backend} plans for {plans.target} serve {plans.narrower}"
                click.echo(one_line(said, 400), err=True)
    if golden := outcome.golden:
        click.echo(
            f"ok: golden request at budget {golden.budget}: relative error {golden.relative_error:.2g} (at most "
            f"{golden.max_relative_error:g})"
        )
    if outcome.unlisted:
        names = one_line(", ".join(outcome.unlisted[:5]))
        click.echo(f"note: not part of it, never read: {names} ({len(outcome.unlisted)} in all)", err=True)


@click.command(
    epilog="""\b
Keys, in PEM:
  openssl genpkey -algorithm ed25519 -out key.pem
  openssl pkey -in key.pem -pubout -out key.pub.pem

\b
Examples:
  otc sign artifacts/shapes --key key.pem
  otc verify artifacts/shapes --public-key key.pub.pem
"""
)
@artifact_argument
@click.option(
    "--key", type=click.Path(path_type=Path), required=True, metavar="FILE", help="Private Ed25519 key in PEM."
)
@click.option("--force", is_flag=True, help="Replace a signature that is there.")
@json_option
def sign(artifact: Path, key: Path, force: bool, as_json: bool) -> None:
    """Sign ARTIFACT, once all its files have been verified: writes manifest.sig beside its manifest.

    Signed is the digest, and with it every program and file. Measurements and reports are not covered by it.
    """
    from ..artifact.reader import Artifact
    from ..shipping.signing import SIGNATURE_NAME, check_place
    from ..shipping.signing import sign as sign_artifact

    opened = Artifact.open(artifact)
    check_place(artifact, force=force)
    opened.verify()
    signature = sign_artifact(opened, key, force=force)
    target = artifact / SIGNATURE_NAME
    if as_json:
        print_json({"signature": str(target), "digest": signature.digest, "public_key": signature.public_key})
    else:
        click.echo(f"{target}: {signature.digest} signed with ed25519 {signature.public_key}")


@click.command(
    epilog="""\b
Examples:
  otc pack artifacts/shapes -o shapes.tar
  otc pack artifacts/shapes -o - | zstd > shapes.tar.zst
"""
)
@artifact_argument
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, allow_dash=True),
    required=True,
    metavar="FILE.tar",
    help="The archive; - for stdout.",
)
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@quiet_option
@json_option
def pack(artifact: Path, output: Path, force: bool, quiet: bool, as_json: bool) -> None:
    """Write ARTIFACT into one tar file, the same bytes for the same artifact. A signature travels along."""
    from ..artifact.reader import Artifact
    from ..shipping.packing import pack as pack_stream
    from ..shipping.packing import pack_file

    if str(output) != "-":
        check_new_file(output, "-o", force=force)
    opened = Artifact.open(artifact)
    unlisted = opened.check_structure().unlisted
    with _ended_by_sigterm(), progress_bar("pack", quiet=quiet, as_json=as_json):
        if str(output) != "-":
            packed = pack_file(opened, output, force=force)
            _print_packed(packed, str(output), as_json)
        elif as_json:
            raise UsageError(
                "--json and -o - both write to stdout: expected one of them: give -o a file, or drop --json"
            )
        else:
            packed = pack_stream(opened, sys.stdout.buffer)
    if unlisted:
        click.echo(
            f"note: not part of it, left out: {one_line(', '.join(unlisted[:5]))} ({len(unlisted)} in all)", err=True
        )


@click.command(
    epilog="""\b
Examples:
  otc unpack shapes.tar -o artifacts/shapes
  zstd -dc shapes.tar.zst | otc unpack - -o artifacts/shapes
  otc unpack shapes.tar -o artifacts/shapes --public-key key.pub.pem
"""
)
@click.argument("archive", type=click.Path(path_type=Path, allow_dash=True))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="FOLDER", help="The artifact.")
@click.option(
    "--public-key",
    type=click.Path(path_type=Path),
    default=None,
    metavar="FILE",
    help="Ed25519 key in PEM; without a signature that fits it, nothing is unpacked.",
)
@click.option("--force", is_flag=True, help="Replace an existing artifact.")
@quiet_option
@json_option
def unpack(archive: Path, output: Path, public_key: Path | None, force: bool, quiet: bool, as_json: bool) -> None:
    """Restore an artifact from ARCHIVE (- for stdin), verified as a whole before it stands at FOLDER."""
    from ..shipping.packing import unpack as unpack_stream

    shown = progress_bar("unpack", quiet=quiet, as_json=as_json)
    with _ended_by_sigterm(), _opened(archive) as stream, shown:
        packed = unpack_stream(stream, output, force=force, public_key=public_key)
    _print_packed(packed, str(output), as_json)


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[BinaryIO]:
    if str(archive) == "-":
        yield sys.stdin.buffer
        return
    try:
        file = open(archive, "rb")  # noqa: SIM115
    except OSError as error:
        raise UsageError(f"ARCHIVE is {archive}: {error.strerror}: expected a file that otc pack wrote") from None
    with file:
        yield file


class _Stopped(BaseException):
    """SIGTERM has come. No Exception, so that nothing takes it for a failure of its own."""


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that temporary files are removed; the exit code is 143."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stopped

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except _Stopped:
        error = click.ClickException("stopped by SIGTERM: start it again")
        error.exit_code = 128 + signal.SIGTERM  # type: ignore[misc]
        raise error from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_packed(packed: Packed, target: str, as_json: bool) -> None:
    if as_json:
        print_json({"output": target, **asdict(packed)})
    else:
        signed = ", signed (not checked)" if packed.signed else ""
        click.echo(
            f"{target}: {packed.files} files, {readable_size(packed.size_bytes)} as an archive, {packed.digest}{signed}"
        )
