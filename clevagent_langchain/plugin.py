"""The LangChain adapter as a plugin."""
from clevagent_core.hookspecs import hookimpl


class LangChainPlugin:
    """Finds chat models to guard."""

    @hookimpl
    def clevagent_guard(self, obj):
        return None
