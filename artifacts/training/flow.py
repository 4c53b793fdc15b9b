"""What the training scripts share: autoencoder and rectified-flow loops, Muon in float32, checks and their folder.

A script names its model, its data and how the model is called; everything here is a function of those and a seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from otcache.artifacts.training import scenes
from otcache.schemas.whole_files import whole_file

CAPTION_DROPOUT = 0.1
CHECKPOINT_STEPS = 250


def pixels(pictures: Tensor) -> Tensor:
    """uint8 [0, 255] → float32 [-1, 1].

    >>> pixels(torch.tensor([0, 255], dtype=torch.uint8)).tolist()
    [-1.0, 1.0]
    """
    return pictures.float() / 127.5 - 1


def zero_weights(model: nn.Module, chosen: Callable[[str], bool]) -> None:
    """Set weights and biases of the chosen layers (by name) to zero, so that residual branches start closed."""
    for name, module in model.named_modules():
        if chosen(name) and isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


@torch.no_grad()
def preserve_variance(model: nn.Module) -> None:
    """Draw convolutions anew so that they keep their input's variance (He et al., arXiv 1502.01852, gain 1); biases 0.

    torch's default shrinks it to a third in each layer, and a deep autoencoder then starts from almost nothing.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def train_autoencoder(
    vae: Any, pictures: Tensor, *, steps: int, batch: int = 8, rate: float = 2.5e-3, seed: int = 0
) -> Any:
    """Train an autoencoder with a squared, later also an absolute, error and a small pull on the latents' size.

    Args:
        vae: any diffusers autoencoder, which is trained in place.
        pictures: uint8 (n, 3, [frames,] height, width), as its `encode` takes them.
        steps: optimizer steps.
        batch: pictures of a step.
        rate: peak of the learning rate.
        seed: of the batches.
    """
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=1e-4)
    for step in range(steps):
        done = step / steps
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50) * (1 - done) ** 0.7
        real = pixels(pictures[torch.randint(len(pictures), (batch,))])
        posterior = vae.encode(real).latent_dist
        drawn = vae.decode(posterior.mean + 0.02 * torch.randn_like(posterior.mean)).sample
        loss = F.mse_loss(drawn, real) + 1e-4 * posterior.mean.square().mean()
        if done > 0.4:
            loss = loss + 0.5 * F.l1_loss(drawn, real)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            error = F.mse_loss((drawn + 1) / 2, (real + 1) / 2).item()
            print(f"autoencoder: step {step + 1}/{steps}, PSNR {-10 * np.log10(error):.1f} dB", flush=True)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode(vae: Any, pictures: Tensor, batch: int = 64) -> Tensor:
    """Latents float32 before scale and shift, of the posterior's mean."""
    return torch.cat([vae.encode(pixels(part)).latent_dist.mean for part in pictures.split(batch)])


