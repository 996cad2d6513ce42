"""What is known of LangChain's runs while they go on: which ClevAgent run each belongs to, and its open tickets.

It belongs to the watchdog, not to a handler: LangChain makes, copies and discards handlers as it likes, and two of them that see
the same call must not count it twice.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING
from uuid import UUID
from weakref import WeakKeyDictionary

from clevagent_core.frames import Frame, finish, leave
from clevagent_core.runs import Run
from clevagent_core.tickets import Ticket

if TYPE_CHECKING:
    from clevagent_core.watchdog import Watchdog


class Branch:
    """One chain, graph node or tool that is running, with what it has started and not yet ended."""

    __slots__ = ("children", "frame", "is_root", "nodes", "parent", "run", "tickets", "tool")

    def __init__(self, parent: Branch | None, run: Run, *, is_root: bool, tool: str | None, nodes: tuple[str, ...]) -> None:
        self.parent = parent
        self.run = run
        self.is_root = is_root
        """Whether ``run`` was begun for it, and ends with it."""
        self.tool = tool
        """The tools that it is in, itself included."""
        self.nodes = nodes
        """The nodes of graphs that it is in."""
        self.frame: Frame | None = None
        """What stands in its context while it runs."""
        self.children: dict[UUID, Branch] = {}
        self.tickets: dict[UUID, Ticket] = {}


class Tracker:
    """The branches and tickets of one watchdog. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._branches: dict[UUID, Branch] = {}
        self._tickets: dict[UUID, tuple[Ticket, Branch | None] | None] = {}

    def branch(self, run_id: UUID | None) -> Branch | None:
        """Find a branch that is running."""
        return self._branches.get(run_id) if run_id is not None else None

    def start(
        self, run_id: UUID, parent: Branch | None, run: Run, *, is_root: bool, tool: str | None, nodes: tuple[str, ...] = ()
    ) -> Branch | None:
        """Note a branch, once."""
        branch = Branch(parent, run, is_root=is_root, tool=tool, nodes=nodes)
        with self._lock:
            if run_id in self._branches:
                return None
            self._branches[run_id] = branch
            if parent is not None:
                parent.children[run_id] = branch
        return branch

    def end(self, run_id: UUID, error: BaseException | None = None) -> None:
        """Close a branch: what it has started and never ended may have been sent, so it is charged."""
        with self._lock:
            branch = self._branches.pop(run_id, None)
            if branch is None:
                return
            if branch.parent is not None:
                branch.parent.children.pop(run_id, None)
            dangling = self._cut(branch)
        for ticket in dangling:
            ticket.charge(error)
        if branch.frame is not None:
            leave(branch.frame)
        if branch.is_root:
            branch.run.end()

    def begin_ticket(self, run_id: UUID) -> bool:
        """Claim the right to open the ticket of a call; ``False`` when another handler has it already."""
        if run_id in self._tickets:
            return False
        with self._lock:
            if run_id in self._tickets:
                return False
            self._tickets[run_id] = None
            return True

    def add_ticket(self, run_id: UUID, ticket: Ticket | None, branch: Branch | None) -> None:
        """Keep the ticket of a call until it ends; ``None`` when the call was refused, which ends the claim."""
        if ticket is None:
            self._tickets.pop(run_id, None)
            return
        self._tickets[run_id] = ticket, branch
        if branch is not None:
            with self._lock:
                branch.tickets[run_id] = ticket

    def take_ticket(self, run_id: UUID) -> Ticket | None:
        """Give the ticket of a call that has ended, once."""
        found = self._tickets.pop(run_id, None)  # one operation: whoever gets it is the only one
        if found is None:
            return None
        ticket, branch = found
        if branch is not None:
            with self._lock:
                branch.tickets.pop(run_id, None)
        return ticket

    def forget_closed(self) -> None:
        """Drop tickets that the end of a run, or their time, has closed: nothing told LangChain's end of them."""
        with self._lock:
            tickets = self._tickets.copy()
        for run_id, found in tickets.items():
            if found is not None and not found[0].is_open:
                self.take_ticket(run_id)

    def size(self) -> int:
        """How many branches and tickets are kept."""
        return len(self._branches) + len(self._tickets)

    def _cut(self, branch: Branch) -> list[Ticket]:
        tickets = list(branch.tickets.values())
        for run_id in branch.tickets:
            self._tickets.pop(run_id, None)
        for run_id, child in branch.children.items():
            self._branches.pop(run_id, None)
            if child.frame is not None:
                finish(child.frame)
            tickets += self._cut(child)
        branch.tickets, branch.children = {}, {}
        return tickets


_trackers: WeakKeyDictionary[Watchdog, Tracker] = WeakKeyDictionary()
_trackers_lock = threading.RLock()


def tracker_of(watchdog: Watchdog) -> Tracker:
    """Find the one tracker of a watchdog."""
    found = _trackers.get(watchdog)
    if found is None:
        with _trackers_lock:
            found = _trackers.setdefault(watchdog, Tracker())
    return found
