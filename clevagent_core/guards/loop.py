"""The loop guard: finds that a run repeats itself and nothing new comes of it, and stops it before the money does.

It looks at what came back, not only at what was asked: the same call with a new result is progress. Tools and models are watched
apart, because a model that asks for a tool and the tool that answers would count one round twice. What is *new* in the input of a
model is what stands behind the history that it was sent before; so a loop shows however long the history grows, and an
instruction that is mapped over a thousand documents shows none.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from clevagent_core.bounds import key_of
from clevagent_core.calls import Call, LLMCall, Step
from clevagent_core.frames import wraps_up
from clevagent_core.guards.fingerprints import arguments_of, message_of, result_of
from clevagent_core.guards.messages import Mark, as_told, loop_incident, ping_incident
from clevagent_core.guards.repetition import SAME_FAILURE, Finding, Repetition, Sign
from clevagent_core.hookspecs import hookimpl
from clevagent_core.interrupts import is_interrupt
from clevagent_core.settings import OnLoop, check_on_loop
from clevagent_core.verdicts import Incident, Stop

if TYPE_CHECKING:
    from clevagent_core.runs import Run
    from clevagent_core.tickets import Outcome
    from clevagent_core.watchdog import Watchdog

logger = logging.getLogger("clevagent")

PINGS = 50
PINGS_WITHIN_S = 30.0
"""So many identical pings in so many seconds, with no call between them, are a loop in which nothing is done."""
_MARKS = 512
"""For how many of the latest calls it is known when they ended and what the run had cost by then."""
_CONVERSATIONS = 64
"""In how many nodes or threads the conversations of a run are followed at once."""
_HEADS = 8
"""How many heads of conversations are kept for each."""
_LOOKED_INTO = 4
"""How many of the last messages are looked into where a history is not known from the call before."""
_TAIL = 64
"""How many characters are compared before a long text is."""

_lock = threading.RLock()
"""Held for a microsecond or two after each call. One for all runs, as for tickets: after a fork it is made anew."""


def _after_fork_in_child() -> None:
    global _lock  # noqa: PLW0603 - the parent may have held it
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork_in_child)


Head = tuple[int, int, int, int, int]
"""How far a conversation had come, as the history of its next call begins: ``(length, mark, size, tail, number)``.

``length`` is its number of messages, ``mark`` the fingerprint of the last one. Where it was one text, as a scratchpad that grows,
``size`` is its number of characters and ``tail`` the fingerprint of its end, which is compared first. ``number`` says which
conversation of the run it is. A plain tuple, because one is made for every call.
"""


class _Stream:
    """The calls of one kind (tools, or models) of one run tree."""

    __slots__ = ("are_failures_told", "is_told", "marks", "repetition")

    def __init__(self) -> None:
        self.repetition = Repetition()
        self.marks: deque[Mark] = deque(maxlen=_MARKS)
        self.is_told = False
        """Whether the loop that goes on was told; what is only warned of is told once, until something new comes."""
        self.are_failures_told = False
        """The same of failures in the same words: until none is counted, as those between in other words take back one each."""

    def forget(self) -> None:
        self.repetition.reset()
        self.is_told = self.are_failures_told = False

    def observe(self, sign: Sign, started: int) -> Finding | None:
        """Take in a call; give a loop that is not told yet."""
        finding = self.repetition.observe(sign, started=started)
        if not self.repetition.failures:
            self.are_failures_told = False
        if finding is None:
            self.is_told = False
            return None
        if finding.rule == SAME_FAILURE:
            was_told, self.are_failures_told = self.are_failures_told, True
        else:
            was_told, self.is_told = self.is_told, True
        return None if was_told else finding

    def mark_of(self, step: int) -> Mark:
        """Find what was known when the call ``step`` had ended, or as near to it as is still known."""
        return self.marks[max(0, step - self.marks[0].step)]


class _Watch:
    """What the guard has seen of one run tree."""

    __slots__ = (
        "begun",
        "conversations",
        "forgiven",
        "found",
        "is_ping_told",
        "is_told",
        "llm",
        "nodes",
        "ping",
        "pings",
        "stop",
        "tools",
    )

    def __init__(self, forgiven: int) -> None:
        self.forgiven = forgiven
        self.conversations: dict[Hashable, tuple[Head, ...]] = {}
        """By model, node and thread; the latest first. Replaced whole: calls side by side may at most miss each other's."""
        self.begun = 0
        """How many conversations have begun."""
        self.tools, self.llm, self.nodes = _Stream(), _Stream(), _Stream()
        self.forget()

    def forget(self) -> None:
        self.tools.forget()
        self.llm.forget()
        self.nodes.forget()
        self.ping: Hashable = None
        self.is_ping_told = False
        self.pings: deque[float] = deque(maxlen=PINGS)
        self.stop: Stop | None = None
        """What every call is answered once a loop was found, unless it is only warned of."""
        self.found: Incident | None = None
        """The loop, before it is said what was done about it."""
        self.is_told = False
        """Whether it was told, and the user's callable asked."""

    def stream(self, call: Call) -> _Stream:
        return self.llm if isinstance(call, LLMCall) else self.tools


