"""What the head reads from the blocks, the *features*, and what the blocks make them from.

Where blocks are skipped, a cached step supplies the features: what they are made from, plus a residual.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from .fx_graph import Graph
from .stage_of_node import Labels


def pair_features(graph: Graph, labels: Labels, names: Mapping[fx.Node, str]) -> tuple[tuple[str, str], ...]:
    """Pair what the head reads from the blocks with what the blocks made it from.

    Args:
        graph: the traced model.
        labels: the stage of each of its nodes.
        names: of the nodes that cross a cut, as stages declare them.

    Returns:
        Pairs (source, result) of names, each of two tensors of one shape and dtype; empty unless every tensor that the
        head reads has a source of its own.
    """
    stage = labels.stage
    in_blocks = {node for node, index in stage.items() if 0 < index < labels.head}
    results = [
        node for node in graph.nodes if node in in_blocks and any(stage.get(u) == labels.head for u in node.users)
    ]
    if graph.output in in_blocks:
        return ()
    pairs = []
    for result in results:
        source = _find_source(graph, in_blocks, result)
        if source is None:
            return ()
        pairs.append((names[source], names[result]))
    return tuple(pairs) if len({source for source, _ in pairs}) == len(pairs) else ()


def _find_source(graph: Graph, in_blocks: set[fx.Node], result: fx.Node) -> fx.Node | None:
    """The tensor of the same shape, from before the blocks, that the result evolves from.

    It depends on the latents; if several do, it is the one that the fewest operations lie between: skip connections
    make that path the shortest.
    """
    wanted = _signature(result.meta["val"])
    layer, seen = [result], {result}
    while layer:
        following: list[fx.Node] = []
        for node in layer:
            for argument in node.all_input_nodes:
                if argument in seen or argument not in graph.features:
                    continue
                seen.add(argument)
                value = argument.meta["val"]
                if argument in in_blocks:
                    following.append(argument)
                elif isinstance(value, Tensor) and _signature(value) == wanted:
                    return argument
        layer = following
    return None


def _signature(value: Tensor) -> tuple[Any, ...]:
    return (value.dtype, *(str(size) for size in value.shape))
