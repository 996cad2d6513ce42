"""A run whose budgets have covered no call says so once, at its end: why, and how to guard. Healthy runs say nothing."""

from __future__ import annotations

import logging
import threading

import pytest
from inline_snapshot import snapshot

from clevagent import Budget, BudgetExceeded, LLMCall, ToolCall, Usage

SEARCH = ToolCall(tool="search", arguments={})


@pytest.fixture
def watch(make, caplog, heard):
    """Make a watchdog; ``told()`` gives what was logged of idle budgets, without the id of the run."""
    caplog.set_level(logging.WARNING, logger="clevagent")

    class Watch:
        def __init__(self):
            self.watchdog = make(plugins=[heard])

        def run(self, *budgets, **more):
            return self.watchdog.run(budgets=budgets, **more)

        def told(self):
            found = [getattr(record, "clevagent_incident", None) for record in caplog.records]
            return [
                incident.message.replace(incident.run_id, "ID") for incident in found if incident and incident.kind == "idle_budget"
            ]

    return Watch()


# -- what is told -----------------------------------------------------------------------------------------------------------


def test_a_run_in_which_nothing_is_guarded(watch):
    with watch.run(Budget(usd=1), Budget(tool_calls=3)):
        pass
    assert watch.told() == snapshot(
        [
            "No model or tool call was seen in this run (ID), so its budgets '$1 per run' and '3 tool_calls per run' have limited nothing. Either it needed no call, or nothing inside it is guarded, and nothing would have stopped it. Guard what makes the calls: clevagent.guard(...) for a model, a client, a graph or a crew; clevagent.init(attach='auto') for every framework that is imported; `with clevagent.llm_call(...)` and `with clevagent.tool_call(...)` around what you send yourself."
        ]
    )


def test_a_node_that_does_not_exist(watch, spend):
    with watch.run(Budget(llm_calls=1, node="agent")) as run:
        spend(run, node="model")
        run.open(SEARCH).settle()
    assert watch.told() == snapshot(
        [
            "1 model call and 1 tool call (nodes: 'model'; tools: 'search'; models: 'cent') were seen in this run (ID), and none of them counts against its budget '1 llm_calls per run node=agent' (node='agent'), which has limited nothing. If node='agent' is the right name, and there was nothing to do there, all is well; else correct it (* and ? match)."
        ]
    )


def test_a_misspelt_model(watch, spend):
    with watch.run(Budget(llm_calls=1, model="cnet"), Budget(llm_calls=5, name="fine")) as run:
        spend(run)
    assert watch.told() == snapshot(
        [
            "1 model call and 0 tool calls (models: 'cent') were seen in this run (ID), and none of them counts against its budget '1 llm_calls per run model=cnet' (model='cnet'), which has limited nothing. Did you mean model='cent'?"
        ]
    )


def test_a_ceiling_on_tools_that_nobody_sees(watch, spend):
    with watch.run(Budget(tool_calls=1), Budget(usd=1, tool="serach")) as run:
        spend(run)
    assert watch.told() == snapshot(
        [
            "1 model call and 0 tool calls (models: 'cent') were seen in this run (ID), and none of them counts against its budgets '1 tool_calls per run' and '$1 per run tool=serach' (tool='serach'), which have limited nothing. A guarded model does not see the tools that are run: for an agent of create_agent give middleware=[BudgetMiddleware()]; else guard the graph or the crew, clevagent.init(attach=['langchain']), callbacks=[ClevAgentCallbackHandler()], or `with clevagent.tool_call(...)`."
        ]
    )


def test_a_ceiling_on_models_that_nobody_sees(watch):
    with watch.run(Budget(llm_calls=1)) as run:
        run.open(SEARCH).settle()
    assert watch.told() == snapshot(
        [
            "0 model calls and 1 tool call (tools: 'search') were seen in this run (ID), and none of them counts against its budget '1 llm_calls per run', which has limited nothing. Guard what makes the calls: clevagent.guard(...) for a model, a client, a graph or a crew; clevagent.init(attach='auto') for every framework that is imported; `with clevagent.llm_call(...)` and `with clevagent.tool_call(...)` around what you send yourself."
        ]
    )


def test_an_incident_tells_the_budgets(watch, heard, spend):
    with watch.run(Budget(llm_calls=1, node="a"), Budget(llm_calls=2, node="b", name="second")) as run:
        spend(run, node="model")
    watch.watchdog.flush()
    [incident] = [incident for incident in heard.incidents if incident.kind == "idle_budget"]
    assert (incident.run_id, incident.budget, incident.action) == (run.run_id, "1 llm_calls per run node=a", "warn")
    assert incident.details == {"budgets": ["1 llm_calls per run node=a", "second"], "model_calls": 1, "tool_calls": 0}


def test_a_dry_run_tells_it_too(watch):
    with watch.run(Budget(usd=1), dry_run=True):
        pass
    assert len(watch.told()) == 1


def test_a_run_inside_another_tells_its_own_budgets(watch, spend):
    with watch.run(Budget(usd=1)) as outer, watch.run(Budget(usd=1, node="nowhere")):
        spend(outer)
    assert len(watch.told()) == 1
    assert "nowhere" in watch.told()[0]


@pytest.mark.parametrize("start", range(2))
def test_every_run_of_a_misspelt_budget_tells_it(watch, spend, start):
    for number in range(1 + start):
        with watch.run(Budget(llm_calls=1, model="cnet", name=f"budget {number}")) as run:
            spend(run)
    assert len(watch.told()) == 1 + start


