"""``llm_call`` around a client that is guarded, too: the request is the block's, and counts once."""

from __future__ import annotations

import asyncio

import pytest
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI, DefaultHttpxClient, OpenAI

import clevagent
from clevagent import Budget, UsageError
from clevagent.testing import LoopbackProvider

REQUEST = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 10}


@pytest.fixture
def url():
    with LoopbackProvider() as provider:
        yield provider.openai_url


@pytest.mark.parametrize("attached", [False, True])
def test_a_request_inside_a_block_counts_once(url, attached):
    clevagent.init(attach=["openai"] if attached else [])
    client = OpenAI(api_key="test", base_url=url)
    client = client if attached else clevagent.guard(client)
    with clevagent.run() as run:
        with clevagent.llm_call(model="gpt-4o", input="Hello", max_output_tokens=10) as call:
            usage = client.chat.completions.create(**REQUEST).usage
            call.settle(input_tokens=usage.prompt_tokens, output_tokens=usage.completion_tokens)
        assert run.summary().total.calls == 1
        client.chat.completions.create(**REQUEST)
    assert run.summary().total.calls == 2


def test_a_second_request_inside_a_block_is_a_call_of_its_own(url):
    clevagent.init()
    client = clevagent.guard(OpenAI(api_key="test", base_url=url))
    with clevagent.run() as run, clevagent.llm_call(model="gpt-4o", input="Hello", max_output_tokens=10) as call:
        client.chat.completions.create(**REQUEST)
        client.chat.completions.create(**REQUEST)
        call.settle(input_tokens=5, output_tokens=10)
    assert run.summary().total.calls == 2


def test_the_same_asynchronously(url):
    clevagent.init()

    async def main():
        async with clevagent.guard(AsyncOpenAI(api_key="test", base_url=url)) as client:
            async with clevagent.llm_call(model="gpt-4o", input="Hello", max_output_tokens=10) as call:
                await client.chat.completions.create(**REQUEST)
                call.settle(input_tokens=5, output_tokens=10)
            await client.chat.completions.create(**REQUEST)

    with clevagent.run(budgets=[Budget(llm_calls=2)]) as run:
        asyncio.run(main())
    assert run.summary().total.calls == 2


with OpenAI(api_key="test") as _plain:
    Transport = type(_plain._client._transport)  # of httpx, or of httpx2


class RetryTransport(Transport):
    """As in httpx-retries, and many programs' own."""


class Patient(RetryTransport):
    pass


@pytest.mark.parametrize("transport", [RetryTransport, Patient])
@pytest.mark.parametrize("how", [lambda t: {"transport": t}, lambda t: {"mounts": {"all://": t}}], ids=["transport", "mounts"])
def test_an_http_client_that_sends_again_by_itself_is_refused_with_the_way_that_works(provider, transport, how):
    with DefaultHttpxClient(**how(transport())) as http:
        client = OpenAI(api_key="test", base_url=provider.openai_url, http_client=http)
        with pytest.raises(UsageError, match=rf"guard\(client\) .* \({transport.__name__}\).*max_retries="):
            clevagent.guard(client)
        with pytest.raises(UsageError, match=r"guard\(model\)"):
            clevagent.guard(ChatOpenAI(model="gpt-4o", api_key="test", base_url=provider.openai_url, http_client=http))


def test_a_transport_that_only_connects_again_is_fine(provider):
    with DefaultHttpxClient(transport=Transport(retries=3)) as http:
        clevagent.guard(OpenAI(api_key="test", base_url=provider.openai_url, http_client=http))
