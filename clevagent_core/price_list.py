"""The built-in provider of prices: the user's own, then the list that genai-prices ships. Nothing is downloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clevagent_core.hookspecs import hookimpl
from clevagent_core.pricing import PriceList, Rates

if TYPE_CHECKING:
    from clevagent_core.watchdog import Watchdog


class PriceListProvider:
    """Answers from one :class:`~clevagent_core.pricing.PriceList` per watchdog, which is loaded when the watchdog starts."""

    def __init__(self) -> None:
        """Know nothing until configured."""
        self._prices: PriceList | None = None

    @hookimpl
    def clevagent_configure(self, watchdog: Watchdog) -> None:
        """Load the list now: at ``init``, off the path of every call."""
        self._prices = PriceList(watchdog.settings.prices, watchdog.clock)
        self._prices.warm()

    @hookimpl
    def clevagent_price(self, model: str, provider: str | None, service_tier: str | None) -> Rates | None:
        """Look a model up."""
        return None if self._prices is None else self._prices.rates(model, provider, service_tier)


def plugin() -> PriceListProvider:
    """Make the built-in plugin of this module."""
    return PriceListProvider()
