"""``ClevAgentCallbackHandler``: asks before each model and tool call of whatever it is attached to.

It hooks where LangChain lets a callback refuse: in ``on_chat_model_start``, ``on_llm_start`` and ``on_tool_start``, as a *sync*
handler with ``raise_error`` (else the exception is logged and the request sent) and ``run_inline`` (else async calls run it in
another thread, beside other handlers). It cannot change a request, and is not told of every end; ``guard(model)`` can and is.
Checked with langchain-core 1.0 and 1.7.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import BaseMessage
from langchain_core.outputs import LLMResult

from clevagent_core import default
from clevagent_core.calls import LLMCall, ToolCall, Usage, parts_of, path
from clevagent_core.coverage import cover, uncover
from clevagent_core.errors import ClevAgentError
from clevagent_core.frames import Activity, Frame, enter, frame_of, living
from clevagent_core.interrupts import is_interrupt
from clevagent_core.runs import Run
from clevagent_core.tickets import Ticket
from clevagent_langchain.failures import comes_from_a_callback
from clevagent_langchain.gaps import fill, note_begun
from clevagent_langchain.graphs import enter_node, is_pause, nodes_of, open_in_graph, put_in_place
from clevagent_langchain.marks import asks_itself, root_run
from clevagent_langchain.messages import items_of
from clevagent_langchain.results import answer_of, tool_result
from clevagent_langchain.tracker import Branch, Tracker, tracker_of
from clevagent_langchain.usage import from_llm_output, from_metadata, is_cached
from clevagent_providers import requests
from clevagent_providers.failures import fail

if TYPE_CHECKING:
    from clevagent_core.watchdog import Watchdog

logger = logging.getLogger("clevagent")

_SWEEP = 1024
"""How many open entries make a look for those that were closed elsewhere worth its time."""


class ClevAgentCallbackHandler(BaseCallbackHandler):
    """Refuses model and tool calls before they are sent, when a budget or another guard says so.

    Attach it like any handler: ``config={"callbacks": [ClevAgentCallbackHandler()]}``, in a model's constructor, or with
    ``with_config``. Attached twice, or in two instances, it counts once. Budgets are those of ``clevagent.init()`` and of the
    ``clevagent.run()`` around the call; outside of one, each root invocation of a chain or graph is a run, and a model called
    on its own belongs to the process.

    A handler cannot send an output limit. Set one on the model, with ``max_retries=0``, for a ceiling that holds; or use
    ``clevagent.guard(model)``. Safe to share between threads and event loops.

    Raises:
        BudgetExceeded: out of the user's own ``invoke``; the request was not sent.

    """

    is_clevagents = True
    raise_error = True
    run_inline = True
    ignore_retriever = True
    ignore_retry = True
    ignore_custom_event = True

    def __init__(self, *, watchdog: Watchdog | None = None) -> None:
        """Attach to ``watchdog``, or to the process's own, whichever that is when a call is made. Keeps no state."""
        super().__init__()
        fill()
        self._own = watchdog
        self._tracked: tuple[Watchdog | None, Tracker | None] = None, None

    @property
    def watchdog(self) -> Watchdog:
        """Whom it asks: the watchdog that it was given, else the process's own, whichever that is now."""
        return self._own or default.current()

    # -- model calls ------------------------------------------------------------------------------------------------------

    def on_chat_model_start(
        self,
        serialized: dict[str, Any],
        messages: list[list[BaseMessage]],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Ask before a chat model is called."""
        if asks_itself(serialized):
            watchdog = self.watchdog
            branch = tracker_of(watchdog).branch(parent_run_id)
            # The model asks itself; it learns from here which root invocation it is a part of.
            root_run.set(branch.run if branch is not None else None)
            return
        sent = messages[0] if len(messages) == 1 else [message for batch in messages for message in batch]
        self._open_llm(serialized, sent, run_id, parent_run_id, metadata, kwargs)

    def on_llm_start(
        self,
        serialized: dict[str, Any],
        prompts: list[str],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Ask before a text-completion model is called."""
        self._open_llm(serialized, prompts, run_id, parent_run_id, metadata, kwargs)

    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **kwargs: Any) -> None:
        """Settle a model call to what it used: the message's usage, then the result's, then its upper bound."""
        ticket = self._tracker().take_ticket(run_id)
        if ticket is None:
            return
        try:
            ticket.settle_by(functools.partial(_usage_of, ticket), answer_of, response)
        finally:
            uncover(ticket)

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Release or charge a model call that failed or was broken off."""
        ticket = self._tracker().take_ticket(run_id)
        if ticket is None:
            return
        fail(ticket, error, sent=True if comes_from_a_callback(error) else None)
        uncover(ticket)

    # -- tool calls -------------------------------------------------------------------------------------------------------

    def on_tool_start(
        self,
        serialized: dict[str, Any],
        input_str: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        inputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Ask before a tool is run."""
        tracker = self._tracker()
        branch = tracker.branch(parent_run_id)
        name = (serialized or {}).get("name") or kwargs.get("name") or "tool"
        call = ToolCall(tool=name, arguments=inputs if inputs is not None else input_str)
        frame = frame_of(self.watchdog)
        put_in_place(call, frame, metadata)
        if branch is not None and branch.tool is not None and len(parts_of(branch.tool)) >= len(parts_of(call.inside)):
            call.inside = branch.tool
        run = self._open(tracker, run_id, branch, call, frame)
        if run is not None:
            tool = path([*parts_of(call.inside), name])
            begun = tracker.start(run_id, branch, run, is_root=False, tool=tool, nodes=() if branch is None else branch.nodes)
            around = living(frame, "tool")
            if begun is not None and not (around and around[-1].name == name):
                begun.frame = enter(run.watchdog, run, Activity("tool", name), begins=True)

    def on_tool_end(self, output: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """Settle a tool call."""
        result, error = tool_result(output)
        self._end_tool(run_id, error, result)

    def on_tool_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Settle a tool call that failed: it did run. One that waits for a person is run again, and counts then."""
        self._end_tool(run_id, error, is_pause=is_pause(error))

    # -- what they are a part of ------------------------------------------------------------------------------------------

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
        """Note a chain, graph or node; a root one outside of ``clevagent.run()`` begins a run."""
        if kwargs.get("run_type") == "llm":
            # Decision models (langchain-core 1.8) come this way.
            self._open_llm(serialized, [inputs], run_id, parent_run_id, metadata, kwargs)
            return
        tracker = self._tracker()
        if tracker.branch(run_id) is not None:
            return  # another handler has noted it
        watchdog = self.watchdog
        parent = tracker.branch(parent_run_id)
        if parent is not None:
            frame = frame_of(watchdog)
            run = parent.run if frame is None else frame.run
            nodes = nodes_of(metadata) if metadata else ()
            branch = tracker.start(run_id, parent, run, is_root=False, tool=parent.tool, nodes=nodes)
            if branch is not None and nodes and nodes != parent.nodes:
                # A node: whatever is called in it stands there, also what LangChain knows nothing of.
                branch.frame = enter_node(watchdog, run, nodes)
            return
        outer = watchdog.enclosing_run()
        is_root = outer is None and parent_run_id is None
        try:
            run = watchdog.start_run() if is_root else outer or watchdog.current_run()
        except ClevAgentError:
            logger.exception("ClevAgent could not begin a run; what is called in it belongs to the process.")
            return
        run.root.sees_tools = True
        tracker.start(run_id, None, run, is_root=is_root, tool=None)

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """Close a chain: what it started and never ended is charged."""
        self._end_chain(run_id, None)

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Close a chain that failed, was cancelled or was interrupted."""
        self._end_chain(run_id, error)

    # -- inside -----------------------------------------------------------------------------------------------------------

    def _tracker(self) -> Tracker:
        watchdog = self._own or default.current()
        # One pair, written and read at once: threads may find another watchdog than they did before.
        known, tracker = self._tracked
        if tracker is None or known is not watchdog:
            tracker = tracker_of(watchdog)
            self._tracked = watchdog, tracker
        return tracker

    def _open_llm(
        self,
        serialized: Mapping[str, Any] | None,
        messages: Sequence[Any],
        run_id: UUID,
        parent_run_id: UUID | None,
        metadata: Mapping[str, Any] | None,
        kwargs: Mapping[str, Any],
    ) -> None:
        tracker = self._tracker()
        branch = tracker.branch(parent_run_id) if parent_run_id is not None else None
        params = kwargs.get("invocation_params") or {}
        metadata = metadata or {}
        model = _model_name(metadata, params, serialized)
        try:
            facts = requests.facts_of(params)
            is_opaque = False
            if messages and isinstance(messages[0], BaseMessage):
                items, is_opaque = items_of(messages)
            else:
                items = list(messages)  # the caller's own list may be changed later
            # Many providers are reached through OpenAI's client; the model's own name tells more.
            provider = metadata.get("ls_provider")
            call = LLMCall(
                model=model,
                input=items,
                max_output_tokens=facts.limit,
                provider=provider if provider != "openai" else None,
                service_tier=facts.service_tier,
            )
            if is_opaque or not facts.is_plain:
                call.tools, call.answers, call.rounds, call.audio = facts.tools, facts.answers, facts.rounds, facts.is_audio
                call.opaque = facts.is_unbounded or is_opaque
        except Exception as error:  # whose code: ours, in the user's agent; what cannot be read counts as the context window
            if is_interrupt(error):
                raise
            logger.exception("ClevAgent could not read a request; it counts as the model's whole context window.")
            call = LLMCall(model=model, opaque=True)
        frame = frame_of(self.watchdog)
        put_in_place(call, frame, metadata)
        if branch is not None and branch.tool is not None and len(parts_of(branch.tool)) >= len(parts_of(call.tool)):
            call.tool = branch.tool
        self._open(tracker, run_id, branch, call, frame)

    def _open(
        self, tracker: Tracker, run_id: UUID, branch: Branch | None, call: LLMCall | ToolCall, frame: Frame | None
    ) -> Run | None:
        if not tracker.begin_ticket(run_id):
            return None
        if tracker.size() > _SWEEP:
            tracker.forget_closed()
        run: Run = frame.run if frame is not None else branch.run if branch is not None else self.watchdog.current_run()
        ticket: Ticket | None = None
        try:
            ticket = open_in_graph(run, call)
            if isinstance(call, LLMCall):
                cover(ticket)
        finally:
            tracker.add_ticket(run_id, ticket, branch)
        if isinstance(call, LLMCall):
            note_begun(lambda: tracker.take_ticket(run_id))
        return run

    def _end_tool(self, run_id: UUID, error: BaseException | None, result: object = None, *, is_pause: bool = False) -> None:
        tracker = self._tracker()
        ticket = tracker.take_ticket(run_id)
        tracker.end(run_id, error)
        if ticket is None:
            return
        if is_pause:
            ticket.release()
        else:
            ticket.settle(error=error, result=result)

    def _end_chain(self, run_id: UUID, error: BaseException | None) -> None:
        tracker = self._tracker()
        ticket = tracker.take_ticket(run_id)
        if ticket is not None:
            ticket.charge(error)
        tracker.end(run_id, error)


def _usage_of(ticket: Ticket, response: LLMResult) -> Usage | None:
    reported = _reported(response)
    if is_cached(reported):
        ticket.release()
    usage = from_metadata(reported)
    return usage if usage is not None else from_llm_output(response.llm_output)


def _reported(response: LLMResult) -> Mapping[str, Any] | None:
    for batch in response.generations:
        for generation in batch:
            # Not by getattr: these are fields, and pydantic takes long to say that one is missing.
            message = generation.__dict__.get("message")
            metadata: Mapping[str, Any] | None = message.__dict__.get("usage_metadata") if message is not None else None
            if metadata is not None:
                return metadata
    return None


def _model_name(metadata: Mapping[str, Any], params: Mapping[str, Any], serialized: Mapping[str, Any] | None) -> str:
    name = metadata.get("ls_model_name")
    if isinstance(name, str) and name:
        return name
    for key in ("model", "model_name", "model_id"):
        name = params.get(key)
        if isinstance(name, str) and name:
            return name
    return str((serialized or {}).get("name") or "unknown")
