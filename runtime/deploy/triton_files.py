"""A model repository of NVIDIA's Triton: `config.pbtxt`, and `1/model.py` with the artifact beside it."""

from __future__ import annotations

from pathlib import Path

from otcache.schemas.manifest import Manifest

from .settings import Settings

_HERE = Path(__file__).parent
LINES = ",\n"
_INPUTS = (
    ("prompt", "STRING"),
    ("negative_prompt", "STRING"),
    ("budget", "STRING"),
    ("seed", "INT64"),
    ("guidance_scale", "FP64"),
    ("height", "INT32"),
    ("width", "INT32"),
    ("num_frames", "INT32"),
)
"""Of a request, one value for each picture; all but the prompt may be left out."""


def artifact_place(settings: Settings) -> str:
    """The artifact's folder in the repository."""
    return f"{settings.name}/1/artifact"


def files_of(manifest: Manifest, settings: Settings) -> dict[str, str]:
    """Contents by path."""
    program = (_HERE / "triton" / "model.py").read_text(encoding="utf-8")
    return {f"{settings.name}/config.pbtxt": _config(manifest, settings), f"{settings.name}/1/model.py": program}


def _config(manifest: Manifest, settings: Settings) -> str:
    """A `ModelConfig` as protobuf's text, https://github.com/triton-inference-server/common (model_config.proto)."""
    inputs = [_tensor(name, kind, "1", optional=name != "prompt") for name, kind in _INPUTS]
    frames = "" if manifest.conditions.num_frames is None else "-1, "
    kind = {"cpu": "KIND_CPU", "cuda": "KIND_GPU"}[settings.device]
    where = {"cpu": "on the CPU", "cuda": "on every GPU that Triton sees"}[settings.device]
    return f"""\
# Prompts to pictures; 1/model.py says how.
backend: "python"
max_batch_size: {settings.max_batch}

input [
{LINES.join(inputs)}
]
output [
{_tensor("image", "UINT8", f"{frames}-1, -1, 3")}
]

# Requests that have come within this time are handed over together, and those of one budget, size and guidance are
# drawn in one run. What waits beyond the limits is refused.
dynamic_batching {{
  max_queue_delay_microseconds: {round(1e6 * settings.max_wait_s)}
  default_queue_policy {{
    max_queue_size: {settings.capacity}
    timeout_action: REJECT
    default_timeout_microseconds: {round(1e6 * settings.timeout_s)}
    allow_timeout_override: true
  }}
}}

# So many processes {where}, each with the artifact loaded.
instance_group [ {{ kind: {kind} count: {settings.instances} }} ]

parameters {{ key: "artifact" value {{ string_value: "{manifest.digest}" }} }}
parameters {{ key: "backend" value {{ string_value: "auto" }} }}
parameters {{ key: "threads" value {{ string_value: "{settings.threads or ""}" }} }}
"""


def _tensor(name: str, kind: str, dims: str, *, optional: bool = False) -> str:
    flag = " optional: true" if optional else ""
    return f'  {{ name: "{name}" data_type: TYPE_{kind} dims: [ {dims} ]{flag} }}'
