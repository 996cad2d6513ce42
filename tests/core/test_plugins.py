"""Plugins: how they are loaded and refused, in what order they are asked, and what becomes of their faults."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
import types
import uuid
from pathlib import Path

import pytest
from inline_snapshot import snapshot

import clevagent
from clevagent import (
    Budget,
    BudgetExceeded,
    Incident,
    PluginError,
    Step,
    Stop,
    Stopped,
    ToolCall,
    Usage,
    UsageError,
    Warn,
    hookimpl,
)
from clevagent_core import hookspecs
from clevagent_core.plugins import BUILTINS
from clevagent_core.pricing import Price

LEDGER = "clevagent_core.ledger.memory"
CHECKS = [name for name in BUILTINS if name != LEDGER]
HOOKS = [name for name, value in vars(hookspecs).items() if name.startswith("clevagent_") and callable(value)]


def incident(kind="policy", message="it goes round"):
    return Incident(kind=kind, message=message)


class Stopper:
    @hookimpl
    def clevagent_before_call(self, run, call):
        return Stop(incident=incident())


class Warner:
    @hookimpl
    def clevagent_before_call(self, run, call):
        return Warn(incident=incident(kind="odd"))


class Held:
    """A guard that holds something of its own for each call, and keeps what became of it."""

    def __init__(self):
        self.ends = []
        self.max_output_tokens = None

    @hookimpl(tryfirst=True)
    def clevagent_reserve(self, run, ticket, extra):
        return self

    def settle(self, usage, cost_pico):
        self.ends.append("settled")

    def release(self):
        self.ends.append("released")

    def charge(self):
        self.ends.append("charged")


# -- built-ins --------------------------------------------------------------------------------------------------------------


def test_every_builtin_is_loaded_under_its_dotted_name(make):
    states = {state.name: (state.source, state.status) for state in make().plugins.states()}
    assert {name: states[name] for name in BUILTINS} == dict.fromkeys(BUILTINS, ("built-in", "loaded"))


@pytest.mark.parametrize("name", CHECKS)
def test_any_builtin_can_be_blocked(make, llm, name):
    watchdog = make(block=[name], budgets=[])
    watchdog.process_run.open(llm()).settle(Usage(output_tokens=1))
    assert [state.status for state in watchdog.plugins.states() if state.name == name] == ["blocked"]


def test_with_every_check_blocked_calls_pass_and_still_count(make, llm):
    with make(block=CHECKS).run() as run:
        for _ in range(3):
            run.open(llm(9)).settle(Usage(input_tokens=2, output_tokens=9))
        run.open(ToolCall(tool="search")).settle()
    summary = run.summary()
    assert (summary.total.calls, summary.total.output_tokens, summary.tool_calls, summary.unpriced_calls) == (3, 27, 1, 3)


def test_budgets_that_nothing_would_enforce_are_refused(make):
    with pytest.raises(UsageError, match="the plugin that enforces them is blocked"):
        make(block=CHECKS, budgets=[Budget(usd=0.01)])
    with (
        pytest.raises(UsageError, match="the plugin that enforces them is blocked"),
        make(block=CHECKS).run(budgets=[Budget(usd=1)]),
    ):
        pass


def test_with_every_check_blocked_a_call_that_may_have_been_sent_still_counts(make, llm):
    with make(block=CHECKS).run() as run:
        run.open(llm(9)).charge()
    assert run.summary().calls_charged_at_bound == 1


def test_a_blocked_ledger_is_an_error_that_names_it(make):
    with pytest.raises(UsageError, match=r"block leaves out clevagent_core\.ledger\.memory\)"):
        make(block=[LEDGER])


def test_an_unknown_ledger_is_refused(make):
    with pytest.raises(UsageError, match="ledger='postgres://x' is not known to any plugin"):
        make(ledger="postgres://x")


def test_with_the_price_list_blocked_a_ceiling_in_money_refuses(make, llm):
    run = make(block=["clevagent_core.price_list"], budgets=[Budget(usd=1)]).process_run
    with pytest.raises(UsageError, match="has no known price"):
        run.open(llm())


def test_with_bounds_blocked_the_input_counts_as_the_context_window(make, llm):
    run = make(block=["clevagent_core.bounds"], budgets=[Budget(input_tokens=999)]).process_run
    with pytest.raises(BudgetExceeded) as caught:
        run.open(llm())
    assert caught.value.needed == 1000


def test_blocking_a_name_that_nobody_has_is_refused(make):
    with pytest.raises(UsageError, match=r"block=\['nobody'\] names no plugin that is installed"):
        make(block=["nobody"])


def test_a_plugin_of_ones_own_is_blocked_by_the_name_of_its_class(make, llm):
    watchdog = make(plugins=[Stopper()], block=[f"{Stopper.__module__}.Stopper"])
    watchdog.process_run.open(llm()).release()
    assert (f"{Stopper.__module__}.Stopper", "blocked") in {(state.name, state.status) for state in watchdog.plugins.states()}


# -- what is refused at registration ----------------------------------------------------------------------------------------


def refused(make, plugin, match):
    with pytest.raises(PluginError, match=match):
        make(plugins=[plugin])


def test_a_misspelt_hook_is_refused(make):
    class Misspelt:
        @hookimpl
        def clevagent_befor_call(self, run, call):
            """Never called."""

    refused(make, Misspelt(), "clevagent_befor_call")


def test_an_argument_that_the_hook_does_not_have_is_refused(make):
    class Wrong:
        @hookimpl
        def clevagent_incident(self, incident, colour):
            """Never called."""

    refused(make, Wrong(), "colour")


def test_a_hot_hook_with_a_part_of_its_arguments_is_refused(make):
    class Part:
        @hookimpl
        def clevagent_before_call(self, call):
            """Never called."""

    refused(make, Part(), r"clevagent_before_call is a hot hook and must take \(run, call\), in this order")


def test_a_hot_hook_with_its_arguments_in_another_order_is_refused(make):
    class Turned:
        @hookimpl
        def clevagent_step(self, step, run):
            """Never called."""

    refused(make, Turned(), r"must take \(run, step\), in this order")


def test_a_hook_that_is_not_hot_may_take_a_part_of_its_arguments(make):
    seen = []

    class Part:
        @hookimpl
        def clevagent_run_ended(self, summary):
            seen.append(summary.run_id)

    with make(plugins=[Part()]).run() as run:
        pass
    assert seen == [run.run_id]


@pytest.mark.parametrize("options", [{"wrapper": True}, {"hookwrapper": True}])
def test_a_hot_hook_as_wrapper_is_refused(make, options):
    class Around:
        @hookimpl(**options)
        def clevagent_before_call(self, run, call):
            yield

    refused(make, Around(), "clevagent_before_call is a hot hook and is called one plugin at a time, without wrappers")


def test_a_wrapper_around_an_observer_is_refused_rather_than_never_run(make):
    class Around:
        @hookimpl(wrapper=True)
        def clevagent_price(self, model):
            return (yield)

    refused(make, Around(), "clevagent_price is called one plugin at a time, without wrappers")


def test_an_async_hook_is_refused(make):
    class Async:
        @hookimpl
        async def clevagent_incident(self, incident):
            """Never awaited."""

    refused(make, Async(), "clevagent_incident is called without await")


def test_a_class_instead_of_an_instance_is_refused(make):
    refused(make, Stopper, r"Stopper is a class.*Register Stopper\(\) instead")


def test_a_plugin_without_hooks_is_refused(make):
    refused(make, object(), "no method marked with @hookimpl")


def test_a_plugin_given_twice_is_refused(make):
    one = Warner()
    with pytest.raises(PluginError, match="is registered already"):
        make(plugins=[one, one])


def test_a_refused_second_registration_leaves_the_first_in_force(make, llm):
    one = Stopper()
    watchdog = make(plugins=[one])
    with pytest.raises(PluginError):
        watchdog.plugins.register(one)
    with pytest.raises(Stopped):
        watchdog.process_run.open(llm())


def test_a_refused_plugin_leaves_nothing_behind(make, llm):
    class Half:
        @hookimpl
        def clevagent_before_call(self, run, call):
            return Stop(incident=incident())

        @hookimpl
        def clevagent_step(self, step):
            """Refused."""

    watchdog = make()
    with pytest.raises(PluginError):
        watchdog.plugins.register(Half())
    watchdog.process_run.open(llm()).release()


def test_two_instances_of_one_class_are_two_plugins(make, heard):
    watchdog = make(plugins=[heard, type(heard)()])
    names = [state.name for state in watchdog.plugins.states() if state.source == "init"]
    assert (len(names), names[1]) == (2, f"{names[0]}#2")


def test_an_unregistered_plugin_is_asked_no_more(make, llm):
    stopper = Stopper()
    watchdog = make(plugins=[stopper])
    watchdog.plugins.unregister(stopper)
    watchdog.process_run.open(llm()).release()


# -- entry points -----------------------------------------------------------------------------------------------------------


class FakePoint:
    dist = None

    def __init__(self, name, found):
        self.name = name
        self._found = found

    def load(self):
        if isinstance(self._found, Exception):
            raise self._found
        return self._found


@pytest.fixture
def installed(monkeypatch):
    """Pretend that these plugins, and no others, are installed."""

    def install(**found):
        points = [FakePoint(name, plugin) for name, plugin in found.items()]
        monkeypatch.setattr("clevagent_core.plugins.entry_points", lambda group: points if group == "clevagent" else [])

    return install


def test_an_installed_plugin_is_loaded_and_a_class_is_made_an_instance(installed, make, llm):
    installed(stopper=Stopper)
    with pytest.raises(Stopped):
        make().process_run.open(llm())


def test_a_broken_installed_plugin_is_listed_and_not_fatal(installed, make, caplog):
    installed(broken=ImportError("no module named zzz"), warner=Warner)
    states = {state.name: state for state in make().plugins.states()}
    assert (states["broken"].status, states["broken"].detail) == ("broken", "ImportError: no module named zzz")
    assert states["warner"].status == "loaded"
    assert "The plugin 'broken' of entry point is broken and was left out" in caplog.text


def test_an_installed_plugin_with_a_misspelt_hook_is_listed_and_not_fatal(installed, make):
    class Misspelt:
        @hookimpl
        def clevagent_befor_call(self, run, call):
            """Never called."""

    installed(misspelt=Misspelt)
    assert {state.name: state.status for state in make().plugins.states()}["misspelt"] == "broken"


def test_a_blocked_installed_plugin_is_not_even_imported(installed, make):
    installed(broken=ImportError("never raised"))
    assert {state.name: state.status for state in make(block=["broken"]).plugins.states()}["broken"] == "blocked"


def test_a_plugin_that_fails_in_configure_is_a_plugin_error(make):
    class Unready:
        @hookimpl
        def clevagent_configure(self, watchdog):
            raise OSError("no disk")

    refused(make, Unready(), r"failed while it was configured: OSError\('no disk'\)")


# -- observers --------------------------------------------------------------------------------------------------------------


class Raising:
    """Raises in every observer."""

    @hookimpl(tryfirst=True)
    def clevagent_run_started(self, run):
        raise ValueError("started")

    @hookimpl(tryfirst=True)
    def clevagent_run_ended(self, run, summary):
        raise ValueError("ended")

    @hookimpl(tryfirst=True)
    def clevagent_call_settled(self, run, call, outcome):
        raise ValueError("settled")

    @hookimpl(tryfirst=True)
    def clevagent_call_failed(self, run, call, outcome):
        raise ValueError("failed")

    @hookimpl(tryfirst=True)
    def clevagent_step(self, run, step):
        raise ValueError("step")

    @hookimpl(tryfirst=True)
    def clevagent_incident(self, incident):
        raise ValueError("incident")

    @hookimpl(tryfirst=True)
    def clevagent_unconfigure(self, watchdog):
        raise ValueError("unconfigure")


def test_an_observer_that_raises_never_silences_the_next(make, heard, llm):
    watchdog = make(plugins=[heard, Raising(), Warner()])
    with watchdog.run() as run:
        run.open(llm()).settle(Usage(output_tokens=1))
        run.open(llm()).release()
        run.step(Step(kind="ping", name="ok"))
    watchdog.flush()
    assert (len(heard.started), len(heard.ended), len(heard.settled), len(heard.failed), len(heard.steps)) == (2, 1, 1, 1, 2)
    assert "odd" in heard.kinds


def test_an_observer_that_raises_is_reported_in_the_log(make, llm, caplog):
    with make(plugins=[Raising()]).run() as run:
        run.open(llm()).settle(Usage(output_tokens=1))
    assert "An observer of settled calls failed and was passed over." in caplog.text


def test_every_plugin_is_told_of_the_shutdown_whatever_another_one_raises(make):
    told = []

    class Last:
        @hookimpl(trylast=True)
        def clevagent_unconfigure(self, watchdog):
            told.append(watchdog)

    watchdog = make(plugins=[Last(), Raising()])
    watchdog.shutdown()
    assert told == [watchdog]


def test_settled_calls_and_pings_are_steps(make, heard, llm):
    with make(plugins=[heard]).run() as run:
        run.open(llm()).settle(Usage(output_tokens=1))
        run.open(ToolCall(tool="search")).settle()
    assert [(step.kind, step.name) for step in heard.steps] == [("llm_call", "cent"), ("tool_call", "search")]


@pytest.mark.parametrize(("end", "status"), [("release", "released"), ("charge", "charged")])
def test_failed_calls_tell_whether_they_were_charged(make, heard, llm, end, status):
    with make(plugins=[heard], budgets=[Budget(usd=1)]).run() as run:
        getattr(run.open(llm(2)), end)()
    assert [(outcome.status, outcome.cost_pico) for _, outcome in heard.failed] == [
        (status, 2 * 10**10 if status == "charged" else 0)
    ]


# -- guards -----------------------------------------------------------------------------------------------------------------


def test_a_guard_of_anybodys_can_stop_a_call(make, llm):
    with pytest.raises(Stopped, match="it goes round") as caught:
        make(plugins=[Stopper()]).process_run.open(llm())
    assert (type(caught.value), caught.value.incident.kind) == (Stopped, "policy")


def test_a_guard_of_anybodys_can_warn_and_observers_hear_it(make, heard, llm):
    watchdog = make(plugins=[heard, Warner()])
    watchdog.process_run.open(llm()).release()
    watchdog.flush()
    assert heard.kinds == ["odd"]


def test_the_first_stop_ends_the_asking(make, llm):
    asked = []

    class Asked:
        @hookimpl(trylast=True)
        def clevagent_before_call(self, run, call):
            asked.append(call)

    with pytest.raises(Stopped):
        make(plugins=[Asked(), Stopper()]).process_run.open(llm())
    assert asked == []


def test_guards_see_tool_calls_too(make):
    with pytest.raises(Stopped):
        make(plugins=[Stopper()]).process_run.open(ToolCall(tool="search"))


def test_a_stop_of_kind_budget_is_raised_as_budget_exceeded(make, llm):
    class Quota:
        @hookimpl
        def clevagent_before_call(self, run, call):
            return Stop(incident=incident(kind="budget", message="no more"))

    with pytest.raises(BudgetExceeded, match="no more"):
        make(plugins=[Quota()]).process_run.open(llm())


class Buggy:
    @hookimpl
    def clevagent_before_call(self, run, call):
        raise KeyError("oops")


class ClosedBuggy(Buggy):
    fails_closed = True


class Lying:
    @hookimpl
    def clevagent_before_call(self, run, call):
        return True


class LyingReserve:
    @hookimpl(trylast=True)
    def clevagent_reserve(self, run, ticket, extra):
        return "held"


@pytest.mark.parametrize("guard", [Buggy(), Lying(), LyingReserve()])
def test_a_fault_of_a_guard_lets_the_call_pass_and_is_told(make, heard, llm, guard):
    watchdog = make(plugins=[heard, guard], budgets=[Budget(usd=1)])
    watchdog.process_run.open(llm()).settle(Usage(output_tokens=1))
    watchdog.flush()
    assert [(told.kind, told.action) for told in heard.incidents] == [("guard", "warn")]


def test_a_fault_of_a_guard_that_fails_closed_stops_the_call_and_is_told(make, heard, llm):
    watchdog = make(plugins=[heard, ClosedBuggy()])
    with pytest.raises(Stopped, match=r"The guard ClosedBuggy failed: KeyError\('oops'\)"):
        watchdog.process_run.open(llm())
    watchdog.flush()
    assert [(told.kind, told.action) for told in heard.incidents] == [("guard", "raise")]


def test_a_fault_of_the_budget_guard_stops_a_call_under_an_enforced_ceiling(make, llm, monkeypatch):
    watchdog = make(budgets=[Budget(usd=1)])
    monkeypatch.setattr(watchdog.ledger, "reserve", lambda *_, **__: 1 / 0)
    with pytest.raises(Stopped, match="The guard BudgetGuard failed: ZeroDivisionError"):
        watchdog.process_run.open(llm())


def test_in_a_dry_run_a_fault_of_the_budget_guard_stops_nothing(make, llm, monkeypatch):
    watchdog = make(budgets=[Budget(usd=1)], dry_run=True)
    monkeypatch.setattr(watchdog.ledger, "reserve", lambda *_, **__: 1 / 0)
    watchdog.process_run.open(llm()).settle(Usage(output_tokens=1))
    assert watchdog.process_run.summary().total.calls == 1


# -- reservations -----------------------------------------------------------------------------------------------------------


def test_what_an_earlier_guard_holds_is_released_when_a_later_one_stops(make, llm):
    held = Held()
    with pytest.raises(BudgetExceeded):
        make(plugins=[held], budgets=[Budget(usd=0.01)]).process_run.open(llm(2))
    assert held.ends == ["released"]


def test_what_the_budget_guard_holds_is_released_when_a_later_guard_stops(make, llm):
    class Late:
        @hookimpl(trylast=True)
        def clevagent_reserve(self, run, ticket, extra):
            return Stop(incident=incident())

    watchdog = make(plugins=[Late()], budgets=[Budget(usd=1)])
    with pytest.raises(Stopped):
        watchdog.process_run.open(llm(2))
    assert watchdog.ledger.holds() == []
    assert watchdog.process_run.remaining().usd == 1


def test_an_interrupt_while_a_call_is_reserved_leaves_nothing_held(make, llm):
    """Ctrl-C, or an exception of a signal handler, after the budget guard has held the money."""

    class Interrupted:
        @hookimpl(trylast=True)
        def clevagent_reserve(self, run, ticket, extra):
            raise KeyboardInterrupt

    held = Held()
    watchdog = make(plugins=[Interrupted(), held], budgets=[Budget(usd=1, per="day")])
    with pytest.raises(KeyboardInterrupt), watchdog.run() as run:
        run.open(llm(2))
    assert watchdog.ledger.holds() == []
    assert watchdog.process_run.remaining().usd == 1
    assert held.ends == ["released"]


def test_an_interrupt_before_a_reservation_is_returned_leaves_nothing_held(make, llm, monkeypatch):
    """Ctrl-C in the few instructions between the ledger's hold and the guard's answer."""
    watchdog = make(budgets=[Budget(usd=1, per="day")])
    reserve = watchdog.ledger.reserve

    def interrupted(*args, **kwargs):
        reserve(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(watchdog.ledger, "reserve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        watchdog.process_run.open(llm(2))
    assert watchdog.ledger.holds() == []
    assert watchdog.process_run.remaining().usd == 1


def test_a_reservation_of_anybodys_is_charged_at_the_end_of_the_run(make, llm):
    """What is held, by whatever guard, may have been sent."""
    held = Held()
    watchdog = make(plugins=[held])
    with watchdog.run() as run:
        run.open(llm())
    assert held.ends == ["charged"]


@pytest.mark.parametrize("end", ["settle", "release", "charge"])
def test_a_reservation_of_anybodys_is_ended_once(make, llm, end):
    held = Held()
    ticket = make(plugins=[held]).process_run.open(llm())
    for _ in range(2):
        getattr(ticket, end)(*([Usage(output_tokens=1)] if end == "settle" else []))
    assert held.ends == [{"settle": "settled", "release": "released", "charge": "charged"}[end]]


@pytest.mark.parametrize(("end", "left"), [("settle", 0.99), ("release", 1.0), ("charge", 0.98)])
def test_a_reservation_that_fails_does_not_keep_the_budget_from_its_own(make, llm, end, left):
    class Failing(Held):
        def settle(self, usage, cost_pico):
            raise ValueError("settle")

        def release(self):
            raise ValueError("release")

        def charge(self):
            raise ValueError("charge")

    watchdog = make(plugins=[Failing()], budgets=[Budget(usd=1)])
    ticket = watchdog.process_run.open(llm(2))
    getattr(ticket, end)(*([Usage(output_tokens=1)] if end == "settle" else []))
    assert (watchdog.ledger.holds(), watchdog.process_run.remaining().usd) == ([], left)


# -- providers --------------------------------------------------------------------------------------------------------------


def test_a_price_of_anybodys_goes_before_the_built_in_one(make, llm):
    class Cheap:
        @hookimpl
        def clevagent_price(self, model):
            return Price(input=0, output=1).rates() if model == "cent" else None

    watchdog = make(plugins=[Cheap()])
    assert (watchdog.rates(llm()).upper_bound(0, 1), watchdog.rates(llm(model="even")).upper_bound(0, 1)) == (10**6, 10**6)
    assert watchdog.rates(llm()).context_window is None


def test_a_provider_that_does_not_know_leaves_it_to_the_next(make, llm):
    asked = []

    class Unsure:
        @hookimpl
        def clevagent_price(self, model, provider):
            asked.append((model, provider))

    assert make(plugins=[Unsure()]).rates(llm(provider="acme")).upper_bound(0, 1) == 10**10
    assert asked == [("cent", "acme")]


def test_a_price_provider_that_raises_counts_as_one_that_does_not_know(make, llm, caplog):
    class Broken:
        @hookimpl
        def clevagent_price(self):
            raise ValueError("no")

    assert make(plugins=[Broken()]).rates(llm()).upper_bound(0, 1) == 10**10
    assert "failed in clevagent_price and was passed over" in caplog.text


def test_a_bound_of_anybodys_goes_before_the_built_in_one(make, llm):
    class Exact:
        @hookimpl
        def clevagent_bound(self, call):
            return 7

    with pytest.raises(BudgetExceeded) as caught:
        make(plugins=[Exact()], budgets=[Budget(input_tokens=6)]).process_run.open(llm())
    assert caught.value.needed == 7


def test_a_bound_provider_that_raises_leaves_it_to_the_next(make, llm):
    class Broken:
        @hookimpl
        def clevagent_bound(self, call):
            raise ValueError("no")

    watchdog = make(plugins=[Broken()])
    assert watchdog.plugins.bound(llm()) == make().plugins.bound(llm())


def test_a_ledger_of_anybodys_is_opened_by_its_name(make, clock):
    from clevagent_core.ledger.memory import MemoryLedger

    opened = []

    class Elsewhere:
        @hookimpl
        def clevagent_ledger(self, url, clock):
            if url == "elsewhere":
                opened.append(clock)
                return MemoryLedger()
            return None

    make(plugins=[Elsewhere()], ledger="elsewhere")
    assert opened == [clock]


def test_guard_asks_plugins_in_turn(make):
    class Mine:
        @hookimpl
        def clevagent_guard(self, obj, watchdog, budgets, on_exceed):
            return ("guarded", obj, watchdog, budgets, on_exceed) if obj == "mine" else None

    watchdog = make(plugins=[Mine()])
    budget = Budget(usd=1)
    assert clevagent.guard("mine", budgets=[budget], watchdog=watchdog) == ("guarded", "mine", watchdog, (budget,), None)
    asking = Budget(usd=1, on_exceed="ask")
    assert clevagent.guard("mine", budgets=[budget], on_exceed="ask", watchdog=watchdog)[3:] == ((asking,), "ask")
    with pytest.raises(UsageError, match=r"does not know how to guard a builtins\.str"):
        clevagent.guard("yours", watchdog=watchdog)


def test_attach_asks_plugins_in_turn_and_once_for_each_framework(make):
    attached = []

    class Framework:
        @hookimpl
        def clevagent_attach(self, name, watchdog):
            if name == "mine":
                attached.append(watchdog)
                return True
            return None

    watchdog = make(plugins=[Framework()], attach=["mine"])
    watchdog.attach("mine")
    assert attached == [watchdog]
    with pytest.raises(UsageError, match=r"attach='yours': no plugin can attach to that.* Known here: 'auto', .*'langchain'"):
        watchdog.attach("yours")


class Attaches:
    """A plugin that attaches to the module ``name``."""

    def __init__(self, name, fails_with=None):
        self.name = name
        self.fails_with = fails_with
        self.attached = []

    @hookimpl
    def clevagent_attachable(self):
        return {self.name: self.name}

    @hookimpl
    def clevagent_attach(self, name, watchdog):
        if name != self.name:
            return None
        if self.fails_with is not None:
            raise self.fails_with
        assert sys.modules[name].IS_DONE  # its own import is over
        self.attached.append(watchdog)
        return True


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module that can be imported, and was not yet."""
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"framework_{uuid.uuid4().hex}"
    (tmp_path / f"{name}.py").write_text("IS_DONE = True")
    yield name
    sys.modules.pop(name, None)


