"""A model provider on this machine: a real HTTP server, real SDKs as clients, and a bill."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from types import TracebackType
from typing import Any, NamedTuple, Self

from clevagent.testing.billing import NOTHING, Bill, InvalidRequestError, Meter, Price
from clevagent.testing.dialects import (
    Answer,
    ChatCompletions,
    Completions,
    Dialect,
    Embeddings,
    Messages,
    Responses,
    TokenCounts,
    encode,
)
from clevagent.testing.replies import Kind, ReceivedRequest, Reply
from clevagent.testing.server import HttpRequest, HttpResponse, HttpServer
from clevagent_core.errors import UsageError

Script = Iterable[Reply] | Callable[[dict[str, Any]], Reply]
"""What is answered: replies in order (the last one again and again), or a function of a request's JSON."""

_PRICES: dict[str, Price] = {
    "gpt-4o": (2.50, 10.00),
    "gpt-4o-mini": (0.15, 0.60),
    "claude-sonnet-4-5": (3.00, 15.00),
    "claude-sonnet-4-6": (3.00, 15.00),
    "text-embedding-3-small": (0.02, 0.00),
}
_OPENAI: Dialect = ChatCompletions()
_ANTHROPIC: Dialect = Messages()
_DIALECTS: dict[str, Dialect] = {
    "/v1/chat/completions": _OPENAI,
    "/v1/completions": Completions(),
    "/v1/responses": Responses(),
    "/v1/embeddings": Embeddings(),
    "/v1/messages": _ANTHROPIC,
    "/v1/messages/count_tokens": TokenCounts(),
}
_BAD_REQUEST = 400
_NOT_FOUND = 404
_SERVER_ERROR = 500
_PICO_DIGITS = 12


class _Refusal(NamedTuple):
    """An error that no script asked for."""

    status: int
    message: str


