"""A ticket: the permission to make one call, and the duty to tell what became of it."""

from __future__ import annotations

import functools
import logging
import math
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from clevagent_core.calls import Call, LLMCall, Step, UnusableUsage, Usage
from clevagent_core.frames import Activity, Frame, current_task
from clevagent_core.interrupts import is_interrupt
from clevagent_core.verdicts import Incident

if TYPE_CHECKING:
    from clevagent_core.pricing import Rates
    from clevagent_core.runs import Run

logger = logging.getLogger("clevagent")

_NO_USAGE = Usage()


@functools.lru_cache(maxsize=1024)
def plain_step(kind: Literal["llm_call", "tool_call", "ping"], name: str) -> Step:
    """Give the step that tells nothing but its name."""
    # The same for every call of one model or tool: making one costs as much as settling in the ledger.
    return Step(kind=kind, name=name)


class Reservation(Protocol):
    """What a guard holds for one call. Exactly one of its methods ends it; ``settle`` may also correct an earlier ``charge``.

    The same one may be called a second time after a signal handler has raised in it, and then only does what is still to be done.
    """

    max_output_tokens: int | None
    """The output limit that was reserved for, where the caller clamps; else ``None``."""

    def settle(self, usage: Usage | None, cost_pico: int | None) -> int | None:
        """The call ended. Without usage it costs its upper bound; returns that bound in pico-USD where it is known."""
        ...

    def release(self) -> None:
        """The call was not sent."""
        ...

    def charge(self) -> int | None:
        """The call may have been sent, and nobody can tell what it cost: it costs its upper bound, which is returned."""
        ...


class Outcome(NamedTuple):
    """What became of a call."""

    status: Literal["settled", "released", "charged"]
    """``settled`` to its usage, ``released`` because it was not sent, ``charged`` its upper bound because it may have been."""
    usage: Usage | None
    """What the provider reported, where it did."""
    cost_pico: int | None
    """What it cost in pico-USD; ``None`` where no price is known."""
    error: BaseException | None = None
    """Why it failed."""
    result: object = None
    """What came back, where the adapter tells it: a tool's result, a model's answer (text, and the tools it asks for)."""


class Work(Activity):
    """A piece of work that goes on and is no call itself: a node, a task. See ``Run.begin``."""

    __slots__ = ("moved_at", "task", "thread")

    timeout_s: float | None = None
    """How long it may take, in seconds; ``None``: nobody knows."""

    def __init__(self, run: Run, name: str, place: tuple[str, ...] | None = None) -> None:
        """Made by ``Run`` only."""
        # As Activity does, without the call: every node comes here.
        self.kind = "node"
        self.name = name
        self.place = place
        self.is_over = False
        self.thread = threading.get_ident()
        self.moved_at = run.watchdog.clock.monotonic()
        self.task = current_task()


class Wait(Work):
    """A call that waits to be let through: for money that others hold, or for a pause to end."""

    __slots__ = ()

    timeout_s = math.inf


