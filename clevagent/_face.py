"""The functions of the package ``clevagent``: thin words over the process's watchdog."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

from clevagent_core import default
from clevagent_core.budgets import Budget, OnExceed, as_budgets, check_names
from clevagent_core.calls import LLMCall, Step, ToolCall, Usage
from clevagent_core.doors import LLMCallBlock, ToolCallBlock
from clevagent_core.errors import UsageError
from clevagent_core.money import to_pico
from clevagent_core.watchdog import RunBlock, Watchdog

T = TypeVar("T")


def init(**settings: Any) -> Watchdog:
    """Start the watchdog of this process. Call it once, before anything is guarded.

    Reads ``CLEVAGENT_*`` from the environment (arguments go before it), loads the plugins that are installed, and loads the
    price list. Opens no connection. Calling it again with the same settings does nothing.

    Args:
        settings: the fields of ``clevagent_core.settings.Settings``: ``agent``, ``budgets``, ``prices``, ``ledger``, ``attach``,
            ``plugins``, ``block``, ``on_loop``, ``dry_run``, ``estimate``, ``assume_output_tokens``, ``wait_s``, ``hold_s``, ``flush_s``,
            ``unknown_price``.

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

    A run inside another one is nested: what it uses counts against both.

    Args:
        budgets: ceilings for this run.
        guards: plugins for this run only, and for those nested in it.
        tags: what it is known by, for example ``{"tenant": "acme"}``; a nested run inherits them.
        dry_run: work everything out and tell it, but stop nothing.

    Raises:
        UsageError: two budgets with one name and different limits, or an action that nothing can carry out.

    """
    return RunBlock(default.current, budgets=budgets, guards=guards, tags=tags, dry_run=dry_run)


def guard(obj: T, *, budgets: Sequence[Budget] = (), on_exceed: OnExceed | None = None, watchdog: Watchdog | None = None) -> T:
    """Make ``obj`` ask before each call that costs something. Gives back a guarded copy of the same type.

    Args:
        obj: a LangChain chat model, or one with tools bound.
        budgets: ceilings for this object, beside those of the run and of the process.
        on_exceed: what happens at these ceilings, instead of what each of them says.
        watchdog: another watchdog than the process's own.

    Raises:
        UsageError: nothing that is installed can guard such an object, or not in the way that is asked for.

    """
    own = as_budgets(budgets)
    if on_exceed is not None:
        own = tuple(replace(budget, on_exceed=on_exceed) for budget in own)
    check_names(own)
    guarded = (watchdog or default.current()).plugins.guard(obj, watchdog, own, on_exceed)
    if guarded is None:
        raise UsageError(
            f"guard() does not know how to guard a {type(obj).__module__}.{type(obj).__qualname__}, so its calls would go out "
            "unchecked. It guards LangChain chat models (install the [langchain] extra); guard the model that you build an agent, "
            "a graph or a chain with, or use `with clevagent.llm_call(...)` around the request."
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
    )


def tool_call(name: str, arguments: object = None, *, node: str | None = None) -> ToolCallBlock:
    """Guard one tool call that you make yourself: ``with`` or ``async with clevagent.tool_call(...) as call:``.

    Args:
        name: the tool's name.
        arguments: what it is called with; stays in the process.
        node: where it is made, for ``Budget(node=...)``.

    Raises:
        BudgetExceeded: on entering; the tool must not be run.

    """
    return ToolCallBlock(default.current, name=name, arguments=arguments, node=node)


def ping(status: str = "ok", message: str = "", *, meta: Mapping[str, object] | None = None) -> None:
    """Tell a sign of progress of the current run. Never blocks, never raises for what observers do."""
    detail: dict[str, object] = {"message": message, **(meta or {})} if message or meta else {}
    default.current().current_run().step(Step(kind="ping", name=status, detail=detail))


def log_cost(
    tokens: int | None = None,
    cost_usd: float | None = None,
    model: str | None = None,
    *,
    input_tokens: int = 0,
    output_tokens: int = 0,
) -> None:
    """Record a model call that was made without being asked for: it is spent, and counts against every budget it belongs to.

    It is always recorded, even past a ceiling, and raises nothing then: the next guarded call is refused.

    Args:
        tokens: all tokens, where input and output are not known apart.
        cost_usd: what it did cost; worked out from ``model`` and the token counts when not given.
        model: the model's name.
        input_tokens: input tokens.
        output_tokens: output tokens.

    Raises:
        UsageError: neither a cost nor a priced model with its tokens; a negative amount.

    """
    for name, count in (("tokens", tokens or 0), ("input_tokens", input_tokens), ("output_tokens", output_tokens)):
        if type(count) is not int or count < 0:
            raise UsageError(
                f"log_cost({name}={count!r}) is not a token count, so nothing was recorded. Give a whole number of at least 0."
            )
    watchdog = default.current()
    call = LLMCall(model=model or "unknown", tool=watchdog.tool.get())
    usage = Usage(input_tokens=(tokens or 0) + input_tokens, output_tokens=output_tokens)
    if cost_usd is not None:
        cost = to_pico(cost_usd, what="cost_usd")
    else:
        rates = watchdog.rates(call) if model else None
        if rates is None or not (input_tokens or output_tokens):
            raise UsageError(
                f"log_cost(tokens={tokens!r}, model={model!r}, input_tokens={input_tokens}, output_tokens={output_tokens}) tells "
                "no cost: give cost_usd=..., or the name of a model with a price and its input_tokens= and output_tokens=."
            )
        cost = rates.cost(usage)
    watchdog.current_run().log(call, usage, cost)


def log_tool_call(name: str, args_summary: object = None) -> None:
    """Record a tool call that was made without being asked for. It counts; the next guarded call may be refused."""
    default.current().current_run().log(ToolCall(tool=name, arguments=args_summary), Usage(), None)
