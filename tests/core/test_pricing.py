"""Prices: what a model's tokens cost, against genai-prices itself and at every boundary."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import genai_prices
import pytest
from genai_prices import data_snapshot
from genai_prices.types import ModelInfo, Provider
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import clevagent_core
from clevagent_core import pricing
from clevagent_core.calls import Usage
from clevagent_core.clock import SystemClock, utc
from clevagent_core.errors import UsageError
from clevagent_core.pricing import Price, PriceList, Rates, Tier, unknown_price_message

ALL_MODELS = [(provider, model) for provider in data_snapshot.get_snapshot().providers for model in provider.models]
MEDIA = {id(model) for _, model in ALL_MODELS if re.search(r"\b(in|out)put_(image|video)_mtok=", repr(model.prices))}
MODELS = [which for which in ALL_MODELS if id(which[1]) not in MEDIA]
TOKENS = st.one_of(
    st.integers(0, 2_000_000),
    st.sampled_from([0, 1, 127_999, 128_000, 128_001, 199_999, 200_000, 200_001, 272_000, 272_001]),
)


class FakeClock(SystemClock):
    """A clock whose wall time is set by the test, in seconds since 1970."""

    def __init__(self, now: float) -> None:
        self.now = now
        self.asked = 0

    def wall(self) -> float:
        self.asked += 1
        return self.now


def wall(text: str) -> float:
    """Turn ``2026-03-13T00:00`` (UTC) into wall seconds."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


NOW = wall("2026-11-23T12:00")


@st.composite
def usages(draw: st.DrawFn, *, audio: bool = False) -> Usage:
    """Draw usage that a provider can report: details lie inside their totals."""
    total = draw(TOKENS)
    read = draw(st.integers(0, total))
    write = draw(st.integers(0, total - read))
    output = draw(TOKENS)
    return Usage(
        input_tokens=total,
        output_tokens=output,
        cache_read_tokens=read,
        cache_write_tokens=write,
        cache_write_1h_tokens=draw(st.integers(0, write)),
        input_audio_tokens=draw(st.integers(0, total)) if audio else 0,
        output_audio_tokens=draw(st.integers(0, output)) if audio else 0,
    )


def genai_pico(
    provider: Provider, model: ModelInfo, usage: Usage, now: float, context: dict[str, str] | None = None
) -> Decimal | None:
    """Ask genai-prices what ``usage`` costs, in pico-USD; ``None`` where it has no price by the token."""
    said = {
        name: value
        for name in (
            "cache_read_tokens",
            "cache_write_tokens",
            "cache_write_1h_tokens",
            "input_audio_tokens",
            "output_audio_tokens",
        )
        if (value := getattr(usage, name))
    }
    asked = genai_prices.Usage(input_tokens=usage.input_tokens, output_tokens=usage.output_tokens, **said)
    price = model.calc_price(asked, provider, genai_request_timestamp=utc(now), price_context=context)
    if price.model_price.input_mtok is None and price.model_price.output_mtok is None:
        return None
    return price.total_price * 10**12


def rates_of(which: tuple[Provider, ModelInfo], now: float = NOW, service_tier: str | None = None) -> Rates | None:
    """Make a model's rates without looking it up: some models of the list do not match their own names."""
    return pricing._rates(*which, service_tier, now)[0]


def assert_same(cost: int, expected: Decimal, usage: Usage) -> None:
    """Whole pico-USD must be met exactly; a fraction comes from a fractional rate, which is rounded up for each token."""
    if expected == int(expected):
        assert cost == expected
    else:
        assert expected < cost < expected + usage.input_tokens + usage.output_tokens


# -- against genai-prices ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(st.sampled_from(MODELS), usages(), st.integers(int(wall("2024-01-01")), int(wall("2027-06-01"))))
def test_cost_is_what_genai_prices_computes(which: tuple[Provider, ModelInfo], usage: Usage, now: int) -> None:
    """For any model of the list, cached or not, at any time."""
    rates = rates_of(which, now)
    expected = genai_pico(*which, usage, now)
    assert (rates is None) == (expected is None)
    if rates is not None and expected is not None:
        assert_same(rates.cost(usage), expected, usage)


