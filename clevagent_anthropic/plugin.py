"""The Anthropic adapter as a plugin."""

from __future__ import annotations

from clevagent_core.providers.plugin import ClientPlugin


class AnthropicPlugin(ClientPlugin):
    """Guards clients of Anthropic's SDK, and attaches to all of them."""

    sdk = "anthropic"
    adapter = "clevagent_anthropic.clients"
