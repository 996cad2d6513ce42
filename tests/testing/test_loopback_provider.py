import asyncio
import json
import socket
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from itertools import repeat

import anthropic
import openai
import pytest
from langchain_anthropic import ChatAnthropic
from langchain_openai import ChatOpenAI, OpenAI

import clevagent.testing
from clevagent.testing import LoopbackProvider, Reply
from clevagent_core.errors import UsageError

HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather — now", "parameters": WEATHER}}


@pytest.fixture
def provider():
    with LoopbackProvider() as provider:
        yield provider


@pytest.fixture
def client(provider):
    with openai_client(provider) as client:
        yield client


@pytest.fixture
def claude(provider):
    with anthropic_client(provider) as client:
        yield client


def openai_client(provider, **options):
    return openai.OpenAI(api_key="test", base_url=provider.openai_url, **{"max_retries": 0} | options)


def anthropic_client(provider, **options):
    return anthropic.Anthropic(api_key="test", base_url=provider.anthropic_url, **{"max_retries": 0} | options)


def chat_openai(provider, **options):
    defaults = {"model": "gpt-4o-mini", "api_key": "test", "base_url": provider.openai_url, "max_retries": 0, "max_tokens": 100}
    return ChatOpenAI(**defaults | options)


def chat_anthropic(provider, **options):
    defaults = {"model": "claude-sonnet-4-6", "api_key": "test", "base_url": provider.anthropic_url, "max_retries": 0}
    return ChatAnthropic(**defaults | {"max_tokens": 100} | options)


def ask(client, **options):
    return client.chat.completions.create(**{"model": "gpt-4o-mini", "messages": HELLO, "max_completion_tokens": 100} | options)


def ask_claude(client, **options):
    return client.messages.create(**{"model": "claude-sonnet-4-6", "messages": HELLO, "max_tokens": 100} | options)


def compact(value):
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def names_exported():
    return {name for name in vars(clevagent.testing) if name[0].isupper()}


def test_all_names_are_exported():
    assert set(clevagent.testing.__all__) == names_exported()


# -- OpenAI chat completions --------------------------------------------------------------------------------------------------


def test_a_chat_is_answered_and_its_usage_is_the_bill(provider, client):
    answer = ask(client)
    assert answer.choices[0].message.content == "ok"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 100, 105)
    assert provider.billed_tokens == 105
    [request] = provider.requests
    assert (request.number, request.path, request.model) == (1, "/v1/chat/completions", "gpt-4o-mini")
    assert (request.kind, request.answered, request.status) == ("answer", True, 200)
    assert (request.billed_input_tokens, request.billed_output_tokens) == (5, 100)
    assert request.body["messages"] == HELLO


def test_bills_are_exact(provider, client):
    for _ in range(3):
        ask(client, max_completion_tokens=7)
    assert provider.billed_usd == 3 * (5 * Decimal("0.15") + 7 * Decimal("0.60")) / 10**6 == Decimal("0.00001485")
    assert provider.billed_pico == 14_850_000 == sum(request.billed_usd_pico for request in provider.requests)


def test_each_answer_is_billed_its_whole_limit(provider, client):
    answer = ask(client, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage.completion_tokens == 200


def test_a_request_without_a_limit_is_billed_the_default(client):
    assert ask(client, max_completion_tokens=openai.omit).usage.completion_tokens == 4096


def test_of_two_limits_the_larger_is_billed(client):
    assert ask(client, max_tokens=300).usage.completion_tokens == 300


@pytest.mark.parametrize("options", [{"max_completion_tokens": 0}, {"max_completion_tokens": "many"}, {"n": -1}])
def test_an_impossible_limit_is_a_bad_request(provider, client, options):
    with pytest.raises(openai.BadRequestError):
        ask(client, **options)
    assert (provider.request_count, provider.billed_pico) == (1, 0)


def test_everything_that_is_read_is_billed(provider, client):
    arguments = '{"city":"Zürich"}'
    history = [
        {"role": "system", "content": "brief"},
        {"role": "user", "content": [{"type": "text", "text": "wie ist…s"}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}},
        ]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]  # fmt: skip
    schema = {"type": "json_schema", "json_schema": {"name": "out", "schema": WEATHER}}
    usage = ask(client, messages=history, tools=[TOOL], response_format=schema).usage
    texts = ["brief", "wie ist…s", arguments, "rain", compact([TOOL]), compact(schema["json_schema"])]
    assert usage.prompt_tokens == sum(len(text.encode()) for text in texts)


