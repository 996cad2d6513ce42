"""Guarding one client or all of them: what stays as it is, what is refused, and how it ends."""

from __future__ import annotations

import subprocess
import sys

import anthropic
import openai
import pytest

import clevagent
from clevagent import Budget, BudgetExceeded, UsageError
from clevagent_langgraph import monitored_node


def ends(api, client):
    with clevagent.run(budgets=[Budget(usd="0.00000001")]), pytest.raises(BudgetExceeded):
        api.ask(client)
    assert api.provider.request_count == 0


def test_a_guarded_client_is_a_copy_of_the_same_kind(api):
    plain = api.client(max_retries=5, timeout=7)
    guarded = clevagent.guard(plain)
    assert guarded is not plain
    assert isinstance(guarded, type(plain))
    assert type(guarded).__name__ == type(plain).__name__
    assert (guarded.max_retries, guarded.timeout, guarded.base_url) == (5, 7, plain.base_url)
    ends(api, guarded)
    with clevagent.run(budgets=[Budget(usd="0.00000001")]):
        api.ask(plain)
    assert api.provider.request_count == 1


def test_a_client_that_was_used_before_it_was_guarded_is_guarded_in_all_its_parts(api):
    plain = api.client()
    api.ask(plain)
    api.provider.reset()
    ends(api, clevagent.guard(plain))


@pytest.mark.parametrize("derive", ["with_options", "copy"])
def test_what_is_derived_from_a_guarded_client_is_guarded(api, derive):
    client = getattr(clevagent.guard(api.client(), budgets=[Budget(llm_calls=1, per="lifetime")]), derive)(timeout=3)
    client = getattr(client, derive)(max_retries=0)
    api.ask(client)
    with pytest.raises(BudgetExceeded):
        api.ask(client)
    assert api.provider.request_count == 1


def test_guarding_twice_counts_once_and_keeps_both_budgets(api):
    once = clevagent.guard(api.client(), budgets=[Budget(llm_calls=5, per="lifetime")])
    assert clevagent.guard(once) is once
    twice = clevagent.guard(once, budgets=[Budget(llm_calls=2, per="lifetime", name="two")])
    for _ in range(2):
        api.ask(twice)
    with pytest.raises(BudgetExceeded, match="two"):
        api.ask(twice)
    api.ask(once)
    assert api.provider.request_count == 3


def test_the_class_of_a_guarded_client_guards_nothing_by_itself(api):
    guarded = clevagent.guard(api.client())
    made = type(guarded)(api_key="test", base_url=guarded.base_url)
    with pytest.raises(UsageError, match="made from the class of a guarded one"):
        api.ask(made)
    assert api.provider.request_count == 0


@pytest.mark.parametrize("action", ["halt", "ask"])
def test_what_a_client_cannot_do_is_refused_when_it_is_guarded(api, action):
    with pytest.raises(UsageError, match="guard\\(client\\), which cannot"):
        clevagent.guard(api.client(), budgets=[Budget(usd=1)], on_exceed=action)


def test_an_action_without_budgets_is_refused(api):
    with pytest.raises(UsageError, match="no budgets of its own"):
        clevagent.guard(api.client(), on_exceed="warn")


def test_a_limit_of_tool_calls_is_refused(api):
    with pytest.raises(UsageError, match="limits tool calls"):
        clevagent.guard(api.client(), budgets=[Budget(tool_calls=3)])


def test_on_exceed_warns_or_asks_a_callable(api):
    warned = clevagent.guard(api.client(), budgets=[Budget(llm_calls=1, per="lifetime", name="w")], on_exceed="warn")
    for _ in range(3):
        api.ask(warned)
    heard = []
    asked = clevagent.guard(
        api.client(),
        budgets=[Budget(llm_calls=1, per="lifetime", name="c")],
        on_exceed=lambda incident: heard.append(incident.kind),
    )
    api.ask(asked)
    with pytest.raises(BudgetExceeded):
        api.ask(asked)
    assert heard == ["budget"]
    assert api.provider.request_count == 4