@pytest.mark.slow
def test_cost_is_what_genai_prices_computes_for_every_model() -> None:
    """The same for each model of the list in turn, small and large, with every kind of cached tokens."""
    priced = 0
    for provider, model in MODELS:
        rates = rates_of((provider, model))
        for total in (1_000, 150_001, 300_001):
            usage = Usage(
                input_tokens=total,
                output_tokens=777,
                cache_read_tokens=300,
                cache_write_tokens=200,
                cache_write_1h_tokens=50,
            )
            expected = genai_pico(provider, model, usage, NOW)
            assert (rates is None) == (expected is None), (provider.id, model.id)
            if rates is not None and expected is not None:
                assert_same(rates.cost(usage), expected, usage)
                priced += 1
    assert priced > 6000


@pytest.mark.slow
def test_a_model_of_the_list_is_looked_up_as_genai_prices_does() -> None:
    """By its provider and its own name, and by its name alone; what genai-prices finds is never missed."""
    prices = PriceList(None, FakeClock(NOW))
    usage = genai_prices.Usage(input_tokens=300_001, output_tokens=777)
    found = 0
    for provider, model in MODELS:
        for hint in (provider.id, None):
            try:
                price = genai_prices.calc_price(usage, model.id, provider_id=hint, genai_request_timestamp=utc(NOW))
            except LookupError:
                continue
            rates = prices.rates(model.id, hint, None)
            if rates is not None:
                assert rates.source == f"genai-prices {price.provider.id}/{price.model.id}"
                found += 1
            else:
                assert price.model_price.input_mtok is price.model_price.output_mtok is None
    assert found > 2000


@pytest.mark.slow
def test_tokens_that_may_be_images_or_video_cost_what_those_do() -> None:
    """Usage does not tell them from text, so the dearest price of the direction stands: never less than what is billed."""
    seen = 0
    for provider, model in ALL_MODELS:
        rates = rates_of((provider, model))
        if id(model) not in MEDIA or rates is None:
            continue
        usage = Usage(input_tokens=1_000, output_tokens=500)
        asked = genai_prices.Usage(input_tokens=1_000, input_image_tokens=1_000, output_tokens=500, output_image_tokens=500)
        billed = model.calc_price(asked, provider, genai_request_timestamp=utc(NOW)).total_price * 10**12
        assert rates.cost(usage) >= billed
        seen += 1
    assert seen > 20


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(
    which=st.sampled_from([(p, m) for p, m in MODELS if "audio" in repr(m.prices)]),
    usage=usages(audio=True),
    cached=st.booleans(),
)
def test_audio_costs_what_genai_prices_computes(which: tuple[Provider, ModelInfo], usage: Usage, *, cached: bool) -> None:
    """Where genai-prices can tell: audio beside cached tokens needs a detail that no provider reports, and it raises."""
    if not cached:
        usage = Usage(
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            input_audio_tokens=usage.input_audio_tokens,
            output_audio_tokens=usage.output_audio_tokens,
        )
    try:
        expected = genai_pico(*which, usage, NOW)
    except ValueError:
        assume(False)
    rates = rates_of(which)
    assert (rates is None) == (expected is None)
    if rates is not None and expected is not None:
        assert_same(rates.cost(usage), expected, usage)