def test_auto_attaches_when_a_framework_is_imported_and_imports_none(make, module):
    plugin = Attaches(module)
    watchdog = make(plugins=[plugin], attach="auto")
    assert plugin.attached == []
    assert module not in sys.modules
    importlib.import_module(module)
    assert plugin.attached == [watchdog]
    importlib.reload(sys.modules[module])
    assert plugin.attached == [watchdog]


def test_auto_attaches_at_once_to_what_is_imported_already(make, module):
    importlib.import_module(module)
    plugin = Attaches(module)
    watchdog = make(plugins=[plugin], attach=["auto"])
    assert plugin.attached == [watchdog]


def test_auto_attaches_nothing_to_a_watchdog_that_was_shut_down(make, module):
    plugin = Attaches(module)
    make(plugins=[plugin], attach="auto").shutdown()
    importlib.import_module(module)
    assert plugin.attached == []


def test_an_import_goes_on_where_auto_cannot_attach_and_it_is_told(make, module, heard):
    watchdog = make(plugins=[Attaches(module, fails_with=UsageError("it is too old")), heard], attach="auto")
    importlib.import_module(module)
    assert watchdog.flush() == 0
    assert [incident.message.replace(module, "MODULE") for incident in heard.incidents] == snapshot(
        [
            "MODULE was imported, but ClevAgent could not attach to it (it is too old), so its calls go out unchecked. Mend what is told, or guard what is made with it: clevagent.guard(...). init(attach=['MODULE']) fails instead of going on."
        ]
    )


