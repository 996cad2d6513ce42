"""Clients of OpenAI's SDK, one or all: see ``clevagent_core.providers.clients`` for how they are guarded."""

from __future__ import annotations

# Not public, and what every client derives from since the SDKs are generated: the one place through which all requests go.
from openai._base_client import AsyncAPIClient, SyncAPIClient

from clevagent_core.providers.clients import Clients
from clevagent_openai.endpoints import plan

clients = Clients((SyncAPIClient, AsyncAPIClient), plan)
