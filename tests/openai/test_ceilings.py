"""The promise, with real SDKs and a provider that bills: what a guarded client is billed for never passes the ceiling.

Every way of calling is tried 50 times against a ceiling that fits 10 calls; the provider bills one token for each byte and the whole
output limit.
"""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading

import anthropic
import openai
import pytest

import clevagent
from clevagent import Budget, BudgetExceeded
from clevagent.testing import Reply
from clevagent_core.accounts import accounts_of

TRIES = 50
FITS = 10


def swallow(call):
    try:
        return call()
    except Exception:  # what careless callers do
        return None


async def aswallow(awaitable):
    try:
        return await awaitable
    except Exception:  # what careless callers do
        return None


def sequential(api, aio):
    client = clevagent.guard(api.client())
    for _ in range(TRIES):
        swallow(lambda: api.ask(client))


def threads(api, aio):
    client = clevagent.guard(api.client())
    started = [threading.Thread(target=swallow, args=(lambda: api.ask(client),)) for _ in range(TRIES)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()


def tasks(api, aio):
    async def main():
        async with clevagent.guard(api.aclient()) as client:
            await asyncio.gather(*(aswallow(api.ask(client)) for _ in range(TRIES)))

    aio(main())


def streams(api, aio):
    client = clevagent.guard(api.client())
    for _ in range(TRIES):
        swallow(lambda: list(api.ask(client, stream=True)))


def astreams(api, aio):
    async def one(client):
        async for _ in await api.ask(client, stream=True):
            pass

    async def main():
        async with clevagent.guard(api.aclient()) as client:
            await asyncio.gather(*(aswallow(one(client)) for _ in range(TRIES)))

    aio(main())


def attached(api, aio):
    clevagent.init(wait_s=20).attach("anthropic" if api.is_anthropic else "openai")
    client = api.client()
    for _ in range(TRIES):
        swallow(lambda: api.ask(client))


def attached_and_guarded(api, aio):
    clevagent.init(wait_s=20).attach("anthropic" if api.is_anthropic else "openai")
    client = clevagent.guard(api.client())
    for _ in range(TRIES):
        swallow(lambda: list(api.ask(client, stream=True)))


WHOLE = [sequential, threads, tasks, streams, astreams, attached, attached_and_guarded]


@pytest.mark.parametrize("call", WHOLE, ids=lambda call: call.__name__)
def test_the_ceiling_holds_and_is_used(api, held, call, aio):
    ceiling = FITS * (api.price() + 60 * api.rates[0])
    with held(ceiling) as run:
        call(api, aio)
    assert run.summary().calls_charged_at_bound == 0
    assert api.provider.billed_pico >= 0.9 * ceiling
    assert api.provider.request_count == FITS
    assert run.summary().total.calls == FITS


@pytest.mark.slow
@pytest.mark.parametrize("calls", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("call", [sequential, threads, tasks, streams], ids=lambda call: call.__name__)
def test_a_ceiling_below_one_call_holds(api, held, calls, call, aio):
    with held(int(calls * api.price())):
        call(api, aio)


@pytest.mark.parametrize("name", ["chat", "responses"])
def test_without_a_limit_of_the_users_what_is_left_is_used(request, held, name):
    """A call that asks for no limit is sent one that fits; each such call takes what the settings assume, the last what is left."""
    api = request.getfixturevalue(name)
    ceiling = FITS * api.price(output=4096)
    with held(ceiling):
        client = clevagent.guard(api.client())
        for _ in range(TRIES):
            swallow(lambda: api.ask(client, limit=None))
    assert api.provider.billed_pico >= 0.9 * ceiling
    assert all(api.limit_key in request.body for request in api.provider.requests)


# -- streams that are not read to their end -------------------------------------------------------------------------------


def broken_off(stream):
    next(iter(stream))


def closed(stream):
    next(iter(stream))
    stream.close()


def left(stream):
    with stream:
        for _ in stream:
            break


def raised(stream):
    with pytest.raises(KeyError), stream:
        for _ in stream:
            raise KeyError


def dropped(stream):
    del stream


@pytest.fixture
def collected_between_calls():
    """Collect what is dropped between calls only: in a call httpcore holds a lock that closing a dropped stream waits for, guarded or not."""
    gc.disable()
    gc.freeze()  # so that a collection looks at what this test has made, which is fast
    yield gc.collect
    gc.unfreeze()
    gc.enable()


@pytest.mark.parametrize("consume", [broken_off, closed, left, raised, dropped], ids=lambda call: call.__name__)
def test_streams_that_are_broken_off_are_charged(api, held, collected_between_calls, consume):
    # One event at a time, so that what tells the usage has not come when the consumer stops.
    api.provider.reset([Reply(text="word " * 50, chunks=50, chunk_delay_s=0.02)])
    ceiling = FITS * (api.price() + 60 * api.rates[0])
    with held(ceiling) as run:
        client = clevagent.guard(api.client())
        for _ in range(TRIES):
            swallow(lambda: consume(api.ask(client, stream=True)))
            collected_between_calls()
    assert 1 <= api.provider.request_count <= FITS
    assert run.summary().calls_charged_at_bound == api.provider.request_count
    assert api.provider.billed_pico >= 0.7 * ceiling  # the bound of a stream is in bytes, with what is added to messages


@pytest.mark.slow
def test_streams_that_are_cancelled_are_charged(api, held, aio):
    api.provider.reset([Reply(text="word " * 50, chunks=50, chunk_delay_s=0.02)])

    async def main():
        async with clevagent.guard(api.aclient()) as client:

            async def one():
                async with asyncio.timeout(None) as limit:
                    async for _ in await api.ask(client, stream=True):
                        limit.reschedule(0)

            for _ in range(TRIES):
                await aswallow(one())

    ceiling = FITS * (api.price() + 60 * api.rates[0])
    with held(ceiling) as run:
        aio(main())
    assert 1 <= api.provider.request_count <= FITS
    assert run.summary().calls_charged_at_bound == api.provider.request_count


@pytest.mark.parametrize("how", ["wait_for", "timeout", "cancel"])
def test_calls_that_are_cancelled_are_charged(api, held, aio, how):
    api.provider.reset([Reply(hang=True)])

    async def one(client):
        asked = asyncio.ensure_future(api.ask(client))
        await asyncio.to_thread(api.provider.wait_for_requests)
        if how == "cancel":
            asked.cancel()
            await asked
        elif how == "wait_for":
            await asyncio.wait_for(asked, 0.01)
        else:
            async with asyncio.timeout(0.01):
                await asked

    async def main():
        async with clevagent.guard(api.aclient()) as client:
            with pytest.raises((TimeoutError, asyncio.CancelledError)):
                await one(client)

    with held(2 * api.price()) as run:
        aio(main())
        assert clevagent.init(wait_s=20).ledger.holds() == []
        assert run.summary().calls_charged_at_bound == 1


# -- retries of the SDK ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "is_billed"),
    [(Reply(status=429), False), (Reply(status=500), False), (Reply(drop="before"), True), (Reply(drop="middle"), True)],
    ids=["429", "500", "dropped", "cut"],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_each_attempt_of_the_sdk_is_reserved_and_settled(api, held, aio, fast_retries, fault, is_billed, is_async):
    api.provider.reset([fault, fault, Reply()])

    async def main():
        async with clevagent.guard(api.aclient()) as client:
            return await api.ask(client)

    with held(4 * api.price()) as run:
        if is_async:
            aio(main())
        else:
            api.ask(clevagent.guard(api.client()))
    summary = run.summary()
    assert api.provider.request_count == 3
    assert summary.calls_charged_at_bound == (2 if is_billed else 0)
    assert summary.total.calls == (3 if is_billed else 1)


def test_retries_stop_at_the_ceiling(api, held, fast_retries):
    api.provider.reset([Reply(drop="before")])
    with held(int(2.5 * api.price())):
        with pytest.raises(BudgetExceeded):
            api.ask(clevagent.guard(api.client(max_retries=20)))
    assert api.provider.request_count == 2


@pytest.mark.slow
def test_a_client_that_times_out_is_charged_for_each_attempt(api, held, fast_retries):
    api.provider.reset([Reply(hang=True)])
    sdk = anthropic if api.is_anthropic else openai
    with held(10 * api.price()) as run:
        with pytest.raises(sdk.APITimeoutError):
            # To answer only: a busy machine may take longer to connect.
            api.ask(clevagent.guard(api.client(timeout=sdk.Timeout(30, read=0.5))))
    assert api.provider.request_count == 3
    assert run.summary().calls_charged_at_bound == 3


@pytest.mark.parametrize(("retries", "requests"), [(0, 1), (1, 2), (4, 5)])
def test_retries_of_one_call_are_what_its_user_says(api, fast_retries, retries, requests):
    api.provider.reset([Reply(status=429)])
    client = clevagent.guard(api.client(max_retries=7)).with_options(max_retries=retries)
    with pytest.raises((openai.RateLimitError, anthropic.RateLimitError)):
        api.ask(client)
    assert api.provider.request_count == requests


def test_what_the_server_forbids_is_not_repeated(api, fast_retries):
    api.provider.reset([Reply(status=429, headers={"x-should-retry": "false"})])
    with pytest.raises((openai.RateLimitError, anthropic.RateLimitError)):
        api.ask(clevagent.guard(api.client()))
    assert api.provider.request_count == 1


def test_the_number_of_retries_is_told_as_the_sdk_tells_it(api, fast_retries):
    api.provider.reset([Reply(status=429), Reply()])
    answer = api.resource(clevagent.guard(api.client())).with_raw_response.create(**api.params())
    assert answer.retries_taken == 1


def test_a_server_that_cannot_be_reached_costs_nothing(api, held, fast_retries):
    client = clevagent.guard(api.client(base_url="http://127.0.0.1:9/v1"))
    with held(2 * api.price()) as run:
        with pytest.raises((openai.APIConnectionError, anthropic.APIConnectionError)):
            api.ask(client)
    assert run.summary().total.cost_usd == 0


# -- several processes ----------------------------------------------------------------------------------------------------

_CHILD = """
import sys
import clevagent
from clevagent import Budget
ledger, url, name, usd = sys.argv[1:]
clevagent.init(ledger=ledger, budgets=[Budget(usd=usd, per="lifetime")], wait_s=20)
if name == "messages":
    from anthropic import Anthropic as Client
else:
    from openai import OpenAI as Client
client = clevagent.guard(Client(api_key="test", base_url=url))
content = "Write me a poem about the sea and the moon. " * 10
for _ in range(20):
    try:
        if name == "messages":
            client.messages.create(model="claude-sonnet-4-6", max_tokens=400, messages=[{"role": "user", "content": content}])
        else:
            client.chat.completions.create(model="gpt-4o", max_tokens=400, messages=[{"role": "user", "content": content}])
    except clevagent.BudgetExceeded:
        pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chat", "messages"])
def test_processes_that_share_a_file_share_the_ceiling(request, provider, tmp_path, name):
    api = request.getfixturevalue(name)
    ceiling = FITS * (api.price() + 60 * api.rates[0])
    url = provider.anthropic_url if api.is_anthropic else provider.openai_url
    arguments = [f"sqlite:///{tmp_path}/ledger.db", url, name, f"{ceiling / 10**12:.12f}"]
    children = [subprocess.Popen([sys.executable, "-c", _CHILD, *arguments], stderr=subprocess.PIPE) for _ in range(3)]
    for child in children:
        _, errors = child.communicate(timeout=100)
        assert child.returncode == 0, errors
    assert 0.9 * ceiling <= provider.billed_pico <= ceiling
    one = clevagent.init(ledger=arguments[0], budgets=[Budget(usd=arguments[3], per="lifetime")])
    assert one.ledger.balance(accounts_of(one.process_run)[0][1]).spent == provider.billed_pico