@pytest.mark.parametrize("tier", ["default", "priority", "flex", "fast"])
def test_a_named_service_tier_costs_what_genai_prices_computes(tier: str) -> None:
    """For every model of the list that has a price for the tier."""
    usage = Usage(input_tokens=300_001, output_tokens=777, cache_read_tokens=300)
    seen = 0
    for provider, model in MODELS:
        if any(variant.when == {"service_tier": tier} for variant in model.price_variants or ()):
            rates = rates_of((provider, model), service_tier=tier)
            expected = genai_pico(provider, model, usage, NOW, {"service_tier": tier})
            assert rates is not None and expected is not None
            assert_same(rates.cost(usage), expected, usage)
            seen += 1
    assert seen > 5


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(
    which=st.sampled_from(MODELS),
    usage=usages(audio=True),
    audio=st.booleans(),
    writes_cache=st.booleans(),
    more_in=st.integers(0, 300_000),
    more_out=st.integers(0, 300_000),
    tier=st.sampled_from([None, "auto", "flex", "priority", "batch", "never heard of"]),
)
def test_no_usage_within_the_bound_costs_more_than_the_bound(
    *,
    which: tuple[Provider, ModelInfo],
    usage: Usage,
    audio: bool,
    writes_cache: bool,
    more_in: int,
    more_out: int,
    tier: str | None,
) -> None:
    """Whatever part of the input was cached, and whatever tier was reached."""
    rates = rates_of(which, service_tier=tier)
    assume(rates is not None)
    assert rates is not None
    if not audio:
        usage = Usage(
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            cache_read_tokens=usage.cache_read_tokens,
            cache_write_tokens=usage.cache_write_tokens,
            cache_write_1h_tokens=usage.cache_write_1h_tokens,
        )
    if not writes_cache:
        usage = replace(usage, cache_write_tokens=0, cache_write_1h_tokens=0)
    tokens = usage.input_tokens + more_in, usage.output_tokens + more_out
    bound = rates.upper_bound(*tokens, audio=audio, writes_cache=writes_cache)
    assert rates.cost(usage) <= bound <= rates.upper_bound(*tokens, audio=audio)


# -- rates ------------------------------------------------------------------------------------------------------------


def tier(start: int = -1, **rates: int) -> Tier:
    """Make a tier with prime rates, so that no two sums agree by chance."""
    primes = {
        "input": 11,
        "cache_read": 2,
        "cache_write": 13,
        "cache_write_1h": 23,
        "output": 53,
        "input_audio": 101,
        "output_audio": 211,
    }
    return Tier(start=start, **{**primes, **rates})


def test_each_kind_of_tokens_costs_its_own_rate() -> None:
    """Cached, written for an hour, audio, and what remains."""
    usage = Usage(
        input_tokens=1000,
        output_tokens=100,
        cache_read_tokens=300,
        cache_write_tokens=200,
        cache_write_1h_tokens=50,
        input_audio_tokens=40,
        output_audio_tokens=30,
    )
    expected = 300 * 2 + 150 * 13 + 50 * 23 + 40 * 101 + 460 * 11 + 70 * 53 + 30 * 211 + 7
    assert Rates(tiers=(tier(),), per_request=7).cost(usage) == expected


@pytest.mark.parametrize(("tokens", "rate"), [(199_999, 11), (200_000, 11), (200_001, 17), (500_000, 17), (500_001, 19)])
def test_a_tier_applies_to_all_tokens_just_after_its_start(tokens: int, rate: int) -> None:
    """Just before, at and just after: the cliff is after the start."""
    rates = Rates(tiers=(tier(), tier(200_000, input=17), tier(500_000, input=19)))
    assert rates.cost(Usage(input_tokens=tokens)) == tokens * rate


@pytest.mark.parametrize(("total", "rate"), [(200_000, 11), (200_001, 17)])
def test_cached_tokens_count_towards_the_tier(total: int, rate: int) -> None:
    """The tier is chosen by the whole input."""
    rates = Rates(tiers=(tier(), tier(200_000, input=17)))
    assert rates.cost(Usage(input_tokens=total, cache_read_tokens=total - 10)) == 10 * rate + (total - 10) * 2


@pytest.mark.parametrize(("tokens", "rate"), [(199_999, 1_250_000), (200_000, 1_250_000), (200_001, 2_500_000)])
def test_the_tiers_of_the_list_are_cliffs(tokens: int, rate: int) -> None:
    """Gemini 2.5 Pro doubles above 200 000 tokens."""
    rates = PriceList(None, FakeClock(NOW)).rates("gemini-2.5-pro", "google", None)
    assert rates is not None
    assert [tier.start for tier in rates.tiers] == [-1, 200_000]
    assert rates.cost(Usage(input_tokens=tokens)) == tokens * rate


@pytest.mark.parametrize(("tokens", "rate"), [(0, 23), (200_000, 23), (200_001, 29)])
def test_the_bound_is_the_dearest_rate_that_can_be_reached(tokens: int, rate: int) -> None:
    """An hour's cache write is the dearest here; the second tier counts only when it can be reached."""
    rates = Rates(tiers=(tier(), tier(200_000, cache_write_1h=29)), per_request=7)
    assert rates.upper_bound(tokens, 10) == tokens * rate + 10 * 53 + 7


