"""Streams of raw clients: what their users see, and what is learnt from them."""

from __future__ import annotations

import gc
import http.server
import json
import pickle
import threading

import openai
import pytest

import clevagent
from clevagent import Budget
from clevagent.testing import Reply
from clevagent_core.hookspecs import hookimpl
from clevagent_core.money import PICO_PER_USD


@pytest.fixture
def run():
    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        yield run


def recorded(run):
    return round(run.summary().total.cost_usd * PICO_PER_USD)


@pytest.fixture
def slow(provider):
    """Send event by event, so that the end has not come when a consumer stops."""
    provider.reset([Reply(text="one two three four five six", chunks=6, chunk_delay_s=0.01)])


class Answers:
    """A plugin that hears what models answered."""

    def __init__(self):
        self.heard = []

    @hookimpl
    def clevagent_call_settled(self, run, call, outcome):
        self.heard.append(outcome.result)


def test_the_user_sees_the_stream_that_they_asked_for(chat, run):
    """Usage is asked for, and the chunk that carries it is not shown."""
    plain = [chunk.to_dict() for chunk in chat.ask(chat.client(), stream=True)]
    guarded = [chunk.to_dict() for chunk in chat.ask(clevagent.guard(chat.client()), stream=True)]
    varying = ("id", "created", "usage")
    strip = [[{key: value for key, value in chunk.items() if key not in varying} for chunk in each] for each in (plain, guarded)]
    assert strip[0] == strip[1]
    assert all(chunk["choices"] for chunk in guarded)
    assert chat.provider.requests[1].body["stream_options"] == {"include_usage": True}
    assert recorded(run) == chat.provider.requests[1].billed_usd_pico


