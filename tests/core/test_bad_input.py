"""Mistakes in how the doors are used: each is told where it is made, and nothing that was spent is lost."""

from __future__ import annotations

import pytest

import clevagent
from clevagent import Budget, UsageError


@pytest.mark.parametrize("budgets", [Budget(usd=1), None, "usd=1", {"usd": 1}])
def test_budgets_that_are_no_list_are_refused(budgets):
    with pytest.raises(UsageError, match="is no list"):
        clevagent.run(budgets=budgets)
    with pytest.raises(UsageError, match="is no list"):
        clevagent.guard(object(), budgets=budgets)


def test_tags_that_are_no_mapping_are_refused():
    with pytest.raises(UsageError, match="is no mapping"):
        clevagent.run(tags=["tenant"])


@pytest.mark.parametrize(
    ("usage", "said"),
    [
        ({"input_tokens": 1}, "leaves a part of the usage out"),
        ({"output_tokens": 1}, "leaves a part of the usage out"),
        ({"input_tokens": 1, "output_tokens": 1, "cache_read_tokens": 2}, "cached tokens lie inside the input"),
        ({"input_tokens": 1, "output_tokens": 1, "reasoning_tokens": 2}, "reasoning inside the output"),
        ({"input_tokens": -1, "output_tokens": 1}, "is not a token count"),
    ],
)
def test_usage_that_cannot_be_true_leaves_the_call_charged_at_its_bound(usage, said):
    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        with (
            pytest.raises(UsageError, match=said),
            clevagent.llm_call(model="gpt-4o", input="Hello", max_output_tokens=100) as call,
        ):
            call.settle(**usage)
    assert run.summary().calls_charged_at_bound == 1
    assert run.summary().total.cost_usd > 0.001


@pytest.mark.parametrize("tokens", ["12", -12, 1.5, True])
def test_tokens_to_log_that_are_no_count_are_refused(tokens):
    with clevagent.run() as run:
        with pytest.raises(UsageError, match="nothing was recorded"):
            clevagent.log_cost(tokens, cost_usd=1)
    assert run.summary().total.calls == 0


def test_a_node_that_is_no_name_is_refused():
    with pytest.raises(UsageError, match="is no name"):
        clevagent.llm_call(model="gpt-4o", input="Hello", node=5)
    with pytest.raises(UsageError, match="is no name"):
        clevagent.tool_call("search", node=5)


def test_tools_may_be_none_or_a_generator_and_count_as_input():
    schema = {"name": "search", "description": "x" * 5000}
    with clevagent.run(budgets=[Budget(input_tokens=10**6)]) as run:
        with clevagent.llm_call(model="gpt-4o", input="Hello", tools=None, max_output_tokens=1) as call:
            assert run.summary().budgets[0].held < 100
            call.release()
        with clevagent.llm_call(model="gpt-4o", input="Hello", tools=(tool for tool in [schema]), max_output_tokens=1):
            assert run.summary().budgets[0].held > 5000
