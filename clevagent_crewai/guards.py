"""``clevagent.guard`` for what is CrewAI's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crewai.agents.agent_builder.base_agent import BaseAgent
from crewai.crew import Crew
from crewai.flow.flow import Flow
from crewai.llms.base_llm import BaseLLM

from clevagent_core.budgets import Budget, OnExceed, check_actions
from clevagent_core.errors import UsageError
from clevagent_crewai.crews import Guard, check_scopes, guard_agent, guard_crew, guard_flow, models_in
from clevagent_crewai.models import guard_model
from clevagent_crewai.names import check_names

if TYPE_CHECKING:
    from clevagent_core.watchdog import Watchdog


def guard(obj: object, watchdog: Watchdog | None, budgets: tuple[Budget, ...], on_exceed: OnExceed | None) -> object | None:
    """Guard a crew, an agent, a flow or a model.

    Raises:
        UsageError: an action that it cannot carry out, a scope that it has not, or something of CrewAI's that cannot be guarded.

    """
    if isinstance(obj, Crew):
        check_actions(budgets, where="guard(crew)", can=("halt",))
        if on_exceed != "halt":  # for the budgets around it, too
            _needs_budgets("crew", budgets, on_exceed)
        check_scopes(obj, budgets)
        budgets = check_names(obj, models_in(obj), watchdog, budgets, where="guard(crew)")
        return guard_crew(obj, Guard(watchdog, budgets, on_exceed))
    if isinstance(obj, BaseLLM):
        check_actions(budgets, where="guard(llm)")
        _needs_budgets("llm", budgets, on_exceed)
        return guard_model(obj, watchdog, budgets)
    if isinstance(obj, BaseAgent):
        check_actions(budgets, where="guard(agent)")
        _needs_budgets("agent", budgets, on_exceed)
        budgets = check_names(obj, models_in(obj), watchdog, budgets, where="guard(agent)")
        return guard_agent(obj, Guard(watchdog, budgets, on_exceed))
    if isinstance(obj, Flow):
        check_actions(budgets, where="guard(flow)")
        _needs_budgets("flow", budgets, on_exceed)
        return guard_flow(obj, Guard(watchdog, budgets, on_exceed))
    return None


def _needs_budgets(what: str, budgets: tuple[Budget, ...], on_exceed: OnExceed | None) -> None:
    if on_exceed is None or budgets:
        return
    raise UsageError(
        f"guard({what}, on_exceed={on_exceed!r}) has no budgets of its own to which that could apply. "
        "Give budgets=[...] beside it, or say on_exceed in the budgets of init() or run()."
    )
