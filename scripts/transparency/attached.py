"""A pytest plugin that attaches ClevAgent for the whole session, and guards every graph that is compiled.

Named with ``-p``, so it is imported before the tests and what they import. No budget is set: nothing is ever refused.
"""

import functools
from types import ModuleType
from typing import Any

import wrapt

import clevagent

clevagent.init(attach=["langchain"])


@wrapt.when_imported("langgraph.graph.state")
def guard_graphs(module: ModuleType) -> None:
    """Make ``StateGraph.compile`` return guarded graphs."""
    compile_plainly = module.StateGraph.compile

    @functools.wraps(compile_plainly)
    def compile_guarded(*args: Any, **kw: Any) -> Any:
        return clevagent.guard(compile_plainly(*args, **kw))

    module.StateGraph.compile = compile_guarded
