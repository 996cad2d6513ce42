"""What runs inside a crew's tools and tasks, and a flow's methods, counts there, whoever sends it and in whatever thread."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from crewai.flow.flow import Flow, start
from crewai.tools import tool

import clevagent
from clevagent import Budget, Stopped
from clevagent.testing import Reply

TRIES = 5


@pytest.fixture
def client(provider):
    return clevagent.guard(openai.OpenAI(api_key="test", base_url=provider.openai_url, max_retries=0))


def use_once(body):
    if body.get("tools") and body["messages"][-1]["role"] != "tool":
        return Reply(tool_calls=[("ask", {"q": "x"})])
    return Reply()


def asking(call):
    """A tool that makes calls of its own, some in threads."""

    def one(_=None):
        try:
            call()
        except Stopped as error:
            return type(error).__name__
        return "sent"

    @tool("ask")
    def ask(q: str) -> str:
        """Ask."""
        answers = [one()]
        with ThreadPoolExecutor(2) as pool:
            answers += pool.map(one, range(TRIES))
        thread = threading.Thread(target=one)
        thread.start()
        thread.join()
        return str(answers)

    return ask


@pytest.mark.parametrize("node", ["task 0", "writer"])
def test_what_a_client_sends_in_a_tool_counts_for_its_task_and_its_agent(crew, llm, client, provider, node):
    provider.reset(use_once)

    def call():
        client.chat.completions.create(model="gpt-4o", max_tokens=20, messages=[{"role": "user", "content": "Hello"}])

    team = crew(tasks=1, tools=[asking(call)])
    with pytest.raises(Stopped):
        clevagent.guard(team, budgets=[Budget(llm_calls=3, node=node)]).kickoff()
    assert provider.request_count == 3


def test_the_bill_tells_the_tool_in_which_a_client_was_called(crew, client, provider):
    provider.reset(use_once)

    def call():
        client.chat.completions.create(model="gpt-4o", max_tokens=20, messages=[{"role": "user", "content": "Hello"}])

    with clevagent.run() as run:
        clevagent.guard(crew(tasks=1, tools=[asking(call)])).kickoff()
    summary = run.summary()
    assert provider.request_count == summary.total.calls == TRIES + 4
    assert summary.by_tool["ask"].cost_usd > 0
    assert list(summary.by_node) == ["writer"]


@pytest.mark.parametrize("users", [2, 5])
def test_threads_of_the_methods_of_flows_count_each_in_its_own_kickoff(llm, provider, users):
    clevagent.init()
    model = llm(max_tokens=50)
    met = threading.Barrier(users, timeout=20)
    sent = []

    class Fan(Flow):
        @start()
        def ask(self):
            met.wait()

            def one(_):
                try:
                    model.call("hello")
                except Stopped:
                    return False
                return True

            with ThreadPoolExecutor(2) as pool:
                sent.append(sum(pool.map(one, range(TRIES))))
            met.wait()

    def kick_off():
        clevagent.guard(Fan(), budgets=[Budget(llm_calls=3)]).kickoff()

    def quietly():
        try:
            kick_off()
        except Stopped:
            return

    threads = [threading.Thread(target=quietly) for _ in range(users)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sent == [3] * users
    assert provider.request_count == 3 * users