class LoopGuard:
    """Finds loops in the calls of a run and of the runs nested in it.

    One is built in and only warns (``init(on_loop=...)`` changes that). Give another one to ``clevagent.run(guards=[...])``, or to
    ``init(plugins=[...])``, and it speaks in place of the built-in one. Safe to share between runs and threads; bounded memory and
    some ten microseconds a call, however long the run.

    What is not known cannot be compared: a call counts only if its adapter, or ``settle(result=...)`` and ``settle(answer=...)`` of
    the framework-free doors, tells what came back. Outside of every run nobody can tell one piece of work from the next, so there a
    model call counts only where it goes on with the conversation before it.
    """

    fails_closed = False

    def __init__(self, *, on_loop: OnLoop = "raise") -> None:
        """Answer loops by ``on_loop``.

        Args:
            on_loop: ``warn`` tells; ``raise`` refuses every later call of the run with ``LoopDetected``, until
                ``run.forgive_loops()``; a callable gets the incident once, and the run goes on if it returns ``"warn"``.

        Raises:
            UsageError: an action that does not exist, or that nothing here can carry out.

        """
        self._on_loop = check_on_loop(on_loop, where="LoopGuard(on_loop=")
        self._is_builtin = False
        self._yields = False

    # -- hooks ------------------------------------------------------------------------------------------------------------

    @hookimpl
    def clevagent_configure(self, watchdog: Watchdog) -> None:
        """Take the action that the settings name, and step aside where the user gave a guard."""
        if self._is_builtin:
            self._on_loop = watchdog.settings.on_loop
            self._yields = _has_other(self, watchdog.plugins.bound_hooks.before_call)

    @hookimpl
    def clevagent_before_call(self, run: Run, call: Call) -> Stop | None:
        """Refuse the call if the run repeats itself."""
        watch = self._watch(run)
        if watch is None:
            return None
        # By guard: several may watch one call, each with a count of its own.
        stream = watch.llm if isinstance(call, LLMCall) else watch.tools
        began = call.began
        if began is None:
            call.began = {self: stream.repetition.steps}
        else:
            began[self] = stream.repetition.steps
        watch.ping = None
        return None if watch.stop is None else self._answer(run, watch)

    @hookimpl
    def clevagent_call_settled(self, run: Run, call: Call, outcome: Outcome) -> None:
        """Take note of what came back, or of how it failed; what was cancelled tells nothing."""
        if outcome.result is not None or isinstance(outcome.error, Exception):
            self._note(run, call, outcome)

    @hookimpl
    def clevagent_call_failed(self, run: Run, call: Call, outcome: Outcome) -> None:
        """Take note of how it failed; what was cancelled, or never heard of again, tells nothing."""
        if outcome.result is not None or isinstance(outcome.error, Exception):
            self._note(run, call, outcome)

    @hookimpl
    def clevagent_step(self, run: Run, step: Step) -> None:
        """Count pings that say the same, again and again; take note of a node that tells what it was given and what it made."""
        if step.kind == "node" and "result" in step.detail:
            self._note_node(run, step)
        if step.kind != "ping":
            return
        watch = self._watch(run)
        if watch is None:
            return
        # Not the step itself: what it holds may change, or refuse to be compared. Nor those of runs side by side as one.
        ping = (run.run_id, step.name, arguments_of(step.detail)[0] if step.detail else None)
        now = run.watchdog.clock.monotonic()
        told = None
        with _lock:
            if ping != watch.ping:
                watch.ping, watch.is_ping_told = ping, False
                watch.pings.clear()
            watch.pings.append(now)
            seconds = now - watch.pings[0]
            if len(watch.pings) == PINGS and seconds <= PINGS_WITHIN_S and not watch.is_ping_told and watch.stop is None:
                watch.is_ping_told = True
                told = self._found(run, watch, ping_incident(run, step, PINGS, seconds))
        if told is not None:
            run.watchdog.tell(told)

    # -- inside -----------------------------------------------------------------------------------------------------------

    def _watch(self, run: Run) -> _Watch | None:
        """Find what was seen of the run tree; ``None`` where another guard speaks for it."""
        try:
            watch: _Watch | None = run.state[self]
        except KeyError:
            watch = self._new_watch(run)
        if watch is not None and watch.forgiven != run.root.forgiven:
            with _lock:
                if watch.forgiven != run.root.forgiven:
                    watch.forgiven = run.root.forgiven
                    watch.forget()
        return watch

    def _new_watch(self, run: Run) -> _Watch | None:
        if self._yields or (self._is_builtin and run.guards is not None and _has_other(self, run.guards.before_call)):
            run.state[self] = None
            return None
        root = run.root
        watch: _Watch | None = root.state.get(self)
        if watch is None:
            # setdefault: of two threads that come here at once, one makes it.
            watch = root.state.setdefault(self, _Watch(root.forgiven))
        run.state[self] = watch
        return watch

    def _note(self, run: Run, call: Call, outcome: Outcome) -> None:
        watch = self._watch(run)
        if watch is None:
            return
        # Taken away: a call that was charged for lack of news may be settled later, and is still one call.
        began = call.began
        started = began.pop(self, None) if began is not None else None
        if started is None:
            return
        sign = self._sign(run, watch, call, outcome)
        if sign is None:
            return
        stream, told = watch.stream(call), None
        with _lock:
            finding = stream.observe(sign, started)
            stream.marks.append(Mark(stream.repetition.steps - 1, run.root.cost_pico, run.watchdog.clock.wall()))
            if finding is not None and watch.stop is None:
                told = self._found(run, watch, loop_incident(run, finding, stream.mark_of(finding.since - 1)))
        if told is not None:
            # Behind the lock: the user's log handlers may take their time.
            run.watchdog.tell(told)

    def _note_node(self, run: Run, step: Step) -> None:
        """Take note of a node of a graph: of its state, and of what it made of it. A state that changes is news."""
        root = run.root
        watch = self._watch(run)
        if watch is None or root is run.watchdog.process_run:
            return  # outside of every run, the next graph may well do the same
        detail, stream, told = step.detail, watch.nodes, None
        given = _state_of(detail.get("given"))
        made = _made_of(detail["result"])
        sign = Sign(("node", step.name, run.run_id, detail.get("thread_id")), given, given, made, made, failed=False)
        began = detail.get("began")
        with _lock:
            steps = stream.repetition.steps
            finding = stream.observe(sign, began if type(began) is int and began < steps else steps)
            root.finished_nodes = steps + 1
            stream.marks.append(Mark(steps, root.cost_pico, run.watchdog.clock.wall()))
            if finding is not None and watch.stop is None:
                told = self._found(run, watch, loop_incident(run, finding, stream.mark_of(finding.since - 1)))
        if told is not None:
            run.watchdog.tell(told)

    def _gate(self, run: Run) -> Stop | None:
        """Refuse what is no call itself in a run that repeats itself."""
        watch = self._watch(run)
        return None if watch is None or watch.stop is None else self._answer(run, watch)

    def _sign(self, run: Run, watch: _Watch, call: Call, outcome: Outcome) -> Sign | None:
        """Make the fingerprints of a call."""
        error = outcome.error
        came_back = outcome.result if outcome.result is not None else error
        if not isinstance(call, LLMCall):
            arguments, shape = arguments_of(call.arguments)
            result, result_shape = result_of(came_back, failed=error is not None)
            return Sign(("tool", call.tool, call.node, call.thread_id), arguments, shape, result, result_shape, error is not None)
        what = ("model", call.model, call.node, call.thread_id)
        new, conversation, goes_on = _new_input(watch, what, call.input)
        is_outside = run.root is run.watchdog.process_run
        if is_outside and not goes_on:
            return None
        # Ids are made anew for each answer, so the shape counts; numbers are news in it.
        shape = message_of(new)
        if is_outside:
            # Many people may say the same in it, each in a conversation of their own.
            shape = hash((shape, conversation))
        answer = message_of(came_back) if error is None else result_of(error)[1]
        return Sign(what, shape, shape, answer, answer, error is not None)

    def _found(self, run: Run, watch: _Watch, incident: Incident) -> Incident | None:
        """Settle what is done about a loop; give what is told of it now: nothing, where a callable is to be asked first."""
        if run.dry_run:
            return as_told(incident, "dry_run")
        if self._on_loop == "warn":
            return as_told(incident, "warn")
        watch.stop = Stop(incident=as_told(incident, "raise"))
        watch.found = incident
        run.root.gates[self] = self._gate
        # Told at once: a run that only pings would never meet the stop.
        watch.is_told = self._on_loop == "raise"
        return watch.stop.incident if watch.is_told else None

    def _answer(self, run: Run, watch: _Watch) -> Stop | None:
        if run.dry_run or wraps_up(run.watchdog):
            return None
        with _lock:
            stop, found = watch.stop, watch.found
            if stop is None or found is None or watch.is_told:
                return stop
            watch.is_told = True
        if callable(self._on_loop) and self._ask(self._on_loop, stop.incident):
            with _lock:
                watch.forget()
            run.watchdog.tell(as_told(found, "let_go"))
            return None
        run.watchdog.tell(stop.incident)
        return stop

    def _ask(self, on_loop: OnLoop, incident: Incident) -> bool:
        """Ask the user's callable; tell whether the run may go on."""
        try:
            return bool(on_loop(incident) == "warn")  # type: ignore[operator]  # the caller has seen that it can be called
        except Exception as error:  # whose code: the user's
            if is_interrupt(error):
                raise
            logger.exception("The on_loop callable failed; the run stays stopped.")
            return False


