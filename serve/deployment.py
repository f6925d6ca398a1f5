"""The same graph for Serve's own tools: ``serve deploy config.yaml`` on a cluster, or a RayService on Kubernetes.

The configuration names `application` and gives it the settings; Serve's own fields go beside them. The token comes from
the environment of the process that deploys, never from the file.
"""

from pydantic import Field
from ray.serve import Application

from cxr_ray import storage
from cxr_ray.errors import UsageError
from serve.app import APPLICATION, SERVE_LOGGING, Entrance, build_graph
from serve.graph_settings import GraphSettings
from serve.store import Store
from serve.token import TOKEN_VARIABLE, read_token


class DeploymentSettings(GraphSettings):
    """Arguments of the application."""

    insecure: bool = Field(default=False, description="Answer everybody, without a token.")


def application(arguments: DeploymentSettings) -> Application:
    """Build the application; Serve calls this with the configuration's ``args``.

    Raises
    ------
    UsageError
        If there is no token that anybody could bring.
    CxrRayError
        If a bundle or the store cannot be used.
    """
    secret = read_token(None)
    store = Store(arguments.store)
    required = secret is not None or bool(store.tokens())
    store.close()
    if not required and not arguments.insecure:
        raise UsageError(
            f"there is no token: set {TOKEN_VARIABLE} where this is deployed, make one by 'cxr-ray token add', or set "
            "insecure: true in args"
        )
    graph = GraphSettings(**arguments.model_dump(include=set(GraphSettings.model_fields)))
    return build_graph(graph, Entrance(secret, required=required))


def serve_config(settings: GraphSettings, host: str, port: int) -> dict[str, object]:
    """What ``serve deploy`` reads, for these settings."""
    own = GraphSettings(**settings.model_dump(include=set(GraphSettings.model_fields)))
    # Serve starts the application in another folder.
    places = {name: storage.absolute(uri) for name, uri in (("bundle", own.bundle), ("shadow", own.shadow)) if uri}
    own = own.model_copy(update=places | {"also": {name: storage.absolute(uri) for name, uri in own.also.items()}})
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": host, "port": port},
        "logging_config": SERVE_LOGGING,
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": f"{__name__}:{application.__name__}",
                "args": own.model_dump(mode="json", exclude_defaults=True),
            }
        ],
    }
