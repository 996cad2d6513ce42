"""ClevAgent: a runtime watchdog for LLM agents. It refuses the next call *before* the money is spent.

    import clevagent

    clevagent.init(agent="research", budgets=[clevagent.Budget(usd=5, per="day")])
    model = clevagent.guard(ChatOpenAI(model="gpt-4o"))
    with clevagent.run(budgets=[clevagent.Budget(usd=0.50)]) as run:
        model.invoke("...")
    print(run)

Everything works without a server, an account or a key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clevagent._face import (
    guard,
    init,
    llm_call,
    log_cost,
    log_iteration,
    log_tool_call,
    outside_runs,
    ping,
    run,
    shutdown,
    tool_call,
)
from clevagent_core.budgets import Budget
from clevagent_core.calls import LLMCall, Step, ToolCall, Usage
from clevagent_core.doors import OpenLLMCall, OpenToolCall
from clevagent_core.errors import (
    BudgetBusy,
    BudgetExceeded,
    ClevAgentError,
    DeliveryError,
    LedgerError,
    LoopDetected,
    PluginError,
    RemoteStop,
    Stopped,
    UsageError,
)
from clevagent_core.hookspecs import hookimpl
from clevagent_core.pricing import Price
from clevagent_core.runs import Run
from clevagent_core.summaries import BudgetState, Remaining, RunSummary, Spend
from clevagent_core.tickets import Outcome, Ticket
from clevagent_core.verdicts import Incident, Stop, Warn
from clevagent_core.watchdog import Watchdog
from clevagent_wire.beats import Amounts, Beat
from clevagent_wire.version import __version__ as __version__

if TYPE_CHECKING:
    from clevagent_core.guards.loop import LoopGuard

__all__ = [
    "Amounts",
    "Beat",
    "Budget",
    "BudgetBusy",
    "BudgetExceeded",
    "BudgetState",
    "ClevAgentError",
    "DeliveryError",
    "Incident",
    "LLMCall",
    "LedgerError",
    "LoopDetected",
    "LoopGuard",
    "OpenLLMCall",
    "OpenToolCall",
    "Outcome",
    "PluginError",
    "Price",
    "Remaining",
    "RemoteStop",
    "Run",
    "RunSummary",
    "Spend",
    "Step",
    "Stop",
    "Stopped",
    "Ticket",
    "ToolCall",
    "Usage",
    "UsageError",
    "Warn",
    "Watchdog",
    "guard",
    "hookimpl",
    "init",
    "llm_call",
    "log_cost",
    "log_iteration",
    "log_tool_call",
    "outside_runs",
    "ping",
    "run",
    "shutdown",
    "tool_call",
]


def __getattr__(name: str) -> Any:
    """Import the loop guard when it is named: it is an eighth of what importing all of this takes, and few programs name it."""
    if name == "LoopGuard":
        from clevagent_core.guards.loop import LoopGuard  # noqa: PLC0415 - as said

        return LoopGuard
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
