"""One invocation of a guarded graph: its run, and what is set around the graph while it works."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables.config import ensure_config
from langchain_core.tracers.context import register_configure_hook
from langgraph.errors import GraphBubbleUp, GraphInterrupt, ParentCommand
from langgraph.types import Command

from clevagent_core.budgets import any_made
from clevagent_core.errors import Stopped, UsageError
from clevagent_core.frames import Standing, leave, stands
from clevagent_core.names import check_known
from clevagent_core.runs import Run
from clevagent_langchain import ClevAgentCallbackHandler
from clevagent_langgraph.names import known_names
from clevagent_langgraph.stops import Halted, ask, bubbling, namespace

if TYPE_CHECKING:
    from clevagent_core.verdicts import Incident
    from clevagent_core.watchdog import Watchdog
    from clevagent_langgraph.graphs import GraphGuard

RUN = "clevagent_run"
"""The key of a checkpoint's metadata under which the id of the run stands that made it."""

_KEPT = 1000
"""How many threads' runs and stops are kept; of the one that was used longest ago nothing is known when one more comes."""
_NO_INTERRUPTS = {"__interrupt__": ()}

K = TypeVar("K")
V = TypeVar("V")


class Kept(Generic[K, V]):
    """The latest entries by key. Safe to use from any thread."""

    def __init__(self) -> None:
        """None yet."""
        self._lock = threading.RLock()
        self._entries: OrderedDict[K, V] = OrderedDict()

    def put(self, key: K, value: V) -> V | None:
        """Keep ``value``; give what had to go for it, if that was of another key."""
        with self._lock:
            self._entries[key] = value
            self._entries.move_to_end(key)
            return self._entries.popitem(last=False)[1] if len(self._entries) > _KEPT else None

    def get(self, key: K) -> V | None:
        """Find what is kept."""
        return self._entries.get(key)

    def pop(self, key: K) -> V | None:
        """Take it out."""
        with self._lock:
            return self._entries.pop(key, None)


