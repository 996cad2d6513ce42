"""floe-guard: its LangChain handler, its OpenAI adapter, and reserving by hand what it estimates for the request.

Processes share a ceiling through its SQLite store, which it has for the adapter and for reserving by hand; no stream is allowed then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.peers.ways import (
    MODEL,
    OUTPUT_LIMIT,
    PROMPT,
    REQUEST,
    Attached,
    NotOffered,
    Setting,
    Way,
    clients,
    leave,
    through,
)

DISTRIBUTION = "floe-guard"


def _guard(setting: Setting) -> Any:
    from floe_guard import BudgetGuard, SqliteStore

    def quiet(_spent: float, _limit: float) -> None:
        """It would print a banner for each refusal."""

    store = {"window": "utc-day", "store": SqliteStore(str(setting.folder / "floe.sqlite3"))} if setting.is_shared else {}
    return BudgetGuard(limit_usd=setting.ceiling_usd, on_block=quiet, **store)


@contextmanager
def _handler(model: Any, setting: Setting) -> Iterator[Attached]:
    from floe_guard.integrations.langchain import budget_guard_callback_handler

    guard = _guard(setting)
    yield through(model, {"callbacks": [budget_guard_callback_handler(guard)]}, lambda: guard.spent_usd)


@contextmanager
def _adapter(_: Any, setting: Setting) -> Iterator[Attached]:
    from floe_guard.integrations.openai import guarded_acompletion, guarded_completion

    guard = _guard(setting)
    client, aclient = clients(setting.provider_url)

    def broken() -> None:
        raise NotOffered("its OpenAI adapter refuses streams")

    yield Attached(
        call=lambda: guarded_completion(guard, client, **REQUEST),
        acall=lambda: guarded_acompletion(guard, aclient, **REQUEST),
        broken=broken,
        spent_usd=lambda: _spent(guard, setting),
    )


def _spent(guard: Any, setting: Setting) -> float:
    # A guard with a store looks into it when it is asked something, not when its field is read.
    return _guard(setting).spent_usd if setting.is_shared else guard.spent_usd


class _ByHand:
    """Reserve what the guard estimates for the request, send it, settle to what was told: as its docs write it."""

    def __init__(self, setting: Setting) -> None:
        from floe_guard.stream import approx_tokens

        self._guard = _guard(setting)
        self._client, self._aclient = clients(setting.provider_url)
        self._setting = setting
        self._prompt_tokens = approx_tokens(PROMPT)

    def call(self) -> object:
        held = self._reserve()
        return self._settle(held, self._client.chat.completions.create(**REQUEST))

    async def acall(self) -> object:
        held = self._reserve()
        return self._settle(held, await self._aclient.chat.completions.create(**REQUEST))

    def broken(self) -> None:
        from floe_guard import guard_stream

        held = self._reserve()
        chunks = self._client.chat.completions.create(**REQUEST, stream=True)
        leave(guard_stream(self._guard, MODEL, chunks, prompt_tokens=self._prompt_tokens, reserved=held, get_text=_text))

    def spent_usd(self) -> float:
        return _spent(self._guard, self._setting)

    def _reserve(self) -> Any:
        return self._guard.reserve(self._guard.estimate_call(MODEL, self._prompt_tokens, OUTPUT_LIMIT))

    def _settle(self, held: Any, answer: Any) -> object:
        self._guard.settle(MODEL, answer.usage.prompt_tokens, answer.usage.completion_tokens, reserved=held)
        return answer


def _text(chunk: Any) -> str:
    return (chunk.choices[0].delta.content or "") if chunk.choices else ""


@contextmanager
def _by_hand(_: Any, setting: Setting) -> Iterator[Attached]:
    hand = _ByHand(setting)
    yield Attached(call=hand.call, acall=hand.acall, broken=hand.broken, spent_usd=hand.spent_usd)


WAYS = {
    "handler": Way(label="LangChain handler", attach=_handler, takes_model=True),
    "adapter": Way(label="OpenAI adapter", attach=_adapter, takes_model=False, is_shareable=True),
    "by_hand": Way(label="`reserve(estimate_call())` by hand", attach=_by_hand, takes_model=False, is_shareable=True),
}