class Ticket:
    """The permission to make one call, and the duty to tell what became of it.

    Safe from any thread, and idempotent: the first of ``settle``, ``release``, ``fail`` and ``charge`` counts; only a later
    ``settle`` still corrects a call that was charged because nothing had been heard of it.
    """

    __slots__ = (
        "_charged_cost",
        "_is_charge_counted",
        "_reservations",
        "_status",
        "call",
        "frame",
        "max_output_tokens",
        "moved_at",
        "rates",
        "run",
        "task",
        "thread",
        "wraps_up",
    )

    def __init__(self, run: Run, call: Call, rates: Rates | None, reservations: list[Reservation]) -> None:
        """Made by ``Run.open`` only."""
        self.run = run
        self.call = call
        self.thread = threading.get_ident()
        """The thread that opened it."""
        self.moved_at = run.watchdog.clock.monotonic()
        """When it was opened, or last heard of, in monotonic seconds."""
        self.task = current_task()
        """The asyncio task that opened it, held weakly; ``None`` outside of one."""
        self.rates = rates
        self.max_output_tokens: int | None = call.max_output_tokens if isinstance(call, LLMCall) else None
        """The output limit to send with the request: what was asked for, or what is left of it."""
        self.wraps_up = False
        """Whether it may use what budgets keep back."""
        self.frame: Frame | None = None
        """The frame in which it covers what is sent."""
        self._reservations = reservations
        self._status: Literal["open", "settled", "released", "charged"] = "open"
        self._charged_cost: int | None = None
        self._is_charge_counted = False

    @property
    def name(self) -> str:
        """The model's or the tool's name."""
        call = self.call
        return call.model if isinstance(call, LLMCall) else call.tool

    @property
    def timeout_s(self) -> float | None:
        """After how many seconds whoever makes the call gives it up, where that is known."""
        return self.call.timeout_s

    @property
    def is_open(self) -> bool:
        """Whether nobody has told yet what became of the call."""
        return self._status == "open"

    @property
    def is_held(self) -> bool:
        """Whether a guard holds something for the call; where none does, its usage may still come in after its run."""
        return bool(self._reservations)

    @property
    def is_clamped(self) -> bool:
        """Whether the output limit was lowered to what is left."""
        call = self.call
        if not isinstance(call, LLMCall) or call.max_output_tokens is None or self.max_output_tokens is None:
            return False
        return self.max_output_tokens < call.max_output_tokens

    def settle(self, usage: Usage | None = None, *, error: BaseException | None = None, result: object = None) -> None:
        """Tell that the call ended, and what came back. Without ``usage`` a model call costs its upper bound."""
        call = self.call
        if usage is None:
            if isinstance(call, LLMCall):
                self.charge(error, result=result)
                return
            usage = _NO_USAGE
        before = self._status
        if before == "settled":
            return
        rates, run = self.rates, self.run
        cost = rates.cost(usage) if rates is not None else None
        is_counted = False
        try:
            if not self._end("settled"):
                return
            _settle_all(self._reservations, usage, cost)
            is_counted = True
            run.count(call, usage, cost, clamped=self.max_output_tokens is not None and self.is_clamped)
        except BaseException:  # a signal handler's: the call is over all the same, and nothing of it stays held
            if self._status == "settled":
                self.run.root.open_work.pop(self, None)
                _end_all(self._reservations, "settle", usage, cost)
                if not is_counted:
                    run.count(call, usage, cost, clamped=self.is_clamped)
            raise
        outcome = Outcome("settled", usage, cost, error, result)
        # run.hooks(), without the call where the run has no guards of its own.
        hooks = run.watchdog.plugins.bound_hooks if run.guards is None else run.hooks()
        for observer in hooks.call_settled:
            try:
                observer(run, call, outcome)
            except Exception as raised:  # whose code: a plugin's; observers fail open
                if is_interrupt(raised):
                    raise
                logger.exception("An observer of settled calls failed and was passed over.")
        if hooks.step:
            run.tell_step(
                hooks, plain_step("llm_call", call.model) if isinstance(call, LLMCall) else plain_step("tool_call", call.tool)
            )

    def settle_by(self, usage_of: Callable[..., Usage | None], answer_of: Callable[..., object] | None, *response: object) -> None:
        """Settle to the usage that is read from ``response``; to the upper bound where there is none, or reading fails.

        ``usage_of`` may raise :class:`UnusableUsage`, which is told.
        """
        usage = result = None
        try:
            if answer_of is not None:
                result = answer_of(*response)
            usage = usage_of(*response)
        except UnusableUsage as problem:
            self.tell_unusable(problem)
        except Exception as error:  # whose code: ours, in the user's agent; the call is over, so its bound is charged
            if is_interrupt(error):
                self.charge(error, result=result)
                raise
            logger.exception("ClevAgent could not read what a call used; it is charged its upper bound.")
        self.settle(usage, result=result)

    def tell_unusable(self, problem: UnusableUsage) -> None:
        """Tell that a provider's report cannot be true, and that the call is charged its upper bound."""
        run = self.run
        run.watchdog.tell(
            Incident(
                kind="usage",
                message=(
                    f"The provider of {self.name!r} reported usage that cannot be a token count ({problem}), so the call is charged its "
                    "upper bound. What is spent may be told too high; it is never told too low."
                ),
                agent=run.watchdog.settings.agent,
                run_id=run.run_id,
                at=run.watchdog.clock.wall(),
            )
        )

    def release(self, error: BaseException | None = None) -> None:
        """Tell that the call was not sent, or was refused by the provider unbilled: what it held is given back."""
        try:
            if not self._end("released"):
                return
            release_all(self._reservations)
        except BaseException:  # a signal handler's: nothing was sent all the same
            if self._status == "released":
                self.run.root.open_work.pop(self, None)
                _end_all(self._reservations, "release")
            raise
        self._tell_failed(Outcome("released", None, 0, error))

    def charge(self, error: BaseException | None = None, *, result: object = None) -> None:
        """Tell that the call may have been sent and that its usage is unknown: it costs its upper bound."""
        try:
            if not self._end("charged"):
                return
            cost = self._count_charge(_charge_all(self._reservations))
        except BaseException:  # a signal handler's: the call may have been sent all the same
            if self._status == "charged":
                self.run.root.open_work.pop(self, None)
                self._count_charge(_end_all(self._reservations, "charge"))
            raise
        if self._status != "charged":
            return  # its usage came in while it was being charged
        self._tell_failed(Outcome("charged", None, cost, error, result))

    def _count_charge(self, bounds: list[int | None]) -> int | None:
        """Count what the call was charged, once."""
        told = [bound for bound in bounds if bound is not None]
        cost = max(told) if told else self._upper_bound()
        with _ticket_lock:
            # Its usage may have come in while it was being charged.
            if self._status != "charged" or self._is_charge_counted:
                return cost
            self._charged_cost = cost
            self._is_charge_counted = True
        self.run.count(self.call, _NO_USAGE, cost, charged=True, clamped=self.is_clamped)
        return cost

    def _upper_bound(self) -> int | None:
        """Work out what the call can cost at most, which nobody has where no budget covers it."""
        call, rates, watchdog = self.call, self.rates, self.run.watchdog
        if rates is None or not isinstance(call, LLMCall):
            return None
        tokens = watchdog.plugins.bound(call)
        if tokens is None:
            tokens = (call.context_window or rates.context_window or 0) * call.rounds
        limit = self.max_output_tokens
        output = (watchdog.settings.assume_output_tokens if limit is None else limit) * call.answers
        return rates.upper_bound(tokens, output, audio=call.audio or call.opaque, writes_cache=call.writes_cache)

    def touch(self) -> None:
        """Tell that something of the answer has come in, and more is to follow: a stream that flows is not stalled."""
        self.moved_at = self.run.watchdog.clock.monotonic()

    def fail(self, error: BaseException, *, sent: bool) -> None:
        """Tell that the call failed: ``release`` unless it may have been sent and billed, else ``charge``."""
        if sent:
            self.charge(error)
        else:
            self.release(error)

    def _end(self, status: Literal["settled", "released", "charged"]) -> bool:
        with _ticket_lock:
            before = self._status
            if before != "open" and not (before == "charged" and status == "settled"):
                return False
            self._status = status
            was_counted, self._is_charge_counted = self._is_charge_counted, False
        if self.frame is not None:
            self.frame.is_over = True
        self.run.root.open_work.pop(self, None)
        if was_counted:
            run = self.run
            run.count(self.call, _NO_USAGE, self._charged_cost, sign=-1, charged=True, clamped=self.is_clamped)
        return True

    def _tell_failed(self, outcome: Outcome) -> None:
        for observer in self.run.hooks().call_failed:
            try:
                observer(self.run, self.call, outcome)
            except Exception as error:  # whose code: a plugin's; observers fail open
                if is_interrupt(error):
                    raise
                logger.exception("An observer of failed calls failed and was passed over.")


