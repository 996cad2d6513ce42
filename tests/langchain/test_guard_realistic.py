"""How much of a ceiling is used where what is reserved is far from what is billed.

Real tokenizers' ratios, answers that use a fifth of their limit, histories that grow over 30 turns.
"""

from __future__ import annotations

import asyncio
import json
import random
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import pytest
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI

import clevagent
from clevagent import Budget, BudgetExceeded
from clevagent.testing import LoopbackProvider, Reply
from clevagent_core.money import PICO_PER_USD

TURNS = 30
LIMIT = 500
WORDS = [
    "the",
    "model",
    "reads",
    "what",
    "it",
    "was",
    "sent",
    "and",
    "answers",
    "in",
    "a",
    "few",
    "lines",
    "of",
    "plain",
    "words",
    "that",
    "a",
    "person",
    "can",
    "follow",
    "without",
    "help",
]
TOKENS_PER_BYTE = {"english": 0.22, "json": 0.5}


def english(seed, size=420):
    source = random.Random(seed)  # noqa: S311 - text, not secrets
    return " ".join(source.choices(WORDS, k=size // 5))[:size]


def rows(seed, size=420):
    source = random.Random(seed)  # noqa: S311 - text, not secrets
    data = [{"id": source.randrange(10**6), "name": source.choice(WORDS), "price": source.random()} for _ in range(size // 48)]
    return json.dumps(data)


TEXT = {"english": english, "json": rows}


@pytest.fixture(params=["english", "json"])
def kind(request):
    return request.param


@pytest.fixture
def provider(kind):
    ratio = TOKENS_PER_BYTE[kind]
    # An answer's text is as long as what is billed for it.
    reply = Reply(text=TEXT[kind](0, int(LIMIT * 0.2 / ratio)))
    clevagent.init()
    with LoopbackProvider([reply], tokens_per_byte=ratio, output_share=0.2) as running:
        yield running


@pytest.fixture(params=["openai", "anthropic"])
def model(request, provider):
    if request.param == "openai":
        return ChatOpenAI(model="gpt-4o", api_key="test", base_url=provider.openai_url, max_tokens=LIMIT)
    return ChatAnthropic(model="claude-sonnet-4-6", api_key="test", base_url=provider.anthropic_url, max_tokens=LIMIT)


def beginning(kind, number):
    return [SystemMessage(f"You are agent {number}. " + english(number, 800))]


def question(kind, number, turn):
    return HumanMessage(TEXT[kind](1000 * number + turn))


def converse(model, kind, number, turns=TURNS):
    """One conversation whose history grows; tell whether it came to its end."""
    messages = beginning(kind, number)
    for turn in range(turns):
        messages.append(question(kind, number, turn))
        try:
            messages.append(model.invoke(messages))
        except BudgetExceeded:
            return False
    return True


async def aconverse(model, kind, number, turns=TURNS):
    messages = beginning(kind, number)
    for turn in range(turns):
        messages.append(question(kind, number, turn))
        try:
            messages.append(await model.ainvoke(messages))
        except BudgetExceeded:
            return False
    return True


def cost_of(model, kind, provider, conversations, turns=TURNS):
    """What conversations cost where nobody stops them."""
    for number in range(conversations):
        converse(model, kind, number, turns)
    billed = provider.billed_pico
    provider.reset()
    return billed


class Measured:
    """One run under a ceiling, with how much of it was used."""

    def __init__(self, provider, ceiling):
        self.provider, self.ceiling = provider, int(ceiling)
        self.watchdog = clevagent.init()
        self.block = clevagent.run(budgets=[Budget(usd=Decimal(self.ceiling) / PICO_PER_USD)])

    def __enter__(self):
        self.run = self.block.__enter__()
        return self

    def __exit__(self, *exception):
        self.block.__exit__(*exception)
        if exception == (None, None, None):
            summary = self.run.summary()
            assert self.watchdog.ledger.holds() == []
            assert summary.overshoot_usd == 0
            assert self.provider.billed_pico <= self.ceiling
            assert round(summary.total.cost_usd * PICO_PER_USD) == self.provider.billed_pico
            assert summary.refusals > 0

    @property
    def utilisation(self):
        return self.provider.billed_pico / self.ceiling


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.8, *(pytest.param(share, marks=pytest.mark.slow) for share in (1.0, 1.5, 2.5))])
def test_growing_histories_one_after_another(share, kind, model, provider):
    whole = cost_of(model, kind, provider, 1)
    guarded = clevagent.guard(model)
    with Measured(provider, share * whole * 0.999) as measured:
        for number in range(4):
            if not converse(guarded, kind, number):
                break
    assert measured.utilisation >= 0.8


@pytest.mark.slow
def test_short_prompts_one_after_another(kind, model, provider):
    whole = cost_of(model, kind, provider, 40, turns=1)
    guarded = clevagent.guard(model)
    with Measured(provider, whole) as measured:
        for number in range(100):
            if not converse(guarded, kind, number, turns=1):
                break
    assert measured.utilisation >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize("share", [1.5, pytest.param(3, marks=pytest.mark.slow)])
def test_eight_conversations_at_once_in_threads(share, kind, model, provider):
    whole = cost_of(model, kind, provider, 1)
    guarded = clevagent.guard(model)
    with Measured(provider, share * whole) as measured, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: converse(guarded, kind, number), range(8)))
    assert measured.utilisation >= 0.7