def test_a_plugin_that_cannot_tell_what_it_attaches_to_is_passed_over(make, module, caplog):
    class Broken:
        @hookimpl
        def clevagent_attachable(self):
            raise RuntimeError("no list")

    plugin = Attaches(module)
    watchdog = make(plugins=[Broken(), plugin], attach="auto")
    importlib.import_module(module)
    assert plugin.attached == [watchdog]
    assert "could not tell what it attaches to" in caplog.text


def state_of(watchdog, plugin):
    (state,) = [state for state in watchdog.plugins.states() if state.name.endswith(type(plugin).__name__)]
    return state.status, state.detail


def test_a_plugin_whose_framework_cannot_be_found_is_not_installed(make, module):
    plugin = Attaches("framework_of_nobody.core")
    assert state_of(make(plugins=[plugin]), plugin) == ("not installed", "needs framework_of_nobody")
    plugin = Attaches(module)
    assert state_of(make(plugins=[plugin]), plugin) == ("loaded", "clevagent_attach, clevagent_attachable")
    assert module not in sys.modules


def test_a_module_inside_a_package_is_looked_for_without_importing_the_package(make, tmp_path, monkeypatch):
    """Several distributions may share a package: that it is there says nothing."""
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / f"framework_{uuid.uuid4().hex}"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    plugin = Attaches(f"{package.name}.core")
    watchdog = make(plugins=[plugin])
    assert state_of(watchdog, plugin) == ("not installed", f"needs {package.name}")
    (package / "core.py").write_text("raise AssertionError('imported')")
    importlib.invalidate_caches()
    assert state_of(watchdog, plugin)[0] == "loaded"
    plugin.name = f"{package.name}.core.inside"
    assert state_of(watchdog, plugin)[0] == "not installed"


