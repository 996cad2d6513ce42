"""What becomes of a guarded graph that is resumed: its run goes on, and answers to questions of ours are taken.

A question of ours and one of the user's nodes wait side by side, each with an id. Answers to ours raise a ceiling here, and are given on
to LangGraph under those ids, where no node looks for them; so neither kind can be taken for the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from langgraph.graph import END
from langgraph.types import Command, Interrupt

from clevagent_core.accounts import accounts_of
from clevagent_core.budgets import UNITS
from clevagent_core.errors import UsageError
from clevagent_core.ledger.account import Account
from clevagent_core.money import to_pico
from clevagent_core.verdicts import Incident
from clevagent_langgraph.invocations import Invocation, arun_id_of, go_on, kept_runs, run_id_of
from clevagent_langgraph.stops import is_question

if TYPE_CHECKING:
    from clevagent_core.runs import Run

STOP = "stop"
GO_ON = "go on"

_NOBODY = "00000000-0000-0000-0000-000000000000"
_RESUME = "__resume__"
"""How LangGraph stores an answer that names no question."""
_ID = re.compile(r"[0-9a-f]{32}")


class _Plan(NamedTuple):
    """How to go on."""

    input: Any
    is_stopped: bool = False
    """Whether the answer was to stop."""
    has_stale_answer: bool = False
    """Whether an answer that was taken must not be taken once more."""


def settle_answers(graph: Any, invocation: Invocation, input: Any) -> Any:  # noqa: A002 - LangGraph's name
    """Take the answers to questions of ours; give the input to go on with.

    Raises:
        UsageError: an answer that cannot be one; nothing was raised or resumed then.

    """
    snapshot = graph.get_state(invocation.config)
    plan = _plan(invocation, snapshot, run_id_of(graph, snapshot), input)
    config = invocation.config
    if plan.is_stopped:
        graph.update_state(config, None, as_node=END)
    elif plan.has_stale_answer:
        saved = graph.checkpointer.get_tuple(_addressed(graph, config))
        if saved is not None and _is_answered(saved.pending_writes):
            graph.checkpointer.put_writes(saved.config, [(_RESUME, None)], _NOBODY)
    return plan.input


async def asettle_answers(graph: Any, invocation: Invocation, input: Any) -> Any:  # noqa: A002 - LangGraph's name
    """Do what ``settle_answers`` does, without blocking the event loop."""
    snapshot = await graph.aget_state(invocation.config)
    plan = _plan(invocation, snapshot, await arun_id_of(graph, snapshot), input)
    config = invocation.config
    if plan.is_stopped:
        await graph.aupdate_state(config, None, as_node=END)
    elif plan.has_stale_answer:
        saved = await graph.checkpointer.aget_tuple(_addressed(graph, config))
        if saved is not None and _is_answered(saved.pending_writes):
            await graph.checkpointer.aput_writes(saved.config, [(_RESUME, None)], _NOBODY)
    return plan.input


def account_of(run: Run, question: Mapping[str, Any]) -> Account | None:
    """Find the account that a question is about: of ``run``, or of what is remembered of the run it arose in."""
    unit = UNITS.index(question["unit"]) if question.get("unit") in UNITS else -1
    wanted = question.get("budget"), unit, question.get("key")
    before = kept_runs(run.watchdog).get(str(question.get("run_id")))
    known = [*run.chain(), *(before.chain() if before is not None else ())]
    remembered = [account for one in known for account in (*one.accounts.values(), *one.used.values()) if not account.closed]
    found = [*(account for _, account in accounts_of(run, lent=True)), *remembered]
    return next((account for account in found if account.key[:3] == wanted), None)


def _plan(invocation: Invocation, snapshot: Any, run_id: str | None, given: Any) -> _Plan:
    if run_id is not None:
        go_on(invocation, run_id)
    questions = [interrupt for interrupt in snapshot.interrupts if is_question(interrupt)]
    if not questions:
        return _Plan(given)
    run = invocation.run
    has_stale_answer = not any(question.value.get("answer_waits") for question in questions)
    if any(question.value["clevagent"] == "loop" for question in questions):
        run.forgive_loops()
    resume = given.resume if isinstance(given, Command) else None
    if resume is None:
        return _Plan(given, has_stale_answer=has_stale_answer)
    others = [interrupt for interrupt in snapshot.interrupts if not is_question(interrupt)]
    if _is_by_id(resume):
        answers = {question.id: resume[question.id] for question in questions if question.id in resume}
        rest = {key: value for key, value in resume.items() if key not in answers}
    elif others:
        # LangGraph refuses it: nobody can tell whose answer it is.
        return _Plan(given, has_stale_answer=has_stale_answer)
    else:
        answers, rest = {question.id: resume for question in questions}, {}
    if any(_is_stop(answer) for answer in answers.values()):
        first = questions[0].value
        invocation.stop = Incident(
            **{
                name: first[name]
                for name in ("message", "run_id", "budget", "key", "window", "unit", "spent", "held", "needed", "ceiling")
            },
            kind=first["clevagent"],
            agent=run.watchdog.settings.agent,
            at=run.watchdog.clock.wall(),
            action="ask",
            details={"answer": STOP},
        )
        return _Plan(None, is_stopped=True)
    if _is_by_id(resume):
        wanted = [(question, answers[question.id]) for question in questions if question.id in answers]
    else:
        wanted = _of_all(questions, resume)
    _top_up(run, wanted)
    given = Command(graph=given.graph, update=given.update, goto=given.goto, resume={**rest, **answers})
    return _Plan(given, has_stale_answer=has_stale_answer)


def _of_all(questions: Sequence[Interrupt], answer: Any) -> list[tuple[Interrupt, Any]]:
    """Let one answer stand for all questions: those of one account are one question, asked in several branches."""
    if _is_go_on(answer):
        return []
    units = set(answer) if isinstance(answer, Mapping) else set()
    fitting = [question for question in questions if question.value.get("unit") in units] or list(questions)
    accounts = {(question.value.get("budget"), question.value.get("unit"), question.value.get("key")) for question in fitting}
    if len(accounts) > 1:
        names = ", ".join(sorted({f"{name!r} ({key})" for name, _, key in accounts}))
        raise UsageError(
            f"Command(resume={answer!r}) cannot tell which ceiling to raise, so none was, and nothing was resumed: the graph asks about {names}. "
            "Answer each by the id of its question: Command(resume={interrupt.id: {'usd': 1}, ...})."
        )
    return [(fitting[0], answer)]


def _top_up(run: Run, wanted: Sequence[tuple[Interrupt, Any]]) -> None:
    # All are looked up before any is raised: a mistake in one answer leaves every ceiling as it was.
    found: list[tuple[Account, int]] = []
    for question, answer in wanted:
        if _is_go_on(answer):
            continue
        unit = question.value.get("unit")
        if not isinstance(answer, Mapping) or set(answer) != {unit}:
            expected = f"{{{unit!r}: 2}}, " if unit is not None else ""
            raise UsageError(
                f"Command(resume={answer!r}) is no answer to the question of the budget {question.value.get('budget')!r}, so nothing was raised "
                f"or resumed; the graph still waits. Answer with {expected}'go on' (without more), or 'stop'."
            )
        amount = to_pico(answer[unit], what="usd") if unit == "usd" else answer[unit]
        if type(amount) is not int or amount <= 0:
            raise UsageError(
                f"Command(resume={answer!r}) raises nothing, so nothing was resumed; the graph still waits. Give a positive amount (counts "
                "are whole numbers), 'go on' or 'stop'."
            )
        account = account_of(run, question.value)
        if account is None:
            raise UsageError(
                f"The budget {question.value.get('budget')!r} of {question.value.get('key')!r}, which stopped this graph, is not in force here any "
                "more, so its ceiling was not raised, and nothing was resumed. Answer 'go on' to go on under the budgets that are in "
                "force now; or resume it inside the run that it belongs to."
            )
        found.append((account, amount))
    for account, amount in found:
        run.watchdog.ledger.top_up(account, amount)


def _is_by_id(resume: Any) -> bool:
    return isinstance(resume, Mapping) and bool(resume) and all(isinstance(key, str) and _ID.fullmatch(key) for key in resume)


def _is_stop(answer: Any) -> bool:
    return answer is False or answer == STOP or (isinstance(answer, Mapping) and bool(answer) and answer == {STOP: True})


def _is_go_on(answer: Any) -> bool:
    return answer is True or answer == GO_ON


def _is_answered(writes: Any) -> bool:
    return any(task == _NOBODY and channel == _RESUME and value is not None for task, channel, value in writes or ())


def _addressed(graph: Any, config: Any) -> Any:
    configurable = {**((graph.config or {}).get("configurable") or {}), **(config.get("configurable") or {})}
    return {"configurable": {"checkpoint_ns": "", **configurable}}