def test_a_cheaper_later_tier_does_not_lower_the_bound() -> None:
    """Fewer tokens than expected may fall into the dearer tier."""
    rates = Rates(tiers=(tier(), tier(100, input=1, cache_read=1, cache_write=1, cache_write_1h=1, output=1)))
    assert rates.upper_bound(101, 10) == 101 * 23 + 10 * 53


def test_audio_is_in_the_bound_only_when_asked_for() -> None:
    """Its rates are many times those for text."""
    rates = Rates(tiers=(tier(),))
    assert rates.upper_bound(10, 10) == 10 * 23 + 10 * 53
    assert rates.upper_bound(10, 10, writes_cache=False) == 10 * 11 + 10 * 53
    assert rates.upper_bound(10, 10, audio=True) == 10 * 101 + 10 * 211


def test_details_that_pass_their_total_are_charged_in_full() -> None:
    """A report that leaves cached tokens out of the total must not make them free."""
    rates = Rates(tiers=(tier(),))
    assert rates.cost(Usage(input_tokens=10, cache_read_tokens=100, cache_write_1h_tokens=5)) == 100 * 2 + 5 * 23
    assert rates.cost(Usage(output_tokens=10, output_audio_tokens=20)) == 20 * 211


@pytest.mark.parametrize("starts", [(), (200, 100), (-1, -1)])
def test_tiers_that_do_not_ascend_are_refused(starts: tuple[int, ...]) -> None:
    """No right tier could be found among them."""
    with pytest.raises(UsageError, match=r"Give at least one Tier"):
        Rates(tiers=tuple(tier(start) for start in starts))


@pytest.mark.parametrize("rate", [-1, 0.5, True])
def test_a_rate_that_is_no_whole_number_is_refused(rate: int) -> None:
    """It would credit a ledger, or make it inexact."""
    with pytest.raises(UsageError, match="not a rate"):
        tier(output=rate)


# -- prices by time ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "input_rate", "valid_until"),
    [
        (wall("2025-06-10") - 0.001, 10_000_000, wall("2025-06-10")),
        (wall("2025-06-10"), 2_000_000, math.inf),
        (wall("2025-06-10") + 0.001, 2_000_000, math.inf),
    ],
)
def test_a_price_with_a_start_date_begins_at_midnight_utc(now: float, input_rate: int, valid_until: float) -> None:
    """OpenAI's o3 became cheaper on 2025-06-10."""
    rates = PriceList(None, FakeClock(now)).rates("o3", "openai", None)
    assert rates is not None
    assert (rates.tiers[0].input, rates.valid_until) == (input_rate, valid_until)


@pytest.mark.parametrize(
    ("now", "input_rate", "valid_until"),
    [
        (wall("2026-11-23T00:30") - 0.001, 135_000, wall("2026-11-23T00:30")),
        (wall("2026-11-23T00:30"), 270_000, wall("2026-11-23T16:30")),
        (wall("2026-11-23T16:30") - 0.001, 270_000, wall("2026-11-23T16:30")),
        (wall("2026-11-23T16:30"), 135_000, wall("2026-11-24T00:30")),
        (wall("2026-11-23T23:59"), 135_000, wall("2026-11-24T00:30")),
    ],
)
def test_a_price_by_time_of_day_changes_at_its_boundaries(now: float, input_rate: int, valid_until: float) -> None:
    """DeepSeek charges half outside 00:30-16:30 UTC."""
    rates = PriceList(None, FakeClock(now)).rates("deepseek-chat", "deepseek", None)
    assert rates is not None
    assert (rates.tiers[0].input, rates.valid_until) == (input_rate, valid_until)


@pytest.mark.slow
def test_nothing_changes_before_valid_until() -> None:
    """For every conditional price of the list, the rates just before ``valid_until`` are still those."""
    for provider, model in MODELS:
        if not isinstance(model.prices, list):
            continue
        for now in (wall("2025-01-01T05:00"), wall("2026-01-01T02:00"), NOW):
            rates = PriceList(None, FakeClock(now)).rates(model.id, provider.id, "auto")
            if rates is not None and rates.valid_until < math.inf:
                later = PriceList(None, FakeClock(rates.valid_until - 0.001)).rates(model.id, provider.id, "auto")
                assert later == rates


