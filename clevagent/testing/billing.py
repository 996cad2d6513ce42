"""What a loopback provider bills for a request."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

from clevagent.testing.replies import Reply
from clevagent_core.errors import UsageError
from clevagent_core.money import PICO_PER_USD_PER_MILLION, to_pico

Price = tuple[float, float]
"""US dollars for a million input tokens, and for a million output tokens."""

_MILLION = 10**6
_TEXT_KEYS = ("text", "thinking", "refusal", "arguments")
"""Keys whose strings a model reads: text blocks, and the arguments of tool calls in a history."""
_NESTING_KEYS = ("content", "output", "summary", "tool_calls", "function", "function_call", "custom")


class InvalidRequestError(ValueError):
    """The request carries what no provider accepts; told to the client with status 400."""


class Bill(NamedTuple):
    """What one request is billed."""

    input_tokens: int
    output_tokens: int
    usd_pico: int


NOTHING = Bill(0, 0, 0)


class Asked(NamedTuple):
    """What of a request is billed, whichever API it was made to."""

    texts: Iterator[str]
    output_limits: tuple[object, ...]
    """What stands where the API takes its output limit; the largest counts."""
    answers: tuple[object, ...]
    """What multiplies the output: ``n`` and its like."""
    has_output: bool = True
    """Whether anything is written: embeddings are not."""
    is_free: bool = False
    """Whether it is counted and not billed."""


class Meter:
    """Counts tokens and prices them. Immutable after it is made, so safe to use from any thread."""

    def __init__(
        self,
        *,
        prices: Mapping[str, Price],
        default_price: Price,
        tokenizer: Callable[[str], int] | None,
        tokens_per_byte: float,
        default_output_tokens: int,
        output_share: float,
    ) -> None:
        """See :class:`~clevagent.testing.LoopbackProvider` for the arguments and what is refused."""
        if tokenizer is not None and tokens_per_byte != 1:
            raise UsageError(
                f"LoopbackProvider(tokenizer=..., tokens_per_byte={tokens_per_byte!r}) counts tokens in two ways. Give one of them."
            )
        if not (math.isfinite(tokens_per_byte) and tokens_per_byte > 0):
            raise UsageError(f"LoopbackProvider(tokens_per_byte={tokens_per_byte!r}) counts no text. Give a number above 0.")
        if not 0 <= output_share <= 1:
            raise UsageError(f"LoopbackProvider(output_share={output_share!r}) is no share of a limit. Give a number from 0 to 1.")
        if default_output_tokens < 1:
            raise UsageError(
                f"LoopbackProvider(default_output_tokens={default_output_tokens!r}) is no output limit. Give at least 1."
            )
        self._rates = {model: _rates(price, model) for model, price in prices.items()}
        self._default_rates = _rates(default_price, "default_price")
        self._tokenizer = tokenizer
        # As the decimal numbers they print as: a fifth of 1000 tokens is 200, not 201.
        self._per_byte = Fraction(str(tokens_per_byte))
        self._share = Fraction(str(output_share))
        self._default_output_tokens = default_output_tokens

    def bill(self, model: str, asked: Asked, reply: Reply) -> Bill:
        """Bill a request for which the provider does the work.

        Raises:
            InvalidRequestError: an output limit, or a number of answers, is no whole number of at least 1.

        """
        limits = [_count(limit, "an output limit") for limit in asked.output_limits if limit is not None]
        answers = math.prod(_count(count, "a number of answers") for count in asked.answers if count is not None)
        limit = max(limits, default=self._default_output_tokens)
        output = reply.output_tokens if asked.has_output else 0
        if output is None:
            output = answers * _ceil(limit, self._share)
        input_ = reply.input_tokens
        if input_ is None:
            input_ = self._count_texts(asked.texts)
        input_rate, output_rate = self._rates.get(model, self._default_rates)
        return Bill(input_, output, input_ * input_rate + output * output_rate)

    def _count_texts(self, texts: Iterator[str]) -> int:
        if self._tokenizer is not None:
            return sum(map(self._tokenizer, texts))
        # A JSON string can hold half of a surrogate pair, which UTF-8 proper cannot.
        return _ceil(sum(len(text.encode("utf-8", "surrogatepass")) for text in texts), self._per_byte)


def texts_of(content: object) -> Iterator[str]:
    """Find the text of messages, in the spelling of any of the APIs. Images, audio and files have none."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for part in content:
            yield from texts_of(part)
    elif isinstance(content, dict):
        for key in _TEXT_KEYS:
            if isinstance(value := content.get(key), str):
                yield value
        if (arguments := content.get("input")) is not None:
            yield arguments if isinstance(arguments, str) else compact(arguments)
        for key in _NESTING_KEYS:
            if key in content:
                yield from texts_of(content[key])


def schemas_of(*schemas: object) -> Iterator[str]:
    """Write schemas (tools, response formats) as the SDKs send them."""
    for schema in schemas:
        if schema:
            yield compact(schema)


def compact(value: object) -> str:
    """Write JSON as the SDKs do: no spaces, and characters as they are."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def within(body: Mapping[str, Any], *path: str) -> object:
    """Look into nested objects; ``None`` where there is nothing."""
    found: object = body
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _count(value: object, what: str) -> int:
    if type(value) is not int or value < 1:
        raise InvalidRequestError(f"{value!r} is not {what}: a whole number of at least 1 is expected.")
    return value


def _ceil(count: int, ratio: Fraction) -> int:
    return -(-count * ratio.numerator // ratio.denominator)


def _rates(price: Price, model: str) -> tuple[int, int]:
    """Turn a price into whole pico-USD for one token of input and of output."""
    try:
        input_usd, output_usd = price
    except (TypeError, ValueError) as error:
        raise UsageError(f"The price of {model!r} is {price!r}. Give two numbers: for input and for output.") from error
    return _rate(input_usd, model), _rate(output_usd, model)


def _rate(usd: float, model: str) -> int:
    rate, rest = divmod(to_pico(usd, what=f"prices[{model!r}]"), _MILLION)
    if rest:
        raise UsageError(
            f"The price of {model!r}, ${usd} for a million tokens, is no whole number of pico-USD for one token, so bills would "
            f"not be exact. Give it in steps of ${1 / PICO_PER_USD_PER_MILLION:.6f}."
        )
    return rate
