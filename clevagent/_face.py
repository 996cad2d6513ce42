"""The functions of the package ``clevagent``: thin words over the process's watchdog."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

from clevagent_core import default
from clevagent_core.blocks import RunBlock
from clevagent_core.budgets import Budget, OnExceed, as_budgets, check_action, check_names
from clevagent_core.calls import LLMCall, Step, ToolCall, Usage
from clevagent_core.doors import LLMCallBlock, ToolCallBlock
from clevagent_core.errors import UsageError
from clevagent_core.frames import Within, frame_of, place
from clevagent_core.money import to_pico
from clevagent_core.tickets import plain_step
from clevagent_core.verdicts import Incident
from clevagent_core.watchdog import Watchdog
from clevagent_providers.requests import whole

logger = logging.getLogger("clevagent")

T = TypeVar("T")


def init(**settings: Any) -> Watchdog:
    """Start the watchdog of this process. Call it once, before anything is guarded.

    Reads ``CLEVAGENT_*`` from the environment (arguments go before it), loads the plugins that are installed, and loads the
    price list. Opens no connection. Calling it again with the same settings does nothing.

    Args:
        settings: the fields of ``clevagent_core.settings.Settings``: ``agent``, ``budgets``, ``prices``, ``ledger``, ``attach``,
            ``auto_cost``, ``plugins``, ``block``, ``on_loop``, ``on_cost_exceeded``, ``api_key``, ``endpoint``, ``interval``, ``spool``,
            ``capture``, ``stall_after``, ``on_stall``, ``dry_run``, ``estimate``, ``assume_output_tokens``, ``wait_s``, ``hold_s``, ``flush_s``,
            ``unknown_price``, ``unattributed``.

    Raises:
        UsageError: a setting that is unknown or wrong, or a second ``init`` with other settings.
        PluginError: a plugin given in ``plugins`` is broken.

    """
    return default.init(**settings)


def shutdown() -> None:
    """End every run, detach from frameworks, and tell observers what is waiting, within ``flush_s`` seconds.

    Runs by itself when the process ends. Safe to call when nothing was started.
    """
    default.shutdown()


def run(
    *,
    budgets: Sequence[Budget] = (),
    guards: Sequence[object] = (),
    tags: Mapping[str, str] | None = None,
    dry_run: bool = False,
) -> RunBlock:
    """Mark one piece of work: ``with clevagent.run(...) as run:``, ``async with``, or ``@clevagent.run(...)`` on a function.

    A run inside another one is nested: what it uses counts against both. On a generator, sync or async, the decorator is the way that
    holds whoever steps it, in whatever thread or task; a block inside it covers its own body too, but not always the tasks that it
    starts (docs/threads-and-servers.md).

    Args:
        budgets: ceilings for this run.
        guards: plugins for this run only, and for those nested in it.
        tags: what it is known by, for example ``{"tenant": "acme"}``; a nested run inherits them.
        dry_run: work everything out and tell it, but stop nothing.

    Raises:
        UsageError: two budgets with one name and different limits, or an action that nothing can carry out.

    """
    return RunBlock(default.current, budgets=budgets, guards=guards, tags=tags, dry_run=dry_run)


def outside_runs() -> Within:
    """Let calls belong to no run: ``with clevagent.outside_runs():``, also ``async with``. Budgets of the process still cover them.

    For background work of the program's own (a summariser, a scheduler) that was begun inside a run and is no part of it, or that runs
    in a thread of which nobody can tell whose it is.
    """
    return Within(lambda: default.current().process_run)


def guard(obj: T, *, budgets: Sequence[Budget] = (), on_exceed: OnExceed | None = None, watchdog: Watchdog | None = None) -> T:
    """Make ``obj`` ask before each call that costs something. Gives back a guarded copy of the same type.

    Args:
        obj: a LangChain chat model, or one with tools bound; a compiled LangGraph graph; a crew, an agent, a flow or an LLM of CrewAI; a
            client of ``openai`` or ``anthropic``.
        budgets: ceilings for this object, beside those of the run and of the process.
        on_exceed: what happens at these ceilings, instead of what each of them says; for a graph or a crew, which can end
            gracefully (``halt``, ``ask``), at every ceiling that stops it.
        watchdog: another watchdog than the process's own.

    Raises:
        UsageError: nothing that is installed can guard such an object, or not in the way that is asked for.

    """
    own = as_budgets(budgets)
    if on_exceed is not None:
        on_exceed = check_action(on_exceed, where="guard(obj, on_exceed=")
        own = tuple(replace(budget, on_exceed=on_exceed) for budget in own)
    check_names(own)
    guarded = (watchdog or default.current()).plugins.guard(obj, watchdog, own, on_exceed)
    if guarded is None:
        raise UsageError(
            f"guard() does not know how to guard a {type(obj).__module__}.{type(obj).__qualname__}, so its calls would go out "
            "unchecked. It guards chat models of LangChain, compiled graphs of LangGraph, crews, agents, flows and LLMs of CrewAI, and clients "
            "of openai and anthropic (`clevagent plugins` lists what is loaded); for anything else, guard the model that it is built "
            "with, or use `with clevagent.llm_call(...)` around the request."
        )
    return cast("T", guarded)


def llm_call(
    *,
    model: str,
    input: object,  # noqa: A002 - what every provider calls it
    max_output_tokens: int | None = None,
    tools: Sequence[object] = (),
    clamp: bool = False,
    answers: int = 1,
    provider: str | None = None,
    node: str | None = None,
    timeout_s: float | None = None,
) -> LLMCallBlock:
    """Guard one model call that you make yourself: ``with`` or ``async with clevagent.llm_call(...) as call:``.

    Send the request inside the block, then ``call.settle(input_tokens=..., output_tokens=...)``. A block that is left without
    it is charged what the call could cost at most, because it may have been sent; ``call.release()`` says that it was not.

    Args:
        model: the name the request carries.
        input: what is sent: a text, or a list of messages (any nesting of text).
        max_output_tokens: the output limit that the request carries, for each answer.
        tools: schemas sent beside it.
        clamp: lower the limit to what is left instead of refusing; then send ``call.max_output_tokens``.
        answers: how many answers are asked for (``n``).
        provider: who bills it, where the model's name does not tell.
        node: where it is made, for ``Budget(node=...)`` and the summary.
        timeout_s: the timeout of the request, where it has one: until then it is not stalled.

    Raises:
        BudgetExceeded: on entering; the request must not be sent. BudgetBusy: what is left is held by calls in flight.
        UsageError: the model has no price, or the call cannot be bounded.

    """
    return LLMCallBlock(
        default.current,
        model=model,
        input=input,
        max_output_tokens=max_output_tokens,
        tools=tools,
        clamp=clamp,
        answers=answers,
        provider=provider,
        node=node,
        timeout_s=timeout_s,
    )


def tool_call(name: str, arguments: object = None, *, node: str | None = None, timeout_s: float | None = None) -> ToolCallBlock:
    """Guard one tool call that you make yourself: ``with`` or ``async with clevagent.tool_call(...) as call:``.

    Args:
        name: the tool's name.
        arguments: what it is called with; stays in the process.
        node: where it is made, for ``Budget(node=...)``.
        timeout_s: after how many seconds it is given up, where it is: until then it is not stalled.

    Raises:
        BudgetExceeded: on entering; the tool must not be run.

    """
    return ToolCallBlock(default.current, name=name, arguments=arguments, node=node, timeout_s=timeout_s)


def ping(
    status: str = "ok",
    message: str = "",
    tokens_used: int | None = None,
    cost_usd: float | None = None,
    tool_calls: int | None = None,
    iteration_count: int | None = None,
    memory_mb: float | None = None,
    custom: Mapping[str, object] | None = None,
    *,
    meta: Mapping[str, object] | None = None,
) -> None:
    """Tell a sign of progress of the current run. Never blocks, never raises for what observers do.

    Args:
        status: ``ok``, ``warning``, ``error``, or a word of your own (``step_complete``).
        message: what is going on, for people.
        tokens_used: tokens used since the ping before, where nothing here saw the calls; recorded as ``log_cost`` does.
        cost_usd: what they did cost, in US dollars.
        tool_calls: how many tools were called since the ping before, where nothing here saw them.
        iteration_count: how far a loop of yours is.
        memory_mb: memory in use, in megabytes.
        custom: what else there is to tell; the older name of ``meta``.
        meta: what else there is to tell.

    Raises:
        UsageError: an amount that cannot be one.

    """
    if _is_over("ping"):
        return
    if tokens_used or cost_usd or tool_calls:
        _log(tokens=tokens_used, cost_usd=cost_usd, tool_calls=tool_calls, who="ping", tokens_name="tokens_used")
    run = default.current().current_run()
    if not message and iteration_count is None and memory_mb is None and not custom and not meta and type(status) is str:
        run.step(plain_step("ping", status))
        return
    told = {"message": message or None, "iteration_count": iteration_count, "memory_mb": memory_mb}
    detail = {name: value for name, value in told.items() if value is not None} | _named("custom", custom) | _named("meta", meta)
    run.step(Step(kind="ping", name=status, detail=detail))


def log_cost(
    tokens: int | None = None,
    cost_usd: float | None = None,
    model: str | None = None,
    tool_calls: int | None = None,
    iteration_count: int | None = None,
    *,
    cost: float | None = None,
    input_tokens: int | None = None,
    output_tokens: int | None = None,
) -> None:
    """Record a model call that was made without being asked for: it is spent, and counts against every budget it belongs to.

    It is always recorded, even past a ceiling, and raises nothing then: the next guarded call is refused. Without a cost it is
    worked out from ``model`` and the tokens; where input and output are not known apart, all are taken to be of the dearer kind.
    Where the model has no price either, the tokens count, and it is told (once) that budgets in US dollars do not see them.

    Args:
        tokens: all tokens, where input and output are not known apart.
        cost_usd: what it did cost, in US dollars.
        model: the model's name.
        tool_calls: how many tools were called beside it, where nothing here saw them.
        iteration_count: how far a loop of yours is; told as progress.
        cost: another name of ``cost_usd``.
        input_tokens: input tokens.
        output_tokens: output tokens.

    Raises:
        UsageError: nothing to record; a negative amount, or one that is no number; both ``cost`` and ``cost_usd``.

    """
    if cost is not None and cost_usd is not None:
        raise UsageError(
            f"log_cost(cost_usd={cost_usd!r}, cost={cost!r}) gives the cost twice, so nothing was recorded. Give one of them."
        )
    if all(given is None for given in (tokens, cost_usd, cost, tool_calls, iteration_count, input_tokens, output_tokens)):
        raise UsageError(
            f"log_cost(model={model!r}) tells neither a cost nor tokens, so there is nothing to record. Give cost_usd=..., or the name of "
            "a model and its input_tokens= and output_tokens=."
        )
    if _is_over("log_cost"):
        return
    _log(
        tokens=tokens,
        cost_usd=cost if cost_usd is None else cost_usd,
        model=model,
        tool_calls=tool_calls,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
    )
    if iteration_count is not None:
        log_iteration(iteration_count)


def log_tool_call(name: str, args_summary: object = None) -> None:
    """Record a tool call that was made without being asked for. It counts; the next guarded call may be refused."""
    if _is_over("log_tool_call"):
        return
    default.current().current_run().log(ToolCall(tool=name, arguments=args_summary), Usage(), None)


def log_iteration(count: int | None = None) -> None:
    """Tell that a loop of yours has gone round: a sign of progress, like ``ping``.

    Args:
        count: how often it has so far; counted for the run when not given.

    """
    if _is_over("log_iteration"):
        return
    run = default.current().current_run()
    if count is None:
        count = run.state[log_iteration] = run.state.get(log_iteration, 0) + 1
    run.step(Step(kind="ping", name="iteration", detail={"iteration_count": count}))


def _log(
    *,
    tokens: int | None,
    cost_usd: float | None,
    tool_calls: int | None,
    model: str | None = None,
    input_tokens: int | None = None,
    output_tokens: int | None = None,
    who: str = "log_cost",
    tokens_name: str = "tokens",
) -> None:
    given = {tokens_name: tokens, "input_tokens": input_tokens, "output_tokens": output_tokens, "tool_calls": tool_calls}
    counts = {name: _count(who, name, value) for name, value in given.items()}
    tokens, input_tokens, output_tokens, tool_calls = counts.values()
    watchdog = default.current()
    run = watchdog.current_run()
    paid = None if cost_usd is None else to_pico(cost_usd, what="cost_usd")
    if paid is not None or tokens or input_tokens or output_tokens:
        call = LLMCall(model=model or "unknown")
        place(call, frame_of(watchdog))
        usage = Usage(input_tokens=tokens + input_tokens, output_tokens=output_tokens)
        run.log(call, usage, _cost_of(watchdog, call, tokens, usage) if paid is None else paid)
    for _ in range(tool_calls):
        run.log(ToolCall(tool="unknown"), Usage(), None)


def _count(who: str, name: str, value: object) -> int:
    """Read a count: also one of numpy's, and ``150.0``."""
    if value is None:
        return 0
    count = value.__index__() if hasattr(value, "__index__") and not isinstance(value, bool) else whole(value)
    if count is None or count < 0:
        raise UsageError(f"{who}({name}={value!r}) is no count, so nothing was recorded. Give a whole number of at least 0.")
    return int(count)


