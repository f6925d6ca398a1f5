"""How results reach a destination: one module for each way."""

from collections.abc import Callable

from serve.node.destinations import Destination, DicomDestination, SenderDestination, StowDestination
from serve.node.senders.association import EventReport
from serve.node.senders.c_store import DicomSender
from serve.node.senders.sender import Sender
from serve.node.senders.stow import StowSender
from serve.node.senders.webhook import WebhookSender


def sender_for(destination: Destination, event_report: EventReport, outstanding: Callable[[], bool]) -> Sender:
    """The sender of a destination; the two functions are for storage commitment, see `DicomSender`.

    Raises
    ------
    UsageError
        When a certificate that the settings name cannot be read.
    """
    if isinstance(destination, DicomDestination | SenderDestination):
        return DicomSender(destination, event_report, outstanding)
    return StowSender(destination) if isinstance(destination, StowDestination) else WebhookSender(destination)
