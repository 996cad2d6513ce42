"""Ceilings that hold: a ceiling that fits exactly 10 calls, 50 tried, against a provider on this machine that bills.

    python benchmarks/ceilings.py

Prints what was billed and what was recorded, as shares of the ceiling, for each way in and each way of calling. The provider
bills one token per byte and the whole output limit. Then five processes on one file, also with one of them killed. Then the
realistic rows: prompts billed by a tokenizer's ratio, answers that use a fifth of their limit, histories of 30 turns.
"""

from __future__ import annotations

import asyncio
import contextvars
import io
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, redirect_stdout, suppress
from decimal import Decimal
from pathlib import Path
from threading import Thread
from typing import Any

from langchain_core.messages import AIMessage, HumanMessage
from langchain_openai import ChatOpenAI

if not __package__:  # run as a file: Python put this folder on the path, not the one that holds the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

# CrewAI tells its makers of each kickoff, unless it is told not to.
os.environ |= {"CREWAI_DISABLE_TELEMETRY": "true", "OTEL_SDK_DISABLED": "true", "CREWAI_TRACING_ENABLED": "false"}

import clevagent
from benchmarks.results import Section, contribute
from clevagent import Budget, BudgetExceeded
from clevagent.integrations.langchain import ClevAgentCallbackHandler
from clevagent.testing import LoopbackProvider, Reply

PROMPT = "x" * 200
LIMIT = 100
ONE = 200 * 2_500_000 + LIMIT * 10_000_000
"""What one call is billed, in pico-USD: gpt-4o, $2.50 and $10 for a million tokens."""
CEILING = 10 * ONE
TRIES = 50
PROCESSES = 5


def chat(url: str, **settings: Any) -> ChatOpenAI:
    return ChatOpenAI(model="gpt-4o", api_key="test", base_url=url, **settings)


@contextmanager
def refusals() -> Iterator[None]:
    with suppress(BudgetExceeded):
        yield


def attempt(call: Callable[[], object]) -> None:
    with refusals():
        call()


async def attempt_async(call: Callable[[], Awaitable[object]]) -> None:
    with refusals():
        await call()


def sequential(call: Callable[[], object]) -> None:
    for _ in range(TRIES):
        attempt(call)


