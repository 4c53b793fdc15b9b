"""The bundled models' data, readers, tokenizers and training loop; and that each folder runs with stock diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

from otcache.artifacts.training import flow, qwen, scenes, video

MODELS = Path(__file__).parents[2] / "artifacts" / "models"
TRAINED = ("shapes", "shapes-qwen", "shapes-video")


def test_readers_name_what_was_drawn():
    pictures, chosen = qwen.make_dataset(64, seed=3)
    shares = flow.caption_shares(list(pictures[:, :, 0].permute(0, 2, 3, 1).numpy()), chosen)
    assert shares["both"] == 1.0 and shares["shape"] >= 0.9
    wrong = [
        scenes.Scene(shape=s.shape, colour=s.background, size=s.size, texture=s.texture, background=s.colour)
        for s in chosen
    ]
    assert flow.caption_shares(list(pictures[:, :, 0].permute(0, 2, 3, 1).numpy()), wrong)["both"] == 0.0


def test_motion_is_read_in_both_directions():
    clips, chosen = video.make_dataset(24, seed=3)
    frames = clips.permute(0, 2, 3, 4, 1).numpy()
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    for clip, shown in zip(chosen, frames, strict=True):
        assert video.read_motion(shown) == clip.motion
        assert video.read_motion(shown[::-1]) == opposite[clip.motion]
    assert video.read_motion(np.repeat(frames[0][:1], 13, axis=0)) == ""


def test_templates_have_the_length_that_the_pipelines_drop():
    tokenizer = qwen.make_tokenizer()
    caption = "a small red ring on a blue background"
    pipeline = qwen.make_pipeline(qwen.make_autoencoder(), tokenizer, None, qwen.make_transformer())
    ids = tokenizer(pipeline.prompt_template_encode.format(caption)).input_ids
    assert tokenizer.decode(ids[pipeline.prompt_template_encode_start_idx :]).startswith(caption)
    llama, _ = video.make_tokenizers()
    caption = "a red ring on a blue background moving left"
    ids = llama(DEFAULT_PROMPT_TEMPLATE["template"].format(caption)).input_ids
    assert llama.decode(ids[DEFAULT_PROMPT_TEMPLATE["crop_start"] :]) == caption + "<|eot_id|>"
    assert len(ids) - DEFAULT_PROMPT_TEMPLATE["crop_start"] <= video.TEXT_LENGTH


def test_single_frame_convolutions_change_no_value():
    pictures, _ = qwen.make_dataset(4, seed=0)
    torch.manual_seed(0)
    vae = qwen.make_autoencoder()
    for parameter in vae.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    plain = flow.encode(vae, pictures)
    with qwen.single_frame():
        fast = flow.encode(vae, pictures)
    torch.testing.assert_close(fast, plain)


class Velocity(torch.nn.Module):
    """A small model of velocities, with matrices for each of the optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(5, 6), torch.nn.Linear(6, 4)])
        self.captions = torch.nn.Embedding(4, 4)

    def forward(self, noisy, sigma, caption):
        return self.blocks[1](self.blocks[0](torch.cat([noisy, sigma[:, None]], dim=1)).relu()) + self.captions(caption)


def test_interrupted_training_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    monkeypatch.setattr(flow, "CHECKPOINT_STEPS", 3)
    latents = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    captions = torch.arange(32).reshape(16, 2) % 3

    def train(name: str, fails_at: int | None = None) -> dict[str, torch.Tensor]:
        calls = 0

        def predict(model, noisy, sigma, caption):
            nonlocal calls
            calls += 1
            if calls == fails_at:
                raise KeyboardInterrupt
            assert noisy.shape == (8, 4) and sigma.shape == caption.shape == (8,)
            assert ((sigma > 0) & (sigma < 1)).all()
            return model(noisy, sigma, caption)

        return flow.train_transformer(
            Velocity, predict, latents, captions, 3, steps=7, checkpoint=tmp_path / name, batch=8
        ).state_dict()

    whole = train("whole.pt")
    with pytest.raises(KeyboardInterrupt):
        train("interrupted.pt", fails_at=5)
    resumed = train("interrupted.pt")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    torch.manual_seed(0)
    assert not torch.equal(whole["blocks.0.weight"], Velocity().state_dict()["blocks.0.weight"])


def test_what_is_kept_is_not_trained_again(tmp_path):
    trained = []

    def train():
        trained.append(qwen.make_transformer())
        return trained[-1]

    first = flow.load_or_train(type(qwen.make_transformer()), tmp_path / "transformer", train)
    second = flow.load_or_train(type(first), tmp_path / "transformer", train)
    assert trained == [first] and not second.training
    assert all(torch.equal(value, first.state_dict()[name]) for name, value in second.state_dict().items())


@pytest.mark.parametrize("name", TRAINED)
def test_folder_loads_and_runs(name: str):
    folder = MODELS / name
    assert flow.weights_bytes(folder) <= 15_000_000
    prompts = (folder / "prompts.txt").read_text().splitlines()
    assert len(prompts) == len(set(prompts)) == 128
    shares = json.loads((folder / "check.json").read_text())
    assert shares["both"] >= 0.9 and shares.get("motion", 1.0) >= 0.9
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    call = {"height": 48, "width": 48, "negative_prompt": ""}
    if (folder / "call.json").exists():
        call |= json.loads((folder / "call.json").read_text())
    output = pipeline(
        prompts[:1],
        **call,
        true_cfg_scale=4.0,
        num_inference_steps=4,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    )
    assert np.isfinite(output[0]).all() and output[0].std() > 0.02
