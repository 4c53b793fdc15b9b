"""Pass `cut`: a diffusers transformer → `Stages`, the graph split into embed | block 0 … n−1 | head.

Consumes the transformer and one example of its keyword arguments. Produces one `torch.fx.GraphModule` per stage, wired
by tensor names; run one after the other they reproduce the transformer bit for bit, which is checked here (where a
rewrite rounds otherwise than the model: the rewritten transformer bit for bit, and the model itself to its last
places).

The graph is traced (`trace`), its blocks are found (`trunk`), every node is given a stage (`stage_of_node`), and the
graph is split along them (`split`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from otcache.schemas.errors import ModelError

from ..models.mapped_weights import give_back, given_back_in_turn
from ..pipelines.arguments import PLAIN, Output
from .dimensions import FIXED, Varying
from .fx_graph import Graph
from .replacements import stand_ins
from .split import split
from .stage_of_node import label_nodes
from .stages import Stages, run_in_turn
from .trace import Bound, check_arguments, reason_of, trace_graph
from .trunk import find_trunk

ROUNDING = 64
"""Units in the last place, of the largest output, that a rewritten model may differ by where a rewrite rounds
otherwise.
"""


def cut(
    module: nn.Module,
    kwargs: dict[str, Tensor],
    *,
    constants: Mapping[str, Any],
    output: Output = PLAIN,
    varying: Varying = FIXED,
) -> Stages:
    """Split a transformer into embed, blocks and head.

    Args:
        module: the transformer, in eval mode.
        kwargs: example of its tensor arguments that vary per step or request, by their names in `wiring`; dimension 0
            of each is the batch, 2 or more.
        constants: its other keyword arguments, tensors or not (`wiring`); they are baked in.
        output: what the pipeline makes of the result; by default its first tensor is taken as it is.
        varying: dimensions beside the batch that have other sizes, and calls there.

    Raises:
        SpecialisedError: the model turns such a dimension into a Python number.
        ModelError: no graph, no block lists, a batch that is not dynamic, or stages that do not reproduce the model.
    """
    subject = type(module).__name__
    check_arguments(subject, module, {name: value for name, value in kwargs.items() if name not in varying.unbatched})
    bound = Bound(module, constants, output=output).eval()
    with stand_ins(module) as rounded:
        graph_module, rewritten = trace_graph(subject, bound, kwargs, varying)
    rounded = rounded or rewritten
    graph = Graph(subject, graph_module, tuple(kwargs))
    stages = split(graph, label_nodes(graph, find_trunk(subject, module, graph)))
    _check_exact(subject, graph_module if rounded else bound, stages, kwargs)
    if rounded:
        _check_close(subject, bound, kwargs, stages, kwargs, "rewritten")
    for there in varying.checks:
        own = {name: value for name, value in there.inputs.items() if name not in varying.unbatched}
        model = Bound(module, there.constants, output=output).eval()
        _check_close(subject, model, own, stages, there.inputs, "at another size")
    give_back(module)
    return stages


def _check_close(
    subject: str, bound: Bound, kwargs: dict[str, Tensor], stages: Stages, inputs: Mapping[str, Tensor], what: str
) -> None:
    """Raise ModelError unless the stages give what the model gives, up to `ROUNDING`.

    Args:
        subject: what messages call the model.
        bound: the model with its constants bound.
        kwargs: its tensor arguments by name.
        stages: what it was cut into.
        inputs: those of the stages, constants of the size among them.
        what: of the call, for messages.
    """
    with torch.no_grad(), given_back_in_turn(bound):
        (expected,) = bound(kwargs)
    try:
        received = run_in_turn(stages, inputs)[stages.output]
    except RuntimeError as error:
        raise ModelError(
            f"{subject}: {what}, its graph does not run: {reason_of(error)}: expected one for all sizes"
        ) from error
    difference = float("inf")
    if received.shape == expected.shape:
        difference = float((received.double() - expected.double()).abs().max() / expected.abs().max())
    allowed = ROUNDING * torch.finfo(expected.dtype).eps
    if not difference <= allowed:
        raise ModelError(
            f"{subject}: {what}, it differs from the model by {difference:.3g} of the largest output: expected at most "
            f"{allowed:.3g}; report it to otcache"
        )


def _check_exact(subject: str, bound: nn.Module, stages: Stages, kwargs: dict[str, Tensor]) -> None:
    """Raise ModelError unless the stages give the bits that the model gives."""
    with torch.no_grad(), given_back_in_turn(bound):
        (expected,) = bound(kwargs)
    received = run_in_turn(stages, kwargs)[stages.output]
    if received.shape == expected.shape and torch.equal(received, expected):
        return
    chain = " → ".join(stage.name for stage in stages.stages)
    if received.shape != expected.shape:
        difference = f"shape {tuple(received.shape)} instead of {tuple(expected.shape)}"
    else:
        difference = f"a largest difference of {(received.double() - expected.double()).abs().max().item():.3g}"
    raise ModelError(
        f"{subject}: the stages {chain} do not reproduce the model: {difference}, expected the same bits; check that "
        "the model is deterministic (no dropout, no random numbers) and keeps no state between calls"
    )
