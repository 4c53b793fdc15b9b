"""What `otc inspect` says of plans, and with --memory of the device memory that programs take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from otcache.schemas.manifest import Engine, Manifest
from otcache.schemas.messages import one_line
from otcache.schemas.segments import Granularity, coarsen, segments, segments_of
from otcache.schemas.shapes import describe_size
from otcache.schemas.sized import whole_size

from ..build.listing import BUILD_TIME
from ..loop.address_plan import AddressPlan, plan_addresses
from ..messages import readable_size

if TYPE_CHECKING:
    from rich.table import Table


def engine_summaries(manifest: Manifest) -> list[dict[str, Any]]:
    """Every entry of the manifest's engines, with the size of its files and, of plans, how long they took to build."""
    return [{**engine.model_dump(mode="json"), **_facts(manifest, engine)} for engine in manifest.engines]


def engines_table(manifest: Manifest) -> Table:
    """A few lines for each backend and target, which wrap where the terminal is narrow."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Engines", title_justify="left", box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for engine in manifest.engines:
        facts = _facts(manifest, engine)
        together = f", up to {facts['blocks_per_plan']} blocks in one" if facts["blocks_per_plan"] > 1 else ""
        built = f", built in {facts['build_s']:.1f} s" if facts["build_s"] else ""
        where = "" if engine.target == "any" else f" for {engine.target}, {engine.platform}"
        table.add_row(engine.backend, escape(one_line(engine.version + where)))
        for name, value in (
            ("profile", ", ".join(f"{name} {':'.join(map(str, sizes))}" for name, sizes in engine.profile.items())),
            ("files", f"{len(_paths(engine))}{together}, {readable_size(facts['size_bytes'])}{built}"),
            ("layers", ", ".join(f"{count} {dtype}" for dtype, count in facts["layers_by_type"].items())),
        ):
            if value:
                table.add_row(f"  {name}", escape(one_line(value)))
    return table


def memory_summary(manifest: Manifest, samples: int, granularity: Granularity) -> dict[str, Any]:
    """Of every budget the arena's size, the least that any plan needs, and where each value lies."""
    plans = _plans(manifest, samples, granularity)
    return {
        "samples": samples,
        "size": whole_size(manifest),
        "granularity": granularity,
        "budgets": {name: _memory(plan) for name, plan in plans.items()},
    }


def memory_tables(manifest: Manifest, samples: int, granularity: Granularity) -> list[Table]:
    """Arena and lower bound of every budget; the addresses of the first and last step of the largest arena."""
    plans = _plans(manifest, samples, granularity)
    what = f"{describe_size(whole_size(manifest))}, {samples} at once"
    sizes = _table(f"Device memory beside weights, {what}", ">budget", ">launches", ">arena", ">lower bound")
    for name, plan in plans.items():
        sizes.add_row(
            name, str(len(plan.listing.launches)), readable_size(plan.size_bytes), readable_size(plan.lower_bound_bytes)
        )
    name, plan = max(plans.items(), key=lambda item: item[1].size_bytes)
    last = plan.listing.launches[-1].step
    places = _table(f"Addresses at budget {name}, steps 0 and {last}", ">offset", ">bytes", "value", "from", "to")
    for entry in _memory(plan)["values"]:
        if entry["step"] in (0, last):
            places.add_row(
                str(entry["offset"]),
                str(entry["size_bytes"]),
                f"{entry['name']} {entry['step']}",
                entry["from"],
                entry["to"],
            )
    return [sizes, places]


def _plans(manifest: Manifest, samples: int, granularity: Granularity) -> dict[str, AddressPlan]:
    manifest = coarsen(manifest, segments(manifest, granularity))
    entries = [entry for name in manifest.budgets if (entry := manifest.program(name))]
    return {entry.budget: plan_addresses(manifest, entry.program, samples) for entry in entries}


def _memory(plan: AddressPlan) -> dict[str, Any]:
    launches = [f"{launch.step}:{launch.engine}" for launch in plan.listing.launches]
    ends = [*launches, "end"]
    values = [
        {
            "name": value.name,
            "step": value.step,
            "offset": place.offset,
            "size_bytes": place.size_bytes,
            "from": "start" if value in plan.listing.brought else launches[place.first],
            "to": ends[place.last],
        }
        for value, place in sorted(plan.places.items(), key=lambda item: (item[1].offset, item[1].first))
    ]
    facts = {"launches": len(launches), "size_bytes": plan.size_bytes, "lower_bound_bytes": plan.lower_bound_bytes}
    return {**facts, "values": values}


def _facts(manifest: Manifest, engine: Engine) -> dict[str, Any]:
    sizes = {entry.path: entry.size_bytes for entry in manifest.files}
    prefix = f"{BUILD_TIME}{engine.backend}/{engine.target}/"
    times = [measurement.value for measurement in manifest.measurements if measurement.name.startswith(prefix)]
    types: dict[str, int] = {}
    for layers in engine.layers.values():
        for dtype, count in layers.items():
            types[dtype] = types.get(dtype, 0) + count
    size = sum(sizes[path] for path in _paths(engine))
    blocks = max(map(len, segments_of(engine, manifest)))
    return {
        "size_bytes": size,
        "blocks_per_plan": blocks,
        "build_s": round(sum(times), 3),
        "layers_by_type": dict(sorted(types.items())),
    }


def _paths(engine: Engine) -> set[str]:
    return {*engine.stages.values(), *engine.combinations.values()}


def _table(title: str, *headings: str) -> Table:
    """Columns; those that begin with > are figures, aligned to the right; others wrap where the terminal is narrow."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None)
    for heading in headings:
        justify: Literal["left", "right"] = "right" if heading.startswith(">") else "left"
        table.add_column(heading.removeprefix(">"), justify=justify, no_wrap=justify == "right")
    return table


def size_lines(manifest: Manifest) -> list[str]:
    """For people: the range of each axis and what stays, the sizes where they are listed, and what follows the axes."""
    shapes = manifest.shapes
    if shapes is None:
        return []
    lines = [f"{axis.name}: {axis}" for axis in shapes.axes]
    lines += [f"{name}: fixed, {reason}" for name, reason in shapes.fixed.items()]
    lines += [
        f"served: {describe_size(entry.size)}" + (", with programs of its own" if entry.programs else "")
        for entry in shapes.sizes
    ]
    return lines + [f"{symbol.name} = {symbol}" for symbol in shapes.symbols]
