"""All peers, in the order of the tables."""

from __future__ import annotations

import importlib
from types import ModuleType

from benchmarks.peers.ways import Way

PEERS = ("agentbudget", "agentguard47", "floe_guard", "shekel", "langfuse", "langsmith", "ours")
LEFT_OUT: dict[str, str] = {}
"""Peers that cannot be installed with the others, and why."""


def peer(name: str) -> ModuleType:
    """Import one peer's module, which imports the peer itself only when it is attached."""
    return importlib.import_module(f"benchmarks.peers.{name}")


def ways() -> list[tuple[str, str, Way]]:
    """List ``(peer, way, Way)`` of everyone."""
    return [(name, key, way) for name in PEERS for key, way in peer(name).WAYS.items()]


def distributions() -> list[str]:
    """What was measured, for its versions."""
    return [peer(name).DISTRIBUTION for name in PEERS] + ["langchain-core", "langchain-openai", "openai"]
