"""What ClevAgent costs, in instructions: figures that a change can be held to, where times vary too much.

    python -m benchmarks.instructions            # counts everything under valgrind: about four minutes

Every call has a text and an answer of its own, as an agent's calls have: one prompt repeated would time a run that already loops.
"Not slower" in this project means these counts, within ``TOLERANCE``. Figures that differ from those in RESULTS.md are listed.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count as numbers
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a file: Python put this folder on the path, not the one that holds the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import callgrind, results
from benchmarks.hot_paths import BIG, PRICES, three_budgets
from benchmarks.results import Section, contribute
from clevagent import Budget, LLMCall, Run, Usage, Watchdog, guard

TOLERANCE = 0.03
"""The share by which a count may differ from an earlier one."""
NOISE = 0.01
"""The share of a bare call by which what is added to it may differ: it is the difference of two counts."""
WORDS = "the agent reads a report and writes what it found in it, line by line. "
SIZES = (200, 2_000, 8_000, 40_000)
"""Bytes of a message."""
HISTORIES = (2, 50, 500, 5_000)
"""Messages of a history."""
GROWTH = 40
"""By how many messages a growing history grows before it is cut back."""
OPEN_CALLS = 10_000
USAGE = {"input_tokens": 200, "output_tokens": 100}


class Operation(NamedTuple):
    """Something to be counted."""

    label: str
    call: Callable[[], object]
    calls: int = 100
    warm_up: int = 150


# -- what is counted ------------------------------------------------------------------------------------------------------------------


def operations(*, histories: Sequence[int] = HISTORIES, open_calls: int = OPEN_CALLS) -> Iterator[Operation]:
    """Yield everything to be counted. Tests ask for shorter histories and fewer open calls."""
    yield Operation("nothing", lambda: None)
    yield from _core()
    yield from _langchain()
    yield from _nodes()
    yield from _clients()
    for size in histories:
        for kind, message in _MESSAGES.items():
            for growing in (True, False):
                yield _history(size, kind, message, growing=growing)
    yield from _ends(open_calls)


def _core_call(run: Run, text: str, answer: str) -> None:
    call = LLMCall(model="bench", input=[text], max_output_tokens=100)
    run.open(call).settle(Usage(**USAGE), result=answer)


def _core() -> Iterator[Operation]:
    watchdog, number = Watchdog(prices=PRICES), numbers()
    run = watchdog.start_run(budgets=three_budgets(), tags={"tenant": "acme"})
    call, usage = LLMCall(model="bench", input=["x" * 200], max_output_tokens=100), Usage(**USAGE)
    yield Operation("core, no answer", lambda: run.open(call).settle(usage))
    yield Operation("core, fresh", lambda: _core_call(run, f"question {next(number)} {WORDS * 2}", f"answer {next(number)}"))
    yield Operation("core, fresh, empty", lambda: _core_call(run, "", f"answer {next(number)}"))
    for size in SIZES:
        body = (WORDS * (size // len(WORDS) + 1))[: size - 10]
        yield Operation(
            f"text of {size}", lambda body=body: _core_call(run, f"{next(number):09d} {body}", f"answer {next(number)}")
        )  # type: ignore[misc]  # bound now
    umlauts = ("Grüße " * 400)[:1_700]
    yield Operation("text of 2000, not ASCII", lambda: _core_call(run, f"{next(number):09d} {umlauts}", f"answer {next(number)}"))


def _langchain() -> Iterator[Operation]:
    from langchain_core.messages import AIMessage, HumanMessage
    from langchain_core.outputs import ChatGeneration, ChatResult

    from benchmarks.hot_paths import bench_model, noop_handler
    from clevagent.integrations.langchain import ClevAgentCallbackHandler

    number = numbers()

    class FreshModel(type(bench_model())):  # type: ignore[misc]  # made where LangChain is imported
        """Answers something new each time."""

        def _answer(self) -> ChatResult:
            message = AIMessage(content=f"answer {next(number)}", usage_metadata={**USAGE, "total_tokens": 300})
            return ChatResult(generations=[ChatGeneration(message=message)])

    watchdog = Watchdog(prices=PRICES)
    model = FreshModel()
    guarded = guard(model, watchdog=watchdog)
    ways = {
        "bare": (model, None),
        "no-op": (model, {"callbacks": [noop_handler()]}),
        "handler": (model, {"callbacks": [ClevAgentCallbackHandler(watchdog=watchdog)]}),
        "guard": (guarded, None),
    }

    def invoke(name: str, run: Run | None) -> Callable[[], object]:
        what, config = ways[name]

        def call() -> object:
            return what.invoke([HumanMessage(f"question {next(number)} {WORDS * 2}")], config)

        def inside() -> object:
            with run.activate():  # type: ignore[union-attr]  # only called where there is one
                return call()

        return call if run is None else inside

    one = watchdog.start_run(budgets=[Budget(usd=BIG)])
    three = watchdog.start_run(budgets=three_budgets(), tags={"tenant": "acme"})
    yield Operation("LangChain, bare", invoke("bare", one))
    yield Operation("LangChain, no-op", invoke("no-op", one))
    for name in ("handler", "guard"):
        yield Operation(f"LangChain, {name}", invoke(name, one))
        yield Operation(f"LangChain, {name}, three budgets", invoke(name, three))


def _nodes() -> Iterator[Operation]:
    from clevagent.integrations.langgraph import monitored_node

    watchdog, number = Watchdog(prices=PRICES), numbers()

    def write(state: dict[str, Any]) -> dict[str, Any]:
        return {"text": f"{state['topic']} {next(number)}"}

    watched = monitored_node("write", watchdog=watchdog)(write)
    run = watchdog.start_run(budgets=[Budget(usd=BIG)])

    def inside() -> object:
        with run.activate():
            return watched({"topic": f"loops {next(number)}"})

    def bare() -> object:
        with run.activate():
            return write({"topic": f"loops {next(number)}"})

    def activated() -> None:
        with run.activate():
            pass

    yield Operation("run, activated", activated)
    yield Operation("node, bare", bare)
    yield Operation("node, watched", inside)


def _clients() -> Iterator[Operation]:
    import anthropic
    import openai

    from benchmarks.clients import client_of

    watchdog, number = Watchdog(), numbers()
    run = watchdog.start_run(budgets=[Budget(usd=BIG)])

    def asking(client: Any, name: str) -> Callable[[], object]:
        def call() -> object:
            messages = [{"role": "user", "content": f"question {next(number)} {WORDS * 2}"}]
            with run.activate():
                if name == "Anthropic":
                    return client.messages.create(model="claude-sonnet-4-6", max_tokens=100, messages=messages)
                return client.chat.completions.create(model="gpt-4o", max_tokens=100, messages=messages)

        return call

    for name, sdk in (("OpenAI", openai), ("Anthropic", anthropic)):
        client = client_of(sdk, name.lower())
        yield Operation(f"{name}, bare", asking(client, name), 40, 60)
        yield Operation(f"{name}, guarded", asking(guard(client, watchdog=watchdog), name), 40, 60)


_MESSAGES: dict[str, Callable[[int], object]] = {
    "text": lambda number: f"message {number} {WORDS * 3}",
    "tool calls": lambda number: (
        f"message {number} {WORDS * 3}",
        [{"name": "search", "args": {"q": f"q{number}"}, "id": f"call_{number:024d}", "type": "tool_call"}],
    ),
}


def _history(size: int, kind: str, message: Callable[[int], object], *, growing: bool) -> Operation:
    """Calls over a history of ``size`` messages: one more each time, or one more and the first one less."""
    watchdog = Watchdog(prices=PRICES)
    run = watchdog.start_run(budgets=[Budget(usd=BIG)])
    history, number = [message(index) for index in range(size)], numbers(size)

    def call() -> None:
        if not growing:
            del history[0]
        elif len(history) >= size + GROWTH:
            del history[size:]
        history.append(message(next(number)))
        asked = LLMCall(model="bench", input=list(history), max_output_tokens=100)
        run.open(asked).settle(Usage(**USAGE), result=f"answer {next(number)}")

    few = size >= HISTORIES[-1]
    return Operation(f"history of {size}, {kind}, {_way(growing)}", call, 5 if few else GROWTH, 2 if few else GROWTH + 5)


def _way(growing: bool) -> str:
    return "growing" if growing else "cut in front"


def _ends(open_calls: int) -> Iterator[Operation]:
    watchdog = Watchdog(prices=PRICES)
    run = watchdog.start_run(budgets=[Budget(usd=BIG)])
    call = LLMCall(model="bench", input=["x" * 200], max_output_tokens=100)
    yield Operation("run, alone", lambda: watchdog.start_run().end())
    held = []

    def hold_and_end() -> None:
        while len(held) < open_calls:
            held.append(run.open(call))
        watchdog.start_run().end()

    yield Operation("run, beside open calls", hold_and_end)


# -- tables ---------------------------------------------------------------------------------------------------------------------------


def _k(instructions: float) -> str:
    return f"{instructions / 1000:,.1f} k"


def sections(counts: dict[str, float]) -> list[Section]:
    """Build the tables. The cost of the counting loop itself is subtracted from each call."""
    nothing = counts["nothing"]
    of = {label: value - nothing for label, value in counts.items()}
    # Nodes are counted inside a run, which is entered once for all of them.
    for label in ("node, bare", "node, watched"):
        of[label] -= of["run, activated"]

    def row(what: str, label: str, bare: str | None, target: str) -> tuple[str, ...]:
        whole = of[label]
        return what, "-" if bare is None else _k(of[bare]), _k(whole if bare is None else whole - of[bare]), target

    calls = [
        row("LangChain: a handler that does nothing", "LangChain, no-op", "LangChain, bare", "-"),
        row("`ClevAgentCallbackHandler`", "LangChain, handler", "LangChain, bare", "160 k"),
        row("`ClevAgentCallbackHandler`, three budgets", "LangChain, handler, three budgets", "LangChain, bare", "200 k"),
        row("`guard(model)`", "LangChain, guard", "LangChain, bare", "160 k"),
        row("`guard(model)`, three budgets", "LangChain, guard, three budgets", "LangChain, bare", "200 k"),
        row("core, three budgets, one text again and again, no answer", "core, no answer", None, "65 k"),
        row("core, three budgets", "core, fresh", None, "130 k"),
        row("`monitored_node`, called directly", "node, watched", "node, bare", "45 k"),
        row("`with run.activate():` around nothing", "run, activated", None, "-"),
        row("`guard(client)`, OpenAI", "OpenAI, guarded", "OpenAI, bare", "400 k"),
        row("`guard(client)`, Anthropic", "Anthropic, guarded", "Anthropic, bare", "20 % of the bare call"),
        row(f"a run starts and ends beside {OPEN_CALLS:,} open calls of another", "run, beside open calls", "run, alone", "0 k"),
    ]
    texts = [
        *(row(f"{size:,} bytes of ASCII", f"text of {size}", "core, fresh, empty", "-") for size in SIZES),
        row("2,000 bytes, some of them not ASCII", "text of 2000, not ASCII", "core, fresh, empty", "-"),
    ]
    columns = [(kind, growing) for growing in (True, False) for kind in _MESSAGES]
    histories = [
        (f"{size:,}", *(_k(of[f"history of {size}, {kind}, {_way(growing)}"]) for kind, growing in columns)) for size in HISTORIES
    ]
    return [
        Section(
            title="Instructions: what a call adds",
            header=("", "bare", "added", "target, at most"),
            rows=calls,
            note="Counted with callgrind. Each call has a text and an answer of its own; one budget in US dollars where nothing else is said.",
        ),
        Section(
            title="Instructions: what a new message adds to a call of the core",
            header=("", "a call with an empty text", "added", "target, at most"),
            rows=texts,
        ),
        Section(
            title="Instructions: a call of the core over a history",
            header=("messages", *(f"{kind}, {_way(growing)}" for kind, growing in columns)),
            rows=histories,
            note=f"Growing: one message more for each call, {GROWTH} times. Cut in front: one more at the end, and the first one left out.",
        ),
    ]


def changes(now: Sequence[Section], before: Mapping[str, Sequence[Sequence[str]]]) -> list[str]:
    """Return a line for each figure that differs from the one ``before`` by more than it may, and for each that is new."""
    found = []
    for section in now:
        known = {cells[0]: cells[1:] for cells in before.get(section.title, [])}
        for what, *cells in section.rows:
            bare = cells[0] if section.header[2] == "added" else "-"
            for column, new, old in zip_longest(section.header[1:], cells, known.get(what, [])):
                if new == old or not new.endswith(" k") or column.startswith("target"):
                    continue
                if old is None:
                    found.append(f"{what}, {column}: {new} (not counted before)")
                elif abs(_number(new) - _number(old)) > max(TOLERANCE * abs(_number(old)), NOISE * _number(bare)):
                    found.append(f"{what}, {column}: {old} -> {new}")
    return found


def _number(text: str) -> float:
    return 0.0 if text == "-" else float(text.removesuffix(" k").replace(",", ""))


def main(library: str | None = None) -> int:
    """Count, print, and leave the tables for RESULTS.md; with callgrind's ``library``, be the program that is counted."""
    if library is not None:
        logging.getLogger("clevagent").disabled = True
        counter = callgrind.Counter(library)
        for label, call, calls, warm_up in operations():
            counter.count(label, call, calls=calls, warm_up=warm_up)
        sys.stdout.flush()
        os._exit(0)  # what is still open is not to be charged under valgrind
    found = sections(callgrind.count("benchmarks.instructions"))
    for section in found:
        print(f"\n{section.title}\n\n{results.table(section)}")
    moved = changes(found, results.tables(results.RESULTS.read_text(encoding="utf-8")))
    print(
        f"\nAgainst RESULTS.md: {len(moved) or 'no'} figures differ by more than {TOLERANCE:.0%} ({NOISE:.0%} of a bare call).",
        *moved,
        sep="\n  ",
    )
    contribute("instructions", found, distributions=("clevagent", "langchain-core", "openai", "anthropic"))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
