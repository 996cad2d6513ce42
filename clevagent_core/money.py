"""Money inside ClevAgent: an ``int`` of pico-USD (10**-12 US dollars), exact for every published rate.

64 bits hold about nine million dollars, so the same integers can be added by SQLite and PostgreSQL. Public arguments and
summaries are US dollars; they are turned into pico-USD once, at the edge, by :func:`to_pico`.
"""

from __future__ import annotations

import math
from decimal import Decimal, InvalidOperation

from clevagent_core.errors import UsageError

PICO_PER_USD = 10**12
PICO_PER_USD_PER_MILLION = 10**6
"""One US dollar for a million tokens is this many pico-USD for one token."""

MAX_PICO = 2**63 - 1
"""The largest amount that a 64-bit ledger can hold: $9 223 372."""


def to_pico(usd: float | str | Decimal, *, what: str) -> int:
    """Turn US dollars into pico-USD, rounding down.

    Args:
        usd: a finite, non-negative amount; a ``float`` is taken as the decimal number it prints as (``0.1`` is ten cents).
        what: the argument's name, for the message.

    Raises:
        UsageError: the amount is no number, is not finite, is negative, or is more than a ledger can hold.

    """
    if isinstance(usd, bool) or not isinstance(usd, (int, float, str, Decimal)):
        raise UsageError(
            f"{what}={usd!r} is a {type(usd).__name__}, not an amount of money. "
            f"Give US dollars as a number, for example {what}=0.50."
        )
    try:
        amount = Decimal(str(usd))
    except InvalidOperation as error:
        raise UsageError(
            f"{what}={usd!r} cannot be read as a number. Give US dollars as a number, for example {what}=0.50."
        ) from error
    if not amount.is_finite():
        raise UsageError(
            f"{what}={usd!r} is not a finite amount, so nothing could ever be compared with it. "
            f"Give a finite number of US dollars; for no limit, leave {what} out."
        )
    if amount < 0:
        raise UsageError(f"{what}={usd!r} is negative; money here is never below zero. Give a positive number of US dollars.")
    pico = int(amount * PICO_PER_USD)
    if pico > MAX_PICO:
        raise UsageError(f"{what}={usd!r} is more than a ledger can hold (${MAX_PICO / PICO_PER_USD:,.0f}). Give a smaller amount.")
    return pico


def to_usd(pico: int) -> float:
    """Turn pico-USD into US dollars for people and summaries (a ``float``: nothing is counted with it)."""
    return pico / PICO_PER_USD


def format_usd(pico: int) -> str:
    """Write pico-USD the way people read money: two decimals for large sums, up to six significant digits for small ones."""
    usd = pico / PICO_PER_USD
    if usd == 0 or abs(usd) >= 1:
        return f"${usd:,.2f}"
    decimals = min(12, 3 - math.floor(math.log10(abs(usd))))
    text = f"{usd:.{decimals}f}".rstrip("0")
    whole, _, fraction = text.partition(".")
    return f"${whole}.{fraction.ljust(2, '0')}"
