"""The networks of combinations, layer by layer in numpy: what a plan of them computes, at whatever shapes."""

from __future__ import annotations

import host_device
import numpy as np
import pytest
import small_artifact as small
from sized_artifact import with_sizes

from otcache.runtime.artifact.reader import Artifact
from otcache.runtime.build.network import add_combination, create_network
from otcache.runtime.engines.tensorrt_library import error_log
from otcache.runtime.loop.backend import DTYPES
from otcache.schemas.arithmetic import update_latents
from otcache.schemas.combinations import COEFS, combinations
from otcache.schemas.program import Means, Slopes, Step

trt = pytest.importorskip("tensorrt_rtx")
ELEMENTWISE = {
    trt.ElementWiseOperation.SUM: np.add,
    trt.ElementWiseOperation.SUB: np.subtract,
    trt.ElementWiseOperation.PROD: np.multiply,
    trt.ElementWiseOperation.DIV: np.divide,
    trt.ElementWiseOperation.MAX: np.maximum,
    trt.ElementWiseOperation.MIN: np.minimum,
    trt.ElementWiseOperation.FLOOR_DIV: np.floor_divide,
}
UNARY = {trt.UnaryOperation.SQRT: np.sqrt, trt.UnaryOperation.LOG: np.log}
TYPES = {trt.DataType.FLOAT: np.float32, trt.DataType.HALF: np.float16}


def constant(layer):
    return np.array(layer.weights).reshape(tuple(layer.shape))


def sliced(layer, tensor, begin=None, size=None):
    begin, size = (layer.start, layer.shape) if begin is None else (begin, size)
    assert set(layer.stride) == {1} and all(b + s <= most for b, s, most in zip(begin, size, tensor.shape, strict=True))
    return tensor[tuple(slice(b, b + s) for b, s in zip(begin, size, strict=True))]


def reduced(layer, tensor):
    assert layer.keep_dims
    axes = tuple(axis for axis in range(tensor.ndim) if layer.axes >> axis & 1)
    return {trt.ReduceOperation.SUM: np.sum, trt.ReduceOperation.AVG: np.mean}[layer.op](
        tensor, axis=axes, keepdims=True
    )


LAYERS = {
    trt.LayerType.CAST: (trt.ICastLayer, lambda layer, x: x.astype(TYPES[layer.to_type])),
    trt.LayerType.CONCATENATION: (trt.IConcatenationLayer, lambda layer, *xs: np.concatenate(xs, layer.axis)),
    trt.LayerType.CONSTANT: (trt.IConstantLayer, constant),
    trt.LayerType.ELEMENTWISE: (trt.IElementWiseLayer, lambda layer, x, y: ELEMENTWISE[layer.op](x, y)),
    trt.LayerType.IDENTITY: (trt.IIdentityLayer, lambda layer, x: x),
    trt.LayerType.REDUCE: (trt.IReduceLayer, reduced),
    trt.LayerType.SHAPE: (trt.IShapeLayer, lambda layer, x: np.array(x.shape)),
    trt.LayerType.SHUFFLE: (trt.IShuffleLayer, lambda layer, x: x.reshape(tuple(layer.reshape_dims))),
    trt.LayerType.SLICE: (trt.ISliceLayer, sliced),
    trt.LayerType.UNARY: (trt.IUnaryLayer, lambda layer, x: UNARY[layer.op](x)),
}


def executed(network, inputs):
    values = dict(inputs)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kind, compute = LAYERS[layer.type]
        reads = [values[layer.get_input(number).name] for number in range(layer.num_inputs)]
        layer.__class__ = kind
        values[layer.get_output(0).name] = compute(layer, *reads)
    return values[network.get_output(0).name]


def step_of(combination, coefs):
    """The step whose update a combination with these coefficients is."""
    count = len(combination.terms)
    parts = [coefs[start : start + count] for start in range(0, len(coefs) - count + 1, count)]
    follows = combination.kind == "follow"
    plain, *rest = parts
    means = rest.pop(0) if combination.means else None
    slopes = rest.pop(0) if follows else None
    mean_slopes = rest.pop(0) if follows and means else [0.0]
    return Step(
        step_index=count,
        timestep=0.0,
        latent_coef=plain[0],
        output_coefs=plain[1:],
        slopes=slopes and Slopes(centre=coefs[-2], spread=coefs[-1], latent_coef=slopes[0], output_coefs=slopes[1:]),
        means=means
        and Means(
            latent_coef=means[0],
            output_coefs=means[1:],
            latent_slope=mean_slopes[0],
            output_slopes=mean_slopes[1:],
        ),
    )


@pytest.mark.parametrize("guidance", ["none", "cfg", "cfg_norm"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_network_computes_its_combination(tmp_path, guidance, dtype):
    """For 1 and 3 samples of 1 and 5 tokens, whose number is the profile's: of every kind, with sums in float32."""
    manifest = Artifact.open(with_sizes(small.with_means(small.write_artifact(tmp_path / "small")))).manifest
    typed = lambda t: t.model_copy(update={"dtype": dtype}) if t.dtype == "float32" else t  # noqa: E731
    stages = tuple(
        stage.model_copy(update={side: tuple(map(typed, getattr(stage, side))) for side in ("inputs", "outputs")})
        for stage in manifest.stages
    )
    kind = manifest.guidance.model_copy(update={"kind": guidance})
    manifest = manifest.model_copy(update={"stages": stages, "guidance": kind})
    random, log, kinds = np.random.default_rng(0), error_log(trt), set()
    builder = trt.Builder(log)
    for one in combinations(manifest):
        kinds.add((one.kind, one.means))
        network = create_network(builder, trt)
        _constants = add_combination(trt, network, one)
        assert tuple(network.get_input(network.num_inputs - 1).shape) == (-1, -1, small.WIDTH)
        for samples, tokens in ((1, 1), (3, 5)):
            rows = samples if one.counts_samples else samples * one.branches
            inputs = {
                term.name: random.standard_normal((rows, tokens, small.WIDTH)).astype(DTYPES[term.dtype])
                for term in one.terms
            }
            if one.coefs:
                inputs[COEFS] = random.standard_normal(one.coefs).astype(np.float32)
                inputs[COEFS][-1] = abs(inputs[COEFS][-1]) + 0.5  # a spread, where the combination follows samples
            found, expected = executed(network, inputs), host_device.combine(one, **inputs)
            assert found.shape == expected.shape and found.dtype == expected.dtype == DTYPES[one.total.dtype], one.name
            exact = {"rtol": 1e-5, "atol": 1e-6} if found.dtype == np.float32 else {"rtol": 2e-3, "atol": 1e-3}
            np.testing.assert_allclose(found, expected, **exact, err_msg=one.name)
            if one.kind in ("update", "follow"):
                terms = [inputs[term.name].astype(np.float32) for term in one.terms]
                rule = update_latents(step_of(one, inputs[COEFS].tolist()), terms[0], terms[1:], outputs_first=True)
                np.testing.assert_allclose(found, rule, **exact, err_msg=one.name)
    plain = {"spread", "residual", "forecast", "guide", "update", "follow"}
    assert kinds == {*((kind, False) for kind in plain), ("update", True), ("follow", True)}
