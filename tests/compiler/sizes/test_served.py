"""One artifact for several sizes: asked of the exporter, equal to the model and to the pipeline at each, with relations
that are true.
"""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
from model_zoo.pipelines import CASES
from torch import nn

from otcache.compiler.export.at_sizes import trunk_at
from otcache.compiler.export.onnx_stages import end_to_end_error, export_stages
from otcache.compiler.graph.cut import cut
from otcache.compiler.graph.dimensions import SpecialisedError, Varying
from otcache.compiler.graph.stages import run_in_turn
from otcache.compiler.models.load import load_model
from otcache.compiler.options import CompileOptions
from otcache.compiler.passes.compile import compile_model
from otcache.compiler.pipelines.arguments import PerSample
from otcache.compiler.pipelines.call import call_options
from otcache.compiler.pipelines.interface import Interface
from otcache.compiler.sizes.requested import wanted_from_options
from otcache.compiler.sizes.served import Seen, stages_for
from otcache.runtime import Sampler
from otcache.runtime.serving.request_size import Sizes
from otcache.schemas.errors import ModelError, RequestError
from otcache.schemas.sized import own_size

WIDTH = 6


class Places(nn.Module):
    """Positions of patches, from a size in Python numbers."""

    def forward(self, shapes):
        height, width = shapes
        return torch.arange(height * width, dtype=torch.float32)[:, None].expand(-1, WIDTH).sin()


class Toy(nn.Module):
    """Patches of 1 × 1 through two blocks. python_width: code that counts columns in Python, as some position tables
    do.
    """

    def __init__(self, *, python_width: bool = False) -> None:
        super().__init__()
        self.places = Places()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.python_width = python_width

    def forward(self, hidden_states, timestep, ids=None, shapes=None, return_dict=False):
        batch, channels, height, width = hidden_states.shape
        positions = torch.arange(height, dtype=torch.float32)
        if self.python_width:
            positions = positions + sum(0.1 for _ in range(width))
        x = (hidden_states + positions[:, None]).flatten(2).transpose(1, 2) + timestep[:, None, None]
        x = x if ids is None else x + ids
        x = x if shapes is None else x + self.places(shapes)
        for block in self.blocks:
            x = x + block(x).tanh()
        return (x.transpose(1, 2).reshape(batch, channels, height, width),)


def inputs_at(height, width):
    random = torch.Generator().manual_seed(height * 100 + width)
    return {
        "hidden_states": torch.randn(2, WIDTH, height, width, generator=random),
        "timestep": torch.rand(2, generator=random),
    }


def interface_with(**constants):
    return Interface(
        latents_input="hidden_states",
        timestep_input="timestep",
        timestep_scale=1.0,
        conditioning=(),
        constants={"return_dict": False, **constants},
        guided=False,
        stacked=False,
        positive_first=True,
        noise_shape=(1,),
        noise_split=(1,),
        noise_permutation=(0,),
        latents_shape=(1,),
    )