class ClevAgentGraphHandler(ClevAgentCallbackHandler):
    """The callback handler of one invocation: it also sees how the graph's own nodes end."""

    def __init__(self, invocation: Invocation) -> None:
        super().__init__(watchdog=invocation.watchdog)
        self._invocation = invocation
        self._graph: UUID | None = None
        self.nodes: set[str] = set()
        """The nodes of the graph itself that are running, as LangGraph names them."""

    def on_chain_start(
        self,
        serialized: dict[str, Any],
        inputs: Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Note the graph, which comes first, and its nodes."""
        super().on_chain_start(serialized, inputs, run_id=run_id, parent_run_id=parent_run_id, metadata=metadata, **kwargs)
        if self._graph is None:
            self._graph = run_id
        elif parent_run_id == self._graph and metadata is not None:
            name = metadata.get("langgraph_checkpoint_ns", "")
            # Inside a subgraph that remembers (checkpointer=True), LangGraph leaves the task out of the name.
            self.nodes.update((name, name.partition(":")[0]))

    def on_chain_error(self, error: BaseException, *, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any) -> None:
        """Note that a node ended the graph, by a refusal of ours or by a question of its own."""
        super().on_chain_error(error, run_id=run_id, parent_run_id=parent_run_id, **kwargs)
        if parent_run_id is not None and parent_run_id == self._graph and isinstance(error, GraphInterrupt):
            self._invocation.pauses(error)


_seeing: ContextVar[BaseCallbackHandler | None] = ContextVar("clevagent_langgraph_seeing", default=None)
_current: ContextVar[Invocation | None] = ContextVar("clevagent_langgraph_invocation", default=None)
last_stop: ContextVar[tuple[object, Incident | None]] = ContextVar("clevagent_langgraph_last_stop", default=(None, None))
"""Which guard's graph was invoked last in this context, and why it was stopped."""
_registered: list[bool] = []


def register() -> None:
    """Let handlers be added by context: once in a process, and not on import, because LangChain's hooks cannot be taken off."""
    if not _registered:
        _registered.append(True)
        register_configure_hook(_seeing, inheritable=True)


class Invocation:
    """What is known of one invocation while it goes on. As a context manager, what is set while the graph works."""

    def __init__(self, guard: GraphGuard, watchdog: Watchdog, run: Run, outer: Invocation | None) -> None:
        """Made by :func:`begin`."""
        self.guard = guard
        self.watchdog = watchdog
        self.run = run
        self.outer = outer
        self.config: Any = None
        """The config to go on with."""
        self.thread_id: str | None = None
        self.is_root = False
        """Whether no other graph is around it, as far as LangGraph is concerned."""
        self.is_saved = False
        """Whether it can be resumed."""
        self.may_be_resumed = False
        """Whether this is a resumption."""
        self.is_finished = False
        self.is_paused = False
        self.stop: Incident | None = None
        """Why it was stopped."""
        self.handler: ClevAgentGraphHandler | None = None
        self._halts: list[Incident] = []
        self._waiting: list[str] = []
        """The runs of graphs inside it that have not finished."""
        self._before: tuple[Invocation | None, BaseCallbackHandler | None] = None, None
        # One for all steps: nodes that are begun in one step of a stream go on in the next.
        self._frame = stands(watchdog, run)
        self._standing = Standing(self._frame)
        self._frame.through = bubbling(self._frame.through)
        self._frame.ending = self.ending

    # -- while it works ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> None:
        """Make the run the current one."""
        self._standing.__enter__()
        self._before = _current.get(), _seeing.get()
        _current.set(self)
        if self.handler is not None:
            _seeing.set(self.handler)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Put back what was current before."""
        self._standing.__exit__()
        # Not by token, and only where it was set: a generator may be closed in another context than the one it ran in.
        if _current.get() is self:
            _current.set(self._before[0])
            _seeing.set(self._before[1])

    def ending(self, incident: Incident) -> type[BaseException] | None:
        """Choose the type by which a refusal ends the graph, or one around it: that which says so first, from the inside out."""
        owner: Invocation | None = self
        action = None
        while owner is not None:
            action = owner.guard.action_at(incident)
            if action is not None:
                break
            owner = owner.outer
        if owner is None or action == "raise":
            return None
        if action == "halt":
            owner._halts.append(incident)  # noqa: SLF001 - another invocation
            return Halted if owner._is_here() else GraphBubbleUp  # noqa: SLF001 - as above
        # Whoever asks must be there to take the answer: the outermost graph.
        root: Invocation = owner
        while not root.is_root and root.outer is not None:
            root = root.outer
        return ask(incident) if root.is_saved and root._is_here() else None  # noqa: SLF001 - as above

    def _is_here(self) -> bool:
        """Tell whether the context is in a node of this very graph, or of one that LangGraph counts as a part of it."""
        here = namespace()
        return self.is_root and self.handler is not None and here is not None and here.split("|")[0] in self.handler.nodes

    def pauses(self, error: GraphInterrupt) -> None:
        """Note that a node of the graph ended by an interrupt."""
        self.is_paused = True
        if isinstance(error, Stopped):
            self.stop = error.incident
        elif not error.args[0] and self._halts:
            self.stop = self._halts[-1]  # several that LangGraph made one of

    def hides(self, chunk: Any) -> bool:
        """Tell whether an item of a stream only says that there is nothing to answer."""
        if not self._halts:
            return False
        if isinstance(chunk, tuple) and chunk:
            chunk = chunk[-1]
        if isinstance(chunk, dict) and chunk.get("type") == "updates" and "data" in chunk:
            chunk = chunk["data"]
        return isinstance(chunk, dict) and chunk == _NO_INTERRUPTS

    def is_ended_by(self, error: BaseException) -> bool:
        """Note what ended it; tell whether that is a graceful end, with what there is so far."""
        if isinstance(error, ParentCommand):
            self.is_finished = True  # it has handed over to the graph around it
        if isinstance(error, Stopped):
            self.stop = error.incident
            return any(error.incident is incident for incident in self._halts)
        return False

    # -- its end ----------------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """End the run. Where the graph can go on later, its accounts are kept."""
        leave(self._frame)
        run, guard, stop = self.run, self.guard, self.stop
        run.resumable = self.is_saved and not (self.is_finished and not self.is_paused)
        if stop is not None and any(stop is incident for incident in self._halts):
            run.stopped_by(stop)
        kept = kept_runs(self.watchdog)
        before = kept.pop(run.run_id)
        if before is not None:
            # Of the same run, before it was resumed: what it has opened goes on with it.
            run.accounts.update({key: account for key, account in before.accounts.items() if key not in run.accounts})
            run.met |= before.met
        # What a graph has done before it was resumed, only its own process knows.
        run.end(is_finished=self.is_finished and (before is not None or not self.may_be_resumed))
        ledger = self.watchdog.ledger
        if run.resumable:
            if self.outer is not None and not self.is_root:
                self.outer._waiting.append(run.run_id)  # noqa: SLF001 - another invocation
            dropped = kept.put(run.run_id, run)
            if dropped is not None and not ledger.survives_fork:
                # In a file, what nobody here remembers may go on elsewhere.
                ledger.forget(list(dropped.accounts.values()))
        else:
            # What has failed inside it, and was not tried again, never will be.
            for inside in filter(None, map(kept.pop, self._waiting)):
                ledger.forget(list(inside.accounts.values()))
        last_stop.set((guard, stop))
        if self.thread_id is not None:
            if stop is not None:
                guard.stops.put(self.thread_id, stop)
            else:
                guard.stops.pop(self.thread_id)


_runs_lock = threading.RLock()


def kept_runs(watchdog: Watchdog) -> Kept[str, Run]:
    """The runs of graphs that wait to be resumed, by id: what they have spent must not be forgotten."""
    # With the watchdog itself, which they refer to: kept elsewhere, they would keep it alive for ever.
    state = watchdog.process_run.state
    found: Kept[str, Run] | None = state.get(kept_runs)
    if found is None:
        with _runs_lock:
            found = state.setdefault(kept_runs, Kept())
    return found


def run_id_of(graph: Any, snapshot: Any) -> str | None:
    """Find the run that made a state; where the state was edited since (``update_state``), the one that made what was edited."""
    metadata, before = snapshot.metadata, snapshot.parent_config
    while _is_edited(metadata) and before is not None:
        saved = graph.checkpointer.get_tuple(before)
        metadata, before = (saved.metadata, saved.parent_config) if saved is not None else (None, None)
    return _told(metadata)


async def arun_id_of(graph: Any, snapshot: Any) -> str | None:
    """Do what ``run_id_of`` does, without blocking the event loop."""
    metadata, before = snapshot.metadata, snapshot.parent_config
    while _is_edited(metadata) and before is not None:
        saved = await graph.checkpointer.aget_tuple(before)
        metadata, before = (saved.metadata, saved.parent_config) if saved is not None else (None, None)
    return _told(metadata)


def _is_edited(metadata: Mapping[str, Any] | None) -> bool:
    return metadata is not None and RUN not in metadata and metadata.get("source") == "update"


def _told(metadata: Mapping[str, Any] | None) -> str | None:
    found = (metadata or {}).get(RUN)
    return found if isinstance(found, str) else None


def begin(graph: Any, guard: GraphGuard, input: Any, config: Any, options: Mapping[str, Any]) -> Invocation:  # noqa: A002 - LangGraph's name
    """Begin an invocation of a guarded graph: with the run that goes on, where it is resumed inside another graph; else with a new one.

    Raises:
        UsageError: a budget names a node or tool that the graph has not; or it would have to ask, and the graph around it could not take
            the answer.

    """
    watchdog = guard.watchdog
    if guard.budgets and watchdog not in guard.checked_for:
        known = known_names(graph)
        check_known(guard.budgets, known, where="guard(graph)")
        watchdog.idle.learn_known(known)
        guard.checked_for.add(watchdog)
    outer = _current.get()
    if outer is not None and outer.watchdog is not watchdog:
        outer = None
    own: Mapping[str, Any] = (config or {}).get("configurable") or {}
    around: Mapping[str, Any] = ensure_config().get("configurable") or {}
    bound: Mapping[str, Any] = (graph.config or {}).get("configurable") or {}
    # A thread of its own makes it a graph of its own, also in a node of another.
    is_own = bool(own.get("thread_id") or own.get("checkpoint_id")) and not own.get("checkpoint_ns")
    is_root = is_own or not (own.get("checkpoint_ns") or around.get("checkpoint_ns"))
    thread_id = own.get("thread_id") or bound.get("thread_id") or around.get("thread_id")
    is_saved = bool(graph.checkpointer) if is_root else outer is not None and outer.is_saved
    if guard.asks and not is_root and outer is None:
        raise UsageError(
            f"The guarded graph {graph.get_name()!r} asks (on_exceed='ask'), and was invoked in a node of a graph that is not guarded, which "
            "would give the answer to its own nodes; so it was not run. Guard the outermost graph: clevagent.guard(graph, on_exceed='ask'); "
            "it asks for those inside it, too."
        )
    parent = watchdog.enclosing_run()
    tags = {"thread_id": str(thread_id)} if thread_id else None
    may_be_resumed = is_root and is_saved and bool(thread_id) and (input is None or isinstance(input, Command))
    run_id = _id_inside(guard, outer) if not is_root and outer is not None and is_saved else None
    run = watchdog.start_run(budgets=guard.budgets, tags=tags, parent=parent, run_id=run_id, resumable=is_saved)
    run.root.sees_tools = True
    invocation = Invocation(guard, watchdog, run, outer)
    invocation.is_root, invocation.is_saved, invocation.may_be_resumed = is_root, is_saved, may_be_resumed
    invocation.thread_id = str(thread_id) if thread_id and is_root else None
    # These stop it in front of a node, of which no callback hears.
    breaks = (
        graph.interrupt_before_nodes,
        graph.interrupt_after_nodes,
        options.get("interrupt_before"),
        options.get("interrupt_after"),
    )
    invocation.is_paused = any(breaks)
    if is_root or outer is None:  # else that of the graph around it sees everything
        invocation.handler = ClevAgentGraphHandler(invocation)
    # Without a thread LangGraph refuses to begin, and says so only where nothing else is configured. Where nothing is limited and nobody
    # listens, no later run has to go on with this one, and checkpoints are left as they are.
    is_continued = any_made() or watchdog.settings.endpoint is not None
    invocation.config = _marked(config, run.run_id) if is_root and is_saved and thread_id and is_continued else config
    return invocation


def go_on(invocation: Invocation, run_id: str) -> None:
    """Let a resumed invocation count where the one before it stopped, whichever process that was in."""
    run = invocation.run
    run.run_id = run_id
    invocation.config = _marked(invocation.config, run_id)


def _marked(config: Any, run_id: str) -> Any:
    # Among what is configurable: from there LangGraph writes it with each checkpoint, and shows it to nobody in streams and callbacks.
    return {**(config or {}), "configurable": {**((config or {}).get("configurable") or {}), RUN: run_id}}


def _id_inside(guard: GraphGuard, outer: Invocation) -> str:
    """Name the run of a graph inside another, so that it goes on with the same one when that is resumed."""
    key = guard, namespace()
    with _runs_lock:
        count = outer.run.state[key] = outer.run.state.get(key, 0) + 1
    return f"{outer.run.run_id} {key[1]} {count}"