def test_a_stream_tells_usage_only_when_asked(provider, client):
    provider.reset([Reply(text="a longer answer", chunks=5)])
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert [chunk.choices[0].delta.content for chunk in chunks[1:6]] == ["a l", "ong", "er ", "ans", "wer"]
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], 105)
    assert all(chunk.usage is None for chunk in ask(client, stream=True))
    assert provider.billed_tokens == 210


def test_tools_are_called(provider, client):
    provider.reset([Reply(text="", tool_calls=[("weather", {"city": "Rome"}), ("time", {})])])
    choice = ask(client).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert [(call.function.name, call.function.arguments) for call in choice.message.tool_calls] == [
        ("weather", '{"city": "Rome"}'),
        ("time", "{}"),
    ]


def test_old_text_completions_are_answered(provider):
    model = OpenAI(model="gpt-3.5-turbo-instruct", api_key="test", base_url=provider.openai_url, max_retries=0, max_tokens=50)
    assert model.invoke("hello") == "ok"
    assert "".join(model.stream("hello")) == "ok"
    assert provider.billed_tokens == 2 * 55
    result = model.generate(["one", "three"])
    assert [generation[0].text for generation in result.generations] == ["ok", "ok"]
    assert result.llm_output["token_usage"]["total_tokens"] == 8 + 2 * 50


# -- OpenAI responses ---------------------------------------------------------------------------------------------------------


def test_a_response_is_answered(provider, client):
    provider.reset([Reply(text="fine", tool_calls=[("weather", {"city": "Rome"})], reasoning_tokens=20)])
    answer = client.responses.create(model="gpt-4o", instructions="brief", input="hello", max_output_tokens=30)
    assert answer.output_text == "fine"
    assert (answer.output[1].name, answer.output[1].arguments) == ("weather", '{"city": "Rome"}')
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (10, 30)
    assert answer.usage.output_tokens_details.reasoning_tokens == 20
    assert provider.billed_usd == Decimal("0.000325")


def test_a_streamed_response_is_answered(provider, client):
    provider.reset([Reply(text="fine", tool_calls=[("weather", {"city": "Rome"})])])
    with client.responses.stream(model="gpt-4o", input=HELLO, max_output_tokens=30) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        answer = stream.get_final_response()
    assert deltas == ["fi", "ne"]
    assert answer.output[1].name == "weather"
    assert answer.usage.total_tokens == provider.billed_tokens == 35


# -- Anthropic messages -------------------------------------------------------------------------------------------------------


def test_a_message_is_answered(provider, claude):
    answer = ask_claude(claude, system="brief")
    assert (answer.content[0].text, answer.stop_reason) == ("ok", "end_turn")
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (10, 100)
    assert provider.billed_usd == Decimal("0.00153")


def test_a_streamed_message_is_answered(provider, claude):
    provider.reset([Reply(tool_calls=[("weather", {"city": "Rome"})])])
    with claude.messages.stream(model="claude-sonnet-4-6", messages=HELLO, max_tokens=100) as stream:
        answer = stream.get_final_message()
    assert (answer.content[0].text, answer.content[1].input) == ("ok", {"city": "Rome"})
    assert (answer.stop_reason, answer.usage.input_tokens, answer.usage.output_tokens) == ("tool_use", 5, 100)


