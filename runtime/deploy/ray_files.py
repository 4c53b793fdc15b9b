"""An application of Ray Serve: `app.py`, and `serve.yaml` with replicas, autoscaling and limits."""

from __future__ import annotations

import json
from pathlib import Path

from otcache.schemas.manifest import Manifest

from .settings import Settings

_HERE = Path(__file__).parent
GRACE_S = 30


def files_of(manifest: Manifest, settings: Settings) -> dict[str, str]:
    """Contents by path."""
    program = (_HERE / "ray_serve" / "app.py").read_text(encoding="utf-8")
    return {"app.py": program, "serve.yaml": _config(manifest, settings)}


def _config(manifest: Manifest, settings: Settings) -> str:
    """A `ServeDeploySchema` as YAML."""
    threads = settings.threads or 1
    return f"""\
# `serve run serve.yaml` in this folder, which has to be at the same place on every node.
proxy_location: EveryNode
http_options:
  host: 127.0.0.1
  port: 8000
applications:
  - name: {json.dumps(settings.name)}
    route_prefix: /
    import_path: app:build
    args:
      artifact: {json.dumps(manifest.digest)}
      backend: auto
      threads: {threads}
      max_batch: {settings.max_batch}
      max_wait_s: {settings.max_wait_s}
      capacity: {settings.capacity}
      timeout_s: {settings.timeout_s}
      lowest_budget: {json.dumps(settings.lowest_budget)}
    deployments:
      - name: Pictures
        # As many as a replica's queue and one run hold; what is more waits for another replica.
        max_ongoing_requests: {settings.capacity + settings.max_batch}
        max_queued_requests: {settings.capacity}
        # Replicas are added at half of the queue from which on budgets are lowered.
        autoscaling_config:
          min_replicas: 1
          max_replicas: {settings.instances}
          target_ongoing_requests: {max(1, settings.capacity // 4)}
          upscale_delay_s: 10
          downscale_delay_s: 300
        health_check_period_s: 10
        health_check_timeout_s: 30
        graceful_shutdown_timeout_s: {GRACE_S}
        ray_actor_options:
          num_cpus: {threads}
          num_gpus: {int(settings.device == "cuda")}
"""