def test_remembered_rates_end_at_valid_until() -> None:
    """One list, its clock moving past the boundary."""
    clock = FakeClock(wall("2026-11-23T16:30") - 1)
    prices = PriceList(None, clock)
    before = prices.rates("deepseek-chat", "deepseek", None)
    assert prices.rates("deepseek-chat", "deepseek", None) is before
    clock.now += 1
    after = prices.rates("deepseek-chat", "deepseek", None)
    assert before is not None and after is not None
    assert after.tiers[0].input * 2 == before.tiers[0].input


# -- service tiers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tier", "input_rate"),
    [
        (None, 2_000_000),
        ("default", 2_000_000),
        ("standard", 2_000_000),
        ("flex", 1_000_000),
        ("batch", 1_000_000),
        ("priority", 3_500_000),
        ("PRIORITY", 3_500_000),
        ("auto", 3_500_000),
        ("never heard of", 3_500_000),
    ],
)
def test_a_service_tier_has_its_own_price_and_an_unknown_one_the_dearest(tier: str | None, input_rate: int) -> None:
    """OpenAI's o3 at 2, flex 1 and priority 3.5 USD."""
    rates = PriceList(None, FakeClock(NOW)).rates("o3", "openai", tier)
    assert rates is not None
    assert rates.tiers[0].input == input_rate


def test_an_automatic_tier_is_never_a_batch_or_a_fast_mode() -> None:
    """Anthropic's ``auto`` does not turn on the fast mode, which is another request."""
    prices = PriceList(None, FakeClock(NOW))
    for provider, model in MODELS:
        if provider.id == "anthropic":
            standard, auto = prices.rates(model.id, "anthropic", None), prices.rates(model.id, "anthropic", "auto")
            assert (standard and standard.tiers) == (auto and auto.tiers)


def test_a_price_variant_that_starts_later_ends_the_rates_of_its_tier() -> None:
    """Priority of o3 was priced from 2026-10-12 on, batches from 2026-10-14."""
    prices = PriceList(None, FakeClock(wall("2026-10-11")))
    priority, standard = prices.rates("o3", "openai", "priority"), prices.rates("o3", "openai", None)
    assert priority is not None and standard is not None
    assert (priority.valid_until, standard.valid_until) == (wall("2026-10-12"), math.inf)


# -- looking up -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "provider", "source"),
    [
        ("gpt-4o", "openai", "openai/gpt-4o"),
        ("gpt-4o", None, "openai/gpt-4o"),
        ("GPT-4o-2024-08-06", None, "openai/gpt-4o"),
        ("gpt-4o", "nobody", "openai/gpt-4o"),
        ("gpt-4o", "deepseek", "openai/gpt-4o"),
        ("gpt-4o", "azure_openai", "openai/gpt-4o"),
        ("openai/gpt-4o", None, "openai/gpt-4o"),
        ("openai/gpt-4o", "litellm", "openai/gpt-4o"),
        ("openai/gpt-4o", "openrouter", "openrouter/openai/gpt-4o"),
        ("models/gemini-2.5-pro", "google_genai", "google/gemini-2.5-pro"),
        ("publishers/google/models/gemini-2.5-pro", None, "google/gemini-2.5-pro"),
        ("anthropic/claude-sonnet-4-20250514", None, "anthropic/claude-sonnet-4-0"),
    ],
)
def test_a_model_is_found_by_the_names_that_requests_carry(model: str, provider: str | None, source: str) -> None:
    """The provider is a hint: where it does not help, the name alone decides."""
    rates = PriceList(None, FakeClock(NOW)).rates(model, provider, None)
    assert rates is not None
    assert rates.source == f"genai-prices {source}"


@pytest.mark.parametrize("model", ["no-such-model", "", "my-company/gpt-4o", "ft:gpt-4o-mini-2024-07-18:me::1", "whisper-1"])
def test_an_unknown_model_has_no_rates(model: str) -> None:
    """``None``, never zero: also for a model that is not priced by the token, and for a fine-tuned one."""
    assert PriceList(None, FakeClock(NOW)).rates(model, None, None) is None