def test_an_anthropic_history_is_billed(provider, claude):
    tool = {"name": "weather", "input_schema": WEATHER}
    history = [
        *HELLO,
        {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "weather", "input": {"city": "Rome"}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "rain"}]},
        ]},
    ]  # fmt: skip
    usage = ask_claude(claude, messages=history, system=[{"type": "text", "text": "brief"}], tools=[tool]).usage
    texts = ["hello", '{"city":"Rome"}', "rain", "brief", compact([tool])]
    assert usage.input_tokens == sum(map(len, texts))


def test_cached_tokens_lie_inside_openais_input_and_outside_anthropics(provider, client, claude):
    provider.reset([Reply(cached_tokens=3)])
    usage = ask(client).usage
    assert (usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens) == (5, 3)
    usage = ask_claude(claude).usage
    assert (usage.input_tokens, usage.cache_read_input_tokens) == (2, 3)
    assert [request.billed_input_tokens for request in provider.requests] == [5, 5]


# -- LangChain ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [chat_openai, chat_anthropic])
def test_langchain_reads_the_usage_that_was_billed(provider, make):
    provider.reset([Reply(cached_tokens=2, reasoning_tokens=9)])
    usage = make(provider).invoke("hello").usage_metadata
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (5, 100, 105)
    assert usage["input_token_details"]["cache_read"] == 2
    assert usage["output_token_details"]["reasoning"] == 9


@pytest.mark.parametrize("options", [{"stream_usage": True}, {"use_responses_api": True}])
def test_langchain_reads_the_usage_of_a_stream(provider, options):
    chunks = list(chat_openai(provider, **options).stream("hello"))
    assert "".join(chunk.text for chunk in chunks) == "ok"
    assert sum(chunk.usage_metadata["total_tokens"] for chunk in chunks if chunk.usage_metadata) == 105


def test_langchain_reads_the_usage_of_an_anthropic_stream(provider):
    chunks = list(chat_anthropic(provider).stream("hello"))
    assert "".join(chunk.text for chunk in chunks) == "ok"
    assert sum(chunk.usage_metadata["total_tokens"] for chunk in chunks if chunk.usage_metadata) == 105


@pytest.mark.parametrize("make", [chat_openai, chat_anthropic])
@pytest.mark.parametrize("stream", [False, True])
def test_langchain_gets_the_tool_calls(provider, make, stream):
    provider.reset([Reply(text="", tool_calls=[("weather", {"city": "Rome"})])])
    model = make(provider).bind_tools([TOOL])
    answer = sum(list(model.stream("hello"))[1:], start=next(model.stream("hello"))) if stream else model.invoke("hello")
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == [("weather", {"city": "Rome"})]


def test_structured_output_is_the_text_that_was_given(provider):
    provider.reset([Reply(text='{"city": "Rome"}')])
    assert chat_openai(provider).with_structured_output(WEATHER | {"title": "out"}).invoke("hello") == {"city": "Rome"}


# -- usage that is not told ---------------------------------------------------------------------------------------------------


def test_usage_can_be_left_out_and_is_billed(provider, client, claude):
    provider.reset([Reply(usage=False)])
    assert ask(client).usage is None
    assert client.responses.create(model="gpt-4o", input="hello", max_output_tokens=100).usage is None
    assert ask_claude(claude).usage is None
    assert all(chunk.usage is None for chunk in ask(client, stream=True, stream_options={"include_usage": True}))
    assert [event.type for event in ask_claude(claude, stream=True)][-1] == "message_stop"
    assert provider.billed_tokens == 5 * 105


@pytest.mark.parametrize("make", [chat_openai, chat_anthropic])
def test_langchain_survives_usage_that_is_left_out(provider, make):
    provider.reset([Reply(usage=False)])
    assert make(provider).invoke("hello").text == "ok"
    assert "".join(chunk.text for chunk in make(provider).stream("hello")) == "ok"
    assert provider.billed_tokens == 210


# -- faults -------------------------------------------------------------------------------------------------------------------


