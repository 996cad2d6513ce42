"""Settings: where they come from, what is refused, and how often ``init`` may be called."""

from __future__ import annotations

import pytest
from inline_snapshot import snapshot

import clevagent
from clevagent import Budget, PluginError, Price, UsageError, hookimpl
from clevagent_core import default
from clevagent_core.settings import Settings


def message_of(function, *args, **kwargs):
    with pytest.raises(UsageError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def resolve(environment=None, **arguments):
    return Settings.resolve(arguments, environment or {})


# -- where a setting comes from ---------------------------------------------------------------------------------------------


def test_an_argument_goes_before_the_environment():
    assert resolve({"CLEVAGENT_AGENT": "env"}, agent="argument").agent == "argument"


def test_the_environment_goes_before_the_default():
    assert resolve({"CLEVAGENT_AGENT": "env"}).agent == "env"


def test_none_counts_as_not_given():
    assert resolve({"CLEVAGENT_AGENT": "env"}, agent=None).agent == "env"


def test_without_both_the_default_stands():
    assert (resolve().agent, resolve().budgets, resolve().wait_s) == ("agent", (), 30.0)


def test_the_environment_of_the_process_is_read_by_init(monkeypatch):
    monkeypatch.setenv("CLEVAGENT_AGENT", "research")
    assert clevagent.init().settings.agent == "research"


def test_other_variables_are_left_alone():
    assert resolve({"CLEVER": "x", "HOME": "y"}) == resolve()


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("agent", "research", "research"),
        ("ledger", "memory", "memory"),
        ("attach", "langchain, crewai", ("langchain", "crewai")),
        ("block", "a b,c", ("a", "b", "c")),
        ("dry_run", "Yes", True),
        ("dry_run", "off", False),
        ("dry_run", "", False),
        ("estimate", "expected", "expected"),
        ("assume_output_tokens", "512", 512),
        ("wait_s", "0.5", 0.5),
        ("hold_s", "60", 60.0),
        ("flush_s", "0", 0.0),
        ("unknown_price", "allow", "allow"),
        ("unattributed", "process", "process"),
        ("budgets", "", ()),
    ],
)
def test_every_setting_can_be_read_from_the_environment(variable, text, value):
    assert getattr(resolve({f"CLEVAGENT_{variable.upper()}": text}), variable) == value


@pytest.mark.parametrize("name", ["prices", "plugins"])
def test_what_is_not_text_is_not_in_the_environment(name):
    assert f"CLEVAGENT_{name.upper()}" in message_of(resolve, {f"CLEVAGENT_{name.upper()}": "x"})


# -- budgets in the environment ---------------------------------------------------------------------------------------------


def budgets(text):
    return resolve({"CLEVAGENT_BUDGETS": text}).budgets


def test_budgets_are_parted_by_semicolons_and_their_fields_by_blanks():
    assert budgets("usd=5 per=day; llm_calls=100") == (Budget(usd=5.0, per="day"), Budget(llm_calls=100))


def test_empty_parts_of_budgets_are_passed_over():
    assert budgets(" ; usd=1e-1 ;; ") == (Budget(usd=0.1),)


def test_a_budget_from_the_environment_can_have_every_kind_of_field():
    (budget,) = budgets("usd=5 per=day model=gpt-* on_exceed=warn warn_at=.5 keep_usd=1 name=daily")
    assert budget == Budget(usd=5.0, per="day", model="gpt-*", on_exceed="warn", warn_at=0.5, keep_usd=1.0, name="daily")


def test_a_name_that_looks_like_a_number_stays_a_name():
    assert budgets("usd=5 by=tenant name=2026")[0].name == "2026"


@pytest.mark.parametrize("text", ["usd", "usd=five", "colour=red", "usd=5 per=week", "per=day", "usd=-1", "usd=nan", "usd = 5"])
def test_a_wrong_budget_in_the_environment_names_the_variable(text):
    assert f"The environment variable CLEVAGENT_BUDGETS={text!r} cannot be used: " in message_of(budgets, text)


def test_messages_for_wrong_budgets_in_the_environment():
    assert message_of(budgets, "usd=5 colour=red") == snapshot(
        "The environment variable CLEVAGENT_BUDGETS='usd=5 colour=red' cannot be used: it has 'colour=red', which is not one of baseline_multiple, by, input_tokens, keep_usd, llm_calls, model, name, node, on_exceed, output_tokens, per, seconds, tokens, tool, tool_calls, usd, warn_at followed by = and a value. Correct it, or unset it."
    )
    assert "cannot be used: Budget(per='week') names no window" in message_of(budgets, "usd=5 per=week")


