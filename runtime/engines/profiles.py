"""Optimisation profiles: which sizes plans are built for, the shapes of their inputs there, and whether a request lies
within.

Consumes a manifest's axes and what `--profile` says of them, produces the `Profile` that an entry of `engines` records.
Dimensions follow symbols, which are smallest and largest at corners of the axes' ranges, so that a plan for the corners
takes everything between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from otcache.schemas.errors import ArtifactError, UsageError
from otcache.schemas.manifest import Engine, Manifest, TensorInfo
from otcache.schemas.messages import one_line
from otcache.schemas.shapes import Axis, Request, corners, describe_size
from otcache.schemas.sized import manifest_at, own_size, served_size, tensor_at

from ..loop.backend import shape_of
from ..messages import OPTIONS, build_command, profile_text

Extent = tuple[int, ...]
Range = tuple[Extent, Extent, Extent]
"""Smallest, most frequent and largest shape."""
Triple = tuple[int, int, int]
"""Smallest, most frequent and largest size."""
Profile = Mapping[str, Triple]
BATCH = "batch"
"""The entry of a profile that counts samples; every other one is an axis."""
USUAL_BATCH: Triple = (1, 1, 4)


def profile_for(manifest: Manifest, asked: Profile) -> dict[str, Triple]:
    """A range for the batch and for each axis: as asked, else of an axis all that the artifact serves, most often its
    own size.

    Raises UsageError, with the range, for what the artifact does not serve.
    """
    axes, own = _axes(manifest), own_size(manifest)
    for name, sizes in asked.items():
        _check_asked(manifest, name, sizes)
    served = {name: (axis.minimum, own[axis.name], axis.maximum) for name, axis in axes.items()}
    profile = {BATCH: USUAL_BATCH, **served, **asked}
    usual = _usual(manifest, profile)
    if manifest.shapes and manifest.shapes.sizes and served_size(manifest, usual) is None:
        listed = "; ".join(describe_size(entry.size) for entry in manifest.shapes.sizes)
        raise UsageError(
            f"--profile {profile_text(profile)}: its most frequent size is {describe_size(usual)}: expected one of "
            f"{one_line(listed)}: name the other axes as well"
        )
    return profile


def _check_asked(manifest: Manifest, name: str, sizes: Triple) -> None:
    axes, text = _axes(manifest), f"--profile {profile_text({name: sizes})}"
    if name not in (BATCH, *axes):
        fix = f": compile with {OPTIONS[name]} to leave it open" if name in OPTIONS else ""  # type: ignore[index]
        raise UsageError(f"{text}: expected {', '.join((BATCH, *axes))}, which the artifact leaves open{fix}")
    smallest, usual, largest = sizes
    if not 1 <= smallest <= usual <= largest:
        raise UsageError(f"{text}: expected increasing sizes from 1")
    axis = axes.get(name)
    if axis and (odd := [size for size in sizes if size not in axis]):
        raise UsageError(
            f"{text}: {name} is {odd[0]}: expected {axis}: choose from that, or compile with {OPTIONS[axis.name]} "
            "that hold it"
        )


def input_shapes(manifest: Manifest, profile: Profile, inputs: Sequence[TensorInfo], rows: Triple) -> dict[str, Range]:
    """The shapes of a plan's inputs that vary. rows: what stands for their batch."""
    varying = [tensor for tensor in inputs if BATCH in tensor.shape or any(tensor.symbols)]
    followed = {name for tensor in varying for name in tensor.symbols}
    symbols = [symbol for symbol in (manifest.shapes.symbols if manifest.shapes else ()) if symbol.name in followed]

    def sizes(request: Request) -> Extent:
        try:
            return tuple(symbol.size(request) for symbol in symbols)
        except ValueError as error:
            raise UsageError(f"--profile {profile_text(profile)}: {error}: build for fewer sizes") from None

    def shape(tensor: TensorInfo, found: Extent, count: int) -> Extent:
        return shape_of(tensor_at(tensor, dict(zip((s.name for s in symbols), found, strict=True))), count)

    smallest, largest = (_bound(choose, manifest, profile, sizes) for choose in (min, max))
    usual = sizes(_usual(manifest, profile))
    fewest, most_often, most = rows
    return {
        tensor.name: (shape(tensor, smallest, fewest), shape(tensor, usual, most_often), shape(tensor, largest, most))
        for tensor in varying
    }