def test_an_error_bills_nothing(provider, client, claude):
    provider.reset([Reply(status=429, error_message="slow down", headers={"Retry-After": "7"})])
    with pytest.raises(openai.RateLimitError, match="slow down") as caught:
        ask(client)
    assert caught.value.response.headers["retry-after"] == "7"
    with pytest.raises(anthropic.RateLimitError, match="slow down"):
        ask_claude(claude, stream=True)
    assert (provider.request_count, provider.billed_pico) == (2, 0)
    assert [(request.kind, request.status) for request in provider.requests] == [("error", 429)] * 2


@pytest.mark.parametrize("make", [openai_client, anthropic_client])
def test_an_sdk_retries_after_a_429(provider, make):
    provider.reset(
        [Reply(status=429, headers={"Retry-After-Ms": "1"}), Reply(status=529, headers={"Retry-After-Ms": "1"}), Reply()]
    )
    with make(provider, max_retries=2) as client:
        ask(client) if make is openai_client else ask_claude(client)
    assert [request.status for request in provider.requests] == [429, 529, 200]
    assert provider.billed_tokens == 105


@pytest.mark.parametrize("stream", [False, True])
def test_a_connection_dropped_before_the_answer_is_billed(provider, client, stream):
    provider.reset([Reply(drop="before")])
    with pytest.raises(openai.APIConnectionError):
        ask(client, stream=stream)
    [request] = provider.requests
    assert (request.kind, request.answered, request.status) == ("drop", False, None)
    assert provider.billed_tokens == 105


def test_a_connection_dropped_in_the_middle_of_the_answer_is_billed(provider, client, claude):
    provider.reset([Reply(drop="middle")])
    with pytest.raises(openai.APIConnectionError):
        ask(client)
    with pytest.raises(anthropic.APIConnectionError):
        ask_claude(claude)
    assert provider.billed_tokens == 210


@pytest.mark.parametrize("make", [chat_openai, chat_anthropic])
def test_a_stream_dropped_in_the_middle_gives_some_text_and_an_error(provider, make):
    provider.reset([Reply(text="half an answer", drop="middle", chunks=20)])
    text = ""
    with pytest.raises(Exception, match=r"(?i)connection|peer closed|incomplete"):
        for chunk in make(provider).stream("hello"):
            text += chunk.text
    assert text
    assert "half an answer".startswith(text)
    assert provider.billed_tokens == 105


@pytest.mark.slow
def test_every_attempt_that_times_out_is_billed(provider):
    provider.reset([Reply(hang=True), Reply(hang=True), Reply()])
    with openai_client(provider, max_retries=2, timeout=openai.Timeout(5, read=0.2)) as client:
        ask(client)
    assert [request.kind for request in provider.requests] == ["hang", "hang", "answer"]
    assert provider.billed_tokens == 3 * 105


def test_a_hanging_request_ends_when_the_provider_closes(provider, client):
    provider.reset([Reply(hang=True)])
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(ask, client)
        assert provider.wait_for_requests()
        provider.close()
        assert isinstance(asked.exception(timeout=5), openai.APIConnectionError)
    assert provider.billed_tokens == 105


def test_a_delay_ends_when_the_provider_closes(provider, client):
    provider.reset([Reply(delay_s=60)])
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(ask, client)
        assert provider.wait_for_requests()
        provider.close()
        assert isinstance(asked.exception(timeout=5), openai.APIConnectionError)


def test_a_delayed_answer_arrives(provider, client):
    provider.reset([Reply(delay_s=0.01, chunk_delay_s=0.001)])
    assert ask(client).choices[0].message.content == "ok"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True)) == "ok"


def test_a_stream_that_the_client_breaks_off_is_billed_in_full(provider, client):
    provider.reset([Reply(text="word " * 100, chunks=100, chunk_delay_s=0.05)])
    with ask(client, stream=True) as stream:
        next(iter(stream))
    assert provider.billed_tokens == 105


def test_a_cancelled_task_is_billed(provider):
    provider.reset([Reply(hang=True)])

    async def main():
        async with openai.AsyncOpenAI(api_key="test", base_url=provider.openai_url, max_retries=0) as client:
            asked = asyncio.create_task(ask(client))
            assert await asyncio.to_thread(provider.wait_for_requests)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked

    asyncio.run(main())
    assert provider.billed_tokens == 105


