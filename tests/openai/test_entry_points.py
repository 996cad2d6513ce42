"""Every entry point of the OpenAI SDK: refused before it is sent, and counted to the last unit when it is."""

from __future__ import annotations

import openai
import pytest
from pydantic import BaseModel

import clevagent
from clevagent import Budget, BudgetExceeded, UsageError
from clevagent.testing import Reply
from clevagent_core.money import PICO_PER_USD

MESSAGES = [{"role": "user", "content": "Hello"}]
CHAT = {"model": "gpt-4o", "messages": MESSAGES, "max_tokens": 50}
RESPONSE = {"model": "gpt-4o", "input": "Hello", "max_output_tokens": 50}


class Answer(BaseModel):
    value: int


def chat_create(client):
    return client.chat.completions.create(**CHAT)


def chat_create_stream(client):
    return list(client.chat.completions.create(**CHAT, stream=True))


def chat_parse(client):
    return client.chat.completions.parse(**CHAT, response_format=Answer)


def chat_stream(client):
    with client.chat.completions.stream(**CHAT) as stream:
        return stream.get_final_completion()


def chat_raw(client):
    return client.chat.completions.with_raw_response.create(**CHAT).parse()


def chat_raw_response(client):
    return client.chat.completions.with_raw_response.create(**CHAT)


def chat_raw_stream(client):
    return list(client.chat.completions.with_raw_response.create(**CHAT, stream=True).parse())


def chat_streaming_response(client):
    with client.chat.completions.with_streaming_response.create(**CHAT) as response:
        return response.parse()


def chat_streaming_response_lines(client):
    with client.chat.completions.with_streaming_response.create(**CHAT, stream=True) as response:
        return list(response.iter_lines())


def chat_beta(client):
    return client.beta.chat.completions.parse(**CHAT, response_format=Answer)


def chat_with_options(client):
    return client.with_options(timeout=9).copy(max_retries=1).chat.completions.create(**CHAT)


def completions(client):
    return client.completions.create(model="gpt-3.5-turbo-instruct", prompt=["one", "two"], max_tokens=20, n=2, best_of=3)


def completions_stream(client):
    return list(client.completions.create(model="gpt-3.5-turbo-instruct", prompt="one", max_tokens=20, stream=True))


def responses_create(client):
    return client.responses.create(**RESPONSE)


def responses_create_stream(client):
    return list(client.responses.create(**RESPONSE, stream=True))


def responses_parse(client):
    return client.responses.parse(**RESPONSE, text_format=Answer)


def responses_stream(client):
    with client.responses.stream(**RESPONSE) as stream:
        return stream.get_final_response()


def embeddings(client):
    return client.embeddings.create(model="text-embedding-3-small", input=["Hello", "World"])


def embeddings_of_tokens(client):
    return client.embeddings.create(model="text-embedding-3-small", input=[[1, 2, 3], [4]])


def plain_post(client):
    return client.post("/chat/completions", body=CHAT, cast_to=object)


def extra_body(client):
    return client.chat.completions.create(model="gpt-4o", messages=[], extra_body={"messages": MESSAGES, "max_tokens": 50})


ENTRY_POINTS = [
    chat_create, chat_create_stream, chat_parse, chat_stream, chat_raw, chat_raw_stream, chat_streaming_response,
    chat_streaming_response_lines, chat_beta, chat_with_options, completions, completions_stream, responses_create,
    responses_create_stream, responses_parse, responses_stream, embeddings, embeddings_of_tokens, plain_post, extra_body,
]  # fmt: skip


@pytest.fixture
def client(provider):
    provider.reset([Reply(text='{"value": 1}')])
    # What this model costs the loopback provider is what the price list says.
    with openai.OpenAI(api_key="test", base_url=provider.openai_url) as client:
        yield clevagent.guard(client)


@pytest.mark.parametrize("call", ENTRY_POINTS, ids=lambda call: call.__name__)
@pytest.mark.parametrize("how", ["guarded", "attached"])
def test_every_entry_point_is_refused_before_it_is_sent(provider, client, call, how):
    if how == "attached":
        clevagent.init(attach=["openai"])
        client = openai.OpenAI(api_key="test", base_url=provider.openai_url)
    with clevagent.run(budgets=[Budget(usd="0.00000001")]) as run:
        for _ in range(3):
            with pytest.raises(BudgetExceeded):
                call(client)
    assert provider.request_count == 0
    assert run.summary().total.calls == 0


@pytest.mark.parametrize("call", ENTRY_POINTS, ids=lambda call: call.__name__)
def test_every_entry_point_is_counted_as_it_is_billed(provider, client, call):
    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        call(client)
    total = run.summary().total
    [request] = provider.requests
    assert (total.calls, total.input_tokens, total.output_tokens) == (1, request.billed_input_tokens, request.billed_output_tokens)
    assert run.summary().calls_charged_at_bound == 0
    if "completions" not in request.path or "chat" in request.path:  # else the provider has no price for it
        assert round(total.cost_usd * PICO_PER_USD) == provider.billed_pico


@pytest.mark.parametrize(
    "call", [chat_create, chat_parse, chat_raw_response, responses_create, responses_parse, embeddings, completions]
)
def test_the_async_twins_are_refused_and_counted(provider, aio, call):
    provider.reset([Reply(text='{"value": 1}')])

    async def main():
        async with clevagent.guard(openai.AsyncOpenAI(api_key="test", base_url=provider.openai_url)) as client:
            with clevagent.run(budgets=[Budget(usd="0.00000001")]), pytest.raises(BudgetExceeded):
                await call(client)
            assert provider.request_count == 0
            with clevagent.run(budgets=[Budget(usd=1)]) as run:
                if call is chat_raw:
                    await client.chat.completions.with_raw_response.create(**CHAT)
                else:
                    await call(client)
            return run

    run = aio(main())
    total = run.summary().total
    assert total.input_tokens + total.output_tokens == provider.billed_tokens