@pytest.mark.slow
@pytest.mark.parametrize(
    "content_type", ["text/event-stream;charset=utf-8", "Text/Event-Stream", "text/plain", "application/json", None]
)
def test_a_stream_is_one_whatever_its_server_calls_it(run, content_type):
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o"}
    told = [
        chunk | {"choices": [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": "stop"}]},
        chunk | {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}},
    ]
    body = "\n".join(f"data: {json.dumps(event)}\n" for event in told) + "\ndata: [DONE]\n\n"

    class Server(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            if content_type is not None:
                self.send_header("content-type", content_type)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with openai.OpenAI(api_key="test", base_url=f"http://127.0.0.1:{server.server_port}") as client:
                question = [{"role": "user", "content": "Hello"}]
                chunks = list(clevagent.guard(client).chat.completions.create(model="gpt-4o", messages=question, stream=True))
        finally:
            server.shutdown()
            thread.join()
    assert [found.choices[0].delta.content for found in chunks] == ["Hi"]
    assert run.summary().calls_charged_at_bound == 0
    assert run.summary().total.output_tokens == 1


def test_a_response_is_pickled_as_without_us(chat, run):
    client = clevagent.guard(chat.client())
    with client.chat.completions.with_streaming_response.create(**chat.params()) as response:
        response.read()
        copied = pickle.loads(pickle.dumps(response.http_response))  # noqa: S301 - our own
    assert type(copied) is type(response.http_response).__base__
    assert copied.json() == response.http_response.json()


def test_a_user_who_asked_for_usage_sees_it(chat, run):
    chunks = list(chat.ask(clevagent.guard(chat.client()), stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 400
    assert recorded(run) == chat.provider.billed_pico


def test_a_user_who_asked_for_no_usage_sees_none(chat, run):
    client = clevagent.guard(chat.client())
    chunks = list(chat.ask(client, stream=True, stream_options={"include_usage": False}))
    assert all(chunk.choices for chunk in chunks)
    assert recorded(run) == chat.provider.billed_pico


@pytest.mark.parametrize("delay", [0, 0.005])
@pytest.mark.parametrize("read", ["iter_lines", "iter_text", "iter_bytes", "read"])
def test_a_raw_stream_is_metered_and_shows_no_usage_either(chat, run, read, delay):
    chat.provider.reset([Reply(text="one two", chunk_delay_s=delay)])
    client = clevagent.guard(chat.client())
    with client.chat.completions.with_streaming_response.create(**chat.params(), stream=True) as response:
        body = getattr(response, read)()
        text = body.decode() if read == "read" else "".join(part if isinstance(part, str) else part.decode() for part in body)
    assert text.rstrip().endswith("data: [DONE]")
    assert '"prompt_tokens"' not in text
    assert recorded(run) == chat.provider.billed_pico
    assert run.summary().calls_charged_at_bound == 0


def test_the_undecoded_body_is_charged_because_nobody_can_read_it(chat, run):
    client = clevagent.guard(chat.client())
    with client.chat.completions.with_streaming_response.create(**chat.params(), stream=True) as response:
        list(response.http_response.iter_raw())
    assert run.summary().calls_charged_at_bound == 1
    assert recorded(run) >= chat.provider.billed_pico


@pytest.mark.slow
def test_a_stream_whose_user_stops_at_the_end_of_the_text_is_charged(chat, run):
    """What it used is told after that."""
    for chunk in chat.ask(clevagent.guard(chat.client()), stream=True):
        if chunk.choices[0].finish_reason:
            break
    gc.collect()
    assert recorded(run) >= chat.provider.billed_pico
    assert run.summary().calls_charged_at_bound == 1


@pytest.mark.parametrize("n", [2, 3])
def test_a_stream_of_several_answers_is_counted_whole(chat, run, n):
    list(chat.ask(clevagent.guard(chat.client()), stream=True, n=n))
    assert recorded(run) == chat.provider.billed_pico


@pytest.mark.slow
def test_a_stream_that_is_dropped_is_charged_when_the_collector_finds_it(api, run, slow):
    stream = api.ask(clevagent.guard(api.client()), stream=True)
    next(stream)
    assert run.summary().total.calls == 0
    del stream
    gc.collect()
    assert run.summary().calls_charged_at_bound == 1


def leave(stream):
    for _ in stream:
        break


def close(stream):
    iterator = iter(stream)
    next(iterator)
    iterator.close()


def throw(stream):
    iterator = iter(stream)
    next(iterator)
    with pytest.raises(GeneratorExit):
        iterator.throw(GeneratorExit)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [leave, close, throw])
def test_a_stream_whose_iterator_is_closed_is_charged_at_once_also_where_it_is_kept(api, run, slow, stop):
    stream = api.ask(clevagent.guard(api.client()), stream=True)
    stop(stream)
    assert run.summary().calls_charged_at_bound == 1
    assert run.watchdog.ledger.holds() == []
    assert recorded(run) >= api.provider.billed_pico
    # Whoever goes on reading it is charged what it did cost.
    for _ in stream:
        pass
    assert run.summary().calls_charged_at_bound == 0
    assert run.summary().total.calls == 1
    assert recorded(run) == api.provider.billed_pico


@pytest.mark.slow
def test_an_async_stream_whose_iterator_is_closed_is_charged_too(api, run, slow, aio):
    async def work():
        async with clevagent.guard(api.aclient()) as client:
            stream = await api.ask(client, stream=True)
            iterator = aiter(stream)
            await anext(iterator)
            await iterator.aclose()
            charged = run.summary().calls_charged_at_bound
            async for _ in stream:
                pass
            return charged

    assert aio(work()) == 1
    assert run.summary().calls_charged_at_bound == 0
    assert recorded(run) == api.provider.billed_pico


@pytest.mark.slow
def test_a_stream_that_is_never_read_is_charged_when_the_collector_finds_it(api, run, slow):
    api.ask(clevagent.guard(api.client()), stream=True)
    gc.collect()
    assert run.summary().calls_charged_at_bound == 1


def test_a_stream_that_tells_no_usage_is_charged(api, run):
    api.provider.reset([Reply(usage=False)])
    list(api.ask(clevagent.guard(api.client()), stream=True))
    assert run.summary().calls_charged_at_bound == 1
    assert recorded(run) >= api.provider.billed_pico


def test_an_answer_that_tells_no_usage_is_charged(api, run):
    api.provider.reset([Reply(usage=False)])
    if api.is_anthropic:
        api.resource(clevagent.guard(api.client())).with_raw_response.create(**api.params())
    else:
        api.ask(clevagent.guard(api.client()))
    assert run.summary().calls_charged_at_bound == 1
    assert recorded(run) >= api.provider.billed_pico


@pytest.mark.slow
def test_a_stream_that_its_provider_breaks_off_is_charged(api, run):
    api.provider.reset([Reply(text="one two three", drop="middle")])
    with pytest.raises(Exception):  # each SDK says it in its own way
        list(api.ask(clevagent.guard(api.client(max_retries=0)), stream=True))
    gc.collect()
    assert run.summary().calls_charged_at_bound == 1
    assert recorded(run) >= api.provider.billed_pico


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_model_said_is_told_to_the_loop_guard(api, stream, watchdog):
    answers = Answers()
    api.provider.reset([Reply(text="Hi there", tool_calls=[("look", {"word": "moon"})], chunks=3)])
    client = clevagent.guard(api.client(), watchdog=watchdog(plugins=[answers]))
    answer = api.ask(client, stream=stream)
    if stream:
        list(answer)
    assert answers.heard == [("Hi there", [("look", {"word": "moon"})])]


def test_a_loop_of_raw_calls_is_found(chat):
    clevagent.init(on_loop="stop")
    chat.provider.reset([Reply(text="", tool_calls=[("look", {"word": "moon"})])])
    client = clevagent.guard(chat.client())
    with clevagent.run(), pytest.raises(clevagent.LoopDetected):
        for _ in range(50):
            chat.ask(client, "Hi", 20)
    assert chat.provider.request_count < 20


def test_a_server_that_takes_no_question_for_usage_is_asked_without(chat, run):
    """Not every server that speaks OpenAI's API knows it. Such streams are charged their bound."""

    def answer(body):
        if "stream_options" in body:
            return Reply(status=400, error_message="Unrecognized request argument supplied: stream_options")
        return Reply()

    chat.provider.reset(answer)
    chunks = list(chat.ask(clevagent.guard(chat.client()), stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "ok"
    assert chat.provider.request_count == 2
    assert run.summary().calls_charged_at_bound == 1
    assert run.summary().total.calls == 1


def test_an_error_of_the_stream_is_the_users(api, run):
    api.provider.reset([Reply(status=400)])
    with pytest.raises(Exception) as caught:
        api.ask(clevagent.guard(api.client()), stream=True)
    assert caught.value.status_code == 400
    assert run.summary().total.cost_usd == 0


def test_async_streams_are_closed_as_sync_ones_are(chat, run, slow, aio):
    async def main():
        async with clevagent.guard(openai.AsyncOpenAI(api_key="test", base_url=chat.provider.openai_url)) as client:
            stream = await chat.ask(client, stream=True)
            await anext(aiter(stream))
            await stream.close()
            assert run.summary().calls_charged_at_bound == 1
            async with await chat.ask(client, stream=True) as stream:
                async for _ in stream:
                    break
            assert run.summary().calls_charged_at_bound == 2

    aio(main())
