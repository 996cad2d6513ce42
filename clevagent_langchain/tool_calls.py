"""Tickets for the tool calls of an agent, as its ``wrap_tool_call`` sees them. Checked with langchain 1.4 and langgraph 1.2."""

from __future__ import annotations

from langchain_core.callbacks import CallbackManager
from langgraph.errors import GraphBubbleUp
from langgraph.prebuilt.tool_node import ToolCallRequest

from clevagent_core.calls import ToolCall
from clevagent_core.errors import Stopped
from clevagent_core.frames import frame_of
from clevagent_core.tickets import Ticket
from clevagent_core.watchdog import Watchdog
from clevagent_langchain.graphs import put_in_place
from clevagent_langchain.handler import ClevAgentCallbackHandler
from clevagent_langchain.results import tool_result


def needs_ticket(request: ToolCallRequest, watchdog: Watchdog) -> bool:
    """Tell whether nobody else opens the ticket: a callback handler would, that LangChain is about to tell of the tool."""
    if request.tool is None:
        return False  # there is no such tool: the model is told so, and nothing is run
    manager = CallbackManager.configure(request.runtime.config.get("callbacks"), request.tool.callbacks)
    return not any(
        isinstance(handler, ClevAgentCallbackHandler) and not handler.ignore_agent and handler.watchdog is watchdog
        for handler in manager.handlers
    )


def call_of(request: ToolCallRequest, watchdog: Watchdog) -> ToolCall:
    """Describe a tool call."""
    call = ToolCall(tool=request.tool_call["name"], arguments=request.tool_call["args"])
    put_in_place(call, frame_of(watchdog), request.runtime.config.get("metadata"))
    return call


def settle(ticket: Ticket | None, output: object) -> None:
    """Tell what came back."""
    if ticket is not None:
        result, error = tool_result(output)
        ticket.settle(result=result, error=error)


def fail(ticket: Ticket | None, error: BaseException) -> None:
    """Tell that it did run, and failed; or that it waits for a person, and will be run, and counted, when that has answered."""
    if ticket is None:
        return
    if isinstance(error, GraphBubbleUp) and not isinstance(error, Stopped):
        ticket.release()
    else:
        ticket.settle(error=error)
