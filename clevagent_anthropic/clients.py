"""Clients of Anthropic's SDK, one or all: see ``clevagent_core.providers.clients`` for how they are guarded."""

from __future__ import annotations

# Not public, and what every client derives from since the SDKs are generated: the one place through which all requests go.
from anthropic._base_client import AsyncAPIClient, SyncAPIClient

from clevagent_anthropic.endpoints import plan
from clevagent_core.providers.clients import Clients

clients = Clients((SyncAPIClient, AsyncAPIClient), plan)
