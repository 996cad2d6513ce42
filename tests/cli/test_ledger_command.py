"""The command ``clevagent ledger``: through its own door, beside agents that use the file at the same time."""

import json
import os
import re
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing, contextmanager
from datetime import UTC, datetime

import pytest
from click.testing import CliRunner
from inline_snapshot import snapshot

from clevagent import Budget, BudgetExceeded, LLMCall, Price, ToolCall, Usage, Watchdog
from clevagent.cli import main
from clevagent.testing import FakeClock
from clevagent_core.ledger.account import Changes

TIMEOUT_S = 60.0
"""How long anything may take before it is a hang."""
CENT = Price(input=0, output=10_000, context_window=1000)
FUTURE = datetime(2999, 1, 1, tzinfo=UTC)
"""The command reads the real clock: windows of this day are open whenever the tests run, those of 2026-01-01 are over."""
SETTINGS = {"prices": {"cent": CENT}, "wait_s": 0}

WORKER = """
import sys
from clevagent import Budget, BudgetExceeded, LLMCall, Price, Usage, Watchdog

watchdog = Watchdog(
    agent="worker", ledger=sys.argv[1], prices={"cent": Price(input=0, output=10_000, context_window=1000)}, wait_s=0,
    budgets=[Budget(usd="0.10", per="lifetime", name="shared")],
)
for line in sys.stdin:
    what, cents = line.split()
    try:
        ticket = watchdog.current_run().open(LLMCall(model="cent", input=["hello"], max_output_tokens=int(cents)))
        if what == "spend":
            ticket.settle(Usage(input_tokens=1, output_tokens=int(cents)))
        print("passed", flush=True)
    except BudgetExceeded:
        print("refused", flush=True)
watchdog.shutdown()
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.db"


@pytest.fixture
def invoke(path, monkeypatch):
    """Run the command on the test's ledger, in 80 columns."""
    monkeypatch.chdir(path.parent)

    def invoke(*arguments, ledger=str(path), stdin=None, **environment):
        given = ["ledger", *(["--ledger", ledger] if ledger else []), *arguments]
        return CliRunner().invoke(main, given, input=stdin, env={"COLUMNS": "80", **environment})

    return invoke


@pytest.fixture
def watch(path):
    """Make watchdogs on the test's ledger, whose clock stands in a window that is open."""
    made = []

    def watch(*budgets, **settings):
        given = {"clock": FakeClock(FUTURE), "ledger": str(path), "agent": "research", "budgets": budgets, **SETTINGS, **settings}
        made.append(Watchdog(**given))
        return made[-1]

    yield watch
    for watchdog in made:
        watchdog.shutdown()


def hold(run, cents):
    return run.open(LLMCall(model="cent", input=["hello"], max_output_tokens=cents))


def spend(run, cents):
    hold(run, cents).settle(Usage(input_tokens=1, output_tokens=cents))


def is_refused(run, cents):
    try:
        spend(run, cents)
    except BudgetExceeded:
        return True
    return False


