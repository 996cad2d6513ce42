"""Settings: argument > environment ``CLEVAGENT_*`` > default, resolved once into a frozen dataclass."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast, get_args

from clevagent_core.budgets import ACTION_NAMES, Budget, check_actions, check_names, is_async
from clevagent_core.errors import UsageError
from clevagent_core.pricing import Price
from clevagent_core.verdicts import Incident

ENV_PREFIX = "CLEVAGENT_"
_AUTO_ATTACH = "auto_attach"
"""A flag in the environment that says what ``attach="auto"`` says in code."""

Estimate = Literal["upper", "expected"]
UnknownPrice = Literal["refuse", "allow"]
Unattributed = Literal["refuse", "process"]
OnCostExceeded = Literal["warn", "raise"] | Callable[[Incident], object]
OnLoop = Literal["warn", "raise"] | Callable[[Incident], object]
OnStall = Literal["warn", "exit"] | Callable[[Incident], object]
CAPTURES = ("exception_messages",)
"""What ``capture`` can ask for."""


def _setting(
    default: Any,
    read: Callable[[str], Any] | None = None,
    *,
    factory: Callable[[], Any] | None = None,
    repr: bool = True,  # noqa: A002 - as field's
) -> Any:
    metadata = {"read": read}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata, repr=repr)
    return field(default=default, metadata=metadata, repr=repr)


def _read_flag(text: str) -> bool:
    if text.lower() in {"1", "true", "yes", "on"}:
        return True
    if text.lower() in {"", "0", "false", "no", "off"}:
        return False
    raise ValueError("is neither on (1, true, yes, on) nor off (0, false, no, off)")


def _read_names(text: str) -> tuple[str, ...]:
    return tuple(name for name in re.split(r"[,\s]+", text) if name)


def _read_count(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("is no whole number") from None


def _read_seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("is no number of seconds") from None


def _read_stall_after(text: str) -> float | dict[str, float]:
    if "=" not in text:
        return _read_seconds(text)
    return {name: _read_seconds(value) for name, _, value in (pair.rpartition("=") for pair in text.split())}


_TEXTS = frozenset({"per", "node", "tool", "model", "by", "on_exceed", "name"})
"""The fields of a budget that stay text even where they look like numbers."""


def _read_budgets(text: str) -> tuple[Budget, ...]:
    budgets = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        words: dict[str, Any] = {}
        for pair in part.split():
            name, equals, value = pair.partition("=")
            known = {spec.name for spec in fields(Budget)}
            if not equals or name not in known:
                raise ValueError(f"has {pair!r}, which is not one of {', '.join(sorted(known))} followed by = and a value")
            is_number = name not in _TEXTS and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", value, re.IGNORECASE)
            words[name] = float(value) if is_number else value
        budgets.append(Budget(**words))
    return tuple(budgets)


def check_on_cost_exceeded(action: object) -> OnCostExceeded:
    """Take an action for every ceiling as it was given; the published names are turned into ours.

    Raises:
        UsageError: no such action, or one that belongs to a budget of a graph or a crew.

    """
    known = ACTION_NAMES.get(action, action) if isinstance(action, str) else action
    if known not in ("warn", "raise") and not callable(known):
        raise UsageError(
            f"on_cost_exceeded={action!r} is no action for every ceiling of a process, so nothing was set. Use 'warn' (or 'alert_only'), "
            "'raise' (or 'stop'), or a callable that gets the incident; a graceful end belongs to a framework: "
            "clevagent.guard(graph, budgets=[...], on_exceed='halt')."
        )
    if is_async(known):
        raise UsageError(
            f"on_cost_exceeded={action!r} is an async function, and nothing would wait for it: calls are checked in sync code too. Give "
            "a plain function; it may schedule what has to be awaited."
        )
    return cast("OnCostExceeded", known)


def check_on_stall(action: object) -> OnStall:
    """Take an action for stalls as it was given; the published ``alert_only`` is turned into ours.

    Raises:
        UsageError: no such action, or one that nothing would wait for.

    """
    known = "warn" if action == "alert_only" else action
    if known not in ("warn", "exit") and not callable(known):
        raise UsageError(
            f"on_stall={action!r} is no action, so nothing would happen when a run is stalled. Use 'warn', 'exit' (ends the process, for a "
            "supervisor to start it again), or a callable that gets the incident. A thread that is stuck cannot be made to raise."
        )
    if is_async(known):
        raise UsageError(
            f"on_stall={action!r} is an async function, and nothing would wait for it: what is stuck may be its event loop. Give a plain "
            "function."
        )
    return cast("OnStall", known)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that can be set. Each field is also the environment variable ``CLEVAGENT_`` + its name in capitals."""

    agent: str = _setting("agent", str)
    """What is watched, as people know it; stands in every incident and summary."""
    budgets: tuple[Budget, ...] = _setting((), _read_budgets)
    """Ceilings for all of the process's work. In the environment: ``usd=5 per=day; llm_calls=100``."""
    prices: Mapping[str, Price] = _setting(None, factory=dict)
    """Prices of your own, by model name; they go before the price list. Not in the environment."""
    ledger: str = _setting("memory", str)
    """Where accounts are kept. ``memory``: in the process. ``sqlite:///path`` or a path: in a file, which all processes of a machine
    share and which outlives them."""
    attach: tuple[str, ...] = _setting((), _read_names)
    """Frameworks to attach to as a whole, without a change to the code that uses them: ``langchain``, ``crewai``, ``openai``,
    ``anthropic``; or ``auto``: each of them that is, or later gets, imported. ``CLEVAGENT_AUTO_ATTACH=1`` means the last."""
    auto_cost: bool | None = _setting(None, _read_flag)
    """Whether the clients of ``openai`` and ``anthropic`` are attached to when they are imported. ``None``: where ``api_key`` is given,
    as programs written for the hosted service expect."""
    plugins: tuple[object, ...] = _setting(())
    """Plugins of your own, beside those that are installed. Not in the environment."""
    block: tuple[str, ...] = _setting((), _read_names)
    """Plugins to leave out, by the names that ``clevagent plugins`` lists; built-in ones too."""
    on_loop: OnLoop = _setting("warn", lambda text: check_on_loop(text, where="on_loop="))
    """What happens when a run repeats itself: ``warn`` tells; ``raise`` refuses every later call of the run with ``LoopDetected``; a
    callable gets the incident, and the run goes on if it returns ``"warn"``. ``alert_only`` and ``stop`` are accepted for the first
    two."""
    on_cost_exceeded: OnCostExceeded | None = _setting(None, check_on_cost_exceeded)
    """What happens at every ceiling, whatever its budget says in ``on_exceed``: ``warn``, ``raise`` or a callable, also as ``alert_only``
    and ``stop``. ``None``: what each budget says, which is ``raise`` where it says nothing."""
    api_key: str | None = _setting(None, str, repr=False)
    """The key for the monitor at ``endpoint``."""
    endpoint: str | None = _setting(None, str)
    """Where the monitor is, as a URL."""
    interval: float = _setting(30.0, _read_seconds)
    """Seconds between two heartbeats."""
    spool: str | None = _setting(None, str)
    """The file that keeps heartbeats while the monitor cannot be reached; ``off`` keeps none. ``None``: one for each agent, in
    ``$XDG_STATE_HOME/clevagent`` (``~/.local/state/clevagent``). Written only where ``endpoint`` is set."""
    capture: tuple[str, ...] = _setting((), _read_names)
    """What may leave the process beside the listed fields of a heartbeat: ``exception_messages``, the text of an exception that ended the
    process or a thread. It may quote prompts and answers."""
    stall_after: float | Mapping[str, float] = _setting(120.0, _read_stall_after)
    """After how many seconds without a step a run is stalled. By node or tool as a mapping, with ``*`` for all others:
    ``{"*": 120, "crawl": 900}``; in the environment ``*=120 crawl=900``."""
    on_stall: OnStall = _setting("warn", check_on_stall)
    """What happens when a run is stalled: ``warn`` tells; ``exit`` tells and ends the process with status 75, so that a supervisor
    starts it again; a callable gets the incident, on a thread of ClevAgent's own."""
    dry_run: bool = _setting(default=False, read=_read_flag)
    """Work everything out and tell it, but stop nothing."""
    estimate: Estimate = _setting("upper", str)
    """``upper`` reserves what a call can cost at most, and the ceiling holds; ``expected`` reserves what such calls usually
    cost, and the ceiling can be passed by what they cost more."""
    assume_output_tokens: int = _setting(4096, _read_count)
    """What a call without an output limit is taken to write at most, where no limit can be sent with it."""
    wait_s: float = _setting(30.0, _read_seconds)
    """How many seconds a call may wait for money that calls in flight hold; 0 never waits."""
    hold_s: float = _setting(900.0, _read_seconds)
    """After how many seconds a call that nobody has heard of again is charged its upper bound."""
    flush_s: float = _setting(2.0, _read_seconds)
    """How many seconds ``shutdown`` may take to tell observers what they have not heard yet."""
    unknown_price: UnknownPrice = _setting("refuse", str)
    """What happens to a model without a price under a budget in US dollars: ``refuse``, or ``allow`` it as costing 0."""
    unattributed: Unattributed = _setting("refuse", str)
    """What happens to a call of which nobody can tell whose it is, while several runs with budgets are active: ``refuse``, or count it
    for the ``process`` only, so that it may pass their ceilings."""

    @classmethod
    def resolve(cls, arguments: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Settings:
        """Put arguments, environment and defaults together.

        Args:
            arguments: by field name; ``None`` counts as not given.
            environment: ``os.environ`` when ``None``.

        Raises:
            UsageError: an unknown name (the nearest known one is told), or a value that cannot be what it is given for.

        """
        specs = {spec.name: spec for spec in fields(cls)}
        values = _from_environment(os.environ if environment is None else environment)
        for name, value in arguments.items():
            if name not in specs:
                raise UsageError(_unknown(name, list(specs), "setting"))
            if value is not None:
                values[name] = tuple(value) if isinstance(value, list) else value
        if values.get("attach") == "auto":
            values["attach"] = ("auto",)
        if "on_cost_exceeded" in values:
            values["on_cost_exceeded"] = check_on_cost_exceeded(values["on_cost_exceeded"])
        if "on_loop" in values:
            values["on_loop"] = check_on_loop(values["on_loop"], where="on_loop=")
        if "on_stall" in values:
            values["on_stall"] = check_on_stall(values["on_stall"])
        if isinstance(values.get("spool"), os.PathLike):
            values["spool"] = os.fspath(values["spool"])
        if isinstance(values.get("ledger"), os.PathLike):
            values["ledger"] = os.path.join(".", values["ledger"])  # noqa: PTH118 - a path, also where it looks like a word
        settings = cls(**values)
        settings._check()
        return settings

    def _check(self) -> None:
        for name, kind in (("budgets", "Budget"), ("attach", "str"), ("capture", "str"), ("block", "str"), ("plugins", "object")):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise UsageError(f"{name}={value!r} is not a list. Write {name}=[...] with {kind} items.")
        for name, example in (("agent", "agent='research'"), ("ledger", "ledger='memory' or ledger='sqlite:///ledger.db'")):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise UsageError(f"{name}={value!r} names nothing. Give a name, for example {example}.")
        check_names(self.budgets)
        check_actions(self.budgets, where="init(budgets=[...])")
        if not isinstance(self.dry_run, bool):
            raise UsageError(
                f"dry_run={self.dry_run!r} is neither True nor False; taken as true, it would stop nothing. Write dry_run=True or dry_run=False."
            )
        self._check_monitor()
        self._check_stalls()
        self._check_prices()
        for name, kind_of in (("estimate", Estimate), ("unknown_price", UnknownPrice), ("unattributed", Unattributed)):
            value, allowed = getattr(self, name), get_args(kind_of)
            if value not in allowed:
                raise UsageError(f"{name}={value!r} is not known. Use {' or '.join(map(repr, allowed))}.")
        for name, least in (("wait_s", 0), ("hold_s", 1), ("flush_s", 0), ("interval", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < least:
                raise UsageError(
                    f"{name}={value!r} is no number of seconds, so no deadline could be set by it. Give a number of at least {least}."
                )
        tokens = self.assume_output_tokens
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            raise UsageError(
                f"assume_output_tokens={tokens!r} is no number of tokens, so no call could be priced by it. Give a whole number of at least 1."
            )

    def _check_monitor(self) -> None:
        if self.auto_cost is not None and not isinstance(self.auto_cost, bool):
            raise UsageError(
                f"auto_cost={self.auto_cost!r} is neither True nor False, so it is not clear whether raw clients are to be attached to. "
                "Write auto_cost=True or auto_cost=False."
            )
        for name in ("api_key", "endpoint", "spool"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value.strip()):
                is_secret = name == "api_key" and not isinstance(value, str)
                shown = f"api_key, a {type(value).__name__}," if is_secret else f"{name}={value!r}"
                raise UsageError(f"{shown} is no text, so the monitor could not be reached with it. Give it, or leave it out.")
        if self.api_key is not None:
            # Keys that come out of a file end with its newline.
            object.__setattr__(self, "api_key", self.api_key.strip())
            if not re.fullmatch(r"[!-~]+", self.api_key):
                raise UsageError(
                    "api_key has characters that cannot be sent in a header: spaces, control characters, or letters outside of ASCII (it is "
                    "not shown here). Give the key as the monitor shows it."
                )
        if self.endpoint is not None and not _is_address(self.endpoint):
            raise UsageError(
                f"endpoint={re.sub('//.*@', '//...@', self.endpoint)!r} is no address, so no heartbeat could be sent there. Write it with its scheme, "
                "without a user's name, query or fragment, for example endpoint='https://monitor.example.com'."
            )

    def _check_stalls(self) -> None:
        given = self.stall_after
        table = given if isinstance(given, Mapping) else {"*": given}
        for name, seconds in table.items():
            is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
            if not isinstance(name, str) or not is_number or not math.isfinite(seconds) or seconds < 1:
                raise UsageError(
                    f"stall_after={given!r} gives {name!r} no number of seconds of at least 1, so nobody could tell when it is stalled. Write "
                    "stall_after=120, or by node and tool stall_after={'*': 120, 'crawl': 900}."
                )
        unknown = [name for name in self.capture if name not in CAPTURES]
        if unknown:
            raise UsageError(
                f"capture={self.capture!r} asks for what is not known, so nothing more was captured. Known: capture={list(CAPTURES)!r}."
            )

    def _check_prices(self) -> None:
        if not isinstance(self.prices, Mapping):
            raise UsageError(
                f"prices={self.prices!r} is no mapping of model names to prices. "
                "Write prices={'my-model': clevagent.Price(input=2.50, output=10)} (US dollars per million tokens)."
            )
        for model, price in self.prices.items():
            if not isinstance(price, Price):
                raise UsageError(
                    f"prices={{{model!r}: {price!r}}} is no Price, so its calls could not be priced. Write prices={{{model!r}: clevagent.Price(input=2.50, output=10)}} "
                    "(US dollars per million tokens)."
                )


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    readers = {spec.name: spec.metadata["read"] for spec in fields(Settings) if spec.metadata["read"] is not None}
    values: dict[str, Any] = {}
    for variable, text in environment.items():
        if not variable.startswith(ENV_PREFIX):
            continue
        name = variable.removeprefix(ENV_PREFIX).lower()
        read = _read_flag if name == _AUTO_ATTACH else readers.get(name)
        if read is None:
            known = [ENV_PREFIX + known.upper() for known in (*readers, _AUTO_ATTACH)]
            raise UsageError(_unknown(variable, known, "environment variable"))
        try:
            values[name] = read(text)
        except ValueError as error:
            raise UsageError(
                f"The environment variable {variable}={text!r} cannot be used: it {error}. Correct it, or unset it."
            ) from error
        except UsageError as error:
            raise UsageError(f"The environment variable {variable}={text!r} cannot be used: {error}") from error
    if values.pop(_AUTO_ATTACH, False):
        values.setdefault("attach", ("auto",))
    return values


def check_on_loop(on_loop: object, *, where: str) -> OnLoop:
    """Take an action for loops as it was given; the published names are turned into ours.

    Raises:
        UsageError: no such action, or one that nothing here can carry out.

    """
    action = ACTION_NAMES.get(on_loop, on_loop) if isinstance(on_loop, str) else on_loop
    close = ")" if "(" in where else ""
    if action in ("halt", "ask"):
        raise UsageError(
            f"{where}{on_loop!r}{close} needs an attachment that can end a framework's work gracefully, which this is not, so nothing "
            "was set. Use 'raise' and catch clevagent.LoopDetected around the agent; for an agent of create_agent, "
            "BudgetMiddleware(on_loop='halt') ends it gracefully."
        )
    if action not in ("warn", "raise") and not callable(action):
        raise UsageError(
            f"{where}{on_loop!r}{close} is no action, so nothing would happen when a run repeats itself. Use 'warn', 'raise', or a "
            "callable that gets the incident."
        )
    if is_async(action):
        raise UsageError(
            f"{where}{on_loop!r}{close} is an async function, and nothing would wait for it: calls are checked in sync code too. Give "
            "a plain function; it may schedule what has to be awaited."
        )
    return cast("OnLoop", action)


def _unknown(name: str, known: Sequence[str], what: str) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return f"{name!r} is no {what} of ClevAgent, so nothing would come of it. {hint}Known are: {', '.join(sorted(known))}."


def _is_address(text: str) -> bool:
    """Tell whether requests can be sent there. One with a password in it is none: it would stand in logs."""
    from urllib.parse import urlsplit  # noqa: PLC0415 - only where a monitor is named

    try:
        parts = urlsplit(text)
        _ = parts.port  # read, so that it is checked
    except ValueError:
        return False
    is_plain = not (parts.query or parts.fragment or "@" in parts.netloc) and re.search(r"[\s\x00-\x1f]", text) is None
    return parts.scheme in {"http", "https"} and bool(parts.hostname) and is_plain
