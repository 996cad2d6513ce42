"""``BudgetMiddleware``: budgets, tool ceilings and loops for ``langchain.agents.create_agent``, and a graceful end.

It hooks where an agent can be stopped without an exception: ``wrap_model_call`` may answer in the model's place, with a message that
asks for no tools, which ends the agent whatever its tools and response format are; ``wrap_tool_call`` may answer in the tool's.
``before_model`` with ``jump_to`` would come too early: what a call could cost is known where it is made. Both are written twice,
because an agent that runs asynchronously does not fall back on the sync ones. Checked with langchain 1.4 and langgraph 1.2.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from langchain.agents.middleware import AgentMiddleware, ExtendedModelResponse, ModelRequest, ModelResponse
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langgraph.prebuilt.tool_node import ToolCallRequest
from langgraph.types import Command

from clevagent_core import default
from clevagent_core.accounts import scopes
from clevagent_core.attempts import drive
from clevagent_core.budgets import UNITS, Budget, as_budgets
from clevagent_core.errors import BudgetBusy, LoopDetected, Stopped, UsageError
from clevagent_core.guards.loop import LoopGuard
from clevagent_core.interrupts import is_interrupt
from clevagent_core.names import Kind, Known, check_known
from clevagent_core.tickets import Ticket
from clevagent_core.verdicts import Incident
from clevagent_core.watchdog import Watchdog
from clevagent_langchain.closing import (
    answers_to_pending,
    closing_request,
    note_on_end,
    note_on_loop,
    note_on_refusal,
    plain_closing,
    written_closing,
)
from clevagent_langchain.graphs import aopen_in_graph, open_in_graph
from clevagent_langchain.invocations import KEY, Invocation, Invocations, Seat, WatchedState
from clevagent_langchain.models import budgets_of, guard_model
from clevagent_langchain.surroundings import agent_name, inside, is_resumable, outer_run, register, tool_names
from clevagent_langchain.tool_calls import call_of, fail, needs_ticket, settle

if TYPE_CHECKING:
    from langchain_core.language_models.chat_models import BaseChatModel
    from langgraph.runtime import Runtime

logger = logging.getLogger("clevagent")

OnExceed = Literal["halt", "raise"]
OnLoop = Literal["halt", "raise", "warn"]

_MODELS = 64
"""How many models one middleware keeps the guarded copies of; most agents have one."""
Result = ToolMessage | Command[Any]
ModelHandler = Callable[[ModelRequest[Any]], ModelResponse[Any]]
ToolHandler = Callable[[ToolCallRequest], Result]


class BudgetMiddleware(AgentMiddleware[WatchedState, Any, Any]):
    """Holds an agent of ``create_agent`` to its budgets, and ends it gracefully when they are used up.

    Stands alone, and counts nothing twice beside ``clevagent.guard(model)``, a ``ClevAgentCallbackHandler`` or ``clevagent.run()``.
    One invocation of the agent is one run: nested in the ``clevagent.run()`` around it, and going on when the agent is resumed from a
    checkpoint. Give it as the last of the middleware: then what others put in place of the model is clamped like the model.
    Safe to share between agents, threads and event loops.

    At a ceiling the agent's last message is an ``AIMessage`` that asks for no tools, with what happened under
    ``response_metadata["clevagent"]``. The model writes it, where a budget keeps something back for that (``keep_usd``);
    else it is a plain text. With a response format, ``structured_response`` is then ``None``.

    Raises:
        BudgetBusy: out of the agent's ``invoke``: what is left is held by calls in flight, so the same may fit later.
        BudgetExceeded: the same, with ``on_exceed="raise"``. LoopDetected: with ``on_loop="raise"``.
        UsageError: at once, for what is wrong here; out of ``invoke``, for a model that cannot be guarded or priced, and for a budget that
            misspells a tool.

    """

    state_schema = WatchedState

    def __init__(
        self,
        *,
        budgets: Sequence[Budget] = (),
        on_exceed: OnExceed = "halt",
        on_loop: OnLoop = "halt",
        watchdog: Watchdog | None = None,
    ) -> None:
        """Prepare; nothing begins before the agent is invoked.

        Args:
            budgets: ceilings for each invocation, beside those of ``init()`` and of the run around it.
            on_exceed: what happens when a call is refused: ``halt`` ends the agent with a closing message, ``raise`` raises
                ``BudgetExceeded``. With ``halt``, a tool that is refused is answered with a message first, so that the model
                can finish without; when it asks for the same tool again, the agent ends.
            on_loop: what happens when the agent repeats itself and nothing new comes of it. The model is told once; when a loop
                is found again, ``halt`` ends the agent, ``raise`` raises ``LoopDetected``. ``warn`` only logs.
            watchdog: another watchdog than the process's own.

        Raises:
            UsageError: no list of budgets, or an action that does not exist, or one that belongs to the middleware.

        """
        super().__init__()
        _check_action("on_exceed", on_exceed, get_args(OnExceed))
        _check_action("on_loop", on_loop, get_args(OnLoop))
        if watchdog is not None and not isinstance(watchdog, Watchdog):
            raise UsageError(
                f"BudgetMiddleware(watchdog={watchdog!r}) is no Watchdog, so nothing would be counted. Leave it out for the one of "
                "clevagent.init(), or give a clevagent.Watchdog(...)."
            )
        self._budgets = _checked(budgets)
        self._names_tools = any(budget.tool not in {None, "*"} for budget in self._budgets)
        self._on_exceed = on_exceed
        self._on_loop = on_loop
        self._own = watchdog
        self._invocations = Invocations()
        self._beginning = threading.RLock()
        self._models: dict[int, tuple[BaseChatModel, BaseChatModel]] = {}
        register()

    # -- one invocation, one run ------------------------------------------------------------------------------------------

    def before_agent(self, state: WatchedState, runtime: Runtime[Any]) -> dict[str, Any]:  # noqa: ARG002 - LangChain's signature
        """Begin a run."""
        self._invocations.end_abandoned(state)
        return {KEY: self._begin()}

    async def abefore_agent(self, state: WatchedState, runtime: Runtime[Any]) -> dict[str, Any]:
        """Begin a run."""
        return self.before_agent(state, runtime)

    def after_agent(self, state: WatchedState, runtime: Runtime[Any]) -> dict[str, Any] | None:  # noqa: ARG002 - LangChain's signature
        """End the run. Where a refused tool was the end (``return_direct``), say so in a closing message."""
        seat = self._invocations.end(state)
        last = state["messages"][-1] if state["messages"] else None
        if seat is None or not isinstance(last, ToolMessage) or last.status != "error":
            return None
        incident = seat.invocation.refusals.get(last.name or "")
        return None if incident is None else {"messages": [plain_closing(state["messages"], incident, agent_name())]}

    async def aafter_agent(self, state: WatchedState, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """End the run."""
        return self.after_agent(state, runtime)

    # -- model calls ------------------------------------------------------------------------------------------------------

    def wrap_model_call(self, request: ModelRequest[Any], handler: ModelHandler) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
        """Send the call through a guarded copy of the model; end the agent when it is refused."""
        return drive(self._model_call(request, handler, is_async=False))

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
        """Do what ``wrap_model_call`` does, without blocking the event loop."""
        return await self._model_call(request, handler, is_async=True)

    async def _model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Any], *, is_async: bool
    ) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
        seat = self._seat(request.state)
        invocation = seat.invocation
        self._check_tools(invocation, request)
        request = request.override(model=self._guarded(request.model))
        attempt = request
        with inside(invocation.run):
            while True:
                if invocation.ending is not None:
                    break
                try:
                    response = handler(attempt)
                    return self._answered(request, seat, await response if is_async else response)
                except Stopped as stop:
                    attempt = self._after_stop(invocation, request, stop)
            written: AIMessage | None = None
            if _may_write(invocation, request.model):
                try:
                    with invocation.run.wrap_up():
                        closing = handler(closing_request(request, invocation.ending))
                        written = written_closing(await closing if is_async else closing, invocation.ending)
                except Exception as error:  # whose code: the provider's, or a refusal: the plain text does not depend on either
                    if is_interrupt(error):
                        raise
                    _tell_unwritten(error)
        return self._closed(request, seat, invocation.ending, written)

    # -- tool calls -------------------------------------------------------------------------------------------------------

    def wrap_tool_call(self, request: ToolCallRequest, handler: ToolHandler) -> Result:
        """Ask before a tool is run, and tell what came back."""
        return drive(self._tool_call(request, handler, is_async=False))

    async def awrap_tool_call(self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], Awaitable[Result]]) -> Result:
        """Do what ``wrap_tool_call`` does, without blocking the event loop."""
        return await self._tool_call(request, handler, is_async=True)

    async def _tool_call(self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], Any], *, is_async: bool) -> Result:
        seat = self._seat(request.state)
        run = seat.invocation.run
        with inside(run, request.tool_call["name"]):
            ticket: Ticket | None = None
            try:
                if needs_ticket(request, run.watchdog):
                    call = call_of(request, run.watchdog)
                    ticket = await aopen_in_graph(run, call) if is_async else open_in_graph(run, call)
                result: Result = await handler(request) if is_async else handler(request)
            except BaseException as error:
                fail(ticket, error)
                if not isinstance(error, Stopped):
                    raise
                return self._refused(seat.invocation, request, error)
        settle(ticket, result)
        return result

    # -- inside -----------------------------------------------------------------------------------------------------------

    def _begin(self, key: str | None = None) -> Seat:
        watchdog = self._own or default.current()
        is_saved = is_resumable()
        # One guard for each invocation: several of one run tree may well do the same.
        loops = LoopGuard(on_loop="warn" if self._on_loop == "warn" else "raise")
        # One that waits to be resumed must not draw the calls of threads that inherit no run.
        run = watchdog.start_run(budgets=self._budgets, parent=outer_run(watchdog), guards=[loops], inherited=not is_saved)
        run.root.sees_tools = True
        if key is not None:
            run.met.update(budget.label for budget in self._budgets)  # what it has done before it was resumed, nobody here knows
        return self._invocations.take_seat(Invocation(run, loops), is_resumable=is_saved, key=key)

    def _seat(self, state: Any) -> Seat:
        state = state if isinstance(state, Mapping) else {}
        seat = self._invocations.find(state)
        if seat is None:
            # Another process began it, or other middleware jumped past before_agent.
            with self._beginning:
                return self._invocations.find(state) or self._begin(state.get(KEY))
        seat.invocation.move_into(outer_run(seat.invocation.run.watchdog))
        return seat

    def _check_tools(self, invocation: Invocation, request: ModelRequest[Any]) -> None:
        """Look for the tools that budgets name, in front of the first request of an invocation."""
        if invocation.is_checked or not self._names_tools:
            return
        known: dict[Kind, Known] = {"tool": Known(tool_names(request.tools))}
        check_known(self._budgets, known, where="BudgetMiddleware()")
        invocation.run.watchdog.idle.learn_known(known)
        invocation.is_checked = True

    def _guarded(self, model: BaseChatModel) -> BaseChatModel:
        known = self._models.get(id(model))
        if known is not None and known[0] is model:
            return known[1]
        guarded: Any = guard_model(model, self._own, ())
        if guarded is None:
            raise UsageError(
                f"BudgetMiddleware does not know how to guard a {type(model).__module__}.{type(model).__qualname__}, so its calls would "
                "go out unchecked, and none was sent. Give create_agent a LangChain chat model (a BaseChatModel)."
            )
        if len(self._models) >= _MODELS:
            self._models.clear()
        # With the model itself: as long as it is kept, its id is nobody else's.
        self._models[id(model)] = model, guarded
        return guarded  # type: ignore[no-any-return]  # guard_model gives back what it was given

    def _after_stop(self, invocation: Invocation, request: ModelRequest[Any], stop: Stopped) -> ModelRequest[Any]:
        """Decide what a refused model call means: another attempt, the end (``invocation.ending``), or the exception."""
        if isinstance(stop, BudgetBusy):
            raise stop
        if isinstance(stop, LoopDetected):
            if self._may_go_on(invocation, stop):
                # For this call only: the conversation is the user's.
                return request.override(messages=[*request.messages, HumanMessage(note_on_loop(stop.incident))])
        elif self._on_exceed == "raise":
            raise stop
        invocation.ending = stop.incident
        return request

    def _may_go_on(self, invocation: Invocation, stop: LoopDetected) -> bool:
        """Let a run that repeats itself go on, once."""
        if self._on_loop == "warn":
            raise stop  # a guard that the user gave elsewhere
        if invocation.told_loop is None:
            invocation.told_loop = stop.incident
            invocation.run.forgive_loops()
            return True
        if self._on_loop == "raise":
            raise stop
        return False

    def _refused(self, invocation: Invocation, request: ToolCallRequest, stop: Stopped) -> ToolMessage:
        """Answer a tool call that was refused, or in which a call was refused."""
        name = request.tool_call["name"]
        text: str | None = None
        if isinstance(stop, BudgetBusy):
            raise stop
        if isinstance(stop, LoopDetected):
            # Parallel tools are refused with the loop that one of them was just told of.
            if invocation.told_loop is stop.incident or self._may_go_on(invocation, stop):
                text = note_on_loop(stop.incident)
        elif self._on_exceed == "raise":
            raise stop
        # Several calls of one turn are refused before the model has heard of any.
        elif invocation.refused.setdefault(name, invocation.turn) == invocation.turn:
            invocation.refusals[name] = stop.incident
            text = note_on_refusal(name, stop.incident)
        if text is None:
            invocation.ending = stop.incident
            text = note_on_end(name, stop.incident)
        return ToolMessage(text, name=name, tool_call_id=request.tool_call["id"] or "", status="error")

    def _answered(
        self, request: ModelRequest[Any], seat: Seat, response: ModelResponse[Any]
    ) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
        seat.invocation.turn += 1
        return _seated(request, seat, response)

    def _closed(
        self, request: ModelRequest[Any], seat: Seat, incident: Incident, written: AIMessage | None
    ) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
        """Answer in the model's place, so that the history stays one that providers take."""
        seat.invocation.is_closed = True
        messages = request.state["messages"]
        pending: list[BaseMessage] = [*answers_to_pending(messages, incident)]
        response = ModelResponse([*pending, written or plain_closing(messages, incident, agent_name())])
        return _seated(request, seat, response)