@pytest.mark.parametrize("name", ["chat", "responses"])
def test_the_async_stream_helpers_are_counted(provider, aio, name):
    async def main():
        async with clevagent.guard(openai.AsyncOpenAI(api_key="test", base_url=provider.openai_url)) as client:
            make = client.responses.stream(**RESPONSE) if name == "responses" else client.chat.completions.stream(**CHAT)
            with clevagent.run(budgets=[Budget(usd=1)]) as run:
                async with make as stream:
                    async for _ in stream:
                        pass
            return run

    run = aio(main())
    assert round(run.summary().total.cost_usd * PICO_PER_USD) == provider.billed_pico > 0
    assert run.summary().calls_charged_at_bound == 0


def test_an_answer_that_the_sdk_cannot_parse_is_counted_as_it_is_billed(provider, client):
    provider.reset([Reply(text="no JSON")])
    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        with pytest.raises(ValueError, match="JSON"):
            chat_parse(client)
    assert round(run.summary().total.cost_usd * PICO_PER_USD) == provider.billed_pico > 0
    assert run.summary().calls_charged_at_bound == 0


# -- what costs nothing, and what cannot be priced -------------------------------------------------------------------------

FREE = {
    "models": lambda client: client.models.list(),
    "moderations": lambda client: client.moderations.create(input="Hello", model="omni-moderation-latest"),
    "files": lambda client: client.files.create(file=b"x", purpose="batch"),
    "retrieve": lambda client: client.responses.retrieve("resp_1"),
    "cancel": lambda client: client.responses.cancel("resp_1"),
    "stored": lambda client: client.chat.completions.update("chatcmpl-1", metadata={}),
    "counting": lambda client: client.post("/responses/input_tokens", body={"model": "gpt-4o", "input": "Hello"}, cast_to=object),
    "upload": lambda client: client.post("/uploads", body={"bytes": 1, "filename": "x"}, cast_to=object),
    "vector stores": lambda client: client.post("/vector_stores/vs_1/files", body={"file_id": "file-1"}, cast_to=object),
    "threads": lambda client: client.post("/threads/thread_1/messages", body={"role": "user", "content": "Hello"}, cast_to=object),
}
UNPRICED = {
    "images": lambda client: client.images.generate(prompt="x", model="gpt-image-1"),
    "speech": lambda client: client.audio.speech.create(input="x", model="tts-1", voice="alloy"),
    "transcription": lambda client: client.audio.transcriptions.create(file=b"x", model="whisper-1"),
    "batches": lambda client: client.batches.create(
        completion_window="24h", endpoint="/v1/chat/completions", input_file_id="file-1"
    ),
    "fine-tuning": lambda client: client.fine_tuning.jobs.create(model="gpt-4o-mini", training_file="file-1"),
    "fine-tuning resumed": lambda client: client.fine_tuning.jobs.resume("ftjob-1"),
    "assistants": lambda client: client.post("/threads/runs", body={"assistant_id": "asst_1"}, cast_to=object),
    "an agent": lambda client: client.post("/agents/sessions", body={"agent": "agent_1"}, cast_to=object),
    "a call": lambda client: client.post("/realtime/calls/call_1/accept", body={"model": "gpt-realtime"}, cast_to=object),
    "an endpoint of tomorrow": lambda client: client.post("/dialogues", body={"text": "Hello"}, cast_to=object),
}


@pytest.mark.parametrize("name", FREE)
def test_what_costs_nothing_is_sent_whatever_is_left(provider, client, name):
    with clevagent.run(budgets=[Budget(usd="0.00000001"), Budget(llm_calls=1)]) as run:
        for _ in range(2):
            with pytest.raises(openai.NotFoundError):  # the loopback provider does not serve it
                FREE[name](client)
    assert provider.request_count == 2
    assert run.summary().total.calls == 0


@pytest.mark.parametrize("name", UNPRICED)
@pytest.mark.parametrize("budget", [Budget(usd=100), Budget(tokens=10**9)], ids=["usd", "tokens"])
def test_what_cannot_be_priced_is_refused_under_a_ceiling_it_could_pass(provider, client, name, budget):
    with clevagent.run(budgets=[budget]), pytest.raises(UsageError, match=r"What a POST to .* costs cannot be told before"):
        UNPRICED[name](client)
    assert provider.request_count == 0


@pytest.mark.parametrize("name", UNPRICED)
def test_what_cannot_be_priced_counts_as_a_call(provider, client, name):
    with clevagent.run(budgets=[Budget(llm_calls=1)]) as run:
        with pytest.raises(openai.NotFoundError):
            UNPRICED[name](client)
        assert provider.request_count == 1
    assert run.summary().total.calls == 0  # refused by its provider, which bills nothing


def test_what_cannot_be_priced_passes_where_unknown_prices_are_allowed(provider, client):
    clevagent.init(unknown_price="allow")
    with clevagent.run(budgets=[Budget(usd=1)]), pytest.raises(openai.NotFoundError):
        UNPRICED["images"](client)
    assert provider.request_count == 1


def test_an_unknown_model_is_refused_under_a_ceiling_in_money(provider, client):
    with clevagent.run(budgets=[Budget(usd=1)]), pytest.raises(UsageError, match="'my-model' has no known price"):
        client.chat.completions.create(model="my-model", messages=MESSAGES)
    with clevagent.run(budgets=[Budget(tokens=10_000)]):
        client.chat.completions.create(model="my-model", messages=MESSAGES)
    assert provider.request_count == 1