def _has_other(guard: LoopGuard, checks: Sequence[tuple[object, object]]) -> bool:
    return any(isinstance(plugin, LoopGuard) and plugin is not guard for _, plugin in checks)


def _new_input(watch: _Watch, what: Hashable, items: Sequence[object]) -> tuple[object, int, bool]:
    """Find what stands behind the history that was sent before, in which conversation, and whether the call goes on with one.

    Of the history only its length and its last item are compared: what came before that was looked at when it was new. Of one text
    that grows, as a scratchpad does, all is compared.
    """
    if not items:
        return (), 0, False
    heads = watch.conversations.get(what, ())
    if not heads and len(watch.conversations) >= _CONVERSATIONS:
        watch.conversations.clear()
    count = len(items)
    text = items[0] if count == 1 and isinstance(items[0], str) else None
    # The latest first. A call that is made again, as after a failure, finds the head that it found before.
    new: Sequence[object] | None = None
    number = size = tail = 0
    if text is None:
        for length, mark, _, _, known in heads:
            if length < count and _mark(items[length - 1]) == mark:
                new, number = items[length:], known
                break
    else:
        size, tail = len(text), hash(text[-_TAIL:])
        for _, mark, end, ending, known in heads:
            if 0 < end < size and hash(text[max(0, end - _TAIL) : end]) == ending and hash(text[:end]) == mark:
                new, number = text[end:], known
                break
    goes_on = new is not None
    if not goes_on:
        watch.begun = number = watch.begun + 1
    last = _mark(items[-1])
    others = [head for head in heads if head[1] != last or head[0] != count]
    watch.conversations[what] = ((count, last, size, tail, number), *others[: _HEADS - 1])
    return (new if goes_on else _whole(items)), number, goes_on