def test_a_module_that_was_made_by_hand_counts_as_installed(make, module, monkeypatch):
    made = types.ModuleType(module)
    monkeypatch.setitem(sys.modules, module, made)
    plugin = Attaches(module)
    assert state_of(make(plugins=[plugin]), plugin)[0] == "loaded"
    plugin.name = f"{module}.inside"
    assert state_of(make(plugins=[plugin]), plugin)[0] == "not installed"


def test_one_framework_of_several_is_enough(make, module):
    class Both(Attaches):
        @hookimpl
        def clevagent_attachable(self):
            return {"nobodys": "framework_of_nobody", "mine": self.name}

    plugin = Both(module)
    assert state_of(make(plugins=[plugin]), plugin)[0] == "loaded"
    plugin.name = "framework_of_nobody_else"
    assert state_of(make(plugins=[plugin]), plugin) == (
        "not installed",
        "needs framework_of_nobody; or needs framework_of_nobody_else",
    )


# -- guards of one run ------------------------------------------------------------------------------------------------------


def test_the_guards_of_a_run_see_only_its_calls(make, llm):
    watchdog = make()
    with watchdog.run(guards=[Stopper()]) as run, pytest.raises(Stopped):
        run.open(llm())
    with watchdog.run() as run:
        run.open(llm()).release()


