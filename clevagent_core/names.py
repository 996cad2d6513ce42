"""Names in budgets (``node=``, ``tool=``, ``model=``) beside the names that exist: a misspelt one is refused where it was written."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from difflib import SequenceMatcher
from typing import Literal, NamedTuple

from clevagent_core.budgets import Budget, matches
from clevagent_core.errors import UsageError

Kind = Literal["node", "tool", "model"]
KINDS: tuple[Kind, ...] = ("node", "tool", "model")

_CLOSE = 0.7
"""How alike a misspelt name is to the one that was meant: below, short words are alike by chance."""
_SHOWN = 12
"""How many names a message lists."""
_WITHOUT_DIGITS = str.maketrans("", "", "0123456789")


class Known(NamedTuple):
    """The names of one kind that an object has."""

    names: Collection[str]
    """Each by itself; nodes inside nodes by their path, too (``researcher/model``)."""
    is_complete: bool = False
    """Whether there are no others: nothing in it is the user's own code, which could call agents with names of their own."""
    opaque: Collection[str] = ()
    """The nodes that are such code."""


def check_known(budgets: Iterable[Budget], known: Mapping[Kind, Known], *, where: str) -> None:
    """Refuse budgets whose names are misspelt: they would never cover a call.

    Names that are only unknown are refused where all names are known. Else they may be those of something inside, and the run tells
    at its end that the budget has covered nothing.

    Args:
        budgets: what was given.
        known: the names that exist, by kind; a kind that is left out is not checked.
        where: to what they were given, as the user wrote it, for the message.

    Raises:
        UsageError: a name that nothing has.

    """
    for budget in budgets:
        for kind, of_kind in known.items():
            pattern = getattr(budget, kind)
            if pattern is not None:
                _check(budget, kind, pattern, of_kind, where)


def closest(pattern: str, names: Iterable[str]) -> str | None:
    """Find the name that was meant by a misspelt one; ``None`` for a word of its own, and for patterns."""
    if "*" in pattern or "?" in pattern:
        return None
    ratio, best = max(((_likeness(pattern, name), name) for name in names), default=(0.0, ""))
    return best if ratio >= _CLOSE else None


def listed(names: Iterable[str]) -> str:
    """Write names for a message."""
    ordered = sorted(set(names))
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(map(repr, ordered[:_SHOWN])) + more


def _check(budget: Budget, kind: Kind, pattern: str, known: Known, where: str) -> None:
    if any(matches(pattern, name) for name in known.names):
        return
    parts = pattern.split("/")
    if any("/".join(parts[:depth]) in known.opaque for depth in range(1, len(parts))):
        return  # inside the user's own code: anything can be called there
    meant = closest(pattern, [name for name in known.names if ("/" in name) == ("/" in pattern)])
    if meant is None and not known.is_complete:
        return
    hint = f"Did you mean {kind}={meant!r}?" if meant is not None else "Give one of them; * and ? match."
    if known.opaque:
        around = meant if meant in known.opaque else min(known.opaque)
        hint += f" (For something that is called inside one of them, write the path, as {kind}={f'{around}/{pattern}'!r}, or guard that.)"
    raise UsageError(
        f"Budget({budget.label!r}, {kind}={pattern!r}) was given to {where}, which has no {kind} of that name, so it would never stop "
        f"anything. Known here: {listed(known.names) or 'none'}. {hint}"
    )


def _likeness(one: str, other: str) -> float:
    one, other = one.casefold(), other.casefold()
    if one == other:
        return 1.0
    # Words that begin in another way (search, research), or are numbered (step1, step2), are not misspelt.
    if one[:1] != other[:1] or one.translate(_WITHOUT_DIGITS) == other.translate(_WITHOUT_DIGITS):
        return 0.0
    return SequenceMatcher(None, one, other, autojunk=False).ratio()