class LoopbackProvider:
    """A model provider on 127.0.0.1 that speaks to real SDKs and keeps the bill they would get.

    It serves OpenAI's chat completions, responses, old completions and embeddings, and Anthropic's messages and token counts
    (which are free), streamed and not::

        with LoopbackProvider() as provider:
            model = ChatOpenAI(model="gpt-4o-mini", api_key="test", base_url=provider.openai_url)
            model.invoke("Hello")
            assert provider.billed_usd <= ceiling

    **What is billed.** The input is the text of messages, system prompts and tool-call arguments, and the compact JSON of
    tools and response schemas; without a tokenizer one token for each UTF-8 byte, the worst that a byte-level tokenizer can
    do. Images and other files are not counted. The output is the whole limit of the request, or the share ``output_share``
    of it, times the number of answers (``n``). Reported usage equals the bill; cached tokens cost what others cost.

    **When.** A request is billed in full when it was received and its reply chosen, before anything is sent back: one that
    hangs, is delayed or dropped, or whose client goes away in the middle of a stream costs what the whole answer costs,
    since a provider has done (or will do) the work. So does each retry. An error (status 400 and above) costs nothing.

    Serves any number of connections, each on a daemon thread of its own; every method and property is safe to use from any
    thread.

    Args:
        replies: what is answered: replies in order, of which the last is repeated, or a function that is called with each
            request's JSON on its connection's thread (so it may block, and must be safe to call from several). A function
            that raises makes a status 500 that the SDKs do not retry.
        prices: US dollars for a million tokens, ``{model: (input, output)}``, beside or instead of the built-in ones
            ("gpt-4o", "gpt-4o-mini", "claude-sonnet-4-5", "claude-sonnet-4-6", "text-embedding-3-small").
        default_price: the price of every other model.
        tokenizer: counts the tokens of one text, instead of its bytes; called from several threads.
        tokens_per_byte: how many tokens each byte is, for example 0.25; the request's sum is rounded up.
        default_output_tokens: the output limit of a request that carries none.
        output_share: how much of its output limit each answer uses, from 0 to 1, rounded up to a token.

    Raises:
        UsageError: a script is empty; an argument is out of its range; a price is finer than a pico-USD a token.

    """

    def __init__(
        self,
        replies: Script | None = None,
        *,
        prices: Mapping[str, Price] | None = None,
        default_price: Price = (1.00, 4.00),
        tokenizer: Callable[[str], int] | None = None,
        tokens_per_byte: float = 1.0,
        default_output_tokens: int = 4096,
        output_share: float = 1.0,
    ) -> None:
        """Prepare; nothing is served before :meth:`start`."""
        self._meter = Meter(
            prices=_PRICES | dict(prices or {}),
            default_price=default_price,
            tokenizer=tokenizer,
            tokens_per_byte=tokens_per_byte,
            default_output_tokens=default_output_tokens,
            output_share=output_share,
        )
        self._server = HttpServer(self._handle)
        self._received = threading.Condition()
        self._next_reply = _player(replies)
        self._forget()

    # -- serving ----------------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Bind a free port and serve it.

        Raises:
            UsageError: it was started before, or closed.

        """
        self._server.start()
        return self

    def close(self) -> None:
        """Stop serving and close every connection, hanging ones too. The bill stays. Blocks shortly; safe to call twice."""
        self._server.close()

    def __enter__(self) -> Self:
        """Start."""
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Close."""
        self.close()

    @property
    def openai_url(self) -> str:
        """The base URL for OpenAI clients, with ``/v1``. Raises ``UsageError`` before the start."""
        return f"{self.anthropic_url}/v1"

    @property
    def anthropic_url(self) -> str:
        """The base URL for Anthropic clients, which add ``/v1`` themselves. Raises ``UsageError`` before the start."""
        if not self._server.port:
            raise UsageError("This provider has no address before it was started. Use it in a `with` block, or call start().")
        return f"http://127.0.0.1:{self._server.port}"

    # -- what was received ------------------------------------------------------------------------------------------------

    @property
    def requests(self) -> list[ReceivedRequest]:
        """Every request since the start or the last ``reset()``, in the order in which replies were chosen. A copy."""
        with self._received:
            return list(self._requests)

    @property
    def request_count(self) -> int:
        """How many requests there were, refused ones and unknown paths included."""
        return len(self._requests)

    @property
    def billed_pico(self) -> int:
        """The whole bill in pico-USD (10**-12 US dollars)."""
        return self._billed_pico

    @property
    def billed_usd(self) -> Decimal:
        """The whole bill in US dollars, exact."""
        return Decimal(self._billed_pico).scaleb(-_PICO_DIGITS)

    @property
    def billed_tokens(self) -> int:
        """All tokens on the bill, input and output together."""
        return self._billed_tokens

    def wait_for_requests(self, count: int = 1, *, timeout_s: float = 5.0) -> bool:
        """Block until ``count`` requests were received, at most ``timeout_s`` real seconds; tell whether they were."""
        with self._received:
            return self._received.wait_for(lambda: len(self._requests) >= count, timeout_s)

    def reset(self, replies: Script | None = None) -> None:
        """Forget all requests and the bill; answer from ``replies`` from now on, or go on with the script where it is.

        Raises:
            UsageError: the script is empty.

        """
        next_reply = _player(replies) if replies is not None else None
        with self._received:
            self._next_reply = next_reply or self._next_reply
            self._forget()

    def _forget(self) -> None:
        self._requests: list[ReceivedRequest] = []
        self._billed_pico = 0
        self._billed_tokens = 0

    # -- one request ------------------------------------------------------------------------------------------------------

    def _handle(self, request: HttpRequest) -> HttpResponse:
        dialect = _DIALECTS.get(request.path) if request.method == "POST" else None
        body = _parse(request.body)
        if dialect is None:
            message = f"{request.method} {request.path} is not served by this LoopbackProvider."
            return self._refuse(request, body or {}, _Refusal(_NOT_FOUND, message))
        if body is None:
            return self._refuse(request, {}, _Refusal(_BAD_REQUEST, "The body is no JSON object."))
        model = _model_of(body)
        try:
            reply = self._next_reply(body)
            asked = dialect.asked(body)
            bill = self._meter.bill(model, asked, reply) if reply.kind != "error" else NOTHING
        except InvalidRequestError as error:
            return self._refuse(request, body, _Refusal(_BAD_REQUEST, str(error)))
        except Exception as error:  # the test's own script or tokenizer; its client is told
            return self._refuse(request, body, _Refusal(_SERVER_ERROR, f"The script of this LoopbackProvider raised {error!r}."))
        status = None if reply.hang or reply.drop == "before" else reply.status
        number = self._record(request.path, body, reply.kind, status, NOTHING if asked.is_free else bill)
        is_stream = reply.kind != "error" and body.get("stream") is True
        answer = Answer(number, model, body, reply, bill)
        parts: list[bytes] = []
        if reply.kind == "error":
            message = reply.error_message or f"This LoopbackProvider was told to answer with status {reply.status}."
            parts = [encode(dialect.error(reply.status, message))]
        elif status is not None:
            parts = list(dialect.events(answer)) if is_stream else [encode(dialect.answer(answer))]
        return HttpResponse(
            reply.status, parts, is_stream, reply.headers, reply.delay_s, reply.chunk_delay_s, reply.hang, reply.drop
        )

    def _refuse(self, request: HttpRequest, body: dict[str, Any], refusal: _Refusal) -> HttpResponse:
        self._record(request.path, body, "error", refusal.status)
        dialect = _ANTHROPIC if request.path.startswith("/v1/messages") else _OPENAI
        content = encode(dialect.error(refusal.status, refusal.message))
        # Both SDKs take this header's word: a mistake in a test should show at once.
        return HttpResponse(refusal.status, [content], headers={"x-should-retry": "false"})

    def _record(self, path: str, body: dict[str, Any], kind: Kind, status: int | None, bill: Bill = NOTHING) -> int:
        with self._received:
            number = len(self._requests) + 1
            self._requests.append(
                ReceivedRequest(
                    number=number,
                    path=path,
                    body=body,
                    model=_model_of(body),
                    kind=kind,
                    status=status,
                    billed_input_tokens=bill.input_tokens,
                    billed_output_tokens=bill.output_tokens,
                    billed_usd_pico=bill.usd_pico,
                )
            )
            self._billed_pico += bill.usd_pico
            self._billed_tokens += bill.input_tokens + bill.output_tokens
            self._received.notify_all()
            return number


def _parse(content: bytes) -> dict[str, Any] | None:
    try:
        body = json.loads(content)
    except ValueError:
        return None
    return body if isinstance(body, dict) else None


def _model_of(body: Mapping[str, Any]) -> str:
    model = body.get("model")
    return model if isinstance(model, str) else ""


def _player(script: Script | None) -> Callable[[dict[str, Any]], Reply]:
    """Turn any script into a function; safe to call from any thread.

    Raises:
        UsageError: the script has no reply.

    """
    if script is None:
        same = Reply()
        return lambda _: same
    if callable(script):
        return script
    return _Sequence(iter(script)).take


class _Sequence:
    """Replies in order; the last one again and again. A generator is asked for no more than is needed, plus one."""

    def __init__(self, replies: Iterator[Reply]) -> None:
        self._lock = threading.Lock()
        self._replies = replies
        first = next(replies, None)
        if first is None:
            raise UsageError("LoopbackProvider(replies=...) has no reply, so nothing could be answered. Give at least one Reply.")
        self._next: Reply = first

    def take(self, _body: dict[str, Any]) -> Reply:
        """Take the next reply."""
        with self._lock:
            taken = self._next
            self._next = next(self._replies, taken)
            return taken
