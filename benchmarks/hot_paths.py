"""What ClevAgent costs in the agent's process: ratios of minima, and deterministic counts.

    python benchmarks/hot_paths.py            # everything
    python benchmarks/hot_paths.py core       # only what has no framework

Machines are noisy: alternatives are timed in turn, in blocks (A B A B ...), and the fastest block of each is compared, which
reproduces within a few per cent where single times do not.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: Python put this folder on the path, not the one that holds the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.results import Section, contribute
from clevagent import Budget, Price, Run, Usage, Watchdog
from clevagent_core.calls import LLMCall

BLOCKS = 15
PRICES = {"bench": Price(input=2.5, output=10)}
BIG = 1_000_000
"""US dollars: ceilings that no benchmark reaches."""


def interleaved(alternatives: dict[str, Callable[[], object]], calls: int) -> dict[str, float]:
    """Time each alternative in turn; give the microseconds a call of its fastest block."""
    best = dict.fromkeys(alternatives, float("inf"))
    for function in alternatives.values():
        for _ in range(max(3, calls // 10)):
            function()
    gc.collect()
    gc.disable()
    try:
        for _ in range(BLOCKS):
            for name, function in alternatives.items():
                start = time.thread_time()
                for _ in range(calls):
                    function()
                best[name] = min(best[name], (time.thread_time() - start) / calls)
    finally:
        gc.enable()
    return {name: seconds * 1e6 for name, seconds in best.items()}


ROWS: list[tuple[str, str, str]] = []
"""What the part that runs has found so far."""


def row(what: str, value: str, target: str) -> None:
    ROWS.append((what, value, target))
    print(f"{what:<66} {value:>22}   target {target}", flush=True)


def three_budgets() -> list[Budget]:
    return [Budget(usd=BIG), Budget(usd=BIG, per="day"), Budget(usd=BIG, per="month", by="tenant")]


def one_call(run: Run, call: LLMCall, usage: Usage) -> None:
    run.open(call).settle(usage)


def core() -> None:
    print("\ncore, no framework (check + reserve + settle; the loop guard comes later)")
    watchdog = Watchdog(prices=PRICES)
    usage = Usage(input_tokens=200, output_tokens=100)
    call = LLMCall(model="bench", input=["x" * 200], max_output_tokens=100)
    with (
        watchdog.run() as none,
        watchdog.run(budgets=[Budget(usd=BIG, name="one")]) as one,
    ):
        pass
    one = watchdog.start_run(budgets=[Budget(usd=BIG)])
    three = watchdog.start_run(budgets=three_budgets(), tags={"tenant": "acme"})
    none = watchdog.start_run()
    times = interleaved(
        {
            "none": lambda: one_call(none, call, usage),
            "one": lambda: one_call(one, call, usage),
            "three": lambda: one_call(three, call, usage),
        },
        2000,
    )
    row("no budget", f"{times['none']:.2f} us", "-")
    row("one budget", f"{times['one']:.2f} us", "-")
    row("three budgets", f"{times['three']:.2f} us", "<= 5 us")

    fresh = interleaved({"fresh": lambda: one_call(three, call, usage)}, 2000)["fresh"]
    for _ in range(1_000_000):
        one_call(three, call, usage)
    aged = interleaved({"aged": lambda: one_call(three, call, usage)}, 2000)["aged"]
    row("three budgets after 1 000 000 calls, against before", f"{aged / fresh:.2f} x", "<= 1.1 x")

    times = interleaved({"price": lambda: watchdog.rates(call)}, 20000)
    row("price of a known model, memoised", f"{times['price']:.2f} us", "<= 1 us")
    for run in (one, three, none):
        run.end()
    live_blocks("core, three budgets", three_budgets(), call, usage)


def live_blocks(what: str, budgets: list[Budget], call: LLMCall, usage: Usage) -> None:
    watchdog = Watchdog(prices=PRICES)
    run = watchdog.start_run(budgets=budgets)
    for _ in range(1000):
        one_call(run, call, usage)
    gc.collect()
    before = sys.getallocatedblocks()
    ticket = run.open(call)
    held = sys.getallocatedblocks() - before
    ticket.settle(usage)
    del ticket
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(100_000):
        one_call(run, call, usage)
    gc.collect()
    row(f"{what}: blocks that one open call holds", f"{held}", "-")
    row(f"{what}: live blocks after 100 000 calls", f"{sys.getallocatedblocks() - before:+d}", "0")
    run.end()


def bench_model() -> Any:
    from langchain_core.language_models.chat_models import BaseChatModel
    from langchain_core.messages import AIMessage
    from langchain_core.outputs import ChatGeneration, ChatResult

    class BenchModel(BaseChatModel):
        """Answers at once, with usage: what is left is the framework's own cost."""

        model_name: str = "bench"
        max_tokens: int = 100

        @property
        def _llm_type(self) -> str:
            return "bench"

        def _get_ls_params(self, stop: Any = None, **kwargs: Any) -> Any:
            return {"ls_provider": "bench", "ls_model_name": self.model_name, "ls_model_type": "chat", "ls_max_tokens": 100}

        def _answer(self) -> ChatResult:
            usage = {"input_tokens": 200, "output_tokens": 100, "total_tokens": 300}
            return ChatResult(generations=[ChatGeneration(message=AIMessage(content="ok", usage_metadata=usage))])

        def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
            return self._answer()

        async def _agenerate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
            return self._answer()

    return BenchModel()


