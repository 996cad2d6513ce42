"""Whose a call is that no frame claims: a thread that inherits none, a task that outlives its run, the consumer of a generator.

In this order. A task or thread that was begun in a run with budgets, and outlives it, is refused: it must not become free. The code
that steps a generator is outside of the run that is open in it. Else nobody knows: it counts in the only run that is active, or in
the one around all that are; where there is none, and what is active has budgets, it is refused (``unattributed="refuse"``).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence

from clevagent_core.frames import Look, Outlived, blocks_of, has_budgets, look
from clevagent_core.runs import Run
from clevagent_core.verdicts import Incident

_WAYS_OUT = (
    "Say whose it is: `with run.activate():` around the call, `@clevagent.run(...)` on a generator that makes it, or "
    "`with clevagent.outside_runs():` if it belongs to no run."
)


def run_of_call(process: Run, active: Mapping[Run, bool], *, tells: bool = True) -> Run:
    """Find the run that a call made here belongs to; one that refuses every call, where that must not be guessed.

    Args:
        process: the run of what is called outside of every run.
        active: the runs that code may belong to which nobody has told of one, each with whether it is a block of the user's.
        tells: whether somebody is told what cannot be known; not where this is no call.

    """
    found = look(process.watchdog)
    if found.frame is not None:
        run: Run = found.frame.run
        return run
    candidates = _candidates(process, found, list(active))
    if isinstance(candidates, Run):
        return candidates
    run_around = around_all(candidates)
    if run_around is not None or not candidates:
        return run_around or process
    return refusing(process, candidates) or _told(process, candidates, tells=tells)


def known_run(process: Run) -> Run | None:
    """Find the run of code that no frame claims, where that is known; ``None`` where it is anybody's."""
    candidates = _candidates(process, look(process.watchdog), [])
    if isinstance(candidates, Run):
        return candidates
    return process if _knows_by_context() and not candidates else None


def run_around_work(process: Run, active: Mapping[Run, bool]) -> Run | None:
    """Find the run that a piece of work which begins here (a root invocation, a kickoff) is a part of; ``None`` if of none.

    As for a call, but that of all runs only the blocks of the user's are asked: other work beside it is none that it is a part of.
    """
    found = look(process.watchdog)
    if found.frame is not None:
        run: Run = found.frame.run
        return run
    candidates = _candidates(process, found, [run for run, is_block in active.items() if is_block])
    if isinstance(candidates, Run):
        return None if candidates is process else candidates
    return around_all(candidates) or (refusing(process, candidates) if candidates else None)


def refusing(process: Run, candidates: Sequence[Run]) -> Run | None:
    """Give the run that refuses a call which may belong to any of several; ``None`` where it may go."""
    if process.watchdog.settings.unattributed != "refuse" or not any(map(has_budgets, candidates)):
        return None
    message = (
        f"A call was refused before it was sent: it was made in a thread or task that inherits no run, while {len(candidates)} runs are "
        f"active, and nobody can tell whose budgets it counts against. {_WAYS_OUT} clevagent.init(unattributed='process') lets such "
        "calls go, against the budgets of the process only."
    )
    return process.barred_by(_incident(process, "unattributed", message, "raise"))


def around_all(runs: Sequence[Run]) -> Run | None:
    """Find the innermost run that all of ``runs`` are, or are nested in; where they are nested in each other, the innermost of them."""
    deepest = max(runs, key=_depth, default=None)
    if deepest is None or all(other in deepest.chain() for other in runs):
        return deepest
    # Several at once: the run around all of them, if there is one, counts for certain.
    return next((run for run in deepest.chain() if all(run in other.chain() for other in runs)), None)


def _depth(run: Run) -> int:
    return sum(1 for _ in run.chain())


def _candidates(process: Run, found: Look, active: list[Run]) -> Run | list[Run]:
    """Give whose it is, where that is known, else whose it may be."""
    if found.outlived is not None:
        return _outlived(process, found.outlived) if found.outlived.has_budgets else process
    if found.is_outside:
        return process
    # A task inherits the run that it is begun in; but not from a generator that is stepped by several.
    return blocks_of(process.watchdog, of_task=_is_in_loop()) if _knows_by_context() else active


def _knows_by_context() -> bool:
    """Tell whether the context tells of every run that this code is begun in: a task's does, and what one hands to a thread of these."""
    return _is_in_loop() or type(threading.current_thread()).__module__.startswith(("anyio.", "asgiref."))


def _is_in_loop() -> bool:
    asyncio = sys.modules.get("asyncio")
    running_loop = getattr(asyncio, "_get_running_loop", None)  # documented; the public one raises
    return running_loop is not None and running_loop() is not None


def _outlived(process: Run, run: Outlived) -> Run:
    message = (
        f"A call was refused before it was sent: the thread or task that makes it was begun in the run {run.run_id}, which had budgets "
        f"and is over, so nothing would limit what it spends. Wait for it inside the run's block; or give it a run of its own, "
        "`with clevagent.run(...):`, or none, `with clevagent.outside_runs():`."
    )
    return process.barred_by(_incident(process, "run_over", message, "raise"))


def _told(process: Run, candidates: Sequence[Run], *, tells: bool) -> Run:
    if tells:
        message = (
            f"A call was made in a thread or task that inherits no run, while {len(candidates)} runs are active: it cannot be told whose "
            f"it is, so it counts only against the budgets of the process. {_WAYS_OUT} (Told once.)"
        )
        process.watchdog.tell_once(_incident(process, "thread", message, "warn"), key="")
    return process


def _incident(process: Run, kind: str, message: str, action: str) -> Incident:
    watchdog = process.watchdog
    details: dict[str, object] = {"reason": kind} if action == "raise" else {}
    return Incident(
        kind=kind,
        message=message,
        agent=watchdog.settings.agent,
        run_id=process.run_id,
        at=watchdog.clock.wall(),
        action=action,
        details=details,
    )
