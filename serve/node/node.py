"""The DICOM node as one process runs it: listener, spool, dispatcher, assembler and delivery.

It imports neither Ray nor torch: `cxr-ray listen` is a small process that can stand beside a PACS.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from prometheus_client import CollectorRegistry
from pydantic import Field, SecretStr

from cxr_ray.settings import Settings
from serve.logs import LogFormat, LogLevel
from serve.node.assembly import Assembler, AssemblySettings
from serve.node.delivery import Delivery
from serve.node.destinations import DeliverySettings
from serve.node.dispatch import Dispatcher
from serve.node.listener import Listener, ListenerSettings
from serve.node.outbox import Outbox
from serve.node.priors_settings import PriorsSettings
from serve.node.results.settings import ResultSettings
from serve.node.service_client import DispatchSettings, service_client
from serve.node.spool import Spool
from serve.node.spool_place import usual_spool
from serve.node.spool_records import SpooledInstance
from serve.node.storage_commitment import CommitmentRegistry
from serve.node.sweeping import RetentionSettings, Sweeper
from serve.token import TOKEN_VARIABLE


class NodeSettings(Settings):
    """Settings of the DICOM node: where it listens, where it keeps what it accepted, and where results go."""

    spool: Path = Field(default_factory=usual_spool, description="Folder of accepted instances, on a local disk.")
    keep_done_days: float = Field(7, gt=0, description="How long settled instances are kept to recognise re-sends.")
    retention: RetentionSettings = Field(default_factory=RetentionSettings, description="How long the rest is kept.")
    listener: ListenerSettings = Field(default_factory=ListenerSettings, description="Whom and what to accept.")
    dispatch: DispatchSettings = Field(default_factory=DispatchSettings, description="The service to ask.")
    priors: PriorsSettings = Field(default_factory=PriorsSettings, description="Where to ask for a patient's earlier studies.")
    assembly: AssemblySettings = Field(default_factory=AssemblySettings, description="When a study is complete.")
    results: ResultSettings = Field(default_factory=ResultSettings, description="As whom results are signed.")
    delivery: DeliverySettings = Field(default_factory=DeliverySettings, description="Where results go.")


class ListenSettings(NodeSettings):
    """Settings of `cxr-ray listen`: the node of a service that runs elsewhere."""

    token_file: Path | None = Field(None, description=f"File with the service's token; else the variable {TOKEN_VARIABLE}.")
    log_format: LogFormat = Field("auto", description="json, text, or auto: text on a terminal.")
    log_level: LogLevel = Field("info", description="Least that is logged: debug, info or warning.")


@contextmanager
def dicom_node(settings: NodeSettings, *, service_url: str | None, token: str | None) -> Iterator[Listener]:
    """Run the node in this process.

    Parameters
    ----------
    service_url
        Overrides the URL of `settings.dispatch`; None keeps it.
    """
    given = settings.dispatch.model_dump(exclude={"token"})
    given |= {"service_url": service_url} if service_url else {}
    secret = token or (settings.dispatch.token.get_secret_value() if settings.dispatch.token else None)
    dispatch = DispatchSettings(**given, token=SecretStr(secret) if secret else None)
    registry = CollectorRegistry()
    with ExitStack() as stack:
        spool = Spool(settings.spool)
        stack.enter_context(Sweeper(spool, settings.keep_done_days, settings.retention))
        outbox = Outbox(settings.spool / "outbox")
        commitments = CommitmentRegistry(outbox)
        stack.enter_context(Delivery(settings.delivery, outbox, commitments, registry))
        assembler = None
        if settings.delivery.destinations:
            assembler = _assembler(stack, settings, dispatch, spool, outbox)
        else:
            # Of a time when there were destinations: nobody waits for results any more.
            for name in spool.answers.awaiting():
                spool.answers.settle(name)
        priors = None
        if settings.priors.kind != "off":
            from serve.node.priors import Priors  # noqa: PLC0415 - brings an image library that few nodes need

            priors = stack.enter_context(closing(Priors(settings.priors, dispatch.service_url, secret)))
        dispatcher = stack.enter_context(Dispatcher(dispatch, spool, _kept(spool, assembler) if assembler else None, priors))
        listener = Listener(
            settings.listener,
            spool,
            dispatcher.notify,
            on_association_end=(lambda *_association: assembler.notify()) if assembler else None,
            commitments=commitments if settings.delivery.asks_for_commitment else None,
            registry=registry,
        )
        yield stack.enter_context(listener)


def _assembler(
    stack: ExitStack,
    settings: NodeSettings,
    dispatch: DispatchSettings,
    spool: Spool,
    outbox: Outbox,
) -> Assembler:
    # They bring highdicom, which takes two seconds that a node without destinations need not wait for.
    from serve.node.study_record import Drawings  # noqa: PLC0415
    from serve.node.study_results import StudyResults  # noqa: PLC0415

    client = stack.enter_context(service_client(dispatch))
    results = StudyResults(spool, Drawings(client), outbox, settings.delivery.destinations, settings.results)
    return stack.enter_context(Assembler(settings.assembly, spool, results))


def _kept(spool: Spool, assembler: Assembler) -> Callable[[SpooledInstance, bytes], None]:
    """What becomes of an answered instance."""

    def keep(instance: SpooledInstance, answer: bytes) -> None:
        spool.answers.keep(instance.name, answer)
        assembler.notify()

    return keep
