"""Pass `export`: `Stages` → one ONNX file per stage, compared with torch one by one.

Consumes torch modules and an example of their inputs. Produces ONNX files whose inputs and outputs carry the declared
names and whose batch dimension is the symbol `batch`, and the largest error of each. The files hold no path, stack
trace or name of the build host, and the same model gives the same bytes in every process.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from otcache.schemas.errors import ModelError
from otcache.schemas.operators import fault_of

from ..graph.stages import Stages, run_in_turn
from ..graph.trace import Bound, export_program, reason_of
from ..models.mapped_weights import give_back
from ..sizes.symbols import SymbolBook
from .evaluators import OPSET, Run, array_from_tensor, load_evaluator

Progress = Callable[[int, int], None]
"""Called with (stages done, stages in all)."""

EXTERNAL_BYTES = 1 << 26
"""Weights above this go to `<name>.onnx.data` beside the graph: they are written one by one, and read where they lie. A
message of protobuf, which ends at 2 GB, is in memory several times while it is made and read.
"""
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest relative error by the dtype of the outputs. Measured in float32: 4e-7 … 5e-6."""
_DTYPES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.bool: "bool",
}


@dataclass(frozen=True)
class TensorInfo:
    """Name, dtype and shape of a tensor, as the manifest has them; `batch` in the shape is the symbol."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    symbols: tuple[str | None, ...] = ()
    """What its dimensions follow at other sizes; empty where they stay."""

    @property
    def graph_shape(self) -> list[int | str]:
        """As an ONNX graph declares it."""
        symbols = self.symbols or (None,) * len(self.shape)
        return [size if symbol is None else symbol for size, symbol in zip(self.shape, symbols, strict=True)]


@dataclass(frozen=True, kw_only=True)
class OtherSizes:
    """Inputs at other sizes than the example's, and the symbols that dimensions follow from there."""

    book: SymbolBook
    inputs: tuple[Mapping[str, Tensor], ...] = ()
    """At the points of the book in their order, the first of which is the example's."""
    constants: tuple[str, ...] = ()
    """Inputs without a batch."""


NONE = OtherSizes(book=SymbolBook(()))


@dataclass(frozen=True)
class ExportedStage:
    """An ONNX file and its contract."""

    name: str
    kind: str
    path: Path
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    max_relative_error: float
    """max |onnx − torch| / max |torch|, the largest over the outputs and the batch sizes tried."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The ONNX file and its external data, if there is any."""
        data = _data_path(self.path)
        return (self.path, data) if data.exists() else (self.path,)


def export_stages(
    stages: Stages,
    example_inputs: Mapping[str, Tensor],
    folder: Path,
    *,
    progress: Progress | None = None,
    tolerance: float | None = None,
    others: OtherSizes = NONE,
) -> tuple[ExportedStage, ...]:
    """Export every stage to `folder/<stage>.onnx`.

    Args:
        stages: from pass `cut`.
        example_inputs: the inputs of the model by name, batch 2 or more in dimension 0.
        folder: is created if it does not exist.
        progress: called after each stage.
        tolerance: largest relative error of a stage; by default as `TOLERANCES` has it.
        others: sizes that the stages shall take as well.

    Raises:
        ModelError: a stage that ONNX cannot express, or that differs from torch by more than the tolerance.
    """
    trials = _Trials(
        batches=[run_in_turn(stages, tensors) for tensors in _resize_batch(example_inputs, others.constants)],
        sizes=[run_in_turn(stages, inputs) for inputs in others.inputs[1:]],
        book=others.book,
    )
    exported = []
    for done, stage in enumerate(stages.stages, start=1):
        contract = _Contract(stage.name, stage.kind, stage.inputs, stage.outputs, folder / f"{stage.name}.onnx")
        exported.append(_export(contract, stage.module, trials, tolerance))
        gc.collect()  # graphs and evaluators hold themselves in cycles, and weights of the stage with them
        give_back(stage.module)
        if progress is not None:
            progress(done, len(stages.stages))
    return tuple(exported)