def test_the_node_and_the_tool_around_a_call_are_told(api):
    clevagent.init(budgets=[Budget(llm_calls=1, node="writer", per="lifetime")])
    client = clevagent.guard(api.client())

    @monitored_node("writer")
    def write():
        return api.ask(client)

    with clevagent.run() as run:
        write()
        with pytest.raises(BudgetExceeded):
            write()
    assert list(run.summary().by_node) == ["writer"]


# -- attached to all ------------------------------------------------------------------------------------------------------


def name_of(api):
    return "anthropic" if api.is_anthropic else "openai"


def classes_of(api):
    sdk = anthropic if api.is_anthropic else openai
    return sdk._base_client.SyncAPIClient, sdk._base_client.AsyncAPIClient


def test_attached_all_clients_are_guarded_those_made_before_too(api):
    before = api.client()
    clevagent.init(attach=[name_of(api)])
    ends(api, before)
    ends(api, api.client().with_options(timeout=3))


def test_after_shutdown_the_classes_are_as_they_were(api, watchdog):
    before = [(owner.__dict__["request"], owner.__dict__["_process_response"]) for owner in classes_of(api)]
    one, two = watchdog(attach=[name_of(api)]), watchdog(attach=[name_of(api)])
    one.shutdown()
    assert classes_of(api)[0].__dict__["request"] is not before[0][0]
    two.shutdown()
    assert [(owner.__dict__["request"], owner.__dict__["_process_response"]) for owner in classes_of(api)] == before
    api.ask(api.client())
    assert api.provider.request_count == 1


def test_two_watchdogs_count_each_call(api, watchdog):
    one = watchdog(attach=[name_of(api)], budgets=[Budget(llm_calls=5, per="lifetime")])
    two = watchdog(attach=[name_of(api)], budgets=[Budget(llm_calls=3, per="lifetime")])
    client = api.client()
    for _ in range(3):
        list(api.ask(client, stream=True))
    with pytest.raises(BudgetExceeded):
        api.ask(client)
    assert [watchdog.process_run.summary().total.calls for watchdog in (one, two)] == [3, 3]
    assert api.provider.request_count == 3
    assert one.ledger.holds() == two.ledger.holds() == []


def test_a_guarded_client_of_another_watchdog_counts_for_both(api, watchdog):
    one = watchdog(attach=[name_of(api)])
    two = watchdog()
    client = clevagent.guard(api.client(), watchdog=two)
    list(api.ask(client, stream=True))
    totals = [watchdog.process_run.summary().total for watchdog in (one, two)]
    assert [total.calls for total in totals] == [1, 1]
    assert totals[0].cost_usd == totals[1].cost_usd == float(api.provider.billed_usd)


def test_whoever_wrapped_the_class_after_us_keeps_working(chat, watchdog):
    one = watchdog(attach=["openai"])
    owner = classes_of(chat)[0]
    ours = owner.request
    seen = []

    def theirs(self, *args, **kwargs):
        seen.append(1)
        return ours(self, *args, **kwargs)

    owner.request = theirs
    try:
        one.shutdown()
        chat.ask(chat.client())
        assert (seen, chat.provider.request_count) == ([1], 1)
        two = watchdog(attach=["openai"])
        chat.ask(chat.client())
        total = two.process_run.summary().total
        assert (total.calls, total.output_tokens) == (1, 400)
        two.shutdown()
        assert owner.request is theirs
    finally:
        owner.request = ours.__wrapped__


def test_auto_cost_attaches_to_clients(api):
    clevagent.init(auto_cost=True)
    ends(api, api.client())


@pytest.mark.slow
def test_clevagent_imports_no_sdk():
    code = "import sys, clevagent; clevagent.init(); assert not {'openai', 'anthropic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_an_sdk_that_is_imported_later_is_attached_to(provider):
    code = f"""
import clevagent
watchdog = clevagent.init(attach=["auto"])
import openai
openai.OpenAI(api_key="test", base_url={provider.openai_url!r}).responses.create(model="gpt-4o", input="Hi", max_output_tokens=9)
assert watchdog.process_run.summary().total.calls == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True)
