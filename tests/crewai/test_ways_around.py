"""Ways past a guard: clients of CrewAI's own, threads without a context, calls that do not say whose they are."""

from __future__ import annotations

import contextlib
import functools
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import litellm
import openai
import pytest
from crewai import LLM, Agent, Crew, Task
from crewai.flow.async_feedback import HumanFeedbackPending
from crewai.flow.flow import Flow, listen, start
from crewai.flow.human_feedback import human_feedback
from crewai.flow.persistence import SQLiteFlowPersistence
from crewai.llms.providers.openai.completion import OpenAICompletion
from crewai.tools import tool
from crewai.utilities.converter import Converter
from pydantic import BaseModel

import clevagent
from clevagent import Budget, BudgetExceeded, Stopped
from clevagent.testing import Reply


class Number(BaseModel):
    x: int


@tool
def noop(q: str) -> str:
    """Nothing."""
    return q


def task_of(agent, **fields):
    return Task(name="count", description="Count.", expected_output="text", agent=agent, **fields)


def worker(model, *tools):
    return Agent(role="worker", goal="g", backstory="b", llm=model, tools=[*tools])


def prose_then_numbers(body):
    """Answer in prose, so that CrewAI asks once more for what fits; then as is asked."""
    names = [entry.get("function", entry).get("name") for entry in body.get("tools") or []]
    if names and "noop" not in names:
        return Reply(tool_calls=[(names[0], {"x": 1})])
    if body.get("response_format"):
        return Reply(text='{"x": 1, "valid": true, "feedback": "ok"}')
    return Reply(text="the answer is one")


def calls(provider):
    """The requests that are billed; counting tokens is free."""
    return [request for request in provider.requests if "count" not in request.path]


# -- output that has to fit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
@pytest.mark.parametrize("how", ["kickoff", "akickoff"])
def test_a_request_for_json_is_asked_for_like_any_other(provider, llm, aio, monkeypatch, kind, how):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "test")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", provider.anthropic_url)
    provider.reset(prose_then_numbers)
    clevagent.init()
    agent = worker(llm(kind, max_tokens=50), noop)
    crew = clevagent.guard(Crew(agents=[agent], tasks=[task_of(agent, output_json=Number)]), budgets=[Budget(llm_calls=1)])
    with pytest.raises(BudgetExceeded):
        crew.kickoff() if how == "kickoff" else aio(crew.akickoff())
    assert len(calls(provider)) == 1


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
def test_requests_for_json_are_recorded_as_they_are_billed_and_stay_within_the_ceiling(provider, llm, monkeypatch, kind):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "test")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", provider.anthropic_url)
    provider.reset(prose_then_numbers)
    clevagent.init()
    # CrewAI hands a base_url of Anthropic's on to where it is not known.
    agent = worker(llm(kind, max_tokens=50, **({"base_url": None} if kind == "anthropic" else {})), noop)
    crew = clevagent.guard(Crew(agents=[agent], tasks=[task_of(agent, output_json=Number)]))
    with clevagent.run(budgets=[Budget(usd=0.05)]) as run:
        for _ in range(20):
            with contextlib.suppress(BudgetExceeded):
                assert crew.kickoff().json_dict == {"x": 1}
    assert 0.04 * 10**12 < provider.billed_pico <= 0.05 * 10**12
    assert run.summary().total.cost_usd == pytest.approx(provider.billed_pico / 10**12)
    assert all(request.body.get("max_tokens") for request in calls(provider))


@pytest.fixture
def litellm_with_tools(provider, monkeypatch) -> None:
    """Send what litellm would: this environment's mcp is too old for the tools of its litellm."""
    send = litellm.completion

    @functools.wraps(send)
    def completion(**request):
        if not request.get("tools"):
            return send(**request)
        assert request.pop("num_retries") == 0
        request["model"] = request["model"].rpartition("/")[2]
        with openai.OpenAI(api_key="test", base_url=provider.openai_url, max_retries=request.pop("max_retries")) as client:
            return client.chat.completions.create(**request)

    monkeypatch.setattr(litellm, "completion", completion)


