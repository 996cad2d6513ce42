"""The loops of the articles: an agent that tells from inside its work that it moves. Each in two lines.

    pip install .
    python examples/heartbeat_loops.py

The monitor is played by a receiver on this machine; give your own with `endpoint=` and `api_key=`. The loops end after three
rounds here, and their pauses are short.
"""

import asyncio
import time

import clevagent
from clevagent.testing import HeartbeatReceiver

ROUNDS = range(1, 4)  # while True:
PAUSE_S = 0.01  # 60


def work():
    """Do what the agent is there for."""


def plain_loop():
    """A heartbeat in the loop, not beside it: a loop that hangs falls silent."""
    clevagent.init(agent="collector")
    for _ in ROUNDS:
        work()
        clevagent.ping()
        time.sleep(PAUSE_S)


def telling_loop():
    """The same, and how far it is, and what it costs where nothing here sees the calls."""
    clevagent.init(agent="writer")
    for count in ROUNDS:
        work()
        clevagent.ping("step_complete", message=f"chapter {count}", iteration_count=count, tokens_used=1_200, cost_usd=0.0036)
        time.sleep(PAUSE_S)


async def async_loop():
    """The same in an event loop."""
    clevagent.init(agent="listener")
    for count in ROUNDS:
        work()
        clevagent.log_iteration(count)
        await asyncio.sleep(PAUSE_S)


def show(monitor):
    """Print what the monitor knows of each agent when it has ended."""
    for agent in dict.fromkeys(beat["agent"] for beat in monitor.beats):
        last = [beat for beat in monitor.beats if beat["agent"] == agent][-1]
        totals = last["totals"]
        print(f"{agent}: {totals['steps']} steps, {totals['tokens']} tokens, ${totals['cost_usd']:.4f}, ended by a {last['kind']}")


with HeartbeatReceiver() as monitor:
    import os

    os.environ["CLEVAGENT_ENDPOINT"] = monitor.url
    for loop in (plain_loop, telling_loop, lambda: asyncio.run(async_loop())):
        loop()
        clevagent.shutdown()
    del os.environ["CLEVAGENT_ENDPOINT"]
    show(monitor)