class Worker:
    """An agent in a process of its own."""

    def __init__(self, path):
        command = [sys.executable, "-c", WORKER, str(path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def do(self, what, cents):
        self.process.stdin.write(f"{what} {cents}\n")
        return self.process.stdout.readline().strip()


@pytest.fixture
def worker(path):
    """Start an agent beside the test: its ledger has one ceiling of $0.10 for good."""
    started = []

    def start():
        started.append(Worker(path))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate(timeout=TIMEOUT_S)


def shown(result):
    """Give what a command printed, with the ids of processes as a word."""
    assert result.exit_code == 0, result.output
    return without_pids(result.output)


def without_pids(output):
    return "\n".join(line.rstrip() for line in re.sub(r"\bprocess \d+", "process <pid>", output).splitlines())


def complaint(result):
    """Give what a command that could not be carried out says, in one line, and without the test's folder."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return re.sub(r"'/[^']*/", "'/", " ".join(result.output.split()))


# -- show -----------------------------------------------------------------------------------------------------------------


def test_show_of_a_ledger_in_which_nothing_was_called(invoke, watch):
    watch(Budget(usd=5, per="day", name="daily"))
    assert shown(invoke("show")) == snapshot("No account yet: nothing that a budget covers was called.")
    assert json.loads(invoke("show", "--json").output) == snapshot({"accounts": [], "processes": []})


@contextmanager
def busy_agent(watch):
    """An agent in the middle of everything: several budgets, keys, windows and units; money held, a run refused."""
    watchdog = watch(
        Budget(usd=50, per="day", name="daily"),
        Budget(usd="0.50", llm_calls=10, per="hour", by="tenant", name="tenants"),
        Budget(tokens=100_000, per="month", name="tokens a month"),
    )
    with watchdog.run(tags={"tenant": "acme"}, budgets=[Budget(usd="0.40", name="run")]) as run:
        spend(run, 30)
        assert is_refused(run, 20)
    with watchdog.run(tags={"tenant": "globex"}) as run:
        spend(run, 1)
        ticket = hold(run, 12)
        yield
        ticket.release()


def test_show_lists_accounts_and_processes_in_80_columns(invoke, watch):
    with busy_agent(watch):
        output = shown(invoke("show"))
    assert output == snapshot("""\
budget
  key            window         spent   held    ceiling  state
──────────────────────────────────────────────────────────────
daily            2999-01-01     $0.31  $0.12     $50.00  open
  all
tenants          2999-01-01T00  $0.30  $0.00      $0.50  open
  tenant=acme
tenants          2999-01-01T00      1      0         10  open
  tenant=acme                                 llm calls
tenants          2999-01-01T00  $0.01  $0.12      $0.50  open
  tenant=globex
tenants          2999-01-01T00      1      1         10  open
  tenant=globex                               llm calls
tokens a month   2999-01           33     13    100,000  open
  all                                            tokens

process <pid> of 'research': 1 call in flight\
""")
    assert max(map(len, output.splitlines())) <= 80


def test_show_says_what_is_exhausted_whoever_was_refused(invoke, watch):
    """All but what is kept for a wrap-up is spent; that a run was refused is its own affair."""
    watchdog = watch(Budget(usd="0.10", keep_usd="0.02", per="day", name="daily"), Budget(llm_calls=9, per="day", name="calls"))
    with watchdog.run() as run:
        spend(run, 7)
        assert is_refused(run, 2)
    states = {account["budget"]: account["exhausted"] for account in json.loads(invoke("show", "--json").output)["accounts"]}
    assert states == {"daily": False, "calls": False}
    with watchdog.run() as run:
        spend(run, 1)
    states = {account["budget"]: account["exhausted"] for account in json.loads(invoke("show", "--json").output)["accounts"]}
    assert states == {"daily": True, "calls": False}
    assert shown(invoke("show")) == snapshot("""\
budget
  key   window      spent   held    ceiling  state
──────────────────────────────────────────────────────
calls   2999-01-01      2      0          9  open
  all                             llm calls
daily   2999-01-01  $0.08  $0.00      $0.10  exhausted
  all

process <pid> of 'research': 0 calls in flight\
""")


@pytest.mark.parametrize("how", [("top-up", "daily", "--usd", "0.01"), ("reset", "daily", "--yes")], ids=["top-up", "reset"])
def test_what_an_operator_changes_lets_a_refused_run_go_on(invoke, watch, how):
    with watch(Budget(usd="0.10", per="day", name="daily")).run() as run:
        spend(run, 5)
        assert [is_refused(run, 6), is_refused(run, 1)] == [True, True]
        assert invoke(*how).exit_code == 0
        assert not is_refused(run, 1)


def test_show_all_lists_also_what_is_over(invoke, watch):
    """The runs that have ended, and the windows of days gone by."""
    before = watch(Budget(tool_calls=3, per="day", name="before"), clock=FakeClock())
    for _ in range(2):
        before.current_run().open(ToolCall(tool="search", arguments={})).settle()
    before.shutdown()
    with busy_agent(watch):
        output, without = shown(invoke("show", "--all")), shown(invoke("show"))
    output = re.sub(r"^  [0-9a-f]{30}\n[0-9a-f]{2}$", f"  {'0' * 30}\n00", output, flags=re.MULTILINE)
    assert output == snapshot("""\
budget
  key                             window         spent   held     ceiling  state
────────────────────────────────────────────────────────────────────────────────
before                            2026-01-01         2      0           3  over
  all                                                          tool calls
daily                             2999-01-01     $0.31  $0.12      $50.00  open
  all
run                               -              $0.30  $0.00       $0.40  over
  000000000000000000000000000000
00
tenants                           2999-01-01T00  $0.30  $0.00       $0.50  open
  tenant=acme
tenants                           2999-01-01T00      1      0          10  open
  tenant=acme                                                   llm calls
tenants                           2999-01-01T00  $0.01  $0.12       $0.50  open
  tenant=globex
tenants                           2999-01-01T00      1      1          10  open
  tenant=globex                                                 llm calls
tokens a month                    2999-01           33     13     100,000  open
  all                                                              tokens

process <pid> of 'research': 1 call in flight\
""")
    assert [line for line in without.splitlines() if line.endswith("over") or line == "run"] == []


def test_show_json_is_complete(invoke, watch):
    with busy_agent(watch):
        told = json.loads(invoke("show", "--json", "--all").output)
    for account in told["accounts"]:
        account["key"] = re.sub(r"^[0-9a-f]{32}$", "<run>", account["key"])
    for process in told["processes"]:
        assert process.pop("pid") == os.getpid()
    assert told == snapshot(
        {
            "accounts": [
                {
                    "budget": "daily",
                    "key": "all",
                    "window": "2999-01-01",
                    "unit": "usd",
                    "ceiling": 50.0,
                    "spent": 0.31,
                    "held": 0.12,
                    "free": 49.57,
                    "topped_up": 0.0,
                    "exhausted": False,
                    "over": False,
                },
                {
                    "budget": "run",
                    "key": "<run>",
                    "window": "",
                    "unit": "usd",
                    "ceiling": 0.4,
                    "spent": 0.3,
                    "held": 0.0,
                    "free": 0.1,
                    "topped_up": 0.0,
                    "exhausted": False,
                    "over": True,
                },
                {
                    "budget": "tenants",
                    "key": "tenant=acme",
                    "window": "2999-01-01T00",
                    "unit": "usd",
                    "ceiling": 0.5,
                    "spent": 0.3,
                    "held": 0.0,
                    "free": 0.2,
                    "topped_up": 0.0,
                    "exhausted": False,
                    "over": False,
                },
                {
                    "budget": "tenants",
                    "key": "tenant=acme",
                    "window": "2999-01-01T00",
                    "unit": "llm_calls",
                    "ceiling": 10,
                    "spent": 1,
                    "held": 0,
                    "free": 9,
                    "topped_up": 0,
                    "exhausted": False,
                    "over": False,
                },
                {
                    "budget": "tenants",
                    "key": "tenant=globex",
                    "window": "2999-01-01T00",
                    "unit": "usd",
                    "ceiling": 0.5,
                    "spent": 0.01,
                    "held": 0.12,
                    "free": 0.37,
                    "topped_up": 0.0,
                    "exhausted": False,
                    "over": False,
                },
                {
                    "budget": "tenants",
                    "key": "tenant=globex",
                    "window": "2999-01-01T00",
                    "unit": "llm_calls",
                    "ceiling": 10,
                    "spent": 1,
                    "held": 1,
                    "free": 8,
                    "topped_up": 0,
                    "exhausted": False,
                    "over": False,
                },
                {
                    "budget": "tokens a month",
                    "key": "all",
                    "window": "2999-01",
                    "unit": "tokens",
                    "ceiling": 100000,
                    "spent": 33,
                    "held": 13,
                    "free": 99954,
                    "topped_up": 0,
                    "exhausted": False,
                    "over": False,
                },
            ],
            "processes": [
                {
                    "agent": "research",
                    "started_at": 32472144000.0,
                    "is_alive": True,
                    "calls_in_flight": 1,
                }
            ],
        }
    )


@pytest.mark.slow
def test_show_tells_of_a_process_that_was_killed_with_calls_in_flight(invoke, worker):
    """And who looks changes nothing: the next agent that looks charges them."""
    killed, living = worker(), worker()
    assert [killed.do("hold", 2), killed.do("hold", 3), living.do("hold", 1)] == ["passed"] * 3
    killed.process.kill()
    killed.process.wait(TIMEOUT_S)
    assert shown(invoke("show")) == snapshot("""\
budget
  key   window  spent   held  ceiling  state
────────────────────────────────────────────
shared  -       $0.00  $0.06    $0.10  open
  all

process <pid> of 'worker': has ended with 2 calls in flight, charged when the next process looks
process <pid> of 'worker': 1 call in flight\
""")
    (dead, alive) = json.loads(invoke("show", "--json").output)["processes"]
    assert (dead["pid"], dead["is_alive"], dead["calls_in_flight"]) == (killed.process.pid, False, 2)
    assert (alive["pid"], alive["is_alive"], alive["calls_in_flight"]) == (living.process.pid, True, 1)
    assert living.do("spend", 5) == "refused"
    assert shown(invoke("show")) == snapshot("""\
budget
  key   window  spent   held  ceiling  state
────────────────────────────────────────────
shared  -       $0.05  $0.01    $0.10  open
  all

process <pid> of 'worker': 1 call in flight\
""")


@pytest.mark.slow
def test_a_process_is_one_line_however_long_its_id(invoke, worker, path):
    ended = worker()
    assert ended.do("hold", 2) == "passed"
    ended.process.kill()
    ended.process.wait(TIMEOUT_S)
    for pid in (10**digits for digits in range(7)):
        with closing(sqlite3.connect(path)) as database, database:
            database.execute("UPDATE owner SET pid = ?", (pid,))
        *_, before, line = invoke("show").output.splitlines()
        assert (before, line.startswith(f"process {pid} of 'worker': has ended with 1 call in flight")) == ("", True)


def test_names_that_look_like_markup_are_shown_as_they_are(invoke, watch):
    watchdog = watch(Budget(usd=1, per="lifetime", by="team", name="[red]stop[/red]"), agent="[bold]agent[/]")
    with watchdog.run(tags={"team": "[/]"}) as run:
        spend(run, 1)
    assert shown(invoke("show")) == snapshot("""\
budget
  key            window  spent   held  ceiling  state
─────────────────────────────────────────────────────
[red]stop[/red]  -       $0.01  $0.00    $1.00  open
  team=[/]

process <pid> of '[bold]agent[/]': 0 calls in flight\
""")
    assert shown(invoke("top-up", "[red]stop[/red]", "--usd", "1")) == snapshot(
        "The ceiling of '[red]stop[/red]' (team=[/]) is now $2.00."
    )


def test_long_names_are_folded_and_no_number_is_cut(invoke, watch):
    long = "a budget with a name that nobody would give it, but for a test"
    watchdog = watch(Budget(usd="1234567.89", per="month", by="team", name=long))
    with watchdog.run(tags={"team": "x" * 60}) as run:
        spend(run, 999)
    output = shown(invoke("show"))
    assert output == snapshot("""\
budget
  key                                window   spent   held        ceiling  state
────────────────────────────────────────────────────────────────────────────────
a budget with a name that nobody     2999-01  $9.99  $0.00  $1,234,567.89  open
would give it, but for a test
  team=xxxxxxxxxxxxxxxxxxxxxxxxxxxx
xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx

process <pid> of 'research': 0 calls in flight\
""")
    assert max(map(len, output.splitlines())) <= 80


# -- top-up ---------------------------------------------------------------------------------------------------------------


def test_after_a_top_up_a_run_goes_on_that_was_refused(invoke, watch):
    watchdog = watch(Budget(usd="0.10", per="day", name="daily"))
    run = watchdog.start_run()
    spend(run, 9)
    assert [is_refused(run, 2), is_refused(run, 1)] == [True, True]
    assert shown(invoke("top-up", "daily", "--usd", "0.05")) == snapshot("The ceiling of 'daily' (all) is now $0.15.")
    assert [is_refused(run, 6), is_refused(run, 1)] == [False, True]


def test_a_call_that_waits_goes_on_once_the_ceiling_is_raised(invoke, watch, monkeypatch):
    """The rest of the ceiling is held by another call, which nobody settles."""
    watchdog = watch(Budget(usd="0.10", per="lifetime", name="b"), wait_s=TIMEOUT_S, clock=None)
    run, waits = watchdog.current_run(), threading.Event()
    ticket = hold(run, 9)

    def subscribe(changes, listener, *, original=Changes.subscribe):
        unsubscribe = original(changes, listener)
        waits.set()
        return unsubscribe

    monkeypatch.setattr(Changes, "subscribe", subscribe)
    passed = []
    thread = threading.Thread(target=lambda: passed.append(not is_refused(run, 5)))
    thread.start()
    assert waits.wait(TIMEOUT_S)
    assert invoke("top-up", "b", "--usd", "1").exit_code == 0
    thread.join(TIMEOUT_S)
    ticket.release()
    assert passed == [True]


@pytest.mark.parametrize(
    ("unit", "call"),
    [
        ("tokens", lambda run: spend(run, 1)),
        ("input_tokens", lambda run: spend(run, 1)),
        ("output_tokens", lambda run: spend(run, 1)),
        ("llm_calls", lambda run: spend(run, 1)),
        ("tool_calls", lambda run: run.open(ToolCall(tool="search", arguments={})).settle()),
    ],
)
def test_top_up_in_each_unit(invoke, watch, unit, call):
    run = watch(Budget(**{unit: 10_000}, per="lifetime", name="b")).current_run()
    call(run)
    result = invoke("top-up", "b", f"--{unit.replace('_', '-')}", "2000")
    assert shown(result) == f"The ceiling of 'b' (all) is now 12,000 {unit.replace('_', ' ')}."
    (account,) = json.loads(invoke("show", "--json").output)["accounts"]
    assert (account["ceiling"], account["topped_up"]) == (12_000, 2000)


def test_top_up_needs_a_key_where_there_are_several_accounts(invoke, watch):
    watchdog = watch(Budget(usd=1, per="day", by="tenant", name="tenants"))
    for tenant in ("acme", "globex"):
        with watchdog.run(tags={"tenant": tenant}) as run:
            spend(run, 1)
    assert complaint(invoke("top-up", "tenants", "--usd", "1")) == snapshot(
        "Error: The budget 'tenants' has 2 open accounts, so nothing was changed. Say which, with --key: 'tenant=acme', 'tenant=globex'."
    )
    assert shown(invoke("top-up", "tenants", "--usd", "1", "--key", "tenant=acme")) == snapshot(
        "The ceiling of 'tenants' (tenant=acme) is now $2.00."
    )
    ceilings = {account["key"]: account["ceiling"] for account in json.loads(invoke("show", "--json").output)["accounts"]}
    assert ceilings == {"tenant=acme": 2.0, "tenant=globex": 1.0}


def test_top_up_chooses_the_limit_by_its_unit(invoke, watch):
    spend(watch(Budget(usd=1, llm_calls=5, per="day", name="b")).current_run(), 1)
    assert invoke("top-up", "b", "--llm-calls", "5").exit_code == 0
    ceilings = {account["unit"]: account["ceiling"] for account in json.loads(invoke("show", "--json").output)["accounts"]}
    assert ceilings == {"usd": 1.0, "llm_calls": 10}


def test_wrong_amounts_are_told_and_change_nothing(invoke, watch):
    spend(watch(Budget(usd=1, llm_calls=10, per="day", name="b")).current_run(), 1)
    before = invoke("show", "--json").output
    complaints = [
        complaint(invoke("top-up", "b", *arguments))
        for arguments in (
            [],
            ["--usd", "1", "--llm-calls", "1"],
            ["--usd", "0"],
            ["--usd", "9223372"],
            ["--llm-calls", "0"],
            ["--llm-calls", "-3"],
            ["--llm-calls", "1.5"],
            ["--llm-calls", "9223372036854775807"],
            ["--llm-calls", "100000000000000000000"],
            ["--tokens", "5"],
            ["--usd", "1", "--key", "tenant=acme"],
        )
    ]
    assert complaints == snapshot(
        [
            "Error: Give exactly one amount, for example --usd 5; nothing was changed.",
            "Error: Give exactly one amount, for example --usd 5; nothing was changed.",
            "Error: --usd 0 adds nothing, so nothing was changed. Give an amount above 0.",
            "Error: The ceiling of 'b' would be more than a ledger can hold (64 bits: $9,223,372, or 9,223,372,036,854,775,807 tokens or calls), so nothing was changed. Give a smaller amount.",
            "Error: --llm-calls 0 adds nothing, so nothing was changed. Give an amount above 0.",
            "Error: --llm-calls -3 adds nothing, so nothing was changed. Give an amount above 0.",
            "Usage: main ledger top-up [OPTIONS] [LEDGER] BUDGET Try 'main ledger top-up --help' for help. Error: Invalid value for '--llm-calls': '1.5' is not a valid integer.",
            "Error: The ceiling of 'b' would be more than a ledger can hold (64 bits: $9,223,372, or 9,223,372,036,854,775,807 tokens or calls), so nothing was changed. Give a smaller amount.",
            "Error: The ceiling of 'b' would be more than a ledger can hold (64 bits: $9,223,372, or 9,223,372,036,854,775,807 tokens or calls), so nothing was changed. Give a smaller amount.",
            "Error: No open account of the budget 'b' with a limit in tokens is in the ledger, so nothing was changed. It has: 'all' in usd, 'all' in llm_calls.",
            "Error: No open account of the budget 'b' for 'tenant=acme' with a limit in usd is in the ledger, so nothing was changed. It has: 'all' in usd, 'all' in llm_calls.",
        ]
    )
    for amount in ("-1", "much", "nan", "inf", "99999999"):
        assert complaint(invoke("top-up", "b", "--usd", amount)).startswith(f"Error: --usd={amount!r} ")
    assert complaint(invoke("top-up", "c", "--usd", "1")) == snapshot(
        "Error: No open account of the budget 'c' with a limit in usd is in the ledger, so nothing was changed. There are: 'b'."
    )
    assert invoke("show", "--json").output == before


def test_what_is_over_cannot_be_topped_up(invoke, watch):
    with watch().run(budgets=[Budget(usd=1, name="b")]) as run:
        spend(run, 1)
    assert complaint(invoke("top-up", "b", "--usd", "1")) == snapshot(
        "Error: No open account of the budget 'b' with a limit in usd is in the ledger, so nothing was changed. It has no open account at all."
    )


# -- reset ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def spent(watch):
    """An agent that has spent all of its ceiling, and was topped up before."""
    watchdog = watch(Budget(usd="0.10", per="day", by="tenant", name="tenants"))
    for tenant, cents in (("acme", 10), ("globex", 4)):
        with watchdog.run(tags={"tenant": tenant}) as run:
            spend(run, cents)
            assert is_refused(run, 8)
    return watchdog


def spent_by_key(invoke):
    return {account["key"]: account["spent"] for account in json.loads(invoke("show", "--json").output)["accounts"]}


def test_reset_asks_and_starts_from_zero(invoke, spent):
    assert shown(invoke("reset", "tenants", stdin="y\n")) == snapshot("""\
'tenants' (tenant=acme) has spent $0.10.
'tenants' (tenant=globex) has spent $0.04.
Start from zero? What was spent is forgotten [y/N]: y
Started 2 accounts from zero.\
""")
    assert spent_by_key(invoke) == {"tenant=acme": 0.0, "tenant=globex": 0.0}
    with spent.run(tags={"tenant": "acme"}) as run:
        assert not is_refused(run, 10)


@pytest.mark.parametrize("stdin", ["n\n", "\n", ""], ids=["no", "nothing", "end"])
def test_a_reset_that_is_not_confirmed_changes_nothing(invoke, spent, stdin):
    result = invoke("reset", "tenants", stdin=stdin)
    assert result.exit_code == 1
    assert "Aborted!" in result.output
    assert spent_by_key(invoke) == {"tenant=acme": 0.1, "tenant=globex": 0.04}


def test_reset_of_one_key_without_a_question(invoke, spent):
    assert shown(invoke("reset", "tenants", "--key", "tenant=globex", "--yes")) == snapshot("""\
'tenants' (tenant=globex) has spent $0.04.
Started 1 account from zero.\
""")
    assert spent_by_key(invoke) == {"tenant=acme": 0.1, "tenant=globex": 0.0}


def test_reset_keeps_what_is_held_and_takes_back_what_was_topped_up(invoke, watch):
    run = watch(Budget(usd="0.10", per="day", name="daily")).current_run()
    spend(run, 6)
    ticket = hold(run, 3)
    assert invoke("top-up", "daily", "--usd", "1").exit_code == 0
    assert invoke("reset", "daily", "--yes").exit_code == 0
    (account,) = json.loads(invoke("show", "--json").output)["accounts"]
    assert {name: account[name] for name in ("ceiling", "spent", "held", "topped_up")} == snapshot(
        {"ceiling": 0.1, "spent": 0.0, "held": 0.03, "topped_up": 0.0}
    )
    ticket.settle(Usage(input_tokens=1, output_tokens=2))
    (account,) = json.loads(invoke("show", "--json").output)["accounts"]
    assert (account["spent"], account["held"]) == (0.02, 0.0)


def test_reset_of_what_is_not_there(invoke, spent):
    assert complaint(invoke("reset", "[red]", "--yes")) == snapshot(
        "Error: No open account of the budget '[red]' is in the ledger, so nothing was changed. There are: 'tenants'."
    )
    assert complaint(invoke("reset", "tenants", "--key", "tenant=nobody", "--yes")) == snapshot(
        "Error: No open account of the budget 'tenants' for 'tenant=nobody' is in the ledger, so nothing was changed. It has: 'tenant=acme' in usd, 'tenant=globex' in usd."
    )


# -- which file -----------------------------------------------------------------------------------------------------------


COMMANDS = pytest.mark.parametrize(
    "command", [["show"], ["top-up", "b", "--usd", "1"], ["reset", "b", "--yes"]], ids=lambda c: c[0]
)


@COMMANDS
def test_where_there_is_no_file_none_is_made(invoke, path, command):
    assert complaint(invoke(*command)) == snapshot(
        "Error: There is no ledger at '/ledger.db', so there is nothing to show or to change. Agents make it when they start with clevagent.init(ledger='sqlite:///...'); name their file with --ledger or CLEVAGENT_LEDGER."
    )
    assert list(path.parent.iterdir()) == []


@COMMANDS
def test_without_a_file_to_look_at_each_command_says_how_to_name_one(invoke, command):
    assert complaint(invoke(*command, ledger=None)) == snapshot(
        "Error: No ledger was named, so there is nothing to look at. Give --ledger sqlite:///path, or set CLEVAGENT_LEDGER. (Accounts in memory end with their process and cannot be seen from outside.)"
    )
    assert complaint(invoke(*command, ledger="memory")) == snapshot(
        "Error: 'memory' is not a file, so there is nothing to look at. Give --ledger sqlite:///path, or set CLEVAGENT_LEDGER. (Accounts in memory end with their process and cannot be seen from outside.)"
    )


@COMMANDS
@pytest.mark.parametrize("content", [b"Dear diary,\n" * 1000, b""], ids=["text", "folder"])
def test_what_is_no_ledger_is_refused_and_left_alone(invoke, path, command, content):
    if content:
        path.write_bytes(content)
    else:
        path.mkdir()
    assert complaint(invoke(*command))
    assert path.is_dir() or path.read_bytes() == content


def test_a_database_of_another_program_is_refused(invoke, path):
    sqlite3 = pytest.importorskip("sqlite3")
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE recipe (name)")
    connection.commit()
    connection.close()
    before = path.read_bytes()
    assert complaint(invoke("show")).startswith("Error: '/ledger.db' is a database of another")
    assert path.read_bytes() == before


def test_the_ledger_of_the_environment_is_used_and_the_option_goes_before_it(invoke, watch, path, tmp_path):
    watch(Budget(usd=1, per="day", name="daily"))
    url = f"sqlite:///{path}"
    assert shown(invoke("show", ledger=None, CLEVAGENT_LEDGER=url)) == shown(invoke("show"))
    assert shown(invoke("show", CLEVAGENT_LEDGER="sqlite:///no-such-file.db")) == shown(invoke("show"))
    assert "no-such-file" in complaint(invoke("show", ledger=None, CLEVAGENT_LEDGER="sqlite:///no-such-file.db"))


def ways(name, *rest):
    """Every way to name the ledger of one command."""
    ledger = "ledger.db"
    return [
        pytest.param(["--ledger", ledger, name, *rest], id=f"{name}-before"),
        pytest.param([name, "--ledger", ledger, *rest], id=f"{name}-after"),
        pytest.param([name, *rest, f"--ledger={ledger}"], id=f"{name}-at-the-end"),
        pytest.param([name, ledger, *rest], id=f"{name}-argument"),
        pytest.param(
            ["--ledger", f"sqlite:///{ledger}", name, ledger, *rest, "--ledger", f"./{ledger}"], id=f"{name}-thrice-the-same"
        ),
    ]


@pytest.mark.parametrize("arguments", [*ways("show", "--json"), *ways("top-up", "b", "--usd", "1"), *ways("reset", "b", "--yes")])
def test_the_ledger_is_named_before_or_after_the_command_or_as_its_argument(invoke, watch, arguments):
    """What the command line says goes before the environment."""
    spend(watch(Budget(usd=1, per="day", name="b")).current_run(), 1)
    result = invoke(*arguments, ledger=None, CLEVAGENT_LEDGER="no-such-file.db")
    assert result.exit_code == 0, result.output
    (account,) = json.loads(invoke("show", "--json").output)["accounts"]
    expected = {"show": (0.01, 1.0), "top-up": (0.01, 2.0), "reset": (0.0, 1.0)}
    (command,) = expected.keys() & set(arguments)
    assert (account["spent"], account["ceiling"]) == expected[command]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--ledger", "ledger.db", "show", "--ledger", "other.db"],
        ["--ledger", "ledger.db", "show", "other.db"],
        ["show", "other.db", "--ledger", "ledger.db"],
        ["--ledger", "ledger.db", "top-up", "b", "--usd", "1", "--ledger", "other.db"],
        ["top-up", "other.db", "b", "--usd", "1", "--ledger", "ledger.db"],
        ["--ledger", "ledger.db", "reset", "b", "--yes", "--ledger", "other.db"],
        ["reset", "other.db", "b", "--yes", "--ledger", "ledger.db"],
    ],
    ids=" ".join,
)
def test_two_different_ledgers_are_refused_and_neither_is_changed(invoke, watch, path, arguments):
    for name in ("ledger.db", "other.db"):
        spend(watch(Budget(usd=1, per="day", name="b"), ledger=str(path.parent / name)).current_run(), 1)
    assert complaint(invoke(*arguments, ledger=None)) == snapshot(
        "Error: Different ledgers were named, 'ledger.db' and 'other.db', so none was opened. Give one of them."
    )
    for name in ("ledger.db", "other.db"):
        (account,) = json.loads(invoke("show", "--json", ledger=name).output)["accounts"]
        assert (account["spent"], account["ceiling"]) == (0.01, 1.0)


def test_a_file_without_a_suffix_is_found_by_its_bare_name(invoke, watch, path):
    spend(watch(Budget(usd=1, per="day", name="daily"), ledger=f"sqlite:///{path.parent / 'accounts'}").current_run(), 1)
    assert "daily" in shown(invoke("show", "accounts", ledger=None))
    assert "'account' is not a file" in complaint(invoke("show", "account", ledger=None))


@pytest.mark.parametrize("command", ["top-up", "reset"])
def test_one_argument_is_the_budget_and_more_than_two_are_refused(invoke, watch, command):
    """A name with spaces that was not quoted changes nothing."""
    spend(watch(Budget(usd=1, per="day", name="b")).current_run(), 1)
    assert "Missing argument 'BUDGET'" in complaint(invoke(command))
    assert "No open account of the budget 'ledger.db'" in complaint(
        invoke(command, "ledger.db", *(["--usd", "1"] * (command == "top-up")))
    )
    assert complaint(invoke(command, "tokens", "a", "month")).endswith(
        "Error: Got 3 arguments, where [LEDGER] BUDGET are at most two: tokens a month"
    )


@pytest.mark.parametrize("command", [["top-up", "ledger.db", "--usd", "1"], ["reset", "ledger.db"]], ids=["top-up", "reset"])
def test_a_ledger_without_a_budget_behind_it_is_told_as_that(invoke, watch, path, command):
    spend(watch(Budget(usd=1, per="day", name="b"), ledger=str(path.parent / "ledger.db")).current_run(), 1)
    assert complaint(invoke(*command, ledger=None)).endswith("Error: Missing argument 'BUDGET' after the ledger 'ledger.db'.")


def test_one_file_by_two_names_is_one_ledger(invoke, watch, path):
    spend(watch(Budget(usd=1, per="day", name="daily"), ledger=str(path.parent / "ledger.db")).current_run(), 1)
    (path.parent / "link.db").symlink_to("ledger.db")
    assert "daily" in shown(invoke("--ledger", "link.db", "show", "ledger.db", ledger=None))


@pytest.mark.slow
@pytest.mark.parametrize("command", [[], ["show"], ["top-up"], ["reset"]], ids=["ledger", "show", "top-up", "reset"])
def test_help_imports_neither_rich_nor_sqlite(command):
    """``--help`` stays quick: what a command needs is imported when it runs."""
    code = (
        f"import sys; from clevagent.cli import main; main(['ledger', *{command!r}, '--help'], standalone_mode=False); "
        "print([name for name in ('rich', 'sqlite3', 'httpx', 'langchain_core') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    assert done.stdout.splitlines()[-1] == "[]"


# -- beside a running agent -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_operator_beside_a_running_agent(path, worker):
    """Both are real processes: the agent is refused, goes on after a top-up, is refused again, and goes on after a reset."""
    environment = os.environ | {"CLEVAGENT_LEDGER": str(path), "COLUMNS": "80"}

    def operate(*arguments):
        command = [sys.executable, "-c", "from clevagent.cli import main; main()", "ledger", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=TIMEOUT_S)
        assert (done.returncode, done.stderr) == (0, "")
        return without_pids(done.stdout)

    agent = worker()
    assert [agent.do("spend", 8), agent.do("hold", 1), agent.do("spend", 5)] == ["passed", "passed", "refused"]
    assert operate("show") == snapshot("""\
budget
  key   window  spent   held  ceiling  state
────────────────────────────────────────────
shared  -       $0.08  $0.01    $0.10  open
  all

process <pid> of 'worker': 1 call in flight\
""")
    assert agent.do("spend", 1) == "passed"
    assert operate("top-up", "shared", "--usd", "0.05") == "The ceiling of 'shared' (all) is now $0.15."
    assert [agent.do("spend", 5), agent.do("spend", 1)] == ["passed", "refused"]
    assert operate("reset", "shared", "--yes") == snapshot("""\
'shared' (all) has spent $0.14.
Started 1 account from zero.\
""")
    assert [agent.do("spend", 9), agent.do("spend", 2)] == ["passed", "refused"]
    (account,) = json.loads(operate("show", "--json"))["accounts"]
    assert (account["spent"], account["held"], account["ceiling"], account["exhausted"]) == (0.09, 0.01, 0.1, False)
