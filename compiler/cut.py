"""Pass `cut`: a diffusers transformer → `Stages`, the graph split into embed | block 0 … n−1 | head.

Consumes the transformer and one example of its keyword arguments. Produces one `torch.fx.GraphModule` per stage, wired by
tensor names; run one after the other they reproduce the transformer bit for bit, which is checked here (where a rewrite
rounds otherwise than the model: the rewritten transformer bit for bit, and the model itself to its last places).

`torch.export` writes into each node which submodule it came from. A node in the i-th entry of a block list belongs to
block i, a node before the blocks to embed, a node after the last block to head, and what is left between two blocks
(concatenation, slicing) to the block before. Scope alone is not enough: what the head needs from a block without
depending on the latents (DiT reads block 0's timestep embedding) has to be there when the blocks are skipped, so it is
placed in embed. What the head still reads from the blocks after that are the *features*: a cached step supplies them.

Sizes are not tensors: a stage reads the batch from its own inputs. What depends on no input and no parameter (rotary
tables) is computed once, here, and stored in the stages that read it.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from otcache.schemas.errors import ModelError

from .rewrites import REWRITES, replaced
from .wiring import PLAIN, Output, arguments

StageKind = Literal["embed", "block", "head"]

LATENT_NAMES = ("hidden_states", "sample", "x")
"""Keyword arguments that hold the latents, most common first; else the first floating-point input does."""
MAX_FOLDED_BYTES = 1 << 20
"""A larger constant is stored once, in embed, and handed to the other stages as a tensor."""
ROUNDING = 64
"""Units in the last place, of the largest output, that a rewritten model may differ by where a rewrite rounds otherwise."""
MINOR_LIST = 0.1
"""A block list with fewer parameters than this part of the largest one (text refiners) is no trunk."""

_REPEAT = re.compile(r"@\d+")
"""`torch.export` marks the second call of a submodule as `name@1`."""


@dataclass(frozen=True)
class Stage:
    """A piece of the model: `module(*inputs)` is the tuple of `outputs`; names are those of the whole chain."""

    name: str
    kind: StageKind
    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name; `tensors` holds at least the inputs."""
        with torch.no_grad():
            results = self.module(*(tensors[name] for name in self.inputs))
        return dict(zip(self.outputs, results, strict=True))


@dataclass(frozen=True)
class Stages:
    """The model as a chain of stages, in order of execution."""

    stages: tuple[Stage, ...]
    inputs: tuple[str, ...]
    """Names of what varies per step or per request: the keyword arguments of the model."""
    output: str
    """Name of the model output."""
    features: tuple[tuple[str, str], ...]
    """(source, result): the blocks turn `source`, made by embed or an input, into `result`, read by head, of the same
    shape. Head can be fed source + residual in place of the blocks. Empty where no such pairs exist: the model then
    has no payload `residual`."""

    def of_kind(self, kind: StageKind) -> tuple[Stage, ...]:
        return tuple(stage for stage in self.stages if stage.kind == kind)


class Bound(nn.Module):
    """A module with its constant arguments bound (`wiring`): takes a dict of tensors, returns a tuple of tensors.

    output: what is made of the module's result, which is then the only output; None gives all tensors of the result.
    """

    def __init__(
        self, module: nn.Module, constants: Mapping[str, Any] | None = None, *, output: Output | None = None
    ) -> None:
        super().__init__()
        self.module = module
        self.constants = dict(constants or {})
        self.output = output

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        result = self.module(**arguments(inputs, self.constants))
        if self.output is not None:
            return (self.output(result),)
        if isinstance(result, Tensor):
            return (result,)
        return tuple(result.values()) if isinstance(result, dict) else tuple(result)