@pytest.mark.usefixtures("litellm_with_tools")
@pytest.mark.parametrize("x", [1, "nonsense"])
def test_a_response_model_of_litellm_is_recorded_as_it_is_billed(provider, llm, x):
    """It sends no request of its own, and Instructor each of its attempts."""
    provider.reset(lambda body: Reply(tool_calls=[(body["tools"][0]["function"]["name"], {"x": x})]))
    clevagent.init()
    model = clevagent.guard(llm("litellm", max_tokens=50), budgets=[Budget(llm_calls=2), Budget(usd=0.05)])
    with clevagent.run() as run, contextlib.suppress(Exception):  # what does not fit is an error of Instructor's
        model.call("hello", response_model=Number)
    assert 1 <= provider.request_count <= 2
    assert run.summary().total.calls == provider.request_count
    assert run.summary().total.cost_usd == pytest.approx(provider.billed_pico / 10**12)


@pytest.mark.usefixtures("litellm_with_tools")
def test_a_stream_of_litellm_that_is_made_to_fit_afterwards_is_charged_for_both_requests(provider, llm):
    def script(body):
        if body.get("tools"):
            return Reply(tool_calls=[(body["tools"][0]["function"]["name"], {"x": 1})])
        return Reply()

    provider.reset(script)
    clevagent.init()
    model = clevagent.guard(llm("litellm", max_tokens=50, stream=True), budgets=[Budget(usd=1)])
    with clevagent.run() as run:
        model.call("hello", response_model=Number)
    assert provider.request_count == 2
    assert run.summary().total.calls == 2
    assert run.summary().total.cost_usd == pytest.approx(provider.billed_pico / 10**12)