# -- scripts ------------------------------------------------------------------------------------------------------------------


def test_the_last_reply_of_a_script_is_repeated(provider, client):
    provider.reset([Reply(text="one"), Reply(text="two")])
    assert [ask(client).choices[0].message.content for _ in range(4)] == ["one", "two", "two", "two"]


def test_a_script_may_be_endless(provider, client):
    provider.reset(repeat(Reply(text="again")))
    assert [ask(client).choices[0].message.content for _ in range(3)] == ["again"] * 3


def test_a_script_may_look_at_the_request(provider, client):
    provider.reset(lambda body: Reply(text=body["messages"][0]["content"].upper()))
    assert ask(client).choices[0].message.content == "HELLO"


def test_a_broken_script_shows_at_once(provider):
    provider.reset(lambda body: body["nothing"])
    with openai_client(provider, max_retries=5) as client, pytest.raises(openai.InternalServerError, match="KeyError"):
        ask(client)
    assert (provider.request_count, provider.billed_pico) == (1, 0)


def test_a_reply_can_set_the_bill(provider, client):
    provider.reset([Reply(input_tokens=1_000_000, output_tokens=0)])
    assert ask(client, n=3).usage.prompt_tokens == 1_000_000
    assert provider.billed_usd == Decimal("0.15")


def test_resetting_forgets_the_bill_and_goes_on_with_the_script(provider, client):
    provider.reset([Reply(text="one"), Reply(text="two")])
    ask(client)
    provider.reset()
    assert (provider.requests, provider.billed_tokens, provider.billed_usd) == ([], 0, 0)
    assert ask(client).choices[0].message.content == "two"
    assert provider.requests[0].number == 1


# -- what is billed can be chosen ---------------------------------------------------------------------------------------------


def test_tokens_per_byte_are_rounded_up():
    with LoopbackProvider(tokens_per_byte=0.25) as provider, openai_client(provider) as client:
        assert [ask(client, messages=[{"role": "user", "content": "x" * n}]).usage.prompt_tokens for n in (7, 8, 9)] == [2, 2, 3]


def test_a_tokenizer_counts_each_text():
    with LoopbackProvider(tokenizer=lambda text: len(text.split())) as provider, openai_client(provider) as client:
        assert ask(client, messages=[{"role": "user", "content": "one two three"}, *HELLO]).usage.prompt_tokens == 4


def test_answers_can_use_a_share_of_their_limit():
    with LoopbackProvider(output_share=0.2) as provider, openai_client(provider) as client:
        assert [ask(client, max_completion_tokens=n).usage.completion_tokens for n in (1000, 1001)] == [200, 201]
        assert ask(client, max_completion_tokens=1001, n=2).usage.completion_tokens == 402


def test_prices_can_be_given():
    prices = {"mine": (1, 0.000001)}
    with LoopbackProvider(prices=prices, default_price=(2, 0)) as provider, openai_client(provider) as client:
        ask(client, model="mine")
        assert provider.billed_pico == 5 * 10**6 + 100
        provider.reset()
        ask(client, model="unheard of")
        assert provider.billed_pico == 5 * 2 * 10**6
        provider.reset()
        ask(client, model="gpt-4o")
        assert provider.billed_usd == Decimal("0.0010125")


@pytest.mark.parametrize(
    "arguments",
    [
        {"replies": []},
        {"tokens_per_byte": 0},
        {"tokens_per_byte": 0.5, "tokenizer": len},
        {"output_share": 1.01},
        {"output_share": -0.01},
        {"default_output_tokens": 0},
        {"prices": {"mine": (1,)}},
        {"prices": {"mine": (1, 0.0000001)}},
        {"default_price": (-1, 0)},
    ],
)
def test_impossible_arguments_are_refused(arguments):
    with pytest.raises(UsageError):
        LoopbackProvider(**arguments)


