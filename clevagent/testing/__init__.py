"""Public fakes, to test budgets with: a clock that a test moves, and a provider on this machine that bills.

Nothing here dials out, and nothing beyond the standard library is imported.
"""

from __future__ import annotations

from clevagent.testing.clock import FakeClock
from clevagent.testing.provider import LoopbackProvider
from clevagent.testing.replies import ReceivedRequest, Reply

__all__ = ["FakeClock", "LoopbackProvider", "ReceivedRequest", "Reply"]