# -- what is not ------------------------------------------------------------------------------------------------------------


def covered(run, spend):
    spend(run)


def refused(run, spend):
    with pytest.raises(BudgetExceeded):
        spend(run, 1000)


def released(run, spend):
    run.open(LLMCall(model="cent", input=["x"], max_output_tokens=1)).release()


def logged(run, spend):
    run.log(LLMCall(model="cent", input=[]), Usage(output_tokens=1), 10**10)


def in_a_nested_run(run, spend):
    with run.watchdog.run() as inner:
        spend(inner)


def in_a_thread(run, spend):
    thread = threading.Thread(target=spend, args=[run])
    thread.start()
    thread.join()


@pytest.mark.parametrize("work", [covered, refused, released, logged, in_a_nested_run, in_a_thread])
@pytest.mark.parametrize(
    "budget",
    [
        Budget(usd=1),
        Budget(usd=1, model="ce*"),
        Budget(llm_calls=900, tokens=999),
        Budget(usd=1, per="day"),
        Budget(baseline_multiple=5),
    ],
    ids=lambda budget: budget.name,
)
def test_a_budget_that_covered_a_call(watch, spend, work, budget):
    if work is refused and budget.usd is None:
        pytest.skip("it would fit")
    with watch.run(budget) as run:
        work(run, spend)
    assert watch.told() == []


def test_a_deadline_needs_no_call(watch):
    with watch.run(Budget(seconds=60)):
        pass
    assert watch.told() == []


def test_a_run_without_budgets(watch):
    with watch.run():
        pass
    assert watch.told() == []


def test_work_that_failed_has_not_come_to_its_end(watch):
    with pytest.raises(ValueError, match="first"), watch.run(Budget(usd=1)):
        raise ValueError("before the first call")
    assert watch.told() == []


def test_work_inside_an_except_block_has_not_failed(watch):
    try:
        raise ValueError("tried the other way before")
    except ValueError:
        with watch.run(Budget(usd=1)):
            pass
    assert len(watch.told()) == 1


def test_a_run_that_was_refused_elsewhere_might_have_come_there(watch, spend):
    with watch.run(Budget(llm_calls=1, name="few"), Budget(llm_calls=1, node="later")) as run:
        spend(run, node="first")
        with pytest.raises(BudgetExceeded):
            spend(run, node="second")
    assert watch.told() == []


def test_a_generator_that_is_left_early(watch, spend):
    @watch.run(Budget(usd=1, node="last"))
    def steps():
        spend(watch.watchdog.current_run(), node="first")
        yield 1
        spend(watch.watchdog.current_run(), node="last")

    for _ in steps():
        break
    assert watch.told() == []


def test_runs_that_a_shutdown_ends(watch):
    block = watch.run(Budget(usd=1))
    block.__enter__()
    watch.watchdog.shutdown()
    assert watch.told() == []


def test_a_place_where_the_budget_has_covered_calls(watch, spend):
    """A server whose requests need a model now and then."""
    for calls in (1, 0, 2, 0):
        with watch.run(Budget(usd=1)) as run:
            for _ in range(calls):
                spend(run)
    assert watch.told() == []


def test_another_place_with_the_same_budget_is_told(watch, spend):
    with watch.run(Budget(usd=1)) as run:
        spend(run)
    with watch.run(Budget(usd=1)):
        pass
    assert len(watch.told()) == 1


def test_names_that_exist_are_not_misspelt(watch, spend):
    with watch.run() as run:
        spend(run, node="write", tool="search")
    with watch.run(Budget(usd=1, node="write"), Budget(usd=1, node="re*", model="cent")) as run:
        spend(run, node="research")
    assert watch.told() == []


def test_a_run_of_a_forked_child_is_its_parents(watch):
    with watch.run(Budget(usd=1)) as run:
        run.pid += 1
    assert watch.told() == []


def test_what_looks_at_budgets_is_no_call(watch):
    with watch.run(Budget(usd=1)) as run:
        run.remaining()
        run.top_up(usd=1)
        str(run)
    assert len(watch.told()) == 1


# -- the budgets of the process -----------------------------------------------------------------------------------------------


def at_shutdown(make, caplog, budgets, work):
    watchdog = make(budgets=budgets)
    work(watchdog)
    caplog.clear()
    watchdog.shutdown()
    return [record.getMessage() for record in caplog.records]


def test_a_misspelt_budget_of_the_process_is_told_at_its_end(make, caplog, spend):
    def work(watchdog):
        with watchdog.run() as run:
            spend(run, node="writer")

    budgets = [Budget(usd=5, per="day"), Budget(usd=1, per="day", node="writre")]
    assert at_shutdown(make, caplog, budgets, work) == snapshot(
        [
            "1 model call and 0 tool calls (nodes: 'writer'; models: 'cent') were seen in this process, and none of them counts against its budget '$1 per day node=writre' (node='writre'), which has limited nothing. Did you mean node='writer'?"
        ]
    )


def test_budgets_of_a_process_without_calls_are_not_told(make, caplog):
    assert at_shutdown(make, caplog, [Budget(usd=1, per="day", node="write")], lambda watchdog: None) == []


def test_budgets_of_the_process_that_have_covered_calls_are_not_told(make, caplog, spend):
    def work(watchdog):
        spend(watchdog.process_run, node="write")
        with watchdog.run() as run:
            spend(run, model="even")

    budgets = [Budget(usd=5, per="day", node="write"), Budget(usd=1, per="day", model="even"), Budget(tool_calls=1, tool="search")]
    assert at_shutdown(make, caplog, budgets, work) == []
