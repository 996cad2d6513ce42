"""agentguard47: its LangChain handler, its patch of the OpenAI clients, and the same patch with the store that makes it reserve."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.peers.ways import Attached, Setting, Way, around, clients, through

DISTRIBUTION = "agentguard47"


def _tracer(setting: Setting) -> Any:
    from agentguard import JsonlFileSink, Tracer

    return Tracer(service="benchmark", sink=JsonlFileSink(str(setting.folder / "traces.jsonl")))


@contextmanager
def _handler(model: Any, setting: Setting) -> Iterator[Attached]:
    from agentguard import BudgetGuard
    from agentguard.integrations.langchain import AgentGuardCallbackHandler

    guard = BudgetGuard(max_cost_usd=setting.ceiling_usd)
    handler = AgentGuardCallbackHandler(tracer=_tracer(setting), budget_guard=guard)
    yield through(model, {"callbacks": [handler]}, lambda: guard.state.cost_used)


@contextmanager
def _patched(setting: Setting, guard: Any, spent_usd: Any) -> Iterator[Attached]:
    from agentguard import patch_openai, patch_openai_async, unpatch_openai, unpatch_openai_async

    tracer = _tracer(setting)
    patch_openai(tracer, budget_guard=guard)
    patch_openai_async(tracer, budget_guard=guard)
    try:
        yield around(*clients(setting.provider_url), spent_usd)
    finally:
        unpatch_openai()
        unpatch_openai_async()


@contextmanager
def _client(_: Any, setting: Setting) -> Iterator[Attached]:
    from agentguard import BudgetGuard

    guard = BudgetGuard(max_cost_usd=setting.ceiling_usd)
    with _patched(setting, guard, lambda: guard.state.cost_used) as attached:
        yield attached


@contextmanager
def _stored(_: Any, setting: Setting) -> Iterator[Attached]:
    from agentguard import BudgetGuard, JsonFileStateStore

    store = JsonFileStateStore(setting.folder / "agentguard.json")
    guard = BudgetGuard(max_cost_usd=setting.ceiling_usd, store=store, key="benchmark")

    def spent_usd() -> float:
        totals = guard.reservation_totals()
        return sum(float(totals[kind]["cost"]) for kind in ("settled", "reserved", "unresolved"))

    with _patched(setting, guard, spent_usd) as attached:
        yield attached


WAYS = {
    "handler": Way(label="LangChain handler", attach=_handler, takes_model=True),
    "client": Way(label="patched OpenAI clients", attach=_client, takes_model=False),
    "store": Way(label="patched OpenAI clients, file store", attach=_stored, takes_model=False, is_shareable=True),
}