def _orthogonalise(gradient: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Muon's Newton–Schulz iteration in float32: torch's own runs in bfloat16, which CPUs emulate ten times slower."""
    a, b, c = coefficients
    tall = gradient.size(0) > gradient.size(1)
    x = gradient.float().T if tall else gradient.float()
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


torch.optim._muon._zeropower_via_newtonschulz = _orthogonalise  # type: ignore[attr-defined]


def make_optimizers(model: nn.Module, rate: float = 1.5e-3) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest."""
    matrices = [
        p
        for name, p in model.named_parameters()
        if p.ndim == 2 and "blocks" in name and "norm" not in name and "_mod." not in name
    ]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def load_or_train(kind: Any, folder: Path, train: Callable[[], Any]) -> Any:
    """Load a model that an earlier run has kept, or train it and keep it.

    Args:
        kind: its class, of diffusers or transformers.
        folder: where it is kept.
        train: makes it, where the folder is not there.
    """
    if (folder / "config.json").exists():
        return kind.from_pretrained(folder).eval()
    model = train()
    model.save_pretrained(folder)
    return model


class Captioned(Protocol):
    """What a picture or clip shows, in two wordings."""

    @property
    def caption(self) -> str: ...

    @property
    def long_caption(self) -> str: ...


def index_captions(chosen: Sequence[Captioned]) -> tuple[list[str], Tensor]:
    """Every caption once, sorted, and the indices of each sample's two wordings, int64 (n, 2).

    >>> names = {"shape": "ring", "size": "medium", "texture": "plain", "background": "black"}
    >>> red, blue = scenes.Scene(colour="red", **names), scenes.Scene(colour="blue", **names)
    >>> wordings, captions = index_captions([red, blue, red])
    >>> wordings[:2], captions.tolist()
    (['a blue ring on a black background', 'a blue ring on black'], [[3, 2], [1, 0], [3, 2]])
    """
    wordings = sorted({caption for each in chosen for caption in (each.caption, each.long_caption)})
    order = {caption: i for i, caption in enumerate(wordings)}
    return wordings, torch.tensor([[order[each.caption], order[each.long_caption]] for each in chosen])


def train_transformer(
    make: Callable[[], nn.Module],
    predict: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor],
    latents: Tensor,
    captions: Tensor,
    empty: int,
    *,
    steps: int,
    checkpoint: Path,
    batch: int = 64,
    rate: float = 1.5e-3,
    seed: int = 0,
) -> Any:
    """Train rectified flow (arXiv 2209.03003) with caption dropout; returns a moving average of the weights.

    Args:
        make: makes an untrained model.
        predict: (model, noisy latents, sigma (batch,), index of the caption (batch,)) → velocity, as the latents.
        latents: float32 (n, …), scaled.
        captions: indices of each sample's captions, int64 (n, wordings).
        empty: index of the empty caption.
        steps: optimizer steps in all.
        checkpoint: file from which an interrupted run goes on, written every `CHECKPOINT_STEPS`.
        batch: samples of a step.
        rate: peak of the learning rate.
        seed: of weights and batches.
    """
    torch.manual_seed(seed)
    model = make().train()
    average = make().requires_grad_(False)
    optimizers = make_optimizers(model, rate)
    start, losses = _restore(checkpoint, model, average, optimizers), []
    for step in range(start, steps):
        done = step / steps
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 100) * min(1.0, max(0.02, 2.0 * (1 - done)))
        data, noise, sigma, caption = _draw_batch(latents, captions, empty, batch)
        noisy = torch.lerp(data, noise, sigma.reshape(-1, *[1] * (data.ndim - 1)))
        loss = F.mse_loss(predict(model, noisy, sigma, caption), noise - data)
        _update(model, optimizers, loss)
        _average_weights(average, model, decay=min(0.998, (step + 1) / (step + 10)))
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            recent = losses[-100:]
            print(f"transformer: step {step + 1}/{steps}, loss {sum(recent) / len(recent):.4f}", flush=True)
        if (step + 1) % CHECKPOINT_STEPS == 0:
            state = {
                "model": model.state_dict(),
                "average": average.state_dict(),
                "step": step + 1,
                "random": torch.get_rng_state(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            }
            with whole_file(checkpoint) as part:
                torch.save(state, part)
    return average.eval()


def _restore(checkpoint: Path, model: nn.Module, average: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """Load the state of an interrupted run, and return the step that it goes on with: 0 where there is none."""
    if not checkpoint.exists():
        average.load_state_dict(model.state_dict())
        return 0
    state = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    torch.set_rng_state(state["random"])
    return int(state["step"])


def _update(model: nn.Module, optimizers: list[torch.optim.Optimizer], loss: Tensor) -> None:
    """One step of every optimizer, with gradients of norm 1 at most."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()


@torch.no_grad()
def _average_weights(average: nn.Module, model: nn.Module, *, decay: float) -> None:
    """Move an exponential moving average by a share of 1 − decay towards the model, in place."""
    for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)


def _draw_batch(latents: Tensor, captions: Tensor, empty: int, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw samples, noise (both as `latents`), noise levels float32 (batch,) in (0, 1), and indices of captions.

    Levels are logit-normal (arXiv 2403.03206) with a part that is uniform, both shifted towards noise.
    """
    index = torch.randint(len(latents), (batch,))
    data = latents[index]
    noise = torch.randn_like(data)
    caption = captions[index, torch.randint(captions.shape[1], (batch,))]
    caption = torch.where(torch.rand(batch) < CAPTION_DROPOUT, empty, caption)
    uniform = torch.sigmoid(torch.randn(batch))
    uniform = torch.where(torch.rand(batch) < 0.15, torch.rand(batch), uniform)
    return data, noise, 1.6 * uniform / (1 + 0.6 * uniform), caption


def caption_shares(pictures: Sequence[np.ndarray], chosen: Sequence[scenes.Scene]) -> dict[str, float]:
    """Shares in [0, 1] of pictures with the colour, ground and shape of their caption, read from the pixels.

    Args:
        pictures: uint8 (height, width, 3) each.
        chosen: what the caption of each says.
    """
    found = [scenes.read_colours(picture) for picture in pictures]
    colour = np.asarray([name == scene.colour for (name, _), scene in zip(found, chosen, strict=True)])
    ground = np.asarray([name == scene.background for (_, name), scene in zip(found, chosen, strict=True)])
    shape = np.asarray([scenes.read_shape(p) == scene.shape for p, scene in zip(pictures, chosen, strict=True)])
    shares = {"colour": colour, "background": ground, "both": colour & ground, "shape": shape}
    return {name: round(float(values.mean()), 4) for name, values in shares.items()}


def contact_sheet(pictures: np.ndarray, columns: int = 8, scale: int = 2) -> Image.Image:
    """Pictures uint8 (n, height, width, 3) side by side, enlarged."""
    count, height, width, _ = pictures.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + 2) + 2, columns * (width + 2) + 2, 3), 255, dtype=np.uint8)
    for i, picture in enumerate(pictures):
        y, x = 2 + (i // columns) * (height + 2), 2 + (i % columns) * (width + 2)
        sheet[y : y + height, x : x + width] = picture
    image = Image.fromarray(sheet)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)


def weights_bytes(folder: Path) -> int:
    """Size of all weights in a diffusers folder."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def save_half(pipeline: Any, folder: Path) -> None:
    """Save a pipeline in float16, with configs that have transformers load its text encoders in float32.

    transformers 5 loads weights in the dtype that their config names, diffusers in float32 where nothing else is asked
    for; as saved, `DiffusionPipeline.from_pretrained(folder)` would hold both and could not be called.
    """
    pipeline.to(torch.float16).save_pretrained(folder)
    for path in folder.glob("text_encoder*/config.json"):
        path.write_text(path.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


def write_call(folder: Path, **arguments: int | str) -> None:
    """Write how the model is called, where its pipeline's defaults mean another size (`models.model.CallDefaults`)."""
    (folder / "call.json").write_text(json.dumps(arguments, indent=1) + "\n")