def _seated(
    request: ModelRequest[Any], seat: Seat, response: ModelResponse[Any]
) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
    if request.state.get(KEY) is seat:
        return response
    # Resumed: the graph that runs now does not hold it yet.
    return ExtendedModelResponse(response, Command(update={KEY: seat}))


def _may_write(invocation: Invocation, model: BaseChatModel) -> bool:
    """Tell whether a budget in force, of the run or of the guarded model, keeps something back for a closing message."""
    budgets = scopes(invocation.run, budgets_of(model))
    return not invocation.is_closed and any(budget.keep for budget, _ in budgets)


def _tell_unwritten(error: Exception) -> None:
    logger.info(
        "The closing message of an agent could not be written by its model (%s), so a plain text stands in its place.", error
    )


def _check_action(name: str, action: object, known: tuple[str, ...]) -> None:
    if not isinstance(action, str) or action not in known:
        raise UsageError(
            f"BudgetMiddleware({name}={action!r}) is no action, so it is not clear what should happen then. "
            f"Use {', '.join(map(repr, known[:-1]))} or {known[-1]!r}."
        )


def _checked(budgets: object) -> tuple[Budget, ...]:
    given = list(budgets) if isinstance(budgets, (list, tuple)) else []
    for budget in given:
        if isinstance(budget, Budget) and budget.on_exceed in ("halt", "ask"):  # no set: a callable need not be hashable
            raise UsageError(
                f"BudgetMiddleware(budgets=[{budget.label!r}]) has a budget with on_exceed={budget.on_exceed!r}, but how the agent ends "
                "is said once, for every budget that stops it. Leave on_exceed out of the budget, and write "
                "BudgetMiddleware(on_exceed='halt'), which is the default."
            )
    return tuple(_of_tools_only(budget) for budget in as_budgets(budgets))


def _of_tools_only(budget: Budget) -> Budget:
    """Let a ceiling on tool calls, and nothing else, cover what tools do, but not the model call that could finish without them."""
    is_of_tools = {UNITS[unit] for unit, _ in budget.limits()} == {
        "tool_calls"
    } and budget.seconds is budget.baseline_multiple is None
    return replace(budget, tool="*") if is_of_tools and budget.tool is None and budget.model is None else budget
