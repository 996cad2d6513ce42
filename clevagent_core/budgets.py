"""The budget that a user writes: what it limits, what it covers, and its window."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fnmatch import fnmatchcase
from fractions import Fraction
from inspect import iscoroutinefunction
from typing import Any, Literal, NamedTuple, cast, get_args

from clevagent_core.calls import Call, LLMCall, Path
from clevagent_core.errors import UsageError
from clevagent_core.money import MAX_PICO, to_pico
from clevagent_core.verdicts import Incident, Unit

Per = Literal["run", "thread", "hour", "day", "month", "lifetime"]
Action = Literal["warn", "raise", "halt", "ask"]
OnExceed = Action | Callable[[Incident], object]

UNITS: tuple[Unit, ...] = get_args(Unit)
"""The units of limits; amounts of a call are tuples in this order."""
USD, TOKENS, INPUT_TOKENS, OUTPUT_TOKENS, LLM_CALLS, TOOL_CALLS = range(len(UNITS))

Amounts = tuple[int, int, int, int, int, int]
"""What a call costs, or could cost: pico-USD, tokens, input tokens, output tokens, LLM calls, tool calls."""

GRACEFUL = {"halt": "end a framework's work with what there is so far", "ask": "stop it so that it can be resumed"}
"""The actions that need an attachment to a framework, in words."""

ACTION_NAMES = {"alert_only": "warn", "stop": "raise"}
"""The published names of the two oldest actions."""

_MOST = 1_000_000_000
"""Above that neither seconds (31 years) nor multiples were meant as a limit."""

_made: list[bool] = []
"""Not empty once there was any budget in this process."""


def any_made() -> bool:
    """Tell whether anything in this process may be limited: a budget may stand on whatever is called, deep inside."""
    return bool(_made)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A ceiling that ClevAgent never lets its scope pass.

    Give at least one limit. Several limits in one budget hold independently. Everything else narrows what is covered or
    says what happens at the ceiling.

    Raises:
        UsageError: no limit; a limit that is zero, negative, not finite or no number; an unknown window or action.

    """

    usd: float | str | Decimal | None = None
    """US dollars."""
    tokens: int | None = None
    """Input and output tokens together."""
    input_tokens: int | None = None
    """Input tokens, cached ones included."""
    output_tokens: int | None = None
    """Output tokens, reasoning included."""
    llm_calls: int | None = None
    """Model calls; every attempt counts."""
    tool_calls: int | None = None
    """Tool calls."""
    seconds: float | None = None
    """A deadline: seconds from the start of the run, after which no call is sent. Only with ``per="run"``."""
    baseline_multiple: float | None = None
    """A ceiling in US dollars by the agent's own past: so many times what its runs usually cost (median of the last hundred; at least
    $0.05). While fewer than ten are known there is none. Only with ``per="run"``."""
    per: Per = "run"
    """The window after which it starts from zero: ``run``, ``thread`` (a conversation), ``hour``, ``day``, ``month`` (UTC), or
    ``lifetime`` (never; with a memory ledger, the process)."""
    node: str | None = None
    """Only what is called in this node, agent or task, at any depth (``*`` and ``?`` match; ``researcher/model`` is a node in a node)."""
    tool: str | None = None
    """Only calls of this tool, and what is called inside it (``*`` and ``?`` match)."""
    model: str | None = None
    """Only calls of this model (``*`` and ``?`` match)."""
    by: str | None = None
    """A tag of the run: one ceiling for each of its values. Runs without the tag share one."""
    on_exceed: OnExceed = "raise"
    """What happens to the call that would pass the ceiling: ``warn`` lets it go and tells; ``raise`` raises
    ``BudgetExceeded`` out of the user's call; a callable gets the incident, and the call is checked once more afterwards
    (it may have topped up), or let go if it returns ``"warn"``. ``halt`` and ``ask`` are for what can end gracefully: a guarded
    graph returns its state so far (``ask``: with ``__interrupt__``, to be resumed), a guarded crew the tasks that are finished
    (``halt``). ``alert_only`` and ``stop`` are accepted for the first two."""
    warn_at: float = 0.8
    """The share of the ceiling whose spending is told, once, as a warning; above 0, at most 1."""
    keep_usd: float | str | Decimal = 0
    """US dollars of the ceiling that only calls inside ``run.wrap_up()`` may use: a closing answer after the stop."""
    name: str | None = None
    """What it is called in messages and in the ledger; made from its limits and scope when not given."""

    def __post_init__(self) -> None:
        """Check every field, so that a mistake is told where it was written."""
        if not self.limits() and self.seconds is None and self.baseline_multiple is None:
            raise UsageError(
                "Budget() has no limit, so it would never stop anything. "
                f"Give at least one of {', '.join((*UNITS, 'seconds', 'baseline_multiple'))}, for example Budget(usd=0.50)."
            )
        if self.per not in get_args(Per):
            raise UsageError(
                f"Budget(per={self.per!r}) names no window that exists, so it could not be told when to start from zero. Use one of {', '.join(map(repr, get_args(Per)))}."
            )
        self._check_of_run()
        object.__setattr__(self, "on_exceed", check_action(self.on_exceed, where="Budget(on_exceed="))
        if isinstance(self.warn_at, bool) or not isinstance(self.warn_at, (int, float)) or not 0 < self.warn_at <= 1:
            raise UsageError(
                f"Budget(warn_at={self.warn_at!r}) is not a share of the ceiling, so nothing could be told at it. Give a number above 0 and at most 1, such as 0.8."
            )
        if self.keep and (self.usd is None or self.keep >= to_pico(self.usd, what="usd")):
            raise UsageError(
                f"Budget(keep_usd={self.keep_usd!r}, usd={self.usd!r}) keeps nothing for the work itself: what is kept is part of "
                "the ceiling. Give a usd= that is larger than keep_usd=."
            )
        for scope in ("node", "tool", "model", "by", "name"):
            value = getattr(self, scope)
            if value is not None and (not isinstance(value, str) or not value):
                raise UsageError(f"Budget({scope}={value!r}) names nothing. Give a non-empty string, or leave {scope} out.")
        if self.name is None:
            object.__setattr__(self, "name", self._describe())
        _made[:] = [True]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Come from another process."""
        self.__dict__.update(state)
        _made[:] = [True]

    def _check_of_run(self) -> None:
        for name, least, example in (("seconds", 0, "seconds=600"), ("baseline_multiple", 1, "baseline_multiple=5")):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least < value <= _MOST:
                raise UsageError(
                    f"Budget({name}={value!r}) is no limit, so nothing could be compared with it. Give a number above {least} and up to "
                    f"{_MOST:,}, for example Budget({example})."
                )
            if self.per != "run":
                raise UsageError(
                    f"Budget({name}={value!r}, per={self.per!r}) cannot be: {name} is counted for each run, from its start to its end. Leave per= "
                    "out, and give what holds for longer a budget of its own."
                )
        if self.baseline_multiple is not None and (self.usd is not None or self.by is not None):
            raise UsageError(
                f"Budget(baseline_multiple={self.baseline_multiple!r}) cannot be given with {'usd=' if self.usd is not None else 'by='}: it is a "
                "ceiling in US dollars itself, of each run. Give two budgets; both hold."
            )

    @property
    def label(self) -> str:
        """The budget's name (never ``None`` once it is made)."""
        return self.name or ""

    @property
    def keep(self) -> int:
        """``keep_usd`` in pico-USD."""
        return to_pico(self.keep_usd, what="keep_usd")

    def limits(self) -> tuple[tuple[int, int], ...]:
        """The limits as (unit, ceiling) pairs: an index into ``UNITS``, and pico-USD, tokens or calls."""
        return tuple(
            (index, _ceiling(unit, value)) for index, unit in enumerate(UNITS) if (value := getattr(self, unit)) is not None
        )

    def warn_mark(self, ceiling: int) -> int:
        """The spending from which on ``ceiling`` is told to be close, exact for any ceiling."""
        # As the decimal number that it prints as: of 10, 0.8 is 8, not the 9 that the float just above it would make.
        return math.ceil(Fraction(str(self.warn_at)) * ceiling)

    def covers(self, call: Call) -> bool:
        """Tell whether ``call`` counts against this budget."""
        if self.node is not None and not _is_in(self.node, call.node):
            return False
        if isinstance(call, LLMCall):
            return (self.model is None or matches(self.model, call.model)) and (self.tool is None or _is_in(self.tool, call.tool))
        return self.model is None and (self.tool is None or _is_in(self.tool, call.tool) or _is_in(self.tool, call.inside))

    def key(self, *, run_id: str, thread_id: str | None, tags: Mapping[str, str]) -> str:
        """Whose account it is: the run's or the thread's where the window is one, and the tag's value where ``by`` is given."""
        parts = []
        if self.per == "run":
            parts.append(run_id)
        elif self.per == "thread":
            parts.append(thread_id or tags.get("thread_id") or run_id)
        if self.by is not None:
            parts.append(f"{self.by}={tags.get(self.by, '')}")
        return " ".join(parts) or "all"

    def _describe(self) -> str:
        limits = " ".join(
            # As plain numbers: 5, 5.0 and "5.00" are one ceiling, and so have one name.
            f"${Decimal(str(self.usd)).normalize():f}" if unit == USD else f"{ceiling} {UNITS[unit]}"
            for unit, ceiling in self.limits()
        )
        more = [f"{self.seconds:g} s"] if self.seconds is not None else []
        more += [f"{self.baseline_multiple:g} x baseline"] if self.baseline_multiple is not None else []
        limits = " ".join(filter(None, (limits, *more)))
        scope = "".join(f" {word}={getattr(self, word)}" for word in ("node", "tool", "model", "by") if getattr(self, word))
        return f"{limits} per {self.per}{scope}"