def threads(call: Callable[[], object]) -> None:
    workers = [Thread(target=attempt, args=(call,)) for _ in range(TRIES)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def break_off(stream: Iterator[object]) -> None:
    for _ in stream:
        break


class Ways:
    """One way in: how it makes a call, plainly, asynchronously, and streaming."""

    writes_its_prompt = False
    """Whether the framework writes the prompt, so that what a call is billed has to be seen first."""

    def __init__(self, model: Any = None, config: Any = None) -> None:
        self.model, self.config = model, config

    def call(self) -> object:
        return self.model.invoke(PROMPT, self.config)

    async def acall(self) -> object:
        return await self.model.ainvoke(PROMPT, self.config)

    def broken(self) -> None:
        break_off(self.model.stream(PROMPT, self.config))


class Door(Ways):
    """The framework-free door, around requests of the plain SDK's kind."""

    def __init__(self, url: str) -> None:
        import openai

        self.client = openai.OpenAI(api_key="test", base_url=url, max_retries=0)
        self.aclient = openai.AsyncOpenAI(api_key="test", base_url=url, max_retries=0)
        self.request: dict[str, Any] = {"model": "gpt-4o", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": LIMIT}

    def call(self) -> object:
        with clevagent.llm_call(model="gpt-4o", input=PROMPT, max_output_tokens=LIMIT) as call:
            usage = self.client.chat.completions.create(**self.request).usage
            call.settle(input_tokens=usage.prompt_tokens, output_tokens=usage.completion_tokens)
        return usage

    async def acall(self) -> object:
        async with clevagent.llm_call(model="gpt-4o", input=PROMPT, max_output_tokens=LIMIT) as call:
            usage = (await self.aclient.chat.completions.create(**self.request)).usage
            call.settle(input_tokens=usage.prompt_tokens, output_tokens=usage.completion_tokens)
        return usage

    def broken(self) -> None:
        with clevagent.llm_call(model="gpt-4o", input=PROMPT, max_output_tokens=LIMIT):
            break_off(iter(self.client.chat.completions.create(**self.request, stream=True)))


class Client(Ways):
    """OpenAI's clients, with the SDK's retries on."""

    def __init__(self, url: str) -> None:
        import openai

        self.client = clevagent.guard(openai.OpenAI(api_key="test", base_url=url))
        self.aclient = clevagent.guard(openai.AsyncOpenAI(api_key="test", base_url=url))
        self.request: dict[str, Any] = {"model": "gpt-4o", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": LIMIT}

    def call(self) -> object:
        return self.client.chat.completions.create(**self.request)

    async def acall(self) -> object:
        return await self.aclient.chat.completions.create(**self.request)

    def broken(self) -> None:
        break_off(iter(self.client.chat.completions.create(**self.request, stream=True)))


class Graph(Ways):
    """A graph of one node, guarded as a whole: its model is nobody's business."""

    def __init__(self, url: str) -> None:
        from langgraph.graph import START, StateGraph

        model = chat(url, max_tokens=LIMIT, max_retries=0)
        node = lambda _: {"text": model.invoke(PROMPT).text}  # noqa: E731 - one of two nodes, of which LangGraph takes what it needs

        async def anode(_: object) -> dict[str, str]:
            return {"text": (await model.ainvoke(PROMPT)).text}

        self.graph = clevagent.guard(StateGraph(dict).add_node("ask", node).add_edge(START, "ask").compile())
        self.agraph = clevagent.guard(StateGraph(dict).add_node("ask", anode).add_edge(START, "ask").compile())

    def call(self) -> object:
        return self.graph.invoke({})

    async def acall(self) -> object:
        return await self.agraph.ainvoke({})

    def broken(self) -> None:
        break_off(self.graph.stream({}, stream_mode="messages"))


class Crew(Ways):
    """A crew of one agent with one task, guarded as a whole."""

    writes_its_prompt = True

    def __init__(self, url: str) -> None:
        import crewai

        def crew() -> Any:
            llm = crewai.LLM(model="openai/gpt-4o", base_url=url, api_key="test", max_tokens=LIMIT)
            agent = crewai.Agent(role="Clerk", goal="Answer", backstory="Brief.", llm=llm)
            return crewai.Crew(agents=[agent], tasks=[crewai.Task(description=PROMPT, expected_output="A word", agent=agent)])

        self.crew = clevagent.guard(crew())
        self.streaming = crew()
        self.streaming.stream = True
        self.streaming = clevagent.guard(self.streaming)

    def call(self) -> object:
        # An agent of CrewAI does one thing at a time.
        return self.crew.copy().kickoff()

    async def acall(self) -> object:
        return await self.crew.copy().akickoff()

    def broken(self) -> None:
        with closing(iter(self.streaming.copy().kickoff())) as chunks:
            break_off(chunks)


WAYS: dict[str, Callable[[str], Ways]] = {
    "guard(model), limit set": lambda url: Ways(clevagent.guard(chat(url, max_tokens=LIMIT))),
    "guard(model), no limit": lambda url: Ways(clevagent.guard(chat(url))),
    "handler, limit set, max_retries=0": lambda url: Ways(
        chat(url, max_tokens=LIMIT, max_retries=0), {"callbacks": [ClevAgentCallbackHandler()]}
    ),
    "llm_call(), no framework": Door,
    "guard(client)": Client,
    "guard(graph), limit set, max_retries=0": Graph,
    "guard(crew)": Crew,
}


def in_run(runner: asyncio.Runner, mode: str, ways: Ways) -> None:
    if mode == "sequential":
        sequential(ways.call)
    elif mode == "threads x50":
        threads(ways.call)
    elif mode == "stream broken off":
        sequential(ways.broken)
    else:

        async def all_at_once() -> None:
            await asyncio.gather(*(attempt_async(ways.acall) for _ in range(TRIES)))

        runner.run(all_at_once(), context=contextvars.copy_context())


def ceiling_of(ways: Ways, provider: LoopbackProvider) -> int:
    """Work out what ten calls are billed, in pico-USD."""
    if not ways.writes_its_prompt:
        return CEILING
    ways.call()
    one = provider.billed_pico
    provider.reset()
    return 10 * one


def exact_rows(runner: asyncio.Runner) -> tuple[bool, Section]:
    modes = ("sequential", "asyncio x50", "threads x50", "stream broken off")
    print("A ceiling that fits exactly 10 calls, 50 tried: billed (recorded), as shares of the ceiling")
    print(f"{'':<36}" + "".join(f"{mode:>22}" for mode in modes))
    held, rows = True, []
    with LoopbackProvider() as provider:
        for name, make in WAYS.items():
            cells = []
            for mode in modes:
                provider.reset()
                clevagent.shutdown()
                ways = make(provider.openai_url)
                ceiling = ceiling_of(ways, provider)
                # CrewAI prints what it makes of an exception.
                with clevagent.run(budgets=[Budget(usd=Decimal(ceiling) / 10**12)]) as run, redirect_stdout(io.StringIO()):
                    in_run(runner, mode, ways)
                billed, recorded = provider.billed_pico / ceiling, run.summary().total.cost_usd * 1e12 / ceiling
                held = held and provider.billed_pico <= ceiling
                cells.append(f"{billed:.3f} ({recorded:.3f})")
            rows.append((name, *cells))
            print(f"{name:<36}" + "".join(f"{cell:>22}" for cell in cells))
    note = "Ten calls fit, 50 are tried: billed by the provider (and recorded), as shares of the ceiling."
    return held, Section(title="ClevAgent's ceilings, each way in", header=("", *modes), rows=rows, note=note, marker="ways-in")


def worker(name: str, url: str, ledger: str, ceiling: str) -> None:
    """Be one of several processes on one ceiling: try the same number of calls as each of the others."""
    logging.disable(logging.ERROR)
    clevagent.init(ledger=ledger, budgets=[Budget(usd=Decimal(ceiling) / 10**12, per="lifetime")])
    ways = WAYS[name](url)
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(TRIES // PROCESSES):
        attempt(ways.call)
    clevagent.shutdown()


def start(name: str, url: str, ledger: Path, ceiling: int) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).resolve()), name, url, str(ledger), str(ceiling)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    process.stdin.write("go\n")
    process.stdin.flush()


def with_processes(name: str, provider: LoopbackProvider, ceiling: int, *, kills: bool) -> None:
    """Let five processes try; with ``kills``, one of them dies while its first call is under way, and another takes its place."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = Path(folder) / "ledger.db"
        if kills:
            victim = start(name, provider.openai_url, ledger, ceiling)
            go(victim)
            while not provider.request_count:
                time.sleep(0.001)
            victim.kill()
            victim.communicate()
        workers = [start(name, provider.openai_url, ledger, ceiling) for _ in range(PROCESSES)]
        for process in workers:
            go(process)
        for process in workers:
            process.communicate()


def process_rows() -> tuple[bool, Section]:
    modes = ("5 processes", "5 processes, one more killed in a call")
    print("\nThe same, one ceiling in a file: billed, as shares of it")
    held, rows = True, []
    for name, make in WAYS.items():
        cells = []
        for kills in (False, True):
            with LoopbackProvider([Reply(delay_s=0.1)]) as provider:
                clevagent.shutdown()
                ceiling = ceiling_of(make(provider.openai_url), provider)
                with_processes(name, provider, ceiling, kills=kills)
            held = held and provider.billed_pico <= ceiling
            cells.append(f"{provider.billed_pico / ceiling:.3f}")
        rows.append((name, *cells))
        print(f"{name:<36}" + "".join(f"{cell:>22}" for cell in cells), flush=True)
    note = "Processes share a ceiling for ten calls in a SQLite file; each tries ten. The killed one's call was billed, and told nobody."
    return held, Section(title="One ceiling, several processes", header=("", *modes), rows=rows, note=note)


def realistic_rows() -> tuple[bool, Section]:
    print("\nRealistic: 30-turn histories, answers of a fifth of their limit, guard(model); billed share of the ceiling")
    english = "The committee met on Tuesday to weigh the proposal, and nobody could say whether the figures still held. "
    json_text = '{"id": 4711, "name": "Ada", "tags": ["loop", "engine"], "score": 0.93, "active": true}, '
    held, rows = True, []
    for name, text, ratio in (("English, 0.22 tokens a byte", english, 0.22), ("JSON, 0.5 tokens a byte", json_text, 0.5)):
        for workers in (1, 8):
            with LoopbackProvider(tokens_per_byte=ratio, output_share=0.2) as provider:
                clevagent.shutdown()
                model = clevagent.guard(chat(provider.openai_url, max_tokens=300))
                ceiling = 0.12 * workers

                def conversation(index: int, model: Any = model, text: str = text) -> None:
                    messages: list[Any] = []
                    for turn in range(30):
                        messages.append(HumanMessage(f"{index}.{turn} {text * 3}"))
                        model.invoke(messages)
                        messages.append(AIMessage(text * 2))

                with clevagent.run(budgets=[Budget(usd=ceiling)]), ThreadPoolExecutor(workers) as pool:
                    # More conversations than the ceiling can pay for.
                    futures = [
                        pool.submit(contextvars.copy_context().run, attempt, lambda i=i: conversation(i))
                        for i in range(workers * 12)
                    ]
                    for future in futures:
                        future.result()
                share = provider.billed_pico / (ceiling * 1e12)
                held = held and share <= 1
                target = f">= {0.8 if workers == 1 else 0.7}, <= 1"
                rows.append((f"{name}, {workers} at once", f"{share:.3f}", target))
                print(f"  {name:<32} {workers} at once {share:8.3f}   target {target}")
    note = "Conversations of 30 turns through `guard(model)`; answers use a fifth of their limit, and tokens are fewer than bytes."
    return held, Section(title="How much of a ceiling is used", header=("", "billed / ceiling", "target"), rows=rows, note=note)


def main() -> int:
    # LangChain and CrewAI log what is refused, and ClevAgent does: hundreds of times here.
    logging.disable(logging.ERROR)
    with asyncio.Runner() as runner:
        held, exact = exact_rows(runner)
    all_held, sections = [held], [exact]
    for measure in (process_rows, realistic_rows):
        held, section = measure()
        all_held.append(held)
        sections.append(section)
    contribute("ceilings", sections, distributions=("clevagent", "langchain-openai", "langgraph", "openai", "crewai"))
    return 0 if all(all_held) else 1


if __name__ == "__main__":
    if len(sys.argv) > 1:
        worker(*sys.argv[1:])
    else:
        sys.exit(main())
