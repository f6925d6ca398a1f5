"""The DICOM node as one process runs it: listener, spool and dispatcher.

It imports neither Ray nor torch: `cxr-ray listen` is a small process that can stand beside a PACS.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pydantic import Field, SecretStr

from cxr_ray.settings import Settings
from serve.logs import LogFormat, LogLevel
from serve.node.dispatch import Dispatcher
from serve.node.listener import Listener, ListenerSettings
from serve.node.service_client import DispatchSettings
from serve.node.spool import Spool
from serve.token import TOKEN_VARIABLE

_KEEP_DONE_SECONDS = 7 * 24 * 3600.0


class NodeSettings(Settings):
    """Settings of the DICOM node: where it listens and where it keeps what it accepted."""

    spool: Path = Field(Path("cxr-ray-spool"), description="Folder of accepted instances, on a local disk.")
    listener: ListenerSettings = Field(default_factory=ListenerSettings, description="Whom and what to accept.")
    dispatch: DispatchSettings = Field(default_factory=DispatchSettings, description="The service to ask.")


class ListenSettings(NodeSettings):
    """Settings of `cxr-ray listen`: the node of a service that runs elsewhere."""

    token_file: Path | None = Field(None, description=f"File with the service's token; else the variable {TOKEN_VARIABLE}.")
    log_format: LogFormat = Field("auto", description="json, text, or auto: text on a terminal.")
    log_level: LogLevel = Field("info", description="Least that is logged: debug, info or warning.")


@contextmanager
def dicom_node(settings: NodeSettings, *, service_url: str | None, token: str | None) -> Iterator[Listener]:
    """Run listener and dispatcher in this process.

    Parameters
    ----------
    service_url
        Overrides the URL of `settings.dispatch`; None keeps it.
    """
    given = settings.dispatch.model_dump(exclude={"token"})
    given |= {"service_url": service_url} if service_url else {}
    secret = token or (settings.dispatch.token.get_secret_value() if settings.dispatch.token else None)
    with ExitStack() as stack:
        spool = Spool(settings.spool)
        spool.sweep(_KEEP_DONE_SECONDS)
        dispatcher = stack.enter_context(
            Dispatcher(DispatchSettings(**given, token=SecretStr(secret) if secret else None), spool)
        )
        yield stack.enter_context(Listener(settings.listener, spool, dispatcher.notify))
