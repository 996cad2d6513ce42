"""Public fakes, to test budgets with: a clock that a test moves, a provider on this machine that bills, a receiver of heartbeats.

Nothing here dials out, and nothing beyond the standard library is imported.
"""

from __future__ import annotations

from clevagent.testing.clock import FakeClock
from clevagent.testing.provider import LoopbackProvider
from clevagent.testing.receiver import HeartbeatReceiver, ReceivedCall
from clevagent.testing.replies import ReceivedRequest, Reply

__all__ = ["FakeClock", "HeartbeatReceiver", "LoopbackProvider", "ReceivedCall", "ReceivedRequest", "Reply"]