def test_the_guards_of_a_run_see_the_calls_of_runs_nested_in_it(make, llm):
    watchdog = make()
    with watchdog.run(guards=[Stopper()]), watchdog.run() as inner, pytest.raises(Stopped):
        inner.open(llm())


def test_the_guards_of_a_nested_run_do_not_see_the_calls_around_it(make, llm):
    watchdog = make()
    with watchdog.run() as outer:
        with watchdog.run(guards=[Stopper()]):
            pass
        outer.open(llm()).release()


def test_nested_guards_add_up(make, llm):
    seen = []

    def seer(name):
        class Seer:
            @hookimpl
            def clevagent_before_call(self, run, call):
                seen.append(name)

        return Seer()

    watchdog = make(plugins=[seer("watchdog")])
    with watchdog.run(guards=[seer("outer")]), watchdog.run(guards=[seer("inner")]) as run:
        run.open(llm()).release()
    assert seen == ["watchdog", "outer", "inner"]


def test_the_guards_of_a_run_observe_too(make, heard, llm):
    with make().run(guards=[heard]) as run:
        run.open(llm()).settle(Usage(output_tokens=1))
    assert (len(heard.settled), len(heard.steps)) == (1, 1)


def test_a_broken_guard_of_a_run_is_refused_when_the_run_begins(make):
    watchdog = make()
    with pytest.raises(PluginError), watchdog.run(guards=[Stopper]):
        pass
    assert watchdog.current.get() is None


