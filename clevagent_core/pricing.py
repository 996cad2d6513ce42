"""What a model's tokens cost: the user's own prices first, then those of genai-prices, as whole pico-USD a token.

    PriceList.rates(model, provider, service_tier) -> Rates | None        None: unknown, which is never the same as free
    Rates.upper_bound(input_tokens, output_tokens) -> pico-USD            before the call, to reserve
    Rates.cost(usage)                              -> pico-USD            after it, to settle

Rates follow genai-prices: tiers are cliffs (a tier's rates apply to *all* tokens of a request), and tokens of a kind
without a price of its own cost what their parent kind costs (cached input costs what input costs). A rate that is no whole
number of pico-USD (28 in the list, all leftovers of a division) is rounded up: at most a dollar too much in 10**12 tokens.

Only tokens of text and audio, cached or not, and a fee per request are counted. Usage here does not tell images and video from
text, so where a model charges more for those, all its tokens cost that much: too high, never too low. Not counted: seconds, characters,
pages, web searches and other server-side tools, and cheaper rates for reasoning or citations. A model that is not priced by
the token is unknown.

genai-prices is imported on first use (or by :meth:`PriceList.warm`); its bundled list is read and nothing is downloaded.
Where the user has started its ``UpdatePrices``, new look-ups see the newer list; rates that were looked up before stay.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, time, timedelta
from decimal import Decimal, InvalidOperation
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, TypeVar

from clevagent_core.calls import Usage
from clevagent_core.clock import Clock, utc
from clevagent_core.errors import UsageError
from clevagent_core.money import PICO_PER_USD, PICO_PER_USD_PER_MILLION

if TYPE_CHECKING:
    from genai_prices.types import ConditionalPrice, ModelInfo, ModelPrice, PriceVariant, Provider, TieredPrices

_Key = tuple[str, str | None, str | None]
_Value = TypeVar("_Value")

MEMOISED = 4096
"""How many known and how many unknown names are remembered at most; when full, all are forgotten and looked up again."""

_DEAREST_USD = 10**6
"""The dearest price that is believed, in USD per million tokens: a dollar for each token."""
_STANDARD_TIERS = frozenset({"default", "standard", "standard_only", "on_demand"})
"""Service tiers that mean the list's standard price, as OpenAI, Anthropic and Groq name it."""
_REQUESTS_PER_PRICE = 1000
"""``requests_kcount`` is the price of this many requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """What each token of a request costs, in pico-USD, when the request's total input is above ``start``.

    Raises:
        UsageError: a rate is negative or no whole number.

    """

    start: int
    """The tier applies to all tokens of a request with more input tokens than this; -1 for the first."""
    input: int
    """Input that is neither cached nor audio."""
    cache_read: int
    """Input that was read from the provider's cache."""
    cache_write: int
    """Input that was written to the provider's cache; the dearer of a general price and one for five minutes."""
    cache_write_1h: int
    """Input that was written to the provider's cache for an hour."""
    output: int
    """Output that is not audio, reasoning included."""
    input_audio: int
    """Audio in the input."""
    output_audio: int
    """Audio in the output."""

    def __post_init__(self) -> None:
        """Refuse rates by which a ledger would be credited, or made inexact."""
        for name in _RATE_NAMES:
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise UsageError(
                    f"Tier({name}={value!r}) is not a rate: rates are whole numbers of pico-USD a token, at least 0, so "
                    "that sums stay exact. Round the rate up, or write Price(input=..., output=...), in US dollars per "
                    "million tokens."
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a model costs now. Immutable, so safe to use from any thread.

    Raises:
        UsageError: ``tiers`` is empty or does not ascend.

    """

    tiers: tuple[Tier, ...]
    """At least one, in ascending order of ``start``; the first also covers whatever lies below its start."""
    per_request: int = 0
    """What each request costs beside its tokens, in pico-USD."""
    context_window: int | None = None
    """The most input tokens that the model takes, where that is known."""
    valid_until: float = math.inf
    """Until when these rates hold, in wall seconds since 1970; ``math.inf`` when no change is foreseen."""
    source: str = ""
    """Where they come from, for people: ``genai-prices openai/gpt-4o``, ``prices= of init``."""
    _dearest: tuple[tuple[int, int, int], ...] = field(default=(), init=False, compare=False, repr=False)
    """The dearest rates among the tiers up to each one: of text input, of that when none is written to a cache, and of output."""

    def __post_init__(self) -> None:
        """Refuse tiers among which no right one could be found."""
        starts = [tier.start for tier in self.tiers]
        if not starts or any(later <= earlier for earlier, later in pairwise(starts)):
            raise UsageError(
                f"Rates(tiers=...) has the starts {starts!r}, so no cost can be told. Give at least one Tier, in ascending "
                "order of start, the first with start=-1."
            )
        read = [max(tier.input, tier.cache_read) for tier in self.tiers]
        written = [max(tier.input, tier.cache_read, tier.cache_write, tier.cache_write_1h) for tier in self.tiers]
        outputs = [tier.output for tier in self.tiers]
        dearest = zip(*(accumulate(rates, max) for rates in (written, read, outputs)), strict=True)
        object.__setattr__(self, "_dearest", tuple(dearest))

    def cost(self, usage: Usage) -> int:
        """Tell what ``usage`` costs, in pico-USD: what genai-prices computes, exactly, but for rates that were rounded up.

        Audio is taken to be uncached, which is the dearer reading. Details that pass their total are charged in full.
        """
        if (
            usage.cache_read_tokens
            or usage.cache_write_tokens
            or usage.cache_write_1h_tokens
            or usage.input_audio_tokens
            or usage.output_audio_tokens
        ):
            return self._detailed_cost(usage)
        tiers = self.tiers
        tier = tiers[0] if len(tiers) == 1 else self._tier(usage.input_tokens)
        return usage.input_tokens * tier.input + usage.output_tokens * tier.output + self.per_request

    def upper_bound(self, input_tokens: int, output_tokens: int, *, audio: bool = False, writes_cache: bool = True) -> int:
        """Tell the most that a call with at most so many tokens can cost, in pico-USD.

        All tiers that the input can reach count, and the dearest of uncached, cached and cache-written input. Rates for
        audio count only with ``audio=True``: they are many times those for text, and most calls carry none. Nothing is written to a
        cache with ``writes_cache=False``.
        """
        tiers = self.tiers
        if not audio and len(tiers) == 1:
            with_cache, without_cache, dearest_output = self._dearest[0]
            return (
                input_tokens * (with_cache if writes_cache else without_cache) + output_tokens * dearest_output + self.per_request
            )
        reached = 1
        while reached < len(tiers) and input_tokens > tiers[reached].start:
            reached += 1
        dearest_input, without_cache, dearest_output = self._dearest[reached - 1]
        if not writes_cache:
            dearest_input = without_cache
        if audio:
            dearest_input = max(dearest_input, *(tier.input_audio for tier in tiers[:reached]))
            dearest_output = max(dearest_output, *(tier.output_audio for tier in tiers[:reached]))
        return input_tokens * dearest_input + output_tokens * dearest_output + self.per_request

    def _tier(self, input_tokens: int) -> Tier:
        found = self.tiers[0]
        for tier in self.tiers:
            if input_tokens <= tier.start:
                break
            found = tier
        return found

    def _detailed_cost(self, usage: Usage) -> int:
        hour = usage.cache_write_1h_tokens
        write = max(usage.cache_write_tokens, hour)
        left = max(usage.input_tokens, usage.cache_read_tokens + write, usage.input_audio_tokens)
        tier = self._tier(left)
        cost = self.per_request
        # Without a price of its own audio is text, and its overlap with cached tokens does not matter.
        if tier.input_audio != tier.input:
            left -= usage.input_audio_tokens
            cost += usage.input_audio_tokens * tier.input_audio
        for tokens, rate in (
            (hour, tier.cache_write_1h),
            (write - hour, tier.cache_write),
            (usage.cache_read_tokens, tier.cache_read),
        ):
            taken = min(tokens, left)
            left -= taken
            cost += taken * rate
        audio = usage.output_audio_tokens
        text = max(usage.output_tokens - audio, 0)
        return cost + left * tier.input + text * tier.output + audio * tier.output_audio


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """A model's price as its provider publishes it, in US dollars per million tokens; 0 for a free model.

    A ``float`` is taken as the decimal number it prints as. What is left out costs what ``input`` costs.

    Raises:
        UsageError: a price is no number, is not finite, is negative or is more than a dollar a token; or ``context_window``
            is no whole number above 0.

    """

    input: float | str | Decimal
    """Input tokens."""
    output: float | str | Decimal
    """Output tokens, reasoning included."""
    cache_read: float | str | Decimal | None = None
    """Input tokens read from the provider's cache."""
    cache_write: float | str | Decimal | None = None
    """Input tokens written to the provider's cache, for whatever time; give the dearest."""
    context_window: int | None = None
    """The most input tokens that the model takes: what an input counts as that cannot be bounded otherwise."""

    def __post_init__(self) -> None:
        """Refuse what is no price where it is written, not at the first call."""
        self.rates()
        window = self.context_window
        if window is not None and (type(window) is not int or window <= 0):
            raise UsageError(
                f"Price(context_window={window!r}) is not a number of tokens, so no input could be bounded by it. "
                "Give a whole number above 0, or leave it out."
            )

    def rates(self) -> Rates:
        """Turn the price into rates that hold for good; each is rounded up to a whole pico-USD a token."""
        input_rate = _rate(self.input, "input")
        write = input_rate if self.cache_write is None else _rate(self.cache_write, "cache_write")
        output_rate = _rate(self.output, "output")
        tier = Tier(
            start=-1,
            input=input_rate,
            cache_read=input_rate if self.cache_read is None else _rate(self.cache_read, "cache_read"),
            cache_write=write,
            cache_write_1h=write,
            output=output_rate,
            input_audio=input_rate,
            output_audio=output_rate,
        )
        return Rates(tiers=(tier,), context_window=self.context_window, source="prices= of init")


class PriceList:
    """The rates of every model that has a known price. Safe to use from any thread, and after a fork: it takes no lock."""

    def __init__(self, prices: Mapping[str, Price] | None, clock: Clock) -> None:
        """Take the user's own ``prices`` by model name; they go before all others, whatever the provider and service tier.

        Raises:
            UsageError: a name is no text, or a price is no :class:`Price`.

        """
        self._own = {model: _own_rates(model, price) for model, price in (prices or {}).items()}
        self._clock = clock
        # Single dict operations are atomic, so no lock is needed; at worst two threads look the same name up.
        self._known: dict[_Key, Rates] = {}
        self._unknown: dict[_Key, float] = {}

    def rates(self, model: str, provider: str | None, service_tier: str | None) -> Rates | None:
        """Tell what ``model`` costs now; ``None`` when that is unknown.

        Remembered until ``valid_until``. The first call loads genai-prices (0.1 s and more) unless :meth:`warm` did.

        Args:
            model: the name as the request carries it. ``models/``, a provider's name and a slash, and dates are understood.
            provider: who bills it; when it is unknown, or does not know the model, the model's name alone decides.
            service_tier: the tier that was asked for. ``None`` is the standard price; a tier without a price of its own,
                ``auto`` among them, is the dearest price that it may turn out to be.

        """
        own = self._own.get(model)
        if own is not None:
            return own
        key = (model, provider, service_tier)
        known = self._known.get(key)
        now = self._clock.wall()
        if known is not None and now < known.valid_until:
            return known
        unknown_until = self._unknown.get(key)
        if unknown_until is not None and now < unknown_until:
            return None
        return self._look_up(key, now)

    def warm(self) -> None:
        """Import genai-prices and load its list, so that no call has to wait for it. Blocks for 0.1 s and more."""
        _providers()

    def _look_up(self, key: _Key, now: float) -> Rates | None:
        model, provider, service_tier = key
        found = _find(model, provider)
        rates, until = (None, math.inf) if found is None else _rates(*found, service_tier, now)
        if rates is not None:
            _remember(self._known, key, rates)
        else:
            _remember(self._unknown, key, until)
        return rates


def unknown_price_message(model: str, *, known: Iterable[str] = ()) -> str:
    """Say that ``model`` has no known price, what that means, and what to do; with the names that come closest to it.

    Args:
        model: the name that was looked up.
        known: names that are priced beside those of genai-prices, for example the user's own.

    Slow (it compares thousands of names): for the path of an error only.

    """
    name = model.rpartition("/")[2].lower()
    names = {candidate.lower(): candidate for candidate in (*_priced_names(), *known) if candidate != model}
    close = [names[match] for match in difflib.get_close_matches(name, names, n=3, cutoff=0.75)]
    hint = f" Close names with a known price: {', '.join(close)}." if close else ""
    return (
        f"The model {model!r} has no known price, so a ceiling in US dollars could not be held.{hint} "
        f'Give its price with clevagent.init(prices={{"{model}": clevagent.Price(input=..., output=...)}}), in US dollars '
        'per million tokens (0 if it is free); or with unknown_price="allow", and then its calls count as $0.'
    )


# -- prices as people write them ------------------------------------------------------------------------------------------


def _rate(usd: float | str | Decimal, field: str) -> int:
    what = f"Price({field}={usd!r})"
    example = f"Give US dollars per million tokens, for example {field}=2.50."
    if isinstance(usd, bool) or not isinstance(usd, (int, float, str, Decimal)):
        raise UsageError(f"{what} is a {type(usd).__name__}, not a price. {example}")
    try:
        amount = Decimal(str(usd))
    except InvalidOperation as error:
        raise UsageError(f"{what} cannot be read as a number, so no cost could be told. {example}") from error
    if not amount.is_finite():
        raise UsageError(f"{what} is not finite, so no cost could be told. {example}")
    if amount < 0:
        raise UsageError(f"{what} is negative, so calls would give money back to a budget. {example} 0 is a free model.")
    if amount > _DEAREST_USD:
        raise UsageError(f"{what} is more than a dollar for each token, which no model costs. {example}")
    return _up(amount * PICO_PER_USD_PER_MILLION)


def _own_rates(model: str, price: Price) -> Rates:
    if not isinstance(model, str) or not isinstance(price, Price):
        raise UsageError(
            f"prices={{{model!r}: {price!r}}} is not a price of a model, so its calls could not be charged. "
            'Give prices={"the-model": clevagent.Price(input=..., output=...)}, in US dollars per million tokens.'
        )
    return price.rates()


def _up(pico: Decimal) -> int:
    return math.ceil(pico)


def _remember(memo: dict[_Key, _Value], key: _Key, value: _Value) -> None:
    if len(memo) >= MEMOISED:
        memo.clear()
    memo[key] = value


# -- the list of genai-prices: finding a model ----------------------------------------------------------------------------


def _providers() -> Sequence[Provider]:
    # Lazily: the import costs 0.1 s and more, and brings pydantic and an HTTP client that nothing here uses.
    from genai_prices.data_snapshot import get_snapshot  # noqa: PLC0415 - lazily, as said above

    return get_snapshot().providers


def _find(model: str, provider: str | None) -> tuple[Provider, ModelInfo] | None:
    # Not through the snapshot's own find_provider_model: it remembers every name that it was ever asked for.
    name = model.lower()
    found = _find_named(name, provider)
    if found is None and "models/" in name:  # models/gemini-2.5-pro, publishers/google/models/gemini-2.5-pro
        found = _find_named(name.rpartition("models/")[2], provider)
    if found is None and "/" in name:  # openai/gpt-4o, as LiteLLM and others write it
        prefix, _, rest = name.partition("/")
        if _provider(prefix) is not None:
            found = _find_named(rest, prefix)
    return found


def _find_named(name: str, provider: str | None) -> tuple[Provider, ModelInfo] | None:
    everyone = list(_providers())
    billing = _provider(provider) if provider is not None else None
    by_name = next((one for one in everyone if one.model_match is not None and one.model_match.is_match(name)), None)
    for candidate in (billing, by_name):
        model = candidate.find_model(name, all_providers=everyone) if candidate is not None else None
        if candidate is not None and model is not None:
            return candidate, model
    return None


def _provider(provider: str) -> Provider | None:
    from genai_prices.data_snapshot import find_provider_by_id  # noqa: PLC0415 - lazily, see _providers

    return find_provider_by_id(list(_providers()), provider)


def _priced_names() -> Iterator[str]:
    for provider in _providers():
        for model in provider.models:
            if any(_is_priced_by_token(price) for price in _standard_prices(model)):
                yield model.id


# -- the list of genai-prices: a model's rates ----------------------------------------------------------------------------


def _rates(provider: Provider, model: ModelInfo, service_tier: str | None, now: float) -> tuple[Rates | None, float]:
    """Make a model's rates, and tell until when they (or their absence) hold."""
    # As in genai-prices: the variants of a model that another provider resells are not the reseller's.
    own = any(model is one for one in provider.models)
    variants = (model.price_variants or []) if own and service_tier is not None else []
    until = _next_change((*_conditional(model), *variants), now)
    contexts = _contexts(variants, service_tier)
    prices = [price for price in _prices_now(model, contexts, now) if _is_priced_by_token(price)]
    if not prices:
        return None, until
    chosen = "" if service_tier is None else f" (service tier {service_tier})"
    rates = Rates(
        tiers=_tiers(prices),
        per_request=max(_per_request(price) for price in prices),
        context_window=model.context_window,
        valid_until=until,
        source=f"genai-prices {provider.id}/{model.id}{chosen}",
    )
    return rates, until


def _contexts(variants: Sequence[PriceVariant], service_tier: str | None) -> list[dict[str, str]]:
    """Tell all contexts that the tier may stand for; the first is the standard price, or the one that was named."""
    if service_tier is None:
        return [{}]
    tier = service_tier.lower()
    # What requests call a service tier, the list files under one of these.
    named = {"service_tier": tier, "processing": tier, "speed": tier}
    if any(all(named.get(key) == value for key, value in variant.when.items()) for variant in variants):
        return [named]
    if tier in _STANDARD_TIERS:
        return [{}]
    # "auto" becomes some service tier, but never a batch or a model's fast mode; an unheard-of name may be anything.
    return [{}, *(variant.when for variant in variants if tier != "auto" or "service_tier" in variant.when)]


def _prices_now(model: ModelInfo, contexts: Iterable[dict[str, str]], now: float) -> list[ModelPrice]:
    if isinstance(model.prices, list) and not model.prices:
        return []
    return [model.get_prices(utc(now), context) for context in contexts]


def _conditional(model: ModelInfo) -> Sequence[ConditionalPrice]:
    return model.prices if isinstance(model.prices, list) else ()


def _standard_prices(model: ModelInfo) -> list[ModelPrice]:
    return [one.prices for one in model.prices] if isinstance(model.prices, list) else [model.prices]


def _next_change(conditions: Iterable[ConditionalPrice | PriceVariant], now: float) -> float:
    """Tell the next moment at which any condition begins or ceases to hold, in wall seconds."""
    from genai_prices.types import StartDateConstraint  # noqa: PLC0415 - lazily, see _providers

    changes = [math.inf]
    today = utc(now).replace(hour=0, minute=0, second=0, microsecond=0)
    for condition in conditions:
        constraint = condition.constraint
        if isinstance(constraint, StartDateConstraint):
            changes.append(datetime.combine(constraint.start_date, time(), UTC).timestamp())
        elif constraint is not None:
            for moment in (constraint.start_time, constraint.end_time):
                # A moment with an offset can lie on the day before or after in UTC.
                aware = moment.replace(tzinfo=moment.tzinfo or UTC)
                days = (today + timedelta(days=offset) for offset in (-1, 0, 1, 2))
                changes += [datetime.combine(day, aware).timestamp() for day in days]
    return min(change for change in changes if change > now)


def _is_priced_by_token(price: ModelPrice) -> bool:
    return price.input_mtok is not None or price.output_mtok is not None


def _per_request(price: ModelPrice) -> int:
    return _up(_at(price, "requests_kcount", -1, Decimal(0)) * PICO_PER_USD / _REQUESTS_PER_PRICE)


def _tiers(prices: Sequence[ModelPrice]) -> tuple[Tier, ...]:
    """Make the tiers of the dearest of ``prices``, rate by rate; one tier for each start at which a rate changes."""
    tiers: list[Tier] = []
    for start in sorted({-1}.union(*(_starts(price) for price in prices))):
        candidates = [_tier(price, start) for price in prices]
        dearest = {name: max(getattr(candidate, name) for candidate in candidates) for name in _RATE_NAMES}
        tier = Tier(start=start, **dearest)
        if not tiers or replace(tier, start=tiers[-1].start) != tiers[-1]:
            tiers.append(tier)
    return tuple(tiers)


def _starts(price: ModelPrice) -> set[int]:
    values: Iterable[Decimal | TieredPrices | None] = vars(price).values()
    return {tier.start for value in values if value is not None and not isinstance(value, Decimal) for tier in value.tiers}


def _tier(price: ModelPrice, start: int) -> Tier:
    """Make one tier; a kind of tokens without a price of its own costs what its parent costs, as in genai-prices."""
    text_in = _dearest(price, "input", start)
    text_out = _dearest(price, "output", start)
    # genai-prices itself refuses a price for a time to live that stands without a general one.
    write = max(_at(price, "cache_write_mtok", start, text_in), _at(price, "cache_write_5m_mtok", start, Decimal(0)))
    usd_per_million = {
        "input": text_in,
        "cache_read": _at(price, "cache_read_mtok", start, text_in),
        "cache_write": write,
        "cache_write_1h": _at(price, "cache_write_1h_mtok", start, write),
        "output": text_out,
        "input_audio": _at(price, "input_audio_mtok", start, text_in),
        "output_audio": _at(price, "output_audio_mtok", start, text_out),
    }
    return Tier(start=start, **{name: _up(usd * PICO_PER_USD_PER_MILLION) for name, usd in usd_per_million.items()})


def _dearest(price: ModelPrice, direction: str, start: int) -> Decimal:
    """Read the text price, or that of images or video where it is higher: usage here does not tell which of them tokens were."""
    text = _at(price, f"{direction}_mtok", start, Decimal(0))
    return max(text, *(_at(price, f"{direction}_{kind}_mtok", start, text) for kind in ("image", "video")))


def _at(price: ModelPrice, key: str, start: int, parent: Decimal) -> Decimal:
    """Read one price for a request whose input lies just above ``start``."""
    value: Decimal | TieredPrices | None = getattr(price, key)
    if value is None:
        return parent
    if isinstance(value, Decimal):
        return value
    found = value.base
    for tier in value.tiers:
        if tier.start <= start:
            found = tier.price
    return found


_RATE_NAMES = tuple(field.name for field in fields(Tier) if field.name != "start")