def cut_for(model, own, sizes, constants=lambda height, width: {}):
    """The stages of a toy for listed sizes, each 8 pixels a patch."""
    asked = wanted_from_options(own, sizes=sizes, frame_counts=None, text_lengths=None)
    seen = [
        Seen(
            point=point,
            call=None,
            interface=interface_with(**constants(point["height"] // 8, point["width"] // 8)),
            table=None,
            inputs=inputs_at(point["height"] // 8, point["width"] // 8),
        )
        for point in asked.probed(own)
    ]
    return stages_for(model.eval(), seen[0].interface, seen[0].inputs, asked, seen)


OWN = {"height": 24, "width": 32}


def test_stages_give_what_the_model_gives_at_every_size(tmp_path):
    model = Toy().eval()
    stages, sizes = cut_for(model, OWN, "40x16,24x48")
    exported = export_stages(stages, sizes.inputs()[0], tmp_path, others=trunk_at(sizes))
    for height, width in ((3, 4), (5, 2), (3, 6), (7, 9)):  # the last one is in no list
        inputs = inputs_at(height, width)
        (expected,) = model(**inputs)
        assert torch.equal(run_in_turn(stages, inputs)[stages.output], expected)
        assert end_to_end_error(exported, inputs, expected) < 1e-5
    symbols = {symbol.name: str(symbol) for symbol in sizes.book.symbols}
    assert symbols == {"h_by_8": "height/8", "w_by_8": "width/8", "hw_by_64": "height*width/64"}
    varying = [
        (t.shape[d], name)
        for s in exported
        for t in (*s.inputs, *s.outputs)
        for d, name in enumerate(t.symbols)
        if name
    ]
    assert {name for _, name in varying} == set(symbols)
    assert all(size > 1 for size, _ in varying), "torch.export treats a size of 1 as fixed"


def test_an_axis_that_the_model_fixes_is_given_up_with_the_reason():
    stages, sizes = cut_for(Toy(python_width=True), OWN, "40x32,24x48,40x48")
    assert [axis.name for axis in sizes.wanted.axes] == ["height"] and set(sizes.fixed) == {"width"}
    assert "fixes dimension 3 of hidden_states (4)" in sizes.fixed["width"]
    assert sizes.wanted.listed == ({"height": 24}, {"height": 40})
    inputs = inputs_at(5, 4)
    assert torch.equal(
        run_in_turn(stages, inputs)[stages.output], Toy.forward(_same_weights(stages, python_width=True), **inputs)[0]
    )


def _same_weights(stages, **options):
    toy = Toy(**options)
    weights = {key: value for stage in stages.stages for key, value in stage.module.state_dict().items()}
    toy.load_state_dict({key: weights[key.removeprefix("module.")] for key in toy.state_dict()})
    return toy.eval()


def test_the_cut_says_what_stays_fixed():
    with pytest.raises(SpecialisedError) as error:
        cut(
            Toy(python_width=True).eval(),
            inputs_at(3, 4),
            constants={"return_dict": False},
            varying=Varying(dimensions={"hidden_states": frozenset({2, 3})}),
        )
    assert error.value.fixed == {("hidden_states", 3)}


def test_a_size_of_one_is_no_example():
    with pytest.raises(ModelError, match="dimension 3 varies: expected an example of 2 or more"):
        cut(
            Toy().eval(),
            inputs_at(3, 1),
            constants={"return_dict": False},
            varying=Varying(dimensions={"hidden_states": frozenset({3})}),
        )


def test_constants_that_follow_the_size_become_inputs():
    def positions(height, width):
        return {"ids": torch.arange(height * width, dtype=torch.float32)[:, None].expand(-1, WIDTH).contiguous()}

    stages, sizes = cut_for(Toy(), OWN, "40x16", positions)
    assert sizes.constants == ("ids",) and stages.inputs == ("hidden_states", "timestep", "ids")
    model = _same_weights(stages)
    inputs = {**inputs_at(5, 2), **positions(5, 2)}
    assert torch.equal(run_in_turn(stages, inputs)[stages.output], model(**inputs)[0])


def test_a_constant_row_of_every_sample_is_repeated():
    def positions(height, width):
        row = torch.arange(height * width, dtype=torch.float32)[None, :, None].expand(-1, -1, WIDTH).contiguous()
        return {"ids": PerSample(row)}

    stages, sizes = cut_for(Toy(), OWN, "40x16", positions)
    assert sizes.constants == ("ids",) and stages.inputs == ("hidden_states", "timestep", "ids")
    inputs = {**inputs_at(5, 2), "ids": positions(5, 2)["ids"].row}
    expected = _same_weights(stages)(**{**inputs, "ids": inputs["ids"].expand(2, -1, -1)})[0]
    assert torch.equal(run_in_turn(stages, inputs)[stages.output], expected)


def test_what_a_part_makes_of_a_size_in_python_numbers_becomes_an_input():
    stages, sizes = cut_for(Toy(), OWN, "40x16", lambda height, width: {"shapes": [height, width]})
    assert sizes.constants == ("places_0",) and stages.inputs == ("hidden_states", "timestep", "places_0")
    assert not sizes.fixed
    inputs = inputs_at(5, 2)
    expected = _same_weights(stages)(**inputs, shapes=[5, 2])[0]
    assert torch.equal(run_in_turn(stages, {**inputs, "places_0": Places()([5, 2])})[stages.output], expected)


def test_constants_that_are_no_tensors_fix_their_axis():
    """The return type is asked for with a number that follows the height: nothing uses it, but nothing says so."""
    _, sizes = cut_for(Toy(), OWN, "40x32,24x48", lambda height, width: {"return_dict": [height]})
    assert set(sizes.fixed) == {"height"} and "passes return_dict, which follows it" in sizes.fixed["height"]
    assert [axis.name for axis in sizes.wanted.axes] == ["width"]


def test_a_number_that_more_than_a_table_depends_on_fixes_its_axis():
    class Scaled(Toy):
        def forward(self, hidden_states, timestep, shapes, return_dict):
            return (super().forward(hidden_states, timestep, shapes=shapes)[0] * shapes[0],)

    _, sizes = cut_for(Scaled(), OWN, "40x32,24x48", lambda height, width: {"shapes": [height, width]})
    assert set(sizes.fixed) == {"height", "width"} and "passes shapes, which follows it" in sizes.fixed["height"]


# --- whole pipelines


def artifact_of(name, folder, scheduler=None, **sizes):
    """A pipeline of the coverage suite, compiled for several sizes."""
    case, model = CASES[name], folder / "model"
    case.pipeline().save_pretrained(model)
    (model / "prompts.txt").write_text("\n".join(case.prompts) + "\n")
    if scheduler:
        path = model / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **scheduler}))
    options = CompileOptions(
        model=str(model),
        budgets=(2,),
        num_inference_steps=5,
        calibration_prompts=2,
        evaluation_prompts=2,
        trials=2,
        output=folder / "artifact",
        workspace=folder / "workspace",
        **case.call,
        **sizes,
    )
    return load_model(str(model)).pipeline, compile_model(options)[0]


