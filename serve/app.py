"""The Ray Serve graph: HTTP in front of one network or several.

::

    HTTP -> Ingress (async; decodes in child processes of its own) -> Network (batches; one deployment a bundle)

The ingress does no heavy work on its event loop. Decoding scales with it and apart from the networks, because a compressed
radiograph can take longer to decode than the network takes to read it; and it stands beside the ingress rather than behind
another hop, because a hop costs more than decoding a picture does and would copy 10 MB to bring back 50 KB. What goes wrong
with one image fails only its own request.
"""

from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from cxr_ray import storage
from cxr_ray.bundle import read_description, required_size
from serve.answering import Answering, Model
from serve.decoder_pool import DecoderPool
from serve.graph_settings import DEFAULT_MODEL, GraphSettings
from serve.http.access import Guard
from serve.http.application import serving_api
from serve.http.services import Services
from serve.intake import Intake
from serve.log_files import log_as_replica
from serve.logs import log_request
from serve.metrics import RequestMetrics
from serve.network import Network, NetworkOptions
from serve.node.storage import StorageRules
from serve.spooled_intake import SpooledIntake
from serve.store import Store
from serve.trace import FinishedRequest

APPLICATION = "cxr-ray"
# Serve's own line of a request says less than ours, and could say the path.
SERVE_LOGGING = {"log_level": "WARNING", "enable_access_log": False}
# Requests without a body are answered beside those that are limited by `max_queued`.
_ONGOING_REQUESTS = 1000


@dataclass(frozen=True)
class Entrance:
    """Who is let in: `secret` is the token that the service was started with; without `required`, everybody is."""

    secret: str | None
    required: bool


@serve.deployment
@serve.ingress()
class Ingress:
    """HTTP, decoding, and the results store."""

    def __init__(
        self,
        models: dict[str, DeploymentHandle],
        shadow: DeploymentHandle | None,
        settings: GraphSettings,
        entrance: Entrance,
    ) -> None:
        log_as_replica(settings.log_folder, settings.log_level)
        asked = {name: Model(handle, settings.answer_seconds) for name, handle in models.items()}
        self._decoders = DecoderPool(
            settings.decoders, settings.max_queued + settings.max_images, max_seconds=settings.answer_seconds
        )
        self._decoders.start()
        store = Store(settings.store)
        answering = Answering(asked, self._decoders, store, settings.history_source)
        kept_aside = Model(shadow, settings.answer_seconds) if shadow else None
        intake = Intake(answering, store, asked[DEFAULT_MODEL], kept_aside)
        guard = Guard(entrance.secret, store.find_token, required=entrance.required)
        spooled = _spooled(settings)
        self._services = Services(settings, store, answering, intake, guard, spooled)
        self._watch = _Watch(self._decoders)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve asks for this once the constructor is through."""
        return serving_api(self._services, self._watch)

    def __del__(self) -> None:
        """End the decoders with their replica."""
        if hasattr(self, "_decoders"):
            self._decoders.close()


def _spooled(settings: GraphSettings) -> SpooledIntake | None:
    if settings.stow_spool is None:
        return None
    rules = StorageRules(settings.max_upload_mb * 1_000_000, settings.stow_min_free_mb * 1_000_000)
    return SpooledIntake(Path(settings.stow_spool), rules)


class _Watch(RequestMetrics):
    """Counts requests and logs a line for each."""

    def __init__(self, decoders: DecoderPool) -> None:
        super().__init__(lambda: decoders.queued)

    def finished(self, request: FinishedRequest) -> None:
        """See `RequestWatch`."""
        super().finished(request)
        log_request(request)


def build_graph(settings: GraphSettings, entrance: Entrance) -> Application:
    """Bind the deployments.

    Raises
    ------
    CxrRayError
        If a bundle cannot be used, or reads no image.
    """
    bundles = {DEFAULT_MODEL: settings.bundle, **settings.also}
    models = {name: _network(name, uri, settings) for name, uri in bundles.items()}
    shadow = _network("shadow", settings.shadow, settings) if settings.shadow else None
    # A new bundle replaces the network alone: what the ingress is made of does not name it.
    own = settings.model_copy(update={"bundle": "", "also": {}, "shadow": None, "thresholds": {}})
    ingress = Ingress.options(  # type: ignore[attr-defined]
        **_scaled(settings.fronts, settings.max_fronts, settings.decoders),
        max_ongoing_requests=_ONGOING_REQUESTS,
        max_surge_percent=100,
        ray_actor_options={"num_cpus": 0.1 + 0.1 * settings.decoders},
    )
    return ingress.bind(models, shadow, own, entrance)


def _network(name: str, uri: str, settings: GraphSettings) -> Application:
    uri = storage.absolute(uri)
    description = read_description(uri)
    required_size(description)
    options = NetworkOptions(
        bundle=uri,
        digest=description.digest,
        engine=settings.engine,
        threads=settings.threads,
        replicas=settings.max_replicas or settings.replicas,
        batch_size=settings.batch_size,
        batch_wait=settings.batch_wait,
        gpu=settings.gpu,
        drift_window=settings.drift_window,
        log_folder=settings.log_folder,
        log_level=settings.log_level,
    )
    deployment = Network.options(  # type: ignore[attr-defined]
        name="Network" if name == DEFAULT_MODEL else f"Network-{name}",
        **_scaled(settings.replicas, settings.max_replicas, settings.batch_size),
        # Batches fill only if as many requests may be under way: one that is computed, and one that gathers.
        max_ongoing_requests=2 * settings.batch_size,
        max_queued_requests=settings.max_queued + settings.max_images,
        # The old bundle answers until the new one is warm.
        max_surge_percent=100,
        user_config={"thresholds": settings.thresholds if name == DEFAULT_MODEL else {}},
        ray_actor_options={"num_cpus": settings.threads or 0.5, "num_gpus": 1 if settings.gpu else 0},
    )
    return deployment.bind(options)


def _scaled(least: int, most: int | None, ongoing: int) -> dict[str, object]:
    """A fixed number of replicas, or between two numbers so that each has about so many requests under way."""
    if most is None or most <= least:
        return {"num_replicas": least}
    scaling = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": ongoing}
    return {"autoscaling_config": scaling, "num_replicas": None}