def cut(
    module: nn.Module, kwargs: dict[str, Tensor], *, constants: Mapping[str, Any], output: Output = PLAIN
) -> Stages:
    """Split a transformer into embed, blocks and head.

    Args:
        module: the transformer, in eval mode.
        kwargs: example of its tensor arguments that vary per step or request, by their names in `wiring`; dimension 0 of
            each is the batch, 2 or more.
        constants: its other keyword arguments, tensors or not (`wiring`); they are baked in.
        output: what the pipeline makes of the result; by default its first tensor is taken as it is.

    Raises:
        ModelError: no graph, no block lists, a batch that is not dynamic, or stages that do not reproduce the model.
    """
    subject = type(module).__name__
    _check_arguments(subject, module, kwargs)
    bound = Bound(module, constants, output=output).eval()
    with replaced(module):
        graph_module, rounded = _captured(subject, bound, kwargs)
    graph = _Graph(subject, graph_module, tuple(kwargs))
    stages = _split(graph, _labels(graph, _trunk(subject, module, graph)))
    _check_exact(subject, graph_module if rounded else bound, stages, kwargs)
    if rounded:
        _check_close(subject, bound, stages, kwargs)
    return stages


def run_stages(stages: Stages, inputs: Mapping[str, Tensor]) -> Tensor:
    """Run every stage in torch and return the model output."""
    tensors = dict(inputs)
    for stage in stages.stages:
        tensors.update(stage.run(tensors))
    return tensors[stages.output]


# --- capture -----------------------------------------------------------------------------------------------------------


def _check_arguments(subject: str, module: nn.Module, kwargs: Mapping[str, Tensor]) -> None:
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
            f"{subject}: inputs have batch sizes {sizes}: expected one size of 2 or more, because torch.export treats a "
            "size of 1 as fixed; repeat the example along dimension 0, or pass unbatched tensors among the constants"
        )


def _captured(subject: str, bound: Bound, kwargs: dict[str, Tensor]) -> tuple[fx.GraphModule, bool]:
    """The graph with parameters as `get_attr`, functional, dynamic in the batch, and rewritten; whether it rounds otherwise."""
    program = exported_program(subject, bound, kwargs)
    if any(_mutates(node) for node in program.graph.nodes):
        program = program.run_decompositions({})
    module: fx.GraphModule = program.module()  # type: ignore[assignment]
    rounded = [rewrite(module) for rewrite in REWRITES]
    module.recompile()
    return module, any(rounded)


def exported_program(
    subject: str, module: nn.Module, inputs: Mapping[str, Tensor], *, static: Collection[str] = ()
) -> torch.export.ExportedProgram:
    """Export a module, proven dynamic in dimension 0 of every input that is not in `static`.

    A `Bound` module takes the inputs as one dict, any other module takes them by position.
    """
    dynamic: dict[str, Any] = {name: {} if name in static else {0: torch.export.Dim.AUTO} for name in inputs}
    bound = isinstance(module, Bound)
    args = (dict(inputs),) if bound else tuple(inputs.values())
    try:
        with torch.no_grad():
            program = torch.export.export(
                module, args, dynamic_shapes=(dynamic,) if bound else tuple(dynamic.values()), strict=False
            )
    except Exception as error:
        raise ModelError(
            f"{subject} has no graph: torch.export raised {reason_of(error)}; expected a model without "
            "control flow that depends on values; register a replacement for the part that cannot be traced"
        ) from error
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    names = [name for name in program.graph_signature.user_inputs if name in placeholders]
    sizes = {
        name: placeholders[node].meta["val"].shape[0] for name, node in zip(inputs, names, strict=True) if dynamic[name]
    }
    fixed = [f"{name} ({size})" for name, size in sizes.items() if not _is_batch(size)]
    if fixed:
        raise ModelError(
            f"{subject}: the model fixes the batch of {', '.join(fixed)}: expected every input to be dynamic in dimension 0; "
            "look for code that turns the batch size into a Python number"
        )
    return program