def export_module(
    module: nn.Module,
    example_inputs: Mapping[str, Tensor],
    output_names: Sequence[str],
    path: Path,
    *,
    kind: str,
    constants: Mapping[str, Any] | None = None,
    tolerance: float | None = None,
    others: OtherSizes = NONE,
) -> ExportedStage:
    """Export a whole module, called with `example_inputs` and `constants` as keyword arguments.

    Args:
        module: in eval mode; returns a tensor, or a tuple or dict of tensors.
        example_inputs: tensors by name, batch 2 or more in dimension 0.
        output_names: one per output of the module, in order.
        path: where the ONNX file goes; its stem is the stage's name.
        kind: what the manifest calls the stage (`text_encoder`, `decoder`, …).
        constants: further keyword arguments, baked in.
        tolerance: largest relative error; by default as `TOLERANCES` has it.
        others: sizes that it shall take as well.

    Raises:
        ModelError: a module that ONNX cannot express, or that differs from torch by more than the tolerance.
    """
    if module.training:
        raise ModelError(f"{type(module).__name__} is in training mode: expected eval mode; call .eval() first")
    bound = Bound(module, constants).eval()

    def run(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            results = bound({name: tensors[name] for name in example_inputs})
        if len(results) != len(output_names):
            raise ModelError(
                f"{type(module).__name__} returns {len(results)} tensors: expected {len(output_names)} "
                f"({', '.join(output_names)}); name every output"
            )
        return {**tensors, **dict(zip(output_names, results, strict=True))}

    trials = _Trials(
        batches=[run(tensors) for tensors in _resize_batch(example_inputs)],
        sizes=[run(dict(inputs)) for inputs in others.inputs[1:]],
        book=others.book,
    )
    contract = _Contract(path.stem, kind, tuple(example_inputs), tuple(output_names), path)
    return _export(contract, bound, trials, tolerance)


def run_exported(exported: Sequence[ExportedStage], inputs: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Run exported stages one after the other on the CPU (`evaluators`); every tensor by name, inputs included."""
    tensors = {name: array_from_tensor(value) for name, value in inputs.items()}
    for stage in exported:
        run = load_evaluator(stage.path, _dtypes(stage.inputs, stage.outputs))
        tensors.update(_run(run, stage.inputs, stage.outputs, tensors))
    return tensors


def end_to_end_error(exported: Sequence[ExportedStage], inputs: Mapping[str, Tensor], reference: Tensor) -> float:
    """max |chain − reference| / max |reference|, the chain being all stages on the CPU.

    Args:
        exported: stages in order; the first output of the last one is compared.
        inputs: the inputs of the model by name, any batch.
        reference: the model output in torch for the same inputs.
    """
    result = run_exported(exported, inputs)[exported[-1].outputs[0].name]
    return relative_error(result, array_from_tensor(reference))


def relative_error(received: NDArray[Any], expected: NDArray[Any]) -> float:
    """max |received − expected| / max |expected|; infinite where shapes differ or a value is not finite.

    >>> relative_error(np.array([1.0, 2.5]), np.array([1.0, 2.0]))
    0.25
    >>> relative_error(np.zeros(2), np.zeros(3))
    inf
    >>> relative_error(np.array([np.nan]), np.array([1.0]))
    inf
    """
    if received.shape != expected.shape:
        return float("inf")
    a, b = received.astype(np.float64), expected.astype(np.float64)
    difference, scale = np.abs(a - b).max(initial=0.0), np.abs(b).max(initial=0.0)
    error = float(difference / scale) if scale > 0 else float(difference)
    return error if np.isfinite(error) else float("inf")


# --- trials: the same inputs at several batch sizes


@dataclass(frozen=True, kw_only=True)
class _Trials:
    """All tensors of a chain of stages, several times."""

    batches: list[dict[str, Tensor]]
    """At several batch sizes, the example first."""
    sizes: list[dict[str, Tensor]]
    """At other sizes, with the example's batch."""
    book: SymbolBook

    @property
    def example(self) -> dict[str, Tensor]:
        return self.batches[0]


def _resize_batch(inputs: Mapping[str, Tensor], constants: Sequence[str] = ()) -> list[dict[str, Tensor]]:
    """The example itself, and the same with one sample more and with a single one."""
    sizes = {name: value.shape[0] for name, value in inputs.items() if name not in constants}
    (batch, *others) = set(sizes.values())
    if others or batch < 2:
        raise ModelError(f"example inputs have batch sizes {sizes}: expected one size of 2 or more; repeat the example")
    return [
        dict(inputs),
        *(
            {name: value if name in constants else _resize(value, size) for name, value in inputs.items()}
            for size in (batch + 1, 1)
        ),
    ]


def _resize(value: Tensor, batch: int) -> Tensor:
    """Repeat the samples of an example in turn, floating-point ones scaled so that no two are equal."""
    samples = value[torch.arange(batch, device=value.device) % value.shape[0]]
    if not value.is_floating_point():
        return samples
    scale = torch.linspace(1.0, 0.75, batch, device=value.device, dtype=value.dtype)
    return samples * scale.reshape(-1, *[1] * (value.dim() - 1))


# --- one file


@dataclass(frozen=True)
class _Contract:
    """What a file is made by: its name and kind in the manifest, names of its tensors, and where it goes."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    path: Path


def _export(contract: _Contract, module: nn.Module, trials: _Trials, tolerance: float | None) -> ExportedStage:
    """Trace a module, write it as ONNX, and compare the file with torch in every trial but the first.

    Args:
        contract: names, kind and path.
        module: takes the inputs by position or, if it is a `Bound`, as one dict.
        trials: all tensors of the chain; the example is traced.
        tolerance: largest relative error; by default as `TOLERANCES` has it.

    Raises:
        ModelError: as `export_stages`.
    """
    inputs = tuple(_describe(contract.name, name, trials) for name in contract.inputs)
    outputs = tuple(_describe(contract.name, name, trials) for name in contract.outputs)
    example = {name: trials.example[name].detach() for name in contract.inputs}
    static = [info.name for info in inputs if "batch" not in info.shape]
    dimensions = {info.name: [d for d, symbol in enumerate(info.symbols) if symbol is not None] for info in inputs}
    # The fused kernels lay their output out in memory as the decomposed attention does not: a view traced after one
    # fails.
    with sdpa_kernel(SDPBackend.MATH):
        program = export_program(f"stage {contract.name}", module, example, static=static, dimensions=dimensions)
        model = _convert(contract, program)
    _check_operators(contract, model)
    _normalise(model, inputs, outputs)
    _save(model, contract.path)

    run = load_evaluator(contract.path, _dtypes(inputs, outputs))
    error = 0.0
    for tensors in (*trials.batches[1:], *trials.sizes):
        feed = {info.name: array_from_tensor(tensors[info.name]) for info in inputs}
        results = _run(run, inputs, outputs, feed)
        for name in contract.outputs:
            error = max(error, relative_error(results[name], array_from_tensor(tensors[name])))
    allowed = (
        tolerance
        if tolerance is not None
        else max(TOLERANCES.get(trials.example[n].dtype, 0.0) for n in contract.outputs)
    )
    if not error <= allowed:
        raise ModelError(
            f"stage {contract.name}: its ONNX form differs from torch by {error:.3g}, relative to the largest output: "
            f"expected at most {allowed:.3g}; compute in float32, or raise the tolerance if this precision is meant"
        )
    return ExportedStage(contract.name, contract.kind, contract.path, inputs, outputs, error)


def _describe(stage: str, name: str, trials: _Trials) -> TensorInfo:
    """Describe a tensor: `batch` in dimension 0 where that is the batch in every trial, and what follows other sizes.

    Raises:
        ModelError: a dtype that manifests do not have, or a dimension beside the first that varies with the batch.
    """
    values = [tensors[name] for tensors in trials.batches]
    sizes = [next(iter(tensors.values())).shape[0] for tensors in trials.batches]
    dtype = _DTYPES.get(values[0].dtype)
    if dtype is None:
        raise ModelError(
            f"stage {stage}: tensor {name!r} is {values[0].dtype}: expected one of {', '.join(_DTYPES.values())}; "
            "load the model in float32, float16 or bfloat16"
        )
    shapes = list(zip(*(value.shape for value in values), strict=True))
    shape: list[Any] = [per_trial[0] for per_trial in shapes]
    varying = [dimension for dimension, per_trial in enumerate(shapes) if len(set(per_trial)) > 1]
    if varying == [0] and list(shapes[0]) == sizes:
        shape[0] = "batch"
    elif varying:
        raise ModelError(
            f"stage {stage}: tensor {name!r} has shapes {[tuple(value.shape) for value in values]} at batch sizes "
            f"{sizes}: expected the batch in dimension 0 and no other dimension to vary with it; the model cannot be "
            "cut here"
        )
    others = [values[0].shape, *(tensors[name].shape for tensors in trials.sizes)]
    found = [trials.book.of(seen, f"stage {stage}: tensor {name!r}") for seen in zip(*others, strict=True)]
    symbols = tuple(symbol.name if symbol else None for symbol in found) if any(found) else ()
    return TensorInfo(name=name, dtype=dtype, shape=tuple(shape), symbols=symbols)


def _convert(contract: _Contract, program: torch.export.ExportedProgram) -> onnx_ir.Model:
    """The program in ONNX, as torch writes it. Raises ModelError for operators that have no form there."""
    try:
        with _quiet():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=contract.inputs,
                output_names=contract.outputs,
                verbose=False,
            )
    except Exception as error:
        raise ModelError(
            f"stage {contract.name} has no ONNX form: torch.onnx raised {reason_of(error)}; expected operators of "
            f"opset {OPSET} (complex numbers are none); replace the operator in the model, for example by real "
            "arithmetic"
        ) from error
    assert exported is not None
    return exported.model


def _check_operators(contract: _Contract, model: onnx_ir.Model) -> None:
    """Raise ModelError where the file would hold what readers refuse: see `schemas/operators.py`."""
    faults = [fault_of(node.op_type, node.domain) for node in model.graph.all_nodes()]
    faults += [f"the function {function.name}" for function in model.functions.values()]
    if found := next(filter(None, faults), None):
        raise ModelError(
            f"stage {contract.name} has {found} in its ONNX form: expected operators that every reader of artifacts "
            "takes, without loops and branches; write the layer with others"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports deprecations of its own and skipped conversions, which nobody can act on."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _normalise(model: onnx_ir.Model, inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo]) -> None:
    """Declare names and shapes; strip what tells of the build host or of the process."""
    graph = model.graph
    declared = {}
    for values, infos in ((graph.inputs, inputs), (graph.outputs, outputs)):
        for value, info in zip(values, infos, strict=True):
            value.name = info.name
            value.shape = onnx_ir.Shape(info.graph_shape)
            declared[id(value)] = value
    for holder in (model, graph, *model.functions.values()):
        _strip(holder)
    for value in (*graph.inputs, *graph.initializers.values()):
        _strip(value)
    for node in graph.all_nodes():
        _strip(node)
        for value in node.outputs:
            _strip(value)
            if id(value) not in declared:
                value.shape = None  # sizes of intermediate tensors carry symbols of the tracing process
                value.type = None
    for function in model.functions.values():
        for node in function.all_nodes():
            _strip(node)


def _strip(part: Any) -> None:
    """Drop what torch says of where a part came from: stack traces, paths, module names."""
    part.metadata_props.clear()
    part.doc_string = None


def _data_path(path: Path) -> Path:
    """Where the external data of an ONNX file lies.

    >>> _data_path(Path("engines/onnx/embed.onnx")).as_posix()
    'engines/onnx/embed.onnx.data'
    """
    return path.with_name(path.name + ".data")


def _save(model: onnx_ir.Model, path: Path) -> None:
    """Write the file, with weights of more than `EXTERNAL_BYTES` beside it, and check it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = _data_path(path)
    data.unlink(missing_ok=True)
    weights = sum(
        value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None
    )
    onnx_ir.save(model, path, external_data=data.name if weights > EXTERNAL_BYTES else None)
    onnx.checker.check_model(str(path), full_check=False)


# --- running


def _run(
    run: Run, inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo], tensors: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    names = [info.name for info in outputs]
    return dict(zip(names, run(names, {info.name: tensors[info.name] for info in inputs}), strict=True))


def _dtypes(inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo]) -> list[str]:
    return [info.dtype for info in (*inputs, *outputs)]
