"""``init(attach=["crewai"])``: every kickoff and every model call of CrewAI in the process, without a change to the user's code."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from decimal import Decimal

import pytest
from crewai import Agent, Crew
from crewai.flow.flow import Flow, start
from crewai.hooks import clear_all_global_hooks
from crewai.hooks.dispatch import InterceptionPoint, get_global_hook_list
from crewai.llms.base_llm import BaseLLM
from crewai.tools import tool

import clevagent
from clevagent import Budget, BudgetExceeded, UsageError
from clevagent.testing import Reply
from clevagent_crewai import models

CALLS = Budget(llm_calls=2, per="lifetime")
KINDS = ["openai", "responses", "anthropic", "litellm", "custom"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_async", [False, True])
def test_models_that_are_called_directly(aio, provider, llm, kind, is_async):
    model = llm(kind)
    clevagent.init(attach=["crewai"], budgets=[CALLS])
    for _ in range(2):
        aio(model.acall("Hello")) if is_async else model.call("Hello")
    for _ in range(2):
        with pytest.raises(BudgetExceeded):
            aio(model.acall("Hello")) if is_async else model.call("Hello")
    assert provider.request_count == 2


@pytest.mark.parametrize("how", ["kickoff", "kickoff_async", "akickoff"])
def test_a_crew_that_has_worked_before_is_guarded_too(aio, provider, crew, how):
    """CrewAI keeps the hooks that there were when an agent worked first; these are no hooks."""
    plain = crew(3)
    plain.kickoff()
    clevagent.init(attach=["crewai"], budgets=[CALLS])
    with pytest.raises(BudgetExceeded):
        plain.kickoff() if how == "kickoff" else aio(getattr(plain, how)())
    assert provider.request_count == 5


def test_each_kickoff_is_a_run(provider, crew):
    clevagent.init(attach=["crewai"], budgets=[Budget(llm_calls=2)])
    for _ in range(3):
        crew(2).kickoff()
    with pytest.raises(BudgetExceeded):
        crew(3).kickoff()
    assert provider.request_count == 8


def test_agents_and_flows_are_runs(provider, llm):
    clevagent.init(attach=["crewai"], budgets=[Budget(llm_calls=2)])
    model = llm(max_tokens=50)
    agent = Agent(role="helper", goal="help", backstory="old", llm=model)

    class Steps(Flow):
        @start()
        def first(self):
            for _ in range(3):
                model.call("Hello")

    for _ in range(3):
        agent.kickoff("Hello")
    with pytest.raises(BudgetExceeded):
        Steps().kickoff()
    assert provider.request_count == 5


def test_the_ceiling_holds_with_limits_unset_and_retries_on(provider, crew, llm):
    """Unlike a hook, what is attached lowers the output limit, too."""
    clevagent.init(attach=["crewai"], budgets=[Budget(usd=0.02, per="lifetime")])
    plain = crew(2, model=llm())
    for _ in range(9):
        with pytest.raises(BudgetExceeded):
            plain.kickoff()
    assert Decimal("0.018") <= provider.billed_usd <= Decimal("0.02")


def test_tools_are_counted(provider, crew):
    ran = []

    @tool("lookup")
    def lookup(word: str) -> str:
        """Look a word up."""
        ran.append(word)
        return word

    provider.reset(lambda body: Reply(tool_calls=[("lookup", {"word": str(len(ran))})]) if body.get("tools") else Reply())
    clevagent.init(attach=["crewai"], budgets=[Budget(tool_calls=2)])
    with pytest.raises(BudgetExceeded):
        crew(1, tools=[lookup]).kickoff()
    assert len(ran) == 2
    assert provider.request_count == 3


def test_clearing_all_hooks_leaves_it_attached(provider, crew):
    clevagent.init(attach=["crewai"], budgets=[CALLS])
    clear_all_global_hooks()
    with pytest.raises(BudgetExceeded):
        crew(3).kickoff()
    assert provider.request_count == 2


def test_raw_threads(provider, llm):
    clevagent.init(attach=["crewai"], budgets=[CALLS])
    model, refused = llm(), []

    def ask():
        try:
            model.call("Hello")
        except BudgetExceeded as error:
            refused.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (provider.request_count, len(refused)) == (2, 6)


def test_classes_of_models_that_are_made_later(provider):
    clevagent.init(attach=["crewai"], budgets=[Budget(llm_calls=1, per="lifetime")])
    called = []

    class Later(BaseLLM):
        def call(self, messages, *args, **kwargs):
            called.append(messages)
            return "ok"

    Later(model="gpt-4o").call("Hello")
    with pytest.raises(BudgetExceeded):
        Later(model="gpt-4o").call("Hello")
    assert called == ["Hello"]


def test_two_watchdogs_count_separately(provider, llm):
    left = clevagent.Watchdog(attach=["crewai"], budgets=[Budget(usd=1, per="lifetime")])
    right = clevagent.Watchdog(attach=["crewai"], budgets=[CALLS])
    model = llm(max_tokens=50)
    for _ in range(2):
        model.call("Hello")
    with pytest.raises(BudgetExceeded):
        model.call("Hello")
    right.shutdown()
    model.call("Hello")
    left_summary = left.process_run.summary()
    assert (provider.request_count, left_summary.total.calls) == (3, 3)
    assert Decimal(str(left_summary.total.cost_usd)) == provider.billed_usd
    assert left.ledger.holds() == []
    left.shutdown()


def test_shutdown_detaches_and_takes_off_what_was_wrapped(provider, crew, monkeypatch):
    monkeypatch.setattr(models, "_keeps_installed", False)
    models.uninstall()
    before = {(cls, name): getattr(cls, name) for cls, name in ((Crew, "kickoff"), (Agent, "kickoff"), (Flow, "kickoff"))}
    clevagent.init(attach=["crewai"], budgets=[CALLS])
    assert any(getattr(cls, name) is not method for (cls, name), method in before.items())
    with pytest.raises(BudgetExceeded):
        crew(3).kickoff()
    clevagent.shutdown()
    assert {(cls, name): getattr(cls, name) for cls, name in before} == before
    assert not [
        cls for cls in models._classes(BaseLLM) if "_clevagent_original" in getattr(cls.__dict__.get("call"), "__dict__", {})
    ]
    assert not [hook for point in InterceptionPoint for hook in get_global_hook_list(point) if "clevagent" in hook.__module__]
    crew(3).kickoff()
    assert provider.request_count == 5


def test_attached_again_starts_anew(provider, llm):
    model = llm()
    for _ in range(3):
        clevagent.init(attach=["crewai"], budgets=[Budget(llm_calls=1, per="lifetime")])
        model.call("Hello")
        with pytest.raises(BudgetExceeded):
            model.call("Hello")
        clevagent.shutdown()
    assert provider.request_count == 3


def test_not_attached_is_not_guarded(provider, crew):
    clevagent.init(budgets=[CALLS])
    crew(3).kickoff()
    assert provider.request_count == 3


def test_a_watchdog_that_was_shut_down_is_let_go():
    watchdog = clevagent.Watchdog(attach=["crewai"])
    gone = weakref.ref(watchdog)
    watchdog.shutdown()
    del watchdog
    gc.collect()
    assert gone() is None


def test_what_it_cannot_do_is_refused_when_it_is_attached():
    with pytest.raises(UsageError, match="cannot"):
        clevagent.Watchdog(attach=["crewai"], budgets=[Budget(usd=1, on_exceed="halt")])


def test_without_crewai_attaching_tells_what_to_install():
    script = (
        "import sys\n"
        "sys.modules['crewai'] = None\n"
        "import clevagent\n"
        "try:\n"
        "    clevagent.init(attach=['crewai'])\n"
        "except clevagent.UsageError as error:\n"
        "    assert '[crewai]' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('nothing was told')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.slow
def test_auto_attaches_once_crewai_is_imported():
    script = (
        "import os, sys, clevagent\n"
        "os.environ.update(CREWAI_DISABLE_TELEMETRY='true', OTEL_SDK_DISABLED='true', CREWAI_DISABLE_VERSION_CHECK='true')\n"
        "clevagent.init(attach='auto', budgets=[clevagent.Budget(llm_calls=1, per='lifetime')])\n"
        "assert 'crewai' not in sys.modules\n"
        "from clevagent.testing import LoopbackProvider\n"
        "from crewai import LLM\n"
        "with LoopbackProvider() as provider:\n"
        "    model = LLM(model='openai/gpt-4o', api_key='test', base_url=provider.openai_url)\n"
        "    model.call('Hello')\n"
        "    try:\n"
        "        model.call('Hello')\n"
        "    except clevagent.BudgetExceeded:\n"
        "        assert provider.request_count == 1\n"
        "    else:\n"
        "        raise SystemExit('it was sent')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