def _whole(items: Sequence[object]) -> Sequence[object]:
    """Give what stands for all of an input. Its history is not looked into, only told apart: it may be long, and cut or edited
    before each call, so that no call goes on with the one before it.
    """  # noqa: D205 - what it gives needs its reason
    if len(items) <= _LOOKED_INTO:
        return items
    return (key_of("", items[:-_LOOKED_INTO]), *items[-_LOOKED_INTO:])


def _state_of(state: object) -> int:
    """Fingerprint the state that a node is given. Of what grows, as a history does, the length and the end are looked at: the rest was
    looked at when it was new.
    """  # noqa: D205 - what it leaves out needs its reason
    if type(state) is not dict:
        return _mark(state)
    parts = [(key, _end_of(value)) for key, value in list(dict.items(state)) if type(key) is str]
    return hash((len(state), *parts))


def _made_of(result: object) -> int:
    """Fingerprint what a node made of its state; exact."""
    if type(result) is dict and len(result) <= _FEW:
        values = list(dict.values(result))
        if all(type(value) in _SIMPLE and (type(value) is not int or value >= 0) for value in values):  # -1 and -2 have one hash
            return hash((*dict.keys(result), *values))
    return result_of(result, failed=False)[0]


_FEW = 8
_SIMPLE = frozenset({str, int, bool, type(None)})


def _end_of(value: object) -> object:
    kind = type(value)
    if kind is str or kind is int or kind is bool or value is None:
        return value if kind is not str else hash(value)
    if kind is list or kind is tuple:
        size = len(value)  # type: ignore[arg-type]  # one of these
        return size, _mark(value[-1]) if size else 0  # type: ignore[index]  # as above
    return arguments_of(value)[0]


def _mark(item: object) -> int:
    kind = type(item)
    if kind is str or (kind is tuple and all(type(part) is str for part in item)):  # type: ignore[attr-defined]  # a tuple
        return hash(item)  # most messages, and most results of tools
    return arguments_of(item)[0]


def plugin() -> LoopGuard:
    """Make the built-in plugin of this module."""
    guard = LoopGuard(on_loop="warn")
    guard._is_builtin = True  # noqa: SLF001 - the same module
    return guard
