"""Between `probe` and `cut`: the sizes that an artifact serves beside its own, found out rather than declared.

The pipeline is run at other sizes: what it then passes says which dimensions of the transformer's arguments follow
which axis of a request, and which constants are constants of the size (positions). The exporter is asked to keep all
those dimensions symbolic; axes of dimensions that it turns into Python numbers are given up, with the reason, and the
others asked again. Where a list of sizes is wanted and axes had to be given up, what parts of the model make of the
size (`tables`) is taken as constants too, if that keeps more of them. What comes out has been compared with the model
at every size that was looked at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from otcache.schemas.errors import ModelError, UsageError
from otcache.schemas.shapes import AxisName, describe_size

from ..graph.cut import cut
from ..graph.dimensions import FIXED, SizeCheck, SpecialisedError, Varying
from ..graph.stages import Stages
from ..models.model import transformer_of
from ..pipelines.arguments import PerSample, Spread, tensor_of
from ..pipelines.call import CallOptions, prepare_scheduler, short_call
from ..pipelines.denoiser import denoiser_of
from ..pipelines.full_run import capture
from ..pipelines.interface import Interface
from ..pipelines.probe import interface_at, same
from ..pipelines.size_tables import Table, following, tables_of
from ..programs.lower import lower
from ..programs.solver_table import SolverTable, program_from_table
from .requested import Point, Wanted
from .symbols import SymbolBook

Inputs = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a pipeline passes at one size."""

    point: Point
    call: CallOptions
    interface: Interface
    inputs: Inputs
    """Of the transformer at one step: latents, timestep and conditioning of two samples, all branches."""
    table: SolverTable


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes that are served, with what was seen there. Without other sizes than the own one, `axes` is empty."""

    wanted: Wanted = field(default_factory=Wanted)
    seen: tuple[Seen, ...] = ()
    """The own size first."""
    book: SymbolBook = field(default_factory=lambda: SymbolBook(()))
    constants: tuple[str, ...] = ()
    """Arguments and tables that follow from the size alone."""
    fixed: dict[AxisName, str] = field(default_factory=dict)
    """Axes that were given up, with the reason."""

    def inputs(self) -> list[Inputs]:
        """Of the transformer at each size that was seen, constants of the size among them."""
        return [{**seen.inputs, **self.constants_at(place)} for place, seen in enumerate(self.seen)]

    def constants_at(self, place: int) -> Inputs:
        """Constants of the size, at one of those that were seen."""
        return {name: tensor_of(self.seen[place].interface.held[name]) for name in self.constants}

    @property
    def own_tables(self) -> Mapping[str, Table]:
        """Of the own size, where any are constants."""
        return self.seen[0].interface.tables if self.seen else {}

    def at(self, point: Point) -> Seen:
        return next(seen for seen in self.seen if seen.point == point)

    @property
    def pictures(self) -> int:
        """How many sizes of pictures and videos were seen."""
        return len({(seen.call.height, seen.call.width, seen.call.num_frames) for seen in self.seen})

    def served(self) -> list[Seen]:
        """The sizes that are listed; none where ranges are served."""
        own = self.seen[0].point if self.seen else {}
        return [self.at(point) for point in self.wanted.served(own)] if self.wanted.listed else []

    def own_samplers(self) -> list[Seen]:
        """The sizes that are served with another sampler than the own size's."""
        return [seen for seen in self.served() if programs_differ(seen.table, self.seen[0].table)]

    def varying(self, inputs: Sequence[Inputs]) -> Varying:
        """What differs between the sizes that were seen, from the inputs there."""
        dimensions = {
            name: frozenset(d for d in range(value.ndim) if len({each[name].shape[d] for each in inputs}) > 1)
            for name, value in inputs[0].items()
        }
        return Varying(
            dimensions={name: found for name, found in dimensions.items() if found},
            unbatched=frozenset(self.constants),
            checks=tuple(
                SizeCheck(inputs=each, constants=seen.interface.constants)
                for each, seen in zip(inputs, self.seen, strict=True)
            ),
        )


