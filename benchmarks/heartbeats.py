"""What heartbeats cost: the ping on the caller's thread, the beat and its sending on ours, and memory over a simulated week.

python benchmarks/heartbeats.py
"""

from __future__ import annotations

import gc
import logging
import sys
import threading
import time
from collections import deque
from pathlib import Path

if not __package__:  # run as a file: Python put this folder on the path, not the one that holds the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import clevagent
from benchmarks.hot_paths import ROWS, interleaved, row
from benchmarks.results import Section, contribute
from clevagent import Price, Watchdog
from clevagent.testing import FakeClock, HeartbeatReceiver
from clevagent_core.calls import LLMCall, Step, Usage

WEEK_S = 7 * 24 * 3600
SENT = 2000
"""How many beats the CPU time of the sender is taken over."""


def pings() -> None:
    """Time a ping on the caller's thread, against the least that one could do."""
    floor: deque[int] = deque(maxlen=1000)
    clevagent.init(agent="bench")
    times = interleaved(
        {
            "append": lambda: floor.append(1),
            "ping": clevagent.ping,
            "told": lambda: clevagent.ping("step_complete", message="page 3", iteration_count=3),
            "meta": lambda: clevagent.ping("step_complete", meta={"page": 3, "of": [7, 8]}),
        },
        5000,
    )
    clevagent.shutdown()
    row("deque.append", f"{times['append']:.2f} us", "-")
    row("clevagent.ping()", f"{times['ping']:.2f} us", "<= 2 us")
    row("clevagent.ping() with a message and an iteration", f"{times['told']:.2f} us", "-")
    row("clevagent.ping() with nested meta, written as JSON at once", f"{times['meta']:.2f} us", "-")


def beats() -> None:
    """Time the making of a beat, for a process with one model, and for one with 1 000 runs at once."""
    clock = FakeClock()
    watchdog = Watchdog(clock=clock, prices={"bench": Price(input=1, output=1)})
    call = LLMCall(model="bench", input=["x"], max_output_tokens=1)
    watchdog.process_run.open(call).settle(Usage(input_tokens=1, output_tokens=1))
    pulse = watchdog.pulse
    assert pulse is not None

    def beat() -> None:
        pulse._assemble("liveness", None).to_wire()

    alone = interleaved({"alone": beat}, 500)["alone"]
    runs = [watchdog.start_run(inherited=False) for _ in range(1000)]
    for run in runs:
        run.open(call).settle(Usage(input_tokens=1, output_tokens=1))
    many = interleaved({"many": beat}, 20)["many"]
    row("a beat is made (every 30 s)", f"{alone:.0f} us", "-")
    row("the same, with 1 000 runs at once", f"{many:.0f} us", "-")
    for run in runs:
        run.end()
    watchdog.shutdown()


def sender() -> None:
    """Take the CPU time of the sender's thread, for each beat that is delivered."""
    from clevagent_core.clock import SystemClock
    from clevagent_heartbeat.sender import Sender

    watchdog = Watchdog(clock=FakeClock())
    pulse = watchdog.pulse
    assert pulse is not None
    with HeartbeatReceiver() as receiver:
        posts = Sender(endpoint=receiver.url, api_key=None, clock=SystemClock(), spool=None, on_answer=lambda _: None)
        posts.send(pulse._assemble("liveness", None).to_wire())
        posts.flush(10)
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "clevagent-sender"]
        clock_id = time.pthread_getcpuclockid(thread.ident or 0)
        before = time.clock_gettime(clock_id)
        for _ in range(SENT):
            posts.send(pulse._assemble("liveness", None).to_wire())
            posts.flush(10)
        spent = time.clock_gettime(clock_id) - before
        posts.stop(1)
    row("CPU of the sender's thread for a beat, sent one by one", f"{spent / SENT * 1e6:.0f} us", "-")
    watchdog.shutdown()


def week() -> None:
    """Count the memory blocks that are in use after a simulated week of beats, pings and calls, against after an hour."""
    clock = FakeClock()
    watchdog = Watchdog(clock=clock, prices={"bench": Price(input=1, output=1)}, budgets=[clevagent.Budget(usd=1000, per="day")])
    call = LLMCall(model="bench", input=["x"], max_output_tokens=1)
    usage = Usage(input_tokens=1, output_tokens=1)

    def live(seconds: int) -> int:
        for _ in range(seconds // 30):
            with watchdog.run() as run:
                run.open(call).settle(usage)
                run.step(Step(kind="ping", name="ok", detail={"message": "page"}))
            clock.advance(30)
        gc.collect()
        return sys.getallocatedblocks()

    hour = live(3600)
    later = live(WEEK_S)
    row(f"memory blocks in use after a week ({WEEK_S // 30:,} beats and runs), against an hour", f"{later - hour:+,}", "flat")
    watchdog.shutdown()


def main() -> None:
    """Measure everything."""
    logging.getLogger("clevagent").setLevel(logging.CRITICAL)
    for part in (pings, beats, sender, week):
        part()
    contribute(
        "heartbeats",
        [Section(title="Heartbeats", header=("", "measured", "target"), rows=list(ROWS))],
        distributions=("clevagent", "httpx"),
    )


if __name__ == "__main__":
    main()
