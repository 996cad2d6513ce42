"""What watching costs: microseconds and memory blocks that a peer adds to a call of a LangChain model that answers at once.

    .venv-peers/bin/python -m benchmarks.peers.costs                       # everyone, each in a process of its own
    .venv-peers/bin/python -m benchmarks.peers.costs langfuse.handler URL  # one, in this process, as JSON; URL takes what it sends

Within the process of a peer, the bare model, a handler that does nothing and the peer take turns in blocks (A B C A B C ...); the
fastest block of each is compared. That reproduces within a few per cent where single times on a busy machine do not.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a file: Python put this folder on the path, not the one that holds the package
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.counting import blocks_left, blocks_taken, no_collection
from benchmarks.peers import listed
from benchmarks.peers.stub import Collector
from benchmarks.peers.ways import Attached, Setting, instant_model, stay_here, through
from benchmarks.results import Section, contribute

UNSEEN = frozenset({"shekel"})
"""It patches OpenAI's clients, which the model here does not use: its work on a model call would not show."""
ROOT = Path(__file__).resolve().parents[2]
BLOCKS = 30
CALLS = 100
LIVE_CALLS = 2000
TIMEOUT_S = 240
HEADER = (
    "",
    "sync: caller's thread",
    "against no-op",
    "sync: whole process",
    "`ainvoke`: whole process",
    "against no-op",
    "blocks taken, above no-op",
    f"blocks left after {LIVE_CALLS:,} calls".replace(",", " "),
)
NOTE = f"""\
Added to a LangChain model that answers at once, in microseconds of CPU time a call, against the bare model; and as a multiple of what
an inline handler that does nothing adds (the median of what it adds in each of the processes). Fastest of {BLOCKS} blocks of {CALLS} calls, taken in turn. *Caller's
thread* is what the agent waits for; *whole process* also has the threads that the peer keeps, until everything it queued was sent (to a
stub on the same machine that takes all of it). *Blocks taken* counts the blocks of memory that one call takes from CPython's allocator
(`sys.getallocatedblocks()`, looked at before each bytecode instruction; median of 25 calls, the caller's thread), given back or not.
*Blocks left* are still in use after {LIVE_CALLS} calls, a flush and a collection. Whatever a peer logs is discarded. agentbudget's loop
detection is set to a window of a millisecond, as it goes through all calls of its window at each call. shekel has no handler for models:
it patches the OpenAI clients, which this model does not use, so it is not in this table."""


class Times(NamedTuple):
    """Seconds of CPU time for one call, by the calling thread and by the whole process."""

    thread: float
    process: float

    def least(self, other: Times) -> Times:
        """Take the smaller of each."""
        return Times(min(self.thread, other.thread), min(self.process, other.process))


NEVER = Times(float("inf"), float("inf"))


@contextlib.contextmanager
def timed(attached: Attached, block: list[Times]) -> Iterator[None]:
    """Time what is inside; the process goes on until everything was sent."""
    process, thread = time.process_time(), time.thread_time()
    yield
    thread = time.thread_time() - thread
    attached.flush()
    block.append(Times(thread / CALLS, (time.process_time() - process) / CALLS))


def sync_times(alternatives: Mapping[str, Attached]) -> dict[str, Times]:
    """Take the fastest block of each alternative, in turn."""
    best = dict.fromkeys(alternatives, NEVER)
    for attached in alternatives.values():
        for _ in range(CALLS):
            attached.call()
    with no_collection():
        for _ in range(BLOCKS):
            for name, attached in alternatives.items():
                block: list[Times] = []
                with timed(attached, block):
                    for _ in range(CALLS):
                        attached.call()
                best[name] = best[name].least(block[0])
    return best


async def async_times(alternatives: Mapping[str, Attached]) -> dict[str, Times]:
    """Do the same with ``ainvoke``, one call after the other."""
    best = dict.fromkeys(alternatives, NEVER)
    for attached in alternatives.values():
        for _ in range(CALLS):
            await attached.acall()
    with no_collection():
        for _ in range(BLOCKS):
            for name, attached in alternatives.items():
                block: list[Times] = []
                with timed(attached, block):
                    for _ in range(CALLS):
                        await attached.acall()
                best[name] = best[name].least(block[0])
    return best


def no_op(model: Any) -> Attached:
    """Attach a handler that does nothing, in the cheapest way: the floor."""
    from langchain_core.callbacks import BaseCallbackHandler

    class NoOp(BaseCallbackHandler):
        raise_error = True
        run_inline = True

        def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
            """Do nothing."""

        def on_llm_end(self, *args: Any, **kwargs: Any) -> None:
            """Do nothing."""

    return through(model, {"callbacks": [NoOp()]}, float)