@pytest.mark.parametrize(
    "fields",
    [
        {"status": 302},
        {"status": 429, "hang": True},
        {"hang": True, "drop": "before"},
        {"chunks": 0},
        {"delay_s": -1},
        {"input_tokens": -1},
    ],
)
def test_impossible_replies_are_refused(fields):
    with pytest.raises(UsageError):
        Reply(**fields)


# -- the server ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fifty_clients_are_served_at_once():
    everybody = threading.Barrier(50)

    def meet(_):
        everybody.wait(timeout=5)
        return Reply()

    def one(_):
        return ask(client).usage.total_tokens

    with LoopbackProvider(meet) as provider, openai_client(provider) as client, ThreadPoolExecutor(50) as pool:
        assert list(pool.map(one, range(50))) == [105] * 50
        assert provider.billed_tokens == 50 * 105
        assert [request.number for request in provider.requests] == list(range(1, 51))


@pytest.mark.slow
def test_sixty_four_tasks_are_served_at_once():
    everybody = threading.Barrier(64)

    def meet(_):
        everybody.wait(timeout=5)
        return Reply()

    async def main(provider):
        async with openai.AsyncOpenAI(api_key="test", base_url=provider.openai_url, max_retries=0) as client:
            await asyncio.gather(*(ask(client) for _ in range(64)))

    with LoopbackProvider(meet) as provider:
        asyncio.run(main(provider))
        assert provider.request_count == 64


def test_a_connection_is_kept_alive(provider):
    body = b'{"model":"gpt-4o","messages":[],"stream":true}'
    request = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    with socket.create_connection(address(provider), timeout=5) as connection, connection.makefile("rb") as answer:
        connection.sendall(request * 2)
        for _ in range(2):
            while answer.readline() != b"0\r\n":
                pass
    assert provider.request_count == 2


def address(provider):
    host, _, port = provider.anthropic_url.removeprefix("http://").partition(":")
    return host, int(port)


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/messages/batches", "/"])
def test_an_unknown_path_is_not_found_and_not_billed(provider, path):
    request = urllib.request.Request(provider.anthropic_url + path, data=b'{"model": "gpt-4o"}')  # noqa: S310 - loopback
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=5)  # noqa: S310 - loopback
    with caught.value as error:
        assert error.code == 404
        assert json.load(error)["error"]["type"] == "not_found_error"
    assert (provider.requests[0].path, provider.requests[0].model, provider.billed_pico) == (path, "gpt-4o", 0)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff"])
def test_a_body_that_is_no_object_is_a_bad_request(provider, body):
    url = provider.openai_url + "/chat/completions"
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(url, data=body, timeout=5)  # noqa: S310 - loopback
    with caught.value as error:
        assert error.code == 400
    assert (provider.request_count, provider.billed_pico) == (1, 0)


@pytest.mark.parametrize("request_", [b"nonsense\r\n\r\n", b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"])
def test_what_is_no_known_http_is_refused(provider, request_):
    with socket.create_connection(address(provider), timeout=5) as connection:
        connection.sendall(request_)
        assert connection.makefile("rb").read().startswith(b"HTTP/1.1 400 ")


def test_a_closed_provider_leaves_no_thread_and_no_port():
    before = set(threading.enumerate())
    provider = LoopbackProvider().start()
    with openai_client(provider) as client:
        ask(client)
        provider.close()
        provider.close()
        assert set(threading.enumerate()) <= before
        with pytest.raises(openai.APIConnectionError):
            ask(client)
    assert provider.billed_tokens == 105


def test_a_provider_is_started_once():
    provider = LoopbackProvider()
    with pytest.raises(UsageError, match="before it was started"):
        provider.openai_url  # noqa: B018 - it raises
    with provider, pytest.raises(UsageError, match="started before"):
        provider.start()
    with pytest.raises(UsageError, match="started before"):
        provider.start()


def test_requests_are_waited_for(provider):
    assert not provider.wait_for_requests(timeout_s=0)