class Window(NamedTuple):
    """One period of a budget."""

    label: str
    """Its name in the ledger, for example ``2026-11-23``; empty for windows that no calendar ends."""
    ends_at: float
    """When it is over, in seconds since 1970 (UTC); infinity for windows that no calendar ends."""


def window_at(per: Per, wall: float) -> Window:
    """Find the window of kind ``per`` that ``wall`` (seconds since 1970) lies in. Windows are aligned to UTC."""
    if per in {"run", "thread", "lifetime"}:
        return Window("", math.inf)
    now = datetime.fromtimestamp(wall, UTC).replace(minute=0, second=0, microsecond=0)
    if per == "hour":
        return Window(now.strftime("%Y-%m-%dT%H"), (now + timedelta(hours=1)).timestamp())
    midnight = now.replace(hour=0)
    if per == "day":
        return Window(midnight.strftime("%Y-%m-%d"), (midnight + timedelta(days=1)).timestamp())
    first = midnight.replace(day=1)
    return Window(first.strftime("%Y-%m"), (first + timedelta(days=32)).replace(day=1).timestamp())


def check_action(action: object, *, where: str) -> OnExceed:
    """Take what happens at a ceiling as it was given; the published names are turned into ours.

    Raises:
        UsageError: no such action, or one that nothing would wait for.

    """
    known = ACTION_NAMES.get(action, action) if isinstance(action, str) else action
    if known not in get_args(Action) and not callable(known):
        raise UsageError(
            f"{where}{action!r}) is no action, so nothing would happen at the ceiling. Use 'raise', 'warn', or a callable that gets the "
            "incident; for a graph also 'halt' or 'ask', for a crew 'halt'."
        )
    if is_async(known):
        raise UsageError(
            f"{where}{action!r}) is an async function, and nothing would wait for it: calls are checked in sync code "
            "too. Give a plain function; it may schedule what has to be awaited."
        )
    return cast("OnExceed", known)


