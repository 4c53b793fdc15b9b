"""A module → the graph that `torch.export` finds in it.

It is symbolic in the batch and in what else varies, and has the named rewrites (`rewrites`) applied.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

from otcache.schemas.errors import ModelError

from ..pipelines.arguments import Output, arguments
from ..pipelines.size_tables import standing_in
from .dimensions import SpecialisedError, Varying
from .fx_graph import symbols_in
from .rewrites import REWRITES, SizesAsTensors


class Bound(nn.Module):
    """A module with its constant arguments bound: takes a dict of tensors, returns a tuple of tensors.

    Args:
        module: any module.
        constants: its arguments that are no inputs (`pipelines.arguments`).
        output: what is made of the module's result, which is then the only output; None gives all its tensors.
    """

    def __init__(
        self, module: nn.Module, constants: Mapping[str, Any] | None = None, *, output: Output | None = None
    ) -> None:
        super().__init__()
        self.module = module
        self.constants = dict(constants or {})
        self.output = output

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        with standing_in(self.module, inputs, self.constants):
            result = self.module(**arguments(inputs, self.constants))
        if self.output is not None:
            return (self.output(result),)
        if isinstance(result, Tensor):
            return (result,)
        return tuple(result.values()) if isinstance(result, dict) else tuple(result)


def check_arguments(subject: str, module: nn.Module, kwargs: Mapping[str, Tensor]) -> None:
    """Raise ModelError unless the module is in eval mode and all examples are batches of one size, 2 or more."""
    if module.training:
        raise ModelError(f"{subject} is in training mode: expected eval mode, where dropout is off; call .eval() first")
    if not kwargs:
        raise ModelError(f"{subject}: got no tensor inputs to cut with; pass the keyword arguments that vary per step")
    for name, value in kwargs.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            received = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ModelError(
                f"{subject}: input {name!r} is {received}: expected a tensor whose dimension 0 is the batch; "
                "expand it, or pass it among the constants"
            )
    sizes = {name: value.shape[0] for name, value in kwargs.items()}
    if len(set(sizes.values())) != 1 or min(sizes.values()) < 2:
        raise ModelError(
            f"{subject}: inputs have batch sizes {sizes}: expected one size of 2 or more, because torch.export treats "
            "a size of 1 as fixed; repeat the example along dimension 0, or pass unbatched tensors among the constants"
        )


def trace_graph(subject: str, bound: Bound, kwargs: dict[str, Tensor], varying: Varying) -> tuple[fx.GraphModule, bool]:
    """Trace a module with its constants bound, and rewrite what ONNX cannot express.

    Args:
        subject: what messages call the model.
        bound: the module.
        kwargs: examples of its tensor inputs by name.
        varying: their dimensions that differ between calls, beside the batch.

    Returns:
        The graph, functional and with parameters as `get_attr` nodes; and whether rewrites round otherwise.
    """
    program = export_program(subject, bound, kwargs, static=varying.unbatched, dimensions=varying.dimensions)
    if any(_mutates(node) for node in program.graph.nodes):
        program = program.run_decompositions({})
    module: fx.GraphModule = program.module()  # type: ignore[assignment]
    rounded = [rewrite(module) for rewrite in REWRITES]
    module.recompile()
    return module, any(rounded)


def export_program(
    subject: str,
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    static: Collection[str] = (),
    dimensions: Mapping[str, Collection[int]] = MappingProxyType({}),
) -> torch.export.ExportedProgram:
    """Export a module, proven dynamic in dimension 0 of every input that is not in `static`, and in `dimensions`.

    A `Bound` module takes the inputs as one dict, any other module takes them by position.

    Args:
        subject: what messages call the module.
        module: in eval mode.
        inputs: example tensors by name.
        static: names of inputs without a batch.
        dimensions: of inputs by name: dimensions that differ between calls.

    Raises:
        SpecialisedError: one of `dimensions` stays fixed.
        ModelError: `torch.export` finds no graph, or one for a single batch size.
    """
    auto = torch.export.Dim.AUTO
    dynamic: dict[str, Any] = {
        name: {dimension: auto for dimension in (*(() if name in static else (0,)), *dimensions.get(name, ()))}
        for name in inputs
    }
    for name, found in dynamic.items():
        if ones := [dimension for dimension in found if inputs[name].shape[dimension] < 2]:
            raise ModelError(
                f"{subject}: {name} has shape {tuple(inputs[name].shape)}, and dimension {ones[0]} varies: expected an "
                "example of 2 or more there, because torch.export treats a size of 1 as fixed; compile at a larger size"
            )
    bound = isinstance(module, Bound)
    args = (dict(inputs),) if bound else tuple(inputs.values())
    try:
        with torch.no_grad(), SizesAsTensors():
            program = torch.export.export(
                module, args, dynamic_shapes=(dynamic,) if bound else tuple(dynamic.values()), strict=False
            )
    except Exception as error:
        raise ModelError(
            f"{subject} has no graph: torch.export raised {reason_of(error)}; expected a model without control flow "
            "that depends on values; register a replacement for the part that cannot be traced"
        ) from error
    _check_dynamic(subject, program, dynamic, static)
    return program


def _check_dynamic(
    subject: str,
    program: torch.export.ExportedProgram,
    dynamic: Mapping[str, Collection[int]],
    static: Collection[str],
) -> None:
    """Raise SpecialisedError for dimensions of `dynamic` that are numbers in the program, ModelError for the batch."""
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    names = [name for name in program.graph_signature.user_inputs if name in placeholders]
    shapes = {name: placeholders[node].meta["val"].shape for name, node in zip(dynamic, names, strict=True)}
    fixed = {
        (name, dimension): shapes[name][dimension]
        for name, asked in dynamic.items()
        for dimension in asked
        if not symbols_in(shapes[name][dimension])
    }
    if batch := [
        f"{name} ({size})" for (name, dimension), size in fixed.items() if dimension == 0 and name not in static
    ]:
        raise ModelError(
            f"{subject}: the model fixes the batch of {', '.join(batch)}: expected every input to be dynamic in "
            "dimension 0; look for code that turns the batch size into a Python number"
        )
    if fixed:
        raise SpecialisedError(subject, fixed)


def reason_of(error: BaseException) -> str:
    """Class and first line of the error that started a chain of errors.

    >>> reason_of(ValueError("too long\\nfor a line"))
    'ValueError (too long)'
    >>> reason_of(KeyError())
    'KeyError (no message)'
    """
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__} ({next(iter(str(error).strip().splitlines()), 'no message')})"


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable
