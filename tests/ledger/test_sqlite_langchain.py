"""Guarded models in several processes, under one ceiling in a file, against a provider that bills."""

from __future__ import annotations

import threading
from decimal import Decimal

import pytest

from clevagent.testing import LoopbackProvider
from clevagent_core.budgets import Budget
from clevagent_core.ledger.inspection import LedgerFile
from clevagent_core.money import PICO_PER_USD

PROMPT = "Write me a poem about the sea and the moon. " * 10
LIMIT = 400
FITS = 10
TRIES = 50
PROCESSES = 5
CEILING = FITS * (len(PROMPT) * 2_500_000 + LIMIT * 10_000_000)
"""Exactly ten calls: the provider bills one token for each byte, and the whole output limit."""

PRELUDE = f"""
import logging
from decimal import Decimal
import clevagent
from clevagent import Budget
from langchain_openai import ChatOpenAI
logging.getLogger("clevagent").setLevel(logging.CRITICAL)
clevagent.init(ledger={{path!r}}, wait_s={{wait_s}}, budgets=[Budget(usd=Decimal({CEILING}) / {PICO_PER_USD}, per="day", name="ceiling")])
model = clevagent.guard(ChatOpenAI(model="gpt-4o", api_key="test", base_url={{url!r}}, max_tokens={LIMIT}))
def try_it(times):
    passed = 0
    for _ in range(times):
        try:
            model.invoke({PROMPT!r})
            passed += 1
        except Exception:
            pass
    return passed
"""


@pytest.fixture
def provider():
    with LoopbackProvider() as running:
        yield running


def balance(path) -> tuple[int, int]:
    file = LedgerFile(path)
    (found,) = (record.balance for record in file.accounts(0))
    file.close()
    return found.spent, found.held


def prelude(path, provider, wait_s: int = 20) -> str:
    return (
        PRELUDE.replace("{path!r}", repr(str(path))).replace("{url!r}", repr(provider.openai_url)).replace("{wait_s}", str(wait_s))
    )


@pytest.mark.slow
def test_guarded_models_in_five_processes_never_pass_the_ceiling_and_use_it_up(other, path, provider) -> None:
    there = [other(prelude(path, provider)) for _ in range(PROCESSES)]
    for process in there:
        process.begin(f"try_it({TRIES // PROCESSES})", "=")
    passed = sum(process.answer(60) for process in there)
    for process in there:
        assert process.finish() == 0
    assert provider.billed_pico <= CEILING
    assert provider.billed_pico / CEILING >= 0.9
    assert passed in {FITS - 1, FITS}
    assert balance(path) == (provider.billed_pico, 0)
    assert sorted(found.name for found in path.parent.iterdir()) == ["ledger.db", "ledger.db-lock"]


@pytest.mark.slow
def test_guarded_models_that_are_killed_never_pass_the_ceiling(other, path, provider) -> None:
    """Two processes at a time, killed as soon as one more call was billed; the last two use up what is left."""
    event = threading.Event()
    for is_last in (False, False, True):
        there = [other(prelude(path, provider, 0)) for _ in range(2)]
        billed = provider.billed_pico
        for process in there:
            process.begin("try_it(50)", "=")
        for _ in range(30_000):
            if provider.billed_pico > billed or all(process.has_answered() for process in there):
                break
            event.wait(0.001)
        for process in there:
            if is_last:
                process.answer(60)
                assert process.finish() == 0
            else:
                process.kill()
        # Those that were killed late may have left nothing.
        assert billed <= provider.billed_pico <= CEILING
    assert provider.billed_pico
    spent, held = balance(path)
    assert provider.billed_pico <= spent <= CEILING
    assert held == 0


def test_the_ceiling_is_what_the_rows_of_the_memory_ledger_have() -> None:
    assert Budget(usd=Decimal(CEILING) / PICO_PER_USD, per="day").limits() == ((0, CEILING),)