def reason_of(error: BaseException) -> str:
    """Class and first line of the error that started a chain of errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__} ({next(iter(str(error).strip().splitlines()), 'no message')})"


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


# --- the graph and its dependences -------------------------------------------------------------------------------------


class _Graph:
    """The captured graph: live nodes in order, what they depend on, and where they come from."""

    def __init__(self, subject: str, module: fx.GraphModule, inputs: tuple[str, ...]) -> None:
        self.subject = subject
        self.module = module
        self.inputs = inputs
        nodes = list(module.graph.nodes)
        placeholders = [node for node in nodes if node.op == "placeholder"]
        self.input_nodes = dict(zip(inputs, placeholders, strict=True))
        (self.output,) = _flat(next(node for node in nodes if node.op == "output").args)
        live = _ancestors([self.output])
        self.nodes = [node for node in nodes if node in live and node.op == "call_function" and not _is_size(node)]
        latents = self.input_nodes[_latents(inputs, placeholders)]
        self.features = self._descendants(latents)
        """Nodes whose values depend on the latents."""
        self.constant = self._constant()
        """Nodes whose values depend on no input and no parameter."""

    def _descendants(self, source: fx.Node) -> set[fx.Node]:
        found = {source}
        for node in self.nodes:
            if any(argument in found for argument in node.all_input_nodes):
                found.add(node)
        return found

    def _constant(self) -> set[fx.Node]:
        found: set[fx.Node] = set()
        for node in self.nodes:
            if all(
                argument in found or (argument.op == "get_attr" and self._is_buffer(argument))
                for argument in node.all_input_nodes
            ):
                found.add(node)
        return found

    def _is_buffer(self, node: fx.Node) -> bool:
        value = self.attribute(node)
        return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)

    def attribute(self, node: fx.Node) -> Any:
        return operator.attrgetter(str(node.target))(self.module)

    def folded(self) -> dict[fx.Node, Tensor]:
        """Values of the constant nodes."""
        values: dict[fx.Node, Any] = {}

        def value(argument: fx.Node) -> Any:
            return values[argument] if argument in values else self.attribute(argument)

        with torch.no_grad():
            for node in self.nodes:
                if node in self.constant:
                    args = fx.map_arg(node.args, value)
                    values[node] = node.target(*args, **fx.map_arg(node.kwargs, value))  # type: ignore[operator]
        return values


def _latents(names: tuple[str, ...], placeholders: list[fx.Node]) -> str:
    for name in LATENT_NAMES:
        if name in names:
            return name
    floating = [name for name, node in zip(names, placeholders, strict=True) if node.meta["val"].is_floating_point()]
    return (floating or list(names))[0]


def _flat(arguments: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(arguments, lambda node: found.append(node) or node)  # type: ignore[func-returns-value]
    return found


def _is_size(node: fx.Node) -> bool:
    """Whether the node's value is a size (or arithmetic on sizes) rather than a tensor."""
    value = node.meta.get("val")
    return isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(node.all_input_nodes)
    return found


def _scope(node: fx.Node) -> str:
    """Dotted path, inside the model, of the submodule that the node came from; empty for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    path = _REPEAT.sub("", paths[-1]) if paths else ""
    return ".".join(path.split(".")[1:])


# --- blocks ------------------------------------------------------------------------------------------------------------


def _trunk(subject: str, module: nn.Module, graph: _Graph) -> dict[str, int]:
    """Path of each block's submodule → block index, in order of execution."""
    lists = {
        path: child
        for path, child in module.named_modules()
        if isinstance(child, nn.ModuleList) and len(child) > 0
    }  # fmt: skip
    outermost = {
        path: child for path, child in lists.items() if not any(path.startswith(other + ".") for other in lists)
    }  # fmt: skip
    paths = [f"{path}.{index}" for path, child in outermost.items() for index in range(len(child))]
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for position, node in enumerate(graph.nodes):
        path = _block_path(node, paths)
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
    chained = _chained(graph, trunk, main, members, first, last)
    blocks = [path for path in executed if path.rpartition(".")[0] in chained]
    if len(blocks) < 2:
        raise ModelError(
            f"{subject} has no trunk: found {len(blocks)} blocks that the latents flow through, in the lists "
            f"{sorted(outermost) or 'none'}; expected at least 2 entries of nn.ModuleList, one after the other"
        )
    for earlier, later in itertools.pairwise(blocks):
        if last[earlier] > first[later]:
            raise ModelError(
                f"{subject}: blocks {earlier!r} and {later!r} overlap in time: expected blocks that run one after the other; "
                "models with skip connections into a running block (U-Nets) have no trunk to cut"
            )
    return {path: index for index, path in enumerate(blocks)}


