"""A pytest plugin that attaches ClevAgent for the whole session, and guards every graph that is compiled.

Named with ``-p``, so it is imported before the tests and what they import. No budget is set: nothing is ever refused.
"""

import functools
from types import ModuleType
from typing import Any

import wrapt
from langchain_core.callbacks import CallbackManager

import clevagent

clevagent.init(attach=["langchain"])
# The first callback manager makes the handler, which completes the attaching: before any test, so that no result hangs on their order.
CallbackManager.configure()


@wrapt.when_imported("langgraph.graph.state")
def guard_graphs(module: ModuleType) -> None:
    """Make ``StateGraph.compile`` return guarded graphs."""
    compile_plainly = module.StateGraph.compile

    @functools.wraps(compile_plainly)
    def compile_guarded(*args: Any, **kw: Any) -> Any:
        return clevagent.guard(compile_plainly(*args, **kw))

    module.StateGraph.compile = compile_guarded