def is_async(action: object) -> bool:
    """Tell whether calling ``action`` would give something that has to be awaited."""
    return iscoroutinefunction(action) or iscoroutinefunction(getattr(action, "__call__", None))  # noqa: B004 - its type is asked for


def as_budgets(value: object) -> tuple[Budget, ...]:
    """Take a list of budgets as it was given.

    Raises:
        UsageError: it is no list, or two of them cannot stand together.

    """
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        raise UsageError(
            f"budgets={value!r} is no list, so it is not clear what is limited. Write budgets=[clevagent.Budget(usd=0.50)]."
        )
    budgets = tuple(value)
    check_names(budgets)
    return budgets


def check_names(budgets: tuple[Budget, ...]) -> None:
    """Refuse two budgets that share a name but not what they mean: one account cannot have two ceilings.

    Raises:
        UsageError: two of them have one name and differ, or one is no budget.

    """
    seen: dict[str, Budget] = {}
    for budget in budgets:
        if not isinstance(budget, Budget):
            raise UsageError(
                f"budgets=[{budget!r}] is no Budget, so nothing would be limited by it. Write budgets=[clevagent.Budget(usd=0.50)]."
            )
        other = seen.setdefault(budget.label, budget)
        if other != budget:
            differ = [f.name for f in fields(Budget) if getattr(other, f.name) != getattr(budget, f.name)]
            raise UsageError(
                f"Two budgets are named {budget.label!r} but differ in {', '.join(differ)} "
                f"({', '.join(f'{name}={getattr(other, name)!r} and {getattr(budget, name)!r}' for name in differ)}). "
                "One account cannot have two ceilings: give them different names, or make them equal."
            )


