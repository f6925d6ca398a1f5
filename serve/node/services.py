"""Which service answers which message: verification, storage, and reports of storage commitment.

A presentation context belongs to the service of its abstract syntax. What a service does not know is answered with the
status "unrecognized operation"; its data set, if any, is received and dropped, and the association goes on.

References: PS3.4 annexes A (verification), B (storage), J (storage commitment), PS3.7 annex C (statuses).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from cxr_ray.transfer_syntaxes import EXPLICIT_BIG_ENDIAN, EXPLICIT_LITTLE_ENDIAN, IMPLICIT_LITTLE_ENDIAN
from serve.node.dimse import Answer, Command, CommandField
from serve.node.pdu import ContextAnswer, ContextResult, ProposedContext, RoleSelection
from serve.node.sop_classes import VERIFICATION

UNRECOGNIZED_OPERATION = 0x0211
PLAIN_SYNTAXES = (EXPLICIT_LITTLE_ENDIAN, IMPLICIT_LITTLE_ENDIAN, EXPLICIT_BIG_ENDIAN)


@dataclass(frozen=True)
class Context:
    """An accepted presentation context."""

    identifier: int
    abstract_syntax: str
    transfer_syntax: str


@dataclass(frozen=True)
class Peer:
    """Who is at the other end; `names` are those of the instances that it newly stored, as the spool has them.

    `on_stored`, if given, is called with each of them.
    """

    calling_ae: str
    address: str
    uri: str
    called_ae: str = ""
    names: list[str] = field(default_factory=list)
    on_stored: Callable[[str], None] | None = None

    def has_stored(self, name: str) -> None:
        """Note an instance that it newly stored."""
        self.names.append(name)
        if self.on_stored:
            self.on_stored(name)


class IncomingMessage(Protocol):
    """A message whose data set arrives."""

    def add(self, fragment: memoryview) -> None:
        """Take bytes of the data set, which stay as they are until `flush`."""

    def flush(self) -> None:
        """Have done with the bytes that were taken."""

    def finish(self) -> Answer:
        """Do what was asked for, once; what was taken has been flushed."""

    def close(self) -> None:
        """Let go of everything; without `finish`, of what was taken too."""


class Service(Protocol):
    """What answers the messages of some abstract syntaxes."""

    def transfer_syntaxes(self, abstract_syntax: str, proposed: tuple[str, ...]) -> tuple[str, ...] | None:
        """Those that it takes, most wanted first; None where the abstract syntax is not its own."""

    def begin(self, command: Command, context: Context, peer: Peer) -> IncomingMessage | None:
        """Take a message whose command is here; None where the operation is not its own."""

    def role(self, proposed: RoleSelection) -> RoleSelection | None:
        """Which of the proposed roles the peer may have; None where the abstract syntax is not its own."""


class Dropped:
    """A message whose data set is dropped and which has its answer already."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def add(self, _fragment: memoryview) -> None:
        """See `IncomingMessage`."""

    def flush(self) -> None:
        """See `IncomingMessage`."""

    def finish(self) -> Answer:
        """See `IncomingMessage`."""
        return self._answer

    def close(self) -> None:
        """See `IncomingMessage`."""


class Verification:
    """C-ECHO."""

    def transfer_syntaxes(self, abstract_syntax: str, _proposed: tuple[str, ...]) -> tuple[str, ...] | None:
        """See `Service`."""
        return PLAIN_SYNTAXES if abstract_syntax == VERIFICATION else None

    def begin(self, command: Command, _context: Context, _peer: Peer) -> IncomingMessage | None:
        """See `Service`."""
        return Dropped(Answer(0x0000)) if command.field == CommandField.C_ECHO else None

    def role(self, proposed: RoleSelection) -> RoleSelection | None:
        """See `Service`."""
        return RoleSelection(VERIFICATION, proposed.scu, scp=False) if proposed.sop_class == VERIFICATION else None


class Services:
    """The services of a node; the first that knows an abstract syntax has it."""

    def __init__(self, *services: Service) -> None:
        self._services = services

    def negotiate(self, proposed: ProposedContext) -> ContextAnswer:
        """Answer a proposed presentation context."""
        for service in self._services:
            wanted = service.transfer_syntaxes(proposed.abstract_syntax, proposed.transfer_syntaxes)
            if wanted is None:
                continue
            for syntax in wanted:
                if syntax and syntax in proposed.transfer_syntaxes:
                    return ContextAnswer(proposed.identifier, ContextResult.ACCEPTED, syntax)
            return ContextAnswer(proposed.identifier, ContextResult.TRANSFER_SYNTAXES_UNKNOWN)
        return ContextAnswer(proposed.identifier, ContextResult.ABSTRACT_SYNTAX_UNKNOWN)

    def role(self, proposed: RoleSelection) -> RoleSelection | None:
        """Answer a proposed selection of roles; None says nothing, which leaves the default roles."""
        for service in self._services:
            if answer := service.role(proposed):
                return answer
        return None

    def begin(self, command: Command, context: Context, peer: Peer) -> IncomingMessage:
        """Bring a message to its service."""
        for service in self._services:
            if service.transfer_syntaxes(context.abstract_syntax, ()) is not None:
                begun = service.begin(command, context, peer)
                return begun or Dropped(Answer(UNRECOGNIZED_OPERATION, "not offered here"))
        raise AssertionError(context.abstract_syntax)
