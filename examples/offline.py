"""Where the examples get their model: a provider on this machine, or a real one where ``OPENAI_API_KEY`` is set.

The provider on this machine is ClevAgent's own, for tests: it speaks OpenAI's and Anthropic's protocols, answers what an example's
script says, and keeps the bill that a real one would send.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from clevagent.testing import LoopbackProvider, Reply

MODEL = "gpt-4o-mini"
Script = Sequence[Reply] | Callable[[dict[str, Any]], Reply]


@dataclass(frozen=True)
class Access:
    """What a client needs, under the names that the SDKs and LangChain's models use."""

    client: dict[str, str]
    provider: LoopbackProvider | None

    def bill(self) -> str:
        """Tell what the provider billed, where it is ours to know."""
        if self.provider is None:
            return "The real provider keeps the bill."
        return f"The provider received {self.provider.request_count} requests and billed ${self.provider.billed_usd:.6f}."


@contextmanager
def model_access(script: Script) -> Iterator[Access]:
    """Give access to a model; ``script`` is what the provider on this machine answers."""
    if os.environ.get("OPENAI_API_KEY"):
        yield Access({}, None)
        return
    with LoopbackProvider(script) as provider:
        yield Access({"api_key": "offline", "base_url": provider.openai_url}, provider)