def test_a_model_that_the_list_has_without_any_price_is_unknown() -> None:
    """An empty price may mean free, or not known: the user has to say."""
    assert PriceList(None, FakeClock(NOW)).rates("google/gemma-3-27b-it:free", "openrouter", None) is None


def test_the_context_window_comes_with_the_rates() -> None:
    """It bounds an input that cannot be bounded otherwise."""
    rates = PriceList(None, FakeClock(NOW)).rates("gpt-4o", "openai", None)
    assert rates is not None and rates.context_window == 128_000


def test_a_fee_per_request_is_charged_and_bounded() -> None:
    """Perplexity's sonar costs 12 USD for a thousand requests beside its tokens."""
    rates = PriceList(None, FakeClock(NOW)).rates("sonar", "perplexity", None)
    assert rates is not None
    assert rates.per_request == rates.cost(Usage()) == rates.upper_bound(0, 0) == 12 * 10**9


def test_the_users_own_price_goes_before_the_list() -> None:
    """Whatever the provider and the service tier."""
    prices = PriceList({"gpt-4o": Price(input=1, output=2)}, FakeClock(NOW))
    for provider, tier in ((None, None), ("openai", "priority")):
        rates = prices.rates("gpt-4o", provider, tier)
        assert rates is not None
        assert (rates.source, rates.valid_until) == ("prices= of init", math.inf)
        assert rates.cost(Usage(input_tokens=3, output_tokens=5)) == 13_000_000
    other = prices.rates("gpt-4o-mini", None, None)
    assert other is not None and other.source.startswith("genai-prices")


def test_rates_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known and unknown names alike."""
    looked_up: list[str] = []
    find = pricing._find

    def counted(model: str, provider: str | None) -> tuple[Provider, ModelInfo] | None:
        looked_up.append(model)
        return find(model, provider)

    monkeypatch.setattr(pricing, "_find", counted)
    prices = PriceList(None, FakeClock(NOW))
    for _ in range(3):
        prices.rates("gpt-4o", None, None)
        prices.rates("no-such-model", None, None)
    assert looked_up == ["gpt-4o", "no-such-model"]


def test_a_flood_of_names_does_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither here nor in genai-prices, and names that are known are not forgotten for it."""
    monkeypatch.setattr(pricing, "MEMOISED", 8)
    snapshot = data_snapshot.get_snapshot()
    remembered = len(snapshot._lookup_cache), len(snapshot._provider_cache), len(snapshot._provider_misses)
    prices = PriceList(None, FakeClock(NOW))
    known = prices.rates("gpt-4o", None, None)
    for number in range(30):
        prices.rates(f"no-such-model-{number}", None, None)
    assert len(prices._unknown) <= 8
    assert prices.rates("gpt-4o", None, None) is known
    assert (len(snapshot._lookup_cache), len(snapshot._provider_cache), len(snapshot._provider_misses)) == remembered


# -- prices as users write them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("amount", [0.1, "0.1", Decimal("0.1")])
def test_a_price_is_taken_as_the_decimal_number_it_prints_as(amount: float | str | Decimal) -> None:
    """Ten cents for a million tokens is 100 000 pico-USD a token, exactly."""
    rates = Price(input=amount, output=0).rates()
    assert (rates.tiers[0].input, rates.tiers[0].output, rates.context_window) == (100_000, 0, None)


def test_cached_input_costs_what_input_costs_unless_priced() -> None:
    """Both ways, for each of the two prices."""
    plain = Price(input=2, output=8).rates().tiers[0]
    assert (plain.cache_read, plain.cache_write, plain.cache_write_1h) == (2_000_000,) * 3
    cached = Price(input=2, output=8, cache_read=0, cache_write="2.5", context_window=1000).rates()
    assert (cached.tiers[0].cache_read, cached.tiers[0].cache_write, cached.tiers[0].cache_write_1h) == (
        0,
        2_500_000,
        2_500_000,
    )
    assert cached.context_window == 1000


def test_a_price_finer_than_a_pico_dollar_a_token_is_rounded_up() -> None:
    """A ceiling must never be passed by rounding."""
    assert Price(input="0.0000001", output="0.0000011").rates().tiers[0].input == 1
    assert Price(input="0.0000001", output="0.0000011").rates().tiers[0].output == 2


