"""Which tools, models and roles a crew or an agent has. Checked with crewai 1.15.19 and 1.15.30.

CrewAI adds tools of its own when it kicks off (memory, files, MCP servers), and tools may call others: that a name is unknown only shows
at the end of the run. One that is nearly another is misspelt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from crewai.agents.agent_builder.base_agent import BaseAgent
from crewai.crew import Crew
from crewai.tools.agent_tools.ask_question_tool import AskQuestionTool
from crewai.tools.agent_tools.delegate_work_tool import DelegateWorkTool
from crewai.utilities.string_utils import sanitize_tool_name

from clevagent_core import default
from clevagent_core.budgets import Budget
from clevagent_core.names import Kind, Known, check_known
from clevagent_crewai.dialects import sent_name
from clevagent_crewai.gates import name_of

if TYPE_CHECKING:
    from crewai.llms.base_llm import BaseLLM

    from clevagent_core.watchdog import Watchdog

_DELEGATION = tuple(kind.model_fields["name"].default for kind in (AskQuestionTool, DelegateWorkTool))


def check_names(
    obj: Crew | BaseAgent, models: Sequence[BaseLLM], watchdog: Watchdog | None, budgets: tuple[Budget, ...], *, where: str
) -> tuple[Budget, ...]:
    """Refuse budgets that misspell a tool or a model of a crew, or of an agent its role; give them as calls name the tools.

    CrewAI calls a tool ``Read a page`` by another name, ``read_a_page``: either may be given.

    Raises:
        UsageError: they do.

    """
    if all(budget.tool is budget.model is budget.node is None for budget in budgets):
        return budgets
    called = {name: sanitize_tool_name(name) for name in tools_of(obj)}
    budgets = tuple(
        replace(budget, tool=called[budget.tool]) if budget.tool in called and budget.tool not in called.values() else budget
        for budget in budgets
    )
    known: dict[Kind, Known] = {"tool": Known(set(called.values()))}
    if isinstance(obj, BaseAgent):
        known["node"] = Known({role} if (role := name_of(obj, "role")) and "{" not in role else ())
    check_known(budgets, known, where=where)
    price = (watchdog or default.current()).plugins.price
    # The name of a model that has a price is not misspelt.
    named = [budget for budget in budgets if budget.model is not None and price(budget.model, None, None) is None]
    check_known(named, {"model": Known(set(map(sent_name, models)))}, where=where)
    return budgets


def learn_names(obj: object, watchdog: Watchdog) -> None:
    """Take note of the names that exist, as calls carry them."""
    if isinstance(obj, (Crew, BaseAgent)):
        watchdog.idle.learn("tool", map(sanitize_tool_name, tools_of(obj)))
        watchdog.idle.learn("node", (role for agent in _agents_of(obj) if (role := name_of(agent, "role")) is not None))


def tools_of(obj: Crew | BaseAgent) -> set[str]:
    """Name the tools of agents and tasks, and those by which agents ask each other."""
    agents = list(_agents_of(obj))
    owners: list[Any] = [*agents, *(obj.tasks if isinstance(obj, Crew) else ())]
    named = {str(tool.name) for owner in owners for tool in owner.tools or () if getattr(tool, "name", None)}
    return named.union(_DELEGATION) if any(getattr(agent, "allow_delegation", False) for agent in agents) else named


def _agents_of(obj: Crew | BaseAgent) -> Iterator[BaseAgent]:
    if isinstance(obj, BaseAgent):
        yield obj
        return
    yield from obj.agents
    if obj.manager_agent is not None:
        yield obj.manager_agent