_ticket_lock = threading.RLock()
"""Guards a few instructions of every ticket; a lock for each would cost more than waiting for this one."""


def _after_fork_in_child() -> None:
    global _ticket_lock  # noqa: PLW0603 - the parent may have held it
    _ticket_lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork_in_child)


def _settle_all(reservations: list[Reservation], usage: Usage, cost_pico: int | None) -> None:
    for reservation in reservations:
        try:
            reservation.settle(usage, cost_pico)
        except Exception as error:  # whose code: a guard's; the next one still gets its money back
            if is_interrupt(error):
                raise
            logger.exception("A reservation failed to settle and was passed over.")


def _charge_all(reservations: list[Reservation]) -> list[int | None]:
    bounds: list[int | None] = []
    for reservation in reservations:
        try:
            bounds.append(reservation.charge())
        except Exception as error:  # whose code: a guard's; the next one is still charged
            if is_interrupt(error):
                raise
            logger.exception("A reservation failed to charge and was passed over.")
    return bounds


def release_all(reservations: list[Reservation]) -> None:
    """Give back what guards hold for a call that is not sent."""
    for reservation in reservations:
        try:
            reservation.release()
        except Exception as error:  # whose code: a guard's; the next one is still released
            if is_interrupt(error):
                raise
            logger.exception("A reservation failed to be released and was passed over.")


def release_interrupted(reservations: list[Reservation]) -> None:
    """Do what ``release_all`` does on the way of a signal handler's exception, which goes on afterwards."""
    _end_all(reservations, "release")


def _end_all(reservations: list[Reservation], how: str, *given: object) -> list[int | None]:
    """End every reservation after an interruption, also those that may have been ended before it: for a second time nothing happens."""
    answers: list[int | None] = []
    for reservation in reservations:
        try:
            answers.append(getattr(reservation, how)(*given))
        except Exception:  # whose code: a guard's; what interrupted the call goes on afterwards
            logger.exception("A reservation failed to end and was passed over.")
    return answers
