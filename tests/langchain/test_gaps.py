"""Whoever listens beside our handler hears what it hears without ours, and the log tells of no fault where there is none."""

from __future__ import annotations

import gc
import logging
import uuid

import pytest
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.callbacks.manager import AsyncCallbackManager
from langchain_core.language_models import FakeListChatModel, FakeListLLM
from langchain_core.messages import HumanMessage, convert_to_messages

from clevagent import Budget, BudgetExceeded
from clevagent_langchain import ClevAgentCallbackHandler

MODELS = {"text": FakeListLLM(responses=["a"]), "chat": FakeListChatModel(responses=["a"])}

model_kinds = pytest.mark.parametrize("kind", MODELS)


class Listens(BaseCallbackHandler):
    def __init__(self, *, run_inline=False):
        self.heard = []
        self.run_inline = run_inline

    def on_llm_start(self, serialized, prompts, *, run_id, **kwargs):
        self.heard.append(("start", prompts, run_id))

    def on_llm_end(self, response, *, run_id, **kwargs):
        self.heard.append(("end", response.generations[0][0].text, run_id))


class ListensAsync(AsyncCallbackHandler):
    def __init__(self):
        self.heard = []

    async def on_llm_start(self, serialized, prompts, *, run_id, **kwargs):
        self.heard.append(("start", prompts, run_id))

    async def on_llm_end(self, response, *, run_id, **kwargs):
        self.heard.append(("end", response.generations[0][0].text, run_id))


def told(handler):
    return [event[:2] for event in handler.heard]


LISTENERS = {"sync": Listens, "inline": lambda: Listens(run_inline=True), "async": ListensAsync}


@model_kinds
@pytest.mark.parametrize("kind_of_listener", LISTENERS)
@pytest.mark.parametrize("prompts", [["x"], ["x", "y", "z"]])
def test_another_handler_hears_what_it_hears_without_ours(aio, watchdog, kind, kind_of_listener, prompts):
    plain, beside = LISTENERS[kind_of_listener](), LISTENERS[kind_of_listener]()
    aio(ask(MODELS[kind], prompts, [plain]))
    aio(ask(MODELS[kind], prompts, [beside, ClevAgentCallbackHandler(watchdog=watchdog())]))
    assert sorted(told(beside)) == sorted(told(plain))
    starts = [run_id for what, _, run_id in beside.heard if what == "start"]
    ends = [run_id for what, _, run_id in beside.heard if what == "end"]
    assert len(set(starts)) == len(prompts)
    assert sorted(starts) == sorted(ends)


def ask(model, prompts, callbacks):
    sent = [[("human", prompt)] for prompt in prompts]
    if isinstance(model, FakeListChatModel):
        return model.agenerate([convert_to_messages(messages) for messages in sent], callbacks=callbacks)
    return model.agenerate(prompts, callbacks=callbacks)


@model_kinds
def test_three_kinds_of_listeners_at_once_each_hear_one_start(aio, watchdog, kind):
    listeners = [make() for make in LISTENERS.values()]
    aio(ask(MODELS[kind], ["x"], [*listeners, ClevAgentCallbackHandler(watchdog=watchdog())]))
    assert [[what for what, *_ in listener.heard] for listener in listeners] == [["start", "end"]] * 3


@model_kinds
def test_a_given_run_id_is_that_of_the_first_call(aio, watchdog, kind):
    listener, run_id = Listens(), uuid.uuid4()
    config = {"callbacks": [listener, ClevAgentCallbackHandler(watchdog=watchdog())], "run_id": run_id}
    aio(MODELS[kind].ainvoke("x", config))
    assert {given for *_, given in listener.heard} == {run_id}


@pytest.mark.parametrize(("start", "name"), [("on_llm_start", "prompts"), ("on_chat_model_start", "messages")])
@pytest.mark.parametrize("by_name", [False, True])
def test_managers_are_called_with_the_arguments_that_they_have(aio, watchdog, start, name, by_name):
    """Tracers and frameworks call them themselves."""
    run_id = uuid.uuid4()
    sent = ["x"] if name == "prompts" else [[HumanMessage("x")]]
    listener = Listens()
    manager = AsyncCallbackManager([listener, ClevAgentCallbackHandler(watchdog=watchdog())])
    begin = getattr(manager, start)
    made = aio(begin(serialized={}, run_id=run_id, **{name: sent}) if by_name else begin({}, sent, run_id))
    assert [one.run_id for one in made] == [run_id] == [given for *_, given in listener.heard]


@model_kinds
def test_event_streams_tell_all_events(aio, watchdog, kind):
    async def events(config):
        return [event["event"] async for event in MODELS[kind].astream_events("x", config, version="v2")]

    assert aio(events({"callbacks": [ClevAgentCallbackHandler(watchdog=watchdog())]})) == aio(events({}))


@model_kinds
@pytest.mark.parametrize("is_async", [False, True])
def test_a_refusal_is_no_fault_in_the_log(aio, watchdog, caplog, kind, is_async):
    config = {"callbacks": [ClevAgentCallbackHandler(watchdog=watchdog(budgets=[Budget(llm_calls=1, per="lifetime")]))]}
    model = MODELS[kind]
    for _ in range(2):
        try:
            aio(model.ainvoke("x", config)) if is_async else model.invoke("x", config)
        except BudgetExceeded:
            break
    else:
        pytest.fail("it was not refused")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("langchain")] == []
    # Once, by us.
    assert len([record for record in caplog.records if "was refused" in record.getMessage()]) == 1


def test_a_fault_of_another_handler_is_still_logged(watchdog, caplog):
    class Broken(BaseCallbackHandler):
        def on_llm_start(self, *args, **kwargs):
            raise RuntimeError("broken")

    MODELS["text"].invoke("x", {"callbacks": [Broken(), ClevAgentCallbackHandler(watchdog=watchdog())]})
    assert [(record.levelno, "RuntimeError('broken')" in record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, True)
    ]


@model_kinds
def test_where_one_of_several_is_refused_nothing_is_left_that_is_never_awaited(aio, watchdog, kind):
    """Python tells of each coroutine that is not awaited as a warning, and here warnings are errors."""
    handler = ClevAgentCallbackHandler(watchdog=watchdog(budgets=[Budget(llm_calls=1, per="lifetime")]))
    with pytest.raises(BudgetExceeded):
        aio(ask(MODELS[kind], ["x", "y", "z", "w"], [handler, Listens(), ListensAsync()]))
    aio(ask(MODELS[kind], ["x"], [handler]))
    inline = [Listens(run_inline=True), Listens(run_inline=True), ClevAgentCallbackHandler(watchdog=handler.watchdog)]
    with pytest.raises(BudgetExceeded):
        aio(ask(MODELS[kind], ["x"], [handler, *inline]))
    gc.collect()
