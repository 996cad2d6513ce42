"""agentbudget: its LangChain callback, and its wrapper around a client. Its loop detection is set out of reach: only ceilings speak."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.peers.ways import Attached, Setting, Way, around, clients, through

DISTRIBUTION = "agentbudget"
_NEVER = 10**9
_WINDOW_S = 1e-3
"""Its detector goes through all calls of its window at each call; with the default minute, a busy process pays for thousands."""


def _budget(ceiling_usd: float) -> Any:
    from agentbudget import AgentBudget

    return AgentBudget(max_spend=ceiling_usd, max_repeated_calls=_NEVER, loop_window_seconds=_WINDOW_S)


@contextmanager
def _handler(model: Any, setting: Setting) -> Iterator[Attached]:
    from agentbudget.integrations.langchain import LangChainBudgetCallback

    session = _budget(setting.ceiling_usd).session()
    with LangChainBudgetCallback(budget=setting.ceiling_usd, session=session) as callback:
        yield through(model, {"callbacks": [callback]}, lambda: session.spent)


@contextmanager
def _client(_: Any, setting: Setting) -> Iterator[Attached]:
    import agentbudget

    with _budget(setting.ceiling_usd).session() as session:
        client, aclient = (agentbudget.wrap_client(client, session) for client in clients(setting.provider_url))
        yield around(client, aclient, lambda: session.spent)


WAYS = {
    "handler": Way(label="LangChain handler", attach=_handler, takes_model=True),
    "client": Way(label="wrapped OpenAI client", attach=_client, takes_model=False),
}