def one(name: str, collector_url: str, folder: Path) -> dict[str, Any]:
    """Measure one way in this process."""
    peer, _, key = name.partition(".")
    way = listed.peer(peer).WAYS[key]
    model = instant_model()
    bare = through(model, None, float)
    floor = no_op(model)
    with way.attach(model, Setting(collector_url=collector_url, folder=folder)) as attached:
        alternatives = {"bare": bare, "no-op": floor, "peer": attached}
        sync = sync_times(alternatives)
        blocks = {each: blocks_taken(what.call) for each, what in alternatives.items()}
        left = blocks_left(flushing(attached), LIVE_CALLS)
        with asyncio.Runner() as runner:
            asynchronous = runner.run(async_times(alternatives))
    return {
        "sync": {each: times._asdict() for each, times in sync.items()},
        "async": {each: times._asdict() for each, times in asynchronous.items()},
        "taken": blocks,
        "left": left,
    }


def flushing(attached: Attached) -> Callable[[], object]:
    """Call, and send now and then: what waits in a queue is not what is left."""
    calls = iter(range(1, sys.maxsize))

    def call() -> None:
        attached.call()
        if next(calls) % 100 == 0:
            attached.flush()

    return call


def in_its_own_process(name: str) -> dict[str, Any]:
    """Run one way in a fresh interpreter, with the collector in this one."""
    with Collector() as collector:
        command = [sys.executable, "-m", "benchmarks.peers.costs", name, collector.url]
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=TIMEOUT_S)
        if done.returncode:
            raise RuntimeError(f"{name} was not measured, its process ended with {done.returncode}:\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1]) | {"received": collector.received}


def added(found: dict[str, Any], kind: str, clock: str, what: str) -> float:
    """Microseconds a call, above the bare model."""
    return (found[kind][what][clock] - found[kind]["bare"][clock]) * 1e6


class Floor(NamedTuple):
    """What a handler that does nothing adds: the median of all processes, since it is a small difference of large numbers."""

    thread: float
    process: float
    asynchronous: float

    @classmethod
    def of(cls, everything: Iterable[dict[str, Any]]) -> Floor:
        """Look at each process's own floor."""
        each = [
            [added(found, kind, clock, "no-op") for found in everything]
            for kind, clock in (("sync", "thread"), ("sync", "process"), ("async", "process"))
        ]
        return cls(*map(statistics.median, each))

    def row(self) -> list[str]:
        """Write it as the first row."""
        own = [f"{self.thread:.1f}", "1.0x", f"{self.process:.1f}", f"{self.asynchronous:.1f}", "1.0x", "0", ""]
        return ["a handler that does nothing, inline", *own]


def cells(who: str, found: dict[str, Any], floor: Floor) -> list[str]:
    """Write one row."""
    sync, whole = added(found, "sync", "thread", "peer"), added(found, "sync", "process", "peer")
    asynchronous = added(found, "async", "process", "peer")
    return [
        who,
        f"{sync:.1f}",
        f"{sync / floor.thread:.1f}x",
        f"{whole:.1f}",
        f"{asynchronous:.1f}",
        f"{asynchronous / floor.asynchronous:.1f}x",
        f"{found['taken']['peer'] - found['taken']['no-op']:+d}",
        f"{found['left']:+d}",
    ]


def measure() -> int:
    """Measure everyone who works on a LangChain model; print, and leave the table for the report."""
    everything: dict[str, dict[str, Any]] = {}
    for peer, key, way in listed.ways():
        if way.takes_model and peer not in UNSEEN:
            who = f"{listed.peer(peer).DISTRIBUTION}: {way.label}"
            print(f"measuring {who}", flush=True)
            everything[who] = in_its_own_process(f"{peer}.{key}")
    floor = Floor.of(list(everything.values()))
    rows = [floor.row(), *(cells(who, found, floor) for who, found in everything.items())]
    for row in [HEADER, *rows]:
        print(" | ".join(row))
    sent = [f"{who} sent {said(*found['received'])}." for who, found in everything.items() if found["received"][0]]
    print(*sent, sep="\n")
    contribute("peer_costs", [section(rows, sent)], distributions=listed.distributions())
    return 0


def said(requests: int, size: int) -> str:
    """Write what the collector received."""
    return f"{requests} requests with {size / 1e6:.1f} MB"


def section(rows: list[list[str]], sent: list[str]) -> Section:
    """Make the table. Ours stands in bold."""
    ours = listed.peer("ours").DISTRIBUTION
    shown = [[f"**{cell}**" if cell and row[0].startswith(ours) else cell for cell in row] for row in rows]
    return Section(
        title="What watching costs in the agent's process", header=HEADER, rows=shown, note="\n\n".join([NOTE, " ".join(sent)])
    )


def main(arguments: list[str]) -> int:
    """Measure everyone, or one way in this process."""
    if not arguments:
        return measure()
    stay_here()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    name, collector_url = arguments
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        print(json.dumps(one(name, collector_url, Path(folder))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
