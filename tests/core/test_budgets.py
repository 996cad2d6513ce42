"""Budgets as a user writes them: what is refused and how it is told, and where windows begin and end."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from inline_snapshot import snapshot

import clevagent
from clevagent import Budget, BudgetExceeded, LLMCall, ToolCall, UsageError
from clevagent_core.budgets import window_at


def message_of(function, *args, **kwargs):
    with pytest.raises(UsageError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def mistake(**fields):
    return message_of(Budget, **fields)


# -- mistakes, told where they are written ----------------------------------------------------------------------------------


def test_a_budget_without_a_limit():
    assert mistake(per="day") == snapshot(
        "Budget() has no limit, so it would never stop anything. Give at least one of usd, tokens, input_tokens, output_tokens, llm_calls, tool_calls, seconds, baseline_multiple, for example Budget(usd=0.50)."
    )


def test_a_ceiling_in_money_that_is_negative():
    assert mistake(usd=-5) == snapshot("usd=-5 is negative; money here is never below zero. Give a positive number of US dollars.")


def test_a_ceiling_in_money_that_is_zero():
    assert mistake(usd=0) == snapshot(
        "Budget(usd=0) comes to nothing (money is counted down to $0.000000000001), which would refuse every call. Give a positive number of US dollars, or leave usd out for no limit in money."
    )


def test_a_ceiling_in_money_that_is_too_small_to_count():
    assert mistake(usd=1e-13) == snapshot(
        "Budget(usd=1e-13) comes to nothing (money is counted down to $0.000000000001), which would refuse every call. Give a positive number of US dollars, or leave usd out for no limit in money."
    )


def test_a_ceiling_in_money_that_is_not_a_number():
    assert mistake(usd=math.nan) == snapshot(
        "usd=nan is not a finite amount, so nothing could ever be compared with it. Give a finite number of US dollars; for no limit, leave usd out."
    )


def test_a_ceiling_in_money_that_is_infinite():
    assert mistake(usd=math.inf) == snapshot(
        "usd=inf is not a finite amount, so nothing could ever be compared with it. Give a finite number of US dollars; for no limit, leave usd out."
    )


def test_a_ceiling_in_money_that_is_a_truth_value():
    assert mistake(usd=True) == snapshot(
        "usd=True is a bool, not an amount of money. Give US dollars as a number, for example usd=0.50."
    )


def test_a_ceiling_in_money_that_is_no_number():
    assert mistake(usd="five") == snapshot(
        "usd='five' cannot be read as a number. Give US dollars as a number, for example usd=0.50."
    )


def test_a_ceiling_in_money_that_no_ledger_can_hold():
    assert mistake(usd=10**7) == snapshot("usd=10000000 is more than a ledger can hold ($9,223,372). Give a smaller amount.")


@pytest.mark.parametrize("unit", ["tokens", "input_tokens", "output_tokens", "llm_calls", "tool_calls"])
@pytest.mark.parametrize("value", [0, -1, 1.5, math.nan, math.inf, 10**400, True, "5", Decimal(5)])
def test_a_count_that_is_no_ceiling_is_named(unit, value):
    assert mistake(**{unit: value}).startswith(f"Budget({unit}={value!r}) is ")


def test_a_count_that_is_negative():
    assert mistake(tokens=-1) == snapshot(
        "Budget(tokens=-1) is not a ceiling: a ceiling is a positive whole number, of at most 64 bits. Give one, or leave tokens out for no limit."
    )


def test_a_count_that_is_zero():
    assert mistake(llm_calls=0) == snapshot(
        "Budget(llm_calls=0) is not a ceiling: a ceiling is a positive whole number, of at most 64 bits. Give one, or leave llm_calls out for no limit."
    )


def test_a_count_that_is_not_whole():
    assert mistake(tool_calls=1.5) == snapshot(
        "Budget(tool_calls=1.5) is not a ceiling: a ceiling is a positive whole number, of at most 64 bits. Give one, or leave tool_calls out for no limit."
    )


def test_a_count_that_is_a_truth_value():
    assert mistake(tokens=True) == snapshot(
        "Budget(tokens=True) is a bool, not a count, so nothing could be compared with it. Give a positive whole number."
    )


def test_an_unknown_window():
    assert mistake(usd=1, per="week") == snapshot(
        "Budget(per='week') names no window that exists, so it could not be told when to start from zero. Use one of 'run', 'thread', 'hour', 'day', 'month', 'lifetime'."
    )


def test_an_unknown_action():
    assert mistake(usd=1, on_exceed="explode").startswith("Budget(on_exceed='explode') is no action")


def test_an_async_callable():
    async def ask(incident):
        """Never awaited."""

    assert "is an async function, and nothing would wait for it" in mistake(usd=1, on_exceed=ask)


def test_keeping_all_of_the_ceiling():
    assert mistake(usd=1, keep_usd=1) == snapshot(
        "Budget(keep_usd=1, usd=1) keeps nothing for the work itself: what is kept is part of the ceiling. Give a usd= that is larger than keep_usd=."
    )


def test_keeping_money_of_a_ceiling_that_is_not_in_money():
    assert mistake(tokens=5, keep_usd=0.1) == snapshot(
        "Budget(keep_usd=0.1, usd=None) keeps nothing for the work itself: what is kept is part of the ceiling. Give a usd= that is larger than keep_usd=."
    )


def test_keeping_less_than_nothing():
    assert mistake(usd=1, keep_usd=-1) == snapshot(
        "keep_usd=-1 is negative; money here is never below zero. Give a positive number of US dollars."
    )


@pytest.mark.parametrize("share", [0, -0.1, 1.01, math.nan, "0.8", True, None])
def test_a_warning_mark_that_is_no_share_is_named(share):
    assert mistake(usd=1, warn_at=share).startswith(f"Budget(warn_at={share!r}) is not a share of the ceiling")


def test_a_warning_mark_out_of_range():
    assert mistake(usd=1, warn_at=80) == snapshot(
        "Budget(warn_at=80) is not a share of the ceiling, so nothing could be told at it. Give a number above 0 and at most 1, such as 0.8."
    )


@pytest.mark.parametrize("scope", ["node", "tool", "model", "by", "name"])
@pytest.mark.parametrize("value", ["", 5])
def test_a_scope_that_names_nothing(scope, value):
    assert (
        mistake(usd=1, **{scope: value})
        == f"Budget({scope}={value!r}) names nothing. Give a non-empty string, or leave {scope} out."
    )


def test_two_budgets_with_one_name_in_one_list():
    budgets = [Budget(usd=1, name="b"), Budget(usd=2, name="b")]
    assert message_of(clevagent.run, budgets=budgets) == snapshot(
        "Two budgets are named 'b' but differ in usd (usd=1 and 2). One account cannot have two ceilings: give them different names, or make them equal."
    )


def test_two_equal_budgets_in_one_list_are_one(make, spend):
    with make().run(budgets=[Budget(usd=0.02), Budget(usd=0.02)]) as run:
        spend(run, 2)
    assert [state.spent for state in run.summary().budgets] == [0.02]


def test_two_budgets_with_one_name_on_one_account_of_a_run_and_of_init(make, llm):
    watchdog = make(budgets=[Budget(usd=5, per="day", name="b")])
    with watchdog.run(budgets=[Budget(usd=6, per="day", name="b")]) as run:
        assert message_of(run.open, llm()) == snapshot(
            "The budget 'b' is already in use for 'all' with a ceiling of $6.00, and is now given with $5.00. One account cannot have two ceilings: give the budgets different names, or raise the ceiling with top_up()."
        )


def test_two_budgets_with_one_name_on_one_account_in_calls(make, llm):
    watchdog = make(budgets=[Budget(llm_calls=5, per="day", name="b")])
    with watchdog.run(budgets=[Budget(llm_calls=6000, per="day", name="b")]) as run:
        assert "with a ceiling of 6,000 llm calls, and is now given with 5 llm calls." in message_of(run.open, llm())


def test_a_refused_conflict_holds_nothing(make, llm):
    watchdog = make(budgets=[Budget(usd=5, per="day", name="b"), Budget(usd=1, name="c")])
    with watchdog.run(budgets=[Budget(usd=6, per="day", name="b")]) as run:
        message_of(run.open, llm())
    assert watchdog.ledger.holds() == []


def test_two_budgets_with_one_name_on_accounts_of_their_own_are_no_conflict(make, spend):
    watchdog = make()
    for ceiling in (1, 2):
        with watchdog.run(budgets=[Budget(usd=ceiling, name="b")]) as run:
            spend(run)


@pytest.mark.parametrize("action", ["halt", "ask"])
def test_an_action_that_nothing_can_carry_out_is_refused_with_the_way(make, action):
    budgets = [Budget(usd=1, on_exceed=action)]
    for told in (message_of(make, budgets=budgets), message_of(clevagent.run, budgets=budgets)):
        assert "Use on_exceed='raise' there and catch clevagent.BudgetExceeded around the agent" in told
        assert "clevagent.guard(graph, budgets=[...])" in told


def test_an_action_that_nothing_can_carry_out():
    assert message_of(clevagent.run, budgets=[Budget(usd=1, on_exceed="halt")]) == snapshot(
        "Budget('$1 per run', on_exceed='halt') was given to run(budgets=[...]), which cannot end a framework's work with what there is so far, so nothing was set. Use on_exceed='raise' there and catch clevagent.BudgetExceeded around the agent (keep_usd= and run.wrap_up() pay for a closing answer); or give the budget to what can: clevagent.guard(graph, budgets=[...]) for 'halt' and 'ask', clevagent.guard(crew, budgets=[...]) for 'halt'; create_agent has BudgetMiddleware(on_exceed='halt')."
    )


@pytest.mark.parametrize("budgets", [[], [Budget(usd=1)]])
def test_an_action_for_a_guarded_object_that_is_none(budgets):
    told = message_of(clevagent.guard, object(), budgets=budgets, on_exceed="explode")
    assert told.startswith("guard(obj, on_exceed='explode') is no action")


def test_what_is_no_budget():
    assert message_of(clevagent.run, budgets=[0.5]) == snapshot(
        "budgets=[0.5] is no Budget, so nothing would be limited by it. Write budgets=[clevagent.Budget(usd=0.50)]."
    )


def test_a_callable_that_cannot_be_hashed_is_an_action():
    class Asked:
        __hash__ = None

        def __call__(self, incident):
            return "warn"

    clevagent.run(budgets=[Budget(usd=1, on_exceed=Asked())])


# -- what a budget is called and covers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "name"),
    [
        (Budget(usd=0.5), "$0.5 per run"),
        (Budget(usd=5, per="day"), "$5 per day"),
        (Budget(usd=5, llm_calls=10, per="hour", tool="search", by="tenant"), "$5 10 llm_calls per hour tool=search by=tenant"),
        (Budget(usd=1, name="mine"), "mine"),
    ],
)
def test_a_budget_is_named_by_what_it_limits(budget, name):
    assert budget.name == name


@pytest.mark.parametrize("usd", [5, 5.0, "5.00", Decimal(5)])
def test_one_amount_written_in_several_ways_has_one_name(usd):
    assert Budget(usd=usd).name == "$5 per run"


@pytest.mark.parametrize("usd", [500, 0.000001, 1e-7, "1e3"])
def test_names_are_written_without_exponents(usd):
    assert "e" not in Budget(usd=usd).label.split()[0].lower()


def test_a_float_is_taken_as_the_decimal_number_it_prints_as():
    assert Budget(usd=0.1).limits() == Budget(usd="0.1").limits() == ((0, 10**11),)


@pytest.mark.parametrize(("published", "action"), [("alert_only", "warn"), ("stop", "raise"), ("warn", "warn"), ("raise", "raise")])
def test_the_published_names_of_actions_are_accepted(published, action):
    assert Budget(usd=1, on_exceed=published).on_exceed == action


@pytest.mark.parametrize(
    ("budget", "call", "covered"),
    [
        (Budget(usd=1), LLMCall(model="gpt-4o"), True),
        (Budget(usd=1), ToolCall(tool="search"), True),
        (Budget(usd=1, model="gpt-*"), LLMCall(model="gpt-4o"), True),
        (Budget(usd=1, model="gpt-*"), LLMCall(model="claude"), False),
        (Budget(usd=1, model="gpt-*"), ToolCall(tool="search"), False),
        (Budget(usd=1, tool="sea*"), ToolCall(tool="search"), True),
        (Budget(usd=1, tool="search"), LLMCall(model="m", tool="search"), True),
        (Budget(usd=1, tool="search"), LLMCall(model="m"), False),
        (Budget(usd=1, node="a?"), LLMCall(model="m", node="ab"), True),
        (Budget(usd=1, node="a?"), LLMCall(model="m", node="AB"), False),
        (Budget(usd=1, node="a", model="m"), LLMCall(model="n", node="a"), False),
        (Budget(usd=1, model="m[1]"), LLMCall(model="m[1]"), True),
    ],
)
def test_what_a_budget_covers(budget, call, covered):
    assert budget.covers(call) is covered


def test_each_value_of_a_tag_has_a_ceiling_of_its_own(make, spend):
    watchdog = make(budgets=[Budget(usd=0.02, per="lifetime", by="tenant")])
    with watchdog.run(tags={"tenant": "a"}) as run:
        spend(run, 2)
        with pytest.raises(BudgetExceeded) as caught:
            spend(run)
    assert caught.value.incident.key == "tenant=a"
    with watchdog.run(tags={"tenant": "b"}) as run:
        spend(run, 2)


def test_runs_without_the_tag_share_one_ceiling(make, spend):
    watchdog = make(budgets=[Budget(usd=0.02, per="lifetime", by="tenant")])
    with watchdog.run() as run:
        spend(run, 2)
    with watchdog.run() as run, pytest.raises(BudgetExceeded):
        spend(run)


def test_each_conversation_has_a_ceiling_of_its_own(make, spend):
    run = make(budgets=[Budget(usd=0.02, per="thread")]).process_run
    spend(run, 2, thread_id="a")
    spend(run, 2, thread_id="b")
    with pytest.raises(BudgetExceeded, match="What does not fit is refused"):
        spend(run, thread_id="a")


def test_several_limits_of_one_budget_hold_independently(make, spend):
    run = make(budgets=[Budget(usd=1, llm_calls=2)]).process_run
    spend(run)
    spend(run)
    with pytest.raises(BudgetExceeded) as caught:
        spend(run)
    assert (caught.value.incident.unit, caught.value.spent, caught.value.ceiling) == ("llm_calls", 2, 2)


# -- windows ----------------------------------------------------------------------------------------------------------------


def at(*parts):
    return datetime(*parts, tzinfo=UTC)


@pytest.mark.parametrize(
    ("per", "begin", "label", "end"),
    [
        ("hour", at(2026, 1, 1, 13), "2026-01-01T13", at(2026, 1, 1, 14)),
        ("hour", at(2026, 12, 31, 23), "2026-12-31T23", at(2027, 1, 1)),
        ("day", at(2026, 1, 1), "2026-01-01", at(2026, 1, 2)),
        ("day", at(2028, 2, 28), "2028-02-28", at(2028, 2, 29)),
        ("day", at(2028, 2, 29), "2028-02-29", at(2028, 3, 1)),
        ("day", at(2027, 2, 28), "2027-02-28", at(2027, 3, 1)),
        ("day", at(2026, 12, 31), "2026-12-31", at(2027, 1, 1)),
        ("month", at(2026, 1, 1), "2026-01", at(2026, 2, 1)),
        ("month", at(2027, 2, 1), "2027-02", at(2027, 3, 1)),
        ("month", at(2028, 2, 1), "2028-02", at(2028, 3, 1)),
        ("month", at(2026, 12, 1), "2026-12", at(2027, 1, 1)),
    ],
)
def test_a_window_holds_from_its_first_moment_to_just_before_the_next(per, begin, label, end):
    moment = timedelta(milliseconds=1)
    window = (label, end.timestamp())
    assert window_at(per, begin.timestamp()) == window
    assert window_at(per, (end - moment).timestamp()) == window
    assert window_at(per, (begin - moment).timestamp()).label != label
    assert window_at(per, (begin - moment).timestamp()).ends_at == begin.timestamp()
    assert window_at(per, end.timestamp()).label != label


@pytest.mark.parametrize("per", ["run", "thread", "lifetime"])
def test_windows_that_no_calendar_ends(per):
    assert window_at(per, 0.0) == ("", math.inf)


def test_windows_are_those_of_utc(monkeypatch):
    import time

    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    try:
        assert window_at("day", at(2026, 1, 1, 23).timestamp()).label == "2026-01-01"
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("per", "last", "next_label"),
    [
        ("hour", at(2026, 1, 1, 13, 59, 59, 999000), "2026-01-01T14"),
        ("day", at(2028, 2, 28, 23, 59, 59, 999000), "2028-02-29"),
        ("month", at(2028, 2, 29, 23, 59, 59, 999000), "2028-03"),
    ],
)
def test_an_exhausted_window_stops_until_it_rolls_over(make, clock, spend, per, last, next_label):
    run = make(budgets=[Budget(usd=0.02, per=per)]).process_run
    clock.set(last)
    spend(run, 2)
    with pytest.raises(BudgetExceeded, match=rf"starts from zero when this {per} is over \(UTC\)"):
        spend(run)
    clock.advance(0.001)
    spend(run, 2)
    with pytest.raises(BudgetExceeded) as caught:
        spend(run)
    assert caught.value.incident.window == next_label


def test_a_call_that_ends_in_the_next_window_is_charged_to_the_one_it_began_in(make, clock, llm):
    watchdog = make(budgets=[Budget(usd=0.02, per="hour")])
    clock.set(at(2026, 1, 1, 13, 59, 59))
    ticket = watchdog.process_run.open(llm(2))
    clock.advance(2)
    ticket.settle(clevagent.Usage(output_tokens=2))
    assert {state.window: state.spent for state in watchdog.process_run.summary().budgets} == {"2026-01-01T13": 0.02}
    assert watchdog.process_run.remaining().usd == 0.02


def test_a_lifetime_budget_outlives_runs(make, spend):
    watchdog = make(budgets=[Budget(usd=0.02, per="lifetime")])
    with watchdog.run() as run:
        spend(run, 2)
    with watchdog.run() as run, pytest.raises(BudgetExceeded, match="for the rest of this run"):
        spend(run)


def test_a_budget_per_run_begins_anew_with_each_run(make, spend):
    watchdog = make(budgets=[Budget(usd=0.02)])
    for _ in range(2):
        with watchdog.run() as run:
            spend(run, 2)
            with pytest.raises(BudgetExceeded, match="for the rest of this run"):
                spend(run)