# -- what is refused --------------------------------------------------------------------------------------------------------


def test_an_unknown_argument_names_the_nearest():
    assert message_of(resolve, budget=[Budget(usd=1)]) == snapshot(
        "'budget' is no setting of ClevAgent, so nothing would come of it. Did you mean 'budgets'? Known are: agent, api_key, assume_output_tokens, attach, auto_cost, block, budgets, capture, dry_run, endpoint, estimate, flush_s, hold_s, interval, ledger, on_cost_exceeded, on_loop, on_stall, plugins, prices, spool, stall_after, unattributed, unknown_price, wait_s."
    )


def test_an_unknown_variable_names_the_nearest():
    assert message_of(resolve, {"CLEVAGENT_DRYRUN": "1"}) == snapshot(
        "'CLEVAGENT_DRYRUN' is no environment variable of ClevAgent, so nothing would come of it. Did you mean 'CLEVAGENT_DRY_RUN'? Known are: CLEVAGENT_AGENT, CLEVAGENT_API_KEY, CLEVAGENT_ASSUME_OUTPUT_TOKENS, CLEVAGENT_ATTACH, CLEVAGENT_AUTO_ATTACH, CLEVAGENT_AUTO_COST, CLEVAGENT_BLOCK, CLEVAGENT_BUDGETS, CLEVAGENT_CAPTURE, CLEVAGENT_DRY_RUN, CLEVAGENT_ENDPOINT, CLEVAGENT_ESTIMATE, CLEVAGENT_FLUSH_S, CLEVAGENT_HOLD_S, CLEVAGENT_INTERVAL, CLEVAGENT_LEDGER, CLEVAGENT_ON_COST_EXCEEDED, CLEVAGENT_ON_LOOP, CLEVAGENT_ON_STALL, CLEVAGENT_SPOOL, CLEVAGENT_STALL_AFTER, CLEVAGENT_UNATTRIBUTED, CLEVAGENT_UNKNOWN_PRICE, CLEVAGENT_WAIT_S."
    )


def test_an_unknown_argument_that_is_near_to_nothing_lists_what_there_is():
    assert "Did you mean" not in message_of(resolve, xyzzy=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("agent", ""),
        ("agent", 5),
        ("budgets", Budget(usd=1)),
        ("budgets", "usd=5"),
        ("budgets", [5]),
        ("prices", [1]),
        ("prices", {"m": (1, 2)}),
        ("attach", "langchain"),
        ("plugins", object()),
        ("block", {"a"}),
        ("dry_run", "false"),
        ("dry_run", 1),
        ("estimate", "lower"),
        ("assume_output_tokens", 0),
        ("assume_output_tokens", 1.5),
        ("assume_output_tokens", True),
        ("wait_s", -1),
        ("wait_s", float("nan")),
        ("wait_s", float("inf")),
        ("wait_s", True),
        ("wait_s", "5"),
        ("hold_s", 0.5),
        ("flush_s", -0.1),
        ("unknown_price", "free"),
        ("unattributed", "guess"),
    ],
)
def test_a_wrong_value_is_refused_by_name(name, value):
    assert message_of(resolve, **{name: value}).startswith(f"{name}=")


@pytest.mark.parametrize(
    ("variable", "text"),
    [("DRY_RUN", "maybe"), ("ASSUME_OUTPUT_TOKENS", "many"), ("WAIT_S", "soon")],
)
def test_a_value_that_cannot_be_read_names_the_variable(variable, text):
    assert f"The environment variable CLEVAGENT_{variable}='{text}' cannot be used: it is n" in message_of(
        resolve, {f"CLEVAGENT_{variable}": text}
    )


