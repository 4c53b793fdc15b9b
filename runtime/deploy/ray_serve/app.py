"""An artifact of otcache on Ray Serve: the routes of `otc serve`, in as many replicas as the load asks for.

Written by `otc deploy --to ray-serve`; `serve run serve.yaml` in this folder starts it, on hosts that have otcache with
its extra [serve-ray]. `serve.yaml` has replicas and limits. Requests that come within `max_wait_s` enter a replica's
queue together, and those of one budget, size and guidance are drawn in one run; while the queue is long, a governor
lowers the budgets that are served.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve import Application

from otcache.runtime import Artifact, ArtifactError, Governor, HostError, OTCacheError, Sampler, Service
from otcache.runtime.server.app import make_app

ARTIFACT = Path(__file__).parent / "artifact"


class Arguments(BaseModel):
    """`args` of `serve.yaml`."""

    model_config = ConfigDict(extra="forbid")

    artifact: str
    """Digest of the artifact that was deployed."""
    backend: str = "auto"
    threads: int = 1
    max_batch: int = 4
    max_wait_s: float = 0.02
    capacity: int = 16
    timeout_s: float = 60.0
    lowest_budget: str | None = None


class Routes:
    """ASGI: the routes of the replica that this runs in."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":  # nothing has to be done at its start and end
            replica: Any = serve.get_replica_context().servable_object
            await replica.routes(scope, receive, send)


@serve.deployment
@serve.ingress(Routes())
class Pictures:
    """One replica: the artifact, loaded, behind a queue."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        """Verify the artifact that was deployed, every byte of it, and load it."""
        asked = Arguments.model_validate(arguments)
        artifact = Artifact.open(ARTIFACT)
        if artifact.manifest.digest != asked.artifact:
            raise ArtifactError(
                f"{ARTIFACT} is {artifact.manifest.digest}: expected {asked.artifact}, which serve.yaml names: deploy "
                "it again"
            )
        artifact.verify()
        sampler = Sampler.load(ARTIFACT, asked.backend, asked.threads)
        governor = Governor.of_queue(sampler.budgets, capacity=asked.capacity, lowest=asked.lowest_budget)
        self._service = Service(
            sampler,
            capacity=asked.capacity,
            max_batch=asked.max_batch,
            timeout_s=asked.timeout_s,
            governor=governor,
        )
        batching: Any = self.enqueue
        batching.set_max_batch_size(asked.max_batch)
        batching.set_batch_wait_timeout_s(asked.max_wait_s if asked.max_batch > 1 else 0.0)
        self.routes = make_app(self._service, self._submit)

    @serve.batch
    async def enqueue(self, requests: list[dict[str, Any]]) -> list[Any]:
        """Requests that have come close together → their futures, or the errors of those that are refused."""
        return list(self._service.submit_all(requests))

    async def _submit(self, options: dict[str, Any]) -> Any:
        found = await self.enqueue(options)
        if isinstance(found, OTCacheError):
            raise found
        return found

    def check_health(self) -> None:
        """Ray replaces a replica of which this fails."""
        if not self._service.is_alive:
            raise HostError("the service has ended: expected it to run: Ray starts the replica again")

    def __del__(self) -> None:
        if service := getattr(self, "_service", None):
            service.close()


def build(arguments: Arguments) -> Application:
    """What `import_path` names."""
    pictures: Any = Pictures
    return pictures.bind(arguments.model_dump())