@pytest.mark.slow
@pytest.mark.parametrize("share", [1.5, 3])
def test_eight_conversations_at_once_in_tasks(share, kind, model, provider, aio):
    whole = cost_of(model, kind, provider, 1)
    guarded = clevagent.guard(model)

    async def main():
        await asyncio.gather(*(aconverse(guarded, kind, number) for number in range(8)))

    with Measured(provider, share * whole) as measured:
        aio(main())
    assert measured.utilisation >= 0.7


@pytest.mark.slow
def test_short_prompts_eight_at_once(kind, model, provider):
    whole = cost_of(model, kind, provider, 40, turns=1)
    guarded = clevagent.guard(model)
    with Measured(provider, whole) as measured, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: converse(guarded, kind, number, turns=1), range(100)))
    assert measured.utilisation >= 0.7


@pytest.mark.slow
def test_without_limits_eight_at_once(kind, provider, aio):
    """Nobody asked for a limit: each call leaves room for the others, and answers are not cut for it."""
    provider.reset([Reply(text=english(0), output_tokens=200)])
    model = ChatOpenAI(model="gpt-4o", api_key="test", base_url=provider.openai_url)
    whole = cost_of(model, kind, provider, 1)
    guarded = clevagent.guard(model)

    async def main():
        await asyncio.gather(*(aconverse(guarded, kind, number) for number in range(8)))

    with Measured(provider, 3 * whole) as measured:
        aio(main())
    assert measured.utilisation >= 0.7


@pytest.mark.slow
def test_histories_with_tools(kind, model, provider):
    """An agent's history: calls of tools and what they told, JSON inside JSON."""
    tools = [
        {"name": f"tool_{n}", "description": english(n, 300), "parameters": {"type": "object", "properties": {}}} for n in range(5)
    ]

    def work(model, number):
        messages = [*beginning(kind, number), question(kind, number, 0)]
        for turn in range(TURNS):
            try:
                model.invoke(messages)
            except BudgetExceeded:
                return False
            call = {"name": "tool_1", "args": {"query": rows(1000 * number + turn, 200)}, "id": f"call_{turn}"}
            messages += [AIMessage("Let me look.", tool_calls=[call]), ToolMessage(rows(turn, 500), tool_call_id=call["id"])]
        return True

    work(model.bind_tools(tools), 0)
    whole = provider.billed_pico
    provider.reset()
    guarded = clevagent.guard(model).bind_tools(tools)
    with Measured(provider, whole * 1.5) as measured:
        for number in range(3):
            if not work(guarded, number):
                break
    assert measured.utilisation >= 0.8
