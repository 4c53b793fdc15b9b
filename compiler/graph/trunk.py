"""Which submodules are the blocks: the entries of block lists that the latents flow through, one after the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from torch import fx, nn

from otcache.schemas.errors import ModelError

from .fx_graph import Graph, scope_of

MINOR_LIST = 0.1
"""A block list with fewer parameters than this part of the largest one (text refiners) is no trunk."""


def find_trunk(subject: str, module: nn.Module, graph: Graph) -> dict[str, int]:
    """Find the blocks: path of each one's submodule → its index, in order of execution.

    Args:
        subject: what messages call the model.
        module: the model, whose lists of submodules are looked at.
        graph: the same, traced.

    Raises:
        ModelError: fewer than two blocks, or blocks that overlap in time.
    """
    lists = {
        path: child for path, child in module.named_modules() if isinstance(child, nn.ModuleList) and len(child) > 0
    }
    outermost = {
        path: child for path, child in lists.items() if not any(path.startswith(other + ".") for other in lists)
    }
    paths = [f"{path}.{index}" for path, child in outermost.items() for index in range(len(child))]
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for position, node in enumerate(graph.nodes):
        path = block_path(node, paths)
        if path is not None and node in graph.features:
            first.setdefault(path, position)
            last[path] = position
    executed = sorted(first, key=first.__getitem__)
    members: dict[str, list[str]] = {}
    for path in executed:
        members.setdefault(path.rpartition(".")[0], []).append(path)
    weight = {name: sum(p.numel() for p in outermost[name].parameters()) for name in members}
    main = max(weight, key=weight.__getitem__, default=None)
    trunk = [name for name in members if main is not None and weight[name] >= MINOR_LIST * weight[main]]
    chained = _chain_lists(graph, trunk, main, members, first, last)
    blocks = [path for path in executed if path.rpartition(".")[0] in chained]
    if len(blocks) < 2:
        raise ModelError(
            f"{subject} has no trunk: found {len(blocks)} blocks that the latents flow through, in the lists "
            f"{sorted(outermost) or 'none'}; expected at least 2 entries of nn.ModuleList, one after the other"
        )
    for earlier, later in itertools.pairwise(blocks):
        if last[earlier] > first[later]:
            raise ModelError(
                f"{subject}: blocks {earlier!r} and {later!r} overlap in time: expected blocks that run one after the "
                "other; models with skip connections into a running block (U-Nets) have no trunk to cut"
            )
    return {path: index for index, path in enumerate(blocks)}


def _chain_lists(
    graph: Graph,
    trunk: list[str],
    main: str | None,
    members: dict[str, list[str]],
    first: dict[str, int],
    last: dict[str, int],
) -> set[str]:
    """Lists that adjoin the main one with nothing but parameter-free glue in between.

    Args:
        graph: the traced model.
        trunk: paths of the lists that may be chained, in order of execution.
        main: the one of most parameters; None where there is no list.
        members: paths of the entries of each list, in order of execution.
        first: position of the first node of each entry that depends on the latents.
        last: position of the last such node.
    """
    if main is None:
        return set()
    chained, start = {main}, trunk.index(main)
    for outward in (trunk[start + 1 :], trunk[:start][::-1]):
        inner = main
        for name in outward:
            earlier, later = sorted((inner, name), key=lambda each: first[members[each][0]])
            between = graph.nodes[last[members[earlier][-1]] + 1 : first[members[later][0]]]
            if any(node in graph.features and _has_parameters(graph, node) for node in between):
                break
            chained.add(name)
            inner = name
    return chained


def _has_parameters(graph: Graph, node: fx.Node) -> bool:
    return any(a.op == "get_attr" and isinstance(graph.attribute(a), nn.Parameter) for a in node.all_input_nodes)


def block_path(node: fx.Node, paths: Iterable[str]) -> str | None:
    """The one of `paths` whose submodule the node came from."""
    scope = scope_of(node) + "."
    return next((path for path in paths if scope.startswith(path + ".")), None)
