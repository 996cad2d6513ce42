"""What is being done in a context: one kickoff of a crew, an agent or a flow, with its run, its budgets and its latch."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from clevagent_core.attribution import refusing
from clevagent_core.budgets import Budget
from clevagent_core.errors import Stopped
from clevagent_core.frames import Activity, Frame, activities_here, current_task, enter, frame_of, leave, spot, wraps_up
from clevagent_core.verdicts import Incident

if TYPE_CHECKING:
    from clevagent_core.runs import Run
    from clevagent_core.watchdog import Watchdog


class Work(Activity):
    """One kickoff. Safe to use from any thread.

    Contexts carry it: CrewAI copies the caller's context into every thread and task of its own; it is carried to threads of the user's
    as a run is. In a thread that was there before, a model that is known to belong to one kickoff that goes on counts as called in it.
    """

    __slots__ = (
        "_frame", "_lock", "_models", "_owns_run", "_spot", "_tasks", "_tools", "budgets", "latest_tool", "obj", "outer", "refusal",
        "run", "watchdog",
    )  # fmt: skip

    def __init__(
        self, obj: object, watchdog: Watchdog, budgets: Sequence[Budget], run: Run | None, models: Sequence[object]
    ) -> None:
        """Begin it; a run, too, unless ``run`` is the one it is a part of."""
        super().__init__("work")
        self.obj = obj
        """What was kicked off."""
        self.watchdog = watchdog
        self.outer: Work | None = None
        """The one around it in this context."""
        self._spot = spot()
        self._frame: Frame | None = None
        self.refusal: Stopped | None = None
        """The latch: what this kickoff was stopped with. Every later call in it is refused with the same."""
        self._owns_run = run is None
        self.budgets: tuple[Budget, ...] = tuple(budgets) if run is not None else ()
        """Those that no run of its own holds: they count from the outermost run on."""
        # Raw threads do not inherit it: of two kickoffs at once, one would become a part of the other.
        self.run = run or watchdog.start_run(budgets=budgets, parent=run_around(watchdog), inherited=False)
        self.run.root.sees_tools = True
        self._tasks: dict[tuple[str, str], Run] = {}
        self._models = {id(model) for model in models}
        self._lock = threading.RLock()
        self._tools = 0
        self.latest_tool = 0
        """Which of all tools of the process the latest of its own was; 0 while none of them runs."""

    def tool_begins(self) -> None:
        """Take note that a tool runs in it."""
        with self._lock:
            self._tools += 1
            self.latest_tool = next(_tools)

    def tool_ended(self) -> None:
        """Take note that a tool of it has ended."""
        with self._lock:
            self._tools -= 1
            if not self._tools:
                self.latest_tool = 0

    def __enter__(self) -> None:
        """Make it the innermost one of this context."""
        self.outer = next(works(), None)
        self._frame = enter(self.watchdog, self.run, self, begins=True)
        with _lock:
            _going_on.append(self)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        """End it, and its run: what is still in flight is charged."""
        if error is not None and self.refusal is None:
            self.refusal = error if isinstance(error, Stopped) else self._ended(error)
        with _lock:
            _going_on.remove(self)
        if self._frame is not None:
            leave(self._frame)
        if not self._owns_run:
            return
        for run in self._tasks.values():
            run.end()
        self.run.end()

    @property
    def is_left_behind(self) -> bool:
        """Whether it is over, and this is the code that kicked it off: no part of it any more, as a thread of its own is."""
        return self.is_over and self._spot == spot()

    def latch(self, refusal: Stopped) -> None:
        """Stop the whole kickoff: CrewAI tells the model that a tool, or a coworker, has failed, and goes on.

        An agent that works in a crew's kickoff stops that one.
        """
        if self.refusal is None:
            self.refusal = refusal
        if not self._owns_run and self.outer is not None:
            self.outer.latch(refusal)

    def check(self) -> None:
        """Refuse a call of a kickoff that was stopped, or that is over.

        Raises:
            Stopped: it was.

        """
        refusal = self.refusal
        if refusal is not None and not wraps_up(self.watchdog):
            raise type(refusal)(refusal.incident)

    def run_of(self, run: Run, role: str | None, task: str | None) -> Run:
        """Find the run that a call made in a task counts against: one inside ``run`` where the task has budgets of its own."""
        if task is None or not self._owns_run or run in self._tasks.values():
            return run
        own = task_budgets(self.run.budgets, role, task)
        if not own:
            return run
        key = run.run_id, task
        with self._lock:
            found = self._tasks.get(key)
            if found is None:
                self.run.met.update(budget.label for budget in own)
                found = self._tasks[key] = self.watchdog.start_run(budgets=own, parent=run, inherited=False)
            return found

    def budgets_for(self, role: str | None, task: str | None) -> tuple[Budget, ...]:
        """Give the budgets of an agent that is a part of another's run."""
        if task is None or all(budget.node is None for budget in self.budgets):
            return self.budgets
        own = task_budgets(self.budgets, role, task)
        return (*(budget for budget in self.budgets if budget.node is None or matches(budget.node, role)), *own)

    def _ended(self, error: BaseException) -> Stopped:
        return Stopped(
            Incident(
                kind="ended",
                message=(
                    f"This kickoff has ended ({type(error).__name__}), and a thread that it left behind wanted to call a model: nobody would "
                    "hear the answer, so it was refused before it was sent. Kick off again."
                ),
                agent=self.watchdog.settings.agent,
                run_id=self.run.run_id,
                at=self.watchdog.clock.wall(),
                action="raise",
            )
        )


