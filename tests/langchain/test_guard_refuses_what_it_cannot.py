"""What a guarded model cannot do is refused where it is asked for, with the way that can."""

from __future__ import annotations

import pytest

import clevagent
from clevagent import Budget, UsageError


def test_a_limit_on_tool_calls_is_refused_by_a_model_that_sees_none(chat):
    with pytest.raises(UsageError) as refused:
        clevagent.guard(chat(), budgets=[Budget(usd=1), Budget(tool_calls=5)])
    assert str(refused.value) == (
        "guard(model, budgets=['5 tool_calls per run']) limits tool calls, but a model is not asked when a tool is run, so the "
        "limit would never hold. Give it to clevagent.run(budgets=[...]) and attach what sees tools: "
        "clevagent.init(attach=['langchain']), or callbacks=[ClevAgentCallbackHandler()]."
    )


@pytest.mark.parametrize("action", ["halt", "ask"])
def test_an_action_that_nothing_attached_can_carry_out_is_refused(chat, action):
    with pytest.raises(UsageError, match=f"on_exceed='{action}'.*Use on_exceed='raise'"):
        clevagent.guard(chat(), budgets=[Budget(usd=1)], on_exceed=action)


def test_an_action_without_budgets_of_its_own_is_refused(chat):
    with pytest.raises(UsageError, match="has no budgets of its own"):
        clevagent.guard(chat(), on_exceed="warn")
