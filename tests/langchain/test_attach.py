"""``init(attach=["langchain"])``: every run of LangChain and LangGraph in the process, without a change to the user's code."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref

import pytest
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.tools import tool

import clevagent
from clevagent import Budget, BudgetExceeded, UsageError
from clevagent.testing import Reply
from clevagent_langchain import ClevAgentCallbackHandler
from clevagent_langchain import attach as module
from clevagent_langchain.tracker import tracker_of

HELLO = {"messages": [HumanMessage("Hello")]}
CALLS = Budget(llm_calls=2, per="lifetime")

both = pytest.mark.parametrize("is_async", [False, True])


def run(aio, is_async, target, value, config=None):
    return aio(target.ainvoke(value, config)) if is_async else target.invoke(value, config)


def in_threads(count, work):
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@both
@pytest.mark.parametrize("kind", ["model", "chain", "agent"])
def test_user_code_is_guarded_as_it_stands(aio, provider, chat, is_async, kind):
    clevagent.init(attach=["langchain"], budgets=[CALLS])
    model = chat(max_tokens=9)
    target = {"model": model, "chain": model | StrOutputParser(), "agent": create_agent(model, [])}[kind]
    for _ in range(2):
        run(aio, is_async, target, HELLO if kind == "agent" else "Hello")
    for _ in range(2):
        with pytest.raises(BudgetExceeded):
            run(aio, is_async, target, HELLO if kind == "agent" else "Hello")
    assert provider.request_count == 2


def test_through_the_environment(provider, chat, monkeypatch):
    monkeypatch.setenv("CLEVAGENT_ATTACH", "langchain")
    monkeypatch.setenv("CLEVAGENT_BUDGETS", "llm_calls=1 per=lifetime")
    clevagent.init()
    chat(max_tokens=9).invoke("Hello")
    with pytest.raises(BudgetExceeded):
        chat(max_tokens=9).invoke("Hello")
    assert provider.request_count == 1


def test_models_that_were_made_before_are_guarded_too(provider, chat):
    chain = chat(max_tokens=9) | StrOutputParser()
    chain.invoke("Hello")
    clevagent.init(attach=["langchain"], budgets=[Budget(llm_calls=1, per="lifetime")])
    chain.invoke("Hello")
    with pytest.raises(BudgetExceeded):
        chain.invoke("Hello")
    assert provider.request_count == 2


def test_raw_threads_are_covered(provider, chat):
    one = clevagent.init(attach=["langchain"], budgets=[CALLS])
    model, refused = chat(max_tokens=9), []

    def work():
        try:
            model.invoke("Hello")
        except BudgetExceeded as error:
            refused.append(error)

    in_threads(8, work)
    assert (provider.request_count, len(refused)) == (2, 6)
    assert one.process_run.summary().total.calls == 2


def test_a_raw_thread_inside_a_tool_counts_against_the_only_run(provider, chat):
    """Such a thread inherits no callbacks and no context: LangChain alone would leave its calls unguarded."""
    clevagent.init(attach=["langchain"])
    model, refused = chat(max_tokens=9), []

    @tool
    def work_in_threads(word: str) -> str:
        """Work in threads of its own."""

        def work():
            try:
                model.invoke(word)
            except BudgetExceeded as error:
                refused.append(error)

        in_threads(5, work)
        return "done"

    with clevagent.run(budgets=[Budget(llm_calls=2)]) as ours:
        work_in_threads.invoke({"word": "a"})
    assert (provider.request_count, len(refused)) == (2, 3)
    assert (ours.summary().total.calls, ours.summary().tool_calls) == (2, 1)


def test_a_raw_thread_inside_a_root_invocation(provider, chat):
    clevagent.init(attach=["langchain"], budgets=[Budget(llm_calls=2)])
    model, refused = chat(max_tokens=9), []

    @tool
    def work_in_threads(word: str) -> str:
        """Work in threads of its own."""

        def work():
            try:
                model.invoke(word)
            except BudgetExceeded as error:
                refused.append(error)

        in_threads(5, work)
        return "done"

    provider.reset(lambda body: Reply(tool_calls=[("work_in_threads", {"word": "a"})]) if body.get("tools") else Reply())
    with pytest.raises(BudgetExceeded):
        create_agent(model, [work_in_threads]).invoke(HELLO)
    assert provider.request_count == 2
    assert len(refused) == 4


@both
def test_handlers_of_the_users_own_are_counted_with_it_once(aio, provider, chat, balance, is_async):
    one = clevagent.init(attach=["langchain"], budgets=[Budget(usd=1, per="lifetime")])
    model = chat(max_tokens=9, callbacks=[ClevAgentCallbackHandler()])
    chain = (model | StrOutputParser()).with_config(callbacks=[ClevAgentCallbackHandler(watchdog=one)])
    run(aio, is_async, chain, "Hello", {"callbacks": [ClevAgentCallbackHandler()]})
    assert (balance(one).spent, balance(one).held) == (provider.billed_pico, 0)
    assert tracker_of(one).size() == 0
    assert not one._active


@both
@pytest.mark.parametrize("how", ["invoke", "stream"])
def test_attached_and_guarded_and_a_handler_all_at_once(aio, provider, chat, balance, is_async, how):
    one = clevagent.init(attach=["langchain"], budgets=[Budget(usd=1, per="lifetime"), Budget(llm_calls=3)])
    model = clevagent.guard(chat(max_tokens=9, callbacks=[ClevAgentCallbackHandler()]))
    chain = model | StrOutputParser()
    config = {"callbacks": [ClevAgentCallbackHandler(), ClevAgentCallbackHandler()]}

    async def read():
        return [part async for part in chain.astream("Hello", config)]

    if how == "invoke":
        run(aio, is_async, chain, "Hello", config)
    elif is_async:
        aio(read())
    else:
        list(chain.stream("Hello", config))
    assert provider.request_count == 1
    assert (balance(one).spent, balance(one).held) == (provider.billed_pico, 0)
    assert tracker_of(one).size() == 0


@both
def test_a_guarded_model_belongs_to_the_root_invocation_too(aio, provider, chat, is_async):
    clevagent.init(attach=["langchain"], budgets=[Budget(llm_calls=1)])
    chain = clevagent.guard(chat(max_tokens=9)) | StrOutputParser()
    for _ in range(3):
        run(aio, is_async, chain, "Hello")
    twice = clevagent.guard(chat(max_tokens=9)) | StrOutputParser() | clevagent.guard(chat(max_tokens=9))
    with pytest.raises(BudgetExceeded):
        run(aio, is_async, twice, "Hello")
    assert provider.request_count == 4


def test_a_guarded_model_on_its_own_is_no_part_of_the_chain_before_it(provider, chat):
    one = clevagent.init(attach=["langchain"], budgets=[Budget(llm_calls=1)])
    model = clevagent.guard(chat(max_tokens=9))
    (model | StrOutputParser()).invoke("Hello")
    model.invoke("Hello")
    assert provider.request_count == 2
    assert one.process_run.summary().total.calls == 1


def test_detached_by_shutdown(provider, chat):
    clevagent.init(attach=["langchain"], budgets=[Budget(llm_calls=1, per="lifetime")])
    model = chat(max_tokens=9)
    model.invoke("Hello")
    with pytest.raises(BudgetExceeded):
        model.invoke("Hello")
    clevagent.shutdown()
    for _ in range(3):
        model.invoke("Hello")
    assert provider.request_count == 4


@pytest.mark.slow
def test_attached_again_after_a_shutdown_starts_anew_and_adds_no_hook(provider, chat):
    from langchain_core.tracers.context import _configure_hooks

    model = chat(max_tokens=9)
    counts = []
    for _ in range(5):
        clevagent.init(attach=["langchain"], budgets=[Budget(llm_calls=1, per="lifetime")])
        model.invoke("Hello")
        with pytest.raises(BudgetExceeded):
            model.invoke("Hello")
        clevagent.shutdown()
        counts.append(len(_configure_hooks))
    assert provider.request_count == 5
    assert len(set(counts)) == 1


def test_attaching_twice_is_attaching_once(provider, chat):
    one = clevagent.init(attach=["langchain"], budgets=[Budget(usd=1, per="lifetime")])
    one.attach("langchain")
    chat(max_tokens=9).invoke("Hello")
    assert sum(slot.watchdog is one for slot in module._slots) == 1
    assert one.process_run.summary().total.calls == 1


def test_two_watchdogs_count_separately(provider, chat, watchdog, balance):
    left = watchdog(attach=["langchain"], budgets=[Budget(usd=1, per="lifetime")])
    right = watchdog(attach=["langchain"], budgets=[Budget(llm_calls=2, per="lifetime")])
    model = chat(max_tokens=9)
    for _ in range(2):
        model.invoke("Hello")
    with pytest.raises(BudgetExceeded):
        (model | StrOutputParser()).invoke("Hello")
    assert provider.request_count == 2
    assert balance(right).spent == 2
    assert balance(left).held == balance(right).held == 0
    right.shutdown()
    model.invoke("Hello")
    assert left.process_run.summary().total.calls == 3


def test_runs_of_each_watchdog_are_its_own(provider, chat, watchdog):
    left, right = watchdog(attach=["langchain"]), watchdog(attach=["langchain"])
    with left.run() as ours:
        chat(max_tokens=9).invoke("Hello")
    chat(max_tokens=9).invoke("Hello")
    assert ours.summary().total.calls == 1
    assert left.process_run.summary().total.calls == 1
    assert right.process_run.summary().total.calls == 2


@pytest.mark.slow
def test_a_watchdog_that_was_shut_down_is_let_go(watchdog):
    from clevagent_core.watchdog import Watchdog

    one = Watchdog(attach=["langchain"])
    gone = weakref.ref(one)
    one.shutdown()
    del one
    gc.collect()
    assert gone() is None


def test_not_attached_is_not_guarded(provider, chat):
    clevagent.init(budgets=[Budget(llm_calls=1, per="lifetime")])
    for _ in range(3):
        chat(max_tokens=9).invoke("Hello")
    assert provider.request_count == 3


def test_an_unknown_framework_is_told():
    with pytest.raises(UsageError, match="no plugin can attach"):
        clevagent.init(attach=["langchian"])


@pytest.mark.slow
def test_the_framework_is_imported_only_when_it_is_attached():
    script = (
        "import sys, clevagent\n"
        "clevagent.init()\n"
        "assert not [name for name in sys.modules if name.startswith('langchain_core')]\n"
        "clevagent.shutdown()\n"
        "clevagent.init(attach=['langchain'])\n"
        "assert 'langchain_core.tracers.context' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.slow
def test_without_langchain_attaching_tells_what_to_install():
    script = (
        "import sys\n"
        "sys.modules['langchain_core'] = None\n"
        "import clevagent\n"
        "try:\n"
        "    clevagent.init(attach=['langchain'])\n"
        "except clevagent.UsageError as error:\n"
        "    assert '[langchain]' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('nothing was told')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