def run_around(watchdog: Watchdog) -> Run | None:
    """Find the run that a kickoff is a part of; in a raw thread, the block around all that is active in the process."""
    return watchdog.enclosing_run()


def task_budgets(budgets: Sequence[Budget], role: str | None, task: str) -> tuple[Budget, ...]:
    """Give the budgets whose ``node`` means the task, as what every call in it counts against."""
    return tuple(
        replace(budget, node=None)
        for budget in budgets
        if budget.node is not None and matches(budget.node, task) and not matches(budget.node, role)
    )


def matches(pattern: str, name: str | None) -> bool:
    """Tell whether ``Budget(node=pattern)`` means ``name``."""
    return name is not None and (pattern == name or fnmatchcase(name, pattern))


_lock = threading.RLock()
_going_on: list[Work] = []
_tools = itertools.count(1)


def works(model: object | None = None) -> Iterator[Work]:
    """Give the kickoffs around this context, innermost first; in a thread outside of all, those that a call of ``model`` belongs to.

    Raises:
        BudgetExceeded: it may belong to several.

    """
    found = [work for work in activities_here("work") if isinstance(work, Work) and not work.is_left_behind]
    if not found and model is not None and _going_on and current_task() is None:
        with _lock:
            going_on = list(_going_on)
        # Of a flow's models nobody knows.
        found = _chain(_whose([work for work in going_on if id(model) in work._models or not work._models]))  # noqa: SLF001 - the same module
    yield from found


def _whose(known: Sequence[Work]) -> Work | None:
    """Find the kickoff that a raw thread's call belongs to: of those around the run that is active there, else of all."""
    outer = [_chain(work) for work in known]
    leaves = [work for work in known if not any(work in chain[1:] for chain in outer)]
    leaves = [work for work in leaves if _is_active(work)] or leaves
    if not leaves:
        return None
    found = _around_all(leaves)
    if found is not None:
        return found
    process: Run = leaves[0].watchdog.process_run
    refused = refusing(process, [work.run for work in leaves])
    if refused is not None and refused.barred is not None:
        raise refused.refused(refused.barred)
    return _latest(leaves)


def _is_active(work: Work) -> bool:
    """Tell whether the run of this context is one of the kickoff's, or around it."""
    frame = frame_of(work.watchdog)
    return frame is not None and (work.run in frame.run.chain() or frame.run in work.run.chain())


def _around_all(leaves: Sequence[Work]) -> Work | None:
    """Find the innermost kickoff that all of these are, or are a part of."""
    first, *others = (_chain(work) for work in leaves)
    return next((work for work in first if all(work in chain for chain in others)), None)


def _latest(leaves: Sequence[Work]) -> Work:
    """Find the one that began a tool last; those that run none have begun no thread that anybody knows of."""
    found = max(leaves, key=lambda work: work.latest_tool)
    if sum(work.latest_tool > 0 for work in leaves) != 1:
        found.watchdog.tell_once(_ambiguous(found, len(leaves)), key="kickoffs")
    return found


def _ambiguous(work: Work, count: int) -> Incident:
    watchdog = work.watchdog
    return Incident(
        kind="thread",
        message=(
            f"A model was called in a thread that inherits no kickoff, while {count} kickoffs that use it go on: it cannot be told "
            "whose the call is, so it counts as called in the one that began a tool last. Open `with run.activate():` in the thread, "
            "with the tool's run (clevagent.init() gives a watchdog, and its current_run() is that), or start the thread with "
            "contextvars.copy_context().run. (Told once.)"
        ),
        agent=watchdog.settings.agent,
        run_id=work.run.run_id,
        at=watchdog.clock.wall(),
    )


def _chain(work: Work | None) -> list[Work]:
    chain = []
    while work is not None:
        chain.append(work)
        work = work.outer
    return chain


def is_inside(obj: object) -> bool:
    """Tell whether this context is a part of a kickoff of ``obj``: entry points call each other."""
    return any(work.obj is obj and not work.is_over for work in works())


def is_watched_by(watchdog: Watchdog) -> bool:
    """Tell whether a kickoff around this context has a run of ``watchdog``."""
    return any(work.watchdog is watchdog for work in works())
