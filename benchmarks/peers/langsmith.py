"""LangSmith: its LangChain tracer, sending to a stub on this machine. It has no ceilings; here for what watching costs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.peers.ways import Attached, Setting, Way, no_account, through

DISTRIBUTION = "langsmith"


@contextmanager
def _tracer(model: Any, setting: Setting) -> Iterator[Attached]:
    from langchain_core.tracers.langchain import LangChainTracer
    from langsmith import Client

    client = Client(api_url=setting.collector_url, api_key="test")
    tracer = LangChainTracer(project_name="benchmark", client=client)
    yield through(model, {"callbacks": [tracer]}, no_account, flush=client.flush)
    client.flush()


WAYS = {"tracer": Way(label="LangChain tracer", attach=_tracer, takes_model=True, has_ceiling=False)}