def _bound(
    choose: Callable[..., int], manifest: Manifest, profile: Profile, sizes: Callable[[Request], Extent]
) -> Extent:
    """The smallest or largest of each size, over the listed sizes within the profile, or over its corners if none are
    listed.

    TensorRT checks that what is smallest fits together, and what is largest. So where no listed size is smallest or
    largest in everything, the corners are taken, which are further apart.
    """
    listed = manifest.shapes.sizes if manifest.shapes else ()
    within = [sizes(entry.size) for entry in listed if outside(profile, entry.size) is None]
    found = tuple(map(choose, zip(*within, strict=True)))
    if within and found in within:
        return found
    box = tuple(
        axis.model_copy(update={"minimum": profile[name][0], "maximum": profile[name][2]})
        for name, axis in _axes(manifest).items()
    )
    return tuple(map(choose, zip(*map(sizes, corners(box)), strict=True)))


def coverage(plans: Engine, manifest: Manifest) -> dict[str, Triple]:
    """What plans serve of the batch and each axis; an axis that their profile does not name, at the artifact's own size
    alone.
    """
    own = {str(name): (size, size, size) for name, size in own_size(manifest).items()}
    return {BATCH: plans.profile[BATCH], **own, **plans.profile}


def outside(profile: Profile, request: Mapping[str, int] | Request) -> str | None:
    """The first of what a request asks for that lies outside of a profile: `batch` or an axis."""
    return next((name for name, size in request.items() if not profile[name][0] <= size <= profile[name][2]), None)


def request_of(manifest: Manifest, samples: int) -> dict[str, int]:
    """What is asked for of `batch` and the axes; manifest: at the request's size."""
    return {BATCH: samples, **{str(name): size for name, size in own_size(manifest).items()}}


def at_usual_size(plans: Engine, manifest: Manifest) -> tuple[Manifest, int]:
    """The manifest at the size, and the number of samples, that plans are mostly for. Raises ArtifactError if nothing
    fits there.
    """
    profile = coverage(plans, manifest)
    try:
        return manifest_at(manifest, _usual(manifest, profile)), profile[BATCH][1]
    except ValueError as error:
        whole = profile_for(manifest, {BATCH: profile[BATCH]})
        raise ArtifactError(
            f"artifact is damaged: manifest.json: plans for {plans.target} are for {profile_text(profile)}: "
            f"{one_line(error)}: {build_command('ARTIFACT', plans, whole)}"
        ) from None


def why_outside(
    plans: Engine, manifest: Manifest, request: Mapping[str, int], artifact: str = "ARTIFACT"
) -> str | None:
    """What plans do not cover of a request, with what they do and the command that mends it; None if they cover it.

    artifact: what that command calls the artifact.
    """
    profile = coverage(plans, manifest)
    name = outside(profile, request)
    if name is None:
        return None
    wider = {
        key: (min(smallest, request.get(key, smallest)), usual, max(largest, request.get(key, largest)))
        for key, (smallest, usual, largest) in profile.items()
    }
    asked = f"{request[name]} pictures at once" if name == BATCH else f"{name} is {request[name]}"
    return (
        f"{asked}: expected {_range(profile[name])}, which plans of {plans.backend} for {plans.target} cover: ask for "
        f"that, serve it with --backend onnxruntime, or {build_command(artifact, plans, wider)}"
    )


def narrower(plans: Engine, manifest: Manifest, artifact: str = "ARTIFACT") -> str | None:
    """What plans cover of axes of which the artifact serves more, with the command that mends it; None if they cover
    all.

    Plans without a profile run nowhere, and why is said elsewhere (`plan_hosts.why_not`).
    """
    if BATCH not in plans.profile:
        return None
    profile, axes = coverage(plans, manifest), _axes(manifest)
    less = [
        f"{name} {_range(profile[name])} of {axis}"
        for name, axis in axes.items()
        if profile[name][0] > axis.minimum or profile[name][2] < axis.maximum
    ]
    if not less:
        return None
    return f"{', '.join(less)}: {build_command(artifact, plans, profile_for(manifest, {BATCH: profile[BATCH]}))}"


def _range(sizes: Triple) -> str:
    return str(sizes[0]) if sizes[0] == sizes[2] else f"{sizes[0]} to {sizes[2]}"


def _usual(manifest: Manifest, profile: Profile) -> Request:
    return {axis.name: profile[name][1] for name, axis in _axes(manifest).items()}


def _axes(manifest: Manifest) -> dict[str, Axis]:
    return {axis.name: axis for axis in manifest.shapes.axes} if manifest.shapes else {}