def call_at(call: CallOptions, point: Point) -> CallOptions:
    """The call at another size."""
    changed: dict[str, Any] = {str(name): value for name, value in point.items()}
    return dataclasses.replace(call, **changed)


def own_point(call: CallOptions) -> Point:
    """The size that is compiled, on the axes that the pipeline's call takes."""
    return {
        name: getattr(call, name)
        for name in ("height", "width", "num_frames", "max_sequence_length")
        if name in call.accepted and getattr(call, name) is not None
    }  # type: ignore[misc]


def see(
    pipeline: Any, interface: Interface, call: CallOptions, scale: float, prompts: Sequence[str], point: Point
) -> Seen:
    """Run the pipeline for two steps at another size, and lower its sampler there.

    Args:
        pipeline: a diffusers pipeline.
        interface: how it calls its transformer at the own size.
        call: at the own size.
        scale: of guidance.
        prompts: two or more.
        point: the size.

    Raises:
        UsageError: the pipeline refuses the size.
    """
    here, name = call_at(call, point), type(pipeline).__name__
    try:
        found = interface_at(pipeline, here, interface, scale, prompts)
        short = short_call(pipeline, here)
        trajectory = capture(pipeline, found, short, prompts[:2], [0, 1], [scale] * 2)
    except (ValueError, RuntimeError, TypeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(
            f"{name} does not run at {describe_size(point)} ({reason}): give sizes that it takes"
        ) from error
    inputs = denoiser_of(transformer_of(pipeline, name), found, trajectory).inputs(
        trajectory.latents[1], trajectory.timesteps[1], 1.0
    )
    prepare_scheduler(pipeline, here, pipeline.scheduler, call.num_inference_steps)
    return Seen(
        point=point,
        call=here,
        interface=found,
        inputs=inputs,
        table=lower(pipeline.scheduler, step_options=found.step_options),
    )


def stages_for(
    transformer: Any, interface: Interface, example: Inputs, wanted: Wanted, seen: Sequence[Seen]
) -> tuple[Stages, Sizes]:
    """Cut the transformer with as many axes symbolic as the exporter allows.

    Args:
        transformer: in eval mode.
        interface: how the pipeline calls it at the own size.
        example: its inputs there.
        wanted: the sizes that are asked for.
        seen: the own size first, then all that `wanted.probed` names; none where nothing is wanted.

    Returns:
        The stages, and the sizes that they take.

    Raises:
        ModelError: as `cut`, at the own size.
    """
    stages, sizes = _symbolic(transformer, wanted, seen)
    if sizes.fixed and wanted.listed:
        tabled = [with_tables(transformer, each) for each in seen]
        if following([each.interface.tables for each in tabled]):
            others, more = _symbolic(transformer, wanted, tabled)
            if len(more.fixed) < len(sizes.fixed):
                stages, sizes = others, more
    if stages is None:
        stages = cut(transformer, example, constants=interface.constants, output=interface.output, varying=FIXED)
    return stages, sizes


def sizes_without_stages(wanted: Wanted, seen: Sequence[Seen]) -> Sizes:
    """The wanted sizes where nothing is cut: all axes are free, because the pipeline's own model runs."""
    if not wanted.axes:
        return Sizes()
    return Sizes(wanted=wanted, seen=tuple(seen), book=SymbolBook([each.point for each in seen]))


def with_tables(transformer: Any, seen: Seen) -> Seen:
    """The same with what parts of the transformer make of that size."""
    interface = seen.interface
    changing = (interface.latents_input, interface.timestep_input)
    tables = tables_of(transformer, seen.inputs, interface.constants, changing)
    return dataclasses.replace(seen, interface=dataclasses.replace(interface, tables=tables))


def _symbolic(transformer: Any, wanted: Wanted, seen: Sequence[Seen]) -> tuple[Stages | None, Sizes]:
    """Cut with the axes that can be symbolic; no stages where none can."""
    sizes = _group(wanted, seen, {}) if wanted.axes else Sizes()
    while sizes.wanted.axes:
        try:
            return cut_at(transformer, sizes, sizes.inputs()), sizes
        except SpecialisedError as error:
            blamed, reason = _axes_of(sizes, error.fixed), f"the exporter fixes {error.listed}"
        except ModelError as error:
            blamed, reason = {axis.name for axis in sizes.wanted.axes}, str(error).split(": expected")[0]
        sizes = _group(
            sizes.wanted.without(blamed, seen[0].point), seen, {**sizes.fixed, **dict.fromkeys(blamed, reason)}
        )
    return None, sizes


def cut_at(transformer: Any, sizes: Sizes, inputs: Sequence[Inputs]) -> Stages:
    """Cut for some sizes, from the inputs there. Raises ModelError.

    What the model does at its own size may be a special case (stored positions): then another size is traced.
    """
    interface, varying = sizes.seen[0].interface, sizes.varying(inputs)
    constants = {name: value for name, value in interface.constants.items() if name not in sizes.constants}
    for name in sizes.constants:
        if name in interface.tables:
            constants[name] = interface.tables[name].place
        elif isinstance(interface.constants[name], PerSample):
            constants[name] = Spread()
    try:
        return cut(transformer, inputs[0], constants=constants, output=interface.output, varying=varying)
    except SpecialisedError:
        raise
    except ModelError:
        return cut(transformer, inputs[-1], constants=constants, output=interface.output, varying=varying)


def _group(wanted: Wanted, seen: Sequence[Seen], fixed: Mapping[AxisName, str]) -> Sizes:
    """Give axes up whose arguments are neither tensors nor the same, and describe the sizes that are left.

    Args:
        wanted: what is asked for, without what was given up before.
        seen: what the pipeline passes at every size, the own one first.
        fixed: axes that were given up, with the reason.

    Raises:
        UsageError: sizes are a range, and a constant follows them.
    """
    own = seen[0]
    kept = [each for each in seen if all(each.point[name] == own.point[name] for name in fixed)]
    constants = list(following([each.interface.tables for each in kept]))
    for name, value in own.interface.constants.items():
        changed = [each for each in kept if not _same(each.interface.constants[name], value)]
        if not changed:
            continue
        if isinstance(value, PerSample) or (isinstance(value, Tensor) and value.ndim):
            constants.append(name)
            continue
        if own.interface.tables:
            continue  # the comparison with the model tells whether anything but tables depends on it
        first = min(changed, key=lambda each: len(_differing(each.point, own.point)))
        blamed = _differing(first.point, own.point)
        reason = f"the pipeline passes {name}, which follows it and is no tensor"
        return _group(wanted.without(blamed, own.point), seen, {**fixed, **dict.fromkeys(blamed, reason)})
    if not wanted.axes:
        return Sizes(fixed=dict(fixed))
    points = wanted.probed(own.point)
    kept = [each for point in points for each in kept if each.point == point]
    if constants and not wanted.listed:
        raise UsageError(
            f"sizes are a range, but the pipeline passes {constants[0]}, which depends on the size: expected a list, "
            "so that it can be stored for each"
        )
    return Sizes(
        wanted=wanted,
        seen=tuple(kept),
        book=SymbolBook([each.point for each in kept]),
        constants=tuple(constants),
        fixed=dict(fixed),
    )


def _axes_of(sizes: Sizes, fixed: frozenset[tuple[str, int]]) -> set[AxisName]:
    """The axes that some dimensions of inputs follow."""
    inputs = sizes.inputs()
    found: set[AxisName] = set()
    for name, dimension in fixed:
        symbol = sizes.book.of([each[name].shape[dimension] for each in inputs], name)
        found |= {axis for term in (symbol.terms if symbol else ()) for axis in term.axes}
    return found


def programs_differ(first: SolverTable, second: SolverTable) -> bool:
    """Whether two sizes have different samplers."""
    return program_from_table(first) != program_from_table(second)


def _differing(point: Point, other: Point) -> set[AxisName]:
    return {name for name in point if point[name] != other[name]}


def _same(value: Any, other: Any) -> bool:
    return same(value.row, other.row) if isinstance(value, PerSample) else same(value, other)
