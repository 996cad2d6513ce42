"""A plugin of one's own, in one file: a guard that keeps agents from the model at night, and an observer that keeps a diary.

    pip install .
    python examples/own_plugin.py

A plugin is any object with methods that carry ``@hookimpl``. A package makes one known to every program that installs it by an
entry point of the group ``clevagent``.
"""

from datetime import UTC, datetime

import clevagent
from clevagent import Incident, Stop, hookimpl
from clevagent.testing import FakeClock


class QuietHours:
    """Refuses model calls between 22:00 and 6:00, UTC; a tool may run at any time."""

    fails_closed = True  # if this guard itself fails, the call is refused

    def __init__(self, clock):
        self.clock = clock

    @hookimpl
    def clevagent_before_call(self, run, call):
        """Answer None to let the call pass, Stop to refuse it before it is sent."""
        hour = datetime.fromtimestamp(self.clock.wall(), UTC).hour
        if isinstance(call, clevagent.ToolCall) or 6 <= hour < 22:
            return None
        message = f"It is {hour}:00, and models are called from 6:00 to 22:00 only. Try again in the morning."
        return Stop(incident=Incident(kind="quiet-hours", message=message, run_id=run.run_id, action="raise"))


class Diary:
    """Writes down what was spent; an observer is told, and cannot stop anything."""

    @hookimpl
    def clevagent_run_ended(self, run, summary):
        """Hear that a run is over."""
        if summary.total.calls or summary.refusals:
            print(f"diary: {summary.total.calls} calls, ${summary.total.cost_usd:.4f}, {summary.refusals} refused")


clock = FakeClock()
clevagent.init(plugins=[QuietHours(clock), Diary()], prices={"my-model": clevagent.Price(input=1, output=5)})
for hours in (12, 12):
    clock.advance(hours * 3600)
    with clevagent.run():
        try:
            with clevagent.llm_call(model="my-model", input="Write the report.", max_output_tokens=500) as call:
                call.settle(input_tokens=1_000, output_tokens=400)  # send the request here
        except clevagent.Stopped as refusal:
            print("Stopped:", refusal)
clevagent.shutdown()
