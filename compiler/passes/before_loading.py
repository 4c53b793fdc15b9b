"""What is checked of a model from its configs, before its weights are read: sizes, text lengths, memory."""

from __future__ import annotations

from otcache.schemas.errors import HostError
from otcache.schemas.shapes import describe_size

from ..models.find import find_model
from ..models.hollow import hollow_pipeline, weight_bytes
from ..options import CompileOptions
from ..pipelines.call import check_frames
from ..pipelines.placement import Placement, free_bytes, size_text
from ..pipelines.refusals import check_size
from ..sizes.requested import asked_sizes
from ..workspace.progress import Reporter

EXTENTS = ("height", "width", "num_frames", "max_sequence_length")


def check_before_loading(options: CompileOptions, placement: Placement, reporter: Reporter) -> None:
    """Raise UsageError for sizes that the pipeline refuses, HostError for weights that the device has no room for.

    A model whose pipeline cannot be made of its configs is left to what is checked once it is loaded.
    """
    folder = find_model(
        options.model,
        revision=options.revision,
        variant=options.variant,
        trust_remote_code=options.trust_remote_code,
    )
    pipeline = hollow_pipeline(folder, options.model)
    if pipeline is None:
        return
    own = {name: value for name in EXTENTS if (value := getattr(options, name)) is not None}
    check_frames(pipeline, options.num_frames)
    check_size(pipeline, own)
    for option, size in asked_sizes(
        sizes=options.sizes, frame_counts=options.frame_counts, text_lengths=options.text_lengths
    ):
        check_size(pipeline, {str(name): value for name, value in size.items()}, f"{option} {describe_size(size)}")
    if options.search_size is not None:
        height, width = options.search_size
        check_size(pipeline, {"height": height, "width": width}, f"--search-size {height}x{width}")
    _check_memory(weight_bytes(pipeline, placement.precision), placement, reporter)


def _check_memory(weights: dict[str, int], placement: Placement, reporter: Reporter) -> None:
    """Of the parts that are on the device at once: all of them, or with offloading of components the largest."""
    free, device = free_bytes(placement.device), placement.device
    if free is None or not weights or placement.offload == "group":
        return
    needed = max(weights.values()) if placement.offload == "model" else sum(weights.values())
    if needed <= free:
        return
    precision = str(placement.precision).removeprefix("torch.")
    taken, left = f"{size_text(needed)} in {precision}", size_text(free)
    what = f"the model's weights take {taken}, and {left} are free on {device}"
    if device.type != "cpu":
        raise HostError(f"{what}: give --precision bfloat16, --offload model or group, or another device")
    reporter.note(f"{what}: what does not fit is read from the disk again at every evaluation, which takes its time")