def _named(name: str, given: object) -> dict[str, object]:
    """Take what a ping told beside its words: usually by names."""
    return {} if given is None else dict(given) if isinstance(given, Mapping) else {name: given}


def _is_over(what: str) -> bool:
    """Tell whether nothing can be recorded any more. What only tells something never raises for that."""
    if not default.is_over():
        return False
    logger.warning("%s() was called after clevagent.shutdown(), and recorded nothing. Call clevagent.init(...) first.", what)
    return True


def _cost_of(watchdog: Watchdog, call: LLMCall, undivided: int, usage: Usage) -> int | None:
    rates = watchdog.rates(call)
    if rates is None:
        watchdog.tell_once(
            Incident(
                kind="price",
                message=(
                    f"Tokens of the model {call.model!r} were recorded without a cost, and no price of it is known: they count in tokens "
                    "and calls, and budgets in US dollars do not see them. Give cost_usd=... with them, or a price: "
                    f"clevagent.init(prices={{{call.model!r}: clevagent.Price(input=..., output=...)}}). (Told once for each model.)"
                ),
                agent=watchdog.settings.agent,
                run_id=watchdog.current_run().run_id,
                at=watchdog.clock.wall(),
            ),
            key=call.model,
        )
        return None
    as_output = Usage(input_tokens=usage.input_tokens - undivided, output_tokens=usage.output_tokens + undivided)
    costs = [cost for cost in (rates.cost(usage), rates.cost(as_output)) if cost is not None]
    return max(costs, default=None)
