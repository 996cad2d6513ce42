"""The OpenAI adapter as a plugin."""

from __future__ import annotations

from clevagent_core.providers.plugin import ClientPlugin


class OpenAIPlugin(ClientPlugin):
    """Guards clients of OpenAI's SDK, and attaches to all of them."""

    sdk = "openai"
    adapter = "clevagent_openai.clients"