# -- apart from each other --------------------------------------------------------------------------------------------------


def test_two_watchdogs_share_nothing(make, llm, heard):
    budget = Budget(usd=0.02, per="lifetime", name="shared")
    one, other = make(budgets=[budget], plugins=[heard, Stopper()]), make(budgets=[budget])
    other.process_run.open(llm(2)).settle(Usage(output_tokens=2))
    with other.run() as run:
        assert one.current_run() is one.process_run
        assert other.current_run() is run
    with pytest.raises(Stopped, match="it goes round"):
        one.process_run.open(llm(2))
    one.flush()
    assert (len(heard.settled), one.process_run.summary().total.calls) == (0, 0)


@pytest.mark.slow
def test_importing_the_package_imports_nothing_that_only_some_need():
    heavy = ("langchain", "langchain_core", "httpx", "pydantic", "genai_prices", "tenacity", "rich", "click", "openai", "anthropic")
    script = f"import sys, clevagent, clevagent_core.watchdog; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_importing_the_package_starts_no_thread_and_reads_no_settings():
    script = "import os, threading; os.environ['CLEVAGENT_NONSENSE'] = '1'; import clevagent; print(threading.active_count())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "1"


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_says_when_it_fires(hook):
    text = inspect.getdoc(getattr(hookspecs, hook)) or ""
    assert re.search(r"[Ff]ires|[Aa]sked|[Cc]heck|Hold|Give|Bound|Open|Wrap", text), f"{hook} has no docstring that tells its use"


def test_a_beat_is_told_with_what_was_used(make, clock, spend):
    told = []

    class Listener:
        @hookimpl
        def clevagent_beat(self, beat):
            told.append((beat.seq, beat.amounts.llm_calls, beat.totals.llm_calls))

    watchdog = make(plugins=[Listener()], interval=30)
    spend(watchdog.process_run)
    clock.advance(30)
    spend(watchdog.process_run)
    clock.advance(30)
    assert told == [(1, 1, 1), (2, 1, 2)]


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_test_that_names_it(hook):
    assert re.search(rf"def {hook}\(", Path(__file__).read_text(encoding="utf-8"))


def test_every_hot_hook_exists():
    assert set(hookspecs.HOT_HOOKS) <= set(HOOKS)
