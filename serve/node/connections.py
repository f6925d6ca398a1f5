"""Who is connected: associations, and connections that are none yet or none any more.

A connection costs a thread and a little memory from the moment it is accepted, long before its peer has said who it is. So
those that are no association have a limit of their own, and where it is reached, one gives way to the newcomer: of the address
that has most of them, the oldest. Who floods the node displaces itself first, and nobody else has to wait for a time-out.
"""

import threading
from collections import Counter

from serve.node.connection import Connection


class Connections:
    """The connections of one listener; safe for threads.

    Parameters
    ----------
    most_pending : int
        Connections that are no association.
    most_associations : int
        Associations.
    """

    def __init__(self, most_pending: int, most_associations: int) -> None:
        self._most_pending = most_pending
        self._most_associations = most_associations
        self._guard = threading.Lock()
        # In the order of their arrival.
        self._pending: dict[Connection, None] = {}
        self._associations: set[Connection] = set()

    @property
    def associations(self) -> int:
        """How many associations there are."""
        return len(self._associations)

    @property
    def pending(self) -> int:
        """How many connections there are that are no association."""
        return len(self._pending)

    def admit(self, connection: Connection) -> Connection | None:
        """Take a new connection in; return the one that had to give way, which has been interrupted."""
        with self._guard:
            displaced = self._displaced() if len(self._pending) >= self._most_pending else None
            self._pending[connection] = None
        if displaced:
            displaced.interrupt()
        return displaced

    def establish(self, connection: Connection) -> bool:
        """Let a connection become an association, if there is room for one more."""
        with self._guard:
            if len(self._associations) >= self._most_associations:
                return False
            self._pending.pop(connection, None)
            self._associations.add(connection)
            return True

    def retire(self, connection: Connection) -> None:
        """An association has ended; its connection closes."""
        with self._guard:
            if connection in self._associations:
                self._associations.discard(connection)
                self._pending[connection] = None

    def leave(self, connection: Connection) -> None:
        """A connection is closed."""
        with self._guard:
            self._associations.discard(connection)
            self._pending.pop(connection, None)

    def interrupt_pending(self) -> None:
        """Interrupt what is no association."""
        self._interrupt(self._pending)

    def interrupt_associations(self) -> None:
        """Interrupt the associations."""
        self._interrupt(self._associations)

    def _interrupt(self, connections: dict[Connection, None] | set[Connection]) -> None:
        with self._guard:
            for connection in list(connections):
                connection.interrupt()

    def _displaced(self) -> Connection:
        address, _ = Counter(connection.address for connection in self._pending).most_common(1)[0]
        oldest = next(connection for connection in self._pending if connection.address == address)
        del self._pending[oldest]
        return oldest