def noop_handler() -> Any:
    """What any handler costs that hears of a call and its end."""
    from langchain_core.callbacks import BaseCallbackHandler

    class NoOp(BaseCallbackHandler):
        raise_error = True
        run_inline = True

        def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
            pass

        def on_llm_end(self, *args: Any, **kwargs: Any) -> None:
            pass

    return NoOp()


def langchain() -> None:
    from langchain_core.messages import AIMessage, HumanMessage

    import clevagent
    from clevagent.integrations.langchain import ClevAgentCallbackHandler

    print("\nLangChain (a model that answers at once)")
    watchdog = Watchdog(prices=PRICES)
    logging.getLogger("clevagent").disabled = True
    model = bench_model()
    guarded = clevagent.guard(model, watchdog=watchdog)
    ours = {"callbacks": [ClevAgentCallbackHandler(watchdog=watchdog)]}
    noop = {"callbacks": [noop_handler()]}
    prompt = [HumanMessage("x" * 180)]
    with watchdog.run(budgets=[Budget(usd=BIG)]):
        times = interleaved(
            {
                "bare": lambda: model.invoke(prompt),
                "noop": lambda: model.invoke(prompt, noop),
                "ours": lambda: model.invoke(prompt, ours),
                "guard": lambda: guarded.invoke(prompt),
            },
            300,
        )
        floor, added, guard = (times[name] - times["bare"] for name in ("noop", "ours", "guard"))
        row("bare invoke", f"{times['bare']:.1f} us", "-")
        row("no-op inline handler, added", f"{floor:.1f} us", "-")
        row("ClevAgentCallbackHandler, added", f"{added:.1f} us ({added / floor:.2f} x)", "<= 2.5 x the no-op")
        row("guard(model), added", f"{guard:.1f} us", "<= 20 us")

        async def gather_times() -> dict[str, float]:
            names = {"bare": (model, None), "noop": (model, noop), "ours": (model, ours), "guard": (guarded, None)}
            best = dict.fromkeys(names, float("inf"))
            for _ in range(BLOCKS):
                for name, (what, config) in names.items():
                    start = time.thread_time()
                    for _ in range(200):
                        await what.ainvoke(prompt, config)
                    best[name] = min(best[name], (time.thread_time() - start) / 200)
            return {name: seconds * 1e6 for name, seconds in best.items()}

        times = asyncio.run(gather_times())
        floor, added, guard = (times[name] - times["bare"] for name in ("noop", "ours", "guard"))
        row("ainvoke: no-op inline handler, added", f"{floor:.1f} us", "-")
        row("ainvoke: ClevAgentCallbackHandler, added", f"{added:.1f} us ({added / floor:.2f} x)", "<= 1.6 x the no-op")
        row("ainvoke: guard(model), added", f"{guard:.1f} us", "-")

        short = [HumanMessage("hello " * 10), AIMessage("fine " * 10)]
        long = [HumanMessage("hello " * 50) if index % 2 == 0 else AIMessage("fine " * 50) for index in range(51)]
        fresh = [HumanMessage("y" * 40_000)]
        for name, what, config, bare_config in (
            ("handler", model, ours, noop),
            ("guard", guarded, None, None),
        ):
            times = interleaved(
                {
                    "short": lambda what=what, config=config: what.invoke(short, config),
                    "long": lambda what=what, config=config: what.invoke(long, config),
                    "bare_short": lambda bare_config=bare_config: model.invoke(short, bare_config),
                    "bare_long": lambda bare_config=bare_config: model.invoke(long, bare_config),
                },
                200,
            )
            row(f"{name}: 51 messages against 2, whole invoke", f"{times['long'] / times['short']:.2f} x", "<= 1.3 x")
            extra = (times["long"] - times["bare_long"]) - (times["short"] - times["bare_short"])
            row(f"{name}: what 49 known messages add to its cost", f"{extra:.1f} us", "-")
        counter = iter(range(10**9))

        def new_prompt(size: int, config: Any) -> Callable[[], object]:
            def call() -> object:
                number = f"{next(counter):08d}"
                return model.invoke([HumanMessage(number + "y" * size)], config)

            return call

        times = interleaved(
            {
                "small": new_prompt(172, ours),
                "large": new_prompt(40_000, ours),
                "bare_small": new_prompt(172, noop),
                "bare_large": new_prompt(40_000, noop),
            },
            200,
        )
        extra = (times["large"] - times["small"]) - (times["bare_large"] - times["bare_small"])
        row("40 KB of new prompt against 180 B, added", f"{extra:.1f} us", "<= +60 us")
        del fresh

        for name, what, config in (
            ("no-op handler", model, noop),
            ("ClevAgentCallbackHandler", model, ours),
            ("guard(model)", guarded, None),
        ):
            for _ in range(500):
                what.invoke(prompt, config)
            gc.collect()
            before = sys.getallocatedblocks()
            for _ in range(10_000):
                what.invoke(prompt, config)
            gc.collect()
            row(f"{name}: live blocks after 10 000 invokes", f"{sys.getallocatedblocks() - before:+d}", "0")