class Converse(BaseHTTPRequestHandler):
    """Amazon's API, as far as a conversion needs it."""

    asked: list[dict[str, object]] = []  # noqa: RUF012 - a new class for each server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append(body)
        use = {"toolUseId": "1", "name": body["toolConfig"]["tools"][0]["toolSpec"]["name"], "input": {"x": 1}}
        usage = {"inputTokens": 10, "outputTokens": 5, "totalTokens": 15}
        message = {"role": "assistant", "content": [{"toolUse": use}]}
        answer = json.dumps({"output": {"message": message}, "stopReason": "tool_use", "usage": usage, "metrics": {"latencyMs": 1}})
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def converse(monkeypatch) -> Iterator[type[Converse]]:
    handler = type("Handler", (Converse,), {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_BEDROCK_RUNTIME", f"http://127.0.0.1:{server.server_address[1]}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield handler
        server.shutdown()
        thread.join()


def test_a_client_whose_way_to_limit_output_is_not_known_is_asked_for_and_gets_no_limit(converse):
    pytest.importorskip("boto3")
    clevagent.init()
    plain = LLM(model="bedrock/anthropic.claude-3-5-sonnet-20240620-v1:0", max_tokens=50)
    model = clevagent.guard(plain, budgets=[Budget(usd=1), Budget(llm_calls=1)])
    with clevagent.run() as run:
        assert json.loads(Converter(llm=model, model=Number, text="one", instructions="as JSON").to_json()) == {"x": 1}
        with pytest.raises(BudgetExceeded):
            Converter(llm=model, model=Number, text="one", instructions="as JSON").to_json()
            Converter(llm=model, model=Number, text="one", instructions="as JSON").to_json()
    assert run.summary().total.calls == len(converse.asked) == 1
    assert set(converse.asked[0]) == {"messages", "toolConfig"}


# -- whose a call is ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kickoff", ["kickoff", "akickoff"])
@pytest.mark.parametrize(
    ("scope", "how"),
    [
        (scope, how)
        for scope in ("agent", "agent a day", "task", "role")
        for how in ("output_pydantic", "output_json", "guardrail")
        # What judges in words is an agent of its own: the task's, and not the worker's.
        if (scope, how) != ("role", "guardrail")
    ],
)
def test_a_scoped_budget_covers_what_a_task_does_after_its_agent(provider, llm, aio, scope, how, kickoff):
    provider.reset(prose_then_numbers)
    clevagent.init()
    agent = worker(llm(max_tokens=50), noop)
    if scope.startswith("agent"):
        agent = clevagent.guard(agent, budgets=[Budget(llm_calls=1, per="day" if "day" in scope else "run")])
    crew = Crew(agents=[agent], tasks=[task_of(agent, **({how: Number} if how != "guardrail" else {how: "must be fine"}))])
    if scope in ("task", "role"):
        crew = clevagent.guard(crew, budgets=[Budget(llm_calls=1, node="count" if scope == "task" else "worker")])
    with contextlib.suppress(Exception):  # some of it CrewAI turns into an answer
        crew.kickoff() if kickoff == "kickoff" else aio(crew.akickoff())
    assert provider.request_count == 1


def use_once(body):
    if body.get("tools") and body["messages"][-1]["role"] != "tool":
        return Reply(tool_calls=[("fan", {"q": "x"})])
    return Reply()


def fan_of(model, before=lambda: None, after=lambda: None):
    @tool
    def fan(q: str) -> str:
        """Ask twenty times, in threads that inherit nothing."""

        def one(_):
            try:
                return model.call("hello")
            except Stopped as error:
                return type(error).__name__

        before()
        with ThreadPoolExecutor(8) as pool:
            found = str(list(pool.map(one, range(20))))
        after()
        return found

    return fan


@pytest.mark.parametrize("how", ["crew", "agent in a crew", "crew in a flow"])
def test_raw_threads_of_a_tool_count_against_the_kickoff(provider, llm, how):
    provider.reset(use_once)
    clevagent.init()
    model = llm(max_tokens=50)
    agent = worker(model, fan_of(model))
    if how == "agent in a crew":
        agent = clevagent.guard(agent, budgets=[Budget(llm_calls=50)])
    crew = clevagent.guard(Crew(agents=[agent], tasks=[task_of(agent)]), budgets=[Budget(llm_calls=3)])

    class Around(Flow):
        @start()
        def go(self):
            return crew.kickoff().raw

    with pytest.raises(BudgetExceeded):
        clevagent.guard(Around(), budgets=[Budget(llm_calls=3)]).kickoff() if how == "crew in a flow" else crew.kickoff()
    assert provider.request_count == 3


def test_raw_threads_of_two_crews_with_one_model_count_each_for_its_own(provider, llm):
    """Each counts in the kickoff whose tool began it."""
    provider.reset(use_once)
    watchdog = clevagent.init()
    model = llm(max_tokens=50)
    both = threading.Barrier(2, timeout=20)
    fan = fan_of(model, both.wait, both.wait)

    def kick_off():
        agent = worker(model, fan)
        with contextlib.suppress(Exception):  # the other's barrier may be broken by a refusal
            clevagent.guard(Crew(agents=[agent], tasks=[task_of(agent)]), budgets=[Budget(llm_calls=3)]).kickoff()

    threads = [threading.Thread(target=kick_off) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert provider.request_count <= 6
    assert not [incident for incident in watchdog.recent if incident.kind in {"thread", "unattributed"}]


@pytest.mark.parametrize("around", [False, True])
def test_a_raw_thread_says_whose_it_is_by_activating_a_run(provider, llm, around):
    """Its own kickoff's, or the one around that; what is in it counts against the ceiling of the kickoff all the same."""
    watchdog = clevagent.init()
    model = llm(max_tokens=50)
    outcomes = {"first": [], "second": []}
    both = threading.Barrier(2, timeout=20)

    def kick_off(name, allowed):
        @tool
        def fan(q: str) -> str:
            """Ask in a thread that inherits nothing."""
            run = outer if around else watchdog.current_run()

            def one():
                with run.activate(), contextlib.suppress(Stopped):
                    while len(outcomes[name]) < 10:
                        outcomes[name].append(model.call("hello"))

            both.wait()
            thread = threading.Thread(target=one)
            thread.start()
            thread.join()
            both.wait()
            return q

        agent = worker(model, fan)
        crew = clevagent.guard(Crew(agents=[agent], tasks=[task_of(agent)]), budgets=[Budget(llm_calls=allowed)])
        with clevagent.run() as outer, contextlib.suppress(Stopped):
            crew.kickoff()

    provider.reset(use_once)
    threads = [threading.Thread(target=kick_off, args=each) for each in (("first", 3), ("second", 5))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: len(told) for name, told in outcomes.items()} == {"first": 2, "second": 4}
    assert not [incident for incident in watchdog.recent if incident.kind == "thread"]


@pytest.mark.parametrize("how", ["resume", "resume_async"])
@pytest.mark.parametrize("attach", [[], ["crewai"]])
def test_a_flow_that_is_resumed_is_guarded(provider, llm, aio, tmp_path, how, attach):
    clevagent.init(attach=attach)
    store = SQLiteFlowPersistence(str(tmp_path / "flow.db"))
    model = llm(max_tokens=50)

    class Nobody:
        def request_feedback(self, context, flow):
            raise HumanFeedbackPending(context=context)

    class Asks(Flow):
        @start()
        @human_feedback(message="ok?", provider=Nobody())
        def go(self):
            return model.call("first")

        @listen(go)
        def after(self, _):
            for _ in range(10):
                with contextlib.suppress(Exception):  # whatever the flow does about it
                    model.call("more")
            return "done"

    flow = Asks(persistence=store)
    flow.kickoff()
    provider.reset()
    again = clevagent.guard(Asks.from_pending(flow.flow_id, store), budgets=[Budget(llm_calls=2)])
    with contextlib.suppress(Stopped):
        again.resume("fine") if how == "resume" else aio(again.resume_async("fine"))
    assert provider.request_count == 2


# -- models and tools ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["call", "acall"])
def test_a_model_that_tries_again_by_itself_is_charged_for_each_request(provider, aio, how):
    class Stubborn(OpenAICompletion):
        def call(self, *args, **kwargs):
            for _ in range(5):
                with contextlib.suppress(Exception):  # as users write it
                    return super().call(*args, **kwargs)
            raise ValueError("no answer")

        async def acall(self, *args, **kwargs):
            for _ in range(5):
                with contextlib.suppress(Exception):  # as users write it
                    return await super().acall(*args, **kwargs)
            raise ValueError("no answer")

    provider.reset([Reply(drop="middle")] * 100)
    clevagent.init()
    plain = Stubborn(model="gpt-4o", api_key="test", base_url=provider.openai_url, max_tokens=50, max_retries=0)
    model = clevagent.guard(plain, budgets=[Budget(usd=1)])
    with clevagent.run() as run, pytest.raises(ValueError, match="no answer"):
        model.call("hello") if how == "call" else aio(model.acall("hello"))
    assert provider.request_count == 5
    assert run.summary().total.cost_usd >= provider.billed_pico / 10**12


@pytest.mark.parametrize("said", ['"text"', "null", "{bad"])  # what CrewAI itself survives
def test_whatever_a_model_says_as_arguments_of_a_tool_a_guarded_crew_goes_on(provider, llm, monkeypatch, said):
    def script(body):
        if body.get("tools") and not any(message["role"] == "tool" for message in body["messages"]):
            return Reply(tool_calls=[("noop", {"q": "MARK"})])
        return Reply(text="done")

    write = json.dumps

    def odd(value, *args, **kwargs):
        text = write(value, *args, **kwargs)
        return said if text in ('{"q": "MARK"}', '{"q":"MARK"}') else text

    provider.reset(script)
    clevagent.init()
    agent = Agent(role="worker", goal="g", backstory="b", llm=llm(max_tokens=50), tools=[noop], max_iter=4)
    crew = clevagent.guard(Crew(agents=[agent], tasks=[task_of(agent)]))
    monkeypatch.setattr("clevagent.testing.dialects.json.dumps", odd)
    assert crew.kickoff().raw
