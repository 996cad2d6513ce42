"""START HERE: every hook, in the order in which it fires.

    configure -> run_started -> [ before_call -> reserve -> (the call) -> call_settled | call_failed ]*  step*  beat*  incident*
              -> run_ended -> unconfigure

and, asked whenever they are needed, the providers: guard, attach, attachable, price, bound, ledger.

A plugin is any object whose methods carry ``@hookimpl``; every built-in of ClevAgent is one. Three kinds of hooks:

- *guards* (``before_call``, ``reserve``) answer. They never raise on purpose: ``Run`` turns a ``Stop`` into the exception.
- *observers* (``call_settled``, ``call_failed``, ``step``, ``beat``, ``incident``, ``run_started``, ``run_ended``) are told. They are
  called one by one; one that raises is reported in the log and silences nobody else.
- *providers* (``guard``, ``attach``, ``price``, ``bound``, ``ledger``) are asked in turn, third parties first, until one answers
  something other than ``None``.

*Hot* hooks (``before_call``, ``reserve``, ``call_settled``, ``call_failed``, ``step``, ``bound``) are bound once into plain calls whenever
the set of plugins changes. They must take all arguments of the specification, in its order, and cannot be wrappers; this is
checked when the plugin is registered. Of the others, only ``guard``, ``attach`` and ``ledger`` can be wrapped. No hook is an
``async def``: nothing would wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from clevagent_core.budgets import Budget, OnExceed
    from clevagent_core.calls import Call, LLMCall, Step
    from clevagent_core.clock import Clock
    from clevagent_core.ledger.account import Ledger
    from clevagent_core.pricing import Rates
    from clevagent_core.runs import Run
    from clevagent_core.summaries import RunSummary
    from clevagent_core.tickets import Outcome, Reservation, Ticket
    from clevagent_core.verdicts import Incident, Verdict
    from clevagent_core.watchdog import Watchdog
    from clevagent_wire.beats import Beat

PROJECT = "clevagent"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

HOT_HOOKS = (
    "clevagent_before_call",
    "clevagent_reserve",
    "clevagent_call_settled",
    "clevagent_call_failed",
    "clevagent_step",
    "clevagent_bound",
)


@hookspec
def clevagent_configure(watchdog: Watchdog) -> None:
    """Fires once, when a watchdog has its settings and its plugins, before its first run. The answer is ignored.

    A plugin that raises here is broken: the error leaves ``init`` as ``PluginError``.
    """


@hookspec
def clevagent_run_started(run: Run) -> None:
    """Fires when a run begins, on the thread that begins it. The answer is ignored; raising is logged, and the run goes on."""


@hookspec
def clevagent_before_call(run: Run, call: Call) -> Verdict:
    """Check a call that is about to be made. Hot; on the caller's thread; must not block and must hold nothing.

    ``None`` lets it pass, ``Warn`` lets it pass and tells observers, ``Stop`` refuses it; the first ``Stop`` ends the asking.
    A guard that raises is a bug of the guard: it counts as ``Stop`` if the plugin has ``fails_closed = True``, else it passes;
    either way observers are told.
    """
    raise AssertionError  # pragma: no cover - a specification is never called


@hookspec
def clevagent_reserve(run: Run, ticket: Ticket, extra: Sequence[Budget]) -> Reservation | Verdict:
    """Hold what ``ticket.call`` could cost. Hot; on the caller's thread; fires only when every check has passed.

    ``extra`` are the budgets of the guarded object. ``None`` means nothing to hold, ``Stop`` refuses the call, and a
    ``Reservation`` is settled, released or charged later, once. If a later plugin answers ``Stop``, what the earlier ones hold
    is released. A plugin that raises is treated as in ``clevagent_before_call``.
    """
    raise AssertionError  # pragma: no cover - a specification is never called


@hookspec
def clevagent_call_settled(run: Run, call: Call, outcome: Outcome) -> None:
    """Fires when a call has ended and its cost is in the ledger. Hot; on the thread that settled it; raising is logged."""


@hookspec
def clevagent_call_failed(run: Run, call: Call, outcome: Outcome) -> None:
    """Fires when a call failed, was cancelled, or was never heard of again; ``outcome.status`` tells whether it was charged.

    Hot; on the thread that found out; raising is logged.
    """


@hookspec
def clevagent_step(run: Run, step: Step) -> None:
    """Fires for each sign of progress (a finished call, a ``ping()``). Hot; on the thread that made it; raising is logged."""


@hookspec
def clevagent_beat(beat: Beat) -> None:
    """Fires for each heartbeat, every ``interval`` seconds and when there is something to tell at once; also without a monitor.

    On the thread of the watchdog's timers, one beat at a time: it must not block. The answer is ignored; raising is logged.
    """


@hookspec
def clevagent_incident(incident: Incident) -> None:
    """Fires when something is wrong, after the verdict stands, on a thread of ClevAgent's own: it may block.

    The answer is ignored; raising is logged. What is still waiting when the process ends is told until the flush deadline.
    """


@hookspec
def clevagent_run_ended(run: Run, summary: RunSummary) -> None:
    """Fires when a run is over and everything it held is settled. The answer is ignored; raising is logged."""


@hookspec
def clevagent_unconfigure(watchdog: Watchdog) -> None:
    """Fires once, when the watchdog shuts down. The answer is ignored; raising is logged."""


@hookspec(firstresult=True)
def clevagent_guard(obj: object, watchdog: Watchdog | None, budgets: Sequence[Budget], on_exceed: OnExceed | None) -> object | None:
    """Wrap ``obj`` so that its calls are checked before they are sent. Fires for ``clevagent.guard(obj)``.

    ``None`` means "not mine": the next plugin is asked. ``watchdog`` is ``None`` for the process's own (looked up at each call).
    ``on_exceed`` is what was given to ``guard``, already put into ``budgets``: a framework that can end gracefully (``halt``,
    ``ask``) does so for every budget that stops it; what cannot refuses it (``check_actions``). What it raises leaves ``guard``.
    """


@hookspec(firstresult=True)
def clevagent_attach(name: str, watchdog: Watchdog) -> bool | None:
    """Attach to the whole framework ``name`` (for example ``langchain``). Fires for ``init(attach=[...])``.

    ``None`` means "not mine"; ``True`` that it is attached until ``clevagent_unconfigure``. What it raises leaves ``init``.
    """


@hookspec
def clevagent_attachable() -> Mapping[str, str]:
    """Name what ``clevagent_attach`` can attach to, each with the module whose import tells that it is in use.

    Asked for ``init(attach="auto")``, and by ``clevagent plugins``, which lists a plugin as not installed if none of the modules can be
    found. Imports nothing. Raising is logged, and the plugin passed over.
    """
    raise AssertionError  # pragma: no cover - a specification is never called


@hookspec(firstresult=True)
def clevagent_price(model: str, provider: str | None, service_tier: str | None) -> Rates | None:
    """Give the rates of a model as they are now. Asked once per model until the answer's ``valid_until``.

    ``None`` means "unknown to me". Raising counts as unknown, so that a budget in USD refuses the call.
    """


@hookspec(firstresult=True)
def clevagent_bound(call: LLMCall) -> int | None:
    """Bound the input tokens of a call: a number that the provider's own count never passes.

    ``None`` means "cannot tell": the call then counts as the model's whole context window. Raising counts as ``None``.
    """


@hookspec(firstresult=True)
def clevagent_ledger(url: str, clock: Clock, agent: str) -> Ledger | None:
    """Open the ledger that ``init(ledger=url)`` names (``memory``, ``sqlite:///path``), for the agent of that name.

    ``None`` means "not mine"; what it raises leaves ``init``.
    """