def pipelines_own(pipeline, name, scale, size, output_type):
    case = CASES[name]
    options = call_options(pipeline, num_inference_steps=5, **{**case.call, **size})
    arguments = {**options.arguments(scale, 2), "output_type": output_type}
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    with torch.no_grad():
        return np.asarray(pipeline(case.prompts[:2], generator=generators, **arguments)[0])


def check_sizes(name, pipeline, artifact, sizes, pictures):
    """Budget `full` gives the pipeline's own latents at every size, and pictures where the decoder follows."""
    prompts = CASES[name].prompts[:2]
    with Sampler.load(artifact, "onnxruntime", 1) as sampler:
        own = functools.partial(pipelines_own, pipeline, name, sampler.manifest.guidance.scale)
        for size in sizes:
            length = size.get("max_sequence_length")
            encoded = sampler.encode(prompts, max_sequence_length=length)
            found, expected = sampler.sample(encoded, budget="full", seed=[3, 4], **size), own(size, "latent")
            assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected), size
            if pictures:
                found, expected = sampler(prompts, budget="full", seed=[3, 4], **size), own(size, "np")
                assert np.abs(found - expected).max() < 1e-4 < expected.std(), size
                assert np.isfinite(sampler(prompts, budget=2, seed=[3, 4], **size)).all()
            sized = Sizes(sampler.artifact).at(size).manifest
            assert sized.latents.shape == own(size, "latent").shape[1:], "the relations hold"
        tensors = [t for stage in sampler.manifest.stages for t in (*stage.inputs, *stage.outputs)]
        assert all(t.shape[d] > 1 for t in tensors for d, symbol in enumerate(t.symbols) if symbol)
        return sampler.manifest


@pytest.mark.long
def test_packed_latents_and_a_sampler_that_shifts_with_the_size(tmp_path):
    """FLUX: positions come from files, and each size has the programs of its own noise schedule."""
    name = "FluxPipeline"
    shift = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}
    pipeline, artifact = artifact_of(name, tmp_path, shift, sizes="16x16,32x24", text_lengths="8")
    sizes = [{}, {"height": 32, "width": 24}, {"height": 32, "width": 24, "max_sequence_length": 8}]
    manifest = check_sizes(name, pipeline, artifact, sizes, pictures=True)
    assert manifest.shapes.constants == ("img_ids", "txt_ids")
    programs = {entry.size["height"]: entry.programs for entry in manifest.shapes.sizes}
    assert not programs[16] and [entry.budget for entry in programs[32]] == ["full", "2"]
    assert programs[32][0].program != manifest.program("full").program
    assert programs[32][1].quality.psnr_db.mean > 20
    with (
        Sampler.load(artifact) as sampler,
        pytest.raises(RequestError, match="size is 16x24, 12 tokens: expected one of 16x16"),
    ):
        sampler.check("a", budget=2, width=24)


@pytest.mark.long
def test_a_range_of_sizes(tmp_path):
    """SD3: every size within the ranges, those in between as well; the text is two CLIPs' 77 tokens and T5's."""
    name = "StableDiffusion3Pipeline"
    pipeline, artifact = artifact_of(name, tmp_path, sizes="16x16:32x32:4", text_lengths="8:12:2")
    sizes = [{}, {"height": 28, "width": 20}, {"width": 24, "max_sequence_length": 10}]
    manifest = check_sizes(name, pipeline, artifact, sizes, pictures=True)
    assert own_size(manifest) == {"height": 16, "width": 16, "max_sequence_length": 12} and not manifest.shapes.sizes
    assert {"height/2", "width/2", "height*width/16"} <= {str(symbol) for symbol in manifest.shapes.symbols}
    with (
        Sampler.load(artifact) as sampler,
        pytest.raises(RequestError, match="height is 36: expected 16 to 32 in steps of 4"),
    ):
        sampler.check("a", budget=2, height=36)


@pytest.mark.long
def test_frames_of_a_video(tmp_path):
    """Wan: frames, height, width and text; its decoder loops over frames in Python: other counts give latents."""
    name = "WanPipeline"
    pipeline, artifact = artifact_of(name, tmp_path, frame_counts="3:9:2", sizes="16x16:48x32:16")
    manifest = check_sizes(
        name, pipeline, artifact, [{}, {"num_frames": 9}, {"num_frames": 7, "height": 32}], pictures=False
    )
    assert "(num_frames + 1)/2" in {str(symbol) for symbol in manifest.shapes.symbols}


@pytest.mark.long
def test_positions_that_follow_a_size_in_python_numbers(tmp_path):
    """Qwen-Image: its complex rotary tables are stored for each size, as pairs."""
    name = "QwenImagePipeline"
    pipeline, artifact = artifact_of(name, tmp_path, sizes="48x32", text_lengths="16")
    sizes = [{}, {"height": 48}, {"height": 48, "max_sequence_length": 16}]
    manifest = check_sizes(name, pipeline, artifact, sizes, pictures=False)
    assert manifest.shapes.constants == ("pos_embed_0", "pos_embed_1") and not manifest.shapes.fixed
    assert {tensor.name: tensor.shape[-1] for tensor in manifest.steady_inputs}["pos_embed_0"] == 2
