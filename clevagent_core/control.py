"""What the monitor asks of the agent: stop, pause, resume, and ceilings that only ever tighten what the code set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from clevagent_core.budgets import UNITS, Budget
from clevagent_core.errors import UsageError
from clevagent_core.ledger.account import Changes
from clevagent_core.verdicts import Incident, Stop
from clevagent_wire.commands import COMMANDS, Command

if TYPE_CHECKING:
    from clevagent_core.ledger.account import AccountKey
    from clevagent_core.runs import Run
    from clevagent_core.watchdog import Watchdog

logger = logging.getLogger("clevagent")

_REMEMBERED = 1000
"""How many commands are known by their id, so that one that is repeated is carried out once."""
_BUDGET_FIELDS = frozenset(spec.name for spec in fields(Budget)) - {"on_exceed"}


@dataclass(frozen=True, kw_only=True)
class Tighter(Budget):
    """A ceiling from outside for a budget of the code's: of the same scope, beside it."""

    of: Budget
    """The budget that it tightens."""


class Control:
    """What was asked for from outside, as it stands. Safe to read and to change from any thread."""

    def __init__(self, watchdog: Watchdog) -> None:
        """Nothing was asked for yet."""
        self._watchdog = watchdog
        self.stops: dict[str | None, Stop] = {}
        """What holds now, by run (``None``: for all of them); replaced whole, so that calls read it without a lock."""
        self._seen: dict[str, Mapping[str, str]] = {}
        self._given: list[object] = []
        self.changes = Changes()
        """Wakes the calls that wait for a pause to end."""
        self.budgets: tuple[Budget, ...] = ()
        """The ceilings that were set from outside; replaced whole."""
        self.carried: set[AccountKey] = set()
        """The accounts of such ceilings that know what was spent before."""
        self._tighter: dict[tuple[int, int], Tighter] = {}

    def gate(self, run: Run) -> Stop | None:
        """Tell why nothing more is begun in a run. What is only paused may begin: its calls wait."""
        stop = self.verdict(run) if self.stops else None
        return stop if stop is not None and stop.incident.kind == "remote" else None

    def verdict(self, run: Run) -> Stop | None:
        """Tell why a call of ``run`` is not sent now."""
        stops = self.stops
        if not stops:
            return None
        found = stops.get(None)
        if found is not None:
            return found
        return next((stops[one.run_id] for one in run.chain() if one.run_id in stops), None)

    def tighter(self, budget: Budget) -> Tighter | None:
        """Give the ceiling that was set from outside for a budget of the code's, with its name."""
        ceiling = next((ceiling for ceiling in self.budgets if ceiling.label == budget.label), None)
        if ceiling is None:
            return None
        # By identity: what a budget calls at its ceiling need not be hashable.
        key = id(budget), id(ceiling)
        found = self._tighter.get(key)
        if found is None or found.of is not budget:
            limits = {unit: getattr(ceiling, unit) for unit in UNITS}
            words = " ".join(f"{unit}={value}" for unit, value in limits.items() if value is not None)
            scope = {
                spec.name: getattr(budget, spec.name) for spec in fields(Budget) if spec.name not in (*UNITS, "baseline_multiple")
            }
            # The amount is in the name: another one is another account, which begins anew with what was spent.
            scope |= {"seconds": ceiling.seconds, "name": f"{budget.label} (set by the monitor: {words})", "keep_usd": 0}
            found = self._tighter[key] = Tighter(**limits, **scope, of=budget)
        return found

    def apply(self, answer: Mapping[str, Any], report: Callable[[str, Mapping[str, Any]], None]) -> None:
        """Carry out what an answer of the monitor asks for; ``report`` tells it, by the command's id, what became of it.

        What cannot be understood is reported as failed, or logged, and changes nothing. Does not raise.
        """
        if "budgets" in answer:
            self._set_budgets(answer["budgets"])
        if "baselines" in answer:
            self._watchdog.baselines.tell(answer["baselines"])
        commands = answer.get("commands")
        for given in commands if isinstance(commands, list) else ():
            if not isinstance(given, Mapping) or not isinstance(given.get("id"), str):
                logger.warning("The monitor sent a command that has no id, so it was not carried out: %.200r", given)
                continue
            result = self._seen.get(given["id"])
            if result is None:
                result = self._carry_out(given)
                if len(self._seen) >= _REMEMBERED:
                    del self._seen[next(iter(self._seen))]
                self._seen[given["id"]] = result
            report(given["id"], result)

    def close(self) -> None:
        """The watchdog shuts down: what waits for a pause to end is refused."""
        self.stops = {run_id: Stop(incident=replace(stop.incident, kind="remote")) for run_id, stop in self.stops.items()}
        self.changes.notify()

    def _carry_out(self, given: Mapping[str, Any]) -> Mapping[str, str]:
        name: Any = given.get("command")
        run_id = given.get("run_id")
        if name not in COMMANDS or not (run_id is None or isinstance(run_id, str)):
            message = (
                f"command={name!r} with run_id={run_id!r} is not known here, so nothing was done. Known are: pause, resume, stop."
            )
            logger.warning("The monitor sent a command that could not be carried out: %s", message)
            return {"status": "failed", "message": message}
        command = Command(
            id=given["id"], command=name, by=str(given.get("by") or ""), reason=str(given.get("reason") or ""), run_id=run_id
        )
        if name == "resume":
            self.stops = {} if run_id is None else {key: stop for key, stop in self.stops.items() if key != run_id}
            logger.warning("The agent was resumed%s.", _who(command))
        else:
            stop = self._stop(command, "remote" if name == "stop" else "paused")
            self.stops = {**self.stops, run_id: stop}
            self._watchdog.tell(stop.incident)
        self.changes.notify()
        return {"status": "done", "message": ""}

    def _stop(self, command: Command, kind: str) -> Stop:
        what = "stopped" if kind == "remote" else "paused"
        whose = f"The run {command.run_id}" if command.run_id is not None else "This agent"
        means = "No call is sent" if kind == "remote" else "Its calls wait (code that cannot wait is refused)"
        watchdog = self._watchdog
        return Stop(
            incident=Incident(
                kind=kind,
                message=f"{whose} was {what}{_who(command)}. {means} until it is resumed on the monitor, or started anew.",
                agent=watchdog.settings.agent,
                run_id=command.run_id or watchdog.process_run.run_id,
                at=watchdog.clock.wall(),
                action="raise",
                details={"by": command.by, "reason": command.reason, "command_id": command.id, "command": command.command},
            )
        )

    def _set_budgets(self, given: object) -> None:
        if given == self._given or not isinstance(given, (list, tuple)):
            return
        self._given = list(given)
        budgets = []
        for item in given:
            try:
                budgets.append(_budget(item))
            except (UsageError, TypeError, OverflowError) as error:
                # What cannot be understood tightens nothing; the rest does.
                logger.warning("The monitor set a ceiling that cannot be used, and it was left out: %.200r (%s)", item, error)
        self._tighter.clear()
        self.budgets = tuple(budgets)
        self.changes.notify()


def _budget(item: object) -> Budget:
    if not isinstance(item, Mapping):
        raise UsageError("it is no object")
    return Budget(**{name: value for name, value in item.items() if name in _BUDGET_FIELDS and value is not None})


def _who(command: Command) -> str:
    return (f" by {command.by}" if command.by else " through the monitor") + (
        f": {command.reason.rstrip('.')}" if command.reason else ""
    )
