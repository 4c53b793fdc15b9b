"""Which of an artifact's plans this host can run; of each other one why not, with the one command that makes it so.

A plan runs with exactly the library that built it, on the platform and the compute capability that it was built for.
"""

from __future__ import annotations

from collections.abc import Mapping

from otcache.schemas.errors import HostError
from otcache.schemas.manifest import Engine, Manifest

from ..messages import MODULES
from .gpu import why_no_gpu
from .profiles import why_outside
from .tensorrt_library import PACKAGES, buildable_targets, host_platform, library


def usable_plans(
    backend: str, manifest: Manifest, request: Mapping[str, int] | None = None
) -> tuple[Engine | None, str | None]:
    """The first entry of the backend that this host can run, or None and the reasons of all.

    request: `batch` and axes that the plans shall cover (`profiles.request_of`), where they are known.
    """
    entries = [entry for entry in manifest.engines if entry.backend == backend]
    if not entries:
        return None, "the artifact holds no engines for it: otc build-engines adds them"
    reasons = {}
    for entry in entries:
        reason = why_not(entry) or why_outside(entry, manifest, request or {})
        if reason is None:
            return entry, None
        reasons[entry.target] = reason
    return None, ", ".join(f"{target}: {reason}" for target, reason in reasons.items())


def why_not(plans: Engine, artifact: str = "ARTIFACT") -> str | None:
    """Why this host cannot run plans of the manifest, found without opening any; None if it can.

    artifact: what the command that mends it calls the artifact.
    """
    if plans.backend not in MODULES:
        return None
    no_gpu, host = why_no_gpu()
    if host is None:
        return f"{no_gpu}: expected a GPU of compute capability {plans.target}"
    again = f"otc build-engines {artifact} --backend {plans.backend} --target {host}"
    if plans.platform != host_platform():
        return f"built for {plans.platform}, and this is {host_platform()}: {again}"
    try:
        trt = library(plans.backend)
    except HostError:
        return f"it is not installed: pip install {PACKAGES[plans.backend]}=={plans.version}"
    if "batch" not in plans.profile:
        return f"built for sizes that the manifest does not name: {again}"
    if plans.version != trt.__version__:
        return f"built with version {plans.version}, and here is {trt.__version__}: {again}"
    if plans.target != host:
        if plans.backend == "tensorrt-rtx" and host not in buildable_targets(trt):
            again = f"otc build-engines {artifact} --backend tensorrt --target {host}"
        return f"built for {plans.target}, and this GPU is {host}: {again}"
    return None
