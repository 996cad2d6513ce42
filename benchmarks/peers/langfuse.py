"""Langfuse: its LangChain handler, sending to a stub on this machine. It has no ceilings; here for what watching costs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.peers.ways import Attached, Setting, Way, no_account, through

DISTRIBUTION = "langfuse"


@contextmanager
def _handler(model: Any, setting: Setting) -> Iterator[Attached]:
    from langfuse import Langfuse
    from langfuse.langchain import CallbackHandler

    client = Langfuse(public_key="pk-lf-test", secret_key="sk-lf-test", base_url=setting.collector_url)
    handler = CallbackHandler(public_key="pk-lf-test")
    yield through(model, {"callbacks": [handler]}, no_account, flush=client.flush)
    client.shutdown()


WAYS = {"handler": Way(label="LangChain handler", attach=_handler, takes_model=True, has_ceiling=False)}
