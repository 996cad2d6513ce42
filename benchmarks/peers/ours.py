"""ClevAgent, in the same benchmarks: ``guard(model)``, its LangChain handler, and the door without a framework."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
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
    no_account,
    through,
)

DISTRIBUTION = "clevagent"


@contextmanager
def _account(setting: Setting) -> Iterator[Callable[[], float | None]]:
    """Run under the ceiling; give what tells the amount spent, in US dollars."""
    import clevagent

    logging.getLogger("clevagent").disabled = True  # it tells each refusal
    if setting.is_shared:
        _share(setting)
    own = () if setting.is_shared else [clevagent.Budget(usd=setting.ceiling_usd)]
    try:
        with clevagent.run(budgets=own) as run:
            # A run knows what it spent itself, not what other processes did.
            yield no_account if setting.is_shared else lambda: float(run.summary().total.cost_usd)
    finally:
        clevagent.shutdown()


def _share(setting: Setting) -> None:
    """Keep the account in a file, for the ledgers that can."""
    import clevagent

    day = clevagent.Budget(usd=setting.ceiling_usd, per="day")
    try:
        clevagent.init(ledger=f"sqlite:///{setting.folder / 'clevagent.sqlite3'}", budgets=[day])
    except clevagent.UsageError as error:
        raise NotOffered("its accounts live in the memory of one process") from error


@contextmanager
def _guard(model: Any, setting: Setting) -> Iterator[Attached]:
    import clevagent

    with _account(setting) as spent_usd:
        yield through(clevagent.guard(model), None, spent_usd)


@contextmanager
def _handler(model: Any, setting: Setting) -> Iterator[Attached]:
    from clevagent.integrations.langchain import ClevAgentCallbackHandler

    with _account(setting) as spent_usd:
        yield through(model, {"callbacks": [ClevAgentCallbackHandler()]}, spent_usd)


@contextmanager
def _door(_: Any, setting: Setting) -> Iterator[Attached]:
    client, aclient = clients(setting.provider_url)

    def call() -> object:
        with _block() as block:
            return _settled(block, client.chat.completions.create(**REQUEST))

    async def acall() -> object:
        async with _block() as block:
            return _settled(block, await aclient.chat.completions.create(**REQUEST))

    def broken() -> None:
        with _block():
            leave(iter(client.chat.completions.create(**REQUEST, stream=True)))

    with _account(setting) as spent_usd:
        yield Attached(call=call, acall=acall, broken=broken, spent_usd=spent_usd)


def _block() -> Any:
    import clevagent

    return clevagent.llm_call(model=MODEL, input=PROMPT, max_output_tokens=OUTPUT_LIMIT)


def _settled(block: Any, answer: Any) -> object:
    block.settle(input_tokens=answer.usage.prompt_tokens, output_tokens=answer.usage.completion_tokens)
    return answer


WAYS = {
    "guard": Way(label="`guard(model)`", attach=_guard, takes_model=True, is_shareable=True),
    "handler": Way(label="LangChain handler", attach=_handler, takes_model=True, is_shareable=True),
    "door": Way(label="`llm_call()` around OpenAI clients", attach=_door, takes_model=False, is_shareable=True),
}