def test_a_free_model_costs_nothing_and_is_known() -> None:
    """A model of one's own may cost 0."""
    rates = PriceList({"llama": Price(input=0, output=0)}, FakeClock(NOW)).rates("llama", "ollama", None)
    assert rates is not None
    assert rates.upper_bound(10**6, 10**6) == 0


@pytest.mark.parametrize("field", ["input", "output", "cache_read", "cache_write"])
@pytest.mark.parametrize("amount", [-0.01, math.nan, math.inf, "-1", "NaN", "cheap", True, [1], 1_000_001])
def test_what_is_no_price_is_refused_where_it_is_written(field: str, amount: object) -> None:
    """The message names the field and the value, and shows how it is done."""
    with pytest.raises(UsageError) as caught:
        Price(**{"input": 1, "output": 1, field: amount})  # type: ignore[arg-type]
    assert f"Price({field}={amount!r})" in str(caught.value)
    assert f"for example {field}=2.50" in str(caught.value)


@pytest.mark.parametrize("window", [0, -1, 1.5, True, "128k"])
def test_what_is_no_context_window_is_refused(window: object) -> None:
    """A bound could not be made of it."""
    with pytest.raises(UsageError, match="context_window"):
        Price(input=1, output=1, context_window=window)  # type: ignore[arg-type]


@pytest.mark.parametrize("prices", [{"m": 1.0}, {"m": {"input": 1, "output": 1}}, {1: Price(input=1, output=1)}])
def test_prices_that_are_no_prices_are_refused(prices: dict[str, Price]) -> None:
    """With the way to write one."""
    with pytest.raises(UsageError, match=r"clevagent\.Price\(input=\.\.\., output=\.\.\.\)"):
        PriceList(prices, FakeClock(NOW))


def test_the_message_for_an_unknown_price_says_what_to_do() -> None:
    """What happened, what it means, both ways out, and close names."""
    message = unknown_price_message("gpt-4oo")
    assert "'gpt-4oo' has no known price" in message
    assert 'clevagent.init(prices={"gpt-4oo": clevagent.Price(input=..., output=...)})' in message
    assert 'unknown_price="allow"' in message
    assert "gpt-4o" in message.split("Close names with a known price: ")[1]
    assert "Close names" not in unknown_price_message("zzzzzzzzzzzz")
    assert "zzzzzzzzzzzy" in unknown_price_message("zzzzzzzzzzzz", known=["zzzzzzzzzzzy"])


# -- importing --------------------------------------------------------------------------------------------------------


def run_python(code: str) -> str:
    """Run ``code`` in a fresh interpreter and give what it printed."""
    root = str(Path(clevagent_core.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": root},
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout.strip()


@pytest.mark.slow
def test_importing_it_does_not_import_genai_prices() -> None:
    """Nor does making a list with the user's own prices and asking for one of them; ``warm`` does."""
    code = (
        "import sys\n"
        "from clevagent_core.clock import SystemClock\n"
        "from clevagent_core.pricing import Price, PriceList\n"
        "prices = PriceList({'m': Price(input=1, output=1)}, SystemClock())\n"
        "assert prices.rates('m', None, None) is not None\n"
        "print('genai_prices' in sys.modules)\n"
        "prices.warm()\n"
        "print('genai_prices.data' in sys.modules)\n"
    )
    assert run_python(code).split() == ["False", "True"]


@pytest.mark.slow
def test_prices_need_no_network() -> None:
    """With every socket forbidden the list is complete, and no thread was started to renew it."""
    code = (
        "import socket, threading\n"
        "def forbidden(*args, **kwargs): raise AssertionError('network')\n"
        "from clevagent_core.clock import SystemClock\n"
        "from clevagent_core.pricing import PriceList\n"
        "prices = PriceList(None, SystemClock())\n"
        "socket.socket.connect = socket.getaddrinfo = forbidden\n"
        "prices.warm()\n"
        "print(prices.rates('gpt-4o', None, None).source, threading.active_count())\n"
    )
    assert run_python(code) == "genai-prices openai/gpt-4o 1"