def imports() -> None:
    print("\nimports (fresh interpreters, fastest of 7)")

    # As what is installed: compiled once.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def fastest(statement: str) -> float:
        code = f"import time; t = time.process_time(); {statement}; print(time.process_time() - t)"
        return min(float(subprocess.check_output([sys.executable, "-c", code], env=environment)) for _ in range(7)) * 1e3

    row("import pluggy", f"{fastest('import pluggy'):.0f} ms", "-")
    row("import clevagent", f"{fastest('import clevagent'):.0f} ms", "<= 60 ms")
    row("import clevagent; clevagent.init()", f"{fastest('import clevagent; clevagent.init()'):.0f} ms", "-")


PARTS: dict[str, tuple[Callable[[], None], str]] = {
    "imports": (imports, "Imports: CPU time in fresh interpreters, the fastest of 7"),
    "core": (core, "The core, without a framework: check, reserve, settle"),
    "langchain": (langchain, "LangChain: added to a model that answers at once"),
}


def main(wanted: set[str]) -> None:
    for name, (part, title) in PARTS.items():
        if not wanted or name in wanted:
            ROWS.clear()
            part()
            contribute(f"hot_paths_{name}", [Section(title=title, header=("", "measured", "target"), rows=list(ROWS))])


if __name__ == "__main__":
    main(set(sys.argv[1:]))