def _chained(
    graph: _Graph,
    trunk: list[str],
    main: str | None,
    members: dict[str, list[str]],
    first: dict[str, int],
    last: dict[str, int],
) -> set[str]:
    """Lists that adjoin the main one with nothing but parameter-free glue in between."""
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


def _has_parameters(graph: _Graph, node: fx.Node) -> bool:
    return any(a.op == "get_attr" and isinstance(graph.attribute(a), nn.Parameter) for a in node.all_input_nodes)


def _block_path(node: fx.Node, paths: Iterable[str]) -> str | None:
    scope = _scope(node) + "."
    return next((path for path in paths if scope.startswith(path + ".")), None)


# --- labels ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Labels:
    blocks: int
    stage: dict[fx.Node, int]
    """Stage of each node: 0 embed, 1 … blocks, blocks + 1 head. Constant nodes have none."""

    @property
    def head(self) -> int:
        return self.blocks + 1


def _labels(graph: _Graph, trunk: Mapping[str, int]) -> _Labels:
    head = len(trunk) + 1
    nodes = [node for node in graph.nodes if node not in graph.constant]
    scopes = {node: _block_path(node, trunk) for node in nodes}
    end = max(i for i, node in enumerate(nodes) if scopes[node] is not None and node in graph.features)
    stage: dict[fx.Node, int] = {}
    for position, node in enumerate(nodes):
        earliest = max((stage.get(argument, 0) for argument in node.all_input_nodes), default=0)
        path = scopes[node]
        if _is_item(node):
            stage[node] = earliest  # a tuple never crosses a cut
        elif position > end:
            # Of a joint sequence of text and picture the head reads a part: cut off, it is what the features evolve to.
            cut_off = node.target is torch.ops.aten.slice.Tensor and node in graph.features
            stage[node] = earliest if cut_off and earliest == head - 1 else head
        elif path is not None:
            stage[node] = max(earliest, trunk[path] + 1)
        else:
            stage[node] = earliest
    # What head needs from the blocks, other than features, has to be there when they are skipped.
    wanted = {a for node in nodes if stage[node] == head for a in node.all_input_nodes} | {graph.output}
    for node in _ancestors(n for n in wanted if n not in graph.features and 0 < stage.get(n, 0) < head):
        if 0 < stage.get(node, 0) < head:
            stage[node] = 0
    # Items follow the tuple that they are taken from.
    for node in nodes:
        if _is_item(node):
            stage[node] = stage[node.all_input_nodes[0]]
    return _Labels(len(trunk), stage)


def _is_item(node: fx.Node) -> bool:
    return node.target is operator.getitem


# --- the split ---------------------------------------------------------------------------------------------------------


def _split(graph: _Graph, labels: _Labels) -> Stages:
    stage_names = ["embed", *(f"block_{i}" for i in range(labels.blocks)), "head"]
    constants = graph.folded()
    shared = _shared_constants(graph, labels, constants)
    stage = {**labels.stage, **dict.fromkeys(shared, 0)}

    outputs: list[list[fx.Node]] = [[] for _ in stage_names]
    for node in graph.nodes:
        here = stage.get(node)
        if here is not None and (node is graph.output or any(stage.get(user, here) != here for user in node.users)):
            outputs[here].append(node)

    names = {node: name for name, node in graph.input_nodes.items()}
    for index, name in enumerate(stage_names):
        _name_outputs(graph, names, name, outputs[index], kind=_kind(index, labels.head))

    builder = _Builder(graph, stage, names, constants)
    made: list[Stage] = []
    for index, name in enumerate(stage_names):
        if outputs[index]:
            made.append(builder.stage(index, name, _kind(index, labels.head), outputs[index]))
    return Stages(
        stages=tuple(made),
        inputs=graph.inputs,
        output=names[graph.output],
        features=_features(graph, labels, names),
    )


def _kind(index: int, head: int) -> StageKind:
    return "embed" if index == 0 else "head" if index == head else "block"