def test_messages_for_wrong_values():
    assert message_of(resolve, dry_run="false") == snapshot(
        "dry_run='false' is neither True nor False; taken as true, it would stop nothing. Write dry_run=True or dry_run=False."
    )
    assert message_of(resolve, budgets=Budget(usd=1)) == snapshot(
        "budgets=Budget(usd=1, tokens=None, input_tokens=None, output_tokens=None, llm_calls=None, tool_calls=None, seconds=None, baseline_multiple=None, per='run', node=None, tool=None, model=None, by=None, on_exceed='raise', warn_at=0.8, keep_usd=0, name='$1 per run') is not a list. Write budgets=[...] with Budget items."
    )
    assert message_of(resolve, prices={"m": (1, 2)}) == snapshot(
        "prices={'m': (1, 2)} is no Price, so its calls could not be priced. Write prices={'m': clevagent.Price(input=2.50, output=10)} (US dollars per million tokens)."
    )
    assert message_of(resolve, wait_s=-1) == snapshot(
        "wait_s=-1 is no number of seconds, so no deadline could be set by it. Give a number of at least 0."
    )
    assert message_of(resolve, {"CLEVAGENT_DRY_RUN": "maybe"}) == snapshot(
        "The environment variable CLEVAGENT_DRY_RUN='maybe' cannot be used: it is neither on (1, true, yes, on) nor off (0, false, no, off). Correct it, or unset it."
    )
    assert message_of(resolve, {"CLEVAGENT_WAIT_S": "soon"}) == snapshot(
        "The environment variable CLEVAGENT_WAIT_S='soon' cannot be used: it is no number of seconds. Correct it, or unset it."
    )


# -- init, once -------------------------------------------------------------------------------------------------------------


def test_init_with_the_same_settings_gives_the_same_watchdog():
    first = clevagent.init(agent="a", budgets=[Budget(usd=1)], prices={"m": Price(input=1, output=1)})
    assert clevagent.init(agent="a", budgets=[Budget(usd=1)], prices={"m": Price(input=1, output=1)}) is first


def test_a_second_init_with_other_settings_names_what_differs():
    clevagent.init(agent="a", budgets=[Budget(usd=1)])
    assert message_of(clevagent.init, agent="b", budgets=[Budget(usd=1)]) == snapshot(
        "clevagent.init() was called a second time with other settings: agent is 'a', and is now given as 'b'. The watchdog of this process is already running, and what it has counted would be lost. Call init once, before anything is guarded; or call clevagent.shutdown() first, which ends every run; or make a second one that shares nothing with clevagent.Watchdog(...)."
    )


def test_after_a_refused_second_init_the_first_goes_on():
    first = clevagent.init(agent="a")
    message_of(clevagent.init, agent="b")
    assert default.current() is first


def test_after_shutdown_init_may_be_called_with_other_settings():
    clevagent.init(agent="a")
    clevagent.shutdown()
    assert clevagent.init(agent="b").settings.agent == "b"


def test_without_init_the_first_that_needs_a_watchdog_starts_one():
    with clevagent.run() as run:
        assert run.watchdog.settings == Settings()


def test_an_implicit_watchdog_that_was_not_used_is_replaced():
    implicit = default.current()
    assert not implicit.is_used
    assert clevagent.init(agent="late") is not implicit
    assert default.current().settings.agent == "late"


def test_looking_at_an_implicit_watchdog_does_not_use_it():
    run = default.current().current_run()
    run.summary(), run.remaining(), str(run)
    clevagent.init(agent="late")


def use_by_run():
    with clevagent.run():
        pass


def use_by_call():
    with clevagent.llm_call(model="gpt-4o", input="hello") as call:
        call.settle(input_tokens=1, output_tokens=1)


def use_by_open_call():
    clevagent.llm_call(model="gpt-4o", input="hello").__enter__()


def use_by_tool_call():
    with clevagent.tool_call("search"):
        pass


@pytest.mark.parametrize(
    "use", [use_by_run, use_by_call, use_by_open_call, use_by_tool_call, lambda: clevagent.log_cost(cost_usd=1)]
)
def test_an_implicit_watchdog_that_was_used_is_not_replaced(use):
    use()
    implicit = default.current()
    assert "was started by the first call that needed it" in message_of(clevagent.init, agent="late")
    assert default.current() is implicit


def test_an_implicit_watchdog_that_was_used_may_be_inited_with_what_it_has():
    use_by_run()
    implicit = default.current()
    assert clevagent.init() is implicit


def test_a_replacement_that_fails_does_not_leave_one_that_was_shut_down():
    class Broken:
        @hookimpl
        def clevagent_configure(self, watchdog):
            raise OSError("no disk")

    default.current()
    with pytest.raises(PluginError):
        clevagent.init(plugins=[Broken()])
    with clevagent.run() as run:
        assert run.ended_at is None


def test_a_wrong_setting_leaves_no_watchdog_behind():
    message_of(clevagent.init, agent="")
    assert clevagent.init(agent="right").settings.agent == "right"
