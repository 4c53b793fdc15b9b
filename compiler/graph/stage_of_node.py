"""Which stage each node of the graph belongs to: embed, a block, or head.

A node in the i-th entry of a block list belongs to block i, a node before the blocks to embed, a node after the last
block to head, and what is left between two blocks (concatenation, slicing) to the block before. Scope alone is not
enough: what the head needs from a block without depending on the latents (DiT reads block 0's timestep embedding) has
to be there when the blocks are skipped, so it is placed in embed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from .fx_graph import Graph, ancestors, is_item
from .trunk import block_path


@dataclass(frozen=True)
class Labels:
    """The stage of every node of a graph."""

    blocks: int
    """How many blocks there are."""
    stage: dict[fx.Node, int]
    """Stage of each node: 0 embed, 1 … blocks, blocks + 1 head. Constant nodes have none."""

    @property
    def head(self) -> int:
        """The label of head's nodes."""
        return self.blocks + 1


def label_nodes(graph: Graph, trunk: Mapping[str, int]) -> Labels:
    """Give every node that is no constant its stage.

    Args:
        graph: the traced model.
        trunk: path of each block's submodule → its index (`trunk.find_trunk`).
    """
    head = len(trunk) + 1
    nodes = [node for node in graph.nodes if node not in graph.constant]
    scopes = {node: block_path(node, trunk) for node in nodes}
    end = max(i for i, node in enumerate(nodes) if scopes[node] is not None and node in graph.features)
    stage: dict[fx.Node, int] = {}
    for position, node in enumerate(nodes):
        earliest = max((stage.get(argument, 0) for argument in node.all_input_nodes), default=0)
        path = scopes[node]
        if is_item(node):
            stage[node] = earliest  # a tuple never crosses a cut
        elif position > end:
            # Of a joint sequence of text and picture the head reads a part: cut off, it is what the features evolve to.
            cut_off = node.target is torch.ops.aten.slice.Tensor and node in graph.features
            stage[node] = earliest if cut_off and earliest == head - 1 else head
        elif path is not None:
            stage[node] = max(earliest, trunk[path] + 1)
        else:
            stage[node] = earliest
    # A joint sequence of text and picture is put together by the block that reads it: the features evolve from one of
    # its parts.
    for node in nodes:
        if node.target is torch.ops.aten.cat.default and node in graph.features and stage[node] == 0:
            first = min((stage[user] for user in node.users if user in stage), default=0)
            stage[node] = first if first < head else 0
    # What head needs from the blocks, other than features, has to be there when they are skipped.
    wanted = {a for node in nodes if stage[node] == head for a in node.all_input_nodes} | {graph.output}
    for node in ancestors(n for n in wanted if n not in graph.features and 0 < stage.get(n, 0) < head):
        if 0 < stage.get(node, 0) < head:
            stage[node] = 0
    # Items follow the tuple that they are taken from.
    for node in nodes:
        if is_item(node):
            stage[node] = stage[node.all_input_nodes[0]]
    return Labels(len(trunk), stage)