def _shared_constants(graph: _Graph, labels: _Labels, constants: Mapping[fx.Node, Any]) -> list[fx.Node]:
    """Large constants that several stages read."""
    shared = []
    for node, value in constants.items():
        readers = {labels.stage[user] for user in node.users if user in labels.stage}
        if isinstance(value, Tensor) and value.nbytes > MAX_FOLDED_BYTES and len(readers) > 1:
            shared.append(node)
    return shared


def _name_outputs(
    graph: _Graph, names: dict[fx.Node, str], stage: str, nodes: list[fx.Node], *, kind: StageKind
) -> None:
    """`embed_time_text_embed` where a submodule of the model made the tensor, else `block_3_out_0`."""
    taken = set(names.values())
    plain = 0
    for node in nodes:
        if node is graph.output:
            name = "output"
        elif kind == "embed" and (scope := _scope(node)):
            name = f"{stage}_{re.sub(r'[^A-Za-z0-9_]', '_', scope)}"
        else:
            name, plain = f"{stage}_out_{plain}", plain + 1
        unique, count = name, 1
        while unique in taken:
            unique, count = f"{name}_{count}", count + 1
        taken.add(unique)
        names[node] = unique


class _Builder:
    """Copies the nodes of one stage into a graph of its own."""

    def __init__(
        self,
        graph: _Graph,
        stage: Mapping[fx.Node, int],
        names: Mapping[fx.Node, str],
        constants: Mapping[fx.Node, Any],
    ) -> None:
        self.graph = graph
        self.stage_of = stage
        self.names = names
        self.constants = constants

    def stage(self, index: int, name: str, kind: StageKind, outputs: list[fx.Node]) -> Stage:
        members = [node for node in self.graph.nodes if self.stage_of.get(node) == index]
        if not all(isinstance(node.meta.get("val"), Tensor) for node in outputs):
            bad = [node.name for node in outputs if not isinstance(node.meta.get("val"), Tensor)]
            raise ModelError(
                f"{self.graph.subject}: stage {name} would hand on {bad}, which are no single tensors: "
                "expected tensors only; the blocks of this model cannot be cut apart"
            )
        inputs = self._inputs(index, members)
        made = fx.Graph()
        attributes: dict[str, Any] = {}
        copies: dict[fx.Node, fx.Node] = {}
        for node in inputs:
            copies[node] = made.placeholder(self.names[node].replace(".", "_"))
            copies[node].meta = dict(node.meta)

        def copied(node: fx.Node) -> fx.Node:
            if node in copies:
                return copies[node]
            if node.op == "get_attr":
                target = str(node.target).removeprefix("module.")
                copies[node] = self._attribute(made, attributes, target, self.graph.attribute(node), node)
            elif node in self.constants:
                target = self._constant_name(attributes, self.constants[node])
                copies[node] = self._attribute(made, attributes, target, self.constants[node], node)
            elif _is_size(node):
                copies[node] = self._size(made, node, inputs, copied)
            else:
                copies[node] = made.node_copy(node, copied)
            return copies[node]

        for node in members:
            copied(node)
        made.output(tuple(copied(node) for node in outputs))
        module = fx.GraphModule(attributes, made, class_name=f"{self.graph.subject}_{name}").eval()
        return Stage(
            name=name,
            kind=kind,
            module=module,
            inputs=tuple(self.names[node] for node in inputs),
            outputs=tuple(self.names[node] for node in outputs),
        )

    def _inputs(self, index: int, members: list[fx.Node]) -> list[fx.Node]:
        """What the stage reads: inputs of the model first, then tensors of earlier stages, in order of execution."""
        read = {argument for node in members for argument in node.all_input_nodes}
        inputs = [node for node in self.graph.input_nodes.values() if node in read]
        inputs += [node for node in self.graph.nodes if node in read and self.stage_of.get(node, index) != index]
        if any(_is_size(node) for node in read) and all(_batch_dimension(node) is None for node in inputs):
            inputs.insert(0, next(iter(self.graph.input_nodes.values())))
        return inputs

    @staticmethod
    def _constant_name(attributes: Mapping[str, Any], value: Tensor) -> str:
        """Equal constants share a name: every attention of a block derives the same rotary table."""
        names = [name for name in attributes if name.startswith("constant_")]
        for name in names:
            other = attributes[name]
            if other.dtype == value.dtype and other.shape == value.shape and torch.equal(other, value):
                return name
        return f"constant_{len(names)}"

    @staticmethod
    def _attribute(made: fx.Graph, attributes: dict[str, Any], target: str, value: Any, node: fx.Node) -> fx.Node:
        attributes[target] = value
        copy = made.create_node("get_attr", target, name=target.replace(".", "_"))
        copy.meta = dict(node.meta)
        return copy

    def _size(self, made: fx.Graph, node: fx.Node, inputs: list[fx.Node], copied: Any) -> fx.Node:
        """A size, read from the stage's own inputs."""
        value = node.meta["val"]
        if _is_batch(value):
            source = next(source for source in inputs if _batch_dimension(source) is not None)
            arguments = (copied(source), _batch_dimension(source))
            copy = made.call_function(torch.ops.aten.sym_size.int, arguments)
            copy.meta = dict(node.meta)
            return copy
        if any(not _is_size(argument) for argument in node.all_input_nodes):
            raise ModelError(
                f"{self.graph.subject}: {node.name} reads the size {value} of a tensor that its stage does not have: "
                "expected sizes that follow from the batch; fix the other sizes by passing constants"
            )
        return made.node_copy(node, copied)