def check_actions(budgets: Iterable[Budget], *, where: str, can: tuple[str, ...] = ()) -> None:
    """Refuse budgets that ask for an end which what they are given to cannot bring about.

    Args:
        budgets: what was given.
        where: to what, as the user wrote it, for the message.
        can: which of ``halt`` and ``ask`` it is able to do.

    Raises:
        UsageError: an action that it cannot carry out.

    """
    for budget in budgets:
        action = budget.on_exceed
        if action in ("halt", "ask") and action not in can:  # no set: a callable need not be hashable
            raise UsageError(
                f"Budget({budget.label!r}, on_exceed={action!r}) was given to {where}, which cannot {GRACEFUL[str(action)]}, so "
                "nothing was set. Use on_exceed='raise' there and catch clevagent.BudgetExceeded around the agent (keep_usd= and "
                "run.wrap_up() pay for a closing answer); or give the budget to what can: clevagent.guard(graph, budgets=[...]) for "
                "'halt' and 'ask', clevagent.guard(crew, budgets=[...]) for 'halt'; create_agent has BudgetMiddleware(on_exceed='halt')."
            )


def _ceiling(unit: Unit, value: object) -> int:
    if unit == "usd":
        pico = to_pico(value, what="usd")  # type: ignore[arg-type]  # to_pico refuses what is no number
        if pico == 0:
            raise UsageError(
                f"Budget(usd={value!r}) comes to nothing (money is counted down to $0.000000000001), which would refuse every call. "
                "Give a positive number of US dollars, or leave usd out for no limit in money."
            )
        return pico
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise UsageError(
            f"Budget({unit}={value!r}) is a {type(value).__name__}, not a count, so nothing could be compared with it. "
            "Give a positive whole number."
        )
    if value <= 0 or not value <= MAX_PICO or value != math.floor(value):  # so written, NaN is refused
        raise UsageError(
            f"Budget({unit}={value!r}) is not a ceiling: a ceiling is a positive whole number, of at most 64 bits. "
            f"Give one, or leave {unit} out for no limit."
        )
    return int(value)  # type: ignore[call-overload, no-any-return]  # every whole Real has an int


def matches(pattern: str, name: str) -> bool:
    """Tell whether ``pattern`` (``*`` and ``?`` match) means ``name``."""
    return pattern == name or fnmatchcase(name, pattern)


def _is_in(pattern: str, name: str | None) -> bool:
    """Tell whether ``pattern`` means what is called ``name``, or anything around it."""
    if name is None:
        return False
    return matches(pattern, name) or (isinstance(name, Path) and any(matches(pattern, part) for part in name.parts))
