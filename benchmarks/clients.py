"""What ``guard(client)`` adds to a call of a raw client, over an HTTP transport that answers at once.

    python benchmarks/clients.py

What is left is the SDK's own cost (building the request, parsing the answer) and ours. "floor" is a subclass whose ``request``
only calls the one that it overrides. Timed as ``hot_paths.py`` does: in turn, the fastest block of each.
"""

from __future__ import annotations

import inspect
import json
import logging
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: Python put this folder on the path, not the one that holds the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import anthropic
import openai

from benchmarks.hot_paths import BIG, interleaved
from benchmarks.results import Section, contribute
from clevagent import Budget, Watchdog, guard

CALLS = 60
ROWS: list[tuple[str, str, str, str, str]] = []
COMPLETION = {
    "id": "c", "object": "chat.completion", "created": 0, "model": "gpt-4o",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Hello there"}}],
    "usage": {"prompt_tokens": 200, "completion_tokens": 100, "total_tokens": 300},
}  # fmt: skip
MESSAGE = {
    "id": "m", "type": "message", "role": "assistant", "model": "claude-sonnet-4-6", "stop_reason": "end_turn", "stop_sequence": None,
    "content": [{"type": "text", "text": "Hello there"}], "usage": {"input_tokens": 200, "output_tokens": 100},
}  # fmt: skip
CHUNK = {
    "id": "c", "object": "chat.completion.chunk", "created": 0, "model": "gpt-4o",
    "choices": [{"index": 0, "delta": {"content": "word "}, "finish_reason": None}],
}  # fmt: skip
CHUNKS = 50


def client_of(sdk: Any, name: str) -> Any:
    """A client whose transport answers at once, of whichever HTTP library the SDK is built on."""
    http = import_module(inspect.getmodule(sdk.DefaultHttpxClient.__mro__[2]).__name__.partition(".")[0])  # type: ignore[union-attr]  # a class has a module
    end = CHUNK | {"choices": [CHUNK["choices"][0] | {"finish_reason": "stop"}]}  # type: ignore[index]  # a constant
    events = [CHUNK] * CHUNKS + [end, CHUNK | {"choices": [], "usage": COMPLETION["usage"]}]
    stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events).encode() + b"data: [DONE]\n\n"

    def answer(request: Any) -> Any:
        if b'"stream":true' in request.content:
            return http.Response(200, content=stream, headers={"content-type": "text/event-stream"})
        return http.Response(200, json=MESSAGE if name == "anthropic" else COMPLETION)

    made = sdk.DefaultHttpxClient(transport=http.MockTransport(answer))
    return (sdk.Anthropic if name == "anthropic" else sdk.OpenAI)(api_key="test", http_client=made)


def floor_of(client: Any) -> Any:
    base = type(client)

    def request(self: Any, cast_to: Any, options: Any, *args: Any, **kwargs: Any) -> Any:
        return base.request(self, cast_to, options, *args, **kwargs)

    return type(base.__name__, (base,), {"request": request})(api_key="test", http_client=client._client)


def measure(what: str, client: Any, call: Callable[[Any], object]) -> None:
    watchdog = Watchdog()
    run = watchdog.start_run(budgets=[Budget(usd=BIG)])
    guarded, floor = guard(client, watchdog=watchdog), floor_of(client)

    def one() -> None:
        with run.activate():
            call(guarded)

    times = interleaved({"bare": lambda: call(client), "floor": lambda: call(floor), "guarded": one}, CALLS)
    bare, added = times["bare"], times["guarded"] - times["bare"]
    ROWS.append((what, f"{bare:.0f} us", f"{times['floor'] - bare:+.0f} us", f"{added:+.0f} us", f"{added / bare:+.0%}"))
    print(
        f"{what:<52} bare {bare:7.0f} us   floor {times['floor'] - bare:+5.0f}   guarded {added:+5.0f} us   {added / bare:+.0%}",
        flush=True,
    )
    run.end()
    watchdog.shutdown()


def main() -> None:
    logging.disable(logging.WARNING)
    chat, claude = client_of(openai, "openai"), client_of(anthropic, "anthropic")
    short = [{"role": "user", "content": "x" * 180}]
    long = [{"role": ("user", "assistant")[i % 2], "content": f"{i} " + "x" * 180} for i in range(51)]
    ask = {"model": "gpt-4o", "max_tokens": 100}
    claude_asks = {"model": "claude-sonnet-4-6", "max_tokens": 100}
    measure("OpenAI, chat.completions.create", chat, lambda c: c.chat.completions.create(messages=short, **ask))
    measure("OpenAI, the same with a history of 51 messages", chat, lambda c: c.chat.completions.create(messages=long, **ask))
    stream = {**ask, "stream": True, "stream_options": {"include_usage": True}}
    measure(f"OpenAI, a stream of {CHUNKS} pieces", chat, lambda c: list(c.chat.completions.create(messages=short, **stream)))
    measure("Anthropic, messages.create", claude, lambda c: c.messages.create(messages=short, **claude_asks))
    measure("Anthropic, the same with a history of 51 messages", claude, lambda c: c.messages.create(messages=long, **claude_asks))
    contribute(
        "clients",
        [
            Section(
                title="Raw clients: added to a call whose answer comes at once",
                header=("", "bare client", "a subclass that does nothing", "`guard(client)`", "of the bare call"),
                rows=list(ROWS),
                note="One budget in US dollars. The bare call has no network in it: it is what the SDK itself costs.",
            )
        ],
    )


if __name__ == "__main__":
    main()