def _is_batch(size: Any) -> bool:
    """Whether a size is the batch itself: the batch is all that is symbolic."""
    return isinstance(size, torch.SymInt) and str(size).isidentifier()


def _batch_dimension(node: fx.Node) -> int | None:
    return next((dimension for dimension, size in enumerate(node.meta["val"].shape) if _is_batch(size)), None)


# --- features ----------------------------------------------------------------------------------------------------------


def _features(graph: _Graph, labels: _Labels, names: Mapping[fx.Node, str]) -> tuple[tuple[str, str], ...]:
    """Pair what head reads from the blocks with what the blocks made it from; empty unless every tensor has a pair."""
    stage = labels.stage
    in_blocks = {node for node, index in stage.items() if 0 < index < labels.head}
    results = [
        node for node in graph.nodes if node in in_blocks and any(stage.get(u) == labels.head for u in node.users)
    ]
    if graph.output in in_blocks:
        return ()
    pairs = []
    for result in results:
        source = _source(graph, in_blocks, result)
        if source is None:
            return ()
        pairs.append((names[source], names[result]))
    return tuple(pairs) if len({source for source, _ in pairs}) == len(pairs) else ()


def _source(graph: _Graph, in_blocks: set[fx.Node], result: fx.Node) -> fx.Node | None:
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
    return (value.dtype, *("batch" if _is_batch(size) else str(size) for size in value.shape))


# --- proof -------------------------------------------------------------------------------------------------------------


def _check_close(subject: str, bound: Bound, stages: Stages, kwargs: dict[str, Tensor]) -> None:
    """After a rewrite that rounds otherwise than the model."""
    with torch.no_grad():
        (expected,) = bound(kwargs)
    difference = float((run_stages(stages, kwargs).double() - expected.double()).abs().max() / expected.abs().max())
    allowed = ROUNDING * torch.finfo(expected.dtype).eps
    if not difference <= allowed:
        raise ModelError(
            f"{subject}: rewritten, it differs from the model by {difference:.3g} of the largest output: expected at most "
            f"{allowed:.3g}; report it to otcache"
        )


def _check_exact(subject: str, bound: nn.Module, stages: Stages, kwargs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        (expected,) = bound(kwargs)
    received = run_stages(stages, kwargs)
    if received.shape == expected.shape and torch.equal(received, expected):
        return
    chain = " → ".join(stage.name for stage in stages.stages)
    if received.shape != expected.shape:
        difference = f"shape {tuple(received.shape)} instead of {tuple(expected.shape)}"
    else:
        difference = f"a largest difference of {(received.double() - expected.double()).abs().max().item():.3g}"
    raise ModelError(
        f"{subject}: the stages {chain} do not reproduce the model: {difference}, expected the same bits; "
        "check that the model is deterministic (no dropout, no random numbers) and keeps no state between calls"
    )
