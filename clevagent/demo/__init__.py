"""What ``clevagent demo`` shows: agents that spend too much, without a guard and with one, against a provider that bills."""

from __future__ import annotations
