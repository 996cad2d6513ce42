"""shekel: ``with budget()``, around OpenAI's clients and around LangChain's model. Several processes need Redis: not measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.peers.ways import Attached, Setting, Way, around, clients, through

DISTRIBUTION = "shekel"


@contextmanager
def _langchain(model: Any, setting: Setting) -> Iterator[Attached]:
    from shekel import budget

    with budget(max_usd=setting.ceiling_usd) as account:
        yield through(model, None, lambda: account.spent)


@contextmanager
def _client(_: Any, setting: Setting) -> Iterator[Attached]:
    from shekel import budget

    with budget(max_usd=setting.ceiling_usd) as account:
        yield around(*clients(setting.provider_url), lambda: account.spent)


WAYS = {
    "langchain": Way(label="`with budget()` around LangChain", attach=_langchain, takes_model=True),
    "client": Way(label="`with budget()` around OpenAI clients", attach=_client, takes_model=False),
}
